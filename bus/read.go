package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"
)

// ReadOptions say what to read.
type ReadOptions struct {
	Stream       string
	Filter       string // a subject, wildcards allowed; "" is the whole stream
	FromSequence uint64 // 0 and 1: from the first
	Follow       bool   // go on with what comes
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
	f := &follower{c: c, stream: o.Stream, filter: o.Filter, ahead: o.Ahead, next: func() uint64 { return next }, handle: give}
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
