package bus

import (
	"context"
	"errors"
	"fmt"
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

	Ack        func() error
	Nak        func(delay time.Duration) error
	Term       func() error
	InProgress func() error
}

func newMsg(m jetstream.Msg, meta *jetstream.MsgMetadata) Msg {
	return Msg{
		Subject: m.Subject(), Header: m.Headers(), Data: m.Data(),
		Sequence: meta.Sequence.Stream, Time: meta.Timestamp, Delivered: meta.NumDelivered,
		Ack: m.Ack, Nak: m.NakWithDelay, Term: m.Term, InProgress: m.InProgress,
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
				AckWait: s.AckWait, MaxAckPending: s.MaxAckPending, MaxDeliver: -1, InactiveThreshold: s.InactiveThreshold,
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
	defer lanes.wait()
	quiet := false
	for ctx.Err() == nil {
		err := c.consume(ctx, o, lanes, func() { quiet = false })
		if errors.Is(err, errRestart) || ctx.Err() != nil {
			continue
		}
		if !quiet {
			c.log.Warn().Err(err).Str("stream", o.Stream).Str("consumer", o.Durable).Msg("cannot consume, trying again")
			quiet = true
		}
		sleep(ctx, sessionPause)
	}
	return nil
}

func (c *Conn) consume(ctx context.Context, o ConsumeOptions, lanes *lanes, bound func()) error {
	if err := c.waitConnected(ctx); err != nil {
		return err
	}
	reconnected := c.Reconnected()
	// Across accounts nobody says that a subject has no listener, so ask again soon.
	bindCtx, cancel := context.WithTimeout(ctx, time.Second)
	cons, err := c.JS.Consumer(bindCtx, o.Stream, o.Durable)
	cancel()
	if err != nil {
		return err
	}
	bound()
	ended := make(chan error, 1)
	end := func(err error) {
		select {
		case ended <- err:
		default:
		}
	}
	cc, err := cons.Consume(func(m jetstream.Msg) {
		meta, err := m.Metadata()
		if err != nil {
			end(err)
			return
		}
		lanes.add(newMsg(m, meta))
	}, jetstream.PullMaxMessages(o.MaxMessages), jetstream.PullExpiry(30*time.Second), jetstream.PullHeartbeat(5*time.Second),
		jetstream.ConsumeErrHandler(func(_ jetstream.ConsumeContext, err error) { end(err) }))
	if err != nil {
		return err
	}
	defer cc.Stop()
	select {
	case <-ctx.Done():
		return nil
	case <-reconnected:
		return errRestart
	case err := <-ended:
		return err
	}
}

// lanes runs handlers: one at a time per key, some at a time over all.
type lanes struct {
	ctx    context.Context
	o      ConsumeOptions
	handle func(context.Context, Msg)
	room   chan struct{} // one per message that waits or is handled
	work   sync.WaitGroup

	mu      sync.Mutex
	queues  map[string][]Msg // under mu: keys with a message, the first being handled or ready
	ready   []string         // under mu: keys whose first message waits for a worker
	running int              // under mu
}

func newLanes(ctx context.Context, o ConsumeOptions, handle func(context.Context, Msg)) *lanes {
	return &lanes{ctx: ctx, o: o, handle: handle, room: make(chan struct{}, o.MaxMessages), queues: map[string][]Msg{}}
}

// add waits for room; what comes after the end of ctx is left to be delivered again.
func (l *lanes) add(m Msg) {
	select {
	case l.room <- struct{}{}:
	case <-l.ctx.Done():
		return
	}
	key := l.o.Key(m)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return
	}
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
		<-l.room
		l.mu.Lock()
		if rest := l.queues[key][1:]; len(rest) > 0 {
			l.queues[key] = rest
			l.ready = append(l.ready, key)
		} else {
			delete(l.queues, key)
		}
	}
	l.running--
}

// wait returns when the running handlers have.
func (l *lanes) wait() {
	<-l.ctx.Done()
	l.mu.Lock() // no add after this starts a worker
	//lint:ignore SA2001 it only orders the last add before the wait
	l.mu.Unlock()
	l.work.Wait()
}
