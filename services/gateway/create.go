package gateway

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
)

// create is POST /v1/tasks.
func (g *Gateway) create(w *response, r *http.Request) error {
	err := g.createTask(w, r)
	var e *schemas.Error
	switch {
	case errors.As(err, &e):
		g.metrics.rejected.WithLabelValues(string(e.Code)).Inc()
	case err != nil:
		g.metrics.rejected.WithLabelValues(string(schemas.CodeInternal)).Inc()
	}
	return err
}

func (g *Gateway) createTask(w *response, r *http.Request) error {
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	wait, err := g.parsePatience(q)
	if err != nil {
		return err
	}
	key, err := idempotencyKey(r.Header)
	if err != nil {
		return err
	}
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	spec, err := schemas.ParseSpec(body, g.cfg.Policy)
	if err != nil {
		return err
	}
	if err := g.reach(r.Context()); err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	e, replayed, err := g.createOnce(ctx, key, spec, w.trace)
	cancel()
	if err != nil {
		return err
	}
	if replayed {
		g.metrics.replays.Inc()
		w.Header().Set("Idempotency-Replayed", "true")
	}
	if wait.until != "" {
		w.route += "?wait"
		// What was accepted is answered with 201 whatever happens while we wait.
		span := g.tracer.Start(w.trace, "wait", tracing.Inner)
		if later, err := g.await(r, schemas.TaskID(e.Key), wait); err == nil {
			e = later
		}
		span.End(nil)
	}
	w.Header().Set("Location", "/v1/tasks/"+e.Key)
	w.Header().Set("ETag", etag(e.Revision))
	return answer(w, http.StatusCreated, g.present(e.Value.Record, e.Revision, time.Now()))
}

// createOnce accepts a task, or gives the one that the key made before.
func (g *Gateway) createOnce(ctx context.Context, key clientKey, spec schemas.Spec, trace string) (e bus.Entry[record], replayed bool, err error) {
	misfit := g.fleet.misfit(spec)
	if misfit == nil {
		misfit = g.ports.misfit(spec)
	}
	id, err := schemas.NewTaskID(time.Now(), rand.Reader)
	if err != nil {
		return e, false, err
	}
	if key.given == "" {
		if misfit != nil {
			return e, false, misfit
		}
		e, err = g.accept(ctx, id, spec, "", trace)
		return e, false, busError(err, id)
	}

	plain, err := plainFingerprint(spec)
	if err != nil {
		return e, false, err
	}
	var made bus.Entry[schemas.IdempotencyEntry]
	if misfit == nil {
		op := meta("gateway").Op
		made, err = g.keys.Create(ctx, key.stored, schemas.IdempotencyEntry{Fingerprint: g.fingerprint(key, plain), Task: id, At: time.Now().UTC()}, op)
	} else {
		err = bus.ErrConflict // a new task is refused, one that was made before is shown
	}
	first := err == nil
	if errors.Is(err, bus.ErrConflict) {
		made, err = g.keys.Get(ctx, key.stored)
		if misfit != nil && errors.Is(err, bus.ErrNotFound) {
			return e, false, misfit
		}
	}
	if err != nil {
		if errors.Is(err, bus.ErrUnknownOutcome) || errors.Is(err, bus.ErrNotFound) {
			err = bus.ErrUnavailable // no record was made
		}
		return e, false, busError(err, "")
	}
	id = made.Value.Task
	if !first {
		e, err = g.records.Get(ctx, string(id))
		if err != nil && !errors.Is(err, bus.ErrNotFound) {
			return e, false, readError(err)
		}
		there := err == nil
		switch gone := !there && keyAge(made) >= g.cfg.KeyGrace; {
		case !gone && !g.sameRequest(made.Value, key, plain): // it names the task: whoever wants only one waits for that
			return e, false, &schemas.Error{Status: http.StatusUnprocessableEntity, Code: schemas.CodeKeyReused, Field: "Idempotency-Key", Task: id,
				Detail: "this key came before with another task; use a new key for a new task"}
		case there:
			g.fold(e)
			return e, true, nil
		case misfit != nil:
			return e, false, misfit
		case gone:
			return e, false, &schemas.Error{Status: http.StatusGone, Code: schemas.CodeKeyExpired, Field: "Idempotency-Key",
				Detail: "the task of this key was never made, or is gone; use a new key"}
		}
	}
	e, err = g.accept(ctx, id, spec, "", trace)
	if errors.Is(err, bus.ErrConflict) { // somebody with the same key was quicker
		if e, err = g.records.Get(ctx, string(id)); err == nil {
			g.fold(e)
			return e, true, nil
		}
		if errors.Is(err, bus.ErrNotFound) { // theirs is under way
			return e, false, busError(bus.ErrUnknownOutcome, id)
		}
		return e, false, readError(err)
	}
	return e, false, busError(err, id)
}

// keyAge is how long ago a key came. After a restore from a backup NATS takes all keys for
// new, and its task may run where no record tells of it: so what the entry says counts too.
func keyAge(e bus.Entry[schemas.IdempotencyEntry]) time.Duration {
	at := e.Created
	if e.Value.At.Before(at) {
		at = e.Value.At
	}
	return time.Since(at)
}

// accept stores the record: from then on the task exists, and the placer's view of
// the records brings it there. batch is whose item it is, or empty; trace is the
// traceparent of the request, empty for an item: each is a trace of its own.
func (g *Gateway) accept(ctx context.Context, id schemas.TaskID, spec schemas.Spec, batch schemas.BatchID, trace string) (bus.Entry[record], error) {
	m := meta("gateway")
	r, err := g.newRecord(ctx, id, spec, g.cfg.Policy, batch, m)
	if err != nil {
		return bus.Entry[record]{}, err
	}
	return g.acceptRecord(ctx, r, m.Op, trace, schemas.Record{})
}

// acceptCanceled stores the record of an item whose batch was canceled before its task was
// made: final from the first, so that it needs no ports and no room for blobs. Contents
// that the record has no room for are named, and not stored.
func (g *Gateway) acceptCanceled(ctx context.Context, id schemas.TaskID, spec schemas.Spec, batch schemas.BatchID, by string) (bus.Entry[record], error) {
	m := meta("gateway")
	slim, _ := spec.Slim()
	r := schemas.NewRecord(id, slim, g.cfg.Policy, m)
	r.Batch = batch
	canceled := m
	canceled.By = by
	r, err := schemas.Next(r, schemas.AskCancel{Meta: canceled})
	if err != nil {
		return bus.Entry[record]{}, err
	}
	return g.acceptRecord(ctx, r, m.Op, "", schemas.Record{})
}

// newRecord is the record of a task: of its spec what belongs into blobs has been put there.
func (g *Gateway) newRecord(ctx context.Context, id schemas.TaskID, spec schemas.Spec, p schemas.Policy, batch schemas.BatchID, m schemas.Meta) (schemas.Record, error) {
	slim, uses, faults, err := g.blobs.take(ctx, spec, batch != "")
	if err != nil {
		return schemas.Record{}, err
	}
	if len(faults) > 0 && batch == "" { // an item was looked at before: it fails at its start
		return schemas.Record{}, schemas.InvalidSpec(faults)
	}
	r := schemas.NewRecord(id, slim, p, m)
	r.Blobs, r.Batch = uses, batch
	return r, nil
}

// acceptRecord is accept of a record that the write op made. It gets the TCP ports that
// former had, where it can: the final task whose place it takes. One that is final gets none.
func (g *Gateway) acceptRecord(ctx context.Context, r schemas.Record, op, trace string, former schemas.Record) (bus.Entry[record], error) {
	id := r.ID
	span := g.tracer.Start(trace, "accept", tracing.Inner)
	span.Task(string(id), 0)
	r.Trace = cmp.Or(trace, span.Traceparent())
	var err error
	var opts []bus.WriteOption
	if r.State.Final() {
		opts = append(opts, bus.TTL(g.cfg.Retention))
	} else if r.Public, err = g.ports.take(ctx, id, r.Spec, former); err != nil {
		span.End(err)
		return bus.Entry[record]{}, err
	}
	rec, err := sealRecord(r)
	if err != nil {
		span.End(err)
		return bus.Entry[record]{}, err
	}
	e, err := g.records.Create(ctx, string(id), rec, op, opts...)
	span.End(err)
	if err != nil {
		if !errors.Is(err, bus.ErrUnknownOutcome) {
			g.ports.give(ctx, id, r.Public)
		}
		return e, err
	}
	g.fold(e)
	g.metrics.submitted.Inc()
	if r.State.Final() {
		g.metrics.finished.WithLabelValues(string(r.State), string(r.Reason)).Inc()
	}
	tracing.Log(g.log.Info(), r.Trace).Str("task", string(id)).Str("state", string(r.State)).Msg("task")
	return e, nil
}

// clientKey is an Idempotency-Key, empty if a request has none.
type clientKey struct {
	stored string // the key under which the bucket knows the request
	given  string // the client's own word, which is not stored
}

func idempotencyKey(h http.Header) (clientKey, error) {
	given := h.Values("Idempotency-Key")
	if len(given) == 0 {
		return clientKey{}, nil
	}
	ok := len(given) == 1 && len(given[0]) >= 1 && len(given[0]) <= 255
	if ok {
		for _, c := range []byte(given[0]) {
			ok = ok && c > ' ' && c < 0x7f
		}
	}
	if !ok {
		return clientKey{}, badHeader("Idempotency-Key", "must be 1 to 255 visible ASCII characters")
	}
	sum := sha256.Sum256([]byte("tasks\x00" + given[0]))
	return clientKey{stored: hex.EncodeToString(sum[:]), given: given[0]}, nil
}

// plainFingerprint tells equal requests: of the spec with its defaults filled in, so that
// spaces, the order of fields and spelt-out defaults make no difference.
func plainFingerprint(spec schemas.Spec) (string, error) {
	b, err := schemas.Encode(spec)
	if err != nil {
		return "", fmt.Errorf("encode spec: %w", err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

// fingerprint is what is stored of a plain one, which is a hash of secrets too: who reads
// it could guess them and test each guess. A backup has the site's key beside it, and so
// the client's word, which is stored nowhere, is part of it.
func (g *Gateway) fingerprint(key clientKey, plain string) string {
	return "keyed:" + g.endpoints.key.Digest("fingerprint", key.given, plain)
}

// sameRequest says whether the request that made an entry is the one with this key and plain
// fingerprint. Older gateways stored the plain one.
func (g *Gateway) sameRequest(made schemas.IdempotencyEntry, key clientKey, plain string) bool {
	return made.Fingerprint == g.fingerprint(key, plain) || made.Fingerprint == plain
}

// asWanted gives the task once it has come as far as p says, or p's time is over; e is what
// it is now. Without a wait that is all.
func (g *Gateway) asWanted(w *response, r *http.Request, e bus.Entry[record], p patience) (bus.Entry[record], error) {
	if p.until == "" {
		return e, nil
	}
	w.route += "?wait"
	if p.satisfied(e.Value.State, e.Value.Ready) {
		return e, nil
	}
	return g.await(r, schemas.TaskID(e.Key), p)
}

// await waits until the task has come as far as p says, or p's time is over, and
// gives it as it is then.
func (g *Gateway) await(r *http.Request, id schemas.TaskID, p patience) (bus.Entry[record], error) {
	open := g.metrics.streams.WithLabelValues("wait")
	open.Inc()
	defer open.Dec()
	ctx, cancel := context.WithTimeout(r.Context(), p.timeout)
	defer cancel()
	var at *item
	var revision uint64
	seen := false // a record that was just written may not be in the view yet
	err := g.tasks.Wait(ctx, string(id), func(it *item, rev uint64, exists bool) bool {
		at, revision = it, rev
		if !exists {
			return seen
		}
		seen = true
		return p.satisfied(it.state, it.ready)
	})
	if err == nil && at != nil {
		if rec, ok := at.whole(); ok {
			return bus.Entry[record]{Key: string(id), Value: rec, Revision: revision}, nil
		}
	}
	ctx, cancel = g.onBus(r)
	defer cancel()
	return g.fetch(ctx, id)
}
