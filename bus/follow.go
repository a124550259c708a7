package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
)

// follower reads a stream in order. It makes a consumer of its own, and makes it
// anew at the next message wherever that is lost: at a reconnect, at a gap, when the
// server forgot it. The client library's ordered consumers are not told of a server
// restart for up to half a minute.
type follower struct {
	c              *Conn
	stream, filter string
	headers        bool // only them
	ahead          int  // messages fetched before handle is free for them; 0 is 1,000

	// next gives the sequence to start from, at the beginning of each session.
	next func() uint64
	// started is told how many messages waited when a session's consumer was made.
	started func(pending uint64)
	// handle gets each message; meta.NumPending says how many are behind it. It is
	// called from one goroutine at a time. An error ends run.
	handle func(m jetstream.Msg, meta *jetstream.MsgMetadata) error
	// side, if set, runs beside a session, with a context that ends with it.
	// errRestart from it makes a new session at once.
	side func(ctx context.Context) error
}

// errRestart makes a new session.
var errRestart = errors.New("restart the session")

// sessionPause is how long a follower waits before it asks a server again that
// could not make its consumer.
const sessionPause = 40 * time.Millisecond

// handleError is an error of handle, which ends run.
type handleError struct{ error }

// run blocks until ctx ends, with nil, or handle fails, with that error.
func (f *follower) run(ctx context.Context) error {
	quiet := false
	for ctx.Err() == nil {
		err := f.session(ctx)
		var failed handleError
		if errors.As(err, &failed) {
			return failed.error
		}
		if err == nil || errors.Is(err, errRestart) {
			quiet = false
			continue
		}
		if !quiet && ctx.Err() == nil {
			f.c.log.Warn().Err(err).Str("stream", f.stream).Msg("cannot follow the stream, trying again")
			quiet = true
		}
		sleep(ctx, sessionPause)
	}
	return nil
}

func (f *follower) config() jetstream.ConsumerConfig {
	cfg := jetstream.ConsumerConfig{
		AckPolicy: jetstream.AckNonePolicy, MaxDeliver: 1, MemoryStorage: true, Replicas: 1,
		FilterSubject: f.filter, HeadersOnly: f.headers, InactiveThreshold: time.Minute, DeliverPolicy: jetstream.DeliverAllPolicy,
	}
	if seq := f.next(); seq > 1 {
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, seq
	}
	return cfg
}

// make creates the consumer of one session.
func (f *follower) make(ctx context.Context) (jetstream.Consumer, error) {
	ctx, cancel := context.WithTimeout(ctx, OpTimeout)
	defer cancel()
	cfg := f.config()
	cfg.Name = nuid.Next() // so that a second copy of the request makes no second consumer
	// A server that is just starting loses requests, so ask again soon.
	for patience := 50 * time.Millisecond; ; patience = min(2*patience, 2*time.Second) {
		if err := f.c.waitConnected(ctx); err != nil {
			return nil, err
		}
		tryCtx, done := context.WithTimeout(ctx, patience)
		cons, err := f.c.JS.CreateConsumer(tryCtx, f.stream, cfg)
		done()
		if err == nil || !transient(err) || !sleep(ctx, 10*time.Millisecond) {
			return cons, err
		}
	}
}

// drop deletes a consumer that is not needed any more, if the server is there.
func (f *follower) drop(name string) {
	if !f.c.Connected() {
		return
	}
	// Not waited for: an inactive consumer goes by itself.
	f.c.replies.send(f.c.apiPrefix+"CONSUMER.DELETE."+f.stream+"."+name, nil, nil, time.Now().Add(OpTimeout), ignoreAnswer)
}

// heartbeat is how often the server says that it is there; twice that without a word
// ends a session. On a cluster the consumer lives on one server and the connection
// goes to another, so nothing else tells that the first has died.
func (f *follower) heartbeat() time.Duration {
	if f.c.Clustered() {
		return time.Second
	}
	return 5 * time.Second
}

func (f *follower) session(ctx context.Context) error {
	reconnected := f.c.Reconnected()
	cons, err := f.make(ctx)
	if err != nil {
		return fmt.Errorf("make consumer on %s: %w", f.stream, err)
	}
	info := cons.CachedInfo()
	defer f.drop(info.Name)
	if f.started != nil {
		f.started(info.NumPending)
	}

	ended := make(chan error, 1)
	end := func(err error) {
		select {
		case ended <- err:
		default:
		}
	}
	var mu sync.Mutex // held while a message is handled; guards alive and expect
	alive, expect := true, uint64(1)
	cc, err := cons.Consume(func(m jetstream.Msg) {
		mu.Lock()
		defer mu.Unlock()
		if !alive {
			return
		}
		meta, err := m.Metadata()
		if err == nil && meta.Sequence.Consumer != expect {
			err = errRestart // a gap
		}
		if err == nil {
			expect++
			if err = f.handle(m, meta); err != nil && !errors.Is(err, errRestart) {
				err = handleError{err}
			}
		}
		if err != nil {
			alive = false
			end(err)
		}
	}, jetstream.PullMaxMessages(cmp.Or(f.ahead, 1000)), jetstream.PullExpiry(30*time.Second), jetstream.PullHeartbeat(f.heartbeat()),
		jetstream.ConsumeErrHandler(func(_ jetstream.ConsumeContext, err error) { end(err) }))
	if err != nil {
		return fmt.Errorf("consume %s: %w", f.stream, err)
	}
	defer func() {
		cc.Stop()
		mu.Lock()
		alive = false
		mu.Unlock()
	}()

	if f.side != nil {
		sideCtx, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := f.side(sideCtx); err != nil {
				end(err)
			}
		}()
		defer func() { cancel(); <-done }()
	}
	select {
	case <-ctx.Done():
		return nil
	case <-reconnected:
		return errRestart
	case err := <-ended:
		return err
	}
}
