package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"strings"
	"sync"
	"time"

	"dayfly.dev/schemas"
)

// A judge's task is driven from here. Its container has no process of its own: the agent
// runs one program after another in it, each with one test's input, compares what it writes
// with what is expected, and neither the inputs to come nor anything that is expected is
// ever in the container. What has been decided is in a file, so that the next agent goes on
// with the test that was under way.

const (
	// judgePatience is how long a program is tried to be started.
	judgePatience = 30 * time.Second
	// judgeReport is how long verdicts gather before they are reported.
	judgeReport = 400 * time.Millisecond
	// cpuLook is the shortest pause between two looks at a program's processor time.
	cpuLook = 5 * time.Millisecond
	// compilerSays is how much is kept of it.
	compilerSays = schemas.MaxCompileOutput
)

// judging is the judge of one attempt. One goroutine runs it.
type judging struct {
	t      *attempt
	found  Attempt
	spec   schemas.Judge
	log    *judgeLog
	result schemas.JudgeResult
	failed *schemas.End // why there is no verdict
	heads  [2]beginning // of the last test: the beginning of its output
}

// judge runs to the verdict, then ends the task. It returns early when ctx ends, or the task.
func (t *attempt) judge(ctx context.Context, found Attempt, log *judgeLog) *judging {
	j := &judging{t: t, found: found, spec: log.spec, log: log, result: log.result}
	if len(j.result.Cases) > 0 || j.result.Compile != nil {
		j.tell()
	}
	ctx, cancel := context.WithCancel(ctx)
	var over sync.WaitGroup
	defer func() {
		cancel()
		over.Wait()
	}()
	over.Go(func() {
		select {
		case <-found.Done():
			cancel()
		case <-ctx.Done():
		}
	})
	for j.spec.Over(j.result) == "" && j.failed == nil && ctx.Err() == nil {
		if err := j.step(ctx); err != nil && ctx.Err() == nil {
			t.log.Warn().Err(err).Msg("judge")
			j.failed = &schemas.End{By: schemas.EndedLost, Message: text(fmt.Sprintf("worker %s could not go on judging: %v", t.Worker, err), 1024)}
		}
	}
	if ctx.Err() == nil {
		found.Stop(0)
	}
	return j
}

// step runs the stage that is next, and keeps what came of it.
func (j *judging) step(ctx context.Context) error {
	if j.spec.Compile != nil && j.result.Compile == nil {
		c, err := j.compile(ctx)
		if err != nil || c == nil {
			return err
		}
		j.result.Compile = c
	} else {
		c, err := j.test(ctx, j.spec.Tests[len(j.result.Cases)])
		if err != nil || c == nil {
			return err
		}
		j.result.Cases = append(j.result.Cases, *c)
		j.t.agent.metrics.verdicts.WithLabelValues(string(c.Verdict)).Inc()
	}
	if err := j.log.add(j.result); err != nil {
		return fmt.Errorf("keep a verdict: %w", err)
	}
	j.tell()
	return nil
}

// tell reports how far it has come.
func (j *judging) tell() {
	r := j.result
	j.t.mu.Lock()
	defer j.t.mu.Unlock()
	j.t.judged = &r
	if j.t.report.Phase == schemas.PhaseRunning && j.spec.Over(r) == "" {
		j.t.tell(j.t.report, judgeReport)
	}
}

// compile runs the first stage. It gives nil if there is no verdict to come.
func (j *judging) compile(ctx context.Context) (*schemas.JudgeCompile, error) {
	says := &beginning{most: compilerSays}
	o, err := j.stage(ctx, *j.spec.Compile, strings.NewReader(""), says, says)
	var missing *StartError
	switch {
	case errors.As(err, &missing):
		j.failed = &schemas.End{By: schemas.EndedItself, Reason: missing.Reason, Exit: missing.Exit, Message: "compile: " + text(missing.Message, 512)}
		return nil, nil
	case err != nil:
		return nil, err
	}
	c := &schemas.JudgeCompile{Verdict: schemas.VerdictCompileError, JudgeUse: o.use, Output: text(says.String(), compilerSays)}
	switch o.verdict(true) {
	case schemas.VerdictAccepted:
		var much *BuildError
		switch err := j.found.Build(ctx); {
		case errors.As(err, &much):
			c.Message = much.Message
			return c, nil
		case err != nil:
			return nil, err
		}
		c.Verdict = schemas.VerdictAccepted
	case schemas.VerdictTimeLimit:
		c.Message = "the compiler took more time than it may"
	case schemas.VerdictMemoryLimit:
		c.Message = "the compiler needed more memory than it may use"
	case schemas.VerdictOutputLimit:
		c.Message = "the compiler wrote more than it may"
	default:
		c.Message = fmt.Sprintf("the compiler ended with exit code %d", o.exit.Code)
	}
	return c, nil
}

// test runs the program on one test.
func (j *judging) test(ctx context.Context, test schemas.JudgeTest) (*schemas.JudgeCase, error) {
	stdin, err := j.log.open(test.Stdin, test.StdinBlob)
	if err != nil {
		return nil, err
	}
	defer stdin.Close()
	answer := newComparison(j.spec.Compare)
	for i := range j.heads {
		j.heads[i] = beginning{most: schemas.MaxInlineOutput}
	}
	o, err := j.stage(ctx, j.spec.Run, stdin, io.MultiWriter(answer, &j.heads[0]), &j.heads[1])
	var missing *StartError
	switch {
	case errors.As(err, &missing) && missing.Exit != nil && j.spec.Compile != nil: // the compiler has not made it
		return &schemas.JudgeCase{Verdict: schemas.VerdictRuntimeError, ExitCode: missing.Exit.Code}, nil
	case errors.As(err, &missing):
		j.failed = &schemas.End{By: schemas.EndedItself, Reason: missing.Reason, Exit: missing.Exit, Message: text(missing.Message, 512)}
		return nil, nil
	case errors.Is(err, ErrUnclean): // it has seen to that itself
		j.t.log.Info().Err(err).Msg("judge")
		return &schemas.JudgeCase{Verdict: schemas.VerdictRuntimeError}, nil
	case err != nil:
		return nil, err
	}
	c := &schemas.JudgeCase{Verdict: o.verdict(true), JudgeUse: o.use}
	if c.Verdict == schemas.VerdictAccepted {
		expected, err := j.log.open(test.Expected, test.ExpectedBlob)
		if err != nil {
			return nil, err
		}
		defer expected.Close()
		right, err := answer.right(ctx, expected)
		if err != nil {
			return nil, err
		}
		c.Verdict = o.verdict(right)
	}
	if c.Verdict == schemas.VerdictRuntimeError {
		c.ExitCode, c.Signal = o.exit.Code, o.exit.Signal
	}
	return c, nil
}

// staged is how a stage ended.
type staged struct {
	exit             schemas.Exit
	use              schemas.JudgeUse
	late, oom, flood bool
}

// verdict says what came of it, given that the output is right or not.
func (o staged) verdict(right bool) schemas.Verdict {
	switch {
	case o.flood:
		return schemas.VerdictOutputLimit
	case o.oom:
		return schemas.VerdictMemoryLimit
	case o.late:
		return schemas.VerdictTimeLimit
	case o.exit.Code != 0:
		return schemas.VerdictRuntimeError
	case !right:
		return schemas.VerdictWrongAnswer
	}
	return schemas.VerdictAccepted
}

// stage runs a program to its end within its limits. An error says that there is nothing to judge:
// a *StartError or ErrUnclean, or that this worker could not.
func (j *judging) stage(ctx context.Context, s schemas.JudgeStage, stdin io.Reader, stdout, stderr io.Writer) (o staged, err error) {
	p, err := j.start(ctx, s)
	if err != nil {
		return o, err
	}
	defer p.Close()
	began := j.t.agent.rt.Now()
	stop := context.AfterFunc(ctx, func() { p.Stop(0) })
	defer stop()

	var streams sync.WaitGroup
	flooded := make(chan struct{})
	streams.Go(func() {
		if _, err := io.Copy(stdout, io.LimitReader(p.Stdout(), int64(s.Output))); err != nil {
			return
		}
		if n, _ := p.Stdout().Read(make([]byte, 1)); n > 0 {
			close(flooded)
			p.Stop(0)
		}
	})
	streams.Go(func() { // as much as to stdout may go to stderr, and what is more is dropped
		_, _ = io.Copy(stderr, io.LimitReader(p.Stderr(), int64(s.Output)))
		_, _ = io.Copy(io.Discard, p.Stderr())
	})
	streams.Go(func() {
		// Who reads no more gets no more. Of a blob it gets copies: sendfile(2) would put the pages
		// of the cache's own file into the pipe.
		_, _ = io.Copy(p.Stdin(), struct{ io.Reader }{stdin})
		_ = p.Stdin().Close()
	})
	thrashed := false
	o.late, thrashed = j.watch(p, s, began)
	wall := j.t.agent.rt.Now() - began
	streams.Wait()
	select {
	case <-flooded:
		o.flood = true
	default:
	}
	if o.exit, err = p.Exit(); err != nil {
		return o, err
	}
	used := p.Used()
	o.use = schemas.JudgeUse{CPUMillis: used.CPU.Milliseconds(), WallMillis: wall.Milliseconds(), Memory: used.Memory}
	o.late = o.late || used.CPU > s.CPU.Std()
	o.oom = used.OutOfMemory || thrashed
	return o, ctx.Err()
}

// start starts the program of a stage. What is in its way goes by itself: the init of a
// container whose agent has just been replaced, the processes of a program that is being killed.
func (j *judging) start(ctx context.Context, s schemas.JudgeStage) (Stage, error) {
	until := j.t.agent.rt.Now() + judgePatience
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, 250*time.Millisecond) {
		p, err := j.found.Stage(ctx, Command{Argv: s.Command, Stdio: StdioPipes}, s.Memory)
		again := errors.Is(err, ErrAway) || errors.Is(err, ErrBusy)
		if err == nil || !again || j.t.agent.rt.Now() >= until {
			return p, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// watch waits until the program is done, and ends it when it has had its time. It looks
// no sooner than its processes together can have used what is left. thrashed says that want of
// memory had taken its time.
func (j *judging) watch(p Stage, s schemas.JudgeStage, began time.Duration) (late, thrashed bool) {
	cpus := math.Min(math.Max(float64(j.t.needs.CPUs), 0.01), float64(runtime.NumCPU()))
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-p.Done():
			return late, thrashed
		case <-timer.C:
		}
		used := p.Used()
		left := s.CPU.Std() - used.CPU
		ends := s.Wall.Std() - (j.t.agent.rt.Now() - began)
		if late || left < 0 || ends <= 0 {
			thrashed = thrashed || !late && used.Thrashing
			late = true
			p.Stop(0)
			timer.Reset(250 * time.Millisecond) // in case that a kill was lost
			continue
		}
		timer.Reset(max(cpuLook, min(ends, time.Duration(float64(left)/cpus)+time.Millisecond)))
	}
}

// conclude makes of the container's end that of the judge, if that came to its own. The
// output of the task is that of the last test.
func (j *judging) conclude(end *schemas.End) {
	verdict := j.spec.Over(j.result)
	switch {
	case verdict != "":
		end.By, end.Reason, end.Exit = schemas.EndedItself, schemas.ReasonExit, &schemas.Exit{}
		end.Message = fmt.Sprintf("%s: %d of %d tests run", verdict, len(j.result.Cases), len(j.spec.Tests))
	case j.failed != nil:
		end.By, end.Reason, end.Exit, end.Message = j.failed.By, j.failed.Reason, j.failed.Exit, j.failed.Message
	default:
		end.Exit = nil
	}
	end.Stdout, end.Stderr = text(j.heads[0].String(), schemas.MaxInlineOutput), text(j.heads[1].String(), schemas.MaxInlineOutput)
}

// beginning keeps the first bytes that are written to it.
type beginning struct {
	mu   sync.Mutex
	most int
	buf  bytes.Buffer // under mu
}

func (h *beginning) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if room := h.most - h.buf.Len(); room > 0 {
		h.buf.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (h *beginning) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.buf.String()
}
