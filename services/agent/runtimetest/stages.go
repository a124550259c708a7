package runtimetest

import (
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

// judged starts an attempt that waits for its programs.
func (b *bench) judged(t *testing.T) agent.Attempt {
	t.Helper()
	req := b.request(t)
	req.Spec.Judge = &schemas.Judge{}
	return b.start(t, req)
}

func stage(t *testing.T, a agent.Attempt, argv ...string) agent.Stage {
	t.Helper()
	p, err := a.Stage(t.Context(), agent.Command{Argv: argv, Stdio: agent.StdioPipes}, 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func stages(t *testing.T, b *bench) {
	a := b.judged(t)
	p := stage(t, a, "/bin/cat")
	if _, err := a.Stage(t.Context(), agent.Command{Argv: []string{"/bin/echo"}, Stdio: agent.StdioPipes}, 64<<20); !errors.Is(err, agent.ErrBusy) {
		t.Errorf("two at once: %v", err)
	}
	go func() {
		_, _ = io.WriteString(p.Stdin(), "question")
		_ = p.Stdin().Close()
	}()
	if got, err := io.ReadAll(p.Stdout()); err != nil || string(got) != "question" {
		t.Errorf("%q %v", got, err)
	}
	if exit := exited(t, p); exit.Code != 0 {
		t.Errorf("%+v", exit)
	}
	for _, code := range []int{0, 3} {
		p := stage(t, a, "/bin/exit", fmt.Sprint(code))
		if exit := exited(t, p); exit.Code != code {
			t.Errorf("%+v, want %d", exit, code)
		}
		if u := p.Used(); u.CPU < 0 || u.Memory < 0 || u.OutOfMemory {
			t.Errorf("%+v", u)
		}
	}
	p = stage(t, a, "/bin/sleep", "1h")
	p.Stop(0)
	if exit := exited(t, p); exit.Signal != 9 {
		t.Errorf("%+v", exit)
	}
	var fault *agent.StartError
	if _, err := a.Stage(t.Context(), agent.Command{Argv: []string{"/bin/nothing"}, Stdio: agent.StdioPipes}, 64<<20); !errors.As(err, &fault) || fault.Exit == nil || fault.Exit.Code != 127 {
		t.Errorf("no such program: %v", err)
	}
	if err := a.Build(t.Context()); err != nil {
		t.Error(err)
	}
	a.Stop(time.Minute) // what is judged gets no grace
	if o := done(t, a); o.By != schemas.EndedStop {
		t.Errorf("%+v", o)
	}
	if _, err := a.Stage(t.Context(), agent.Command{Argv: []string{"/bin/echo"}}, 64<<20); !errors.Is(err, agent.ErrAway) {
		t.Errorf("after the end: %v", err)
	}
}

func stagesRecovered(t *testing.T, b *bench) {
	if b.Reopen == nil {
		t.Skip("has no state")
	}
	stage(t, b.judged(t), "/bin/sleep", "1h")
	b.Runtime = b.Reopen(t)
	list, err := b.Runtime.Recover(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("%d attempts, %v", len(list), err)
	}
	a := list[0]
	t.Cleanup(func() { _ = a.Remove(context.Background()) })
	b.permit(t, time.Hour)
	deadline := time.Now().Add(patience)
	for {
		p, err := a.Stage(t.Context(), agent.Command{Argv: []string{"/bin/echo", "again"}, Stdio: agent.StdioPipes}, 64<<20)
		if err == nil {
			defer p.Close()
			if got, err := io.ReadAll(p.Stdout()); err != nil || strings.TrimSpace(string(got)) != "again" {
				t.Errorf("%q %v", got, err)
			}
			return
		}
		if !errors.Is(err, agent.ErrBusy) && !errors.Is(err, agent.ErrAway) || time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
