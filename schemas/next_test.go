package schemas_test

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"dayfly.dev/schemas"
)

// verdict is the decision order of the design, written a second time and in its
// words, without a look at Next.
func verdict(by schemas.EndedBy, exit *schemas.Exit, ran, canceled, timeOver, left bool, lost schemas.OnLost) (schemas.State, schemas.Reason) {
	if by == schemas.EndedItself { // (1)
		if exit != nil && exit.Code == 0 {
			return schemas.Completed, schemas.ReasonExit
		}
		return schemas.Failed, schemas.ReasonOOM // what the worker said
	}
	if canceled { // (2)
		return schemas.Canceled, schemas.ReasonCanceled
	}
	if timeOver || by == schemas.EndedDeadline { // (3)
		return schemas.Expired, schemas.ReasonExpired
	}
	if by == schemas.EndedGaveBack && !ran { // (4)
		return schemas.Queued, schemas.ReasonGaveBack
	}
	if lost == schemas.OnLostRequeue && left { // (5)
		return schemas.Queued, schemas.ReasonWorkerLost
	}
	return schemas.Failed, schemas.ReasonWorkerLost
}

func TestDecisionOrder(t *testing.T) {
	at := t0.Add(time.Minute)
	exits := map[string]*schemas.Exit{"none": nil, "0": {Code: 0}, "7": {Code: 7}, "137": {Code: 137, Signal: 9, OOMKilled: true}}
	reached := map[[2]schemas.State]bool{}
	count := 0
	for _, state := range []schemas.State{schemas.Assigned, schemas.Starting, schemas.Running} {
		for _, by := range []schemas.EndedBy{
			schemas.EndedItself, schemas.EndedStop, schemas.EndedDeadline, schemas.EndedPermit, schemas.EndedGaveBack, schemas.EndedLost,
			"a word of a newer agent", "verdict", "verdict, and came back without it",
		} {
			for exitName, exit := range exits {
				for _, lost := range []schemas.OnLost{schemas.OnLostRequeue, schemas.OnLostFail, schemas.OnLostWait} {
					for bits := range 16 {
						canceled, timeOver, left, ran := bits&1 != 0, bits&2 != 0, bits&4 != 0, bits&8 != 0
						verdictEvent := strings.HasPrefix(string(by), "verdict")
						if verdictEvent && (exit != nil || ran) || by == "verdict" && lost == schemas.OnLostWait {
							continue // a verdict knows neither; and on_lost wait waits, see TestWaitingForAWorker
						}
						name := fmt.Sprintf("%s, by %s, exit %s, on_lost %s, canceled %v, time over %v, tries left %v, ran %v",
							state, by, exitName, lost, canceled, timeOver, left, ran)
						count++
						r := heldRecord(state, lost, left)
						if canceled {
							r.Cancel = &schemas.CancelMark{At: t0, By: "client"}
						}
						if timeOver {
							r.ExpiresAt = at
						}
						var event schemas.Event = ended(r, at, ran, schemas.End{By: by, Reason: schemas.ReasonOOM, Message: "m", Exit: exit, Stdout: "out"})
						if verdictEvent {
							event = schemas.Lose{Meta: meta(at), Worker: r.Worker, Epoch: r.Epoch, Gone: by != "verdict"}
							by := schemas.EndedLost
							checkVerdict(t, name, r, event, by, exit, false, canceled, timeOver, left, lost, reached)
							continue
						}
						checkVerdict(t, name, r, event, by, exit, ran || state == schemas.Running, canceled, timeOver, left, lost, reached)
					}
				}
			}
		}
	}
	if count < 3*7*4*3*16 {
		t.Errorf("only %d combinations", count)
	}
	for _, row := range schemas.Table() {
		if row.On == "no process is left" && !reached[[2]schemas.State{row.From, row.To}] {
			t.Errorf("%s to %s is in the table and never happens", row.From, row.To)
		}
	}
}

// heldRecord is a task in its second attempt, whose first was lost while it ran.
func heldRecord(state schemas.State, lost schemas.OnLost, triesLeft bool) schemas.Record {
	r := newRecord(lost)
	r.Attempt, r.Worker, r.Epoch, r.State = 2, "w1", "e1", state
	r.RunningAt, r.ExpiresAt = t0, t0.Add(time.Hour)
	r.Tries = 1 // before this attempt
	if !triesLeft {
		r.Tries = 2
	}
	if state != schemas.Assigned {
		r.Tries++
	}
	return r
}

func checkVerdict(t *testing.T, name string, r schemas.Record, event schemas.Event, by schemas.EndedBy, exit *schemas.Exit,
	ran, canceled, timeOver, left bool, lost schemas.OnLost, reached map[[2]schemas.State]bool) {
	t.Helper()
	state, reason := verdict(by, exit, ran, canceled, timeOver, left, lost)
	n, err := schemas.Next(r, event)
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	if n.State != state || n.Reason != reason {
		t.Errorf("%s: %s (%s), want %s (%s)", name, n.State, n.Reason, state, reason)
		return
	}
	reached[[2]schemas.State{r.State, n.State}] = true
	if state == schemas.Queued {
		if n.Worker != "" || n.Epoch != "" || n.Exit != nil || n.Stdout != "" || n.Attempt != 2 || n.ExpiresAt != r.ExpiresAt {
			t.Errorf("%s: queued again with rests: %+v", name, n)
		}
		return
	}
	if n.EndedAt.IsZero() || n.Message == "" {
		t.Errorf("%s: ended without time or message", name)
	}
	if exit != nil && (ran || by != schemas.EndedGaveBack) {
		if n.Exit == nil || n.Exit.Code != exit.Code || n.Exit.TimedOut != (state == schemas.Expired) || exit.TimedOut {
			t.Errorf("%s: exit %+v", name, n.Exit)
		}
	}
}

// TestTableRows reaches the rows that TestDecisionOrder does not.
func TestTableRows(t *testing.T) {
	at := t0.Add(2 * time.Hour)
	queued := newRecord(schemas.OnLostRequeue)
	assigned := must(t, queued, choose(t0))
	starting := must(t, assigned, report(assigned, t0, schemas.Report{Phase: schemas.PhaseAccepted}))
	run := must(t, assigned, running(assigned, t0))
	again := must(t, run, schemas.Lose{Meta: meta(t0), Worker: "w1", Epoch: "e1"})
	events := map[[2]schemas.State]func() schemas.Record{
		{"", schemas.Queued}:                 func() schemas.Record { return queued },
		{schemas.Queued, schemas.Assigned}:   func() schemas.Record { return must(t, queued, choose(t0)) },
		{schemas.Queued, schemas.Canceled}:   func() schemas.Record { return must(t, queued, schemas.AskCancel{Meta: meta(t0)}) },
		{schemas.Queued, schemas.Expired}:    func() schemas.Record { return must(t, again, schemas.Sweep{Meta: meta(at)}) },
		{schemas.Queued, schemas.Failed}:     func() schemas.Record { return must(t, queued, schemas.Sweep{Meta: meta(at)}) },
		{schemas.Assigned, schemas.Starting}: func() schemas.Record { return starting },
		{schemas.Assigned, schemas.Running}:  func() schemas.Record { return run },
		{schemas.Starting, schemas.Running}:  func() schemas.Record { return must(t, starting, running(starting, t0)) },
	}
	seen := map[[2]schemas.State]bool{}
	for _, row := range schemas.Table() {
		key := [2]schemas.State{row.From, row.To}
		if seen[key] {
			t.Errorf("%v stands there twice", key)
		}
		seen[key] = true
		if row.On == "no process is left" {
			continue
		}
		if get, ok := events[key]; !ok {
			t.Errorf("%q to %q: no test reaches it", row.From, row.To)
		} else if n := get(); n.State != row.To {
			t.Errorf("%q to %q: %s", row.From, row.To, n.State)
		}
		delete(events, key)
	}
	for key := range events {
		t.Errorf("%v happens and is not in the table", key)
	}
}

func TestWaitingForAWorker(t *testing.T) {
	lose := schemas.Lose{Meta: meta(t0.Add(time.Minute)), Worker: "w1", Epoch: "e1"}
	for name, c := range map[string]struct {
		start func(*testing.T) schemas.Record
		event schemas.Event
		state schemas.State
	}{
		"its worker comes back with it": {
			start: func(t *testing.T) schemas.Record { return waiting(t, lose) },
			event: nil, state: schemas.Running,
		},
		"its worker comes back without it": {
			start: func(t *testing.T) schemas.Record { return waiting(t, lose) },
			event: schemas.Lose{Meta: meta(t0.Add(2 * time.Minute)), Worker: "w1", Epoch: "e1", Gone: true}, state: schemas.Failed,
		},
		"its worker never comes back": {
			start: func(t *testing.T) schemas.Record { return waiting(t, lose) },
			event: schemas.Sweep{Meta: meta(t0.Add(time.Hour + 10*time.Second + schemas.LostSlack))}, state: schemas.Expired,
		},
		"it was canceled and its worker never comes back": {
			start: func(t *testing.T) schemas.Record {
				return must(t, waiting(t, lose), schemas.AskCancel{Meta: meta(t0.Add(2 * time.Minute))})
			},
			event: schemas.Sweep{Meta: meta(t0.Add(time.Hour + 10*time.Second + schemas.LostSlack))}, state: schemas.Canceled,
		},
		"it had not reported to be running": {
			start: func(t *testing.T) schemas.Record {
				return must(t, newRecord(schemas.OnLostWait), choose(t0), lose)
			},
			event: schemas.Sweep{Meta: meta(t0.Add(time.Minute + time.Hour + 10*time.Second + schemas.LostSlack))}, state: schemas.Expired,
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := c.start(t)
			if r.WorkerLostAt != lose.At || !r.State.Held() {
				t.Fatalf("does not wait: %+v", r)
			}
			if _, err := schemas.Next(r, lose); !errors.Is(err, schemas.ErrUnchanged) {
				t.Errorf("a second verdict: %v", err)
			}
			if c.event == nil {
				c.event = running(r, t0.Add(2*time.Minute))
			}
			if e, ok := c.event.(schemas.Sweep); ok {
				if at := r.SweepAt(); !at.Equal(e.At) {
					t.Errorf("sweep at %v, want %v", at, e.At)
				}
				e.At = e.At.Add(-1)
				if _, err := schemas.Next(r, e); !errors.Is(err, schemas.ErrUnchanged) {
					t.Errorf("swept too early: %v", err)
				}
			}
			n := must(t, r, c.event)
			if n.State != c.state || !n.WorkerLostAt.IsZero() {
				t.Errorf("%s, lost at %v", n.State, n.WorkerLostAt)
			}
			if n.ExpiresAt.IsZero() != n.RunningAt.IsZero() {
				t.Errorf("runs since %v, expires at %v", n.RunningAt, n.ExpiresAt)
			}
		})
	}
}

func waiting(t *testing.T, lose schemas.Lose) schemas.Record {
	t.Helper()
	r := must(t, newRecord(schemas.OnLostWait), choose(t0))
	return must(t, r, running(r, t0), lose)
}

func TestExtend(t *testing.T) {
	hours := func(n int) schemas.Duration { return schemas.Duration(time.Duration(n) * time.Hour) }
	for name, c := range map[string]struct {
		queued bool
		after  time.Duration
		ttl    schemas.Duration
		want   time.Duration // of the deadline after t0; of the TTL while queued
		err    error
	}{
		"while it waits":                   {queued: true, ttl: hours(2), want: 2 * time.Hour},
		"while it waits, beyond the limit": {queued: true, ttl: hours(100), want: 24 * time.Hour},
		"while it waits, to less":          {queued: true, ttl: hours(1), err: schemas.ErrUnchanged},
		"from now":                         {after: 30 * time.Minute, ttl: hours(1), want: 90 * time.Minute},
		"never back":                       {after: 30 * time.Minute, ttl: schemas.Duration(time.Minute), want: time.Hour},
		"by less than nothing":             {after: 30 * time.Minute, ttl: -5, want: time.Hour},
		"up to the limit":                  {after: 30 * time.Minute, ttl: hours(100), want: 24 * time.Hour},
		"by an age":                        {after: 30 * time.Minute, ttl: math.MaxInt64, want: 24 * time.Hour},
		"with two seconds left":            {after: time.Hour - 2*time.Second, ttl: hours(1), want: 2*time.Hour - 2*time.Second},
		"with less left":                   {after: time.Hour - 1999*time.Millisecond, ttl: hours(1), err: schemas.ErrTooLate},
		"after its end":                    {after: 2 * time.Hour, ttl: hours(5), err: schemas.ErrTooLate},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRecord(schemas.OnLostRequeue)
			if !c.queued {
				r = must(t, r, choose(t0))
				r = must(t, r, running(r, t0))
			}
			n, err := schemas.Next(r, schemas.AskExtend{Meta: meta(t0.Add(c.after)), TTL: c.ttl})
			if !errors.Is(err, c.err) {
				t.Fatal(err)
			}
			if err != nil {
				return
			}
			got := n.TTL.Std()
			if !c.queued {
				got = n.ExpiresAt.Sub(t0)
			}
			if got != c.want || n.Extensions != 1 {
				t.Errorf("%v, want %v; %d extensions", got, c.want, n.Extensions)
			}
		})
	}
	for name, r := range map[string]schemas.Record{
		"while it waits": must(t, newRecord(schemas.OnLostFail), schemas.AskExtend{Meta: meta(t0), TTL: hours(100)}),
		"while it runs": func() schemas.Record {
			r := must(t, newRecord(schemas.OnLostFail), choose(t0))
			return must(t, r, running(r, t0), schemas.AskExtend{Meta: meta(t0), TTL: hours(100)})
		}(),
	} {
		if _, err := schemas.Next(r, schemas.AskExtend{Meta: meta(t0.Add(time.Minute)), TTL: hours(100)}); !errors.Is(err, schemas.ErrLimit) {
			t.Errorf("at the limit %s: %v", name, err)
		}
	}
	r := must(t, newRecord(schemas.OnLostFail), choose(t0), schemas.AskCancel{Meta: meta(t0)})
	if _, err := schemas.Next(r, schemas.AskExtend{Meta: meta(t0), TTL: hours(9)}); !errors.Is(err, schemas.ErrState) {
		t.Errorf("of a canceled one: %v", err)
	}
}

func TestAskedRestart(t *testing.T) {
	r := must(t, newRecord(schemas.OnLostRequeue), choose(t0))
	ask := func(after time.Duration) schemas.AskRestart { return schemas.AskRestart{Meta: meta(t0.Add(after))} }
	refused := func(r schemas.Record, after time.Duration, why error) {
		t.Helper()
		if _, err := schemas.Next(r, ask(after)); !errors.Is(err, why) {
			t.Errorf("%v, want %v", err, why)
		}
	}
	refused(newRecord(schemas.OnLostRequeue), 0, schemas.ErrState)
	refused(r, 0, schemas.ErrState)
	r = must(t, r, running(r, t0))
	refused(must(t, r, schemas.AskCancel{Meta: meta(t0)}), time.Second, schemas.ErrState)
	refused(r, r.TTL.Std(), schemas.ErrTooLate)

	expires := r.ExpiresAt
	r = must(t, r, ask(time.Second))
	refused(r, 2*time.Second, schemas.ErrUnchanged) // the same restart
	if o := schemas.NewOrder(r, 7, r.Assignment(), t0.Add(time.Second)); o.Want != schemas.WantRun || o.Restarts != 0 || o.RestartTo != 1 {
		t.Errorf("order %+v", o)
	}
	r = must(t, r, report(r, t0.Add(3*time.Second), schemas.Report{Phase: schemas.PhaseRunning, Ran: true, Restarts: 1, Last: &schemas.Exit{Code: 143}}))
	if last := r.History[len(r.History)-1]; r.Restarts != 1 || !r.ExpiresAt.Equal(expires) || last.Note != "restart 1 after exit code 143" {
		t.Errorf("%d restarts, expires %s, %+v", r.Restarts, r.ExpiresAt, last)
	}
	r = must(t, r, ask(4*time.Second)) // another
	if r.RestartTo != 2 {
		t.Errorf("to %d", r.RestartTo)
	}
	r = must(t, r, schemas.Lose{Meta: meta(t0.Add(5 * time.Second)), Worker: r.Worker, Epoch: r.Epoch})
	if r.State != schemas.Queued || r.RestartTo != 0 {
		t.Errorf("%s, to %d", r.State, r.RestartTo)
	}
}

// A worker is not trusted: what it says about time, counts and words stays in bounds.
func TestReadyAndRestarts(t *testing.T) {
	r := newRecord(schemas.OnLostRequeue)
	r = must(t, r, choose(t0))
	r = must(t, r, running(r, t0))
	if v := r.View(1, t0); !v.Ready || !v.Timings.Ready.IsZero() {
		t.Error("without a health check a task is ready as it runs")
	}
	r.Spec.Health = &schemas.Health{TCP: &schemas.TCPCheck{Port: 80}}
	settle := func(n int, rep schemas.Report) {
		t.Helper()
		rep.Phase, rep.Ran = schemas.PhaseRunning, true
		r = must(t, r, report(r, t0.Add(time.Duration(n)*time.Second), rep))
	}
	is := func(ready bool, note string) {
		t.Helper()
		v := r.View(1, t0)
		if last := r.History[len(r.History)-1]; v.Ready != ready || v.Timings.Ready.IsZero() == ready || last.Note != note {
			t.Errorf("ready %v since %s, note %q; want %v, %q", v.Ready, v.Timings.Ready, last.Note, ready, note)
		}
	}
	if r.View(1, t0).Ready {
		t.Error("ready before its check has passed")
	}
	settle(1, schemas.Report{Ready: true})
	is(true, "ready")
	settle(2, schemas.Report{Restarts: 2, Last: &schemas.Exit{Code: 137}})
	is(false, "restart 2 after exit code 137")
	late := report(r, t0.Add(time.Minute), schemas.Report{Phase: schemas.PhaseRunning, Ran: true, Restarts: 1, Ready: true})
	if _, err := schemas.Next(r, late); !errors.Is(err, schemas.ErrStale) {
		t.Errorf("a run that is over: %v", err)
	}
	settle(3, schemas.Report{Restarts: 3, Ready: true})
	is(true, "ready")

	unhealthy := schemas.End{By: schemas.EndedItself, Reason: schemas.ReasonUnhealthy, Exit: &schemas.Exit{}}
	end := ended(r, t0, true, unhealthy)
	end.Report.Restarts = 3
	n := must(t, r, end)
	if n.State != schemas.Failed || n.Reason != schemas.ReasonUnhealthy || n.View(1, t0).Ready {
		t.Errorf("%s (%s)", n.State, n.Reason)
	}
	n = must(t, r, schemas.Lose{Meta: meta(t0), Worker: r.Worker, Epoch: r.Epoch})
	if n.State != schemas.Queued || n.Restarts != 0 || !n.ReadyAt.IsZero() {
		t.Errorf("a new attempt begins with %d restarts, ready %s", n.Restarts, n.ReadyAt)
	}
}

func TestUntrustedReports(t *testing.T) {
	held := must(t, newRecord(schemas.OnLostRequeue), choose(t0))
	at := t0.Add(time.Minute)
	for name, c := range map[string]struct {
		report  schemas.Report
		expires time.Time
	}{
		"ran for less than nothing": {schemas.Report{Phase: schemas.PhaseRunning, Ran: true, RanFor: -1 << 62}, at.Add(time.Hour)},
		"ran before it was given":   {schemas.Report{Phase: schemas.PhaseRunning, Ran: true, RanFor: 1 << 62}, t0.Add(time.Hour)},
		"runs, but never started":   {schemas.Report{Phase: schemas.PhaseRunning}, at.Add(time.Hour)},
		"ran while it is created":   {schemas.Report{Phase: schemas.PhaseAccepted, Ran: true}, time.Time{}},
	} {
		if n := must(t, held, report(held, at, c.report)); !n.ExpiresAt.Equal(c.expires) {
			t.Errorf("%s: expires at %v, want %v", name, n.ExpiresAt, c.expires)
		}
	}

	rep := report(held, at, schemas.Report{Phase: schemas.PhaseAccepted, Applied: 5})
	if _, err := schemas.Next(must(t, held, rep), rep); !errors.Is(err, schemas.ErrUnchanged) {
		t.Errorf("extensions that nobody asked for: %v", err)
	}
	if _, err := schemas.Next(held, report(held, at, schemas.Report{Phase: "dancing"})); !errors.Is(err, schemas.ErrStale) {
		t.Errorf("an unknown phase: %v", err)
	}
	if n := must(t, held, report(held, at, schemas.Report{Phase: schemas.PhaseEnded})); n.State != schemas.Queued || n.Reason != schemas.ReasonWorkerLost {
		t.Errorf("an end that says nothing: %s (%s)", n.State, n.Reason)
	}
	if n := must(t, held, ended(held, at, true, schemas.End{By: schemas.EndedItself})); n.State != schemas.Failed || n.Reason == "" {
		t.Errorf("a fault without a reason: %s (%s)", n.State, n.Reason)
	}
	long := strings.Repeat("\"\x00\xff", 50_000)
	n := must(t, held, ended(held, at, true, schemas.End{
		By: schemas.EndedItself, Reason: schemas.Reason(long), Message: long, Stdout: long, Stderr: long, Logs: schemas.LogSum{Why: long},
	}))
	if b := encode(t, n); len(b) > schemas.MaxRecordBytes {
		t.Errorf("the record takes %d bytes", len(b))
	}
	much := schemas.Unknown{"more": jsontext.Value(`"` + strings.Repeat("x", schemas.MaxRecordBytes) + `"`)}
	n = must(t, held, ended(held, at, true, schemas.End{By: schemas.EndedItself, Stdout: "out",
		Exit: &schemas.Exit{Code: 3, Unknown: much}, Usage: schemas.Usage{Unknown: much}, Logs: schemas.LogSum{Unknown: much}}))
	if b := encode(t, n); len(b) > schemas.MaxRecordBytes || n.Stdout != "out" || n.Exit.Code != 3 {
		t.Errorf("the record takes %d bytes, its output is %q", len(b), n.Stdout)
	}
	if n := must(t, held, report(held, at, schemas.Report{Phase: schemas.PhaseAccepted, Progress: long})); len(encode(t, n)) > 4096 {
		t.Errorf("progress takes %d bytes", len(n.Progress))
	}
	for name, e := range map[string]schemas.Choose{
		"a worker that is no name": {Meta: meta(t0), Worker: "a.b", Epoch: "e"},
		"an endless epoch":         {Meta: meta(t0), Worker: "a", Epoch: schemas.Epoch(long)},
	} {
		if _, err := schemas.Next(newRecord(schemas.OnLostFail), e); !errors.Is(err, schemas.ErrState) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A worker that gives back again and again is asked less and less often, also when it
// had accepted each time.
func TestGivingBackBacksOff(t *testing.T) {
	for _, accept := range []bool{false, true} {
		r, last := newRecord(schemas.OnLostRequeue), time.Duration(0)
		for i := range 10 {
			r = must(t, r, choose(t0))
			if accept {
				r = must(t, r, report(r, t0, schemas.Report{Phase: schemas.PhaseAccepted}))
			}
			r = must(t, r, ended(r, t0, false, schemas.End{By: schemas.EndedGaveBack, Message: "full"}))
			wait := r.NotBefore.Sub(t0)
			if r.Tries != 0 || wait < last || i > 0 && i < 7 && wait != 2*last || wait > 30*time.Second {
				t.Fatalf("accepted %v: time %d: %d tries, waits %v after %v", accept, i, r.Tries, wait, last)
			}
			last = wait
		}
	}
}

// An attempt that ran is no gift: the worker cannot give it back without cost.
func TestGivingBackWhatRan(t *testing.T) {
	r := must(t, newRecord(schemas.OnLostRequeue), choose(t0))
	r = must(t, r, running(r, t0))
	n := must(t, r, ended(r, t0, false, schemas.End{By: schemas.EndedGaveBack}))
	if n.State != schemas.Queued || n.Reason != schemas.ReasonWorkerLost || n.Tries != 1 {
		t.Errorf("%s (%s), %d tries", n.State, n.Reason, n.Tries)
	}
}

func TestSweepOfQueuedTasks(t *testing.T) {
	r := newRecord(schemas.OnLostRequeue)
	if at := r.SweepAt(); at != t0.Add(10*time.Minute) {
		t.Error(at)
	}
	if _, err := schemas.Next(r, schemas.Sweep{Meta: meta(t0.Add(10*time.Minute - 1))}); !errors.Is(err, schemas.ErrUnchanged) {
		t.Error(err)
	}
	if n := must(t, r, schemas.Sweep{Meta: meta(t0.Add(10 * time.Minute))}); n.State != schemas.Failed || n.Reason != schemas.ReasonQueueTimeout {
		t.Errorf("%s (%s)", n.State, n.Reason)
	}
	r = must(t, r, choose(t0))
	r = must(t, r, running(r, t0), schemas.Lose{Meta: meta(t0.Add(59 * time.Minute)), Worker: "w1", Epoch: "e1"})
	if at := r.SweepAt(); at != t0.Add(time.Hour) {
		t.Error(at)
	}
	if n := must(t, r, schemas.Sweep{Meta: meta(t0.Add(time.Hour))}); n.State != schemas.Expired {
		t.Errorf("%s (%s)", n.State, n.Reason)
	}
}

// A worker that beats and says nothing keeps a task no longer than it can be true, and
// nobody else gets it.
func TestSweepOfTasksOfSilentWorkers(t *testing.T) {
	assigned := must(t, newRecord(schemas.OnLostRequeue), choose(t0))
	started := must(t, assigned, running(assigned, t0))
	canceled := schemas.AskCancel{Meta: meta(t0)}
	limits := assigned.Spec.Timeouts
	unstarted := t0.Add(limits.Pull.Std() + limits.Start.Std() + schemas.SilentFor)
	overdue := started.ExpiresAt.Add(limits.Stop.Std() + schemas.SilentFor)
	for name, c := range map[string]struct {
		r      schemas.Record
		at     time.Time
		state  schemas.State
		reason schemas.Reason
	}{
		"it did not say that it runs":                 {assigned, unstarted, schemas.Failed, schemas.ReasonStartTimeout},
		"it did not say that it runs, and was to end": {must(t, assigned, canceled), unstarted, schemas.Canceled, schemas.ReasonCanceled},
		"it did not say how it ended":                 {started, overdue, schemas.Expired, schemas.ReasonExpired},
		"it was to end and did not say so":            {must(t, started, canceled), overdue, schemas.Canceled, schemas.ReasonCanceled},
	} {
		t.Run(name, func(t *testing.T) {
			if at := c.r.SweepAt(); !at.Equal(c.at) {
				t.Errorf("swept at %s, want %s", at, c.at)
			}
			if _, err := schemas.Next(c.r, schemas.Sweep{Meta: meta(c.at.Add(-1))}); !errors.Is(err, schemas.ErrUnchanged) {
				t.Error(err)
			}
			n := must(t, c.r, schemas.Sweep{Meta: meta(c.at)})
			if n.State != c.state || n.Reason != c.reason || !n.Logs.Truncated || !strings.Contains(n.Message, "did not say") {
				t.Errorf("%s (%s): %s, %+v", n.State, n.Reason, n.Message, n.Logs)
			}
		})
	}
	waits := must(t, newRecord(schemas.OnLostWait), choose(t0))
	restored := must(t, waits, schemas.Restore{Meta: meta(t0.Add(24 * time.Hour))})
	if at := restored.SweepAt(); !at.Equal(unstarted.Add(24 * time.Hour)) {
		t.Errorf("one of a backup is swept at %s", at)
	}
}

// Records hold times as JSON gives them back: UTC, without the monotonic clock.
func TestTimesAreUTC(t *testing.T) {
	now := time.Now().In(time.FixedZone("far", 3*3600))
	m := schemas.Meta{At: now, By: "x", Op: "1"}
	s := schemas.DefaultSpec()
	s.Image, s.OnLost = "a", schemas.OnLostWait
	r := schemas.NewRecord(taskID, s, schemas.DefaultPolicy(), m)
	roundTrip(t, r)
	for _, e := range []schemas.Event{
		schemas.Choose{Meta: m, Worker: "w1", Epoch: "e1"},
		schemas.Settle{Meta: m, Report: schemas.Report{Phase: schemas.PhaseAccepted, Assignment: schemas.Assignment{Task: taskID, Attempt: 1, Worker: "w1", Epoch: "e1"}}},
		schemas.Settle{Meta: m, Report: schemas.Report{Phase: schemas.PhaseRunning, Assignment: schemas.Assignment{Task: taskID, Attempt: 1, Worker: "w1", Epoch: "e1"}, RanFor: 5}},
		schemas.AskExtend{Meta: m, TTL: schemas.Duration(2 * time.Hour)},
		schemas.Lose{Meta: m, Worker: "w1", Epoch: "e1"},
		schemas.AskCancel{Meta: m},
		schemas.Lose{Meta: m, Worker: "w1", Epoch: "e1", Gone: true},
	} {
		r = must(t, r, e)
		roundTrip(t, r)
	}
	if r.State != schemas.Canceled || r.AcceptedAt.Location() != time.UTC || !r.AcceptedAt.Equal(now) {
		t.Errorf("%s, accepted at %v", r.State, r.AcceptedAt)
	}
}

// The largest spec that is taken leaves room for the largest status.
func TestRecordsFit(t *testing.T) {
	s := schemas.DefaultSpec()
	s.Image, s.OnLost, s.MaxAttempts = "a", schemas.OnLostRequeue, 100
	s.Stdin = strings.Repeat("x", schemas.MaxSpecBytes-len(encode(t, s))-len(`"stdin":"",`))
	if n := len(encode(t, s)); n != schemas.MaxSpecBytes {
		t.Fatalf("%d bytes", n)
	}
	if errs := s.Validate(schemas.DefaultPolicy()); len(errs) > 0 {
		t.Fatal(errs)
	}
	at := t0.Add(123456789)
	long := strings.Repeat("\"\x01\u00e9", 100_000)
	m := schemas.Meta{At: at, By: long, Op: long}
	r := schemas.NewRecord(taskID, s, schemas.DefaultPolicy(), m)
	check := func() {
		t.Helper()
		if n := len(encode(t, r)); n > schemas.MaxRecordBytes {
			t.Fatalf("%s after %d changes: %d bytes", r.State, len(r.History), n)
		}
	}
	for i := range 40 {
		name := schemas.WorkerID(fmt.Sprintf("%063d", i))
		r = must(t, r, schemas.Choose{Meta: m, Worker: name, Epoch: schemas.Epoch(strings.Repeat("e", 64))})
		check()
		if i < 20 {
			r = must(t, r, ended(r, at, false, schemas.End{By: schemas.EndedGaveBack, Message: long}))
		} else {
			rep := report(r, at, schemas.Report{Phase: schemas.PhaseAccepted, Progress: long})
			rep.Meta = m
			r = must(t, r, rep, schemas.Lose{Meta: m, Worker: name, Epoch: r.Epoch})
		}
		check()
	}
	r = must(t, r, schemas.Choose{Meta: m, Worker: schemas.WorkerID(strings.Repeat("w", 63)), Epoch: schemas.Epoch(strings.Repeat("e", 64))},
		schemas.AskExtend{Meta: m, TTL: schemas.Duration(20 * time.Hour)}, schemas.AskCancel{Meta: m})
	check()
	settle := ended(r, at, true, schemas.End{
		By: schemas.EndedItself, Reason: schemas.Reason(long), Message: long, Exit: &schemas.Exit{Code: 137, Signal: 9, OOMKilled: true},
		Usage: schemas.Usage{CPUMillis: math.MaxInt64, WallMillis: math.MaxInt64, MemoryPeak: math.MaxInt64},
		Logs:  schemas.LogSum{StdoutBytes: math.MaxInt64, StderrBytes: math.MaxInt64, Dropped: math.MaxInt64, Why: long}, Stdout: long, Stderr: long,
	})
	settle.Meta = m
	r = must(t, r, settle)
	check()
	t.Logf("%d bytes, of which output %d", len(encode(t, r)), len(r.Stdout)+len(r.Stderr))

	// With an ordinary spec an ordinary output is kept whole, at a character's end.
	r = must(t, newRecord(schemas.OnLostFail), choose(t0))
	r = must(t, r, ended(r, t0, true, schemas.End{By: schemas.EndedItself, Stdout: "x" + strings.Repeat("é", 10_000)}))
	if len(r.Stdout) != schemas.MaxInlineOutput-1 {
		t.Errorf("%d bytes of output", len(r.Stdout))
	}
}

func TestStaleEvents(t *testing.T) {
	r := must(t, newRecord(schemas.OnLostRequeue), choose(t0))
	r = must(t, r, report(r, t0, schemas.Report{Phase: schemas.PhaseRunning, Restarts: 2}))
	of := func(change func(*schemas.Assignment)) schemas.Event {
		a := r.Assignment()
		change(&a)
		return schemas.Settle{Meta: meta(t0), Report: schemas.Report{Assignment: a, Phase: schemas.PhaseEnded, Restarts: 2}}
	}
	for name, e := range map[string]schemas.Event{
		"a report of another task":         of(func(a *schemas.Assignment) { a.Task = "t-x" }),
		"a report of a former attempt":     of(func(a *schemas.Assignment) { a.Attempt-- }),
		"a report of a later attempt":      of(func(a *schemas.Assignment) { a.Attempt++ }),
		"a report of another worker":       of(func(a *schemas.Assignment) { a.Worker = "w2" }),
		"a report of another registration": of(func(a *schemas.Assignment) { a.Epoch = "e2" }),
		"a report from before a restart":   report(r, t0, schemas.Report{Phase: schemas.PhaseEnded, Restarts: 1}),
		"a report of a former phase":       report(r, t0, schemas.Report{Phase: schemas.PhaseAccepted, Restarts: 2}),
		"another worker is lost":           schemas.Lose{Meta: meta(t0), Worker: "w2", Epoch: "e1"},
		"another registration is lost":     schemas.Lose{Meta: meta(t0), Worker: "w1", Epoch: "e2"},
	} {
		if n, err := schemas.Next(r, e); !errors.Is(err, schemas.ErrStale) {
			t.Errorf("%s: %v, %s", name, err, n.State)
		}
	}
	for name, e := range map[string]schemas.Event{
		"a report":         of(func(*schemas.Assignment) {}),
		"a worker is lost": schemas.Lose{Meta: meta(t0)},
	} {
		if _, err := schemas.Next(newRecord(schemas.OnLostFail), e); !errors.Is(err, schemas.ErrStale) {
			t.Errorf("%s while queued: %v", name, err)
		}
	}
}

func TestHistoryKeepsItsBeginning(t *testing.T) {
	r := newRecord(schemas.OnLostRequeue)
	for i := range 100 {
		r = must(t, r, schemas.Choose{Meta: schemas.Meta{At: t0, By: "p", Op: fmt.Sprint(i)}, Worker: "w1", Epoch: "e1"})
		r = must(t, r, ended(r, t0, false, schemas.End{By: schemas.EndedGaveBack}))
	}
	if len(r.History) != schemas.MaxHistory || r.History[0].Note != "accepted" || r.History[schemas.MaxHistory-1].Attempt != 100 {
		t.Errorf("%d entries: %+v", len(r.History), r.History)
	}
	if len(r.Holders) != 0 {
		t.Errorf("holders of attempts that never ran: %+v", r.Holders)
	}
	for range schemas.MaxHolders + 2 {
		r.Tries = 0
		r = must(t, r, schemas.Choose{Meta: meta(t0), Worker: "w1", Epoch: "e1"})
		r = must(t, r, schemas.Lose{Meta: schemas.Meta{At: t0, By: "r", Op: "99"}, Worker: "w1", Epoch: "e1"})
	}
	if len(r.Holders) != schemas.MaxHolders || !r.HeldBy("w1", 100+schemas.MaxHolders+2) || r.HeldBy("w2", 118) || r.HeldBy("w1", 101) {
		t.Errorf("%+v", r.Holders)
	}
	if len(r.LastOps) != schemas.MaxLastOps || !r.Wrote("99") || r.Wrote("1") || r.Wrote("") || !r.Wrote("0") {
		t.Errorf("%v", r.LastOps)
	}
}

func TestHeaders(t *testing.T) {
	r := newRecord(schemas.OnLostFail)
	if h := r.Headers(); !reflect.DeepEqual(h, map[string][]string{"S": {"queued"}}) {
		t.Error(h)
	}
	if h := must(t, r, choose(t0)).Headers(); !reflect.DeepEqual(h, map[string][]string{"S": {"assigned"}, "H": {"w1 e1"}}) {
		t.Error(h)
	}
}

func TestTransitionError(t *testing.T) {
	r := must(t, newRecord(schemas.OnLostFail), schemas.AskCancel{Meta: meta(t0)})
	_, err := schemas.Next(r, choose(t0))
	var te *schemas.TransitionError
	if !errors.As(err, &te) || te.Event != "Choose" || te.From != schemas.Canceled || te.Task != taskID || !errors.Is(err, schemas.ErrFinal) {
		t.Errorf("%v", err)
	}
	if want := "task " + string(taskID) + ": Choose while canceled: the task is final"; err.Error() != want {
		t.Errorf("%q", err)
	}
}

func TestNewOrder(t *testing.T) {
	queued := newRecord(schemas.OnLostRequeue)
	queued.Extensions = 2
	assigned := must(t, queued, choose(t0))
	accepted := must(t, assigned, report(assigned, t0, schemas.Report{Phase: schemas.PhaseAccepted}))
	run := must(t, assigned, report(assigned, t0, schemas.Report{Phase: schemas.PhaseRunning, Ran: true, Restarts: 3}))
	canceled := must(t, run, schemas.AskCancel{Meta: meta(t0), Grace: schemas.Duration(3 * time.Second)})
	over := must(t, run, schemas.Lose{Meta: meta(t0), Worker: "w1", Epoch: "e1"})
	again := must(t, over, schemas.Choose{Meta: meta(t0), Worker: "w2", Epoch: "e2"})
	final := must(t, run, report(run, t0, schemas.Report{
		Phase: schemas.PhaseEnded, Ran: true, Restarts: 3, End: &schemas.End{By: schemas.EndedItself, Exit: &schemas.Exit{}},
	}))
	me := assigned.Assignment()
	other := func(change func(*schemas.Assignment)) schemas.Assignment { a := me; change(&a); return a }
	half, late := t0.Add(30*time.Minute), t0.Add(time.Hour)

	for name, c := range map[string]struct {
		r     schemas.Record
		about schemas.Assignment
		now   time.Time
		want  schemas.Order
	}{
		"assigned":                   {assigned, me, half, schemas.Order{Want: "run", TimeLeft: schemas.Duration(time.Hour), Extensions: 2}},
		"starting":                   {accepted, me, half, schemas.Order{Want: "run", TimeLeft: schemas.Duration(time.Hour), Extensions: 2}},
		"running":                    {run, me, half, schemas.Order{Want: "run", Counting: true, TimeLeft: schemas.Duration(30 * time.Minute), Extensions: 3, Restarts: 3}},
		"running, its last moment":   {run, me, late.Add(-1), schemas.Order{Want: "run", Counting: true, TimeLeft: 1, Extensions: 3, Restarts: 3}},
		"running, by a clock behind": {run, me, t0.Add(-time.Hour), schemas.Order{Want: "run", Counting: true, TimeLeft: schemas.Duration(time.Hour), Extensions: 3, Restarts: 3}},
		"its time is over":           {run, me, late, schemas.Order{Want: "stop", Expired: true, Grace: schemas.Duration(10 * time.Second), Extensions: 3, Restarts: 3}},
		"assigned after its time":    {again, again.Assignment(), late, schemas.Order{Want: "stop", Expired: true, Grace: schemas.Duration(10 * time.Second), Extensions: 3}},
		"canceled":                   {canceled, me, half, schemas.Order{Want: "stop", Grace: schemas.Duration(3 * time.Second), Extensions: 3, Restarts: 3}},
		"canceled and over":          {canceled, me, late, schemas.Order{Want: "stop", Grace: schemas.Duration(3 * time.Second), Extensions: 3, Restarts: 3}},
		"final":                      {final, me, half, schemas.Order{Want: "close"}},
		"queued again":               {over, me, half, schemas.Order{Want: "close"}},
		"on another worker":          {again, me, half, schemas.Order{Want: "close"}},
		"the new one":                {again, again.Assignment(), half, schemas.Order{Want: "run", Counting: true, TimeLeft: schemas.Duration(30 * time.Minute), Extensions: 3}},
		"of an attempt to come":      {run, other(func(a *schemas.Assignment) { a.Attempt++ }), half, schemas.Order{Want: "close"}},
		"of another registration":    {run, other(func(a *schemas.Assignment) { a.Epoch = "e0" }), half, schemas.Order{Want: "close"}},
		"of another worker":          {run, other(func(a *schemas.Assignment) { a.Worker = "w0" }), half, schemas.Order{Want: "close"}},
		"of another task":            {run, other(func(a *schemas.Assignment) { a.Task = "t-x" }), half, schemas.Order{Want: "close"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := schemas.NewOrder(c.r, 42, c.about, c.now)
			want := c.want
			want.Assignment, want.Revision = c.about, 42
			if want.Want == schemas.WantRun {
				want.Spec = &c.r.Spec
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %s\nwant %s", encode(t, got), encode(t, want))
			}
		})
	}
}

// A task that every worker gives back still ends by its queue timeout.
func TestGiveBacksDoNotProlongTheQueueTimeout(t *testing.T) {
	r := newRecord(schemas.OnLostRequeue)
	at := t0
	for range 5 {
		at = at.Add(time.Minute)
		r = must(t, r, schemas.Choose{Meta: meta(at), Worker: "w1", Epoch: "e1"})
		r = must(t, r, ended(r, at, false, schemas.End{By: schemas.EndedGaveBack}))
	}
	if !r.SweepAt().Equal(t0.Add(r.Spec.Timeouts.Queue.Std())) {
		t.Errorf("swept at %s, accepted at %s", r.SweepAt(), t0)
	}
	r = must(t, r, schemas.Sweep{Meta: meta(r.SweepAt())})
	if r.State != schemas.Failed || r.Reason != schemas.ReasonQueueTimeout {
		t.Errorf("%s (%s)", r.State, r.Reason)
	}
}

// Every write knows which revision it replaces, so each entry gets the one that wrote
// it, also where writes between leave no entry.
func TestHistoryKnowsItsRevisions(t *testing.T) {
	on := func(revision uint64) schemas.Meta {
		m := meta(t0)
		m.On = revision
		return m
	}
	r := newRecord(schemas.OnLostRequeue)
	r = must(t, r, schemas.Choose{Meta: on(7), Worker: "w1", Epoch: "e1"})
	settle := func(revision uint64, phase schemas.Phase, progress string) {
		r = must(t, r, schemas.Settle{Meta: on(revision), Report: schemas.Report{Assignment: r.Assignment(), Phase: phase, Progress: progress}})
	}
	settle(9, schemas.PhaseAccepted, "pulling 1/2")
	settle(12, schemas.PhaseAccepted, "pulling 2/2") // no entry
	settle(15, schemas.PhaseRunning, "")
	var got []uint64
	for _, c := range r.Changes(20) {
		got = append(got, c.Revision)
	}
	if want := []uint64{7, 9, 12, 20}; !slices.Equal(got, want) {
		t.Errorf("revisions %v, want %v", got, want)
	}
	if last := r.History[len(r.History)-1]; last.Revision != 0 {
		t.Errorf("the newest entry has revision %d in the record itself", last.Revision)
	}
	for i := range uint64(schemas.MaxHistory) {
		r.State = schemas.Queued
		r = must(t, r, schemas.Choose{Meta: on(20 + i), Worker: "w1", Epoch: "e1"})
	}
	if first := r.Changes(99)[1].Revision; r.Forgotten == 0 || r.Forgotten >= first {
		t.Errorf("forgotten up to %d, the first that is kept is %d", r.Forgotten, first)
	}
}

// The image's port counts where the spec names none, is told once, and goes with every record after.
func TestTheImagesPort(t *testing.T) {
	settle := func(spec schemas.Spec, port int) schemas.Record {
		t.Helper()
		r := schemas.NewRecord("t-01jd0000000000000000000000", spec, schemas.DefaultPolicy(), schemas.Meta{At: t0, By: "gateway", Op: "a"})
		r, err := schemas.Next(r, schemas.Choose{Meta: schemas.Meta{At: t0, By: "placer", Op: "b"}, Worker: "w1", Epoch: "e1"})
		if err == nil {
			r, err = schemas.Next(r, schemas.Settle{Meta: schemas.Meta{At: t0, By: "reaper", Op: "c"}, Report: schemas.Report{Assignment: r.Assignment(), Phase: schemas.PhaseRunning, Ran: true, Port: port}})
		}
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	plain, named := schemas.DefaultSpec(), schemas.DefaultSpec()
	plain.Image, named.Image, named.Ports = "busybox", "busybox", []schemas.Port{{Name: "web", Port: 80, Protocol: schemas.ProtocolHTTP}}
	for name, c := range map[string]struct {
		spec   schemas.Spec
		port   int
		header string
	}{
		"none":                   {plain, 0, ""},
		"one":                    {plain, 8080, "default:8080:http"},
		"one that there is not":  {plain, 70000, ""},
		"the spec names another": {named, 8080, "web:80:http"},
	} {
		r := settle(c.spec, c.port)
		got := strings.Join(r.Headers()[schemas.HeaderPorts], "")
		if got != c.header {
			t.Errorf("%s: %q", name, got)
		}
	}
}
