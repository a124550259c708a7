package placer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"dayfly.dev/bus"
	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
)

// lead seeks leadership and leads, again and again, until ctx ends.
func (p *Placer) lead(ctx context.Context) error {
	for {
		l, err := p.elector.campaign(ctx)
		if err != nil {
			return nil // ctx has ended
		}
		if err := p.reign(ctx, l); err != nil && ctx.Err() == nil {
			p.log.Warn().Err(err).Msg("stopped leading")
			sleep(ctx, p.cfg.Leadership/10)
		}
	}
}

// reign leads for one term.
func (p *Placer) reign(ctx context.Context, l *lease) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return l.keep(gctx) })
	g.Go(func() error {
		if err := p.catchUp(gctx); err != nil {
			return fmt.Errorf("catch up with the views: %w", err)
		}
		why, err := p.conn.NC.Subscribe(schemas.PlacerWhySubject, p.answerWhy)
		if err != nil {
			return fmt.Errorf("listen to %s: %w", schemas.PlacerWhySubject, err)
		}
		defer func() { _ = why.Unsubscribe() }()
		asked := make(chan *nats.Msg, 64)
		drained, err := p.conn.NC.ChanSubscribe(schemas.PlacerDrainedSubject, asked)
		if err != nil {
			return fmt.Errorf("listen to %s: %w", schemas.PlacerDrainedSubject, err)
		}
		defer func() { _ = drained.Unsubscribe() }()
		p.leading.Store(true)
		defer p.leading.Store(false)
		p.log.Info().Uint64("term", l.Held().Term).Msg("leading")
		leader, leaderCtx := errgroup.WithContext(gctx)
		leader.Go(func() error { return p.decide(leaderCtx, l) })
		leader.Go(func() error { return p.resend(leaderCtx, l) })
		leader.Go(func() error { return p.makeQueues(leaderCtx) })
		leader.Go(func() error { return p.answerDrained(leaderCtx, l, asked) })
		return leader.Wait()
	})
	err := g.Wait()
	if ctx.Err() != nil {
		if err := l.release(ctx); err != nil {
			p.log.Debug().Err(err).Msg("give up the placers' lease")
		}
	}
	return err
}

// catchUp waits until the views have all that was there when it was called. That the
// lease was written proves nothing about them: it is in another bucket.
func (p *Placer) catchUp(ctx context.Context) error {
	for bucket, view := range map[string]interface {
		CaughtUp(ctx context.Context, revision uint64) error
	}{schemas.BucketTasks: p.tasks, schemas.BucketWorkers: p.beats, schemas.BucketDrains: p.drains} {
		last, err := p.lastSequence(ctx, bus.StreamOf(bucket))
		if err != nil {
			return err
		}
		if err := view.CaughtUp(ctx, last); err != nil {
			return fmt.Errorf("%s: %w", bucket, err)
		}
	}
	return nil
}

// lastSequence asks the stream's leader, until ctx ends.
func (p *Placer) lastSequence(ctx context.Context, stream string) (uint64, error) {
	for {
		try, cancel := context.WithTimeout(ctx, p.cfg.WriteTimeout)
		s, err := p.conn.JS.Stream(try, stream)
		cancel()
		if err == nil {
			return s.CachedInfo().State.LastSeq, nil
		}
		if !sleep(ctx, 50*time.Millisecond) {
			return 0, fmt.Errorf("ask for the last sequence of %s: %w", stream, err)
		}
	}
}

// decide is the one loop that chooses. What it chose is written by others, some at a
// time; it returns when they have.
func (p *Placer) decide(ctx context.Context, l *lease) error {
	var writers sync.WaitGroup
	defer writers.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		for {
			select {
			case p.writers <- struct{}{}:
			case <-ctx.Done():
				return nil
			}
			if ctx.Err() != nil || !l.Valid() {
				<-p.writers
				break
			}
			p.mu.Lock()
			d, ok := p.book.next(time.Now(), p.refused)
			if ok {
				p.writing[d.worker]++
			}
			p.mu.Unlock()
			if !ok {
				<-p.writers
				break
			}
			writers.Go(func() {
				defer func() { <-p.writers }()
				p.place(ctx, l, d)
			})
		}
		p.mu.Lock()
		at, ok := p.book.due()
		p.mu.Unlock()
		if ok {
			timer.Reset(max(time.Until(at), time.Millisecond))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-p.wake:
		case <-timer.C:
		}
	}
}

// refused counts a task that fits nowhere; p.mu is held.
func (p *Placer) refused(t *task) {
	result, now := "constraint", time.Now()
	for _, w := range p.book.fleet.list {
		if p.book.fleet.couldHold(w, t.shape, now) {
			result = "no_capacity"
			break
		}
	}
	p.metrics.placements.WithLabelValues(result).Inc()
}

// errMoved: the record is not any more what the decision was about.
var errMoved = errors.New("the task was placed and given back meanwhile")

// place writes one decision and sends its order.
func (p *Placer) place(ctx context.Context, l *lease, d decision) {
	// It goes on when ctx ends, so that a placer that is told to stop knows what it did,
	// but not beyond the lease.
	wctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), earlier(l.Until(), time.Now().Add(p.cfg.WriteTimeout)))
	defer cancel()
	rec, err := d.queued.record()
	if err != nil {
		p.log.Error().Err(err).Str("task", string(d.task)).Msg("decode record")
		p.wrote(d, overtaken, 0) // until it changes
		return
	}
	event := schemas.Choose{Meta: schemas.Meta{At: time.Now().UTC(), By: "placer", Op: op()}, Worker: d.worker, Epoch: d.epoch}
	var a schemas.Assignment
	e, err := p.table.UpdateFrom(wctx, bus.Entry[schemas.Record]{Key: string(d.task), Value: rec, Revision: d.revision}, event.Op,
		func(e bus.Entry[schemas.Record]) (schemas.Record, []bus.WriteOption, error) {
			r := e.Value
			if r.Attempt != d.queued.attempt {
				return r, nil, errMoved
			}
			if !l.Valid() { // this process may have been stopped since it decided
				return r, nil, errDeposed
			}
			event.On = e.Revision
			next, err := schemas.Next(r, event)
			a = next.Assignment()
			return next, nil, err
		})
	var refused *schemas.TransitionError
	switch {
	case err == nil:
		span := p.tracer.StartAt(rec.Trace, "queued", tracing.Inner, d.since)
		span.Task(string(d.task), a.Attempt)
		span.Set("dayfly.worker", string(d.worker))
		span.End(nil)
		p.order(e.Value, e.Revision, a)
		p.observe(e)
		p.wrote(d, written, e.Revision)
		p.metrics.placements.WithLabelValues("placed").Inc()
		p.metrics.placement.Observe(time.Since(d.since).Seconds())
		tracing.Log(p.log.Info(), rec.Trace).Str("task", string(d.task)).Int("attempt", a.Attempt).Str("worker", string(d.worker)).
			Str("state", string(schemas.Assigned)).Msg("task")
	case errors.As(err, &refused), errors.Is(err, errMoved):
		p.observe(e) // what was read instead
		p.wrote(d, overtaken, e.Revision)
		p.metrics.placements.WithLabelValues("conflict").Inc()
	default: // also where the record seems to be gone: the view tells whether it is
		p.wrote(d, failed, 0)
		p.metrics.placements.WithLabelValues("error").Inc()
		p.log.Warn().Err(err).Str("task", string(d.task)).Str("worker", string(d.worker)).Msg("write assignment")
	}
}

func (p *Placer) wrote(d decision, o outcome, revision uint64) {
	p.mu.Lock()
	p.book.wrote(d, o, revision, time.Now())
	p.mu.Unlock()
	if o == failed { // it may still arrive
		time.AfterFunc(p.cfg.WriteTimeout, func() { p.arrived(d.worker) })
	} else {
		p.arrived(d.worker)
	}
	if o != written {
		p.nudge()
	}
}

// arrived says that nothing is on its way any more of one assignment to a worker.
func (p *Placer) arrived(w schemas.WorkerID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.writing[w]--; p.writing[w] == 0 {
		delete(p.writing, w)
	}
}

// observe shows the view a record that was written or read here.
func (p *Placer) observe(e bus.Entry[schemas.Record]) {
	r := e.Value
	s := seen{state: r.State}
	switch {
	case r.State.Final():
		p.tasks.Forget(e.Key, e.Revision)
		return
	case r.State.Held():
		s.worker, s.need = intern(r.Worker), need{resourcesOf(r.Spec.Resources), blobsOf(r.Blobs)}
	default:
		data, err := schemas.Encode(r)
		if err != nil {
			return
		}
		if s, err = look(nats.Header(r.Headers()), data, nil); err != nil {
			return
		}
	}
	p.tasks.Observe(e.Key, s, e.Revision)
}

// order sends the order that follows from a record. It is not waited for; when it
// cannot be stored it is sent again.
func (p *Placer) order(r schemas.Record, revision uint64, a schemas.Assignment) {
	o := schemas.NewOrder(r, revision, a, time.Now())
	body, err := schemas.Encode(o)
	if err != nil {
		p.log.Error().Err(err).Str("task", string(a.Task)).Msg("encode order")
		return
	}
	span := p.tracer.Start(r.Trace, "order", tracing.Producer)
	span.Task(string(a.Task), a.Attempt)
	span.Set("dayfly.want", string(o.Want))
	p.conn.PublishAsync(schemas.OrderSubject(a.Worker, a.Task), tracing.Header(span.Traceparent()), body, func(err error) {
		span.End(err)
		if err == nil {
			return
		}
		p.log.Debug().Err(err).Str("task", string(a.Task)).Msg("send order")
		p.mu.Lock()
		defer p.mu.Unlock()
		p.book.unsent(a.Task, time.Now())
	})
}

// Orders are sent again for tasks that another placer, or a write of unknown outcome,
// left assigned. One that is assigned by this placer is never among them.
const (
	resendEvery = 250 * time.Millisecond
	resendBatch = 256
)

// resend sends the orders of assigned tasks of which this placer does not know that
// they were sent: at the beginning of a term those of all assigned tasks.
func (p *Placer) resend(ctx context.Context, l *lease) error {
	tick := time.NewTicker(resendEvery)
	defer tick.Stop()
	first := true
	for {
		before := time.Now()
		if !first { // what has just been seen is mostly being reported on
			before = before.Add(-resendEvery)
		}
		p.mu.Lock()
		ids := p.book.orphans(before, resendBatch)
		p.mu.Unlock()
		first = first && len(ids) == resendBatch
		g := errgroup.Group{}
		g.SetLimit(16)
		for _, id := range ids {
			g.Go(func() error { p.sendAgain(ctx, l, id); return nil })
		}
		_ = g.Wait()
		if len(ids) == resendBatch && ctx.Err() == nil {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// sendAgain reads the record, since the order needs all of it.
func (p *Placer) sendAgain(ctx context.Context, l *lease, id schemas.TaskID) {
	e, err := p.table.Get(ctx, string(id))
	if errors.Is(err, bus.ErrNotFound) {
		return
	}
	if err != nil || !l.Valid() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.book.unsent(id, time.Now())
		return
	}
	if e.Value.State == schemas.Assigned {
		p.order(e.Value, e.Revision, e.Value.Assignment())
		p.metrics.resent.Inc()
	}
}

// makeQueues makes the queue of each worker that has registered, and all of them
// anew when the server was away: it keeps them in memory.
func (p *Placer) makeQueues(ctx context.Context) error {
	reconnected := p.conn.Reconnected()
	p.enrollAll() // another leader may have died before it did
	for {
		now := time.Now()
		var todo []schemas.WorkerID
		later := false
		p.mu.Lock()
		for w, from := range p.newly {
			if from.After(now) {
				later = true
				continue
			}
			todo = append(todo, w)
			delete(p.newly, w)
		}
		p.mu.Unlock()
		g := errgroup.Group{}
		g.SetLimit(8)
		for _, w := range todo {
			g.Go(func() error { p.makeQueue(ctx, w); return nil })
		}
		_ = g.Wait()
		var again <-chan time.Time
		if later || len(todo) > 0 {
			again = time.After(queueRetry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-p.enroll:
		case <-again:
		case <-reconnected:
			reconnected = p.conn.Reconnected()
			p.enrollAll()
		}
	}
}

func (p *Placer) enrollAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range p.book.fleet.list {
		if !w.lost {
			p.newly[w.id] = time.Time{}
		}
	}
}

const (
	queueRetry = time.Second
	// queueAckWait is how long an order waits that a NATS server took with it when it
	// died: an agent acknowledges at once, and knows what comes twice.
	queueAckWait = 5 * time.Second
)

func (p *Placer) makeQueue(ctx context.Context, w schemas.WorkerID) {
	err := p.conn.EnsureConsumer(ctx, bus.ConsumerSpec{
		Stream: schemas.WorkStream(w), Durable: schemas.WorkConsumer(w), Filter: schemas.OrderSubject(w, "*"),
		AckWait: queueAckWait, MaxAckPending: -1,
		// On disk the server would write a file ten times a second for each busy worker. An
		// order that was acknowledged is gone from the stream, so nothing is lost with this.
		Memory: true,
	})
	if err == nil {
		p.log.Debug().Str("worker", string(w)).Msg("worker has its queue")
		return
	}
	if ctx.Err() == nil {
		p.log.Warn().Err(err).Str("worker", string(w)).Msg("make the worker's queue")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, anew := p.newly[w]; !anew {
		p.newly[w] = time.Now().Add(queueRetry)
	}
}

func (p *Placer) answerWhy(m *nats.Msg) {
	id, err := schemas.ParseTaskID(string(m.Data))
	if err != nil || m.Reply == "" {
		return
	}
	p.mu.Lock()
	y := p.book.why(id, time.Now())
	p.mu.Unlock()
	body, err := schemas.Encode(y)
	if err != nil {
		return
	}
	_ = m.Respond(body)
}

// answerDrained answers each who asks whether a worker is given nothing more, once that
// is so. What is not answered is asked again.
func (p *Placer) answerDrained(ctx context.Context, l *lease, asked <-chan *nats.Msg) error {
	for {
		var m *nats.Msg
		select {
		case <-ctx.Done():
			return nil
		case m = <-asked:
		}
		w, err := schemas.ParseWorkerID(string(m.Data))
		if err != nil || m.Reply == "" {
			continue
		}
		try, cancel := context.WithTimeout(ctx, 2*p.cfg.WriteTimeout)
		if p.drained(try, w) == nil && l.Valid() {
			_ = m.Respond(m.Data)
		}
		cancel()
	}
}

// drained waits until this placer has seen every drain that is stored, and has written
// what it had chosen for the worker before.
func (p *Placer) drained(ctx context.Context, w schemas.WorkerID) error {
	last, err := p.lastSequence(ctx, bus.StreamOf(schemas.BucketDrains))
	if err != nil {
		return err
	}
	if err := p.drains.CaughtUp(ctx, last); err != nil {
		return err
	}
	for {
		p.mu.Lock()
		writing := p.writing[w]
		p.mu.Unlock()
		if writing == 0 {
			return nil
		}
		if !sleep(ctx, 5*time.Millisecond) {
			return ctx.Err()
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
