package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/coder/websocket"

	"dayfly.dev/schemas"
)

// Tunnel connects to a port of the task's own loopback interface, through the gateway.
// ctx bounds the connecting only. The connection has CloseWrite, a half-close; its Read
// is io.EOF when the task has sent all. A deadline that passes breaks it.
func (c *Client) Tunnel(ctx context.Context, id schemas.TaskID, port int) (net.Conn, error) {
	header := http.Header{"User-Agent": {c.userAgent}}
	ws, resp, err := websocket.Dial(ctx, c.base+taskPath(id, fmt.Sprintf("/tunnel/%d", port)), &websocket.DialOptions{HTTPClient: c.http, HTTPHeader: header})
	if err != nil {
		if resp != nil && resp.StatusCode != http.StatusSwitchingProtocols && resp.Body != nil {
			defer resp.Body.Close()
			return nil, problem(resp)
		}
		return nil, c.unreachable(ctx, err)
	}
	ws.SetReadLimit(-1) // messages are not held
	t := &tunnel{ws: ws, name: fmt.Sprintf("%s:%d", id, port)}
	t.ctx, t.cancel = context.WithCancelCause(context.Background())
	return t, nil
}

// tunnel is a WebSocket as a connection. A binary message is bytes; the text message
// "eof" says that nothing more comes.
type tunnel struct {
	ws     *websocket.Conn
	name   string
	ctx    context.Context // ends when a deadline passes
	cancel context.CancelCauseFunc

	read    sync.Mutex
	message io.Reader // under read: what is left of the last message
	end     error     // under read: what every Read gives from now on

	write sync.Mutex
	shut  bool // under write: nothing more may be written

	mu     sync.Mutex
	timers [2]*time.Timer // under mu: of the deadlines to read and to write
}

const tunnelEnd = "eof"

func (t *tunnel) Read(p []byte) (int, error) {
	t.read.Lock()
	defer t.read.Unlock()
	for t.end == nil {
		if t.message == nil {
			t.end = t.next()
			continue
		}
		n, err := t.message.Read(p)
		if err == io.EOF {
			t.message, err = nil, nil
		}
		if err != nil {
			t.end = t.broken(err)
		}
		if n > 0 || len(p) == 0 {
			return n, nil
		}
	}
	return 0, t.end
}

// next begins a message.
func (t *tunnel) next() error {
	kind, r, err := t.ws.Reader(t.ctx)
	if err != nil {
		return t.broken(err)
	}
	if kind == websocket.MessageBinary {
		t.message = r
		return nil
	}
	text, err := io.ReadAll(io.LimitReader(r, 16))
	if err != nil {
		return t.broken(err)
	}
	if string(text) != tunnelEnd {
		return errors.New("the tunnel carries what no dayfly sends")
	}
	return io.EOF
}

// broken is what the user of the connection hears of an error of the WebSocket.
func (t *tunnel) broken(err error) error {
	var closed websocket.CloseError
	switch {
	case t.ctx.Err() != nil:
		return context.Cause(t.ctx)
	case errors.As(err, &closed), errors.Is(err, io.EOF): // an end that is none: nobody has said eof
		return fmt.Errorf("the connection to %s was broken: %w", t.name, io.ErrUnexpectedEOF)
	}
	return err
}

// maxMessage is what one Write sends at a time.
const maxMessage = 32 << 10

func (t *tunnel) Write(p []byte) (n int, err error) {
	t.write.Lock()
	defer t.write.Unlock()
	for len(p) > 0 {
		if t.shut {
			return n, net.ErrClosed
		}
		part := p[:min(len(p), maxMessage)]
		if err := t.ws.Write(t.ctx, websocket.MessageBinary, part); err != nil {
			return n, t.broken(err)
		}
		n += len(part)
		p = p[len(part):]
	}
	return n, nil
}

// CloseWrite says that nothing more will be written; reading goes on.
func (t *tunnel) CloseWrite() error {
	t.write.Lock()
	defer t.write.Unlock()
	if t.shut {
		return net.ErrClosed
	}
	t.shut = true
	if err := t.ws.Write(t.ctx, websocket.MessageText, []byte(tunnelEnd)); err != nil {
		return t.broken(err)
	}
	return nil
}

// Close closes both ways. What was written before arrives.
func (t *tunnel) Close() error {
	_ = t.SetDeadline(time.Time{})
	err := t.ws.Close(websocket.StatusNormalClosure, "")
	t.cancel(net.ErrClosed)
	var closed websocket.CloseError
	if errors.As(err, &closed) || errors.Is(err, net.ErrClosed) { // by the other side
		return nil
	}
	return err
}

// SetDeadline implements net.Conn.
func (t *tunnel) SetDeadline(at time.Time) error { return t.deadlines(at, 0, 1) }

// SetReadDeadline implements net.Conn.
func (t *tunnel) SetReadDeadline(at time.Time) error { return t.deadlines(at, 0) }

// SetWriteDeadline implements net.Conn.
func (t *tunnel) SetWriteDeadline(at time.Time) error { return t.deadlines(at, 1) }

func (t *tunnel) deadlines(at time.Time, which ...int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, i := range which {
		if t.timers[i] != nil {
			t.timers[i].Stop()
			t.timers[i] = nil
		}
		if !at.IsZero() {
			t.timers[i] = time.AfterFunc(time.Until(at), func() { t.cancel(os.ErrDeadlineExceeded) })
		}
	}
	return nil
}

// LocalAddr implements net.Conn.
func (t *tunnel) LocalAddr() net.Addr { return tunnelAddr("client") }

// RemoteAddr implements net.Conn.
func (t *tunnel) RemoteAddr() net.Addr { return tunnelAddr(t.name) }

type tunnelAddr string

func (tunnelAddr) Network() string  { return "tunnel" }
func (a tunnelAddr) String() string { return string(a) }
