package fakeruntime

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/files"
	"dayfly.dev/services/agent/initproto"
)

// program is a function that stands for a program beside the task's process: echo,
// exit, sleep, cat, spam, term-exit and ignore-term, as the guest has them, and files.
// It implements agent.Foreground and agent.Background.
type program struct {
	a       *attempt
	id      string
	command agent.Command
	started time.Duration
	tail    agent.Tail

	in     io.Reader    // what the function reads
	theirs [2]io.Writer // what it writes to
	ends   []*os.File   // of pipes, closed when it ends
	pipes  [3]*os.File  // the other ends, in order; nil where there is none

	term  chan struct{} // closed by TERM
	dead  chan struct{} // closed by KILL
	done  chan struct{}
	once  [2]sync.Once
	timer *time.Timer  // under a.r.mu: KILL
	exit  schemas.Exit // once done is closed
}

// newProgram runs under a.r.mu.
func (a *attempt) newProgram(c agent.Command, at time.Duration) *program {
	p := &program{a: a, command: c, started: at, in: strings.NewReader(""), term: make(chan struct{}), dead: make(chan struct{}), done: make(chan struct{})}
	for i := range p.theirs {
		p.theirs[i] = io.Discard
	}
	return p
}

func (p *program) openPipes(terminal bool) error {
	for i := range p.pipes {
		r, w, err := os.Pipe()
		if err != nil {
			p.closePipes()
			return err
		}
		if i == 0 {
			p.in, p.pipes[0] = r, w
			p.ends = append(p.ends, r)
			continue
		}
		p.theirs[i-1], p.pipes[i] = w, r
		p.ends = append(p.ends, w)
		if terminal {
			p.theirs[1] = w
			break
		}
	}
	return nil
}

func (p *program) closePipes() {
	for _, f := range append(p.ends, p.pipes[:]...) {
		if f != nil {
			_ = f.Close()
		}
	}
}

// start runs f until it returns, or the program is killed.
func (p *program) start(f func() int, run <-chan struct{}) {
	go func() { // ends with f, which ends when its pipes are closed
		select {
		case <-run:
			p.kill()
		case <-p.a.done:
			p.kill()
		case <-p.a.r.closed:
			p.kill()
		case <-p.done:
		}
	}()
	go func() {
		p.exit.Code = f()
		select {
		case <-p.dead:
			p.exit = schemas.Exit{Code: 137, Signal: 9}
		default:
			if p.exit.Code > 128 {
				p.exit.Signal = p.exit.Code - 128
			}
		}
		for _, f := range p.ends {
			_ = f.Close()
		}
		p.a.r.mu.Lock()
		defer p.a.r.mu.Unlock()
		alive := false
		select {
		case <-p.a.r.closed:
			alive = true // for the next agent
		default:
		}
		if p.id != "" && !alive {
			_ = p.a.r.journal.write(entry{At: p.a.r.Now(), Do: doQuit, Assignment: p.a.req.Assignment, Program: p.id, Exit: &p.exit})
			p.a.forgetEnded()
		}
		close(p.done)
		p.tail.Wake()
	}()
}

func (p *program) kill() {
	p.once[0].Do(func() {
		close(p.dead)
		for _, f := range p.ends { // it may wait for one
			_ = f.Close()
		}
	})
}

// Exec implements agent.Attempt.
func (a *attempt) Exec(_ context.Context, c agent.Command) (agent.Foreground, error) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	p, f, err := a.prepare(c)
	if err != nil {
		return nil, err
	}
	if c.Stdio != agent.StdioNone {
		if err := p.openPipes(c.Stdio == agent.StdioTerminal); err != nil {
			return nil, err
		}
	}
	p.start(f, a.runs)
	return p, nil
}

// Launch implements agent.Attempt.
func (a *attempt) Launch(_ context.Context, c agent.Command) (agent.Background, error) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	p, f, err := a.prepare(c)
	if err != nil {
		return nil, err
	}
	alive := 0
	for _, o := range a.backgrounds {
		if !o.over() {
			alive++
		}
	}
	if alive >= initproto.MaxKept {
		return nil, agent.ErrBusy
	}
	p.id = rand.Text()
	if err := a.r.journal.write(entry{At: p.started, Do: doLaunch, Assignment: a.req.Assignment, Program: p.id, Command: &c}); err != nil {
		return nil, err
	}
	p.launch(f, a.runs)
	return p, nil
}

// launch runs under a.r.mu.
func (p *program) launch(f func() int, run <-chan struct{}) {
	p.theirs = [2]io.Writer{tailWriter{&p.tail, schemas.Stdout}, tailWriter{&p.tail, schemas.Stderr}}
	p.a.backgrounds = append(p.a.backgrounds, p)
	p.start(f, run)
}

type tailWriter struct {
	tail   *agent.Tail
	stream schemas.Stream
}

func (w tailWriter) Write(p []byte) (int, error) {
	w.tail.Append(w.stream, p)
	return len(p), nil
}

// forgetEnded runs under r.mu.
func (a *attempt) forgetEnded() {
	ended := 0
	for i := len(a.backgrounds) - 1; i >= 0; i-- {
		if p := a.backgrounds[i]; p.over() {
			if ended++; ended > initproto.MaxEnded {
				a.backgrounds = slices.Delete(a.backgrounds, i, i+1)
			}
		}
	}
}

// prepare runs under r.mu.
func (a *attempt) prepare(c agent.Command) (*program, func() int, error) {
	if err := a.up(); err != nil {
		return nil, nil, err
	}
	size := 0
	for _, w := range c.Argv {
		size += len(w)
	}
	if len(c.Argv) == 0 || size > 16<<10 {
		return nil, nil, errors.New("no command, or one that is too long")
	}
	p := a.newProgram(c, a.r.Now())
	f, err := p.function()
	return p, f, err
}

func (p *program) function() (func() int, error) {
	c := p.command
	argv := c.Argv
	if filepath.Base(argv[0]) == "guest" {
		argv = argv[1:]
	}
	argv = append(slices.Clone(argv), "", "", "")
	pause := func(word string, code int, term <-chan struct{}) int {
		d, err := time.ParseDuration(word)
		if err != nil {
			d = 1000 * time.Hour
		}
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
			return code
		case <-term:
			return 143
		case <-p.dead:
			return 137
		}
	}
	switch filepath.Base(argv[0]) {
	case "echo":
		return func() int {
			fmt.Fprintln(p.theirs[0], strings.Join(c.Argv[1:], " "))
			return 0
		}, nil
	case "exit":
		return func() int { return number(argv[1]) }, nil
	case "sleep":
		return func() int { return pause(argv[1], number(argv[2]), p.term) }, nil
	case "ignore-term":
		return func() int {
			fmt.Fprintln(p.theirs[0], "ready")
			return pause(argv[1], 0, nil)
		}, nil
	case "term-exit":
		return func() int {
			fmt.Fprintln(p.theirs[0], "ready")
			if pause("", 0, p.term) == 137 {
				return 137
			}
			fmt.Fprintln(p.theirs[0], "term")
			return number(argv[1])
		}, nil
	case "cat":
		return func() int {
			_, _ = io.Copy(p.theirs[0], p.in)
			return 0
		}, nil
	case "spam":
		return func() int {
			left := number(argv[1])
			for i := 0; left > 0; i++ {
				line := fmt.Sprintf("o%062d\n", i)
				n, err := io.WriteString(p.theirs[0], line[:min(left, len(line))])
				if left -= n; err != nil {
					return 1
				}
			}
			return 0
		}, nil
	}
	return nil, &agent.StartError{Reason: schemas.ReasonNotFound, Exit: &schemas.Exit{Code: 127}, Message: "command not found: " + c.Argv[0]}
}

// Files implements agent.Attempt: in a folder on this machine, which is made when it is
// first asked for and goes with the attempt.
func (a *attempt) Files(_ context.Context, r files.Request) (agent.Foreground, error) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	if err := a.up(); err != nil {
		return nil, err
	}
	if err := a.makeFolder(); err != nil {
		return nil, err
	}
	root, err := os.Open(a.folder)
	if err != nil {
		return nil, err
	}
	p := a.newProgram(agent.Command{}, a.r.Now())
	if err := p.openPipes(false); err != nil {
		_ = root.Close()
		return nil, err
	}
	p.start(func() int {
		defer root.Close()
		res := files.Serve(int(root.Fd()), "/", r, p.in, p.theirs[0])
		_ = res.Write(p.theirs[1])
		return res.ExitCode()
	}, a.runs)
	return agent.Framed(p, r), nil
}

// makeFolder runs under a.r.mu.
func (a *attempt) makeFolder() error {
	if a.folder != "" {
		return nil
	}
	dir, err := os.MkdirTemp("", "dayfly-fake-")
	if err != nil {
		return err
	}
	a.folder = dir
	for _, d := range []string{"tmp", "/task/input", a.req.Spec.OutputPath()} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// leave writes files into the output folder, as the guest does. It runs under a.r.mu.
func (a *attempt) leave(n, size int) error {
	if err := a.makeFolder(); err != nil {
		return err
	}
	for i := range n {
		path := filepath.Join(a.folder, a.req.Spec.OutputPath(), fmt.Sprintf("file-%05d", i))
		if err := os.WriteFile(path, bytes.Repeat([]byte{byte('a' + i%26)}, size), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// OutputFolder implements agent.Attempt.
func (a *attempt) OutputFolder(context.Context) (*os.File, error) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	if a.folder == "" {
		return nil, nil
	}
	return os.Open(filepath.Join(a.folder, a.req.Spec.OutputPath()))
}

// Backgrounds implements agent.Attempt.
func (a *attempt) Backgrounds() []agent.Background {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	list := make([]agent.Background, len(a.backgrounds))
	for i, p := range a.backgrounds {
		list[i] = p
	}
	return list
}

func (p *program) over() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *program) ID() string { return p.id }

func (p *program) Command() agent.Command { return p.command }

func (p *program) StartedFor() time.Duration { return p.a.r.Now() - p.started }

func (p *program) Tail() *agent.Tail { return &p.tail }

func (p *program) Done() <-chan struct{} { return p.done }

func (p *program) Exit() (schemas.Exit, error) { return p.exit, nil }

// Signal knows TERM and KILL.
func (p *program) Signal(sig syscall.Signal) error {
	if p.over() {
		return os.ErrProcessDone
	}
	switch sig {
	case syscall.SIGTERM:
		p.once[1].Do(func() { close(p.term) })
	case syscall.SIGKILL:
		p.kill()
	}
	return nil
}

func (p *program) Stop(grace time.Duration) {
	if p.over() {
		return
	}
	if grace <= 0 {
		p.kill()
		return
	}
	_ = p.Signal(syscall.SIGTERM)
	p.a.r.mu.Lock()
	defer p.a.r.mu.Unlock()
	if p.timer != nil && !p.timer.Stop() {
		return
	}
	p.timer = time.AfterFunc(grace, p.kill)
}

func (p *program) Stdin() io.WriteCloser {
	if p.pipes[0] == nil {
		return nil
	}
	return p.pipes[0]
}

func (p *program) Stdout() io.Reader {
	if p.pipes[1] == nil {
		return nil
	}
	return p.pipes[1]
}

func (p *program) Stderr() io.Reader {
	if p.pipes[2] == nil {
		return nil
	}
	return p.pipes[2]
}

func (p *program) Resize(agent.Window) error {
	if p.command.Stdio != agent.StdioTerminal {
		return errors.New("it has no terminal")
	}
	return nil
}

func (p *program) Close() error {
	p.Stop(0)
	for _, f := range p.pipes {
		if f != nil {
			_ = f.Close()
		}
	}
	return nil
}

// removeFolder runs under r.mu.
func (a *attempt) removeFolder() {
	if a.folder != "" {
		_ = os.RemoveAll(a.folder)
		a.folder = ""
	}
}
