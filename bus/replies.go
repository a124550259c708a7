package bus

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// maxInFlight bounds PublishAsync; stallWait is how long it waits for room.
const (
	maxInFlight = 8192
	stallWait   = 200 * time.Millisecond
)

var errNoAnswer = fmt.Errorf("%w: no answer in time", ErrUnknownOutcome)

// replies sends requests and matches the answers. The client library's own
// requests wait out their timeout when the connection goes; these end at once, so
// that a write can be settled as soon as the server is back.
type replies struct {
	nc     *nats.Conn
	prefix string
	slots  chan struct{}
	quit   chan struct{}
	ended  chan struct{}

	mu      sync.Mutex
	next    uint64
	pending map[uint64]*pending
}

type pending struct {
	subject  string
	deadline time.Time // zero: the asker has its own
	done     func(*nats.Msg, error)
}

func newReplies() *replies {
	return &replies{
		slots: make(chan struct{}, maxInFlight), quit: make(chan struct{}), ended: make(chan struct{}),
		pending: map[uint64]*pending{},
	}
}

func (r *replies) start(nc *nats.Conn) error {
	r.nc = nc
	r.prefix = nc.NewInbox() + "."
	sub, err := nc.Subscribe(r.prefix+"*", r.receive)
	if err != nil {
		return err
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil { // bounded by what is asked
		return err
	}
	go r.expire()
	return nil
}

func (r *replies) stop() {
	close(r.quit)
	<-r.ended
}

func (r *replies) expire() {
	defer close(r.ended)
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-r.quit:
			return
		case now := <-tick.C:
			r.fail(func(p *pending) bool { return !p.deadline.IsZero() && now.After(p.deadline) }, errNoAnswer)
		}
	}
}

func (r *replies) failAll(err error) { r.fail(func(*pending) bool { return true }, err) }

// failDenied ends what waits for an answer to a subject that the server refused.
func (r *replies) failDenied(err error) {
	text := err.Error()
	r.fail(func(p *pending) bool { return strings.Contains(text, `"`+p.subject+`"`) }, err)
}

func (r *replies) fail(which func(*pending) bool, err error) {
	var gone []*pending
	r.mu.Lock()
	for id, p := range r.pending {
		if which(p) {
			delete(r.pending, id)
			gone = append(gone, p)
		}
	}
	r.mu.Unlock()
	for _, p := range gone {
		p.done(nil, err)
	}
}

func (r *replies) take(id uint64) *pending {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.pending[id]
	delete(r.pending, id)
	return p
}

func (r *replies) receive(m *nats.Msg) {
	id, err := strconv.ParseUint(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:], 36, 64)
	if err != nil {
		return
	}
	p := r.take(id)
	if p == nil {
		return
	}
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
		p.done(nil, fmt.Errorf("%w: nobody listens", ErrUnavailable))
		return
	}
	p.done(m, nil)
}

// send hands one message over; done is called once, perhaps before send returns.
func (r *replies) send(subject string, hdr nats.Header, data []byte, deadline time.Time, done func(*nats.Msg, error)) (id uint64) {
	r.mu.Lock()
	r.next++
	id = r.next
	r.pending[id] = &pending{subject: subject, deadline: deadline, done: done}
	r.mu.Unlock()
	m := &nats.Msg{Subject: subject, Reply: r.prefix + strconv.FormatUint(id, 36), Header: hdr, Data: data}
	err := nats.ErrConnectionReconnecting
	if r.nc.IsConnected() {
		err = r.nc.PublishMsg(m)
	}
	if err != nil {
		if p := r.take(id); p != nil {
			p.done(nil, sendError(err))
		}
	}
	return id
}

type answer struct {
	msg *nats.Msg
	err error
}

// ask sends once and waits for the answer until ctx ends.
func (r *replies) ask(ctx context.Context, subject string, hdr nats.Header, data []byte) (*nats.Msg, error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, context.Cause(ctx))
	}
	// A process that was stopped wakes up after the deadline before its context knows.
	if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, context.DeadlineExceeded)
	}
	got := make(chan answer, 1)
	id := r.send(subject, hdr, data, time.Time{}, func(m *nats.Msg, err error) { got <- answer{m, err} })
	select {
	case a := <-got:
		return a.msg, a.err
	case <-ctx.Done():
		r.take(id)
		return nil, fmt.Errorf("%w: no answer: %w", ErrUnknownOutcome, context.Cause(ctx))
	}
}

func (r *replies) acquire() bool {
	select {
	case r.slots <- struct{}{}:
		return true
	default:
	}
	t := time.NewTimer(stallWait)
	defer t.Stop()
	select {
	case r.slots <- struct{}{}:
		return true
	case <-t.C:
		return false
	}
}

func (r *replies) release() { <-r.slots }
