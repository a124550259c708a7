package agent

import (
	"context"
	"fmt"
	"slices"

	"dayfly.dev/bus"
	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
)

// orders pulls the worker's orders until ctx ends.
func (a *Agent) orders(ctx context.Context) error {
	return a.conn.Consume(ctx, bus.ConsumeOptions{
		Stream: schemas.WorkStream(a.cfg.Worker), Durable: schemas.WorkConsumer(a.cfg.Worker),
		MaxMessages: 256, Workers: 1,
	}, func(_ context.Context, m bus.Msg) {
		var o schemas.Order
		if err := schemas.Decode(m.Data, &o); err != nil {
			a.log.Error().Err(err).Str("subject", m.Subject).Msg("order is not readable")
			_ = m.Ack()
			return
		}
		if m.Delivered > 1 {
			a.metrics.again.Inc()
		}
		a.handle(o, tracing.Of(m.Header))
		a.mu.Lock()
		a.newest = m.Sequence
		a.mu.Unlock()
		// A lost acknowledgement brings the order again; the journal knows it then.
		_ = m.Ack()
	})
}

// handle makes one order known: everything it needs is in the journal when it
// returns. It never waits for Docker or the bus. trace is the traceparent that came with it.
func (a *Agent) handle(o schemas.Order, trace string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if o.Worker != a.cfg.Worker {
		return
	}
	e, known := a.journal.get(o.Task)
	switch {
	case known && o.Attempt < e.Attempt:
		return // of an attempt that a later one has replaced
	case known && o.Assignment == e.Assignment:
		if o.Revision >= e.Revision {
			a.update(o, e)
		}
		return
	case o.Epoch != a.epoch:
		return // for an earlier registration of this worker
	}
	// Whatever is asked of a later attempt, the record has left an earlier one.
	before := a.live[o.Task]
	if before != nil {
		delete(a.live, o.Task)
		before.supersede()
	}
	t := entry{Assignment: o.Assignment, Revision: o.Revision, Applied: o.Extensions, Trace: trace, At: schemas.Duration(a.rt.Now())}
	if o.Want == schemas.WantRun && o.Spec != nil {
		t.NoPermit, t.Needs = o.Spec.OnLost == schemas.OnLostWait, o.Spec.Resources
		t.Health, t.Judge = o.Spec.Health, o.Spec.Judge != nil
		err := a.journal.put(t)
		live := a.track(t)
		live.deadline = deadline{left: o.TimeLeft.Std(), at: a.rt.Now(), counting: o.Counting}
		a.metrics.orders.WithLabelValues(string(o.Want)).Inc()
		live.run(func() { live.begin(o, before, err) })
		return
	}
	// A stop or close of what never arrived: it shall never start.
	a.metrics.orders.WithLabelValues(string(o.Want)).Inc()
	t.Closed = o.Want == schemas.WantClose
	if err := a.journal.put(t); err != nil {
		a.log.Error().Err(err).Str("task", string(o.Task)).Msg("journal")
	}
	if o.Want == schemas.WantStop {
		live := a.track(t)
		live.run(func() {
			if before != nil {
				<-before.dead // "no process of the task is left" must be true
			}
			live.giveBack("stopped before it began")
		})
	}
}

// update applies a newer order to an attempt that is known. It runs under a.mu.
func (a *Agent) update(o schemas.Order, e entry) {
	t := a.live[o.Task]
	a.metrics.orders.WithLabelValues(string(o.Want)).Inc()
	if t == nil || t.Assignment != o.Assignment {
		// Closed long ago. If it is still asked for, the record does not know that it ended.
		// One that is not closed is just being given up with its registration.
		if e.Closed && o.Want != schemas.WantClose && o.Revision > e.Revision {
			e.Revision = o.Revision
			live := a.track(e)
			live.restarts = o.Restarts
			live.run(func() {
				live.finish(schemas.End{By: schemas.EndedLost, Reason: schemas.ReasonWorkerLost,
					Message: fmt.Sprintf("worker %s has closed this attempt before", a.cfg.Worker)}, false)
			})
		}
		return
	}
	err := a.journal.change(o.Assignment, func(e *entry) {
		e.Revision = o.Revision
		if o.Want == schemas.WantClose {
			e.Closed, e.At = true, schemas.Duration(a.rt.Now())
		}
	})
	if err != nil {
		a.log.Error().Err(err).Str("task", string(o.Task)).Msg("journal")
	}
	switch o.Want {
	case schemas.WantRun:
		t.extend(o)
	case schemas.WantStop:
		t.halt(o)
	case schemas.WantClose:
		delete(a.live, o.Task)
		t.close()
	}
}

// takes says whether this worker takes tasks of the kind, "" for those of none.
func (a *Agent) takes(kind string) bool {
	return len(a.cfg.Kinds) == 0 || slices.Contains(a.cfg.Kinds, kind)
}

// reserve takes room for an attempt, if the host has it: the agent is the last judge
// of that. The attempt gives it back when it is over. gpus are the devices it gets.
func (a *Agent) reserve(r schemas.Resources) (gpus []int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch u := a.used; {
	case a.host.Slots > 0 && u.Tasks+1 > a.host.Slots:
		return nil, fmt.Errorf("worker %s has no free slot", a.cfg.Worker)
	case u.CPUs+r.CPUs > a.host.CPUs+1e-6: // sums of fractions
		return nil, fmt.Errorf("worker %s has too little CPU left", a.cfg.Worker)
	case u.Memory+r.Memory > a.host.Memory:
		return nil, fmt.Errorf("worker %s has too little memory left", a.cfg.Worker)
	}
	for i := 0; i < a.host.GPUs && len(gpus) < r.GPUs; i++ {
		if !a.gpus[i] {
			gpus = append(gpus, i)
		}
	}
	if len(gpus) < r.GPUs {
		return nil, fmt.Errorf("worker %s has too few GPUs left", a.cfg.Worker)
	}
	a.use(1, r, gpus)
	return gpus, nil
}

func (a *Agent) release(r schemas.Resources, gpus []int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.use(-1, r, gpus)
}

// use runs under a.mu.
func (a *Agent) use(n int, r schemas.Resources, gpus []int) {
	for _, i := range gpus {
		a.gpus[i] = n > 0
	}
	a.used.Tasks += n
	a.used.CPUs += schemas.CPUs(n) * r.CPUs
	a.used.Memory += schemas.Size(n) * r.Memory
}
