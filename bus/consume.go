package bus

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func ignoreAnswer(*nats.Msg, error) {}

// Msg is one message of a stream. The functions are set for messages of Consume:
// Ack is final, Nak asks for it again after a delay, Term drops it, InProgress
// starts the time to acknowledge anew. None waits for the server.
type Msg struct {
	Subject   string
	Header    nats.Header
	Data      []byte
	Sequence  uint64    // in the stream
	Time      time.Time // when it was stored
	Delivered uint64    // how often, 1 at first
	Pending   uint64    // how many were behind it when the server sent it; 0: it was the newest

	Ack        func() error
	Nak        func(delay time.Duration) error
	Term       func() error
	InProgress func() error
}

func newMsg(m jetstream.Msg, meta *jetstream.MsgMetadata) Msg {
	return Msg{
		Subject: m.Subject(), Header: m.Headers(), Data: m.Data(),
		Sequence: meta.Sequence.Stream, Time: meta.Timestamp, Delivered: meta.NumDelivered, Pending: meta.NumPending,
	}
}

// ConsumerSpec is a durable pull consumer with explicit acknowledgement and
// unlimited deliveries.
type ConsumerSpec struct {
	Stream, Durable   string
	Filter            string // a subject; "" is the whole stream
	AckWait           time.Duration
	MaxAckPending     int           // -1 is unlimited
	InactiveThreshold time.Duration // 0: it stays while nobody pulls
	// Memory keeps its state off the disk. A single server that restarts forgets the
	// consumer then: whoever made it makes it again at each reconnect.
	Memory bool
}

// EnsureConsumer makes a durable consumer or changes it to the spec. Only core
// services may; it is idempotent.
func (c *Conn) EnsureConsumer(ctx context.Context, s ConsumerSpec) error {
	ctx, cancel := context.WithTimeout(ctx, OpTimeout)
	defer cancel()
	for {
		err := c.waitConnected(ctx)
		if err == nil {
			_, err = c.JS.CreateOrUpdateConsumer(ctx, s.Stream, jetstream.ConsumerConfig{
				Durable: s.Durable, FilterSubject: s.Filter, AckPolicy: jetstream.AckExplicitPolicy,
				AckWait: s.AckWait, MaxAckPending: s.MaxAckPending, MaxDeliver: -1, InactiveThreshold: s.InactiveThreshold, MemoryStorage: s.Memory,
			})
		}
		if err == nil {
			return nil
		}
		if !transient(err) || !sleep(ctx, sessionPause) {
			return fmt.Errorf("consumer %s of %s: %w", s.Durable, s.Stream, err)
		}
	}
}

// DeleteConsumer removes a durable consumer. What is gone already is no error.
func (c *Conn) DeleteConsumer(ctx context.Context, stream, durable string) error {
	ctx, cancel := context.WithTimeout(ctx, OpTimeout)
	defer cancel()
	err := c.JS.DeleteConsumer(ctx, stream, durable)
	if err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
		return fmt.Errorf("delete consumer %s of %s: %w", durable, stream, err)
	}
	return nil
}

// ConsumeOptions say what to consume and how.
type ConsumeOptions struct {
	Stream, Durable string
	MaxMessages     int              // taken from the server and not yet handled; 0 is 256
	Workers         int              // handlers at a time; 0 is 16
	Key             func(Msg) string // what is handled in order; nil is by subject
}

// Consume gives the messages of a durable consumer to handle, several at a time and
// in order per key, until ctx ends; then it waits for the handlers and returns nil.
// It waits for a consumer that is not there yet, goes on after a server restart and
// binds again when the consumer is made anew. handle settles each message by Ack, Nak
// or Term; what it leaves comes again after the consumer's AckWait. Every message may
// come twice.
func (c *Conn) Consume(ctx context.Context, o ConsumeOptions, handle func(context.Context, Msg)) error {
	if o.MaxMessages <= 0 {
		o.MaxMessages = 256
	}
	if o.Workers <= 0 {
		o.Workers = 16
	}
	if o.Key == nil {
		o.Key = func(m Msg) string { return m.Subject }
	}
	lanes := newLanes(ctx, o, handle)
	p := &puller{c: c, o: o, lanes: lanes, kick: make(chan struct{}, 1)}
	lanes.freed = p.poke
	quiet := false
	for ctx.Err() == nil {
		err := p.session(ctx, func() { quiet = false })
		if errors.Is(err, errRestart) || ctx.Err() != nil {
			continue
		}
		if !quiet {
			c.log.Warn().Err(err).Str("stream", o.Stream).Str("consumer", o.Durable).Msg("cannot consume, trying again")
			quiet = true
		}
		sleep(ctx, sessionPause)
	}
	lanes.wait()
	return nil
}

const (
	pullExpiry    = 30 * time.Second // the answers to an agent's request are let through for two minutes
	pullHeartbeat = 2 * time.Second
	// clusterExpiry is the same on a cluster. When an agent's server dies, another may
	// still hold its pull and take the way of the answers for open, since that begins in
	// the account of the stream: what it delivers there is lost until AckWait. So such a
	// pull must not live long.
	clusterExpiry = 5 * time.Second
	pullSilence   = 5 * time.Second // without a message or heartbeat
)

// puller asks a durable consumer for messages, in sessions that last until the
// connection goes.
//
// Each session has an inbox of its own that is given up at once when the connection
// goes, before the client library subscribes to it again. Across accounts the server
// forgets at a disconnect how the answers to a pull lead to the agent, but keeps the
// pull while anyone listens to its inbox: messages for it would be missing until
// AckWait. The library's own Consume has that fault.
type puller struct {
	c     *Conn
	o     ConsumeOptions
	lanes *lanes
	kick  chan struct{} // something changed: look whether to pull

	mu    sync.Mutex
	inbox string    // under mu: of this session
	asked int       // under mu: messages pulled for and not come
	heard time.Time // under mu
	fault error     // under mu: ends the session
}

func (p *puller) poke() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// receive takes what comes to the inbox, messages and the words about pulls.
func (p *puller) receive(m *nats.Msg) {
	status := ""
	if len(m.Data) == 0 {
		status = m.Header.Get("Status")
	}
	p.mu.Lock()
	if m.Sub.Subject != p.inbox { // of a session before: a message is good, the rest is past
		p.mu.Unlock()
		if status == "" {
			p.take(m)
		}
		return
	}
	p.heard = time.Now()
	switch status {
	case "":
		p.asked = max(0, p.asked-1)
	case "100": // heartbeat
	case "404", "408": // a pull ran out
		left, _ := strconv.Atoi(m.Header.Get("Nats-Pending-Messages"))
		p.asked = max(0, p.asked-left)
	default: // the consumer was deleted, the server stops, nobody listens
		p.fault = fmt.Errorf("%s %s", status, m.Header.Get("Description"))
	}
	p.mu.Unlock()
	if status == "" {
		p.take(m)
	}
	p.poke()
}

func (p *puller) take(m *nats.Msg) {
	meta, err := m.Metadata()
	if err != nil {
		p.c.log.Error().Err(err).Str("subject", m.Subject).Msg("cannot read where a message comes from")
		return
	}
	p.lanes.add(p.msg(m, meta))
}

func (p *puller) msg(m *nats.Msg, meta *nats.MsgMetadata) Msg {
	say := func(word string) error {
		if err := p.c.NC.Publish(m.Reply, []byte(word)); err != nil {
			return sendError(err)
		}
		return nil
	}
	return Msg{
		Subject: m.Subject, Header: m.Header, Data: m.Data,
		Sequence: meta.Sequence.Stream, Time: meta.Timestamp, Delivered: meta.NumDelivered,
		Ack:        func() error { return say("+ACK") },
		Nak:        func(delay time.Duration) error { return say(fmt.Sprintf(`-NAK {"delay": %d}`, delay)) },
		Term:       func() error { return say("+TERM") },
		InProgress: func() error { return say("+WPI") },
	}
}

// session pulls until ctx ends, the connection was away or something is wrong.
func (p *puller) session(ctx context.Context, bound func()) error {
	if err := p.c.waitConnected(ctx); err != nil {
		return err
	}
	here, reconnected := p.c.generation(), p.c.Reconnected()
	if err := p.c.bind(ctx, p.o); err != nil {
		return err
	}
	p.mu.Lock()
	p.inbox, p.asked, p.heard, p.fault = p.c.NC.NewInbox(), 0, time.Now(), nil
	inbox := p.inbox
	p.mu.Unlock()
	sub, err := p.c.NC.Subscribe(inbox, p.receive)
	if err != nil {
		return sendError(err)
	}
	forget := p.c.whenDisconnected(func() {
		if !p.c.still(here) {
			sub.Unsubscribe()
			p.fail(inbox, errRestart)
		}
	})
	giveUp := func() {
		forget()
		sub.Unsubscribe()
	}
	defer func() {
		if ctx.Err() == nil && p.c.still(here) {
			time.AfterFunc(pullExpiry, giveUp) // the server may answer its pulls until then
			return
		}
		giveUp()
	}()
	if !p.c.still(here) {
		return errRestart // it went before we could be told
	}
	bound()
	tick := time.NewTicker(pullHeartbeat)
	defer tick.Stop()
	for {
		if err := p.pull(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-reconnected:
			if !p.c.still(here) {
				return errRestart
			}
			reconnected = p.c.Reconnected() // we were told late of what was before the session
		case <-p.kick:
		case <-tick.C:
		}
	}
}

// fail ends the session of the inbox, if it is not over yet.
func (p *puller) fail(inbox string, err error) {
	p.mu.Lock()
	if p.inbox == inbox {
		p.fault = err
	}
	p.mu.Unlock()
	p.poke()
}

// pull asks for more when half of the room is free.
func (p *puller) pull() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault != nil {
		return p.fault
	}
	if p.asked > 0 && time.Since(p.heard) > pullSilence {
		return fmt.Errorf("no heartbeat of %s", p.o.Durable)
	}
	want := p.o.MaxMessages - p.lanes.load() - p.asked
	if want < (p.o.MaxMessages+1)/2 {
		return nil
	}
	if p.asked == 0 {
		p.heard = time.Now()
	}
	expiry := pullExpiry
	if p.c.Clustered() {
		expiry = clusterExpiry
	}
	body := fmt.Sprintf(`{"batch":%d,"expires":%d,"idle_heartbeat":%d}`, want, expiry, pullHeartbeat)
	subject := p.c.apiPrefix + "CONSUMER.MSG.NEXT." + p.o.Stream + "." + p.o.Durable
	if err := p.c.NC.PublishRequest(subject, p.inbox, []byte(body)); err != nil {
		return sendError(err)
	}
	p.asked += want
	return nil
}

// bind looks for the consumer. A server that is just starting loses requests, and
// across accounts nobody says that a subject has no listener, so it asks again soon.
func (c *Conn) bind(ctx context.Context, o ConsumeOptions) error {
	ctx, cancel := context.WithTimeout(ctx, OpTimeout)
	defer cancel()
	for patience := 50 * time.Millisecond; ; patience = min(2*patience, 2*time.Second) {
		tryCtx, done := context.WithTimeout(ctx, patience)
		_, err := c.JS.Consumer(tryCtx, o.Stream, o.Durable)
		done()
		if err == nil || !transient(err) || !sleep(ctx, sessionPause) {
			return err
		}
	}
}

// lanes runs handlers: one at a time per key, some at a time over all.
type lanes struct {
	ctx    context.Context
	o      ConsumeOptions
	handle func(context.Context, Msg)
	freed  func() // a message is done
	work   sync.WaitGroup

	mu      sync.Mutex
	held    int              // under mu: messages that wait or are handled
	queues  map[string][]Msg // under mu: keys with a message, the first being handled or ready
	ready   []string         // under mu: keys whose first message waits for a worker
	running int              // under mu
}

func newLanes(ctx context.Context, o ConsumeOptions, handle func(context.Context, Msg)) *lanes {
	return &lanes{ctx: ctx, o: o, handle: handle, queues: map[string][]Msg{}}
}

func (l *lanes) load() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.held
}

// add never blocks; what is pulled bounds it. What comes after the end of ctx is given
// back.
func (l *lanes) add(m Msg) {
	key := l.o.Key(m)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		m.Nak(0)
		return
	}
	l.held++
	l.queues[key] = append(l.queues[key], m)
	if len(l.queues[key]) > 1 {
		return
	}
	l.ready = append(l.ready, key)
	if l.running < l.o.Workers {
		l.running++
		l.work.Go(l.worker)
	}
}

func (l *lanes) worker() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.ready) > 0 && l.ctx.Err() == nil {
		key := l.ready[0]
		l.ready = l.ready[1:]
		m := l.queues[key][0]
		l.mu.Unlock()
		l.handle(l.ctx, m)
		l.mu.Lock()
		l.held--
		l.freed()
		if rest := l.queues[key][1:]; len(rest) > 0 {
			l.queues[key] = rest
			l.ready = append(l.ready, key)
		} else {
			delete(l.queues, key)
		}
	}
	l.running--
}

// wait returns when the running handlers have, after the end of ctx, and gives back
// what was not begun.
func (l *lanes) wait() {
	l.mu.Lock() // orders the last add before the wait
	running := l.running > 0
	l.mu.Unlock()
	if running {
		l.work.Wait()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, queue := range l.queues {
		for _, m := range queue {
			m.Nak(0) // if that is lost, it comes again after AckWait
		}
	}
}
