package agent

import (
	"context"
	"errors"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"dayfly.dev/schemas"
)

// logSafe is how long after its acknowledgement a log chunk counts as surely
// stored. A single server that does not wait for the disk gathers up to 8 ms in its
// own memory (maxFlushWait in nats-server's filestore.go) and loses that when it is
// killed. Until then the spool is kept, and what may have been lost is sent again.
const logSafe = time.Second

var chunks = sync.Pool{New: func() any { return new([schemas.MaxLogChunk]byte) }}

var streams = []schemas.Stream{schemas.Stdout, schemas.Stderr}

// offsets counts the bytes of both streams.
type offsets struct{ stdout, stderr int64 }

func (o *offsets) of(s schemas.Stream) *int64 {
	if s == schemas.Stderr {
		return &o.stderr
	}
	return &o.stdout
}

// shipper sends the log of one attempt. It belongs to the attempt's goroutine.
type shipper struct {
	t    *attempt
	out  Output
	sent offsets
	// marks are earlier values of sent, in the order of time, that are not yet safe.
	marks []mark
	safe  offsets
	last  time.Duration // of the newest acknowledgement, on the runtime's clock

	reconnects uint64 // of the connection over which all since safe was sent
}

type mark struct {
	at   time.Duration
	sent offsets
}

func (t *attempt) newShipper(out Output, safe offsets) *shipper {
	return &shipper{t: t, out: out, sent: safe, safe: safe, reconnects: t.agent.conn.Reconnects()}
}

// ship sends what is new in the log and returns when the bus has all of it, also what a
// server that was away may have lost. Chunks of an attempt go one after the other, so
// that a reader finds them in order; one that was stored twice is told by its offset.
func (s *shipper) ship(ctx context.Context) error {
	buf := chunks.Get().(*[schemas.MaxLogChunk]byte)
	defer chunks.Put(buf)
	for progress := true; progress; {
		progress = s.rewind()
		sent := false
		for _, stream := range streams {
			off := s.sent.of(stream)
			n, err := s.out.ReadAt(stream, buf[:], *off)
			if n == 0 {
				if err != nil && !errors.Is(err, io.EOF) {
					s.t.log.Error().Err(err).Str("stream", string(stream)).Msg("read log")
				}
				continue
			}
			if err := s.publish(ctx, stream, *off, buf[:n]); err != nil {
				return err
			}
			*off += int64(n)
			progress, sent = true, true
		}
		if sent {
			s.acknowledged()
		}
	}
	return ctx.Err()
}

// acknowledged remembers what the bus has by now, and journals what is safe.
func (s *shipper) acknowledged() {
	if s.reconnects != s.t.agent.conn.Reconnects() {
		return // what was sent before may be lost, however long ago that was: rewind follows
	}
	now := s.t.agent.rt.Now()
	s.last = now
	before := s.safe
	for len(s.marks) > 0 && now-s.marks[0].at >= logSafe {
		s.safe = s.marks[0].sent
		s.marks = s.marks[1:]
	}
	if n := len(s.marks); n == 0 || now-s.marks[n-1].at >= logSafe/4 {
		s.marks = append(s.marks, mark{now, s.sent})
	}
	if s.safe != before {
		if err := s.t.agent.journal.change(s.t.Assignment, func(e *entry) { e.Stdout, e.Stderr = s.safe.stdout, s.safe.stderr }); err != nil {
			s.t.log.Warn().Err(err).Msg("journal")
		}
	}
}

// rewind goes back to what is surely stored if the server was away.
func (s *shipper) rewind() bool {
	select {
	case <-s.t.reconnected:
		s.t.reconnected = s.t.agent.conn.Reconnected()
		s.reconnects = s.t.agent.conn.Reconnects()
		s.sent, s.marks = s.safe, nil
		return true
	default:
		return false
	}
}

// settled is how long it takes until all that was sent is surely stored.
func (s *shipper) settled() time.Duration {
	if s.sent == s.safe {
		return 0
	}
	if s.reconnects != s.t.agent.conn.Reconnects() {
		return logSafe
	}
	return max(0, s.last+logSafe-s.t.agent.rt.Now())
}

func (s *shipper) publish(ctx context.Context, stream schemas.Stream, offset int64, data []byte) error {
	header := nats.Header{
		schemas.HeaderAttempt: {strconv.Itoa(s.t.Attempt)},
		schemas.HeaderStream:  {string(stream)},
		schemas.HeaderOffset:  {strconv.FormatInt(offset, 10)},
		schemas.HeaderTime:    {time.Now().UTC().Format(time.RFC3339Nano)},
	}
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		_, err := s.t.agent.conn.Publish(ctx, schemas.LogSubject(s.t.Worker, s.t.Task), header, data)
		if err == nil {
			s.t.agent.metrics.logBytes.Add(float64(len(data)))
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		s.t.log.Debug().Err(err).Msg("send log")
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
