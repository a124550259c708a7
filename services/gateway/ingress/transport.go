package ingress

import (
	"context"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"dayfly.dev/schemas"
)

// address names a target to the transports: connections to one are kept apart from those
// to any other.
func (t Target) address() string {
	return strings.ToLower(string(t.Task)+"."+t.Life) + ":" + strconv.Itoa(t.Port)
}

// dial connects to the target of the request.
func (s *Server) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	t := targetOf(ctx)
	c, err := s.router.Dial(ctx, t.Task, t.Port)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Connections to a task that are kept for further requests.
const (
	keptPerTask = 64
	keptInAll   = 1024
	keptFor     = 30 * time.Second
)

// transports speak HTTP/1.1 or HTTP/2 with a task.
type transports struct{ http1, h2c *http.Transport }

func newTransports(dial func(context.Context, string, string) (net.Conn, error)) transports {
	one := func(set func(*http.Protocols)) *http.Transport {
		p := new(http.Protocols)
		set(p)
		return &http.Transport{
			DialContext: dial, Protocols: p, DisableCompression: true, ExpectContinueTimeout: time.Second,
			MaxIdleConnsPerHost: keptPerTask, MaxIdleConns: keptInAll, IdleConnTimeout: keptFor, MaxResponseHeaderBytes: 256 << 10,
			ReadBufferSize: copyBuffer, WriteBufferSize: copyBuffer, // of a frame of a session
		}
	}
	return transports{
		http1: one(func(p *http.Protocols) { p.SetHTTP1(true) }),
		h2c:   one(func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) }),
	}
}

func (t transports) RoundTrip(r *http.Request) (*http.Response, error) {
	if targetOf(r.Context()).Protocol == schemas.ProtocolH2C {
		return t.h2c.RoundTrip(r)
	}
	return t.http1.RoundTrip(r)
}

func (t transports) close() {
	t.http1.CloseIdleConnections()
	t.h2c.CloseIdleConnections()
}

const copyBuffer = 32 << 10

// buffers are those through which bodies go.
type buffers struct{}

var pool = sync.Pool{New: func() any { return new([copyBuffer]byte) }}

func (buffers) Get() []byte  { return pool.Get().(*[copyBuffer]byte)[:] }
func (buffers) Put(b []byte) { pool.Put((*[copyBuffer]byte)(b)) }

// pacedBody is the body of a request whose client may not stand still.
type pacedBody struct {
	io.ReadCloser
	control *http.ResponseController
	stall   time.Duration
	over    atomic.Bool // it was read to its end, or cannot be
	failure atomic.Pointer[error]
}

// pace makes a body that passes while the answer comes already: net/http would read it to
// its end first.
func pace(w http.ResponseWriter, body io.ReadCloser, stall time.Duration) *pacedBody {
	b := &pacedBody{ReadCloser: body, control: http.NewResponseController(w), stall: stall}
	_ = b.control.EnableFullDuplex() // HTTP/2 is so anyway
	return b
}

func (b *pacedBody) Read(p []byte) (int, error) {
	_ = b.control.SetReadDeadline(time.Now().Add(b.stall))
	n, err := b.ReadCloser.Read(p)
	switch {
	case err == nil:
		_ = b.control.SetReadDeadline(time.Time{})
	case err == io.EOF:
		b.over.Store(true)
		_ = b.control.SetReadDeadline(time.Time{})
	default: // the deadline stays, or net/http would wait for the rest
		b.over.Store(true)
		b.failure.Store(&err)
	}
	return n, err
}

// leave bounds how long net/http waits for what the task did not want.
func (b *pacedBody) leave() {
	if !b.over.Load() {
		_ = b.control.SetReadDeadline(time.Now().Add(b.stall))
	}
}
