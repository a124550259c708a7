package session

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// Conn makes a connection of channel 0 of the stream, for what wants a net.Conn. Other
// channels are then not to be used.
func (s *Stream) Conn() *Conn {
	return &Conn{stream: s, read: newDeadline(), write: newDeadline()}
}

// Conn is a stream as a net.Conn. Closing it closes the stream.
type Conn struct {
	stream      *Stream
	read, write *deadline

	mu   sync.Mutex
	rest []byte // under mu: of the frame before
	end  bool   // under mu: nothing more comes
}

var _ net.Conn = (*Conn)(nil)

// Read reads what there is. After the other side's CloseWrite or Close it is io.EOF.
func (c *Conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.rest) == 0 {
		if c.end {
			return 0, io.EOF
		}
		if len(p) == 0 {
			return 0, nil
		}
		f, err := c.stream.Receive(c.read.context())
		if err != nil {
			return 0, err
		}
		c.rest, c.end = f.Data, f.End
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Write sends p, and waits while the window is full.
func (c *Conn) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		part := p[:min(len(p), MaxFrame)]
		if err := c.stream.Send(c.write.context(), 0, part); err != nil {
			return n, err
		}
		n += len(part)
		p = p[len(part):]
	}
	return n, nil
}

// CloseWrite says that nothing more will be written; reading goes on.
func (c *Conn) CloseWrite() error { return c.stream.SendEnd(c.write.context(), 0) }

// Close closes the stream. What was written before arrives.
func (c *Conn) Close() error { return c.stream.Close() }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	c.read.set(t)
	c.write.set(t)
	return nil
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.read.set(t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.write.set(t)
	return nil
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return addr(c.stream.address) }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return addr(c.stream.address) }

type addr string

func (addr) Network() string  { return "session" }
func (a addr) String() string { return string(a) }

// deadline is a context that ends at an instant which may be moved.
type deadline struct {
	mu     sync.Mutex
	ctx    context.Context         // under mu
	cancel context.CancelCauseFunc // under mu
	timer  *time.Timer             // under mu: nil without a deadline
}

func newDeadline() *deadline {
	d := &deadline{}
	d.ctx, d.cancel = context.WithCancelCause(context.Background())
	return d
}

func (d *deadline) context() context.Context {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ctx
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if d.ctx.Err() != nil {
		d.ctx, d.cancel = context.WithCancelCause(context.Background())
	}
	if t.IsZero() {
		return
	}
	cancel := d.cancel
	if wait := time.Until(t); wait > 0 {
		d.timer = time.AfterFunc(wait, func() { cancel(os.ErrDeadlineExceeded) })
		return
	}
	cancel(os.ErrDeadlineExceeded)
}
