package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
)

// pulse asks the client of a WebSocket for signs of life.
type pulse struct {
	ws    *websocket.Conn
	every time.Duration
	full  atomic.Int32 // the task takes nothing at the moment: the client is not read
	slow  atomic.Int32 // the client takes nothing at the moment
}

// ping asks until ctx ends. While the client takes nothing, no question comes through, and
// while it is not read no answer: then TCP alone tells who is gone, to whoever writes.
func (p *pulse) ping(ctx context.Context) error {
	tick := time.NewTicker(p.every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if p.slow.Load() > 0 {
			continue
		}
		full := p.full.Load() > 0
		within, cancel := context.WithTimeout(ctx, p.every)
		err := p.ws.Ping(within)
		cancel()
		late := errors.Is(err, context.DeadlineExceeded) && (full || p.full.Load() > 0 || p.slow.Load() > 0)
		if err != nil && !late && ctx.Err() == nil {
			return fmt.Errorf("no sign of life: %w", err)
		}
	}
}

// leftWithin is how long a client may take for what has come of a session that is over, which
// is a MiB at the most.
const leftWithin = 5 * time.Minute

var errNotRead = errors.New("the client does not read the rest")

// outlive waits until the session is over, and then for what is left, until ctx ends: a client
// that does not read would hold the connection for as long as it is there.
func outlive(ctx context.Context, over <-chan struct{}) error {
	select {
	case <-ctx.Done():
		return nil
	case <-over:
	}
	timer := time.NewTimer(leftWithin)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return nil
	case <-timer.C:
		return errNotRead
	}
}

// waiting is a writer that may stand still for a while.
type waiting struct {
	p *pulse
	w io.Writer
}

func (w waiting) Write(b []byte) (int, error) {
	w.p.full.Add(1)
	defer w.p.full.Add(-1)
	return w.w.Write(b)
}

// unmasked reads a message of a client. Bytes that come together with an error are still
// masked, and are not the client's.
type unmasked struct{ r io.Reader }

func (u unmasked) Read(p []byte) (int, error) {
	n, err := u.r.Read(p)
	if err != nil && err != io.EOF {
		n = 0
	}
	return n, err
}
