// Package initproto is what dayfly-init and the agent say to each other.
//
// The agent listens on a unix seqpacket socket in the attempt's control folder;
// init, PID 1 of the container, dials it, and dials again whenever the connection
// closes. One datagram is one message: JSON, and descriptors beside it.
//
//	agent                                            init
//	  │ listen c/s                                     │ up
//	  │◀──────────── hello idle {output} ──────────────│
//	  │ write c/deadline, make the pipes               │
//	  │── run {stdin stdout stderr, read ends twice} ─▶│ fork, exec
//	  │◀──────── started, or error: refused ───────────│
//	  │── or run tty {read ends}, or run input {…, write end of stdin} ▶│
//	  │◀──────── started {terminal} ───────────────────│
//	  │── shut, signal main ──────────────────────────▶│ closes its write end of stdin
//	  │── reread (c/deadline or permit/until moved) ──▶│
//	  │── stop grace ─────────────────────────────────▶│ TERM all, KILL after grace
//	  │── exec {stdin stdout stderr}, dial port ──────▶│
//	  │◀──────── started, exited; connected {socket} ──│
//	  │── exec tty, signal, end ──────────────────────▶│
//	  │◀──────── started {terminal}, exited ───────────│
//	  │── exec name {…, read ends twice} ─────────────▶│ goes on without an agent
//	  │◀──────── started; kept {exit} at its end ──────│
//	  │◀──────── paused {exit}, started {restarts} ────│ it runs again: its policy, or an again
//	  │◀──────────── exited {code, by} ────────────────│ no process is left
//	  │── run hold; exec alone {…}, again and again ──▶│ one program at a time, and nothing after it
//	  │◀────────── started, exited {exit, tidy} ───────│ nothing to clean before the next one
//	  │── taken (pipes drained, outcome kept) ────────▶│ exits with the same code
//	  ╎                                                ╎
//	  ╎ agent restarts                                 ╎ dials each 10…250 ms
//	  │◀── hello running|ended {output stdout stderr stdin|terminal} ─│
//	  │◀── kept name {stdout stderr}, for each ────────│
//
// A request carries an id and its replies the same one: so exec and dial find their
// answers. What init says of the run itself has no id once the run was started. The hello of a container that has been
// given its run repeats the key of that run, which no process of the task can know:
// so an agent tells init from a task that dials the socket itself.
//
// Two files rule when the task ends, and init obeys them without any agent:
// DeadlineFile in the control folder and PermitFile in the permit folder. Both are
// replaced by rename and hold one decimal number, nanoseconds of CLOCK_BOOTTIME.
package initproto

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Version is that of this protocol, said in each hello. Fields are only ever added.
const Version = 3

// Where things are in the container.
const (
	Folder      = "/.dayfly"
	InitPath    = Folder + "/init"   // this binary, read-only
	ControlPath = Folder + "/c"      // the attempt's control folder, read-only
	PermitPath  = Folder + "/permit" // the worker's permit folder, read-only, one for all its containers
	InputPath   = "/task/input"
	OutputPath  = "/task/output"
)

// Names in the control and permit folders.
const (
	SocketName   = "s"
	StdinName    = "stdin" // a file that is the task's standard input
	DeadlineName = "deadline"
	PermitName   = "until"
)

// Bounds of a message. Init reads requests, the agent reads replies.
const (
	MaxRequest = 768 << 10
	MaxExec    = 32 << 10 // an exec: all that is longer than this comes before the run
	MaxReply   = 8 << 10
	MaxFiles   = 6

	// How many init does at a time; more are refused.
	MaxExecs = 32
	MaxKept  = 8
	MaxDials = 64
	// MaxEnded is how many background programs that have ended are remembered.
	MaxEnded = 16
)

// First arguments of this binary: FilesMode where it serves files, and OutputMode where it
// is PID 1 and the output folder, the second argument, is not at OutputPath.
const (
	FilesMode  = "files"
	OutputMode = "output"
)

// CleanMode is the only argument of this binary where it empties the places to write.
const CleanMode = "clean"

// Marker is a variable that a program beside the run has in its environment, and what
// it starts inherits: how init knows its children once they have left its session.
const Marker = "DAYFLY_PROGRAM"

// The exit codes of init where the task did not end by itself. Docker's State keeps
// them for an agent that comes back after init is gone. Otherwise init exits with
// the code of the main process, 128 + signal if one ended it.
const (
	CodeDeadline = 241
	CodePermit   = 242
	CodeStop     = 243
	CodeOutside  = 244
	CodeBroken   = 245 // init itself could not work, or nobody ever gave it a run
	CodeFailed   = 246 // unhealthy
)

// Op is what a request asks.
type Op string

// The requests.
const (
	OpRun    Op = "run"    // with descriptors: stdin, stdout, stderr, and the read ends of stdout and stderr to keep; with Input the write end of stdin to keep too; with Tty the two read ends alone
	OpShut   Op = "shut"   // stdin of the run has its end: its write end is kept no more
	OpStop   Op = "stop"   // TERM to all, KILL after grace; again: only sooner
	OpReread Op = "reread" // the deadline or the permit was moved
	OpTaken  Op = "taken"  // the exit is kept and the pipes are drained: init may go
	OpFail   Op = "fail"   // the run number Restarts is unhealthy: end it, with the run's grace, as a failure
	OpAgain  Op = "again"  // while there were fewer than Restarts: end the run, with its grace, and run the command again
	OpExec   Op = "exec"   // with descriptors: stdin, stdout, stderr; ends with the run and with the connection
	OpSignal Op = "signal" // to the process group of the exec of this id or name, or of the main process
	OpEnd    Op = "end"    // TERM to all that this exec has started, KILL after grace, or once it has ended itself
	OpDial   Op = "dial"   // connect to a port of 127.0.0.1
)

// Request is what the agent sends.
type Request struct {
	ID    uint64        `json:"id,omitempty"`
	Op    Op            `json:"op"`
	Key   string        `json:"key,omitempty"`   // run: to be repeated in each hello
	Argv  []string      `json:"argv,omitempty"`  // run, exec: program and arguments; a program without "/" is looked up in PATH of the task
	Env   []string      `json:"env,omitempty"`   // run: laid over init's own, which is the image's; exec: laid over the run's
	Stdin bool          `json:"stdin,omitempty"` // run: stdin is not the descriptor but StdinName, opened from in here
	Dir   string        `json:"dir,omitempty"`   // run, exec: "" is where init is
	Free  bool          `json:"free,omitempty"`  // run: the permit must last at the start, and does not end it later
	Hold  bool          `json:"hold,omitempty"`  // run: of no command; execs that are Alone are all that runs, until a stop
	Alone bool          `json:"alone,omitempty"` // exec: beside nothing, in a run on hold; its end is told when no process is left
	Grace time.Duration `json:"grace,omitempty"` // run: at the deadline, or unhealthy; stop, end: now; exec: once the connection is lost

	Again    *Again `json:"again,omitempty"`    // run: when to run it again
	Restarts int    `json:"restarts,omitempty"` // fail, again
	Port     int    `json:"port,omitempty"`     // dial

	Tty    *Window `json:"tty,omitempty"`    // run, exec: on a terminal, whose master comes back
	Input  bool    `json:"input,omitempty"`  // run: a sixth descriptor is the write end of stdin
	Main   bool    `json:"main,omitempty"`   // signal: the main process
	Name   string  `json:"name,omitempty"`   // exec: goes on without the connection, with five descriptors as a run; signal, end, taken: which
	Bare   bool    `json:"bare,omitempty"`   // exec: nothing in its environment but Env
	Signal int     `json:"signal,omitempty"` // signal
}

// Window is the size of a terminal.
type Window struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
}

// Again says when the command runs again in the same container without being asked to:
// after a failure, which is any exit code but 0 and an unhealthy end, or after any end
// of its own. The pause before it is Pause, then twice as long each time up to Most; it
// is Pause again after a run that lasted Calm times the pause that would follow.
type Again struct {
	Always bool          `json:"always,omitempty"`
	Max    int           `json:"max,omitempty"` // how often, beside those that were asked for; 0 is without limit
	Pause  time.Duration `json:"pause"`
	Most   time.Duration `json:"most"`
	Calm   int           `json:"calm"`
}

// Event is what a reply tells.
type Event string

// The replies.
const (
	EventHello     Event = "hello"     // first on each connection
	EventStarted   Event = "started"   // to run, exec; without id: the command runs again
	EventError     Event = "error"     // to run, exec, dial: nothing was started
	EventPaused    Event = "paused"    // no process of the task is left, and it will run again
	EventExited    Event = "exited"    // to exec; without id: once, when no process of the task is left
	EventConnected Event = "connected" // to dial, with the socket
	EventKept      Event = "kept"      // a program with a name: after each hello, and when it ends
)

// Phase is how far init has come, said in the hello.
type Phase string

// The phases.
const (
	PhaseIdle    Phase = "idle"
	PhaseRunning Phase = "running"
	PhaseEnded   Phase = "ended"
)

// Names of the descriptors that come with a hello, in Reply.Files.
const (
	FileOutput = "output" // the directory /task/output
	FileStdout = "stdout" // read end of the pipe
	FileStderr = "stderr"
	FileStdin  = "stdin" // write end of the pipe, until it was shut
	// FileTerminal comes with the answer to a run or an exec too.
	FileTerminal = "terminal"
)

// Reply is what init sends.
type Reply struct {
	ID       uint64        `json:"id,omitempty"`
	Event    Event         `json:"event"`
	Version  int           `json:"version,omitempty"`  // hello
	Phase    Phase         `json:"phase,omitempty"`    // hello
	Key      string        `json:"key,omitempty"`      // hello, after a run
	Files    []string      `json:"files,omitempty"`    // hello: what the descriptors are, in order
	Pid      int           `json:"pid,omitempty"`      // as init sees it; hello: 0 between two runs
	Started  time.Duration `json:"started,omitempty"`  // boot time of the first run
	Exit     *Exit         `json:"exit,omitempty"`     // exited, paused, and hello once a run has ended: how the last one did
	Restarts int           `json:"restarts,omitempty"` // started, paused, exited, hello: how often the command was started again
	Tidy     bool          `json:"tidy,omitempty"`     // started, of a run on hold; exited, of an exec that is Alone: all places to write are as CleanMode leaves them
	Fault    Fault         `json:"fault,omitempty"`    // error
	Code     int           `json:"code,omitempty"`     // error: 126 or 127 where a shell would say so
	Message  string        `json:"message,omitempty"`  // error

	Name string   `json:"name,omitempty"` // kept
	Argv []string `json:"argv,omitempty"` // kept, after a hello: the beginning of it
}

// Fault says what kept a run or an exec from starting, or a dial from connecting.
type Fault string

// The faults.
const (
	FaultNotFound Fault = "not_found" // no such program
	FaultNotExec  Fault = "not_executable"
	FaultWorkdir  Fault = "workdir"
	FaultDeadline Fault = "deadline" // it is over, or cannot be read
	FaultPermit   Fault = "permit"   // it is over, or cannot be read
	FaultStopped  Fault = "stopped"
	FaultRequest  Fault = "request" // not a run that can be done
	FaultSystem   Fault = "system"  // fork failed
	FaultBusy     Fault = "busy"    // too many at a time
	FaultRefused  Fault = "refused" // nobody listens
	FaultDial     Fault = "dial"    // nobody answers
)

// Exit is how the main process ended.
type Exit struct {
	Code   int           `json:"code"` // 128 + signal if a signal ended it
	Signal int           `json:"signal,omitempty"`
	By     By            `json:"by"`
	CPU    time.Duration `json:"cpu"`              // user and system time of all reaped processes, from getrusage
	Self   time.Duration `json:"self,omitempty"`   // of an exec that is Alone: what init itself took meanwhile
	MaxRSS int64         `json:"maxrss,omitempty"` // of such an exec: bytes of its largest process, 0 if that is not known
	Wall   time.Duration `json:"wall"`             // from the first start to the last end of the main process
}

// By says who ended the task.
type By string

// Who ended it.
const (
	ByItself   By = "itself"
	ByStop     By = "stop"
	ByDeadline By = "deadline"
	ByPermit   By = "permit"
	ByFail     By = "fail"    // it was unhealthy
	ByAgain    By = "again"   // to run again: never the end of the task
	ByOutside  By = "outside" // TERM to init: dockerd was told to stop it, or shuts down
)

// Now is CLOCK_BOOTTIME, the clock of both files.
func Now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("clock_gettime: " + err.Error()) // the kernel has had this clock since 2.6.39
	}
	return time.Duration(ts.Nano())
}

// ReadInstant reads a file that WriteInstant wrote.
func ReadInstant(path string) (time.Duration, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: not a number", path)
	}
	return time.Duration(n), nil
}

// WriteInstant replaces the file by rename, so that a reader sees the old instant or
// the new. It does not wait for the disk: boot time ends with the boot.
func WriteInstant(path string, t time.Duration) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.FormatInt(int64(t), 10) + "\n")
	if err == nil {
		err = f.Chmod(0o644)
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
