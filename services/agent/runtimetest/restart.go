package runtimetest

import (
	"context"
	"fmt"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// run waits until the command has been restarted so often, and runs.
func run(n int) func(agent.RunState) bool {
	return func(r agent.RunState) bool { return r.Up && r.Restarts == n }
}

func restarts(t *testing.T, b *bench) {
	req := b.request(t, "flaky", "0", "0", "1h")
	if b.Files {
		req.Spec.Stdin = "in"
	}
	a := b.start(t, req)
	ready(t, a)
	a.Restart(0) // there were so many
	for n := 1; n <= 2; n++ {
		a.Restart(n)
		a.Restart(n) // the order comes twice
		if r := until(t, a, run(n)); r.Last == nil || r.Last.Code != 143 || r.Last.Signal != 15 {
			t.Errorf("the run before ended with %+v", r.Last)
		}
		wrote(t, a, fmt.Sprintf("run %d\nready\n", n+1))
	}
	a.Restart(1) // and late
	a.Stop(time.Second)
	by(t, done(t, a), schemas.EndedStop, 143)
	if got := read(t, a, schemas.Stdout); got != "run 1\nready\nrun 2\nready\nrun 3\nready\n" {
		t.Errorf("output %q", got)
	}
	a.Restart(9)
	if r, _ := a.Run(); r.Restarts != 2 || r.Up {
		t.Errorf("at the end %+v", r)
	}
}

func restartsDeaf(t *testing.T, b *bench) {
	req := b.request(t, "ignore-term")
	req.Grace = 300 * time.Millisecond
	a := b.start(t, req)
	ready(t, a)
	a.Restart(1)
	if r := until(t, a, run(1)); r.Last == nil || r.Last.Code != 137 {
		t.Errorf("the run before ended with %+v", r.Last)
	}
}

func restartsAtRest(t *testing.T, b *bench) {
	a := b.resting(t, time.Minute)
	a.Restart(1)
	r := until(t, a, func(r agent.RunState) bool { return r.Restarts == 1 && !r.Up })
	if r.Last == nil || r.Last.Code != 3 {
		t.Errorf("%+v", r.Last)
	}
}

// A policy that allows one restart allows it beside those that were asked for.
func restartsBeyondLimit(t *testing.T, b *bench) {
	a := b.start(t, b.restarting(t, schemas.RestartOnFailure, 1, "term-exit", "5"))
	ready(t, a)
	a.Restart(1)
	until(t, a, run(1))
	wrote(t, a, "term\nready\n")
	a.Fail(1)
	until(t, a, run(2))
	wrote(t, a, "term\nready\nterm\nready\n")
	a.Fail(2)
	if o := done(t, a); o.Reason != schemas.ReasonUnhealthy {
		t.Errorf("%+v", o)
	}
	if r, _ := a.Run(); r.Restarts != 2 {
		t.Errorf("%+v", r)
	}
}

func stopsRestart(t *testing.T, b *bench) {
	a := b.run(t, "ignore-term")
	ready(t, a)
	a.Restart(1)
	a.Stop(0)
	by(t, done(t, a), schemas.EndedStop, 137)
	if r, _ := a.Run(); r.Restarts != 0 {
		t.Errorf("%+v", r)
	}
}

func restartsRecovered(t *testing.T, b *bench) {
	if b.Reopen == nil {
		t.Skip("has no state")
	}
	req := b.request(t, "term-exit")
	a := b.start(t, req)
	ready(t, a)
	a.Restart(1)
	until(t, a, run(1))
	wrote(t, a, "term\nready\n")
	a.Restart(2) // perhaps not carried out before the agent is gone
	b.Runtime = b.Reopen(t)
	list, err := b.Runtime.Recover(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("%d attempts, %v", len(list), err)
	}
	a = list[0]
	t.Cleanup(func() { _ = a.Remove(context.Background()) })
	b.permit(t, time.Hour)
	until(t, a, run(2))
	wrote(t, a, "term\nready\nterm\nready\n")
	a.Restart(2)
	a.Stop(patience)
	by(t, done(t, a), schemas.EndedStop, 0)
	if r, _ := a.Run(); r.Restarts != 2 {
		t.Errorf("%+v", r)
	}
}
