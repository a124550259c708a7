// Package runtimetest is what every agent.Runtime must do, as one suite of tests.
//
// The commands that it runs are understood by the program of package guest and by
// package fakeruntime alike.
package runtimetest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// Bench is where one test runs.
type Bench struct {
	Runtime agent.Runtime
	Worker  schemas.WorkerID

	Image   string // whose entrypoint understands the commands
	Missing string // an image that does not exist and is not pulled; "" skips

	// Reopen closes the Runtime and opens another over the same state; nil skips.
	Reopen func(t *testing.T) agent.Runtime
	// Left counts what is left of any attempt on the host.
	Left func(t *testing.T) int
	// Files says that the command can see files and stdin.
	Files bool
}

const patience = 30 * time.Second

// Run runs the suite. open is called once for each test, and gives a Runtime that
// holds nothing.
func Run(t *testing.T, open func(t *testing.T) Bench) {
	for name, f := range map[string]func(*testing.T, *bench){
		"exit codes come back":                      exitCodes,
		"a signal is told from a code":              signals,
		"a stop lets it end within the grace":       stops,
		"a stop kills what ignores TERM":            stopsDeaf,
		"a second stop shortens the grace only":     stopsSooner,
		"the deadline ends it":                      deadline,
		"the deadline kills what ignores TERM":      deadlineDeaf,
		"a deadline that is over is not moved":      deadlineOver,
		"the deadline can be moved out":             deadlineLater,
		"the deadline can be moved in":              deadlineSooner,
		"the permit's end kills":                    permit,
		"a renewed permit does not":                 permitRenewed,
		"no permit, no end by it":                   noPermit,
		"nothing starts after the permit":           afterPermit,
		"every byte of the log is kept":             logs,
		"the log stops at its limit and counts on":  logLimit,
		"changes of the log are told":               changed,
		"what runs is recovered":                    recovered,
		"remove is idempotent and ends what runs":   removes,
		"a missing image is the task's fault":       missingImage,
		"a missing command is the task's fault":     missingCommand,
		"a start that is broken off leaves nothing": brokenOff,
		"an assignment starts once":                 startsOnce,
		"stdin, environment and files arrive":       inputs,
		"memory that runs out is told":              outOfMemory,
		"a failure is run again":                    runsAgain,
		"restarts have a limit":                     restartLimit,
		"always is also after success":              alwaysAgain,
		"restarts go on without an agent":           runsAgainAlone,
		"memory that runs out is a failure":         outOfMemoryAgain,
		"what rests between two runs is recovered":  recoveredAtRest,
		"a stop ends a task between two runs":       stopsBetweenRuns,
		"the deadline ends it between two runs":     deadlineBetweenRuns,
		"the permit ends it between two runs":       permitBetweenRuns,
		"an unhealthy run is followed by another":   failsRun,
		"unhealthy without a policy is the end":     fails,
		"a restart runs it again":                   restarts,
		"a restart kills what ignores TERM":         restartsDeaf,
		"a restart between two runs is at once":     restartsAtRest,
		"restarts that are asked for do not count":  restartsBeyondLimit,
		"a stop goes before a restart":              stopsRestart,
		"a restart outlives the agent":              restartsRecovered,
		"a port is dialed":                          dials,
		"a program is run beside the task":          execs,
		"a program beside the task can be ended":    execKilled,
		"what is recovered can be asked":            recoveredCalls,
		"a program reads until its input ends":      programStreams,
		"a program gets signals":                    programSignals,
		"a program ends with its streams":           programClosed,
		"a program on a terminal":                   programTerminal,
		"what a program started ends with it":       programFamily,
		"too many programs are refused":             programsBusy,
		"a background program ends by itself":       backgroundEnds,
		"a background program is stopped":           backgroundStopped,
		"a background program ends with the run":    backgroundRun,
		"a background program outlives the agent":   backgroundRecovered,
		"a background program never waits":          backgroundFloods,
		"ended background programs are bounded":     backgroundsEnded,
		"what is judged runs one by one":            stages,
		"a judge outlives the agent":                stagesRecovered,
		"files are put, read, listed and deleted":   filesAround,
		"a put is all or nothing":                   filesNothing,
		"files keep to the sandbox":                 filesSandbox,
		"a put that is given up leaves nothing":     filesGivenUp,
		"half a gigabyte goes in and out":           filesLarge,
		"what a task leaves can be read":            leaves,
		"what a task leaves outlives the agent":     leavesRecovered,
		"clients write to the process":              mainStdin,
		"a write to the process waits":              mainWaits,
		"the process is on a terminal":              mainTerminal,
		"a terminal outlives the agent":             mainRecovered,
		"a full log waits for who reads along":      mainFloods,
	} {
		t.Run(name, func(t *testing.T) {
			b := &bench{Bench: open(t)}
			b.permit(t, time.Hour)
			f(t, b)
		})
	}
}

type bench struct{ Bench }

func (b *bench) permit(t *testing.T, left time.Duration) {
	t.Helper()
	if err := b.Runtime.Permit(b.Runtime.Now() + left); err != nil {
		t.Fatal(err)
	}
}

func (b *bench) request(t *testing.T, command ...string) agent.StartRequest {
	t.Helper()
	id, err := schemas.NewTaskID(time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command, spec.Pull = b.Image, command, schemas.PullNever
	return agent.StartRequest{
		Assignment: schemas.Assignment{Task: id, Attempt: 1, Worker: b.Worker, Epoch: "e"},
		Spec:       spec, TimeLeft: time.Hour, Grace: time.Second, LogLimit: 1 << 20,
	}
}

func (b *bench) tryStart(ctx context.Context, t *testing.T, req agent.StartRequest) (agent.Attempt, error) {
	t.Helper()
	img, err := b.Runtime.Image(ctx, req.Spec, nil, nil)
	if err != nil {
		return nil, err
	}
	req.Image = img
	return b.Runtime.Start(ctx, req)
}

func (b *bench) start(t *testing.T, req agent.StartRequest) agent.Attempt {
	t.Helper()
	a, err := b.tryStart(t.Context(), t, req)
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	t.Cleanup(func() { _ = a.Remove(context.Background()) })
	return a
}

func (b *bench) run(t *testing.T, command ...string) agent.Attempt {
	t.Helper()
	return b.start(t, b.request(t, command...))
}

func done(t *testing.T, a agent.Attempt) agent.Outcome {
	t.Helper()
	select {
	case <-a.Done():
		return a.Outcome()
	case <-time.After(patience):
		t.Fatal("the attempt does not end")
		return agent.Outcome{}
	}
}

func read(t *testing.T, a agent.Attempt, s schemas.Stream) string {
	t.Helper()
	var b strings.Builder
	buf := make([]byte, 32<<10)
	for off := int64(0); ; {
		n, err := a.Output().ReadAt(s, buf, off)
		b.Write(buf[:n])
		off += int64(n)
		if errors.Is(err, io.EOF) {
			return b.String()
		}
		if err != nil {
			t.Fatalf("read %s: %v", s, err)
		}
	}
}

// ready waits until the command has written its first line.
func ready(t *testing.T, a agent.Attempt) {
	t.Helper()
	late := time.After(patience)
	for {
		c := a.Output().Changed()
		if kept, _ := a.Output().Size(schemas.Stdout); kept > 0 {
			return
		}
		select {
		case <-c:
		case <-a.Done():
			return
		case <-late:
			t.Fatal("it never got ready")
		}
	}
}

func by(t *testing.T, o agent.Outcome, want schemas.EndedBy, code int) {
	t.Helper()
	if o.By != want {
		t.Fatalf("ended by %s, want %s (%+v %+v)", o.By, want, o, o.Exit)
	}
	if code >= 0 && (o.Exit == nil || o.Exit.Code != code) {
		t.Fatalf("exit %+v, want code %d", o.Exit, code)
	}
}

func within(t *testing.T, got, least, most time.Duration) {
	t.Helper()
	if got < least || got > most {
		t.Fatalf("took %s, want %s to %s", got, least, most)
	}
}

func exitCodes(t *testing.T, b *bench) {
	for _, code := range []int{0, 1, 42, 137} {
		a := b.run(t, "exit", fmt.Sprint(code))
		if _, ran := a.StartedFor(); !ran {
			t.Error("started, but says it was not")
		}
		o := done(t, a)
		by(t, o, schemas.EndedItself, code)
		if o.Exit.Signal != 0 || o.Exit.OOMKilled || o.Exit.TimedOut || o.Reason != schemas.ReasonExit {
			t.Errorf("exit %d: %+v %+v", code, o, o.Exit)
		}
		if a.Assignment().Attempt != 1 {
			t.Errorf("assignment %+v", a.Assignment())
		}
	}
}

func signals(t *testing.T, b *bench) {
	o := done(t, b.run(t, "signal", "9"))
	by(t, o, schemas.EndedItself, 137)
	if o.Exit.Signal != 9 || o.Reason != schemas.ReasonSignal {
		t.Errorf("%+v %+v", o, o.Exit)
	}
}

func stops(t *testing.T, b *bench) {
	a := b.run(t, "term-exit", "7")
	ready(t, a)
	begin := time.Now()
	a.Stop(patience)
	by(t, done(t, a), schemas.EndedStop, 7)
	within(t, time.Since(begin), 0, 5*time.Second)
	a.Stop(0) // of no effect
	by(t, a.Outcome(), schemas.EndedStop, 7)
}

func stopsDeaf(t *testing.T, b *bench) {
	a := b.run(t, "ignore-term")
	ready(t, a)
	begin := time.Now()
	a.Stop(500 * time.Millisecond)
	by(t, done(t, a), schemas.EndedStop, 137)
	within(t, time.Since(begin), 500*time.Millisecond, 5*time.Second)
}

func stopsSooner(t *testing.T, b *bench) {
	a := b.run(t, "ignore-term")
	ready(t, a)
	begin := time.Now()
	a.Stop(time.Hour)
	a.Stop(500 * time.Millisecond)
	a.Stop(time.Hour)
	by(t, done(t, a), schemas.EndedStop, 137)
	within(t, time.Since(begin), 500*time.Millisecond, 5*time.Second)
}

func deadline(t *testing.T, b *bench) {
	req := b.request(t, "sleep", "1h")
	req.TimeLeft = 700 * time.Millisecond
	begin := time.Now()
	o := done(t, b.start(t, req))
	by(t, o, schemas.EndedDeadline, 143)
	if !o.Exit.TimedOut {
		t.Errorf("%+v", o.Exit)
	}
	within(t, time.Since(begin), 700*time.Millisecond, 8*time.Second)
}

func deadlineDeaf(t *testing.T, b *bench) {
	req := b.request(t, "ignore-term")
	req.Grace = 500 * time.Millisecond
	a := b.start(t, req)
	ready(t, a)
	begin := time.Now()
	if err := a.SetDeadline(time.Second); err != nil {
		t.Fatal(err)
	}
	by(t, done(t, a), schemas.EndedDeadline, 137)
	within(t, time.Since(begin), 1500*time.Millisecond, 9*time.Second)
}

func deadlineOver(t *testing.T, b *bench) {
	req := b.request(t, "ignore-term")
	req.Grace = 2 * time.Second
	a := b.start(t, req)
	ready(t, a)
	if err := a.SetDeadline(500 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	set, _ := a.StartedFor()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for ran, _ := a.StartedFor(); ran <= set+500*time.Millisecond; ran, _ = a.StartedFor() {
		<-tick.C
	}
	if err := a.SetDeadline(time.Minute); !errors.Is(err, agent.ErrOver) {
		t.Errorf("%v", err)
	}
	by(t, done(t, a), schemas.EndedDeadline, 137)
}

func deadlineLater(t *testing.T, b *bench) {
	req := b.request(t, "sleep", "1500ms", "5")
	req.TimeLeft = time.Second
	a := b.start(t, req)
	if err := a.SetDeadline(time.Minute); err != nil {
		t.Fatal(err)
	}
	by(t, done(t, a), schemas.EndedItself, 5)
	if err := a.SetDeadline(time.Minute); err != nil {
		t.Errorf("after its end: %v", err)
	}
}

func deadlineSooner(t *testing.T, b *bench) {
	a := b.run(t, "sleep", "1h")
	begin := time.Now()
	if err := a.SetDeadline(300 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	by(t, done(t, a), schemas.EndedDeadline, 143)
	within(t, time.Since(begin), 300*time.Millisecond, 5*time.Second)
}

func permit(t *testing.T, b *bench) {
	a := b.run(t, "ignore-term")
	ready(t, a)
	begin := time.Now()
	b.permit(t, 500*time.Millisecond)
	by(t, done(t, a), schemas.EndedPermit, -1)
	within(t, time.Since(begin), 500*time.Millisecond, 5*time.Second)
}

func permitRenewed(t *testing.T, b *bench) {
	req := b.request(t, "sleep", "1500ms", "3")
	b.permit(t, 1000*time.Millisecond)
	b.permit(t, time.Hour)
	by(t, done(t, b.start(t, req)), schemas.EndedItself, 3)
}

func noPermit(t *testing.T, b *bench) {
	req := b.request(t, "sleep", "1s", "3")
	req.NoPermit = true
	a := b.start(t, req)
	other := b.run(t, "sleep", "1h")
	b.permit(t, 0)
	by(t, done(t, other), schemas.EndedPermit, -1)
	by(t, done(t, a), schemas.EndedItself, 3)
}

func afterPermit(t *testing.T, b *bench) {
	b.permit(t, -time.Second)
	for _, free := range []bool{false, true} {
		req := b.request(t, "exit", "0")
		req.NoPermit = free
		a, err := b.tryStart(t.Context(), t, req)
		if err == nil {
			_ = a.Remove(t.Context())
			t.Errorf("NoPermit %v: started", free)
		}
		if _, fault := errors.AsType[*agent.StartError](err); fault {
			t.Errorf("it is not the task's fault: %v", err)
		}
	}
	b.nothingLeft(t)
}

const spamLine = 64

// spam gives the line n of the command spam, or checks what was read.
func spam(t *testing.T, got string, bytes int) {
	t.Helper()
	if len(got) != bytes {
		t.Fatalf("%d bytes, want %d", len(got), bytes)
	}
	for i := 0; i*spamLine < len(got); i++ {
		want := fmt.Sprintf("o%062d\n", i)
		line := got[i*spamLine : min((i+1)*spamLine, len(got))]
		if line != want[:len(line)] {
			t.Fatalf("line %d is %q", i, line)
		}
	}
}

func logs(t *testing.T, b *bench) {
	const n = 700_001
	a := b.run(t, "spam", fmt.Sprint(n))
	by(t, done(t, a), schemas.EndedItself, 0)
	spam(t, read(t, a, schemas.Stdout), n)
	if kept, dropped := a.Output().Size(schemas.Stdout); kept != n || dropped != 0 {
		t.Errorf("kept %d, dropped %d", kept, dropped)
	}
	if kept, _ := a.Output().Size(schemas.Stderr); kept != 0 {
		t.Errorf("stderr has %d", kept)
	}
}

func logLimit(t *testing.T, b *bench) {
	req := b.request(t, "spam", "3000000")
	req.LogLimit = 100_000
	a := b.start(t, req)
	by(t, done(t, a), schemas.EndedItself, 0)
	spam(t, read(t, a, schemas.Stdout), 100_000)
	if kept, dropped := a.Output().Size(schemas.Stdout); kept != 100_000 || dropped != 2_900_000 {
		t.Errorf("kept %d, dropped %d", kept, dropped)
	}
}

func changed(t *testing.T, b *bench) {
	a := b.run(t, "sleep", "200ms")
	select {
	case <-a.Output().Changed():
	case <-time.After(patience):
		t.Fatal("the end of the attempt did not wake")
	}
	done(t, a)
}

func recovered(t *testing.T, b *bench) {
	if b.Reopen == nil {
		t.Skip("has no state")
	}
	if got, err := b.Runtime.Recover(t.Context()); err != nil || len(got) != 0 {
		t.Fatalf("a new one has %d attempts, %v", len(got), err)
	}
	req := b.request(t, "term-exit", "6")
	first := b.start(t, req)
	ready(t, first)
	ended := b.run(t, "exit", "4")
	done(t, ended)
	b.Runtime = b.Reopen(t)
	list, err := b.Runtime.Recover(t.Context())
	if err != nil || len(list) != 2 {
		t.Fatalf("%d attempts, %v", len(list), err)
	}
	b.permit(t, time.Hour)
	for _, a := range list {
		t.Cleanup(func() { _ = a.Remove(context.Background()) })
		if ran, ok := a.StartedFor(); !ok || ran <= 0 || ran > time.Minute {
			t.Errorf("started for %s, %v", ran, ok)
		}
		if a.Assignment() != req.Assignment {
			by(t, done(t, a), schemas.EndedItself, 4)
			continue
		}
		a.Stop(patience)
		by(t, done(t, a), schemas.EndedStop, 6)
		if got := read(t, a, schemas.Stdout); got != "ready\nterm\n" {
			t.Errorf("output %q", got)
		}
	}
}

func (b *bench) nothingLeft(t *testing.T) {
	t.Helper()
	if b.Left == nil {
		return
	}
	for end := time.Now().Add(patience); b.Left(t) > 0; {
		if time.Now().After(end) {
			t.Fatalf("%d are left", b.Left(t))
		}
		time.Sleep(20 * time.Millisecond) // between two looks
	}
}

func removes(t *testing.T, b *bench) {
	running, ended := b.run(t, "sleep", "1h"), b.run(t, "exit", "0")
	done(t, ended)
	for _, a := range []agent.Attempt{running, ended} {
		for range 2 {
			if err := a.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
	by(t, done(t, running), schemas.EndedStop, -1)
	by(t, done(t, ended), schemas.EndedItself, 0)
	if b.Left != nil && b.Left(t) > 0 {
		t.Errorf("%d are left", b.Left(t))
	}
}

func missingImage(t *testing.T, b *bench) {
	if b.Missing == "" {
		t.Skip("has all images")
	}
	req := b.request(t, "exit", "0")
	req.Spec.Image = b.Missing
	_, err := b.Runtime.Image(t.Context(), req.Spec, nil, nil)
	fault, ok := errors.AsType[*agent.StartError](err)
	if !ok || fault.Reason != schemas.ReasonImage || !strings.Contains(fault.Message, b.Missing) {
		t.Fatalf("%v", err)
	}
}

func missingCommand(t *testing.T, b *bench) {
	req := b.request(t)
	req.Spec.Entrypoint = []string{"/nowhere"}
	_, err := b.tryStart(t.Context(), t, req)
	fault, ok := errors.AsType[*agent.StartError](err)
	if !ok || fault.Reason != schemas.ReasonNotFound || fault.Exit == nil || fault.Exit.Code != 127 || !strings.Contains(fault.Message, "/nowhere") {
		t.Fatalf("%v", err)
	}
	b.nothingLeft(t)
}

func brokenOff(t *testing.T, b *bench) {
	for _, after := range []time.Duration{0, 5 * time.Millisecond, 40 * time.Millisecond, 120 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		a, err := b.tryStart(ctx, t, b.request(t, "sleep", "1h"))
		cancel()
		if err == nil { // it was quicker
			if err := a.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
	b.nothingLeft(t)
}

func startsOnce(t *testing.T, b *bench) {
	req := b.request(t, "sleep", "1h")
	a := b.start(t, req)
	if _, err := b.tryStart(t.Context(), t, req); err == nil {
		t.Fatal("started twice")
	}
	if _, ended := <-closedNow(a.Done()); ended {
		t.Error("the first was ended by the second")
	}
}

// closedNow yields one value if c is closed already.
func closedNow(c <-chan struct{}) <-chan struct{} {
	out := make(chan struct{}, 1)
	select {
	case <-c:
		out <- struct{}{}
	default:
	}
	close(out)
	return out
}

func inputs(t *testing.T, b *bench) {
	if !b.Files {
		t.Skip("has no files")
	}
	req := b.request(t, "cat")
	req.Spec.Stdin = strings.Repeat("line of input\n", 20_000)
	a := b.start(t, req)
	by(t, done(t, a), schemas.EndedItself, 0)
	if got := read(t, a, schemas.Stdout); got != req.Spec.Stdin {
		t.Errorf("stdin: %d bytes of %d", len(got), len(req.Spec.Stdin))
	}
	req = b.request(t, "env", "GREETING")
	req.Spec.Env = map[string]string{"GREETING": "hello=there"}
	a = b.start(t, req)
	done(t, a)
	if got := read(t, a, schemas.Stdout); got != "GREETING=hello=there\n" {
		t.Errorf("env: %q", got)
	}
	req = b.request(t, "cat", "/task/input/deep/er/x")
	req.Spec.Files = []schemas.File{{Path: "deep/er/x", Base64: "aGVsbG8="}, {Path: "y", Content: "why"}}
	a = b.start(t, req)
	done(t, a)
	if got := read(t, a, schemas.Stdout); got != "hello" {
		t.Errorf("file: %q", got)
	}
}

func outOfMemory(t *testing.T, b *bench) {
	req := b.request(t, "eat", fmt.Sprint(200<<20))
	req.Spec.Resources.Memory = 24 << 20
	o := done(t, b.start(t, req))
	by(t, o, schemas.EndedItself, 137)
	if o.Reason != schemas.ReasonOOM || !o.Exit.OOMKilled {
		t.Errorf("%+v %+v", o, o.Exit)
	}
}
