package gateway

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/coder/websocket"

	"dayfly.dev/bus/session"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway/ingress"
)

// tunnel is GET /v1/tasks/{id}/tunnel/{port}: a WebSocket that is a connection to a port of
// the task. What is refused is refused before it becomes one.
func (g *Gateway) tunnel(w *response, r *http.Request) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	port, err := strconv.Atoi(r.PathValue("port"))
	if err != nil || port < 1 || port > 65535 {
		return &schemas.Error{Status: http.StatusUnprocessableEntity, Code: schemas.CodeInvalidValue, Field: "port", Detail: "must be 1 to 65535"}
	}
	if err := mayUpgrade(r); err != nil {
		return err
	}
	leave, err := g.enter(r, id, ingress.KindTunnel)
	if err != nil {
		return err
	}
	defer leave()
	stream, err := g.openSession(r.Context(), id, schemas.Open{Kind: schemas.SessionDial, Port: port})
	if err != nil {
		return g.refused(ingress.KindTunnel, err)
	}
	ws, err := websocket.Accept(w, r, nil)
	if err != nil { // it has answered
		stream.Reset(session.CodeBroken, "the tunnel was not opened")
		return nil
	}
	w.wrote, w.status = true, http.StatusSwitchingProtocols
	open := g.outside.Open.WithLabelValues(ingress.KindTunnel)
	open.Inc()
	defer open.Dec()
	t := &tunnel{pulse: pulse{ws: ws, every: g.cfg.KeepAlive}, stream: stream}
	t.far = g.outside.Inside(stream.Conn(), ingress.KindTunnel)
	t.run(r.Context())
	return nil
}

// mayUpgrade refuses what is no WebSocket, and what a page of another site asks for.
func mayUpgrade(r *http.Request) error {
	if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		return badHeader("Upgrade", "this path speaks WebSocket alone; dayfly port-forward does")
	}
	// A WebSocket begins with a GET, but it can change something.
	changing := *r
	changing.Method = http.MethodPost
	if fromElsewhere.Check(&changing) != nil {
		return crossOrigin()
	}
	return nil
}

// tunnel carries bytes between a WebSocket and a session. A binary message is bytes, and
// has no meaning of its own; the text message "eof" says that nothing more comes from
// that side. A close of the WebSocket closes the connection.
type tunnel struct {
	pulse
	stream *session.Stream
	far    net.Conn // the stream
}

const tunnelEnd = "eof"

var errClientLeft = errors.New("the client has left")

func (t *tunnel) run(ctx context.Context) {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { // both sides are to hear, and neither to be read any more
		defer close(closed)
		if websocket.CloseStatus(context.Cause(ctx)) == websocket.StatusNormalClosure {
			_ = t.far.Close() // what came before arrives
		} else {
			t.stream.Reset(session.CodeBroken, "the tunnel was broken")
		}
		_ = t.ws.Close(websocket.StatusInternalError, "the connection was broken")
	})
	free := context.WithoutCancel(ctx) // one that ends would cut the WebSocket off without a word
	var ways, pings sync.WaitGroup
	for _, way := range []func(context.Context, context.CancelCauseFunc) error{t.up, t.down} {
		ways.Go(func() {
			if err := way(free, fail); err != nil {
				fail(err)
			}
		})
	}
	live, over := context.WithCancel(ctx)
	pings.Go(func() {
		if err := t.ping(live); err != nil {
			fail(err)
		}
	})
	pings.Go(func() {
		if err := outlive(live, t.stream.Done()); err != nil {
			fail(err)
		}
	})
	ways.Wait()
	over()
	pings.Wait()
	if !stop() {
		<-closed
		return
	}
	_ = t.far.Close()
	_ = t.ws.Close(websocket.StatusNormalClosure, "")
}

// up carries what the client sends.
func (t *tunnel) up(ctx context.Context, fail context.CancelCauseFunc) error {
	t.ws.SetReadLimit(-1) // messages are not held
	for {
		kind, r, err := t.ws.Reader(ctx)
		if err == nil && kind == websocket.MessageText {
			var text []byte
			if text, err = io.ReadAll(io.LimitReader(r, 16)); err == nil && string(text) == tunnelEnd {
				left := t.ws.CloseRead(ctx) // nothing but a close may come
				context.AfterFunc(left, func() { fail(errClientLeft) })
				return t.far.(interface{ CloseWrite() error }).CloseWrite()
			}
			if err == nil {
				err = errors.New("a text that is not eof")
			}
		}
		if err != nil {
			return err
		}
		if _, err := io.CopyBuffer(waiting{&t.pulse, t.far}, unmasked{r}, make([]byte, session.MaxFrame)); err != nil {
			return err
		}
	}
}

// down carries what the task sends.
func (t *tunnel) down(ctx context.Context, _ context.CancelCauseFunc) error {
	b := make([]byte, session.MaxFrame)
	for {
		n, err := t.far.Read(b)
		if n > 0 {
			t.slow.Add(1)
			failed := t.ws.Write(ctx, websocket.MessageBinary, b[:n])
			t.slow.Add(-1)
			if failed != nil {
				return failed
			}
		}
		if err == io.EOF {
			return t.ws.Write(ctx, websocket.MessageText, []byte(tunnelEnd))
		}
		if err != nil {
			return err
		}
	}
}
