package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
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

	// Image makes the task's image present and says which one it is. pinned is what an
	// earlier attempt of the task resolved it to, nil if none did: it is that one then,
	// whatever its name means by now. progress may be called, by this call alone. An error
	// that is the image's own fault, or its login's, is a *StartError.
	Image(ctx context.Context, spec schemas.Spec, pinned *schemas.Resolved, progress func(Progress)) (Image, error)

	// Images says which images are present, as last seen. It asks nobody and does not
	// wait. What it gives never changes.
	Images() *Images

	// Keep names the images that shall stay, used or not. The last call counts, and before
	// the first none goes.
	Keep(images []string)

	// Credentials names the registry credentials that tasks may ask for, in order.
	Credentials() []string

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

// Progress is how far an image is.
type Progress struct {
	Sentence string        // such as "pulling busybox: 3.1 of 12 MiB"
	Pull     *schemas.Pull // nil before the registry has said what there is to pull
}

// Images are those of a host.
type Images struct {
	Names []string // as schemas.ImageName has them, those used last first; bounded for a beat
	Cache schemas.ImageCache

	all map[string]bool
}

// NewImages takes all names, those used last first.
func NewImages(names []string, cache schemas.ImageCache) *Images {
	i := &Images{Cache: cache, all: make(map[string]bool, len(names))}
	bytes := 0
	for _, name := range names {
		if name == "" || i.all[name] {
			continue
		}
		i.all[name] = true
		if bytes += len(name); len(i.Names) < schemas.MaxBeatImages && bytes <= schemas.MaxBeatImageText {
			i.Names = append(i.Names, name)
		}
	}
	return i
}

// Has says whether an image is there, by any of its names.
func (i *Images) Has(image string) bool { return i.all[schemas.ImageName(image)] }

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
	TimeLeft   time.Duration             // until the deadline, counted from the start of the process
	NoPermit   bool                      // on_lost: wait
	Grace      time.Duration             // between TERM and KILL when the deadline passes, or the task is unhealthy
	GPUs       []int                     // the devices that are its own, by their numbers on this host
	Blobs      map[schemas.BlobID]string // where those are that the spec names: not to be changed, and there until the attempt has ended
	LogLimit   int64                     // bytes of stdout and stderr together that are kept

	// Within is how long the start may take from when the host begins with it; 0 is as long
	// as its ctx. A host that starts a few at a time lets the others wait, and that is not
	// their fault.
	Within time.Duration
}

// Begin gives the context of a start that the host begins with now. Its cause at the end
// of Within is a *StartError.
func (r StartRequest) Begin(ctx context.Context) (context.Context, context.CancelFunc) {
	if r.Within == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, r.Within, &StartError{
		Reason: schemas.ReasonStartTimeout, Message: fmt.Sprintf("the process was not started within %s", schemas.Duration(r.Within))})
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

	// Stage starts a program of an attempt that is judged (its spec has a Judge): alone, with
	// three streams, in places to write that are empty and with so much memory beyond what the
	// container takes without it. The context is of the start alone. ErrBusy says that another
	// one has not ended yet; ErrUnclean that what one has left cannot be taken away.
	Stage(ctx context.Context, c Command, memory schemas.Size) (Stage, error)

	// Build makes what the last stage has left in the output folder a read-only part of the
	// input folder, schemas.BuildFolder. A *BuildError says that there is too much.
	Build(ctx context.Context) error
	// Main gives the streams of the task's own process, nil unless the spec is Interactive.
	Main() Main

	// Done is closed when no process of the attempt is left, its pipes are drained into
	// Output, and Outcome is known.
	Done() <-chan struct{}

	// Outcome says how it ended. It is valid once Done is closed, and never changes.
	Outcome() Outcome

	// Stop sends TERM to every process, and KILL after grace. It returns at once; a
	// second call may shorten the grace, never lengthen it.
	Stop(grace time.Duration)

	// SetDeadline moves the deadline to timeLeft from now. It survives the agent. One that
	// is over stays, and the error is ErrOver: the attempt is being ended. After its end
	// nothing happens.
	SetDeadline(timeLeft time.Duration) error

	// Output is what the attempt has written so far.
	Output() Output

	// OutputFolder opens the folder for artifacts, once Done is closed and until Remove.
	// After a restart of the agent it may have to wait for it. ErrGone: the folder went with
	// the container. nil: the attempt has none.
	OutputFolder(ctx context.Context) (*os.File, error)

	// Remove takes the container and the state folder away. It may be called again
	// after an error, and ends a running attempt.
	Remove(ctx context.Context) error
}

// Stage is a program that runs alone. When it is done no process of it is left.
type Stage interface {
	Foreground
	// Used is what it has used so far, all its processes together: in the end once it is done.
	Used() StageUse
}

// StageUse is what a stage has used.
type StageUse struct {
	CPU         time.Duration
	Memory      schemas.Size // the most at a time
	OutOfMemory bool         // one of its processes was killed for want of memory
	Thrashing   bool         // it has nearly all that it may use, and spends its time with reading its own code again
}

// ErrUnclean says that a program has left what cannot be taken away.
var ErrUnclean = errors.New("what an earlier program has left cannot be taken away")

// BuildError says what is wrong with what a program has left in the output folder.
type BuildError struct{ Message string }

func (e *BuildError) Error() string { return e.Message }

// ErrOver says that a deadline is over and cannot be moved.
var ErrOver = errors.New("the deadline is over")

// ErrGone says that the output folder of an attempt is not there any more.
var ErrGone = errors.New("the output folder went with its container")

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
