package schemas_test

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"dayfly.dev/schemas"
)

// world is one task and everybody who may send an event about it: placers, gateways
// and reapers that act on what they last read, workers that hold attempts, and
// messages that come late, twice and out of order.
type world struct {
	r       schemas.Record
	now     time.Time
	old     []schemas.Record // former versions, which services may still act on
	sent    []schemas.Report // every report ever sent; any may come (again)
	holds   map[schemas.Assignment]*holding
	epochs  map[schemas.WorkerID]int
	taken   schemas.Event // the last event that changed the record
	reached map[[2]schemas.State]bool
	ops     int
}

// holding is what a worker truly does for an attempt.
type holding struct {
	phase    schemas.Phase
	restarts int
	started  time.Time
	last     schemas.Report
}

var workers = []schemas.WorkerID{"w1", "w2", "w3"}

func newWorld(t *rapid.T, reached map[[2]schemas.State]bool) *world {
	s := schemas.DefaultSpec()
	s.Image = "busybox"
	s.OnLost = rapid.SampledFrom([]schemas.OnLost{"requeue", "requeue", "fail", "wait"}).Draw(t, "on_lost")
	s.MaxAttempts = rapid.IntRange(1, 4).Draw(t, "max_attempts")
	s.TTL = schemas.Duration(rapid.IntRange(10, 120).Draw(t, "ttl")) * schemas.Duration(time.Second)
	p := schemas.DefaultPolicy()
	p.MaxTTL = schemas.Duration(rapid.IntRange(0, 300).Draw(t, "max_ttl")) * schemas.Duration(time.Second)
	reached[[2]schemas.State{"", schemas.Queued}] = true
	return &world{
		r: schemas.NewRecord(taskID, s, p, meta(t0)), now: t0,
		holds: map[schemas.Assignment]*holding{}, epochs: map[schemas.WorkerID]int{}, reached: reached,
	}
}

func (w *world) meta(t *rapid.T) schemas.Meta {
	w.ops++
	skew := time.Duration(rapid.IntRange(-1500, 1500).Draw(t, "skew")) * time.Millisecond // of the service's clock
	return schemas.Meta{At: w.now.Add(skew), By: "somebody", Op: fmt.Sprint("op", w.ops)}
}

func (w *world) epoch(id schemas.WorkerID) schemas.Epoch {
	return schemas.Epoch(fmt.Sprint("e", w.epochs[id]))
}

func (w *world) pick(t *rapid.T) schemas.WorkerID {
	return rapid.SampledFrom(workers).Draw(t, "worker")
}

// actions are what may happen next; rapid draws among them.
func (w *world) actions() map[string]func(*rapid.T) {
	return map[string]func(*rapid.T){
		"time passes": func(t *rapid.T) {
			w.now = w.now.Add(time.Duration(rapid.SampledFrom([]int{1, 100, 1_000, 3_000, 3_000, 20_000, 61_000, 700_000}).Draw(t, "ms")) * time.Millisecond)
		},
		"a placer chooses": func(t *rapid.T) {
			id := w.pick(t)
			w.next(t, schemas.Choose{Meta: w.meta(t), Worker: id, Epoch: w.epoch(id)})
			if a := w.r.Assignment(); w.r.State == schemas.Assigned && w.holds[a] == nil {
				w.holds[a] = &holding{}
			}
		},
		"a client cancels": func(t *rapid.T) {
			if rapid.IntRange(0, 9).Draw(t, "rarely") == 0 {
				w.next(t, schemas.AskCancel{Meta: w.meta(t), Grace: 5})
			}
		},
		"a client extends": func(t *rapid.T) {
			w.next(t, schemas.AskExtend{Meta: w.meta(t), TTL: schemas.Duration(rapid.IntRange(-1, 400).Draw(t, "ttl")) * schemas.Duration(time.Second)})
		},
		"a client restarts":      func(t *rapid.T) { w.next(t, schemas.AskRestart{Meta: w.meta(t)}) },
		"a worker goes on":       func(t *rapid.T) { w.work(t) },
		"a worker goes on twice": func(t *rapid.T) { w.work(t); w.work(t) },
		"a report comes": func(t *rapid.T) {
			if len(w.sent) > 0 {
				w.next(t, schemas.Settle{Meta: w.meta(t), Report: rapid.SampledFrom(w.sent).Draw(t, "report")})
			}
		},
		"the newest report comes": func(t *rapid.T) {
			if len(w.sent) > 0 {
				w.next(t, schemas.Settle{Meta: w.meta(t), Report: w.sent[len(w.sent)-1]})
			}
		},
		"a worker lies": func(t *rapid.T) {
			if rapid.IntRange(0, 3).Draw(t, "rarely") == 0 {
				w.next(t, schemas.Settle{Meta: w.meta(t), Report: w.lie(t)})
			}
		},
		"a worker is lost": func(t *rapid.T) {
			id := w.pick(t)
			e := schemas.Lose{Meta: w.meta(t), Worker: id, Epoch: w.epoch(id)}
			if rapid.IntRange(0, 2).Draw(t, "rarely") == 0 {
				w.epochs[id]++
				w.next(t, e)
			}
		},
		"a worker came back without it": func(t *rapid.T) {
			if a := w.r.Assignment(); rapid.IntRange(0, 3).Draw(t, "rarely") == 0 {
				w.next(t, schemas.Lose{Meta: w.meta(t), Worker: a.Worker, Epoch: a.Epoch, Gone: true})
			}
		},
		"a reaper sweeps": func(t *rapid.T) { w.next(t, schemas.Sweep{Meta: w.meta(t)}) },
		"somebody acts on an old record": func(t *rapid.T) { // its compare-and-set fails; Next must not mind
			if len(w.old) > 0 {
				m := w.meta(t)
				for _, e := range []schemas.Event{schemas.Choose{Meta: m, Worker: "w1", Epoch: "e"}, schemas.Sweep{Meta: m}, schemas.AskCancel{Meta: m}} {
					_, _ = next(t, rapid.SampledFrom(w.old).Draw(t, "old"), e)
				}
			}
		},
		"the same again": func(t *rapid.T) { w.again(t) },
	}
}

// work lets a worker take an attempt one step on, and send what is true now.
func (w *world) work(t *rapid.T) {
	if len(w.holds) == 0 {
		return
	}
	all := slices.SortedFunc(maps.Keys(w.holds), func(a, b schemas.Assignment) int { return a.Attempt - b.Attempt })
	a := rapid.SampledFrom(all).Draw(t, "attempt")
	if rapid.Bool().Draw(t, "the current one") {
		a = all[len(all)-1]
	}
	h := w.holds[a]
	rep := h.last
	rep.Assignment = a
	step := rapid.IntRange(0, 5).Draw(t, "step")
	switch {
	case h.phase == schemas.PhaseEnded: // it repeats its final report
	case h.phase == "" && step > 0:
		rep.Phase = schemas.PhaseAccepted
	case h.phase != schemas.PhaseRunning && step > 1:
		rep.Phase, rep.Ran, h.started = schemas.PhaseRunning, true, w.now
	case h.phase == schemas.PhaseRunning && step == 1:
		h.restarts++
	case h.phase == schemas.PhaseRunning && step < 4:
		rep.Applied = w.r.Extensions
	case h.phase != "" && step > 3 || h.phase == "":
		by := []schemas.EndedBy{schemas.EndedItself, schemas.EndedStop, schemas.EndedDeadline, schemas.EndedPermit, schemas.EndedLost, schemas.EndedGaveBack, schemas.EndedGaveBack, schemas.EndedGaveBack}
		if rep.Ran {
			by = by[:5]
		}
		rep.Phase, rep.End = schemas.PhaseEnded, &schemas.End{By: rapid.SampledFrom(by).Draw(t, "by"), Reason: schemas.ReasonExit, Message: "over"}
		if rep.Ran {
			rep.End.Exit = &schemas.Exit{Code: rapid.SampledFrom([]int{0, 7}).Draw(t, "code")}
		}
	}
	rep.Restarts = h.restarts
	if rep.Ran {
		rep.RanFor = schemas.Duration(w.now.Sub(h.started))
	}
	h.phase, h.last = rep.Phase, rep
	if rep.Phase != "" {
		w.sent = append(w.sent, rep)
	}
}

// lie is a report that no honest agent sends.
func (w *world) lie(t *rapid.T) schemas.Report {
	rep := schemas.Report{
		Assignment: w.r.Assignment(),
		Phase:      rapid.SampledFrom([]schemas.Phase{"", "accepted", "running", "ended", "dancing"}).Draw(t, "phase"),
		Restarts:   rapid.IntRange(-1, 3).Draw(t, "restarts"), Applied: rapid.IntRange(-9, 99).Draw(t, "applied"),
		RanFor: schemas.Duration(rapid.Int64().Draw(t, "ran_for")), Ran: rapid.Bool().Draw(t, "ran"),
		Progress: rapid.StringN(0, 600, -1).Draw(t, "progress"),
	}
	if rapid.IntRange(0, 2).Draw(t, "another") == 0 {
		rep.Attempt += rapid.IntRange(-1, 1).Draw(t, "attempt")
		rep.Worker, rep.Epoch = w.pick(t), w.epoch(rep.Worker)
	}
	if rep.Phase == schemas.PhaseEnded && rapid.IntRange(0, 3).Draw(t, "with end") == 0 {
		text := rapid.StringN(0, 2000, -1).Draw(t, "text")
		rep.End = &schemas.End{By: schemas.EndedBy(rapid.SampledFrom([]string{"gave_back", "stop", "aliens"}).Draw(t, "by")), Message: text, Stdout: text}
	} else if rep.Phase == schemas.PhaseEnded {
		rep.Phase = schemas.PhaseRunning
	}
	return rep
}

// again sends the last event that was taken a second time.
func (w *world) again(t *rapid.T) {
	if w.taken == nil {
		return
	}
	n, err := next(t, w.r, w.taken)
	switch w.taken.(type) {
	case schemas.Settle:
		if err == nil {
			t.Fatalf("the same report was taken twice: %+v", w.taken)
		}
	case schemas.Choose, schemas.AskExtend: // may be taken again: another try, more time
		return
	default:
		if err == nil && n.State != schemas.Canceled && n.State != schemas.Expired && n.State != schemas.Failed {
			t.Fatalf("%T was taken twice", w.taken)
		}
	}
}

// next asks Next and checks what holds for each call, whoever makes it.
func next(t *rapid.T, r schemas.Record, e schemas.Event) (schemas.Record, error) {
	// Slices get room behind their end, where an append in place would be seen.
	r.History, r.LastOps, r.Avoid, r.Holders = roomy(r.History), roomy(r.LastOps), roomy(r.Avoid), roomy(r.Holders)
	before, _ := schemas.Encode(r)
	history, ops, avoid, holders := whole(r.History), whole(r.LastOps), whole(r.Avoid), whole(r.Holders)
	settle, _ := e.(schemas.Settle)
	rep, _ := schemas.Encode(settle.Report)

	n, err := schemas.Next(r, e)

	after, _ := schemas.Encode(r)
	repAfter, _ := schemas.Encode(settle.Report)
	if string(before) != string(after) || string(rep) != string(repAfter) ||
		!reflect.DeepEqual(history, r.History[:cap(r.History)]) || !reflect.DeepEqual(ops, r.LastOps[:cap(r.LastOps)]) ||
		!reflect.DeepEqual(avoid, r.Avoid[:cap(r.Avoid)]) || !reflect.DeepEqual(holders, r.Holders[:cap(r.Holders)]) {
		t.Fatalf("%T changed its arguments", e)
	}
	text, encErr := schemas.Encode(n)
	if encErr != nil {
		t.Fatal(encErr)
	}
	if err != nil {
		if string(text) != string(before) {
			t.Fatalf("%T failed (%v) and changed the record", e, err)
		}
		if !errors.Is(err, schemas.ErrFinal) && !errors.Is(err, schemas.ErrStale) && !errors.Is(err, schemas.ErrUnchanged) &&
			!errors.Is(err, schemas.ErrTooLate) && !errors.Is(err, schemas.ErrLimit) && !errors.Is(err, schemas.ErrState) {
			t.Fatalf("%T: %v", e, err)
		}
		if r.State.Final() && !errors.Is(err, schemas.ErrFinal) {
			t.Fatalf("%T of a final task: %v", e, err)
		}
		return n, err
	}
	var back schemas.Record
	if err := schemas.Decode(text, &back); err != nil || !reflect.DeepEqual(n, back) {
		t.Fatalf("the record is not what JSON gives back (%v):\n%s", err, text)
	}
	if len(text) > schemas.MaxRecordBytes {
		t.Fatalf("the record takes %d bytes", len(text))
	}
	invariants(t, r, n, e)
	return n, nil
}

func roomy[T any](s []T) []T {
	if s == nil {
		return nil
	}
	return append(make([]T, 0, len(s)+8), s...)
}

func whole[T any](s []T) []T { return slices.Clone(s[:cap(s)]) }

// invariants compares the record before and after a change.
func invariants(t *rapid.T, r, n schemas.Record, e schemas.Event) {
	must := func(ok bool, what string, args ...any) {
		if !ok {
			t.Fatalf("%T: "+what+"\nbefore %+v\nafter  %+v", append(append([]any{e}, args...), r, n)...)
		}
	}
	if settle, ok := e.(schemas.Settle); ok {
		rep := settle.Report
		must(r.State.Held() && rep.Assignment == r.Assignment() && rep.Restarts >= r.Restarts, "a stale report was taken")
		must(slices.Contains([]schemas.Phase{"accepted", "running", "ended"}, rep.Phase), "an unknown phase was taken")
	}
	if lose, ok := e.(schemas.Lose); ok {
		must(r.State.Held() && r.Worker == lose.Worker && r.Epoch == lose.Epoch, "a task of another registration was lost")
	}
	_, chosen := e.(schemas.Choose)
	must(!r.State.Final(), "a final record changed")
	must(n.Attempt == r.Attempt || chosen && n.Attempt == r.Attempt+1, "attempt")
	must(chosen == (n.Attempt > r.Attempt), "only a choice makes an attempt")
	if n.State != r.State {
		must(slices.ContainsFunc(schemas.Table(), func(row schemas.Transition) bool { return row.From == r.State && row.To == n.State }),
			"%s to %s is not in the table", r.State, n.State)
	}
	if n.Attempt == r.Attempt && r.State.Held() && n.State.Held() {
		order := schemas.States()
		must(n.Restarts >= r.Restarts, "restarts")
		must(slices.Index(order, n.State) >= slices.Index(order, r.State), "the phase went back")
	}
	must(n.Tries <= n.Spec.MaxAttempts && n.Tries <= n.Attempt && n.Tries >= 0, "tries")
	must(n.State != schemas.Queued || n.Tries < n.Spec.MaxAttempts, "queued without a try left")
	must(len(n.History) <= schemas.MaxHistory && len(n.LastOps) <= schemas.MaxLastOps && len(n.Holders) <= schemas.MaxHolders && len(n.Avoid) <= schemas.MaxHolders, "bounds")
	must(n.RestartTo == r.RestartTo || n.RestartTo == r.Restarts+1 && n.State == schemas.Running || n.State == schemas.Queued, "restart_to")
	must(n.Applied <= n.Extensions && n.Extensions >= r.Extensions && n.Applied >= 0, "extensions")
	must(n.RunningAt.IsZero() == n.ExpiresAt.IsZero(), "a deadline without a start")
	if !r.ExpiresAt.IsZero() {
		_, extended := e.(schemas.AskExtend)
		must(n.RunningAt.Equal(r.RunningAt), "the start moved")
		must(n.ExpiresAt.Equal(r.ExpiresAt) || extended && n.ExpiresAt.After(r.ExpiresAt), "the deadline moved")
		must(n.ExpiresAt.Equal(r.ExpiresAt) || n.Extensions == r.Extensions+1, "extensions are not counted")
	}
	must(n.ExpiresAt.IsZero() || !n.ExpiresAt.After(n.RunningAt.Add(n.MaxTTL.Std())), "beyond the longest lifetime")
	must(n.TTL >= r.TTL && n.TTL <= n.MaxTTL, "ttl")
	must(r.Cancel == nil || reflect.DeepEqual(r.Cancel, n.Cancel), "the cancel mark changed")
	must(r.Cancel == nil || n.State != schemas.Queued, "a canceled task was queued again")
	must(n.State != schemas.Queued || n.Restarts == 0 && n.RestartTo == 0 && n.Progress == "" && n.WorkerLostAt.IsZero() && n.Exit == nil, "queued with rests")
	must(n.State.Held() == (n.Worker != "" && n.Epoch != "") || n.State.Final(), "holder")
	must(!n.State.Held() || n.HeldBy(n.Worker, n.Attempt), "holders")
	must(n.State.Final() == !n.EndedAt.IsZero(), "ended_at")
	must(n.Spec.Image == r.Spec.Image && n.ID == r.ID && n.AcceptedAt.Equal(r.AcceptedAt), "identity")
	must(n.Wrote(op(e)), "the op is not in last_ops")
	if n.State != r.State {
		last := n.History[len(n.History)-1]
		must(last.State == n.State && last.Attempt == n.Attempt, "the history does not tell")
		must(n.State != schemas.Failed && n.State != schemas.Canceled && n.State != schemas.Expired || n.Reason != "", "no reason")
	}
}

func (w *world) next(t *rapid.T, e schemas.Event) {
	n, err := next(t, w.r, e)
	if err != nil {
		return
	}
	w.reached[[2]schemas.State{w.r.State, n.State}] = true
	w.old = append(w.old, w.r)
	if len(w.old) > 8 {
		w.old = w.old[1:]
	}
	w.r, w.taken = n, e
	w.again(t)
}

func TestNextUnderRandomEvents(t *testing.T) {
	reached := map[[2]schemas.State]bool{}
	rapid.Check(t, func(t *rapid.T) {
		for range 10 {
			t.Repeat(newWorld(t, reached).actions())
		}
	})
	// Which rows a run reaches is luck, and TestDecisionOrder and TestTableRows reach
	// them all; but a model that reaches few tests little.
	if len(reached) < len(schemas.Table())/2 {
		t.Errorf("only %d changes of state were reached: %v", len(reached), reached)
	}
}

// However the reports of one attempt arrive, the task ends the same, once the last of
// them has come.
func TestReportsFoldInAnyOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRecord(rapid.SampledFrom([]schemas.OnLost{"requeue", "fail", "wait"}).Draw(t, "on_lost"))
		r.Spec.MaxAttempts = rapid.IntRange(1, 2).Draw(t, "max_attempts")
		r.Extensions = 3
		r, err := schemas.Next(r, choose(t0))
		if err != nil {
			t.Fatal(err)
		}
		r.Applied = 0
		if rapid.Bool().Draw(t, "canceled") {
			r, _ = schemas.Next(r, schemas.AskCancel{Meta: meta(t0)})
		}
		rep := schemas.Report{Assignment: r.Assignment(), Phase: schemas.PhaseAccepted}
		reports := []schemas.Report{rep}
		by := []schemas.EndedBy{"itself", "stop", "deadline", "permit", "lost", "gave_back"}
		if rapid.Bool().Draw(t, "runs") {
			by = by[:5]
			rep.Phase, rep.Ran = schemas.PhaseRunning, true
			for rep.Restarts = 0; rep.Restarts < rapid.IntRange(0, 3).Draw(t, "restarts"); rep.Restarts++ {
				reports = append(reports, rep)
			}
			reports = append(reports, rep)
			rep.Applied = 2
			reports = append(reports, rep)
			rep.Ready = true
			reports = append(reports, rep)
		}
		rep.Phase, rep.End = schemas.PhaseEnded, &schemas.End{By: rapid.SampledFrom(by).Draw(t, "by"), Message: "m", Stdout: "out"}
		if rep.Ran {
			rep.End.Exit = &schemas.Exit{Code: rapid.IntRange(0, 1).Draw(t, "code")}
		}
		reports = append(reports, rep)

		fold := func(r schemas.Record, reports []schemas.Report) schemas.Record {
			for _, rep := range reports {
				n, err := next(t, r, schemas.Settle{Meta: schemas.Meta{At: t0.Add(time.Second), By: "reaper", Op: "op"}, Report: rep})
				if err == nil {
					r = n
				}
				if _, err := next(t, r, schemas.Settle{Meta: meta(t0), Report: rep}); err == nil {
					t.Fatalf("taken twice: %+v", rep)
				}
			}
			// How it came there may differ, and how much was shown on the way.
			r.History, r.LastOps, r.StartingAt, r.ReadyAt, r.Applied, r.Extensions = nil, nil, time.Time{}, time.Time{}, 0, 0
			return r
		}
		want := fold(r, reports)
		shuffled := append(slices.Clone(reports), rapid.SliceOf(rapid.SampledFrom(reports)).Draw(t, "twice")...)
		shuffled = rapid.Permutation(shuffled).Draw(t, "order")
		got := fold(r, shuffled)
		if want.State.Held() {
			t.Fatalf("still %s", want.State)
		}
		if !reflect.DeepEqual(got, want) {
			a, _ := schemas.Encode(want)
			b, _ := schemas.Encode(got)
			t.Fatalf("in order  %s\nshuffled  %s", a, b)
		}
	})
}

// op is the id of the event's write.
func op(e schemas.Event) string {
	return reflect.ValueOf(e).FieldByName("Meta").Interface().(schemas.Meta).Op
}
