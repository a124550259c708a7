package schemas_test

import (
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// A restored record never starts anew what may still run, and no attempt number comes
// twice.
func TestRestore(t *testing.T) {
	const leap = schemas.RestoreLeap
	held := func(state schemas.State, lost schemas.OnLost) func() schemas.Record {
		return func() schemas.Record { return heldRecord(state, lost, true) }
	}
	queued := func(lost schemas.OnLost) func() schemas.Record {
		return func() schemas.Record { return newRecord(lost) }
	}
	for name, c := range map[string]struct {
		record  func() schemas.Record
		after   time.Duration
		state   schemas.State
		reason  schemas.Reason
		attempt int
	}{
		"queued":                      {queued(schemas.OnLostRequeue), 0, schemas.Queued, schemas.ReasonRestored, leap},
		"queued, its worker only":     {queued(schemas.OnLostWait), 0, schemas.Failed, schemas.ReasonRestored, 0},
		"queued, once at most":        {queued(schemas.OnLostFail), 0, schemas.Failed, schemas.ReasonRestored, 0},
		"queued, of one attempt":      {func() schemas.Record { r := newRecord(schemas.OnLostRequeue); r.Spec.MaxAttempts = 1; return r }, 0, schemas.Failed, schemas.ReasonRestored, 0},
		"waited longer than its time": {queued(schemas.OnLostRequeue), 48 * time.Hour, schemas.Queued, schemas.ReasonRestored, leap},
		"running":                     {held(schemas.Running, schemas.OnLostRequeue), 0, schemas.Queued, schemas.ReasonRestored, leap + 2},
		"assigned":                    {held(schemas.Assigned, schemas.OnLostRequeue), 0, schemas.Queued, schemas.ReasonRestored, leap + 2},
		"running, its time is over":   {held(schemas.Running, schemas.OnLostRequeue), time.Hour, schemas.Expired, schemas.ReasonExpired, 2},
		"running, canceled": {func() schemas.Record {
			r := heldRecord(schemas.Running, schemas.OnLostRequeue, true)
			r.Cancel = &schemas.CancelMark{At: t0, By: "x"}
			return r
		}, 0, schemas.Canceled, schemas.ReasonCanceled, 2},
		"running, without a try left":   {func() schemas.Record { return heldRecord(schemas.Running, schemas.OnLostRequeue, false) }, 0, schemas.Failed, schemas.ReasonRestored, 2},
		"running, once at most":         {held(schemas.Running, schemas.OnLostFail), 0, schemas.Failed, schemas.ReasonRestored, 2},
		"running, its worker only":      {held(schemas.Running, schemas.OnLostWait), 0, schemas.Running, "", 2},
		"running too long, its worker":  {held(schemas.Running, schemas.OnLostWait), time.Hour, schemas.Running, "", 2},
		"assigned, and its worker only": {held(schemas.Assigned, schemas.OnLostWait), 0, schemas.Assigned, "", 2},
	} {
		t.Run(name, func(t *testing.T) {
			r := c.record()
			n := must(t, r, schemas.Restore{Meta: meta(t0.Add(c.after))})
			if n.State != c.state || n.Reason != c.reason || n.Attempt != c.attempt {
				t.Errorf("%s (%s) in attempt %d, want %s (%s) in %d", n.State, n.Reason, n.Attempt, c.state, c.reason, c.attempt)
			}
			if len(n.History) != len(r.History)+1 {
				t.Error("the history does not say it")
			}
			switch {
			case n.State.Held():
				if n.Assignment() != r.Assignment() || n.Extensions != r.Extensions+leap {
					t.Errorf("it is with %+v, extensions %d", n.Assignment(), n.Extensions)
				}
			case n.State == schemas.Queued:
				if n.Worker != "" || n.SweepAt().Before(t0.Add(c.after)) {
					t.Errorf("it waits with worker %q and is swept at %s", n.Worker, n.SweepAt())
				}
			}
		})
	}
}
