package agent_test

import (
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// runSpec orders a task whose spec was changed.
func (b *bench) runSpec(a schemas.Assignment, change func(*schemas.Spec), command ...string) {
	b.t.Helper()
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command, spec.OnLost = "fake", command, schemas.OnLostRequeue
	change(&spec)
	b.order(schemas.Order{Assignment: a, Want: schemas.WantRun, Spec: &spec, TimeLeft: spec.TTL})
}

func again(s *schemas.Spec, policy schemas.RestartPolicy, most int) {
	s.Restart = &schemas.Restart{Policy: policy, Max: most, Backoff: schemas.Duration(100 * time.Millisecond)}
}

// check is a health check of which two failures are too many.
func check(h schemas.Health) *schemas.Health {
	h.Interval, h.Timeout, h.Retries = schemas.Duration(100*time.Millisecond), schemas.Duration(5*time.Second), 2
	return &h
}

func httpCheck(path string) *schemas.Health {
	return check(schemas.Health{HTTP: &schemas.HTTPCheck{Port: 80, Path: path}})
}

func TestRestartsAreReported(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.runSpec(a, func(s *schemas.Spec) { again(s, schemas.RestartOnFailure, 0) }, "flaky", "2", "9", "1h")
	r := b.report(a, func(r schemas.Report) bool { return r.Restarts == 2 })
	if r.Phase != schemas.PhaseRunning || r.Last == nil || r.Last.Code != 9 {
		t.Errorf("report %+v, last %+v", r, r.Last)
	}
	b.order(schemas.Order{Assignment: a, Want: schemas.WantStop})
	if r := b.end(a); r.Restarts != 2 || r.End.By != schemas.EndedStop {
		t.Errorf("report %+v, end %+v", r, r.End)
	}
}

// An end is never reported with fewer restarts than the record has.
func TestAnEndHasTheRestartsOfTheRecord(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "exit", "0")
	b.end(a)
	b.order(schemas.Order{Assignment: a, Want: schemas.WantClose})
	b.until("removed", func() bool { return b.rt.Live() == 0 })
	b.order(schemas.Order{Assignment: a, Want: schemas.WantStop, Restarts: 3})
	b.report(a, func(r schemas.Report) bool { return r.Phase == schemas.PhaseEnded && r.Restarts == 3 })
}

func TestChecks(t *testing.T) {
	const never schemas.RestartPolicy = ""
	for name, c := range map[string]struct {
		health  *schemas.Health
		policy  schemas.RestartPolicy
		command []string
		ready   bool
		why     string // it ends unhealthy for that
	}{
		"http passes":               {httpCheck("/"), never, []string{"http", "80"}, true, ""},
		"a redirect passes":         {httpCheck("/status/302"), never, []string{"http", "80"}, true, ""},
		"tcp passes":                {check(schemas.Health{TCP: &schemas.TCPCheck{Port: 80}}), never, []string{"tcp", "80"}, true, ""},
		"exec passes":               {check(schemas.Health{Exec: []string{"exit", "0"}}), never, []string{"sleep", "1h"}, true, ""},
		"http answers 500":          {httpCheck("/status/500"), never, []string{"http", "80"}, false, "GET /status/500: 500"},
		"http answers something":    {httpCheck("/"), never, []string{"tcp", "80"}, false, "read the answer"},
		"nobody listens":            {check(schemas.Health{TCP: &schemas.TCPCheck{Port: 81}}), never, []string{"tcp", "80"}, false, "refused"},
		"exec fails":                {check(schemas.Health{Exec: []string{"exit", "7"}}), never, []string{"sleep", "1h"}, false, "exit code 7"},
		"an exec that is not there": {check(schemas.Health{Exec: []string{"/nowhere"}}), never, []string{"sleep", "1h"}, false, "exit code 127"},
		"first healthy, then not":   {httpCheck("/until/2s"), never, []string{"http", "80"}, true, "500"},
		"restarts are used up":      {httpCheck("/status/500"), schemas.RestartAlways, []string{"http", "80"}, false, "500"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.start()
			a := assignment(b.registered("").Epoch, 1)
			b.runSpec(a, func(s *schemas.Spec) {
				s.Health = c.health
				if c.policy != never {
					again(s, c.policy, 1)
				}
			}, c.command...)
			if c.ready {
				b.report(a, func(r schemas.Report) bool { return running(r) && r.Ready && r.Ran })
			}
			if c.why == "" {
				return
			}
			r := b.end(a)
			if r.End.By != schemas.EndedItself || r.End.Reason != schemas.ReasonUnhealthy || !strings.Contains(r.End.Message, c.why) {
				t.Errorf("end %+v", r.End)
			}
			if c.policy != never && r.Restarts != 1 {
				t.Errorf("%d restarts", r.Restarts)
			}
		})
	}
}

// A run that was started anew has to become ready again, and is checked by the agent
// that takes the task back.
func TestAnAdoptedTaskIsCheckedOn(t *testing.T) {
	b := newBench(t)
	b.start()
	first := b.registered("")
	a := assignment(first.Epoch, 1)
	b.runSpec(a, func(s *schemas.Spec) {
		again(s, schemas.RestartOnFailure, 0)
		s.Health = httpCheck("/until/2s")
	}, "http", "80")
	b.report(a, func(r schemas.Report) bool { return r.Ready })
	if err := b.halt(); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.report(a, func(r schemas.Report) bool { return r.Restarts == 1 && r.Ready })
}
