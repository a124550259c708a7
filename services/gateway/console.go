package gateway

import (
	"context"
	"errors"
	"io"
	"math"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"

	"dayfly.dev/bus/session"
	"dayfly.dev/schemas"
)

// headerExec is the header of a console's answer with the id of its program, by which it
// is resumed.
const headerExec = "Dayfly-Exec"

// statusTaken closes the WebSocket of a console that another client has resumed.
const statusTaken = websocket.StatusCode(4001)

// console is GET /v1/tasks/{id}/exec: a WebSocket that is the streams of a program. What
// is refused is refused before it becomes one.
func (g *Gateway) console(w *response, r *http.Request) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	o, err := consoleOpen(q)
	if err != nil {
		return err
	}
	return g.join(w, r, id, o)
}

// attach is GET /v1/tasks/{id}/attach: a WebSocket that is the streams of the task's own
// process.
func (g *Gateway) attach(w *response, r *http.Request) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	a, err := attachOpen(q)
	if err != nil {
		return err
	}
	a.Newest = !q.has("stdout") && !q.has("stderr")
	return g.join(w, r, id, schemas.Open{Kind: schemas.SessionMain, Attach: &a})
}

// join makes the request a WebSocket that is the streams of a program.
func (g *Gateway) join(w *response, r *http.Request, id schemas.TaskID, o schemas.Open) error {
	if err := mayUpgrade(r); err != nil {
		return err
	}
	v, err := g.visit(r, id, visitConsole, o)
	if err != nil {
		return err
	}
	defer v.end()
	if v.exec != "" {
		w.Header().Set(headerExec, string(v.exec))
	}
	ws, err := websocket.Accept(w, r, nil)
	if err != nil { // it has answered
		return nil
	}
	w.wrote, w.status = true, http.StatusSwitchingProtocols
	c := &console{pulse: pulse{ws: ws, every: g.cfg.KeepAlive}, visit: v, waits: o.Attach.Acks}
	v.result = c.run(r.Context())
	return nil
}

// attachOpen reads how the streams are to be taken.
func attachOpen(q query) (a schemas.ExecAttach, err error) {
	for name, to := range map[string]*int64{"stdout": &a.Stdout, "stderr": &a.Stderr} {
		n, e := q.number(name, 0, 0, math.MaxInt)
		if e != nil {
			return a, e
		}
		*to = int64(n)
	}
	a.Acks, err = q.flag("acks")
	return a, err
}

// consoleOpen reads what a console is to run, or which one is to be resumed.
func consoleOpen(q query) (o schemas.Open, err error) {
	a, err := attachOpen(q)
	o.Attach = &a
	flag := func(name string) (on bool) {
		if err == nil {
			on, err = q.flag(name)
		}
		return on
	}
	tty, stdin := flag("tty"), flag("stdin")
	var window schemas.Window
	for name, to := range map[string]*uint16{"rows": &window.Rows, "cols": &window.Cols} {
		fallback := map[string]int{"rows": 24, "cols": 80}[name]
		var n int
		if err == nil {
			n, err = q.number(name, fallback, 1, schemas.MaxWindow)
		}
		*to = uint16(n)
	}
	if err != nil {
		return o, err
	}
	if q.has("exec") {
		o.Kind = schemas.SessionAttach
		o.Attach.ID, err = schemas.ParseExecID(q.get("exec"))
		if err != nil {
			return o, badQuery("exec", err.Error())
		}
		for _, name := range []string{"command", "env", "workdir", "tty", "stdin", "timeout"} {
			if q.has(name) {
				return o, badQuery(name, "goes with a new program, and not with exec")
			}
		}
		return o, nil
	}
	req := schemas.ExecRequest{Command: q.values["command"], Workdir: q.get("workdir"), Env: map[string]string{}}
	for _, pair := range q.values["env"] {
		k, v, ok := strings.Cut(pair, "=")
		if !ok {
			return o, badQuery("env", "must be NAME=value")
		}
		req.Env[k] = v
	}
	timeout, err := q.duration("timeout", 0, schemas.MaxExecTime.Std())
	if err != nil {
		return o, err
	}
	req.Timeout = schemas.Duration(timeout)
	if err := req.Check(); err != nil {
		return o, err
	}
	o.Kind, o.Exec = schemas.SessionExec, execOpen(req)
	o.Exec.Keep, o.Exec.Stdin = true, stdin || tty
	if tty {
		o.Exec.Terminal = &window
	}
	return o, nil
}

// console carries the streams of a program between a WebSocket and a session. A binary
// message is a channel and bytes; a text message is a schemas.ExecControl.
type console struct {
	pulse
	visit *visit
	waits bool // the client says when it has all
}

// lastWord is how long a client may take to close a console whose program has ended.
const lastWord = 10 * time.Second

var (
	errConsoleOver = errors.New("the program has ended")
	errBadMessage  = errors.New("a message that is none of a console")
)

// run gives the result of the visit.
func (c *console) run(ctx context.Context) string {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var down, pings sync.WaitGroup
	down.Go(func() { fail(c.down(ctx)) })
	pings.Go(func() {
		if err := c.ping(ctx); err != nil {
			fail(err)
		}
	})
	pings.Go(func() {
		if err := outlive(ctx, c.visit.stream.Done()); err != nil {
			fail(err)
		}
	})
	// A read that ctx ends breaks the WebSocket, so that one ends by a close from here.
	reading, unread := context.WithCancel(context.WithoutCancel(ctx))
	defer unread()
	closed := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { closed <- c.close(context.Cause(ctx), unread) })
	err := c.up(ctx, reading)
	fail(err)
	if !stop() {
		<-closed
	}
	down.Wait()
	pings.Wait()
	cause := context.Cause(ctx)
	status := websocket.CloseStatus(err)
	switch {
	case cause == errConsoleOver && (!c.waits || status == websocket.StatusNormalClosure),
		status == websocket.StatusNormalClosure, status == websocket.StatusNoStatusRcvd: // it leaves for good
		return resultOK
	}
	return resultBroken
}

// close tells the client why it is over, and waits a moment for it to close as well.
func (c *console) close(cause error, unread func()) error {
	defer unread()
	var reset *session.ResetError
	code, why := websocket.StatusInternalError, "the connection to the task's worker broke"
	switch {
	case cause == errConsoleOver && c.waits:
		return nil
	case cause == errConsoleOver:
		code, why = websocket.StatusNormalClosure, ""
	case errors.Is(cause, errBadMessage):
		code, why = websocket.StatusUnsupportedData, cause.Error()
	case errors.As(cause, &reset) && reset.Code == session.CodeTaken:
		code, why = statusTaken, reset.Message
	case errors.Is(cause, context.Canceled):
		code, why = websocket.StatusGoingAway, "this gateway goes down"
	case websocket.CloseStatus(cause) != -1:
		return nil // the client was the first
	}
	return c.ws.Close(code, why)
}

// up carries what the client sends, until it closes.
func (c *console) up(ctx, reading context.Context) error {
	c.ws.SetReadLimit(-1) // messages are not held
	over := false
	for {
		kind, r, err := c.ws.Reader(reading)
		switch {
		case err != nil:
			return err
		case over: // only a close counts: after a gap nothing may follow
			_, err = io.Copy(io.Discard, r)
		case kind == websocket.MessageText:
			err = c.control(ctx, r)
		default:
			err = c.input(ctx, r)
		}
		if err != nil && ctx.Err() == nil {
			return err
		}
		over = over || err != nil || ctx.Err() != nil
	}
}

// maxControl is how long a control message may be.
const maxControl = 4 << 10

func (c *console) control(ctx context.Context, r io.Reader) error {
	text, err := io.ReadAll(io.LimitReader(r, maxControl+1))
	if err != nil {
		return err
	}
	var m schemas.ExecControl
	if len(text) > maxControl || schemas.Decode(text, &m) != nil {
		return errBadMessage
	}
	return c.visit.send(ctx, schemas.ChannelControl, text)
}

// input carries a piece of stdin.
func (c *console) input(ctx context.Context, r io.Reader) error {
	b := make([]byte, 1, session.MaxFrame)
	if _, err := io.ReadFull(r, b); err != nil || b[0] != schemas.ChannelStdin {
		return errBadMessage
	}
	b = b[:cap(b)]
	for {
		n, err := unmasked{r}.Read(b)
		c.full.Add(1)
		failed := c.visit.send(ctx, schemas.ChannelStdin, b[:n])
		c.full.Add(-1)
		switch {
		case failed != nil:
			return failed
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

// down carries what the program sends, to its last word.
func (c *console) down(ctx context.Context) error {
	for {
		f, err := c.visit.stream.Receive(ctx)
		if err != nil {
			return err
		}
		kind, b := websocket.MessageText, f.Data
		if f.Channel != schemas.ChannelControl {
			kind, b = websocket.MessageBinary, append([]byte{f.Channel}, f.Data...)
			c.visit.out.Add(float64(len(f.Data)))
		}
		c.slow.Add(1)
		err = c.ws.Write(ctx, kind, b)
		c.slow.Add(-1)
		if err != nil {
			return err
		}
		var m schemas.ExecControl
		if f.Channel == schemas.ChannelControl && schemas.Decode(f.Data, &m) == nil && (m.Exit != nil || m.Lost != "") {
			if c.waits {
				timer := time.NewTimer(lastWord)
				defer timer.Stop()
				select {
				case <-timer.C:
				case <-ctx.Done():
				}
			}
			return errConsoleOver
		}
	}
}
