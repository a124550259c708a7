package runtimetest

import (
	"bufio"
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

func (b *bench) sleeping(t *testing.T) agent.Attempt {
	t.Helper()
	return b.run(t, "sleep", "1h")
}

func exec(t *testing.T, a agent.Attempt, stdio agent.Stdio, argv ...string) agent.Foreground {
	t.Helper()
	p, err := a.Exec(t.Context(), agent.Command{Argv: argv, Stdio: stdio, Env: []string{"TERM=vt100"}, Window: agent.Window{Rows: 30, Cols: 100}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func exited(t *testing.T, p agent.Program) schemas.Exit {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(patience):
		t.Fatal("the program does not end")
	}
	exit, err := p.Exit()
	if err != nil {
		t.Fatal(err)
	}
	return exit
}

// line reads one line, without its end.
func line(t *testing.T, r *bufio.Reader) string {
	t.Helper()
	s, err := r.ReadString('\n')
	if err != nil {
		t.Fatalf("%q, %v", s, err)
	}
	return strings.TrimRight(s, "\r\n")
}

func programStreams(t *testing.T, b *bench) {
	a := b.sleeping(t)
	p := exec(t, a, agent.StdioPipes, "/bin/cat")
	sent := strings.Repeat("0123456789abcdef", 64<<10) // more than a pipe holds
	in := p.Stdin()
	go func() {
		_, _ = io.WriteString(in, sent)
		_ = in.Close()
	}()
	if got, err := io.ReadAll(p.Stdout()); err != nil || string(got) != sent {
		t.Errorf("%d bytes of %d, %v", len(got), len(sent), err)
	}
	if got, err := io.ReadAll(p.Stderr()); err != nil || len(got) > 0 {
		t.Errorf("stderr %q, %v", got, err)
	}
	if exit := exited(t, p); exit.Code != 0 {
		t.Errorf("%+v", exit)
	}
	if p.Signal(syscall.SIGTERM) == nil {
		t.Error("a program that is over took a signal")
	}
	// What it wrote stays to be read after its end, however late.
	p = exec(t, a, agent.StdioPipes, "/bin/spam", "50000")
	exited(t, p)
	got, err := io.ReadAll(p.Stdout())
	if err != nil {
		t.Error(err)
	}
	spam(t, string(got), 50000)
	if _, err := a.Exec(t.Context(), agent.Command{Argv: []string{"/nowhere"}}); err == nil {
		t.Error("what is not there was started")
	} else if fault, ok := errors.AsType[*agent.StartError](err); !ok || fault.Reason != schemas.ReasonNotFound || fault.Exit.Code != 127 {
		t.Errorf("%v", err)
	}
}

func programSignals(t *testing.T, b *bench) {
	a := b.sleeping(t)
	argv := []string{"/bin/guest", "term-exit", "9"}
	p := exec(t, a, agent.StdioPipes, argv...)
	out := bufio.NewReader(p.Stdout())
	if got := line(t, out); got != "ready" {
		t.Errorf("%q", got)
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if got := line(t, out); got != "term" {
		t.Errorf("%q", got)
	}
	if exit := exited(t, p); exit.Code != 9 || exit.Signal != 0 {
		t.Errorf("%+v", exit)
	}
	p = exec(t, a, agent.StdioNone, "/bin/sleep", "1h")
	if p.Stdin() != nil || p.Stdout() != nil || p.Stderr() != nil {
		t.Error("it has streams")
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	if exit := exited(t, p); exit.Code != 137 || exit.Signal != 9 {
		t.Errorf("%+v", exit)
	}
	p = exec(t, a, agent.StdioPipes, "/bin/guest", "ignore-term")
	line(t, bufio.NewReader(p.Stdout()))
	begin := time.Now()
	p.Stop(time.Hour)
	p.Stop(300 * time.Millisecond)
	if exit := exited(t, p); exit.Code != 137 {
		t.Errorf("%+v", exit)
	}
	within(t, time.Since(begin), 300*time.Millisecond, 10*time.Second)
}

func programClosed(t *testing.T, b *bench) {
	a := b.sleeping(t)
	// It writes more than anybody reads.
	p := exec(t, a, agent.StdioPipes, "/bin/spam", "10000000")
	line(t, bufio.NewReader(p.Stdout()))
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	exited(t, p)
	// And with the run.
	p = exec(t, a, agent.StdioPipes, "/bin/cat")
	a.Restart(1)
	until(t, a, run(1))
	select {
	case <-p.Done():
	case <-time.After(patience):
		t.Fatal("it outlived its run")
	}
	if _, err := io.ReadAll(p.Stdout()); err != nil {
		t.Error(err)
	}
}

func programTerminal(t *testing.T, b *bench) {
	a := b.sleeping(t)
	if !b.Files {
		p := exec(t, a, agent.StdioTerminal, "/bin/echo", "hi")
		if got := line(t, bufio.NewReader(p.Stdout())); got != "hi" || p.Stderr() != nil || p.Resize(agent.Window{}) != nil {
			t.Errorf("%q", got)
		}
		return
	}
	p := exec(t, a, agent.StdioTerminal, "/bin/guest", "terminal")
	out := bufio.NewReader(p.Stdout())
	if got := line(t, out); !strings.HasPrefix(got, "on /dev/pts/") || !strings.HasSuffix(got, " 30x100 TERM=vt100") {
		t.Errorf("%q", got)
	}
	if p.Stderr() != nil {
		t.Error("a terminal has a stderr of its own")
	}
	if err := p.Resize(agent.Window{Rows: 50, Cols: 132}); err != nil {
		t.Fatal(err)
	}
	if got := line(t, out); got != "now 50x132" {
		t.Errorf("%q", got)
	}
	if _, err := io.WriteString(p.Stdin(), "hello\r"); err != nil {
		t.Fatal(err)
	}
	if got := line(t, out) + "|" + line(t, out); got != "hello|got hello" { // the terminal's echo, and the answer
		t.Errorf("%q", got)
	}
	_ = p.Stdin().Close() // no end of a terminal
	if _, err := io.WriteString(p.Stdin(), "\x03"); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(out)
	if err != nil || !strings.HasSuffix(string(rest), "interrupted\r\n") {
		t.Errorf("%q, %v", rest, err)
	}
	if exit := exited(t, p); exit.Code != 130 {
		t.Errorf("%+v", exit)
	}
	// Ctrl-D is the end of what is typed.
	p = exec(t, a, agent.StdioTerminal, "/bin/cat")
	if _, err := io.WriteString(p.Stdin(), "x\r\x04"); err != nil {
		t.Fatal(err)
	}
	if exit := exited(t, p); exit.Code != 0 {
		t.Errorf("%+v", exit)
	}
	// Nobody reads, and it is closed all the same.
	p = exec(t, a, agent.StdioTerminal, "/bin/spam", "100000000")
	line(t, bufio.NewReader(p.Stdout()))
	_ = p.Close()
	select {
	case <-p.Done():
	case <-time.After(patience):
		t.Fatal("a flood outlives its terminal")
	}
}

// alive counts the processes in the container, beside init and the one that counts.
func alive(t *testing.T, a agent.Attempt) string {
	t.Helper()
	var out strings.Builder
	if _, err := agent.Execute(t.Context(), a, agent.Command{Argv: []string{"/bin/guest", "processes"}}, &out, nil); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out.String())
}

func programFamily(t *testing.T, b *bench) {
	if !b.Files {
		t.Skip("has no processes")
	}
	a := b.sleeping(t)
	for name, end := range map[string]func(agent.Foreground){
		"killed":  func(p agent.Foreground) { p.Stop(0) },
		"closed":  func(p agent.Foreground) { _ = p.Close() },
		"stopped": func(p agent.Foreground) { p.Stop(200 * time.Millisecond) },
	} {
		p := exec(t, a, agent.StdioPipes, "/bin/guest", "family")
		line(t, bufio.NewReader(p.Stdout()))
		processes(t, a, name, "5") // the task, and four of the family
		end(p)
		exited(t, p)
		alone(t, a, name)
	}
	// And in the background, where its first process is the last to go.
	p, err := a.Launch(t.Context(), agent.Command{Argv: []string{"/bin/guest", "family"}})
	if err != nil {
		t.Fatal(err)
	}
	told(t, p, "ready\n")
	p.Stop(0)
	exited(t, p)
	alone(t, a, "in the background")
}

// alone waits until the task's own process is the only one: those of a program that has
// ended are killed, and go in their own time.
func alone(t *testing.T, a agent.Attempt, what string) {
	t.Helper()
	processes(t, a, what, "1")
}

// processes waits until there are so many. A look into /proc may miss one that is just
// being started.
func processes(t *testing.T, a agent.Attempt, what, want string) {
	t.Helper()
	n := ""
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if n = alive(t, a); n == want {
			return
		}
	}
	t.Errorf("%s: %s processes, want %s", what, n, want)
}

func programsBusy(t *testing.T, b *bench) {
	a := b.sleeping(t)
	for i := 0; ; i++ {
		p, err := a.Launch(t.Context(), agent.Command{Argv: []string{"/bin/sleep", "1h"}})
		if errors.Is(err, agent.ErrBusy) && i > 1 {
			break
		}
		if err != nil || i > 100 {
			t.Fatalf("program %d: %v", i, err)
		}
		t.Cleanup(func() { p.Stop(0) })
	}
	// Health checks and people still have room.
	if exit, err := agent.Execute(t.Context(), a, agent.Command{Argv: []string{"/bin/exit", "4"}}, nil, nil); err != nil || exit.Code != 4 {
		t.Errorf("%+v, %v", exit, err)
	}
}

// told waits until the newest of a background program's stdout holds text.
func told(t *testing.T, p agent.Background, text string) {
	t.Helper()
	late := time.After(patience)
	for {
		changed := p.Tail().Changed()
		if got := newest(t, p, schemas.Stdout); strings.Contains(got, text) {
			return
		}
		select {
		case <-changed:
		case <-late:
			t.Fatalf("it never wrote %q", text)
		}
	}
}

func newest(t *testing.T, p agent.Background, s schemas.Stream) string {
	t.Helper()
	oldest, end := p.Tail().Size(s)
	buf := make([]byte, end-oldest)
	n, at, err := p.Tail().ReadAt(s, buf, 0)
	if err != nil && !errors.Is(err, io.EOF) || at < oldest {
		t.Fatalf("read at %d of %d to %d: %v", at, oldest, end, err)
	}
	return string(buf[:n])
}

func launch(t *testing.T, a agent.Attempt, argv ...string) agent.Background {
	t.Helper()
	p, err := a.Launch(t.Context(), agent.Command{Argv: argv})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func backgroundEnds(t *testing.T, b *bench) {
	a := b.sleeping(t)
	p := launch(t, a, "/bin/echo", "from", "behind")
	told(t, p, "from behind\n")
	if exit := exited(t, p); exit.Code != 0 {
		t.Errorf("%+v", exit)
	}
	failing := launch(t, a, "/bin/exit", "5")
	if exit := exited(t, failing); exit.Code != 5 {
		t.Errorf("%+v", exit)
	}
	list := a.Backgrounds()
	if len(list) != 2 || list[0].ID() != p.ID() || list[1].ID() != failing.ID() || p.ID() == failing.ID() {
		t.Fatalf("%d are listed", len(list))
	}
	if c := list[0].Command(); len(c.Argv) != 3 || c.Argv[2] != "behind" || list[0].StartedFor() < 0 {
		t.Errorf("%+v", c)
	}
	if _, err := a.Launch(t.Context(), agent.Command{Argv: []string{"/nowhere"}}); err == nil || len(a.Backgrounds()) != 2 {
		t.Errorf("what is not there: %v, %d are listed", err, len(a.Backgrounds()))
	}
}

func backgroundStopped(t *testing.T, b *bench) {
	a := b.sleeping(t)
	polite, deaf := launch(t, a, "/bin/guest", "term-exit", "6"), launch(t, a, "/bin/guest", "ignore-term")
	told(t, polite, "ready\n")
	told(t, deaf, "ready\n")
	polite.Stop(patience)
	if exit := exited(t, polite); exit.Code != 6 {
		t.Errorf("%+v", exit)
	}
	told(t, polite, "term\n")
	begin := time.Now()
	deaf.Stop(300 * time.Millisecond)
	if exit := exited(t, deaf); exit.Code != 137 {
		t.Errorf("%+v", exit)
	}
	within(t, time.Since(begin), 300*time.Millisecond, 10*time.Second)
}

func backgroundRun(t *testing.T, b *bench) {
	a := b.run(t, "term-exit", "3")
	ready(t, a)
	p := launch(t, a, "/bin/guest", "ignore-term")
	told(t, p, "ready\n")
	a.Restart(1)
	until(t, a, run(1))
	if exit := exited(t, p); exit.Code != 137 {
		t.Errorf("at a restart %+v", exit)
	}
	wrote(t, a, "term\nready\n")
	q := launch(t, a, "/bin/guest", "ignore-term")
	told(t, q, "ready\n")
	a.Stop(patience)
	by(t, done(t, a), schemas.EndedStop, 3)
	select {
	case <-q.Done():
	case <-time.After(patience):
		t.Fatal("it outlived the task")
	}
	if _, err := a.Launch(t.Context(), agent.Command{Argv: []string{"/bin/exit", "0"}}); !errors.Is(err, agent.ErrAway) {
		t.Errorf("after the end: %v", err)
	}
}

func backgroundRecovered(t *testing.T, b *bench) {
	if b.Reopen == nil {
		t.Skip("has no state")
	}
	a := b.sleeping(t)
	over := launch(t, a, "/bin/exit", "5")
	exited(t, over)
	p := launch(t, a, "/bin/guest", "term-exit", "6")
	told(t, p, "ready\n")
	held := exec(t, a, agent.StdioPipes, "/bin/cat")
	b.Runtime = b.Reopen(t)
	if b.Files {
		select {
		case <-held.Done():
		case <-time.After(patience):
			t.Fatal("a program in the foreground outlived the agent")
		}
	}
	list, err := b.Runtime.Recover(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("%d attempts, %v", len(list), err)
	}
	a = list[0]
	t.Cleanup(func() { _ = a.Remove(context.Background()) })
	b.permit(t, time.Hour)
	until(t, a, up)
	late := time.Now().Add(patience)
	for len(a.Backgrounds()) != 2 {
		if time.Now().After(late) {
			t.Fatalf("%d are listed", len(a.Backgrounds()))
		}
		time.Sleep(5 * time.Millisecond) // between two looks
	}
	back := a.Backgrounds()
	if back[0].ID() != over.ID() || exited(t, back[0]).Code != 5 {
		t.Errorf("the one that was over: %+v", exited(t, back[0]))
	}
	if back[1].ID() != p.ID() || back[1].Command().Argv[1] != "term-exit" {
		t.Errorf("the one that runs: %+v", back[1].Command())
	}
	back[1].Stop(patience)
	if exit := exited(t, back[1]); exit.Code != 6 {
		t.Errorf("%+v", exit)
	}
	told(t, back[1], "term\n")
	if b.Files {
		alone(t, a, "the ones that are over")
	}
}

func backgroundFloods(t *testing.T, b *bench) {
	a := b.sleeping(t)
	const n = 3_000_000
	p := launch(t, a, "/bin/spam", fmt.Sprint(n))
	if exit := exited(t, p); exit.Code != 0 {
		t.Errorf("%+v", exit)
	}
	late := time.After(patience)
	for {
		changed := p.Tail().Changed()
		if _, end := p.Tail().Size(schemas.Stdout); end == n {
			break
		}
		select {
		case <-changed:
		case <-late:
			t.Fatal("its end never came")
		}
	}
	if got := newest(t, p, schemas.Stdout); len(got) != 128<<10 || !strings.HasSuffix(got, fmt.Sprintf("%062d\n", n/spamLine-1)) {
		t.Errorf("%d bytes, at the end %q", len(got), got[max(0, len(got)-70):])
	}
}

func backgroundsEnded(t *testing.T, b *bench) {
	a := b.sleeping(t)
	var last agent.Background
	for i := range 40 {
		last = launch(t, a, "/bin/exit", fmt.Sprint(i))
		exited(t, last)
	}
	list := a.Backgrounds()
	if len(list) < 8 || len(list) > 20 || list[len(list)-1].ID() != last.ID() {
		t.Errorf("%d are listed", len(list))
	}
}
