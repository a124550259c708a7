package gateway

import (
	"context"
	"errors"
	"net/http"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
)

// taskID takes the id from the path. What is no id names no task.
func taskID(r *http.Request) (schemas.TaskID, error) {
	id, err := schemas.ParseTaskID(r.PathValue("id"))
	if err != nil {
		return "", noTask()
	}
	return id, nil
}

// get is GET /v1/tasks/{id}.
func (g *Gateway) get(w *response, r *http.Request) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	wait, err := g.parsePatience(q)
	if err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	e, err := g.fetch(ctx, id)
	cancel()
	if err != nil {
		return err
	}
	if e, err = g.asWanted(w, r, e, wait); err != nil {
		return err
	}
	t := g.present(e.Value.Record, e.Revision, time.Now())
	tag := etag(e.Revision)
	if t.State.Final() && t.Spec.Callback != nil {
		ctx, cancel := g.onBus(r)           // a wait may have been longer than one operation
		t.Callback = g.delivery(ctx, e.Key) // news that the revision does not tell
		cancel()
	}
	w.Header().Set("ETag", tag)
	if t.Callback == nil && matches(r.Header, tag) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	if t.State == schemas.Queued && r.Method == http.MethodGet {
		t.Why = g.why(r.Context(), id)
	}
	return answer(w, http.StatusOK, t)
}

const whyTimeout = 250 * time.Millisecond

// why asks the leading placer why a task waits; nil if nobody says so in time.
func (g *Gateway) why(ctx context.Context, id schemas.TaskID) *schemas.Why {
	ctx, cancel := context.WithTimeout(ctx, whyTimeout)
	defer cancel()
	m, err := g.conn.NC.RequestWithContext(ctx, schemas.PlacerWhySubject, []byte(id))
	if err != nil {
		return nil
	}
	var why schemas.Why
	if err := schemas.Decode(m.Data, &why); err != nil || why.Task != id {
		return nil
	}
	return &why
}

// cancel is DELETE /v1/tasks/{id}.
func (g *Gateway) cancel(w *response, r *http.Request) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	grace, err := q.duration("grace", -1, 24*time.Hour)
	if err != nil {
		return err
	}
	takes, err := parsePrecondition(r.Header)
	if err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	e, err := g.cancelTask(ctx, id, takes, grace)
	if err != nil {
		return err
	}
	return g.show(w, http.StatusOK, e)
}

// cancelTask ends a task, if it is not over. A negative grace is that of its spec.
func (g *Gateway) cancelTask(ctx context.Context, id schemas.TaskID, takes precondition, grace time.Duration) (bus.Entry[record], error) {
	e, err := g.change(ctx, id, takes, func(rec schemas.Record, m schemas.Meta) schemas.Event {
		ask := schemas.AskCancel{Meta: m, Grace: schemas.Duration(grace)}
		if grace < 0 {
			ask.Grace = rec.Spec.Timeouts.Stop
		}
		return ask
	})
	switch {
	case err == nil:
		g.order(e)
	case errors.Is(err, schemas.ErrFinal), errors.Is(err, schemas.ErrUnchanged):
	default:
		return e, err
	}
	return e, nil
}

// readChange reads a request that changes a task: which, at which revision, and its body
// into ask.
func readChange(w *response, r *http.Request, ask any) (id schemas.TaskID, takes precondition, err error) {
	if id, err = taskID(r); err != nil {
		return id, takes, err
	}
	if _, err = parseQuery(w, r); err != nil {
		return id, takes, err
	}
	if takes, err = parsePrecondition(r.Header); err != nil {
		return id, takes, err
	}
	body, err := readBody(w, r)
	if err != nil {
		return id, takes, err
	}
	return id, takes, schemas.DecodeStrict(body, ask)
}

// extend is POST /v1/tasks/{id}/extend: 200 once the worker has carried it out, 202
// while it has not said so, 409 where the task's state or time forbids it, and 422
// where the ttl is above what the site allows or the task has all it may have.
func (g *Gateway) extend(w *response, r *http.Request) error {
	var ask schemas.ExtendRequest
	id, takes, err := readChange(w, r, &ask)
	if err != nil {
		return err
	}
	e, status, err := g.extendTask(r, id, takes, schemas.AskExtend{TTL: ask.TTL})
	if err != nil {
		return err
	}
	return g.show(w, status, e)
}

// extendTask moves a deadline, and gives the status of the answer.
func (g *Gateway) extendTask(r *http.Request, id schemas.TaskID, takes precondition, ask schemas.AskExtend) (e bus.Entry[record], status int, err error) {
	refuse := func(status int, code schemas.Code, detail string) *schemas.Error {
		return &schemas.Error{Status: status, Code: code, Field: "ttl", Detail: detail}
	}
	switch {
	case ask.TTL.Std() < time.Second:
		return e, 0, refuse(http.StatusUnprocessableEntity, schemas.CodeInvalidValue, `must be at least "1s"`)
	case ask.TTL > g.cfg.Policy.MaxTTL:
		return e, 0, refuse(http.StatusUnprocessableEntity, schemas.CodeInvalidValue, "must be at most "+g.cfg.Policy.MaxTTL.String()+" here")
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	if e, err = g.fetch(ctx, id); err != nil {
		return e, 0, err
	}
	if err := g.stays(ctx, e.Value.Record); err != nil {
		return e, 0, err
	}
	e, err = g.change(ctx, id, takes, func(_ schemas.Record, m schemas.Meta) schemas.Event {
		ask := ask
		ask.Meta = m
		return ask
	})
	conflict := func(code schemas.Code, detail string) *schemas.Error {
		return &schemas.Error{Status: http.StatusConflict, Code: code, Detail: detail, Task: id, State: e.Value.State}
	}
	switch {
	case err == nil:
		g.order(e)
	case errors.Is(err, schemas.ErrUnchanged): // it has not run yet, and will get that much
	case errors.Is(err, schemas.ErrFinal):
		return e, 0, conflict(schemas.CodeStateConflict, "the task is over; create a new one")
	case errors.Is(err, schemas.ErrState):
		return e, 0, conflict(schemas.CodeStateConflict, "the task is being canceled")
	case errors.Is(err, schemas.ErrTooLate):
		return e, 0, conflict(schemas.CodeTooLate, "less than "+schemas.Duration(schemas.ExtendLeast).String()+" of its time is left; create a new task")
	case errors.Is(err, schemas.ErrRenewals):
		return e, 0, conflict(schemas.CodeRenewals, "the instance has had all its renewals; start a new one when it is over")
	case errors.Is(err, schemas.ErrLimit):
		return e, 0, refuse(http.StatusUnprocessableEntity, schemas.CodeNotAllowed, "the task has the longest lifetime that it may have")
	default:
		return e, 0, err
	}

	// What is shown may have the extension of somebody else beside ours.
	heard := g.untilHeard(r.Context(), &e, func(rec schemas.Record) bool { return rec.Applied >= rec.Extensions })
	switch {
	case e.Value.State.Final():
		return e, 0, conflict(schemas.CodeStateConflict, "the task ended before its worker heard of the extension")
	case !heard:
		return e, http.StatusAccepted, nil
	}
	return e, http.StatusOK, nil
}

// restart is POST /v1/tasks/{id}/restart: 200 once the command runs again, 202 while the
// worker has not said so, 409 where there is no run to follow.
func (g *Gateway) restart(w *response, r *http.Request) error {
	id, takes, err := readChange(w, r, &struct{}{})
	if err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	e, err := g.change(ctx, id, takes, func(_ schemas.Record, m schemas.Meta) schemas.Event { return schemas.AskRestart{Meta: m} })
	conflict := func(code schemas.Code, detail string) *schemas.Error {
		return &schemas.Error{Status: http.StatusConflict, Code: code, Detail: detail, Task: id, State: e.Value.State}
	}
	switch {
	case err == nil:
		g.order(e)
	case errors.Is(err, schemas.ErrUnchanged): // another that is under way is this one too
	case errors.Is(err, schemas.ErrFinal):
		return conflict(schemas.CodeStateConflict, "the task is over; create a new one")
	case errors.Is(err, schemas.ErrState) && e.Value.Cancel != nil:
		return conflict(schemas.CodeStateConflict, "the task is being canceled")
	case errors.Is(err, schemas.ErrState):
		return conflict(schemas.CodeStateConflict, "the task does not run yet")
	case errors.Is(err, schemas.ErrTooLate):
		return conflict(schemas.CodeTooLate, "its time is over; create a new task")
	default:
		return err
	}
	want, attempt := e.Value.RestartTo, e.Value.Attempt
	heard := g.untilHeard(r.Context(), &e, func(rec schemas.Record) bool { return rec.Attempt == attempt && rec.Restarts >= want })
	switch {
	case e.Value.State.Final():
		return conflict(schemas.CodeStateConflict, "the task ended before it was restarted")
	case !heard, !e.Value.State.Held(): // back in the queue: it will run, but does not
		return g.show(w, http.StatusAccepted, e)
	}
	return g.show(w, http.StatusOK, e)
}

// untilHeard waits, but not for long, until the worker has carried out what the entry
// asks of it, or none holds the task any more.
func (g *Gateway) untilHeard(ctx context.Context, e *bus.Entry[record], done func(schemas.Record) bool) bool {
	heard := func() bool { return !e.Value.State.Held() || done(e.Value.Record) }
	if heard() {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, g.cfg.ExtendWait)
	defer cancel()
	_ = g.tasks.Wait(ctx, e.Key, func(it *item, revision uint64, exists bool) bool {
		if !exists {
			return true
		}
		if rec, ok := it.whole(); ok && revision > e.Revision {
			e.Value, e.Revision = rec, revision
		}
		return heard()
	})
	return heard()
}

func (g *Gateway) show(w *response, status int, e bus.Entry[record]) error {
	w.Header().Set("ETag", etag(e.Revision))
	return answer(w, status, g.present(e.Value.Record, e.Revision, time.Now()))
}

// order sends the worker what follows from an own write. It is not waited for: the
// reaper sends it again if it is lost.
func (g *Gateway) order(e bus.Entry[record]) {
	rec := e.Value.Record
	if !rec.State.Held() {
		return
	}
	o := schemas.NewOrder(rec, e.Revision, rec.Assignment(), time.Now())
	body, err := schemas.Encode(o)
	if err != nil {
		g.log.Error().Err(err).Str("task", e.Key).Msg("encode order")
		return
	}
	span := g.tracer.Start(rec.Trace, "order", tracing.Producer)
	span.Task(e.Key, rec.Attempt)
	span.Set("dayfly.want", string(o.Want))
	g.conn.PublishAsync(schemas.OrderSubject(rec.Worker, rec.ID), tracing.Header(span.Traceparent()), body, func(err error) {
		span.End(err)
		if err != nil {
			g.log.Debug().Err(err).Str("task", e.Key).Str("worker", string(rec.Worker)).Msg("order not sent; the reaper sends it again")
		}
	})
}
