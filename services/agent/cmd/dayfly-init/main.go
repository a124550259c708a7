// The Go runtime would otherwise look at the cgroup's CPU limit again and again.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0

// Dayfly-init is PID 1 of every container. It dials the agent's socket, runs the
// one command that it is told to, reaps, and ends the task when its deadline or
// the worker's permit is over, whatever has become of the agent. Package initproto
// describes what the two say to each other.
//
// It has no more rights than the task. What it relies on against the task: the
// kernel shields PID 1 from signals out of its own namespace that it does not
// handle, PR_SET_DUMPABLE 0 keeps its memory and descriptors closed to the same
// user, and everything it reads lies on read-only mounts.
//
// All decisions are taken by one goroutine, in supervisor.loop. The same binary is run
// beside the task to read and write its files: see files.go.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"unsafe"

	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent/initproto"
)

func main() {
	if request, ok := asked(os.Args); ok {
		os.Exit(serveFiles(request))
	}
	if len(os.Args) == 2 && os.Args[1] == initproto.CleanMode {
		os.Exit(clean())
	}
	runtime.GOMAXPROCS(2) // fewer threads: they count in the task's pids
	debug.SetGCPercent(50)

	// Opened before the process becomes undumpable: from then on its files in /proc
	// belong to root.
	oom, _ := os.OpenFile("/proc/self/oom_score_adj", os.O_RDWR, 0)
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		fail(err)
	}

	if err := dropFaults(); err != nil {
		fail(err)
	}
	// All other signals, not those that are wanted. The Go runtime has handlers for most, so
	// the kernel lets the task send them to PID 1, and without Notify a SIGABRT from there
	// would crash it. Not Ignore: an ignored signal stays ignored through exec, and
	// `yes | head` would hang. The two that matter have a channel of their own, which a flood
	// of others cannot fill.
	signals := make(chan os.Signal, 8)
	signal.Notify(make(chan os.Signal, 1))
	signal.Notify(signals, unix.SIGCHLD, unix.SIGTERM)

	timer, err := newTimer()
	if err != nil {
		fail(err)
	}
	s := &supervisor{
		timer: timer, oom: oom, phase: initproto.PhaseIdle,
		output: openFolder(outputPath(os.Args)), stdout: -1, stderr: -1, input: -1, master: -1,
	}
	os.Exit(s.loop(signals))
}

// faults are the signals that the Go runtime takes for a fault of its own where they do not
// say that a user has sent them by kill: by rt_sigqueueinfo, or F_SETSIG of a pipe, the task
// could crash PID 1 with them, whatever is notified.
var faults = []unix.Signal{unix.SIGILL, unix.SIGTRAP, unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV, unix.SIGSTKFLT, unix.SIGSYS}

// dropFaults gives those their default action: the kernel drops them then, if they are sent to
// PID 1, and ends it for a fault that is one.
func dropFaults() error {
	var action [8]uintptr // the kernel's struct sigaction, and more: SIG_DFL, no flags
	for _, sig := range faults {
		if _, _, e := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0); e != 0 {
			return fmt.Errorf("the action of %s: %w", unix.SignalName(sig), e)
		}
	}
	return nil
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "dayfly-init:", err)
	os.Exit(initproto.CodeBroken)
}

// outputPath is where the output folder is. The arguments are the agent's.
func outputPath(args []string) string {
	if len(args) == 3 && args[1] == initproto.OutputMode {
		return args[2]
	}
	return initproto.OutputPath
}

// openFolder opens a directory, or gives -1.
func openFolder(path string) int {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	return fd
}
