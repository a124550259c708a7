package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent/initproto"
)

// fault is why a run was refused.
type fault struct {
	kind    initproto.Fault
	code    int
	message string
}

// run starts the main process. started goes out before any exit of it can, for both
// are sent by this goroutine.
func (s *supervisor) run(req initproto.Request, fds []int) {
	var f *fault
	master, given := -1, len(fds)
	if req.Tty != nil && s.phase == initproto.PhaseIdle {
		var slave []int
		if master, slave, f = terminal(*req.Tty); f == nil {
			fds = append(slave, fds...)
		}
	}
	want := map[bool]int{false: 5, true: 6}[req.Input]
	if req.Tty != nil {
		want = 2
	}
	if f == nil && given != want {
		f = &fault{initproto.FaultRequest, 0, fmt.Sprintf("a run needs %d descriptors, not %d", want, given)}
	}
	if f == nil {
		f = s.start(req, fds)
	}
	if f != nil {
		if master >= 0 {
			_ = unix.Close(master)
		}
		initproto.CloseAll(fds)
		s.send(initproto.Reply{ID: req.ID, Event: initproto.EventError, Fault: f.kind, Code: f.code, Message: f.message})
		return
	}
	s.req, s.stdio = req, fds[:3]
	reply := initproto.Reply{ID: req.ID, Event: initproto.EventStarted, Pid: s.pid, Started: s.started}
	if master >= 0 {
		s.master, reply.Files = master, []string{initproto.FileTerminal}
		s.send(reply, master)
		return
	}
	if req.Input {
		s.input = fds[5]
	}
	reply.Tidy = s.hold && s.isTidy()
	s.send(reply)
}

func (s *supervisor) start(req initproto.Request, fds []int) *fault {
	switch {
	case s.phase != initproto.PhaseIdle:
		return &fault{initproto.FaultRequest, 0, "this container has had its run"}
	case s.by != "":
		return &fault{initproto.FaultStopped, 0, "stopped before it ran"}
	case !req.Hold && (len(req.Argv) == 0 || req.Argv[0] == ""):
		return &fault{initproto.FaultRequest, 0, "a run needs a command"}
	}
	s.permitted = !req.Free
	s.deadline, s.permit = 0, 0 // what cannot be read is over
	s.reread()
	now := initproto.Now()
	switch {
	case now >= s.permit: // also for a task that no permit ends
		return &fault{initproto.FaultPermit, 0, "the worker's permit is over"}
	case now >= s.deadline:
		return &fault{initproto.FaultDeadline, 0, "the deadline is over"}
	}
	if req.Stdin {
		fd, err := unix.Open(initproto.ControlPath+"/"+initproto.StdinName, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &fault{initproto.FaultRequest, 0, fmt.Sprintf("open stdin: %s", err)}
		}
		_ = unix.Close(fds[0])
		fds[0] = fd
	}
	s.env = merge(os.Environ(), req.Env)
	pid := heldPid
	if s.hold = req.Hold; !s.hold {
		var f *fault
		if pid, f = s.spawn(req.Argv, s.env, req.Dir, fds[:3], req.Tty != nil); f != nil {
			return f
		}
	}
	s.pid, s.phase, s.started = pid, initproto.PhaseRunning, initproto.Now()
	s.key, s.grace = req.Key, req.Grace
	s.stdout, s.stderr = fds[3], fds[4]
	s.began = s.started
	if s.again = req.Again; s.again != nil {
		s.pause = s.again.Pause
	}
	return nil
}

// spawn starts a process of the task.
func (s *supervisor) spawn(argv, env []string, dir string, stdio []int, tty bool) (int, *fault) {
	if dir != "" {
		if err := unix.Access(dir, unix.X_OK); err != nil {
			return 0, &fault{initproto.FaultWorkdir, 126, fmt.Sprintf("workdir %s: %s", dir, err)}
		}
	}
	path, f := lookPath(argv[0], env)
	if f != nil {
		return 0, f
	}
	// The kernel shall choose the task before its init when memory runs out. A child
	// inherits the score, so it is raised for the fork.
	adj := s.getOOM()
	s.setOOM(min(adj+400, 1000))
	pid, err := syscall.ForkExec(path, argv, &syscall.ProcAttr{
		Dir: dir, Env: env, Files: []uintptr{uintptr(stdio[0]), uintptr(stdio[1]), uintptr(stdio[2])},
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: tty}, // of its stdin
	})
	s.setOOM(adj)
	if err != nil {
		return 0, execFault(argv[0], err)
	}
	return pid, nil
}

func execFault(name string, err error) *fault {
	switch err {
	case unix.ENOENT:
		return &fault{initproto.FaultNotFound, 127, fmt.Sprintf("%s: the program or its interpreter does not exist", name)}
	case unix.EACCES, unix.ENOEXEC, unix.EISDIR, unix.ENOTDIR, unix.ELOOP, unix.E2BIG, unix.ETXTBSY, unix.ELIBBAD, unix.EPERM, unix.EINVAL:
		return &fault{initproto.FaultNotExec, 126, fmt.Sprintf("%s: %s", name, err)}
	}
	return &fault{initproto.FaultSystem, 0, fmt.Sprintf("start %s: %s", name, err)}
}

// lookPath finds the program as a shell of the task would.
func lookPath(name string, env []string) (string, *fault) {
	if strings.Contains(name, "/") {
		return name, executable(name, name)
	}
	path := ""
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	var found *fault
	for dir := range strings.SplitSeq(path, ":") {
		if dir == "" {
			dir = "."
		}
		p := dir + "/" + name
		f := executable(p, name)
		if f == nil {
			return p, nil
		}
		if f.kind == initproto.FaultNotExec && found == nil {
			found = f
		}
	}
	if found == nil {
		found = &fault{initproto.FaultNotFound, 127, fmt.Sprintf("%s: not found in PATH=%s", name, path)}
	}
	return "", found
}

func executable(path, name string) *fault {
	var st unix.Stat_t
	switch err := unix.Stat(path, &st); {
	case err == unix.ENOENT:
		return &fault{initproto.FaultNotFound, 127, fmt.Sprintf("%s: no such file", name)}
	case err != nil:
		return &fault{initproto.FaultNotExec, 126, fmt.Sprintf("%s: %s", name, err)}
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return &fault{initproto.FaultNotExec, 126, fmt.Sprintf("%s: is a directory", name)}
	}
	if err := unix.Access(path, unix.X_OK); err != nil {
		return &fault{initproto.FaultNotExec, 126, fmt.Sprintf("%s: not executable (%s)", name, err)}
	}
	return nil
}

// merge lays over the variables of base those of over.
func merge(base, over []string) []string {
	at := map[string]int{}
	var out []string
	for _, list := range [][]string{base, over} {
		for _, e := range list {
			k, _, _ := strings.Cut(e, "=")
			if i, ok := at[k]; ok {
				out[i] = e
				continue
			}
			at[k] = len(out)
			out = append(out, e)
		}
	}
	return out
}
