package docker

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

// console implements agent.Main. Init keeps a duplicate of what the agent writes to, the
// write end of stdin or the terminal's master, and hands it to the next agent. How much
// was written stands in a file beside the log, so that a client can go on where it was.
type console struct {
	a    *attempt
	note *os.File

	mu    sync.Mutex
	file  *os.File      // under mu: nil while init has not handed it over, and after its end
	ready chan struct{} // closed once file is there, or never will be
	told  bool          // under mu: ready is closed
	shut  bool          // under mu: stdin has its end
	fed   int64         // under mu
	torn  bool          // under mu: an agent was killed in the midst of a write
}

var _ agent.Main = (*console)(nil)

// Main implements agent.Attempt.
func (a *attempt) Main() agent.Main {
	if a.console == nil {
		return nil
	}
	return a.console
}

// newConsole makes what an interactive attempt has beside the others.
func (a *attempt) newConsole() error {
	if !a.meta.TTY && !a.meta.Input {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(a.dir, "stdin"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open count of stdin: %w", err)
	}
	c := &console{a: a, note: f, ready: make(chan struct{})}
	var b [16]byte
	if n, _ := f.ReadAt(b[:], 0); n == len(b) {
		next := int64(binary.LittleEndian.Uint64(b[:8]))
		c.fed = int64(binary.LittleEndian.Uint64(b[8:]))
		c.torn = next != c.fed && !a.meta.TTY
		if a.meta.TTY { // a key that was perhaps not pressed is better than one that was pressed twice
			c.fed = next
		}
	}
	a.console = c
	a.spool.tail = &agent.Tail{}
	return nil
}

// opens takes over what is written to; nil says that there is nothing any more.
func (c *console) opens(f *os.File) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.told:
		if f != nil {
			_ = f.Close()
		}
		return
	case f == nil:
		c.shut = true
	}
	c.file, c.told = f, true
	close(c.ready)
}

// interrupt ends a write that waits, and those to come.
func (c *console) interrupt() {
	c.mu.Lock()
	f := c.file
	c.mu.Unlock()
	if f != nil {
		_ = f.SetDeadline(time.Unix(1, 0))
	}
	c.opens(nil)
}

func (c *console) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.file != nil {
		_ = c.file.Close()
		c.file = nil
	}
	_ = c.note.Close()
}

// Fed implements agent.Main.
func (c *console) Fed() (int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.torn {
		return c.fed, agent.ErrTorn
	}
	return c.fed, nil
}

// Write implements agent.Main. There is one at a time.
func (c *console) Write(ctx context.Context, p []byte) (n int, err error) {
	select {
	case <-c.ready:
	case <-c.a.done:
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	c.mu.Lock()
	f := c.file
	c.mu.Unlock()
	if f == nil || !c.a.meta.Input {
		return 0, os.ErrClosed
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	e := raw.Write(func(fd uintptr) bool {
		c.wrote(0, len(p))
		n, err = unix.Write(int(fd), p) // without the lock: an init that was taken over may make it wait
		for err == unix.EINTR {
			n, err = unix.Write(int(fd), p)
		}
		c.wrote(max(n, 0), 0)
		return err != unix.EAGAIN
	})
	return max(n, 0), errors.Join(e, err)
}

// wrote writes down how much the process has, and how much it will have in a moment: an
// agent that finds them different knows that a write was broken off.
func (c *console) wrote(now, next int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fed += int64(now)
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:8], uint64(c.fed+int64(next)))
	binary.LittleEndian.PutUint64(b[8:], uint64(c.fed))
	_, _ = c.note.WriteAt(b[:], 0)
}

// CloseInput implements agent.Main. A terminal's input has no end but Ctrl-D.
func (c *console) CloseInput() {
	if c.a.meta.TTY {
		return
	}
	c.mu.Lock()
	c.shut = true
	if c.file != nil {
		_ = c.file.Close()
		c.file = nil
	}
	c.mu.Unlock()
	c.a.send(initproto.Request{Op: initproto.OpShut})
}

func (c *console) isShut() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.shut
}

// Resize implements agent.Main.
func (c *console) Resize(w agent.Window) error {
	if !c.a.meta.TTY {
		return errNoTerminal
	}
	select {
	case <-c.ready:
	default:
		return agent.ErrAway
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.file == nil {
		return agent.ErrAway
	}
	return resize(c.file, w)
}

// Signal implements agent.Main.
func (c *console) Signal(sig syscall.Signal) error {
	c.a.send(initproto.Request{Op: initproto.OpSignal, Main: true, Signal: int(sig)})
	return nil
}

// End implements agent.Main.
func (c *console) End(stream schemas.Stream) int64 {
	kept, dropped := c.a.spool.Size(stream)
	return kept + dropped
}

// ReadAt implements agent.Main.
func (c *console) ReadAt(stream schemas.Stream, p []byte, off int64) (n int, at int64, err error) {
	s := c.a.spool
	if kept, dropped := s.Size(stream); off >= kept && dropped > 0 {
		begin := s.tailBegin(stream)
		n, at, err = s.tail.ReadAt(stream, p, off-begin)
		return n, at + begin, err
	}
	n, err = s.ReadAt(stream, p, off)
	return n, off, err
}

// Hold implements agent.Main.
func (c *console) Hold(at *[2]int64) { c.a.spool.hold(at) }

// relay moves what a terminal shows into the pipe of the log, whose bytes the next agent
// gets as well, until the terminal's end or a deadline on it.
func relay(terminal, pipe *os.File) {
	defer pipe.Close()
	from, err := terminal.SyscallConn()
	if err != nil {
		return
	}
	to, err := pipe.SyscallConn()
	if err != nil {
		return
	}
	for {
		var full, over bool
		err := from.Read(func(r uintptr) bool {
			for {
				var n int64
				var err error
				e := to.Control(func(w uintptr) {
					n, err = unix.Splice(int(r), nil, int(w), nil, pipeBytes, unix.SPLICE_F_NONBLOCK)
				})
				switch {
				case err == unix.EINTR:
				case err == unix.EAGAIN:
					full = polled(r, unix.POLLIN)
					return full
				case e != nil || err != nil || n == 0: // EIO: the other side is gone
					over = true
					return true
				}
			}
		})
		if err == nil && full {
			err = to.Write(func(w uintptr) bool { return polled(w, unix.POLLOUT) })
		}
		if err != nil || over {
			return
		}
	}
}

func polled(fd uintptr, events int16) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: events}}
	n, _ := unix.Poll(p, 0)
	return n > 0
}

// writeEnd opens the end of a pipe that is written, by the one that is read.
func writeEnd(read *os.File) (f *os.File, err error) {
	raw, err := read.SyscallConn()
	if err != nil {
		return nil, err
	}
	e := raw.Control(func(r uintptr) { f, err = writeEndOf(int(r)) })
	return f, errors.Join(e, err)
}

// writeEndOf opens the end of a pipe that is written, by either end. What others have of the
// pipe cannot make this one wait: flags are of one opening.
func writeEndOf(fd int) (*os.File, error) {
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open a pipe again: %w", err)
	}
	return os.NewFile(uintptr(fd), "pipe"), nil
}

// adoptInput takes the write end of stdin that init handed back, after a look at it.
func adoptInput(fd int) (*os.File, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFIFO {
		err = errors.New("it is no pipe")
	}
	defer unix.Close(fd)
	var f *os.File
	if err == nil {
		f, err = writeEndOf(fd)
	}
	if err != nil {
		return nil, fmt.Errorf("descriptor from init: %w", err)
	}
	return f, nil
}

// runEnds are the ends of a run's pipes.
type runEnds struct {
	sent   []*os.File  // to init, in the order of the protocol
	theirs []*os.File  // of which the agent keeps none of these
	reads  [2]*os.File // the agent's: what the process writes
	input  *os.File    // the agent's: its stdin, where clients write it
}

func (e *runEnds) closeOurs() {
	for _, f := range []*os.File{e.reads[0], e.reads[1], e.input} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// openRun makes the pipes of a run. On a terminal stdout's pipe takes what that shows.
func openRun(r initproto.Request, stdin string, uid, gid int) (e runEnds, err error) {
	var writes [2]*os.File
	for i := range e.reads {
		p, err := newPipe(uid, gid)
		if err != nil {
			return e, err
		}
		e.reads[i], writes[i] = p.read, p.write
		e.theirs = append(e.theirs, p.write)
	}
	if r.Tty != nil {
		e.sent = e.reads[:]
		return e, nil
	}
	if !r.Input {
		in, err := stdinFile(stdin)
		if err != nil {
			return e, err
		}
		e.theirs = append(e.theirs, in)
		e.sent = []*os.File{in, writes[0], writes[1], e.reads[0], e.reads[1]}
		return e, nil
	}
	p, err := newInput(uid, gid)
	if err != nil {
		return e, err
	}
	e.theirs = append(e.theirs, p.read, p.write)
	e.sent = []*os.File{p.read, writes[0], writes[1], e.reads[0], e.reads[1], p.write}
	e.input, err = writeEnd(p.read)
	return e, err
}

// openTerminal begins with the terminal of a process that was just started.
func (a *attempt) openTerminal(fd int, reads [2]*os.File) error {
	f, err := adoptTerminal(fd)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil && a.hungUp {
		_ = f.Close()
		err = os.ErrClosed
	}
	if err != nil { // release closes them
		a.pumpLocked(reads, nil)
		return err
	}
	a.console.opens(f)
	a.pumpLocked(reads, a.terminalLocked(reads))
	return nil
}

// terminalLocked gives what relay writes to, nil where there is no terminal.
func (a *attempt) terminalLocked(pipes [2]*os.File) *os.File {
	if a.console == nil || !a.meta.TTY || a.console.file == nil || pipes[0] == nil {
		return nil
	}
	w, err := writeEnd(pipes[0])
	if err != nil {
		a.log().Warn().Err(err).Msg("what the terminal shows is lost")
		return nil
	}
	return w
}

// adoptConsole takes from a hello what the process reads from. A hello before the run has
// nothing, and says nothing.
func (a *attempt) adoptConsole(g *greeting) {
	if g.hello.Phase == initproto.PhaseIdle {
		return
	}
	name, adopt := initproto.FileStdin, adoptInput
	if a.meta.TTY {
		name, adopt = initproto.FileTerminal, adoptTerminal
	}
	fd, ok := g.files[name]
	if !ok {
		a.console.opens(nil)
		return
	}
	delete(g.files, name)
	f, err := adopt(fd)
	if err != nil {
		a.log().Warn().Err(err).Msg("a console is lost")
	}
	a.console.opens(f) // the one that is there already stays
}
