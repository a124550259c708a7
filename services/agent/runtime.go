package agent

import (
	"context"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/files"
)

// Runtime runs attempts on one host. There are two: services/agent/docker, and an
// in-memory one in services/agent/fakeruntime; services/agent/runtimetest is the
// suite that both pass.
//
// Recover is called once, before anything else; then Permit, so that what was
// recovered may go on. All methods may be called from several goroutines.
type Runtime interface {
	// Host says what the machine offers. It is asked once for each registration.
	Host(ctx context.Context) (schemas.Host, error)

	// Recover takes back the attempts that an earlier agent of this worker started and
	// that still have a container or a state folder: running ones and those that have
	// ended. Containers of this worker that no attempt can be made of are removed.
	Recover(ctx context.Context) ([]Attempt, error)

	// Image makes the task's image present and says which one it is. progress may be
	// called with a sentence such as "pulling busybox: 3.1 of 12 MiB". An error that is
	// the image's own fault is a *StartError.
	Image(ctx context.Context, spec schemas.Spec, progress func(string)) (Image, error)

	// Start creates the container and starts the task's process in it. When it returns
	// an Attempt the process has been started; when it returns an error nothing of the
	// attempt is left (what could not be removed yet is removed in the background). An
	// error that is the task's own fault is a *StartError; any other says that this
	// worker could not, and another may. A start that ctx ends leaves nothing behind.
	//
	// The process is never started after the permit's end, whatever on_lost says.
	Start(ctx context.Context, req StartRequest) (Attempt, error)

	// Permit lets the attempts run until then, on the clock Now of this runtime. Attempts
	// that do not need a permit (StartRequest.NoPermit) are not ended by it.
	Permit(until time.Duration) error

	// Now is CLOCK_BOOTTIME: it goes on while the machine sleeps.
	Now() time.Duration

	// Close gives up what this process holds (sockets, descriptors) and leaves the
	// containers running for the next agent to recover.
	Close() error
}

// Image is an image that is present on the host.
type Image struct {
	Ref    string // as the task named it
	ID     string // content address, "sha256:…": what containers are made of
	Digest string // repository digest, if it has one
	Bytes  int64
	Port   int // the lowest TCP port that it exposes; 0 if none
}

// StartRequest is everything that Start needs.
type StartRequest struct {
	Assignment schemas.Assignment
	Spec       schemas.Spec
	Image      Image
	TimeLeft   time.Duration // until the deadline, counted from the start of the process
	NoPermit   bool          // on_lost: wait
	Grace      time.Duration // between TERM and KILL when the deadline passes, or the task is unhealthy
	GPUs       []int         // the devices that are its own, by their numbers on this host
	LogLimit   int64         // bytes of stdout and stderr together that are kept
}

// Attempt is one container and what runs in it: the task's process with all that it
// starts, and after it, where the restart policy or a client says so, another. The runtime
// obeys the policy without the agent's help.
type Attempt interface {
	Assignment() schemas.Assignment

	// StartedFor is how long ago the process was started, by the host's clock; false
	// if it never was (a recovered attempt whose start was broken off).
	StartedFor() (time.Duration, bool)

	// Run says which run is the present one. The channel is closed at the next change of
	// it, and when the attempt is done.
	Run() (RunState, <-chan struct{})

	// Fail ends the run with that many restarts before it, if it is still the present one,
	// with the grace of the start. It counts as a failure whatever its exit code is; if
	// none follows it, the attempt has ended by itself, with the reason unhealthy.
	Fail(restarts int)

	// Restart runs the command again, whatever the restart policy says, unless there were
	// so many restarts already: twice is as once. The present run ends with the grace of
	// the start; between two runs the next one begins. It survives the agent.
	Restart(to int)

	// Dial connects to a port on the task's own loopback interface: ErrRefused where nobody
	// listens.
	Dial(ctx context.Context, port int) (Conn, error)

	// Exec starts a program beside the task's process, with the task's rights and its
	// environment. ctx is of the start alone. A program that is not there, or cannot be run,
	// is a *StartError with the exit code that a shell would give.
	Exec(ctx context.Context, c Command) (Foreground, error)

	// Launch starts a program in the background, with nothing to read.
	Launch(ctx context.Context, c Command) (Background, error)

	// Backgrounds lists the programs in the background: those that run, and the last of
	// those that have ended, oldest first.
	Backgrounds() []Background

	// Files starts the program that reads and writes the task's files, with the task's
	// rights. Its streams are what package files says.
	Files(ctx context.Context, r files.Request) (Foreground, error)

	// Done is closed when no process of the attempt is left, its pipes are drained into
	// Output, and Outcome is known.
	Done() <-chan struct{}

	// Outcome says how it ended. It is valid once Done is closed, and never changes.
	Outcome() Outcome

	// Stop sends TERM to every process, and KILL after grace. It returns at once; a
	// second call may shorten the grace, never lengthen it.
	Stop(grace time.Duration)

	// SetDeadline moves the deadline to timeLeft from now. It survives the agent.
	SetDeadline(timeLeft time.Duration) error

	// Output is what the attempt has written so far.
	Output() Output

	// Remove takes the container and the state folder away. It may be called again
	// after an error, and ends a running attempt.
	Remove(ctx context.Context) error
}

// RunState is the present run of the task's process.
type RunState struct {
	Restarts int
	Up       bool          // false between two runs and after the last
	Last     *schemas.Exit // how the last run that is over ended; nil while there is none
}

// Outcome is how an attempt ended.
type Outcome struct {
	By      schemas.EndedBy
	Reason  schemas.Reason
	Message string // a sentence for people, "" if the reason says it all
	Exit    *schemas.Exit
	Usage   schemas.Usage
}

// Output is the log of one attempt: two byte streams that only grow, each kept up
// to the log limit. It stays readable until Remove.
type Output interface {
	// ReadAt reads from one stream at the offset. It returns 0 and io.EOF at the
	// present end of what is kept.
	ReadAt(stream schemas.Stream, p []byte, off int64) (int, error)
	// Size is how many bytes of the stream are kept, and how many more were dropped.
	Size(stream schemas.Stream) (kept, dropped int64)
	// Full says that bytes were dropped because the host's disk took no more, and not
	// because the limit was reached. It stays so: what is kept has no gap.
	Full() bool
	// Changed returns a channel that is closed at the next change of a Size, and when
	// the attempt is done.
	Changed() <-chan struct{}
}

// StartError says that the task itself cannot be started, on this worker or any:
// its image does not exist, its command is not there. It is final for the task.
type StartError struct {
	Reason  schemas.Reason
	Exit    *schemas.Exit // 126 or 127 where a shell would have said so
	Message string        // a sentence for people
}

func (e *StartError) Error() string { return string(e.Reason) + ": " + e.Message }
