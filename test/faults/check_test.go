package faults

import (
	"bytes"
	"slices"
	"strconv"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// story makes a history by hand: a task that sleeps for 5 s, accepted at second 1,
// assigned to w1 at 2, run from 3, completed at 8. Seconds are of the history.
type story struct {
	epoch  time.Time
	task   schemas.TaskID
	rec    schemas.Record
	rev    uint64
	events []Event
}

func at(seconds float64) time.Duration { return time.Duration(seconds * float64(time.Second)) }

func newStory(change func(*schemas.Spec)) *story {
	s := &story{epoch: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), task: "t-01jd0000000000000000000000"}
	s.add(0, Event{Run: &Run{Epoch: s.epoch, Fence: at(10), Lease: at(4)}})
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command, spec.OnLost = "any", []string{"sleep", "5s"}, schemas.OnLostRequeue
	spec.TTL, spec.Labels = schemas.Duration(at(20)), map[string]string{"key": "k"}
	if change != nil {
		change(&spec)
	}
	s.rec = schemas.NewRecord(s.task, spec, schemas.Policy{MaxTTL: schemas.Duration(time.Hour)}, s.meta(1, "gateway"))
	s.write(1)
	s.op(1.1, Op{Name: "create", Key: "k"})
	return s
}

func (s *story) meta(t float64, by string) schemas.Meta {
	return schemas.Meta{At: s.epoch.Add(at(t)), By: by}
}

func (s *story) add(t float64, e Event) { e.T = at(t); s.events = append(s.events, e) }

// write tells the observer of the record as it is.
func (s *story) write(t float64) {
	s.rev++
	r := s.rec
	r.History = slices.Clone(r.History)
	s.add(t, Event{Rev: &Rev{Task: s.task, Revision: s.rev, Record: &r}})
}

// op is an operation that took 0.1 s and was answered with the record as it is.
func (s *story) op(t float64, op Op) {
	op.Began = at(t - 0.1)
	if op.Outcome == "" {
		op.Outcome = OK
	}
	if op.Outcome == OK {
		op.Task = s.task
		op.Seen = &Seen{State: s.rec.State, Attempt: s.rec.Attempt, Revision: s.rev, ExpiresAt: s.rec.ExpiresAt}
	}
	s.add(t, Event{Op: &op})
}

func (s *story) next(t float64, e schemas.Event) {
	r, err := schemas.Next(s.rec, e)
	if err != nil {
		panic(err)
	}
	s.rec = r
	s.write(t)
}

func (s *story) assign(t float64, w schemas.WorkerID) {
	s.next(t, schemas.Choose{Meta: s.meta(t, "placer"), Worker: w, Epoch: "e"})
}

func (s *story) start(t float64) {
	s.add(t, Event{Life: &Life{Do: "start", Assignment: s.rec.Assignment()}})
	s.next(t+0.1, schemas.Settle{Meta: s.meta(t+0.1, "reaper"), Report: schemas.Report{Assignment: s.rec.Assignment(), Phase: schemas.PhaseRunning, Ran: true, RanFor: schemas.Duration(at(0.1))}})
}

func (s *story) die(t float64, by schemas.EndedBy, code int) {
	s.add(t, Event{Life: &Life{Do: "end", Assignment: s.rec.Assignment(), By: by, Code: code}})
}

func (s *story) end(t float64, by schemas.EndedBy, code int) {
	s.next(t, schemas.Settle{Meta: s.meta(t, "reaper"), Report: schemas.Report{Assignment: s.rec.Assignment(), Phase: schemas.PhaseEnded, Ran: true,
		End: &schemas.End{By: by, Exit: &schemas.Exit{Code: code}}}})
}

func (s *story) lose(t float64) {
	s.next(t, schemas.Lose{Meta: s.meta(t, "reaper"), Worker: s.rec.Worker, Epoch: s.rec.Epoch})
}

func (s *story) fault(t float64) {
	s.add(t, Event{Fault: &Fault{Kind: "kill -9", Target: "w1", Until: at(t + 1), Effect: "killed"}})
}

func (s *story) healed(t float64) { s.add(t, Event{Healed: &Healed{Within: at(20)}}) }

// running is a story up to a running task, which is well till then.
func running(change func(*schemas.Spec)) *story {
	s := newStory(change)
	s.assign(2, "w1")
	s.start(3)
	return s
}

func whole() *story {
	s := running(nil)
	s.die(8, schemas.EndedItself, 0)
	s.end(8.1, schemas.EndedItself, 0)
	return s
}

// logged is a story of a task that writes n bytes, of what its record says of that, and
// of what was read.
func logged(n int, sum schemas.LogSum, read Log) *story {
	s := running(func(s *schemas.Spec) { s.Command = []string{"log", strconv.Itoa(n), "5s"} })
	s.die(8, schemas.EndedItself, 0)
	s.next(8.1, schemas.Settle{Meta: s.meta(8.1, "reaper"), Report: schemas.Report{Assignment: s.rec.Assignment(), Phase: schemas.PhaseEnded, Ran: true,
		End: &schemas.End{By: schemas.EndedItself, Exit: &schemas.Exit{}, Logs: sum}}})
	read.Task = s.task
	s.add(9, Event{Log: &read})
	return s
}

func TestGoodHistories(t *testing.T) {
	again := running(nil)
	again.fault(4)
	again.die(6, schemas.EndedPermit, 137)
	again.lose(14)
	again.assign(14.1, "w2")
	again.start(14.2)
	again.die(19.2, schemas.EndedItself, 0)
	again.end(19.3, schemas.EndedItself, 0)
	again.healed(20)

	canceled := running(nil)
	canceled.next(4, schemas.AskCancel{Meta: canceled.meta(4, "gateway")})
	canceled.op(4.1, Op{Name: "cancel"})
	canceled.die(4.2, schemas.EndedStop, 143)
	canceled.end(4.3, schemas.EndedStop, 143)

	extended := running(func(s *schemas.Spec) { s.Command = []string{"sleep"} })
	extended.next(10, schemas.AskExtend{Meta: extended.meta(10, "gateway"), TTL: schemas.Duration(at(20))})
	extended.op(10.1, Op{Name: "extend", Status: 200, TTL: at(20)})
	extended.die(30, schemas.EndedDeadline, 143)
	extended.end(30.1, schemas.EndedDeadline, 143)

	// A reaper whose clock is ahead takes the task's time for over.
	ahead := running(nil)
	ahead.add(4, Event{Fault: &Fault{Kind: ClockOff + " +1h", Target: "reaper1", Until: at(9), Effect: "off"}})
	ahead.die(5, schemas.EndedDeadline, 143)
	ahead.end(5.1, schemas.EndedDeadline, 143)

	refused := newStory(func(s *schemas.Spec) {
		s.Command, s.Timeouts.Queue = []string{"refuse"}, schemas.Duration(at(5))
	})
	refused.assign(2, "w1")
	refused.next(2.1, schemas.Settle{Meta: refused.meta(2.1, "reaper"), Report: schemas.Report{Assignment: refused.rec.Assignment(), Phase: schemas.PhaseEnded,
		End: &schemas.End{By: schemas.EndedGaveBack}}})
	refused.next(6, schemas.Sweep{Meta: refused.meta(6, "reaper")})

	idle := running(nil) // a start that was broken off, and done by dockerd when all was over
	idle.die(4, schemas.EndedPermit, 137)
	idle.fault(3.5)
	idle.lose(5)
	idle.next(6, schemas.AskCancel{Meta: idle.meta(6, "gateway")})
	idle.op(6.1, Op{Name: "cancel"})
	late := Life{Do: "start", Assignment: schemas.Assignment{Task: idle.task, Attempt: 2, Worker: "w2"}, Idle: true}
	idle.add(7, Event{Life: &late})

	seen := running(nil) // a real container
	seen.die(7.9, "", 0)
	seen.end(8.1, schemas.EndedItself, 0)

	shown := newStory(func(s *schemas.Spec) { s.Command, s.TTL = []string{"sleep", "1h"}, schemas.Duration(at(9)) })
	shown.assign(2, "w1") // its report of the start comes 5 s late
	shown.add(3, Event{Life: &Life{Do: "start", Assignment: shown.rec.Assignment()}})
	shown.next(8, schemas.Settle{Meta: shown.meta(8, "reaper"), Report: schemas.Report{Assignment: shown.rec.Assignment(), Phase: schemas.PhaseRunning, Ran: true}})
	shown.die(12, "", 0)
	shown.end(12.1, schemas.EndedDeadline, 143)

	unknown := newStory(func(s *schemas.Spec) { s.OnLost = schemas.OnLostWait })
	unknown.assign(2, "w1") // whose worker is not heard of again
	unknown.lose(14)
	unknown.next(3600, schemas.Sweep{Meta: unknown.meta(3600, "reaper")})

	for name, s := range map[string]*story{
		"whole": whole(), "again": again, "canceled": canceled, "extended": extended, "seen": seen, "idle": idle, "shown": shown,
		"unknown": unknown, "ahead": ahead, "refused": refused,
		"log":         logged(100, schemas.LogSum{StdoutBytes: 100}, Log{Bytes: 100, Good: 100}),
		"limited log": logged(100, schemas.LogSum{StdoutBytes: 60, Dropped: 40, Truncated: true, Why: schemas.LogsLimit}, Log{Bytes: 60, Good: 60}),
	} {
		if r := Check(s.events); len(r.Violations) > 0 {
			t.Errorf("%s: %v", name, r.Violations)
		}
	}
	if r := Check(idle.events); r.IdleLeft != 1 {
		t.Errorf("%d idle inits are left", r.IdleLeft)
	}
	r := Check(again.events)
	if r.Requeues["worker_lost, ended by permit"] != 1 || r.Attempts[2] != 1 || r.Accepted != 1 {
		t.Errorf("%+v", r)
	}
}

func TestRead(t *testing.T) {
	var b bytes.Buffer
	rec := NewRecorder(&b)
	for _, e := range whole().events {
		rec.Add(e.T, e)
	}
	h, err := Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	if r := Check(h); len(r.Violations) > 0 || r.Finals["completed exit"] != 1 {
		t.Errorf("%+v", r)
	}
}

// Each rule is broken by a history of its own, and named.
func TestBrokenHistories(t *testing.T) {
	for name, c := range map[string]struct {
		want Rule
		tell func() *story
	}{
		"no record": {Lost, func() *story {
			s := whole()
			s.events = slices.DeleteFunc(s.events, func(e Event) bool { return e.Rev != nil || e.Life != nil })
			return s
		}},
		"deleted": {Lost, func() *story {
			s := whole()
			s.add(9, Event{Rev: &Rev{Task: s.task, Revision: 99, Deleted: true}})
			return s
		}},
		"unknown to a gateway": {Lost, func() *story {
			s := whole()
			s.add(9, Event{Op: &Op{Name: "get", Task: s.task, Began: at(8.9), Outcome: Failed, Status: 404}})
			return s
		}},
		"never final": {Stuck, func() *story { s := running(nil); s.die(8, schemas.EndedItself, 0); return s }},
		"late": {Stuck, func() *story {
			s := running(nil)
			s.die(8, schemas.EndedItself, 0)
			s.healed(9)
			s.end(40, schemas.EndedItself, 0)
			return s
		}},
		"a step that is not in the table": {IllegalStep, func() *story {
			s := newStory(nil)
			s.rec.State = schemas.Running
			s.rec.History = append(s.rec.History, schemas.Change{State: schemas.Running, By: "agent"})
			s.write(2)
			return s
		}},
		"an attempt skipped": {IllegalStep, func() *story {
			s := newStory(nil)
			s.rec.Attempt++
			s.assign(2, "w1")
			return s
		}},
		"a write overwritten": {IllegalStep, func() *story {
			s := newStory(nil)
			before := s.rec
			s.assign(2, "w1")
			s.rec = before
			s.assign(2.1, "w2")
			return s
		}},
		"final written again": {FinalChanged, func() *story {
			s := whole()
			s.rec.State = schemas.Canceled
			s.write(9)
			return s
		}},
		"answered as final": {FinalChanged, func() *story {
			s := running(nil)
			s.add(4, Event{Op: &Op{Name: "get", Task: s.task, Began: at(3.9), Outcome: OK, Seen: &Seen{State: schemas.Failed, Revision: s.rev}}})
			s.die(8, schemas.EndedItself, 0)
			s.end(8.1, schemas.EndedItself, 0)
			return s
		}},
		"no compare-and-set": {Unguarded, func() *story { s := whole(); s.add(5, Event{Write: &Write{Task: s.task}}); return s }},
		"two at once": {Overlap, func() *story {
			s := running(nil)
			s.fault(4)
			first := s.rec.Assignment()
			s.lose(5)
			s.assign(5.1, "w2")
			s.start(5.2)
			s.add(6, Event{Life: &Life{Do: "end", Assignment: first, By: schemas.EndedPermit}})
			s.die(10.2, schemas.EndedItself, 0)
			s.end(10.3, schemas.EndedItself, 0)
			return s
		}},
		"one attempt twice": {StartedTwice, func() *story {
			s := whole()
			s.add(3.5, Event{Life: &Life{Do: "start", Assignment: s.rec.Assignment()}})
			return s
		}},
		"started after final": {AfterFinal, func() *story {
			s := whole()
			a := s.rec.Assignment()
			a.Worker = "w2"
			s.add(9, Event{Life: &Life{Do: "start", Assignment: a}})
			s.add(10, Event{Life: &Life{Do: "end", Assignment: a, By: schemas.EndedStop}})
			return s
		}},
		"alive when final": {AfterFinal, func() *story {
			s := running(nil)
			s.end(8.1, schemas.EndedItself, 0)
			s.die(9, schemas.EndedItself, 0)
			return s
		}},
		"left running": {Orphan, func() *story { s := running(nil); s.end(8.1, schemas.EndedItself, 0); return s }},
		"completed, but it fails": {WrongEnd, func() *story {
			s := running(func(s *schemas.Spec) { s.Command = []string{"sleep", "5s", "3"} })
			s.die(8, schemas.EndedItself, 3)
			s.end(8.1, schemas.EndedItself, 0)
			return s
		}},
		"completed, but killed": {WrongEnd, func() *story {
			s := running(nil)
			s.die(8, schemas.EndedPermit, 137)
			s.end(8.1, schemas.EndedItself, 0)
			return s
		}},
		"completed, but seen for too short": {WrongEnd, func() *story {
			s := running(nil)
			s.die(5, "", 0)
			s.end(8.1, schemas.EndedItself, 0)
			return s
		}},
		"completed, but a real one never ends": {WrongEnd, func() *story {
			s := running(func(s *schemas.Spec) { s.Command = []string{"term-exit", "0"} })
			s.die(8, "", 0)
			s.end(8.1, schemas.EndedItself, 0)
			return s
		}},
		"completed, but its log is short": {WrongEnd, func() *story {
			s := running(func(s *schemas.Spec) { s.Command = []string{"log", "20000", "5s"} })
			s.die(8, schemas.EndedItself, 0)
			s.end(8.1, schemas.EndedItself, 0)
			return s
		}},
		"canceled by nobody": {WrongEnd, func() *story {
			s := running(nil)
			s.next(4, schemas.AskCancel{Meta: s.meta(4, "gateway")})
			s.die(4.2, schemas.EndedStop, 143)
			s.end(4.3, schemas.EndedStop, 143)
			return s
		}},
		"expired too soon": {WrongEnd, func() *story {
			s := running(nil)
			s.die(6, schemas.EndedDeadline, 143)
			s.end(6.1, schemas.EndedDeadline, 143)
			return s
		}},
		"lost with attempts left": {WrongEnd, func() *story {
			s := running(nil)
			s.fault(3.5)
			s.die(6, schemas.EndedPermit, 137)
			s.rec.Tries = 99
			s.lose(14)
			s.rec.Tries = 1
			s.write(14.1)
			return s
		}},
		"lost without a fault": {WrongEnd, func() *story {
			s := running(func(s *schemas.Spec) { s.OnLost = schemas.OnLostFail })
			s.die(6, schemas.EndedPermit, 137)
			s.lose(14)
			return s
		}},
		"one key, two tasks": {Doubled, func() *story {
			s := whole()
			s.events = append(s.events, Event{T: at(1.2), Op: &Op{Name: "create", Key: "k", Outcome: OK, Task: "t-01jd0000000000000000000001"}})
			return s
		}},
		"refused and made": {RefusedMade, func() *story {
			s := whole()
			for i, e := range s.events {
				if e.Op != nil {
					s.events[i].Op = &Op{Name: "create", Key: "k", Outcome: Failed, Status: 503}
				}
			}
			return s
		}},
		"canceled, yet tried again": {CancelIgnored, func() *story {
			s := running(nil)
			s.fault(3.5)
			s.op(4, Op{Name: "cancel"})
			s.die(6, schemas.EndedPermit, 137)
			s.lose(14)
			s.assign(14.1, "w2")
			s.start(14.2)
			s.die(19.2, schemas.EndedItself, 0)
			s.end(19.3, schemas.EndedItself, 0)
			return s
		}},
		"the record shows the new deadline, yet ended": {ExtendLost, func() *story {
			s := running(func(s *schemas.Spec) { s.Command = []string{"sleep"} })
			s.next(10, schemas.AskExtend{Meta: s.meta(10, "gateway"), TTL: schemas.Duration(at(20))})
			s.next(10.2, schemas.Settle{Meta: s.meta(10.2, "reaper"), Report: schemas.Report{Assignment: s.rec.Assignment(), Phase: schemas.PhaseRunning, Ran: true, Applied: 1}})
			s.die(23, schemas.EndedDeadline, 143)
			s.end(30.1, schemas.EndedDeadline, 143)
			return s
		}},
		"extended, yet ended": {ExtendLost, func() *story {
			s := running(func(s *schemas.Spec) { s.Command = []string{"sleep"} })
			s.next(10, schemas.AskExtend{Meta: s.meta(10, "gateway"), TTL: schemas.Duration(at(20))})
			s.op(10.1, Op{Name: "extend", Status: 200, TTL: at(20)})
			s.die(23, schemas.EndedDeadline, 143)
			s.end(30.1, schemas.EndedDeadline, 143)
			return s
		}},
		"expired too soon, an agent's clock off": {WrongEnd, func() *story {
			s := running(nil)
			s.add(4, Event{Fault: &Fault{Kind: ClockOff + " +1h", Target: "agent-w1", Until: at(9), Effect: "off"}})
			s.die(6, schemas.EndedDeadline, 143)
			s.end(6.1, schemas.EndedDeadline, 143)
			return s
		}},
		"the end of a log missing": {LogLost, func() *story {
			return logged(100, schemas.LogSum{StdoutBytes: 100}, Log{Bytes: 64, Good: 64})
		}},
		"a hole in a log": {LogLost, func() *story {
			return logged(100, schemas.LogSum{StdoutBytes: 100}, Log{Bytes: 100, Good: 64})
		}},
		"a disk that was full though none was": {LogLost, func() *story {
			return logged(100, schemas.LogSum{StdoutBytes: 60, Dropped: 40, Truncated: true, Why: schemas.LogsDiskFull}, Log{Bytes: 60, Good: 60})
		}},
		"a log cut short for no reason": {LogLost, func() *story {
			return logged(100, schemas.LogSum{Truncated: true, Why: "worker_lost"}, Log{})
		}},
		"an older answer": {StaleRead, func() *story {
			s := whole()
			s.op(9, Op{Name: "get"})
			s.add(10, Event{Op: &Op{Name: "get", Task: s.task, Began: at(9.9), Outcome: OK, Seen: &Seen{State: schemas.Queued, Revision: 1}}})
			return s
		}},
	} {
		r := Check(c.tell().events)
		if r.Count(c.want) == 0 {
			t.Errorf("%s: want %q, got %v", name, c.want, r.Violations)
		}
	}
}
