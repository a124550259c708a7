package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/bus/session"
	"dayfly.dev/schemas"
)

// Kinds of visits, and how they end.
const (
	visitExec    = "exec"
	visitConsole = "console"
	visitFiles   = "files"

	resultOK     = "ok"
	resultFailed = "failed"
	resultBroken = "broken"
)

// visit is a session that one request has with a task.
type visit struct {
	task    schemas.TaskID
	stream  *session.Stream
	exec    schemas.ExecID
	in, out prometheus.Counter // bytes
	leave   func()
	result  string
}

// visit opens a session for a request. The visit is to be ended.
func (g *Gateway) visit(r *http.Request, id schemas.TaskID, kind string, o schemas.Open) (*visit, error) {
	leave, err := g.enter(r, id, kind)
	if err != nil {
		return nil, err
	}
	v := &visit{task: id, result: resultBroken,
		in: g.metrics.sessionBytes.WithLabelValues(kind, "in"), out: g.metrics.sessionBytes.WithLabelValues(kind, "out")}
	v.stream, v.exec, err = g.openExec(r.Context(), id, o)
	if err != nil {
		leave()
		return nil, g.refused(kind, err)
	}
	if o.Kind == schemas.SessionAttach {
		g.metrics.resumes.Inc()
	}
	open := g.metrics.sessionsOpen.WithLabelValues(kind)
	open.Inc()
	v.leave = func() {
		leave()
		open.Dec()
		g.metrics.sessions.WithLabelValues(kind, v.result).Inc()
	}
	return v, nil
}

// enter lets a request for a session with the task in, if it runs and not too many are
// there already. The request has to leave.
func (g *Gateway) enter(r *http.Request, id schemas.TaskID, kind string) (leave func(), err error) {
	if it, _, ok := g.tasks.Get(string(id)); !ok || it.state != schemas.Running { // the view may not show yet what another gateway has answered
		ctx, cancel := g.onBus(r)
		e, err := g.fetch(ctx, id)
		cancel()
		if err != nil {
			return nil, g.refused(kind, err)
		}
		if s := e.Value.State; s != schemas.Running {
			return nil, g.refused(kind, notRunning(id, s))
		}
	}
	if leave, err = g.visits.enter(id); err != nil {
		return nil, g.refused(kind, &schemas.Error{Status: http.StatusTooManyRequests, Code: schemas.CodeTooManyRequests, Task: id,
			RetryAfter: schemas.Duration(time.Second), Detail: fmt.Sprintf("%d connections to the task are open", g.cfg.TaskConns)})
	}
	return leave, nil
}

// refused counts a session that was not begun, and gives err back.
func (g *Gateway) refused(kind string, err error) error {
	code := schemas.CodeInternal
	var e *schemas.Error
	if errors.As(err, &e) { // what a worker says is among them only if it is known
		code = e.Code
	}
	g.metrics.refused.WithLabelValues(kind, string(code)).Inc()
	return err
}

// end ends the session, which was broken off where no result was set.
func (v *visit) end() {
	if v.result == resultBroken {
		v.stream.Reset(session.CodeBroken, "the client is gone")
	}
	_ = v.stream.Close()
	v.leave()
}

// send sends p in as many frames as it takes.
func (v *visit) send(ctx context.Context, channel byte, p []byte) error {
	for len(p) > 0 {
		n := min(len(p), session.MaxFrame)
		if err := v.stream.Send(ctx, channel, p[:n]); err != nil {
			return err
		}
		v.in.Add(float64(n))
		p = p[n:]
	}
	return nil
}

// broken is what a client hears of a session that broke: what it began may have been done.
func (v *visit) broken(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, session.ErrClosed) {
		return unavailable() // nobody hears it
	}
	return &schemas.Error{Status: http.StatusServiceUnavailable, Code: schemas.CodeUnknownOutcome, Task: v.task, RetryAfter: schemas.Duration(time.Second),
		Detail: "the connection to the task's worker broke; it was begun, and is broken off there"}
}
