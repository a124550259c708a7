package runtimetest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

func (b *bench) restarting(t *testing.T, policy schemas.RestartPolicy, most int, command ...string) agent.StartRequest {
	t.Helper()
	req := b.request(t, command...)
	req.Spec.Restart = &schemas.Restart{Policy: policy, Max: most, Backoff: schemas.Duration(100 * time.Millisecond)}
	return req
}

// until waits for a run that ok accepts.
func until(t *testing.T, a agent.Attempt, ok func(agent.RunState) bool) agent.RunState {
	t.Helper()
	late := time.After(patience)
	for {
		run, changed := a.Run()
		if ok(run) {
			return run
		}
		select {
		case <-changed:
		case <-a.Done():
			if run, _ := a.Run(); ok(run) {
				return run
			}
			t.Fatalf("it ended: %+v %+v", a.Outcome(), a.Outcome().Exit)
		case <-late:
			t.Fatalf("that run never came; now %+v", run)
		}
	}
}

func up(r agent.RunState) bool { return r.Up }

func paused(r agent.RunState) bool { return !r.Up }

// wrote waits until stdout holds text.
func wrote(t *testing.T, a agent.Attempt, text string) {
	t.Helper()
	late := time.After(patience)
	for {
		c := a.Output().Changed()
		if strings.Contains(read(t, a, schemas.Stdout), text) {
			return
		}
		select {
		case <-c:
		case <-a.Done():
			if got := read(t, a, schemas.Stdout); !strings.Contains(got, text) {
				t.Fatalf("it ended (%+v) with %q, without %q", a.Outcome(), got, text)
			}
			return
		case <-late:
			t.Fatalf("it never wrote %q", text)
		}
	}
}

func runsAgain(t *testing.T, b *bench) {
	req := b.restarting(t, schemas.RestartOnFailure, 0, "flaky", "2", "9")
	if b.Files {
		req.Spec.Stdin = "in"
	}
	a := b.start(t, req)
	if run, _ := a.Run(); run.Restarts > 1 {
		t.Errorf("at the start %+v", run)
	}
	run := until(t, a, func(r agent.RunState) bool { return r.Restarts == 2 })
	if run.Last == nil || run.Last.Code != 9 {
		t.Errorf("last exit %+v", run.Last)
	}
	by(t, done(t, a), schemas.EndedItself, 0)
	if got := read(t, a, schemas.Stdout); got != "run 1\nrun 2\nrun 3\nready\n" {
		t.Errorf("output %q", got)
	}
	if run, _ := a.Run(); run.Restarts != 2 || run.Up {
		t.Errorf("at the end %+v", run)
	}
}

func restartLimit(t *testing.T, b *bench) {
	a := b.start(t, b.restarting(t, schemas.RestartOnFailure, 2, "flaky", "9", "5"))
	o := done(t, a)
	by(t, o, schemas.EndedItself, 5)
	if run, _ := a.Run(); run.Restarts != 2 || o.Reason != schemas.ReasonExit {
		t.Errorf("%+v, %+v", run, o)
	}
	if got := read(t, a, schemas.Stdout); got != "run 1\nrun 2\nrun 3\n" {
		t.Errorf("output %q", got)
	}
}

func alwaysAgain(t *testing.T, b *bench) {
	a := b.start(t, b.restarting(t, schemas.RestartAlways, 1, "echo", "hi"))
	by(t, done(t, a), schemas.EndedItself, 0)
	if got := read(t, a, schemas.Stdout); got != "hi\nhi\n" {
		t.Errorf("output %q", got)
	}
}

func runsAgainAlone(t *testing.T, b *bench) {
	if b.Reopen == nil {
		t.Skip("has no state")
	}
	req := b.restarting(t, schemas.RestartOnFailure, 0, "flaky", "3", "9", "1h")
	b.start(t, req)
	b.Runtime = b.Reopen(t)
	list, err := b.Runtime.Recover(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("%d attempts, %v", len(list), err)
	}
	a := list[0]
	t.Cleanup(func() { _ = a.Remove(context.Background()) })
	b.permit(t, time.Hour)
	wrote(t, a, "ready\n")
	until(t, a, func(r agent.RunState) bool { return r.Up && r.Restarts == 3 })
	a.Stop(time.Second)
	by(t, done(t, a), schemas.EndedStop, 143)
	if got := read(t, a, schemas.Stdout); got != "run 1\nrun 2\nrun 3\nrun 4\nready\n" {
		t.Errorf("output %q", got)
	}
	if run, _ := a.Run(); run.Restarts != 3 {
		t.Errorf("%+v", run)
	}
	b.Runtime = b.Reopen(t)
	if list, err = b.Runtime.Recover(t.Context()); err != nil || len(list) != 1 {
		t.Fatalf("%d attempts, %v", len(list), err)
	}
	t.Cleanup(func() { _ = list[0].Remove(context.Background()) })
	if run, _ := list[0].Run(); run.Restarts != 3 {
		t.Errorf("after its end %+v", run)
	}
}

// resting starts a task whose next run is a minute away.
func (b *bench) resting(t *testing.T, left time.Duration) agent.Attempt {
	t.Helper()
	req := b.restarting(t, schemas.RestartAlways, 0, "exit", "3")
	req.Spec.Restart.Backoff, req.TimeLeft = schemas.Duration(time.Minute), left
	a := b.start(t, req)
	run := until(t, a, paused)
	if run.Restarts != 0 || run.Last == nil || run.Last.Code != 3 {
		t.Errorf("between two runs %+v, %+v", run, run.Last)
	}
	return a
}

func outOfMemoryAgain(t *testing.T, b *bench) {
	req := b.restarting(t, schemas.RestartOnFailure, 1, "eat", fmt.Sprint(200<<20))
	req.Spec.Resources.Memory = 24 << 20
	a := b.start(t, req)
	o := done(t, a)
	by(t, o, schemas.EndedItself, 137)
	if run, _ := a.Run(); run.Restarts != 1 || o.Reason != schemas.ReasonOOM || !o.Exit.OOMKilled {
		t.Errorf("%+v, %+v, %+v", run, o, o.Exit)
	}
}

func recoveredAtRest(t *testing.T, b *bench) {
	if b.Reopen == nil {
		t.Skip("has no state")
	}
	b.resting(t, time.Minute)
	b.Runtime = b.Reopen(t)
	list, err := b.Runtime.Recover(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("%d attempts, %v", len(list), err)
	}
	a := list[0]
	t.Cleanup(func() { _ = a.Remove(context.Background()) })
	b.permit(t, time.Hour)
	if run := until(t, a, func(r agent.RunState) bool { return r.Last != nil }); run.Up || run.Restarts != 0 || run.Last.Code != 3 {
		t.Errorf("%+v, %+v", run, run.Last)
	}
	if _, err := a.Dial(t.Context(), 80); !errors.Is(err, agent.ErrAway) {
		t.Errorf("dialed between two runs: %v", err)
	}
	a.Stop(time.Hour)
	by(t, done(t, a), schemas.EndedStop, 3)
}

func stopsBetweenRuns(t *testing.T, b *bench) {
	a := b.resting(t, time.Minute)
	a.Stop(time.Hour)
	by(t, done(t, a), schemas.EndedStop, 3)
}

func deadlineBetweenRuns(t *testing.T, b *bench) {
	a := b.resting(t, time.Minute)
	if err := a.SetDeadline(100 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	by(t, done(t, a), schemas.EndedDeadline, 3)
}

func permitBetweenRuns(t *testing.T, b *bench) {
	a := b.resting(t, time.Minute)
	b.permit(t, 100*time.Millisecond)
	by(t, done(t, a), schemas.EndedPermit, -1)
}

func failsRun(t *testing.T, b *bench) {
	a := b.start(t, b.restarting(t, schemas.RestartOnFailure, 0, "term-exit", "0"))
	ready(t, a)
	a.Fail(7) // no such run
	a.Fail(0)
	run := until(t, a, func(r agent.RunState) bool { return r.Restarts == 1 && r.Up })
	if run.Last == nil || run.Last.Code != 0 {
		t.Errorf("last exit %+v", run.Last)
	}
	wrote(t, a, "term\nready\n")
	a.Fail(0) // that one is over
	a.Stop(patience)
	by(t, done(t, a), schemas.EndedStop, 0)
}

func fails(t *testing.T, b *bench) {
	for _, command := range []string{"term-exit", "ignore-term"} {
		a := b.run(t, command)
		ready(t, a)
		a.Fail(0)
		o := done(t, a)
		by(t, o, schemas.EndedItself, -1)
		if o.Reason != schemas.ReasonUnhealthy || o.Exit == nil {
			t.Errorf("%s: %+v", command, o)
		}
	}
}

// talk sends a line and reads the answer.
func talk(t *testing.T, a agent.Attempt, port int, line string) (string, error) {
	t.Helper()
	c, err := a.Dial(t.Context(), port)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprint(c, line); err != nil {
		t.Fatal(err)
	}
	got, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return got, nil
}

func dials(t *testing.T, b *bench) {
	a := b.run(t, "tcp", "8080")
	ready(t, a)
	for range 3 {
		if got, err := talk(t, a, 8080, "echo\n"); err != nil || got != "echo\n" {
			t.Fatalf("%q, %v", got, err)
		}
	}
	if _, err := a.Dial(t.Context(), 8081); !errors.Is(err, agent.ErrRefused) || errors.Is(err, agent.ErrAway) {
		t.Errorf("where nobody listens: %v", err)
	}
	c, err := a.Dial(t.Context(), 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "half" {
		t.Errorf("after its end was said: %q, %v", got, err)
	}
	a.Stop(0)
	done(t, a)
	if _, err := a.Dial(t.Context(), 8080); !errors.Is(err, agent.ErrAway) {
		t.Errorf("after its end: %v", err)
	}
	web := b.run(t, "http", "80")
	ready(t, web)
	if got, err := talk(t, web, 80, "GET / HTTP/1.0\r\n\r\n"); err != nil || !strings.Contains(got, "200 OK") {
		t.Errorf("%q, %v", got, err)
	}
}

func execs(t *testing.T, b *bench) {
	req := b.request(t, "sleep", "1h")
	req.Spec.Env = map[string]string{"COLOUR": "green"}
	a := b.start(t, req)
	var out, err strings.Builder
	exec := func(c agent.Command) schemas.Exit {
		t.Helper()
		out.Reset()
		err.Reset()
		exit, e := agent.Execute(t.Context(), a, c, &out, &err)
		if e != nil {
			t.Fatal(e)
		}
		return exit
	}
	if exit := exec(agent.Command{Argv: []string{"/bin/echo", "hello", "there"}}); exit.Code != 0 || out.String() != "hello there\n" || err.Len() > 0 {
		t.Errorf("%+v, %q, %q", exit, out.String(), err.String())
	}
	if exit := exec(agent.Command{Argv: []string{"/bin/exit", "42"}}); exit.Code != 42 {
		t.Errorf("%+v", exit)
	}
	if exit := exec(agent.Command{Argv: []string{"/nowhere"}}); exit.Code != 127 {
		t.Errorf("%+v", exit)
	}
	if b.Files {
		exec(agent.Command{Argv: []string{"/bin/env", "COLOUR", "SIZE"}, Env: []string{"SIZE=7"}})
		if out.String() != "COLOUR=green\nSIZE=7\n" {
			t.Errorf("environment %q", out.String())
		}
		if exit := exec(agent.Command{Argv: []string{"/bin/guest", "spam", "--err", "300000"}}); exit.Code != 0 || err.Len() != 300000 || out.Len() > 0 {
			t.Errorf("%+v, %d bytes on stderr, %d on stdout", exit, err.Len(), out.Len())
		}
		if exit := exec(agent.Command{Argv: []string{"/bin/guest", "orphans", "1"}}); exit.Code != 0 || !strings.HasPrefix(out.String(), "left 1\n") {
			t.Errorf("%+v, %q", exit, out.String())
		}
	}
	if _, err := a.Exec(t.Context(), agent.Command{Argv: []string{"/bin/echo", strings.Repeat("x", 1<<20)}}); err == nil || errors.Is(err, agent.ErrAway) {
		t.Errorf("a command of a megabyte: %v", err)
	}
	a.Stop(0)
	by(t, done(t, a), schemas.EndedStop, 137)
	if _, err := a.Exec(t.Context(), agent.Command{Argv: []string{"/bin/exit", "0"}}); !errors.Is(err, agent.ErrAway) {
		t.Errorf("after its end: %v", err)
	}
}

func execKilled(t *testing.T, b *bench) {
	a := b.run(t, "term-exit")
	ready(t, a)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if exit, err := agent.Execute(ctx, a, agent.Command{Argv: []string{"/bin/sleep", "1h"}}, nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%+v, %v", exit, err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := agent.Execute(t.Context(), a, agent.Command{Argv: []string{"/bin/sleep", "1h"}}, nil, nil)
		ended <- err
	}()
	a.Stop(patience) // the program does not keep the task from ending
	by(t, done(t, a), schemas.EndedStop, 0)
	<-ended
}

func recoveredCalls(t *testing.T, b *bench) {
	if b.Reopen == nil {
		t.Skip("has no state")
	}
	ready(t, b.run(t, "tcp", "8080"))
	b.Runtime = b.Reopen(t)
	list, err := b.Runtime.Recover(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("%d attempts, %v", len(list), err)
	}
	a := list[0]
	t.Cleanup(func() { _ = a.Remove(context.Background()) })
	b.permit(t, time.Hour)
	until(t, a, up)
	if got, err := talk(t, a, 8080, "echo\n"); err != nil || got != "echo\n" {
		t.Errorf("%q, %v", got, err)
	}
	if exit, err := agent.Execute(t.Context(), a, agent.Command{Argv: []string{"/bin/exit", "3"}}, nil, nil); err != nil || exit.Code != 3 {
		t.Errorf("%+v, %v", exit, err)
	}
}
