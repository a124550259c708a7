package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go/jetstream"
)

// ReadOptions say what to read.
type ReadOptions struct {
	Stream       string
	Filter       string // a subject, wildcards allowed; "" is the whole stream
	FromSequence uint64 // 0 and 1: from the first
	Follow       bool   // go on with what comes
	HeadersOnly  bool   // without what the messages hold
	Ahead        int    // messages fetched before fn asks for them, for large ones; 0 is some hundred
}

// Read gives the messages of a stream to fn in order, each once, first what is stored
// and then, with Follow, what comes until ctx ends. Without Follow it returns nil at
// the end of what was stored when it began. An error of fn ends it and comes back. It
// goes on by itself after the server was away.
func (c *Conn) Read(ctx context.Context, o ReadOptions, fn func(Msg) error) error {
	next := max(o.FromSequence, 1)
	give := func(m jetstream.Msg, meta *jetstream.MsgMetadata) error {
		if meta.Sequence.Stream < next {
			return nil
		}
		next = meta.Sequence.Stream + 1
		return fn(newMsg(m, meta))
	}
	f := &follower{c: c, stream: o.Stream, filter: o.Filter, headers: o.HeadersOnly, ahead: o.Ahead, next: func() uint64 { return next }, handle: give}
	if o.Follow {
		if err := f.run(ctx); err != nil {
			return err
		}
		return context.Cause(ctx)
	}
	for {
		err := f.stored(ctx)
		var failed handleError
		switch {
		case errors.As(err, &failed):
			return failed.error
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !transient(err) && !errors.Is(err, errRestart):
			return fmt.Errorf("read %s: %w", o.Stream, err)
		}
		sleep(ctx, sessionPause)
	}
}

// stored handles what is there and returns nil at its end. Messages may go while it
// reads, so the end is where the server has no more rather than a count.
func (f *follower) stored(ctx context.Context) error {
	cons, err := f.make(ctx)
	if err != nil {
		return err
	}
	info := cons.CachedInfo()
	defer f.drop(info.Name)
	left, expect := info.NumPending, uint64(1)
	for left > 0 {
		batch, err := cons.FetchNoWait(int(min(left, uint64(cmp.Or(f.ahead, 500)))))
		if err != nil {
			return err
		}
		got := 0
		for m := range batch.Messages() {
			meta, err := m.Metadata()
			if err == nil && meta.Sequence.Consumer != expect {
				err = errRestart
			}
			if err != nil {
				return err
			}
			expect++
			got++
			left--
			if err := f.handle(m, meta); err != nil {
				return handleError{err}
			}
			if meta.NumPending == 0 {
				left = 0
			}
		}
		if err := batch.Error(); err != nil {
			return err
		}
		if got == 0 {
			if !f.c.Connected() {
				return errRestart
			}
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// LastStored asks the leader for the newest revision of a bucket that is still there; 0
// if there is none.
func (c *Conn) LastStored(ctx context.Context, bucket string) (uint64, error) {
	return c.lastStored(ctx, StreamOf(bucket), keySubject(bucket, ">"))
}

// lastStored asks the leader for the sequence of the last message of a stream that
// the filter lets through and that is still there; 0 if there is none.
func (c *Conn) lastStored(ctx context.Context, stream, filter string) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, readTry)
	defer cancel()
	raw, err := c.leaderGet(ctx, stream, filter)
	if errors.Is(err, ErrNotFound) {
		return 0, nil
	}
	return raw.seq, err
}

// Stored gives the newest message of a subject of a stream with DirectGet; ErrNotFound if
// there is none. What a replica does not have yet its leader is asked for. It goes on by
// itself after the server was away, until ctx ends.
func (c *Conn) Stored(ctx context.Context, stream, subject string) ([]byte, error) {
	for {
		raw, err := c.directGet(ctx, stream, subject)
		if errors.Is(err, ErrNotFound) && c.Clustered() {
			raw, err = c.leaderGet(ctx, stream, subject)
		}
		if err == nil {
			return raw.data, nil
		}
		if !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrUnknownOutcome) || !sleep(ctx, pause()) {
			return nil, fmt.Errorf("read %s: %w", subject, err)
		}
	}
}

// Purge takes all messages of the subjects that the filter lets through out of a stream.
func (c *Conn) Purge(ctx context.Context, stream, filter string) error {
	s, err := c.stream(ctx, stream)
	if err == nil {
		err = s.Purge(ctx, jetstream.WithPurgeSubject(filter))
	}
	if err != nil {
		return fmt.Errorf("purge %s of %s: %w", filter, stream, err)
	}
	return nil
}

// DeleteMsgs takes messages out of a stream by their sequences. What is gone already is an
// error too, after the others were tried.
func (c *Conn) DeleteMsgs(ctx context.Context, stream string, sequences []uint64) error {
	if len(sequences) == 0 {
		return nil
	}
	s, err := c.stream(ctx, stream)
	if err != nil {
		return fmt.Errorf("delete messages of %s: %w", stream, err)
	}
	var work sync.WaitGroup
	slots := make(chan struct{}, deletesAtOnce)
	var failed atomic.Pointer[error]
	for _, n := range sequences {
		slots <- struct{}{}
		work.Go(func() {
			if err := s.DeleteMsg(ctx, n); err != nil {
				err = fmt.Errorf("delete message %d of %s: %w", n, stream, err)
				failed.CompareAndSwap(nil, &err)
			}
			<-slots
		})
	}
	work.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

// deletesAtOnce is how many messages are being deleted at a time.
const deletesAtOnce = 16

// StreamState is what a stream holds, and the most that it takes; 0 is any number.
type StreamState struct {
	Last, Messages, Bytes   uint64 // Last is the sequence of the newest message
	MostMessages, MostBytes uint64
}

// Filled is the part of a stream's bounds that is taken, 0 to 1, by the one that is nearer.
func (s StreamState) Filled() float64 {
	part := func(n, most uint64) float64 {
		if most == 0 {
			return 0
		}
		return float64(n) / float64(most)
	}
	return max(part(s.Messages, s.MostMessages), part(s.Bytes, s.MostBytes))
}

// StreamState looks at a stream.
func (c *Conn) StreamState(ctx context.Context, stream string) (StreamState, error) {
	s, err := c.stream(ctx, stream)
	if err != nil {
		return StreamState{}, fmt.Errorf("look at %s: %w", stream, err)
	}
	i := s.CachedInfo()
	return StreamState{Last: i.State.LastSeq, Messages: i.State.Msgs, Bytes: i.State.Bytes,
		MostMessages: uint64(max(i.Config.MaxMsgs, 0)), MostBytes: uint64(max(i.Config.MaxBytes, 0))}, nil
}
