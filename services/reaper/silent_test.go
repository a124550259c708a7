package reaper_test

import (
	"context"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/reaper"
)

// A worker that beats and answers no order holds its task no longer than it can be true.
// Its operator hears of it long before.
func TestAWorkerThatBeatsAndSaysNothing(t *testing.T) {
	b := newBench(t)
	b.cfg.Fence = time.Hour
	b.beat(func(*schemas.Beat) {})
	at := func(ago time.Duration) (schemas.TaskID, schemas.Assignment) {
		id := b.accept(nil)
		m := meta()
		m.At = m.At.Add(-ago)
		e, err := b.table.Update(b.ctx(), string(id), m.Op, func(e bus.Entry[schemas.Record]) (schemas.Record, []bus.WriteOption, error) {
			n, err := schemas.Next(e.Value, schemas.Choose{Meta: m, Worker: worker, Epoch: "e1"})
			return n, nil, err
		})
		if err != nil {
			t.Fatal(err)
		}
		return id, e.Value.Assignment()
	}
	over, of := at(2 * time.Hour)
	minutes, _ := at(time.Minute) // 120 times as long as an order is waited for here
	young, _ := at(0)
	reg := prometheus.NewRegistry()
	conn := natstest.Connect(t, b.server)
	b.background(func(ctx context.Context) error {
		return reaper.Run(ctx, reaper.Deps{Conn: conn, Logger: zerolog.Nop(), Metrics: reg}, b.cfg)
	})
	unanswered := func() float64 {
		all, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range all {
			if f.GetName() == "dayfly_tasks_unanswered" {
				return f.GetMetric()[0].GetGauge().GetValue()
			}
		}
		return -1
	}
	r := b.state(over, schemas.Failed)
	if r.Reason != schemas.ReasonStartTimeout || r.Message == "" {
		t.Errorf("%s: %s", r.Reason, r.Message)
	}
	b.order(over, func(o schemas.Order) bool { return o.Assignment == of && o.Want == schemas.WantClose })
	b.until("one task is unanswered", func() bool { return unanswered() >= 1 })
	if r := b.state(minutes, schemas.Assigned); r.Worker != worker {
		t.Errorf("with %q", r.Worker)
	}
	for _, id := range []schemas.TaskID{minutes, young} {
		b.next(id, func(m schemas.Meta) schemas.Event {
			return schemas.Settle{Meta: m, Report: schemas.Report{Assignment: schemas.Assignment{Task: id, Attempt: 1, Worker: worker, Epoch: "e1"}, Phase: schemas.PhaseRunning}}
		})
	}
	b.until("it is answered", func() bool { return unanswered() == 0 })
}
