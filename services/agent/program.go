package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/files"
)

// What Dial, Exec, Launch and Files say that callers act on.
var (
	// ErrAway says nothing of the task: no run is there, or its init is out of reach for
	// the moment.
	ErrAway = errors.New("the task cannot be asked now")
	// ErrBusy says that so many are under way in the task that no more are taken.
	ErrBusy = errors.New("too many at a time in this task")
	// ErrRefused says that nobody listens on the port.
	ErrRefused = errors.New("connection refused: nobody listens on that port of the task")
)

// Conn is a connection to a port of a task. Each direction ends by itself.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// Command is a program to run beside the task's process.
type Command struct {
	Argv []string
	Env  []string // K=V, laid over the task's
	Dir  string   // "" is the task's working directory

	Stdio  Stdio  // of Exec
	Window Window // with StdioTerminal
}

// Stdio is how a program's input and output are connected.
type Stdio int

// The ways.
const (
	StdioNone     Stdio = iota // stdin is at its end, output is dropped
	StdioPipes                 // three streams
	StdioTerminal              // one, a terminal of the program's own session
)

// Window is the size of a terminal.
type Window struct{ Rows, Cols uint16 }

// Program is what runs beside the task's process. It ends at the latest with the run
// that it was started in.
type Program interface {
	// Signal sends one of the Signals to the program's process group.
	Signal(syscall.Signal) error
	// Stop sends TERM to all that the program has started, and KILL after grace, or once the
	// program itself has ended. It returns at once; a second call may only make it sooner.
	Stop(grace time.Duration)
	// Done is closed when the program has ended, or nobody can say any more whether it has.
	Done() <-chan struct{}
	// Exit says how it ended, once Done is closed. ErrAway: nobody knows, but it has ended
	// or is about to.
	Exit() (schemas.Exit, error)
}

// Signals are those that Signal sends.
var Signals = []syscall.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGKILL, syscall.SIGUSR1, syscall.SIGUSR2,
	syscall.SIGTERM, syscall.SIGCONT, syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGWINCH,
}

// Foreground is a program whose streams the caller holds. It is killed when the agent
// ends. Close must be called.
type Foreground interface {
	Program
	// Stdin is what the program reads; nil with StdioNone. Close is its end, save of a
	// terminal, where Ctrl-D is. A write fails once nobody reads.
	Stdin() io.WriteCloser
	// Stdout is what it writes; nil with StdioNone. It ends when all who could write are
	// gone, and after Done at the latest when what was written is read. What is not read
	// makes the program wait.
	Stdout() io.Reader
	// Stderr is nil but with StdioPipes.
	Stderr() io.Reader
	// Resize tells the terminal its new size.
	Resize(Window) error
	// Close kills what still runs, and closes the streams.
	Close() error
}

// Background is a program that goes on without anybody, through restarts of the agent
// too, until it ends, is stopped, or the run ends.
type Background interface {
	Program
	ID() string
	Command() Command
	StartedFor() time.Duration
	Tail() *Tail
}

// Framed is a program that serves a request of package files: its Stdin takes what is to
// be written, and Close says that it is all. Closed without that it changes nothing.
func Framed(p Foreground, r files.Request) Foreground {
	if !r.Framed() {
		return p
	}
	return framed{p, files.NewFrames(p.Stdin())}
}

type framed struct {
	Foreground
	in io.WriteCloser
}

func (f framed) Stdin() io.WriteCloser { return f.in }

// CutOff ends the input without saying that it was all, so that the program tells what
// it makes of that.
func (f framed) CutOff() error { return f.Foreground.Stdin().Close() }

// Execute runs a program to its end, or kills it when ctx ends. Its output goes to
// stdout and stderr, where nil drops it; nothing is written to them once Execute has
// returned. A program that is not there has the exit code 127, one that cannot be run 126.
func Execute(ctx context.Context, a Attempt, c Command, stdout, stderr io.Writer) (schemas.Exit, error) {
	c.Stdio = StdioNone
	if stdout != nil || stderr != nil {
		c.Stdio = StdioPipes
	}
	p, err := a.Exec(ctx, c)
	if fault, ok := errors.AsType[*StartError](err); ok && fault.Exit != nil {
		return *fault.Exit, nil
	}
	if err != nil {
		return schemas.Exit{}, err
	}
	defer p.Close()
	var copies sync.WaitGroup
	if c.Stdio == StdioPipes {
		_ = p.Stdin().Close()
		for _, s := range []struct {
			to   io.Writer
			from io.Reader
		}{{stdout, p.Stdout()}, {stderr, p.Stderr()}} {
			if s.to == nil {
				s.to = io.Discard
			}
			copies.Go(func() {
				if _, err := io.Copy(s.to, s.from); err != nil { // it shall not wait for a writer that fails
					p.Stop(0)
				}
			})
		}
	}
	stop := context.AfterFunc(ctx, func() { p.Stop(0) })
	<-p.Done()
	stop()
	copies.Wait()
	if ctx.Err() != nil {
		return schemas.Exit{}, context.Cause(ctx)
	}
	return p.Exit()
}

// ErrTorn says that nobody knows how much of a stdin the process was given: an agent was
// killed in the midst of a write.
var ErrTorn = errors.New("the worker's agent was killed while it wrote to stdin; how much of that has come is not known")

// Main is what clients that attach to the task's own process share: of a task whose
// process is on a terminal, or reads what clients write. It outlives the agent, and goes
// on from one run to the next.
type Main interface {
	// Fed is how many bytes of stdin the process was ever given, under earlier agents too.
	// The error is ErrTorn, or nil.
	Fed() (int64, error)
	// Write gives the process the beginning of p and says how much of it. It waits for room.
	// An error is for good: nobody reads any more, ctx has ended, or stdin is nobody's to write.
	Write(ctx context.Context, p []byte) (int, error)
	// CloseInput is the end of stdin, save of a terminal, where Ctrl-D is.
	CloseInput()
	// Resize tells the terminal its new size.
	Resize(Window) error
	// Signal sends one of the Signals to the main process's group, on a terminal to the one
	// that has it.
	Signal(syscall.Signal) error
	// End is how many bytes of a stream were ever written.
	End(schemas.Stream) int64
	// ReadAt reads a stream at the offset, or from the oldest byte behind it that is there, and
	// says where it has read: in the log, and behind its limit the newest 128 KiB. It
	// returns io.EOF at the present end. The attempt's Output tells of changes.
	ReadAt(stream schemas.Stream, p []byte, off int64) (n int, at int64, err error)
	// Hold says what who reads along has of both streams: behind the log's limit the process
	// waits for him. nil says that nobody reads along. The array is not changed afterwards.
	Hold(at *[2]int64)
}
