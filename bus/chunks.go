package bus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Long byte strings in a stream: pieces of one size under a subject and a number,
// "<subject>.<n>", counted from 0. Who writes them bounds what is under way, and so does
// who reads them: either keeps chunksAhead pieces in memory, however long it all is.
// Use a connection of its own (Sibling): what is under way holds up what comes behind it.

const (
	chunksAhead = 8
	// chunkTry is how long one piece is waited for. Over a slow line all that are under way
	// take so long together, and asking again would only make it slower.
	chunkTry = 30 * time.Second
	// ChunkStall is how long one piece is tried again and again where nothing else bounds it.
	ChunkStall = 2 * time.Minute
	// chunkBehind is how long a piece is asked for again that is not found: of several
	// replicas the one that answered may be behind.
	chunkBehind = 5 * time.Second
)

// WriteChunks stores what r gives, in pieces of size bytes under the subject, until r's
// end, and says how many bytes there were. All of them are stored when it returns nil.
// After an error some may be: PurgeChunks removes them. An error of r comes back as it is.
// stall is for how long one piece may find no server to take it; 0 leaves that to ctx.
func (c *Conn) WriteChunks(ctx context.Context, subject string, size int, stall time.Duration, r io.Reader) (n int64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	free := make(chan []byte, chunksAhead)
	for range chunksAhead {
		free <- nil
	}
	defer func() {
		for range chunksAhead { // whoever starts a goroutine waits for it
			<-free
		}
		if err == nil {
			err = context.Cause(ctx)
		}
		cancel(nil)
	}()
	for i := int64(0); ; i++ {
		var b []byte
		select {
		case b = <-free:
		case <-ctx.Done():
			return n, context.Cause(ctx)
		}
		if b == nil {
			b = make([]byte, size)
		}
		got, rerr := io.ReadFull(r, b)
		n += int64(got)
		if got == 0 || rerr != nil && rerr != io.ErrUnexpectedEOF {
			free <- b
		} else {
			go func() {
				if err := c.writeChunk(ctx, stall, chunkSubject(subject, i), b[:got]); err != nil {
					cancel(err)
				}
				free <- b
			}()
		}
		switch rerr {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return n, nil
		default:
			return n, rerr
		}
	}
}

// writeChunk stores one piece. The stream keeps only the newest under a subject, so one
// that may have been stored is sent again.
func (c *Conn) writeChunk(ctx context.Context, stall time.Duration, subject string, data []byte) error {
	within, cancel := ctx, func() {}
	if stall > 0 {
		within, cancel = context.WithTimeout(ctx, stall)
	}
	defer cancel()
	for {
		_, err := c.publishTry(within, chunkTry, subject, nil, data)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, ErrFull), !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrUnknownOutcome), !sleep(within, pause()):
			return fmt.Errorf("publish %s: %w", subject, err)
		}
	}
}

func chunkSubject(subject string, n int64) string { return subject + "." + strconv.FormatInt(n, 10) }

// ReadChunks gives the pieces from number first up to, but not including, number end to
// fn in order. data is fn's to keep. It goes on after the server was away. ErrNotFound
// says that a piece is not stored, once no replica can be that far behind; an error of fn
// ends it and comes back.
func (c *Conn) ReadChunks(ctx context.Context, stream, subject string, first, end int64, fn func(data []byte) error) error {
	ctx, cancel := context.WithCancel(ctx)
	type piece struct {
		data []byte
		err  error
	}
	var ahead []chan piece
	defer func() {
		cancel()
		for _, p := range ahead { // whoever starts a goroutine waits for it
			<-p
		}
	}()
	for next := first; next < end || len(ahead) > 0; {
		for ; next < end && len(ahead) < chunksAhead; next++ {
			p := make(chan piece, 1)
			ahead = append(ahead, p)
			go func(n int64) {
				data, err := c.readChunk(ctx, stream, chunkSubject(subject, n))
				p <- piece{data, err}
			}(next)
		}
		p := <-ahead[0]
		ahead = ahead[1:]
		if p.err != nil {
			return p.err
		}
		if err := fn(p.data); err != nil {
			return err
		}
	}
	return nil
}

func (c *Conn) readChunk(ctx context.Context, stream, subject string) ([]byte, error) {
	within, cancel := context.WithTimeout(ctx, ChunkStall)
	defer cancel()
	var since time.Time // it was not found
	for {
		m, err := c.directMsg(within, chunkTry, stream, subject)
		missing := errors.Is(err, ErrNotFound)
		if missing && since.IsZero() {
			since = time.Now()
		}
		switch {
		case err == nil:
			return m.data, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case missing && time.Since(since) < chunkBehind && sleep(within, chunkBehind/50):
		case !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrUnknownOutcome), !sleep(within, pause()):
			return nil, fmt.Errorf("read %s: %w", subject, err)
		}
	}
}

// stream asks for a stream. Where nobody answers in time it is ErrUnavailable.
func (c *Conn) stream(ctx context.Context, name string) (jetstream.Stream, error) {
	ctx, cancel := context.WithTimeout(ctx, OpTimeout)
	defer cancel()
	if err := c.waitConnected(ctx); err != nil {
		return nil, err
	}
	s, err := c.JS.Stream(ctx, name)
	if err != nil && transient(err) {
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return s, err
}

// PurgeChunks removes all pieces under a subject.
func (c *Conn) PurgeChunks(ctx context.Context, stream, subject string) error {
	return c.Purge(ctx, stream, subject+".>")
}

// Subjects gives the subjects of a stream that the filter lets through, and how many
// messages each has.
func (c *Conn) Subjects(ctx context.Context, stream, filter string) (map[string]uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, 4*OpTimeout)
	defer cancel()
	s, err := c.stream(ctx, stream)
	if err == nil {
		var info *jetstream.StreamInfo
		if info, err = s.Info(ctx, jetstream.WithSubjectFilter(filter)); err == nil {
			return info.State.Subjects, nil
		}
	}
	return nil, fmt.Errorf("list subjects of %s: %w", stream, err)
}
