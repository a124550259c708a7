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
	ctx, cancel := g.onBus(r)
	e, err := g.fetch(ctx, id) // the view may not show yet what another gateway has answered
	cancel()
	if err != nil {
		return nil, err
	}
	if s := e.Value.State; s != schemas.Running {
		return nil, notRunning(id, s)
	}
	leave, err := g.visits.enter(id)
	if err != nil {
		return nil, &schemas.Error{Status: http.StatusTooManyRequests, Code: schemas.CodeTooManyRequests, Task: id, RetryAfter: schemas.Duration(time.Second),
			Detail: fmt.Sprintf("%d connections to the task are open", g.cfg.TaskConns)}
	}
	v := &visit{task: id, result: resultBroken,
		in: g.metrics.sessionBytes.WithLabelValues(kind, "in"), out: g.metrics.sessionBytes.WithLabelValues(kind, "out")}
	v.stream, v.exec, err = g.openExec(r.Context(), id, o)
	if err != nil {
		leave()
		return nil, err
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
