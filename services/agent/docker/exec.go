package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/files"
	"dayfly.dev/services/agent/initproto"
)

const (
	// restWithin is for the output of processes that a program has left behind.
	restWithin = time.Second
	// filesGrace is for what files writes to tidy up when its agent is gone.
	filesGrace = 5 * time.Second
)

// foreground implements agent.Foreground.
type foreground struct {
	a        *attempt
	id       uint64
	stdin    *os.File // or the terminal
	reads    [2]*os.File
	terminal bool
	grace    time.Duration // between TERM and KILL when it is closed
	done     chan struct{}
	exit     schemas.Exit   // once done is closed
	said     initproto.Exit // once done is closed: as init told of it
	err      error          // once done is closed
	closing  sync.Once
}

// Exec implements agent.Attempt.
func (a *attempt) Exec(ctx context.Context, c agent.Command) (agent.Foreground, error) {
	p, err := a.exec(ctx, initproto.Request{Op: initproto.OpExec, Argv: c.Argv, Env: c.Env, Dir: c.Dir}, c.Stdio, c.Window)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// Files implements agent.Attempt.
func (a *attempt) Files(ctx context.Context, r files.Request) (agent.Foreground, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	argv := []string{initproto.InitPath, initproto.FilesMode, string(b)}
	p, err := a.exec(ctx, initproto.Request{Op: initproto.OpExec, Argv: argv, Bare: true, Grace: filesGrace}, agent.StdioPipes, agent.Window{})
	if err != nil {
		return nil, err
	}
	p.grace = filesGrace
	return agent.Framed(p, r), nil
}

func (a *attempt) exec(ctx context.Context, req initproto.Request, stdio agent.Stdio, window agent.Window) (*foreground, error) {
	p := &foreground{a: a, done: make(chan struct{})}
	theirs, err := p.open(stdio)
	defer func() {
		for _, f := range theirs {
			_ = f.Close()
		}
	}()
	if err != nil {
		p.closeStreams()
		return nil, err
	}
	var fds []int
	for _, f := range theirs {
		fds = append(fds, int(f.Fd()))
	}
	if stdio == agent.StdioTerminal {
		req.Tty = &initproto.Window{Rows: window.Rows, Cols: window.Cols}
	}
	id, answers, err := a.call(req, fds...)
	if err != nil {
		p.closeStreams()
		return nil, err
	}
	p.id = id
	ctx, cancel := context.WithTimeout(ctx, callWithin)
	defer cancel()
	m, err := next(ctx, answers)
	if err == nil {
		err = p.started(m, stdio)
	}
	if err != nil || !a.rt.goDo(func() { p.wait(answers) }) {
		a.send(initproto.Request{Op: initproto.OpEnd, ID: id})
		a.end(id, answers)
		p.closeStreams()
		if err == nil {
			err = errClosed
		}
		return nil, err
	}
	return p, nil
}

// open makes the program's streams, and gives those ends that are for init.
func (p *foreground) open(stdio agent.Stdio) (theirs []*os.File, err error) {
	switch stdio {
	case agent.StdioTerminal:
		return nil, nil
	case agent.StdioNone:
		for range 3 {
			null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			if err != nil {
				return theirs, err
			}
			theirs = append(theirs, null)
		}
		return theirs, nil
	}
	p.a.mu.Lock()
	uid, gid := p.a.uid, p.a.gid
	p.a.mu.Unlock()
	in, err := newInput(uid, gid)
	if err != nil {
		return nil, err
	}
	theirs, p.stdin = append(theirs, in.read), in.write
	for i := range p.reads {
		out, err := newPipe(uid, gid)
		if err != nil {
			return theirs, err
		}
		theirs, p.reads[i] = append(theirs, out.write), out.read
	}
	return theirs, nil
}

// started takes init's word that the program runs, and its terminal.
func (p *foreground) started(m answer, stdio agent.Stdio) error {
	want := 0
	if stdio == agent.StdioTerminal {
		want = 1
	}
	if m.Event != initproto.EventStarted || len(m.fds) != want {
		initproto.CloseAll(m.fds)
		return errors.New("init answers an exec with something else")
	}
	if want == 0 {
		return nil
	}
	terminal, err := adoptTerminal(m.fds[0])
	if err != nil {
		return err
	}
	p.terminal, p.stdin, p.reads[0] = true, terminal, terminal
	return nil
}

// adoptTerminal takes a terminal's master from init, after a look at what it is.
func adoptTerminal(fd int) (*os.File, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(5, 2)) {
		err = errors.New("it is no terminal")
	}
	if err == nil {
		_, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("descriptor from init: %w", err)
	}
	return os.NewFile(uintptr(fd), "terminal"), nil
}

// wait waits for the program's end. Its answers end with the connection, and so with
// the runtime.
func (p *foreground) wait(answers <-chan answer) {
	m, err := next(context.Background(), answers)
	initproto.CloseAll(m.fds)
	switch {
	case err != nil:
		p.err = err
	case m.Event == initproto.EventExited && m.Exit != nil:
		p.exit, p.said = *exitOf(*m.Exit), *m.Exit
		p.a.setTidy(m.Tidy)
	default:
		p.err = errors.New("init answers an exec with something else")
	}
	p.a.end(p.id, answers)
	for _, r := range p.reads {
		if r != nil {
			_ = r.SetReadDeadline(time.Now().Add(restWithin))
		}
	}
	if p.stdin != nil {
		_ = p.stdin.SetWriteDeadline(time.Unix(1, 0))
	}
	close(p.done)
}

func (p *foreground) Signal(sig syscall.Signal) error {
	select {
	case <-p.done:
		return os.ErrProcessDone
	default:
	}
	p.a.send(initproto.Request{Op: initproto.OpSignal, ID: p.id, Signal: int(sig)})
	return nil
}

func (p *foreground) Stop(grace time.Duration) {
	select {
	case <-p.done: // its id may be another's on a new connection
	default:
		p.a.send(initproto.Request{Op: initproto.OpEnd, ID: p.id, Grace: grace})
	}
}

func (p *foreground) Done() <-chan struct{} { return p.done }

func (p *foreground) Exit() (schemas.Exit, error) { return p.exit, p.err }

func (p *foreground) Stdin() io.WriteCloser {
	switch {
	case p.stdin == nil:
		return nil
	case p.terminal:
		return terminalInput{p.stdin}
	}
	return p.stdin
}

// terminalInput is a terminal's input, which has no end but Ctrl-D.
type terminalInput struct{ io.Writer }

func (terminalInput) Close() error { return nil }

func (p *foreground) Stdout() io.Reader { return p.output(0) }

func (p *foreground) Stderr() io.Reader { return p.output(1) }

func (p *foreground) output(i int) io.Reader {
	if p.reads[i] == nil {
		return nil
	}
	return &output{f: p.reads[i], rest: -1}
}

// output reads what a program writes. Once its read deadline is over it gives what is
// there then, and ends: what the program has left behind may write on.
type output struct {
	f    *os.File
	rest int // to be read; -1 before the deadline
}

func (o *output) Read(b []byte) (n int, err error) {
	n, err = o.f.Read(b)
	if errors.Is(err, unix.EIO) { // a terminal whose other side is gone
		return n, io.EOF
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return n, err
	}
	raw, err := o.f.SyscallConn()
	if err != nil {
		return 0, err
	}
	e := raw.Control(func(fd uintptr) {
		if o.rest < 0 {
			o.rest, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		}
		if b = b[:min(len(b), max(0, o.rest))]; err == nil && len(b) > 0 {
			n, err = unix.Read(int(fd), b)
		}
	})
	if e != nil {
		return 0, e
	}
	if n <= 0 || err != nil {
		return 0, io.EOF
	}
	o.rest -= n
	return n, nil
}

func (p *foreground) Resize(w agent.Window) error {
	if !p.terminal {
		return errNoTerminal
	}
	return resize(p.stdin, w)
}

var errNoTerminal = errors.New("it has no terminal")

func resize(terminal *os.File, w agent.Window) error {
	raw, err := terminal.SyscallConn()
	if err != nil {
		return err
	}
	e := raw.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: w.Rows, Col: w.Cols})
	})
	return errors.Join(e, err)
}

func (p *foreground) Close() error {
	p.closing.Do(func() {
		p.Stop(p.grace)
		p.closeStreams()
	})
	return nil
}

func (p *foreground) closeStreams() {
	for _, f := range []*os.File{p.stdin, p.reads[0], p.reads[1]} {
		if f != nil {
			_ = f.Close()
		}
	}
}
