package gateway

import (
	"context"
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
	full  atomic.Int32 // sides that take nothing at the moment
}

// ping asks until ctx ends. While a side takes nothing, no answer can come through: then
// TCP alone tells who is gone.
func (p *pulse) ping(ctx context.Context) error {
	tick := time.NewTicker(p.every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if p.full.Load() > 0 {
			continue
		}
		within, cancel := context.WithTimeout(ctx, p.every)
		err := p.ws.Ping(within)
		cancel()
		if err != nil && p.full.Load() == 0 && ctx.Err() == nil {
			return fmt.Errorf("no sign of life: %w", err)
		}
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
