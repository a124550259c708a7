package gateway

import (
	"context"
	"errors"
	"net/http"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

func noWorker() *schemas.Error {
	return &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Detail: "there is no such worker"}
}

// drain is POST /v1/workers/{id}/drain: the worker takes nothing new, what it has goes
// on to its end. It stays drained until undrain, over restarts too. 200 once the placers
// give it nothing more, 202 while none has said so.
func (g *Gateway) drain(w *response, r *http.Request) error {
	return g.setDrain(w, r, true, func(ctx context.Context, key string) error {
		m := meta("client")
		_, err := g.drains.Create(ctx, key, schemas.Drain{Since: m.At, By: m.By}, m.Op)
		if errors.Is(err, bus.ErrConflict) {
			return nil // it drains already
		}
		return err
	})
}

// undrain is POST /v1/workers/{id}/undrain.
func (g *Gateway) undrain(w *response, r *http.Request) error {
	return g.setDrain(w, r, false, func(ctx context.Context, key string) error {
		e, err := g.drains.Get(ctx, key)
		if err == nil {
			err = g.drains.Delete(ctx, key, e.Revision)
		}
		if errors.Is(err, bus.ErrNotFound) {
			return nil
		}
		return err
	})
}

// drainUnknown is what a client hears of a change that was made, or may have been.
func drainUnknown(what string) *schemas.Error {
	return &schemas.Error{Status: http.StatusServiceUnavailable, Code: schemas.CodeUnknownOutcome, Detail: what, RetryAfter: schemas.Duration(time.Second)}
}

// setDrain makes the change and answers with the worker as it is then.
func (g *Gateway) setDrain(w *response, r *http.Request, draining bool, change func(ctx context.Context, key string) error) error {
	id, err := schemas.ParseWorkerID(r.PathValue("id"))
	if err != nil {
		return noWorker()
	}
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	if err := schemas.DecodeStrict(body, &struct{}{}); err != nil {
		return err
	}
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	if _, _, ok := g.fleet.beats.Get(string(id)); !ok {
		return noWorker()
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	if err := change(ctx, string(id)); errors.Is(err, bus.ErrUnknownOutcome) {
		return drainUnknown("it may have been noted; send it again")
	} else if err != nil {
		return busError(err, "")
	}
	if err := g.fleet.drains.Wait(ctx, string(id), func(_ schemas.Drain, _ uint64, there bool) bool { return there == draining }); err != nil {
		return drainUnknown("it is noted, but this gateway has not heard of it yet; send it again to see what became of it")
	}
	g.log.Info().Str("worker", string(id)).Bool("draining", draining).Msg("worker drain")
	status := http.StatusOK
	if draining && !g.drained(r.Context(), id) {
		status = http.StatusAccepted
	}
	b, _, ok := g.fleet.beats.Get(string(id))
	if !ok {
		return noWorker()
	}
	b.Worker = id
	return answer(w, status, g.fleet.worker(b, time.Now()))
}

const (
	// drainWait is how long a drain waits for the placers to know of it.
	drainWait = 2 * time.Second
	// drainAgain is the pause before it asks again.
	drainAgain = 50 * time.Millisecond
)

// drained says whether the leading placer gives the worker nothing more. While none
// leads nobody gives it anything, but the write of one that led may still arrive.
func (g *Gateway) drained(ctx context.Context, id schemas.WorkerID) bool {
	ctx, cancel := context.WithTimeout(ctx, drainWait)
	defer cancel()
	for {
		try, done := context.WithTimeout(ctx, drainWait/4) // who was asked may just have been deposed
		m, err := g.conn.NC.RequestWithContext(try, schemas.PlacerDrainedSubject, []byte(id))
		done()
		if err == nil && string(m.Data) == string(id) {
			return true
		}
		select {
		case <-time.After(drainAgain):
		case <-ctx.Done():
			return false
		}
	}
}

// stays refuses more time to a task that keeps a draining worker busy. It asks the
// leader: another gateway may have drained the worker a moment ago.
func (g *Gateway) stays(ctx context.Context, rec schemas.Record) error {
	if !rec.State.Held() {
		return nil
	}
	_, err := g.drains.Get(ctx, string(rec.Worker))
	if errors.Is(err, bus.ErrNotFound) {
		return nil
	}
	if err != nil {
		return readError(err)
	}
	return &schemas.Error{Status: http.StatusConflict, Code: schemas.CodeDraining, Task: rec.ID, State: rec.State,
		Detail: "worker " + string(rec.Worker) + " is being drained, so its tasks get no more time; create a new one"}
}
