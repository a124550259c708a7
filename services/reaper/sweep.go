package reaper

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

const sweepBatch = 256

// sweeps looks at the records that are due until ctx ends, and at all of them once
// in a while.
func (r *Reaper) sweeps(ctx context.Context) error {
	select {
	case <-r.tasks.Ready():
	case <-ctx.Done():
		return nil
	}
	scan := time.NewTicker(r.cfg.Scan)
	defer scan.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-scan.C:
			r.scan()
			r.unknown.prune(time.Now().Add(-10 * r.cfg.Unknown))
			if err := r.ensureConsumer(ctx); err != nil && ctx.Err() == nil {
				r.log.Warn().Err(err).Msg("look for the consumer of reports")
			}
		case <-r.suspected:
			r.lookAtSuspects()
		case <-timer.C:
		case <-r.due.wake:
		}
		ids, next := r.due.pop(time.Now(), sweepBatch)
		r.lookAll(ctx, ids)
		r.metrics.lastSweep.SetToCurrentTime()
		if next.IsZero() {
			timer.Reset(time.Hour)
		} else {
			timer.Reset(time.Until(next))
		}
	}
}

// scan asks for a look at every record that can still change.
func (r *Reaper) scan() {
	now := time.Now()
	r.tasks.Range(func(key string, t task, _ uint64) bool {
		if t.body != nil {
			r.due.add(schemas.TaskID(key), now)
		}
		return true
	})
}

func (r *Reaper) lookAll(ctx context.Context, ids []schemas.TaskID) {
	var g errgroup.Group
	g.SetLimit(16)
	for _, id := range ids {
		g.Go(func() error {
			if err := r.look(ctx, id); err != nil && ctx.Err() == nil {
				r.log.Warn().Err(err).Str("task", string(id)).Msg("sweep")
				r.due.add(id, time.Now().Add(r.cfg.Redrive))
			}
			return nil
		})
	}
	_ = g.Wait()
}

// look does what the time asks for one task, and says when to look again.
func (r *Reaper) look(ctx context.Context, id schemas.TaskID) error {
	t, _, ok := r.tasks.Get(string(id))
	if !ok || t.body == nil {
		return nil
	}
	e, err := r.entry(ctx, id)
	switch {
	case errors.Is(err, bus.ErrNotFound):
		return nil
	case err != nil:
		return err
	}
	t.body.looked()
	now := time.Now()
	kept := e.Value.State.Held() && e.Value.WorkerLostAt.IsZero()
	if at := e.Value.SweepAt(); !at.IsZero() && !now.Before(at) && (!kept || r.silentFor(id) >= unansweredAfter*r.cfg.Redrive) {
		after, err := r.apply(ctx, e, func(m schemas.Meta) schemas.Event { return schemas.Sweep{Meta: m} })
		if err != nil && !settled(err) {
			return err
		}
		e = after
	}
	if e.Value.State.Held() {
		if done, err := r.checkHolder(ctx, e); done || err != nil {
			return err
		}
	}
	if next := r.redrive(e, now); !next.IsZero() {
		r.due.add(id, later(next, now.Add(firstLook)))
	}
	return nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// settled says that an event came to nothing because the record is as it should be.
func settled(err error) bool {
	return errors.Is(err, schemas.ErrUnchanged) || errors.Is(err, schemas.ErrStale) || errors.Is(err, schemas.ErrFinal) ||
		errors.Is(err, schemas.ErrState) || errors.Is(err, bus.ErrNotFound)
}

// redrive sends a task's order again where nothing has come of it, and gives the
// time of the next look.
func (r *Reaper) redrive(e bus.Entry[schemas.Record], now time.Time) time.Time {
	rec := e.Value
	if !rec.State.Held() {
		r.unanswered(rec, false)
		return rec.SweepAt()
	}
	last := rec.AssignedAt
	if n := len(rec.History); n > 0 {
		last = rec.History[n-1].At
	}
	at := r.orderDue(rec, r.past(last, now), now)
	r.unanswered(rec, !at.IsZero() && now.Sub(at) >= unansweredAfter*r.cfg.Redrive && rec.WorkerLostAt.IsZero() &&
		(rec.State != schemas.Starting || now.After(rec.StartingAt.Add(rec.Spec.Timeouts.Pull.Std()+rec.Spec.Timeouts.Start.Std()))))
	for !at.IsZero() && !at.After(now) { // the times of earlier orders are over
		if next := at.Add(r.cfg.Redrive); next.After(now) {
			r.metrics.redriven.Inc()
			r.order(rec, e.Revision, rec.Assignment())
			return next
		}
		missed := now.Sub(at) / r.cfg.Redrive
		at = at.Add(missed * r.cfg.Redrive)
	}
	if s := rec.SweepAt(); !s.IsZero() && (at.IsZero() || s.Before(at)) {
		return s
	}
	return at
}

// unansweredAfter is how many orders a worker that beats leaves without an answer before an
// operator should look at it. Only it may give its tasks up, and so they wait for it.
const unansweredAfter = 8

// unanswered takes note whether a task's worker leaves its orders without an answer.
func (r *Reaper) unanswered(rec schemas.Record, is bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, was := r.silent[rec.ID]
	switch {
	case is && !was:
		r.silent[rec.ID] = time.Now()
		r.log.Warn().Str("task", string(rec.ID)).Int("attempt", rec.Attempt).Str("worker", string(rec.Worker)).Msg("worker beats and does not answer orders")
	case was && !is:
		delete(r.silent, rec.ID)
	}
	r.metrics.unanswered.Set(float64(len(r.silent)))
}

// silentFor is how long a task's worker was seen here to leave orders without an answer. The
// times of a record alone say nothing of that: all of the site, or the server, may have been away.
func (r *Reaper) silentFor(id schemas.TaskID) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	since, ok := r.silent[id]
	if !ok {
		return 0
	}
	return time.Since(since)
}

// listenAnew gives all workers their time again to answer: nobody heard them, or this reaper did not.
func (r *Reaper) listenAnew() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.silent)
	r.metrics.unanswered.Set(0)
}

// past is t, or, where that is still to come, long enough ago for a redrive: it was
// stamped by a clock that is ahead, and nobody shall wait until ours is there.
func (r *Reaper) past(t, now time.Time) time.Time {
	if t.After(now) {
		return now.Add(-4 * r.cfg.Redrive)
	}
	return t
}

// orderDue is when the order of a held record is to be sent for the first time from
// here: last is when the record last changed.
func (r *Reaper) orderDue(rec schemas.Record, last, now time.Time) time.Time {
	switch {
	case rec.Cancel != nil:
		return later(r.past(rec.Cancel.At, now), last).Add(rec.Cancel.Grace.Std() + r.cfg.Redrive/3)
	case rec.Applied < rec.Extensions, rec.Restarts < rec.RestartTo:
		return last.Add(r.cfg.Redrive / 3)
	case !rec.WorkerLostAt.IsZero(): // its worker answers with a report once it is back
		return last.Add(r.cfg.Redrive)
	case rec.State == schemas.Assigned:
		return last.Add(r.cfg.Redrive)
	case rec.State == schemas.Starting:
		return last.Add(4 * r.cfg.Redrive)
	case !rec.ExpiresAt.IsZero():
		return rec.ExpiresAt.Add(rec.Spec.Timeouts.Stop.Std() + r.cfg.Overdue)
	}
	return time.Time{}
}
