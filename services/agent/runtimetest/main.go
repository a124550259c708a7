package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// attached starts a command that clients attach to.
func (b *bench) attached(t *testing.T, edit func(*agent.StartRequest), command ...string) agent.Attempt {
	t.Helper()
	req := b.request(t, command...)
	req.Spec.StdinOpen = true
	if edit != nil {
		edit(&req)
	}
	a := b.start(t, req)
	if a.Main() == nil {
		t.Fatal("there is nothing to attach to")
	}
	return a
}

func onTerminal(req *agent.StartRequest) {
	req.Spec.TTY, req.Spec.Window = true, &schemas.Window{Rows: 30, Cols: 100}
}

// typed writes all of text to the process.
func typed(t *testing.T, m agent.Main, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for p := []byte(text); len(p) > 0; {
		n, err := m.Write(ctx, p)
		if err != nil {
			t.Error(err)
			return
		}
		p = p[n:]
	}
}

func mainStdin(t *testing.T, b *bench) {
	if b.run(t, "sleep", "1h").Main() != nil {
		t.Error("there is something to attach to")
	}
	a := b.attached(t, nil, "cat")
	m := a.Main()
	sent := strings.Repeat("0123456789abcdef", 16<<10)
	typed(t, m, sent)
	if fed, err := m.Fed(); err != nil || fed != int64(len(sent)) {
		t.Errorf("it was given %d bytes, %v", fed, err)
	}
	if m.Resize(agent.Window{Rows: 1, Cols: 1}) == nil {
		t.Error("a pipe has a size")
	}
	m.CloseInput()
	by(t, done(t, a), schemas.EndedItself, 0)
	if got := read(t, a, schemas.Stdout); got != sent {
		t.Errorf("%d bytes of %d came back", len(got), len(sent))
	}
	if _, err := m.Write(t.Context(), []byte("x")); err == nil {
		t.Error("it was written to after its end")
	}
	a = b.attached(t, nil, "sleep", "1h")
	if err := a.Main().Signal(syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	by(t, done(t, a), schemas.EndedItself, 137)
}

// A write waits for a process that does not read, and ends with ctx and with the process.
func mainWaits(t *testing.T, b *bench) {
	if !b.Files {
		t.Skip("has no pipes")
	}
	a := b.attached(t, nil, "sleep", "1h")
	m := a.Main()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := m.Write(ctx, make([]byte, 32<<10)); err != nil {
				ended <- err
				return
			}
		}
	}()
	late := time.After(patience)
	for fed := int64(0); fed < 64<<10; fed, _ = m.Fed() { // what a pipe holds
		select {
		case err := <-ended:
			t.Fatal(err)
		case <-late:
			t.Fatalf("%d bytes went in", fed)
		case <-time.After(time.Millisecond):
		}
	}
	cancel()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Error("a write outlived its context")
	}
}

func mainTerminal(t *testing.T, b *bench) {
	a := b.attached(t, onTerminal, "cat")
	m := a.Main()
	typed(t, m, "hello\n")
	wrote(t, a, "hello")
	if err := m.Resize(agent.Window{Rows: 50, Cols: 132}); err != nil {
		t.Error(err)
	}
	typed(t, m, "\x04")
	by(t, done(t, a), schemas.EndedItself, 0)
	if !b.Files {
		return
	}
	// Ctrl-C is the process's.
	a = b.attached(t, onTerminal, "ignore-term")
	wrote(t, a, "ready")
	typed(t, a.Main(), "\x03")
	by(t, done(t, a), schemas.EndedItself, 130)
	// One that nobody types on has a terminal all the same.
	a = b.attached(t, func(req *agent.StartRequest) { onTerminal(req); req.Spec.StdinOpen = false }, "sleep", "1h")
	if _, err := a.Main().Write(t.Context(), []byte("x")); err == nil {
		t.Error("a stdin that is not open was written to")
	}
	// The same terminal is there in the next run.
	a = b.attached(t, func(req *agent.StartRequest) {
		onTerminal(req)
		req.Spec.Restart = &schemas.Restart{Policy: schemas.RestartOnFailure, Backoff: schemas.Duration(100 * time.Millisecond)}
	}, "term-exit", "3")
	wrote(t, a, "ready")
	if err := a.Main().Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	until(t, a, run(1))
	wrote(t, a, "ready\r\nterm\r\nready")
	typed(t, a.Main(), "\x03")
	until(t, a, run(2))
}

// An agent that comes later has the same streams.
func mainRecovered(t *testing.T, b *bench) {
	if b.Reopen == nil || !b.Files {
		t.Skip("has no state")
	}
	pipe := b.attached(t, nil, "cat").Assignment()
	terminal := b.attached(t, onTerminal, "cat").Assignment()
	b.Runtime = b.Reopen(t)
	list, err := b.Runtime.Recover(t.Context())
	if err != nil || len(list) != 2 {
		t.Fatalf("%d attempts, %v", len(list), err)
	}
	b.permit(t, time.Hour)
	for _, a := range list {
		t.Cleanup(func() { _ = a.Remove(context.Background()) })
		switch a.Assignment() {
		case pipe:
			typed(t, a.Main(), "one\n")
			wrote(t, a, "one\n")
		case terminal:
			typed(t, a.Main(), "two\n")
			wrote(t, a, "two\r\n")
		}
	}
	b.Runtime = b.Reopen(t)
	if list, err = b.Runtime.Recover(t.Context()); err != nil || len(list) != 2 {
		t.Fatalf("%d attempts, %v", len(list), err)
	}
	b.permit(t, time.Hour)
	for _, a := range list {
		t.Cleanup(func() { _ = a.Remove(context.Background()) })
		m := a.Main()
		if fed, err := m.Fed(); fed != 4 || err != nil {
			t.Errorf("it was given %d bytes, %v", fed, err)
		}
		typed(t, m, "again\n")
		wrote(t, a, "again")
		if a.Assignment() == terminal {
			typed(t, m, "\x04")
		} else {
			m.CloseInput()
		}
		by(t, done(t, a), schemas.EndedItself, 0)
	}
}

// Behind the log's limit a process waits for who reads along, and for nobody else.
func mainFloods(t *testing.T, b *bench) {
	if !b.Files {
		t.Skip("writes at once")
	}
	const limit, size = 64 << 10, 4 << 20
	flood := func(req *agent.StartRequest) { req.LogLimit = limit }
	a := b.attached(t, flood, "cat")
	m := a.Main()
	m.Hold(&[2]int64{})
	var lines strings.Builder
	for i := 0; lines.Len() < size; i++ {
		fmt.Fprintf(&lines, "o%062d\n", i)
	}
	written := make(chan struct{})
	go func() {
		defer close(written)
		typed(t, m, lines.String())
		m.CloseInput()
	}()
	var got strings.Builder
	buf := make([]byte, 32<<10)
	late := time.After(patience)
	for off := int64(0); off < size; {
		news := a.Output().Changed()
		n, at, err := m.ReadAt(schemas.Stdout, buf, off)
		if at != off && n > 0 {
			t.Fatalf("%d bytes are gone at %d", at-off, off)
		}
		got.Write(buf[:n])
		off += int64(n)
		m.Hold(&[2]int64{off, 0})
		if n > 0 {
			continue
		}
		if !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		select {
		case <-news:
		case <-late:
			t.Fatalf("%d bytes came", off)
		}
	}
	<-written
	if got.String() != lines.String() {
		t.Error("it is not what was written")
	}
	by(t, done(t, a), schemas.EndedItself, 0)
	a = b.attached(t, flood, "spam", "4194304")
	by(t, done(t, a), schemas.EndedItself, 0)
	if kept, dropped := a.Output().Size(schemas.Stdout); kept != limit || kept+dropped != size || a.Main().End(schemas.Stdout) != size {
		t.Errorf("%d kept, %d dropped", kept, dropped)
	}
}
