package reaper

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
)

const (
	// durable is the consumer of REPORTS that all reapers share.
	durable    = "reaper"
	retryAfter = time.Second
	settlers   = 16
	// ackWait is how long the reports that another reaper has taken wait when it dies.
	ackWait = 10 * time.Second
)

// reports settles the workers' reports until ctx ends. Reports of one task are
// handled in order.
func (r *Reaper) reports(ctx context.Context) error {
	select {
	case <-r.tasks.Ready():
	case <-ctx.Done():
		return nil
	}
	// A cluster without a leader for the consumer refuses it for a while.
	for err := r.ensureConsumer(ctx); err != nil; err = r.ensureConsumer(ctx) {
		r.log.Warn().Err(err).Msg("make the consumer of reports, trying again")
		select {
		case <-time.After(retryAfter):
		case <-ctx.Done():
			return nil
		}
	}
	return r.conn.Consume(ctx, bus.ConsumeOptions{
		Stream: schemas.StreamReports, Durable: durable, MaxMessages: 1024, Workers: settlers,
	}, func(ctx context.Context, m bus.Msg) {
		if m.Delivered > 1 {
			r.metrics.again.Inc()
		}
		var rep schemas.Report
		err := schemas.Decode(m.Data, &rep)
		if err == nil {
			_, err = schemas.ParseTaskID(string(rep.Task)) // "*" would be read as any record
		}
		if err != nil || m.Subject != schemas.ReportSubject(rep.Worker, rep.Task) {
			// Not ours, or a worker that speaks for another: its subject says who it is.
			r.metrics.reports.WithLabelValues("refused").Inc()
			r.log.Warn().Str("subject", m.Subject).Msg("report refused")
			_ = m.Ack()
			return
		}
		span := r.tracer.Start(tracing.Of(m.Header), "settle", tracing.Consumer)
		span.Task(string(rep.Task), rep.Attempt)
		span.Set("dayfly.phase", string(rep.Phase))
		result, err := r.settle(ctx, rep)
		span.Set("dayfly.result", result)
		span.End(err)
		r.metrics.reports.WithLabelValues(result).Inc()
		if err != nil {
			r.log.Warn().Err(err).Str("task", string(rep.Task)).Msg("settle")
			_ = m.Nak(retryAfter)
			return
		}
		_ = m.Ack()
	})
}

// ensureConsumer makes the consumer of reports if it is not there.
func (r *Reaper) ensureConsumer(ctx context.Context) error {
	return r.conn.EnsureConsumer(ctx, bus.ConsumerSpec{
		Stream: schemas.StreamReports, Durable: durable, Filter: schemas.ReportSubject("*", "*"),
		AckWait: ackWait, MaxAckPending: reportsMost,
	})
}

// errAhead says that the record is missing or of a lower attempt than the report.
var errAhead = errors.New("the report is ahead of the record")

// unknown remembers since when there have been reports of an attempt that no record
// explains: a read may be stale, a restored bucket is older. The count of deliveries
// cannot tell, since a worker repeats its last report and each is a new message.
type unknown struct {
	mu    sync.Mutex
	first map[schemas.WorkerID]map[schemas.Assignment]time.Time // under mu
}

// Each report that is tried again takes one of the places that all reports share. Workers
// that make tasks up shall not take them all, however many they are, nor shall one of them
// take all that there are for such attempts. What is refused is no loss to an honest
// worker: it repeats its last report of each task.
const (
	reportsMost   = 4096            // that are not acknowledged, of all workers
	unknownMost   = reportsMost / 4 // attempts of all workers that are remembered
	unknownOfEach = unknownMost / 4 // of one worker
)

func newUnknown() *unknown {
	return &unknown{first: map[schemas.WorkerID]map[schemas.Assignment]time.Time{}}
}

// since says since when there have been reports of a; not ok is one too many.
func (u *unknown) since(a schemas.Assignment) (at time.Time, ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	of := u.first[a.Worker]
	if at, ok = of[a]; ok {
		return at, true
	}
	all := 0
	for _, attempts := range u.first {
		all += len(attempts)
	}
	if len(of) >= unknownOfEach || all >= unknownMost {
		return at, false
	}
	if of == nil {
		of = map[schemas.Assignment]time.Time{}
		u.first[a.Worker] = of
	}
	of[a] = time.Now()
	return of[a], true
}

func (u *unknown) forget(a schemas.Assignment) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if of := u.first[a.Worker]; of != nil {
		if delete(of, a); len(of) == 0 {
			delete(u.first, a.Worker)
		}
	}
}

// prune forgets those of which nothing was heard any more.
func (u *unknown) prune(before time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for w, of := range u.first {
		maps.DeleteFunc(of, func(_ schemas.Assignment, at time.Time) bool { return at.Before(before) })
		if len(of) == 0 {
			delete(u.first, w)
		}
	}
}

// settle folds one report into its record. An attempt that the record has left
// behind is told to close, which is safe by a read: a final record and a higher
// attempt never become untrue.
func (r *Reaper) settle(ctx context.Context, rep schemas.Report) (string, error) {
	e, err := r.entry(ctx, rep.Task)
	if err == nil && (e.Revision < rep.Revision || e.Value.Attempt < rep.Attempt || e.Value.Attempt == rep.Attempt && e.Value.Assignment() != rep.Assignment && e.Value.State.Held()) {
		e, err = r.table.Get(ctx, string(rep.Task)) // the view may lag behind the report
		if err == nil && e.Value.Attempt < rep.Attempt {
			err = errAhead
		}
	}
	if errors.Is(err, bus.ErrNotFound) || errors.Is(err, errAhead) {
		since, ok := r.unknown.since(rep.Assignment)
		switch {
		case !ok:
			return "refused", nil
		case time.Since(since) < r.cfg.Unknown:
			return "ahead", err
		}
		r.unknown.forget(rep.Assignment)
		r.log.Warn().Str("task", string(rep.Task)).Int("attempt", rep.Attempt).Msg("no record of a reported attempt: close it")
		r.order(schemas.Record{ID: rep.Task, State: schemas.Failed}, rep.Revision+1, rep.Assignment)
		return "unknown", nil
	}
	if err != nil {
		return "error", err
	}
	r.unknown.forget(rep.Assignment)
	after, err := r.apply(ctx, e, func(m schemas.Meta) schemas.Event { return schemas.Settle{Meta: m, Report: rep} })
	if (err == nil || settled(err)) && !after.Value.Heard(rep, e.Revision) {
		r.metrics.redriven.Inc()
		r.order(after.Value, after.Revision, rep.Assignment)
	}
	switch {
	case err == nil:
		return "settled", nil
	case errors.Is(err, schemas.ErrUnchanged):
		return "unchanged", nil
	case errors.Is(err, schemas.ErrFinal), errors.Is(err, schemas.ErrStale):
		// Nothing more will be made of it. Only an attempt that the record has left is
		// closed: a phase that comes late says nothing about it.
		if after.Value.State.Final() || after.Value.Assignment() != rep.Assignment {
			r.order(after.Value, max(after.Revision, rep.Revision), rep.Assignment)
		}
		return "stale", nil
	}
	return "error", err
}
