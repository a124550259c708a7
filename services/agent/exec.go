package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"dayfly.dev/schemas"
)

// maxExecs is how many programs in the foreground are known of one task at a time: more
// than it may run, since some wait for their clients to fetch the end.
const maxExecs = 64

// execution is a program in the foreground. Its streams belong to at most one session at
// a time, and what it writes waits here for a client that has lost its connection: the
// program is held back when as much as schemas.ExecWindow is not acknowledged.
type execution struct {
	id      schemas.ExecID
	of      *sessions
	task    Attempt
	open    schemas.ExecOpen
	program Foreground // nil if it could not be started
	main    Main       // of the task's own process: then there is no program
	started time.Duration

	mu       sync.Mutex
	changed  chan struct{}     // under mu: closed, and made anew, at each change
	out      [2]execOutput     // under mu: stdout, stderr
	in       []byte            // under mu: taken over, and not yet written to the program
	taken    int64             // under mu: bytes of stdin ever taken over
	fed      int64             // under mu: of which the program has so many
	inEnd    bool              // under mu: nothing more comes
	deaf     bool              // under mu: the program reads no more
	holder   *holder           // under mu: the session that has the streams
	since    time.Time         // under mu: when nobody had them any more
	ended    bool              // under mu: the program runs no more; what is left is for the client to take
	moved    time.Time         // under mu: when it ended, or the client last took anything
	left     bool              // under mu: the client will not come back
	dropping bool              // under mu: nobody wants the output, or can have it any more
	timedOut bool              // under mu
	exit     *schemas.ExecExit // under mu: the last word, once the output is complete
	lost     string            // under mu: the last word where there is no exit
	read     bool              // under mu: of the task's own process: nobody reads on for a client that comes now
}

// execOutput is the newest part of a stream.
type execOutput struct {
	buf   []byte
	end   int64 // of buf, counted from the first byte ever
	acked int64
}

func (o *execOutput) begin() int64 { return o.end - int64(len(o.buf)) }

func (o *execOutput) add(p []byte) {
	o.buf = append(o.buf, p...)
	o.end += int64(len(p))
	if len(o.buf) >= 2*schemas.ExecWindow {
		n := copy(o.buf, o.buf[len(o.buf)-schemas.ExecWindow:])
		o.buf = o.buf[:n]
	}
}

// exec starts a program; within bounds the start.
func (s *sessions) exec(ctx, within context.Context, t Attempt, o schemas.ExecOpen) (*execution, error) {
	e := &execution{id: schemas.ExecID(strings.ToLower(rand.Text())), of: s, task: t, open: o, started: s.agent.rt.Now(),
		changed: make(chan struct{}), since: time.Now()}
	s.mu.Lock()
	known := 0
	for _, other := range s.execs {
		if other.task == t {
			known++
		}
	}
	s.mu.Unlock()
	if known >= maxExecs {
		return nil, unable(ErrBusy)
	}
	c := Command{Argv: o.Argv, Env: o.Env, Dir: o.Workdir, Stdio: StdioPipes}
	if o.Terminal != nil {
		c.Stdio, c.Window = StdioTerminal, Window{o.Terminal.Rows, o.Terminal.Cols}
	}
	p, err := t.Exec(within, c)
	var fault *StartError
	switch {
	case errors.As(err, &fault) && fault.Exit != nil:
		e.exit = &schemas.ExecExit{Code: fault.Exit.Code, Message: fault.Message}
		e.ended, e.moved = true, time.Now()
	case err != nil:
		return nil, unable(err)
	default:
		e.program = p
	}
	s.mu.Lock()
	s.execs[e.id] = e
	s.mu.Unlock()
	s.agent.metrics.execs.Inc()
	if e.program != nil {
		s.serving.Go(func() { e.run(ctx) })
	}
	s.serving.Go(func() {
		e.keep(ctx)
		s.mu.Lock()
		delete(s.execs, e.id)
		s.mu.Unlock()
		s.agent.metrics.execs.Dec()
	})
	return e, nil
}

func (e *execution) wakeLocked() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// run carries the program's streams until it has ended, and says how. It also ends
// with ctx.
func (e *execution) run(ctx context.Context) {
	p := e.program
	defer p.Close()
	stop := context.AfterFunc(ctx, func() { _ = p.Close() })
	defer stop()
	if t := e.open.Timeout.Std(); t > 0 {
		timer := time.AfterFunc(t, func() {
			e.mu.Lock()
			e.timedOut = true
			e.mu.Unlock()
			p.Stop(0)
		})
		defer timer.Stop()
	}
	var outputs, input sync.WaitGroup
	for i, r := range []io.Reader{p.Stdout(), p.Stderr()} {
		if r != nil {
			outputs.Go(func() { e.pump(ctx, i, r) })
		}
	}
	input.Go(func() { e.feed(p) })
	<-p.Done()
	e.mu.Lock()
	e.deaf, e.ended, e.moved = true, true, time.Now()
	e.wakeLocked()
	e.mu.Unlock()
	outputs.Wait()
	exit, err := p.Exit()
	e.mu.Lock()
	switch {
	case ctx.Err() != nil:
		e.lost = "the worker's agent went down, and the program with it"
	case err != nil:
		e.lost = "the task has ended, and the program with it"
	default:
		e.exit = &schemas.ExecExit{Code: exit.Code, Signal: exit.Signal, TimedOut: e.timedOut}
	}
	e.wakeLocked()
	e.mu.Unlock()
	_ = p.Close() // a write to it may hang
	input.Wait()
}

// pump takes what the program writes, as long as there is room.
func (e *execution) pump(ctx context.Context, i int, r io.Reader) {
	b := make([]byte, 32<<10)
	for {
		e.mu.Lock()
		o := &e.out[i]
		room := schemas.ExecWindow - (o.end - o.acked)
		dropping, changed := e.dropping, e.changed
		e.mu.Unlock()
		if dropping {
			room = int64(len(b))
		}
		if room <= 0 {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return
			}
		}
		n, err := r.Read(b[:min(int64(len(b)), room)])
		e.mu.Lock()
		if n > 0 {
			o.add(b[:n])
			e.wakeLocked()
		}
		e.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// feed writes to the program what was taken over, until its end.
func (e *execution) feed(p Foreground) {
	in := p.Stdin()
	if in == nil {
		return
	}
	if !e.open.Stdin && e.open.Terminal == nil {
		_ = in.Close()
		return
	}
	for {
		e.mu.Lock()
		b, end, deaf, changed := e.in[:min(len(e.in), 32<<10)], e.inEnd, e.deaf, e.changed
		e.mu.Unlock()
		switch {
		case deaf:
			return
		case len(b) > 0:
			_, err := in.Write(b)
			e.mu.Lock()
			e.in, e.fed = e.in[len(b):], e.fed+int64(len(b))
			if len(e.in) == 0 {
				e.in = nil
			}
			e.deaf = e.deaf || err != nil
			e.wakeLocked()
			e.mu.Unlock()
		case end:
			_ = in.Close()
			return
		default:
			<-changed
		}
	}
}

// keep waits until the program is of no use to anybody any more, and ends it then.
func (e *execution) keep(ctx context.Context) {
	for {
		e.mu.Lock()
		changed, held, left := e.changed, e.holder != nil, e.left
		over := e.exit != nil || e.lost != ""
		wait, bounded := e.of.agent.cfg.ExecKeep-time.Since(e.since), true
		if held {
			wait, bounded = e.patienceLocked()
		}
		useless := left || !held && (wait <= 0 || ctx.Err() != nil)
		if useless { // it may wait to write
			e.dropping = true
			e.wakeLocked()
		}
		e.mu.Unlock()
		if useless {
			if !over {
				e.hangUp(ctx)
			}
			return
		}
		done := ctx.Done()
		if held { // its session ends with ctx
			done = nil
		}
		await(changed, done, wait, bounded)
	}
}

// patienceLocked says how long the client that has the streams may still take nothing of what
// is left of a program that is over, and whether there is such a bound. When it is reached the
// session ends, so that its place is free.
func (e *execution) patienceLocked() (wait time.Duration, bounded bool) {
	if !e.ended || e.holder == nil {
		return 0, false
	}
	if wait = e.of.agent.cfg.ExecKeep - time.Since(e.moved); wait <= 0 {
		e.holder.end(errIdle)
		e.moved = time.Now() // it is on its way out
		wait = e.of.agent.cfg.ExecKeep
	}
	return wait, true
}

// await waits for a change or the end, or so long.
func await(changed, done <-chan struct{}, wait time.Duration, bounded bool) {
	var late <-chan time.Time
	if bounded {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-changed:
	case <-late:
	case <-done:
	}
}

// hangUp does what the end of a terminal does, and kills what that does not end.
func (e *execution) hangUp(ctx context.Context) {
	if e.open.Keep {
		_ = e.program.Signal(syscall.SIGHUP)
		grace := time.NewTimer(e.of.agent.cfg.ExecGrace)
		defer grace.Stop()
		select {
		case <-e.program.Done():
		case <-grace.C:
		case <-ctx.Done():
		}
	}
	_ = e.program.Close()
}

// find gives a program in the foreground of the task.
func (s *sessions) find(t Attempt, id schemas.ExecID) (*execution, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.execs[id]; e != nil && e.task == t {
		return e, nil
	}
	return nil, refuse(schemas.CodeNotFound, "there is no such program in this task: it has ended, or its client was away for too long, or its agent was started anew")
}

// launch starts a program in the background.
func (s *sessions) launch(ctx context.Context, t Attempt, o schemas.ExecOpen) (schemas.ExecID, error) {
	b, err := t.Launch(ctx, Command{Argv: o.Argv, Env: o.Env, Dir: o.Workdir})
	if err != nil {
		return "", unable(err)
	}
	return schemas.ExecID(b.ID()), nil
}

// list tells of the task's programs, or of one of them with what it wrote last.
func (s *sessions) list(t Attempt, id schemas.ExecID) (schemas.ExecList, error) {
	list := schemas.ExecList{Items: []schemas.Exec{}}
	for _, b := range t.Backgrounds() {
		if id == "" || b.ID() == string(id) {
			list.Items = append(list.Items, tellBackground(b, id != ""))
		}
	}
	s.mu.Lock()
	var held []*execution
	for _, e := range s.execs {
		if e.task == t && (id == "" || e.id == id) {
			held = append(held, e)
		}
	}
	s.mu.Unlock()
	for _, e := range held {
		list.Items = append(list.Items, e.tell())
	}
	slices.SortStableFunc(list.Items, func(a, b schemas.Exec) int { return int(b.Age - a.Age) })
	if id != "" && len(list.Items) == 0 {
		_, err := s.find(t, id)
		return list, err
	}
	return list, nil
}

func (e *execution) tell() schemas.Exec {
	e.mu.Lock()
	defer e.mu.Unlock()
	x := schemas.Exec{ID: e.id, Command: e.open.Argv, Terminal: e.open.Terminal != nil, Attached: e.holder != nil,
		Age: schemas.Duration((e.of.agent.rt.Now() - e.started).Round(time.Millisecond)), Running: e.exit == nil && e.lost == "",
		StdoutBytes: e.out[0].end, StderrBytes: e.out[1].end}
	if e.exit != nil {
		x.Exit = &schemas.Exit{Code: e.exit.Code, Signal: e.exit.Signal, TimedOut: e.exit.TimedOut}
	}
	return x
}

func tellBackground(b Background, whole bool) schemas.Exec {
	x := schemas.Exec{ID: schemas.ExecID(b.ID()), Command: b.Command().Argv, Background: true, Running: true, Age: schemas.Duration(b.StartedFor().Round(time.Millisecond))}
	select {
	case <-b.Done():
		x.Running = false
		if exit, err := b.Exit(); err == nil {
			x.Exit = &exit
		}
	default:
	}
	tail := b.Tail()
	_, x.StdoutBytes = tail.Size(schemas.Stdout)
	_, x.StderrBytes = tail.Size(schemas.Stderr)
	if whole {
		x.Stdout, x.StdoutBase64 = schemas.Text(tail.all(schemas.Stdout))
		x.Stderr, x.StderrBase64 = schemas.Text(tail.all(schemas.Stderr))
	}
	return x
}

// end ends a program, wherever it runs.
func (s *sessions) end(t Attempt, id schemas.ExecID, grace time.Duration) error {
	for _, b := range t.Backgrounds() {
		if b.ID() == string(id) {
			b.Stop(grace)
			return nil
		}
	}
	e, err := s.find(t, id)
	if err == nil && e.program != nil {
		e.program.Stop(grace)
	}
	return err
}
