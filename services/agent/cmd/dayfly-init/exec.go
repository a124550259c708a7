package main

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent/initproto"
)

// program is what an exec has started.
type program struct {
	id    uint64          // of the request
	agent *initproto.Conn // who asked and hears of the end; nil: nobody does any more
	name  string          // "" if it ends with the connection
	argv  []string        // with a name: the beginning of it
	reads [2]int          // with a name: the read ends, -1 once an agent has all that was written
	soft  time.Duration   // its grace when the connection is lost

	pid     int    // as it was; alive says whether it is
	mark    string // in the environment of all that it starts
	alive   bool
	started time.Duration
	exit    initproto.Exit
	ending  bool
	killAt  time.Duration // when TERM was not enough; 0 is never
	self    time.Duration // with hold: processor time of init itself before it
	tidy    []string      // of a put: the command that takes away what it has left if it is killed
}

// exec starts a process beside the main one.
func (s *supervisor) exec(req initproto.Request, fds []int) {
	defer func() { initproto.CloseAll(fds) }()
	want := 3
	switch {
	case req.Tty != nil:
		want = 0
	case req.Name != "":
		want = 5
	}
	foreground, kept := 0, 0
	for _, p := range s.programs {
		switch {
		case p.alive && p.name == "":
			foreground++
		case p.alive:
			kept++
		}
	}
	var f *fault
	switch {
	case s.pid == 0 || s.by != "":
		f = &fault{initproto.FaultStopped, 0, "the task is not running"}
	case len(req.Argv) == 0 || req.Argv[0] == "" || len(fds) != want || req.Tty != nil && req.Name != "":
		f = &fault{initproto.FaultRequest, 0, fmt.Sprintf("an exec needs a command and %d descriptors, not %d", want, len(fds))}
	case req.Alone != s.hold:
		f = &fault{initproto.FaultRequest, 0, "in a task that is judged nothing runs but its programs"}
	case s.stage != nil:
		f = &fault{initproto.FaultBusy, 0, "another program runs, or has not been cleared away"}
	case req.Alone && (want != 3 || req.Name != ""):
		f = &fault{initproto.FaultRequest, 0, "a program that is alone has three descriptors"}
	case req.Name == "" && foreground >= initproto.MaxExecs:
		f = &fault{initproto.FaultBusy, 0, fmt.Sprintf("%d programs run already", foreground)}
	case req.Name != "" && kept >= initproto.MaxKept:
		f = &fault{initproto.FaultBusy, 0, fmt.Sprintf("%d programs run in the background already", kept)}
	}
	master := -1
	if f == nil && req.Tty != nil {
		if master, fds, f = terminal(*req.Tty); f == nil {
			defer unix.Close(master)
		}
	}
	if f != nil {
		s.refuse(req, f)
		return
	}
	s.marks++
	self := usedBySelf()
	p := &program{
		id: req.ID, agent: s.conn, name: req.Name, soft: req.Grace, reads: [2]int{-1, -1},
		mark: initproto.Marker + "=" + strconv.Itoa(s.marks), alive: true, started: initproto.Now(),
	}
	if req.Bare {
		p.tidy = tidies(req.Argv)
	}
	var env []string
	if !req.Bare {
		env = s.env
	}
	if p.pid, f = s.spawn(req.Argv, merge(env, append(slices.Clone(req.Env), p.mark)), req.Dir, fds[:3], req.Tty != nil); f != nil {
		s.refuse(req, f)
		return
	}
	reply := initproto.Reply{ID: req.ID, Event: initproto.EventStarted, Pid: p.pid, Started: p.started}
	switch {
	case p.name != "":
		p.reads, p.argv = [2]int(fds[3:5]), clip(req.Argv)
		fds = fds[:3]
		s.send(reply)
	case master >= 0:
		reply.Files = []string{initproto.FileTerminal}
		s.send(reply, master)
	default:
		s.send(reply)
	}
	s.programs = append(s.programs, p)
	if req.Alone {
		s.stage, p.self = p, self
	}
}

// clip gives as much of a command as a message takes.
func clip(argv []string) (out []string) {
	room := 1 << 10
	for _, a := range argv {
		if room -= len(a) + 4; room < 0 {
			return append(out, "…")
		}
		out = append(out, a)
	}
	return out
}

// terminal makes one in the container, so that its programs find it under its name.
func terminal(size initproto.Window) (master int, slave []int, f *fault) {
	fail := func(err error) (int, []int, *fault) {
		return -1, nil, &fault{initproto.FaultSystem, 0, fmt.Sprintf("make a terminal: %s", err)}
	}
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	fd, err := -1, unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0)
	if err == nil {
		err = unix.IoctlSetWinsize(master, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Cols})
	}
	if err == nil {
		var n int
		if n, err = unix.IoctlGetInt(master, unix.TIOCGPTN); err == nil {
			fd, err = unix.Open("/dev/pts/"+strconv.Itoa(n), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		}
	}
	if err != nil {
		_ = unix.Close(master)
		return fail(err)
	}
	slave = []int{fd, -1, -1}
	for i := 1; i < len(slave) && err == nil; i++ {
		slave[i], err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	}
	if err != nil {
		initproto.CloseAll(append(slave, master))
		return fail(err)
	}
	return master, slave, nil
}

func (s *supervisor) refuse(req initproto.Request, f *fault) {
	s.send(initproto.Reply{ID: req.ID, Event: initproto.EventError, Fault: f.kind, Code: f.code, Message: f.message})
}

// find gives the program of a request: by its name, or by its id on this connection.
func (s *supervisor) find(req initproto.Request) *program {
	for _, p := range s.programs {
		if p.name == req.Name && (p.name != "" || p.agent == s.conn && p.id == req.ID) {
			return p
		}
	}
	return nil
}

// signalled are the signals that a program may be sent.
var signalled = []unix.Signal{
	unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGKILL, unix.SIGUSR1, unix.SIGUSR2,
	unix.SIGTERM, unix.SIGCONT, unix.SIGSTOP, unix.SIGTSTP, unix.SIGWINCH,
}

func (s *supervisor) signalProgram(p *program, n int) {
	if p != nil && p.alive && slices.Contains(signalled, unix.Signal(n)) {
		_ = unix.Kill(-p.pid, unix.Signal(n))
	}
}

// endProgram ends a program and all that it has started: at once without a grace.
func (s *supervisor) endProgram(p *program, grace time.Duration) {
	if p == nil || s.phase != initproto.PhaseRunning || s.resumeAt > 0 {
		return // no process is there
	}
	if p == s.stage {
		_ = unix.Kill(-1, unix.SIGKILL)
		return
	}
	at := initproto.Now() + max(grace, 0)
	switch {
	case grace <= 0 || !p.alive: // what it has left behind has had its time
		p.ending, p.killAt = true, 0
		p.kill()
	case !p.ending:
		p.ending, p.killAt = true, at
		p.each(unix.SIGTERM)
		p.each(unix.SIGCONT) // a stopped process gets its TERM too
	case at < p.killAt:
		p.killAt = at
	}
}

// hangUp ends the programs of a connection that is gone.
func (s *supervisor) hangUp(agent *initproto.Conn) {
	for _, p := range s.programs {
		if p.agent == agent {
			p.agent = nil
			if p.name == "" {
				s.endProgram(p, p.soft)
			}
		}
	}
}

// checkPrograms does what time asks for.
func (s *supervisor) checkPrograms(now time.Duration) {
	for _, p := range s.programs {
		if p.killAt > 0 && now >= p.killAt {
			p.killAt = 0
			p.kill()
		}
	}
}

// reaped takes the end of a program.
func (s *supervisor) reaped(pid int, ws unix.WaitStatus) {
	i := slices.IndexFunc(s.programs, func(p *program) bool { return p.alive && p.pid == pid })
	if i < 0 {
		return // left behind by somebody
	}
	p := s.programs[i]
	if p.ending {
		p.kill() // its session and group are still known by its pid
	}
	p.alive, p.killAt, p.exit = false, 0, exitOf(ws)
	if p.name != "" {
		s.forget()
		if s.conn != nil {
			s.send(p.kept())
		}
		return
	}
	s.programs = slices.Delete(s.programs, i, i+1)
	if p.tidy != nil && p.exit.Signal != 0 {
		s.tidy(p.tidy)
	}
	if p.agent != nil && p.agent == s.conn {
		s.send(initproto.Reply{ID: p.id, Event: initproto.EventExited, Exit: &p.exit})
	}
}

// kept says what is true of a program with a name.
func (p *program) kept() initproto.Reply {
	r := initproto.Reply{Event: initproto.EventKept, Name: p.name, Started: p.started}
	if !p.alive {
		r.Exit = &p.exit
	}
	return r
}

// showKept tells a new agent of the programs with names, and hands it their output.
func (s *supervisor) showKept() {
	for _, p := range s.programs {
		if p.name == "" {
			continue
		}
		r := p.kept()
		r.Argv = p.argv
		var fds []int
		for i, name := range []string{initproto.FileStdout, initproto.FileStderr} {
			if p.reads[i] >= 0 {
				r.Files, fds = append(r.Files, name), append(fds, p.reads[i])
			}
		}
		s.send(r, fds...)
	}
}

// drained is an agent's word that it has all that a program with a name, and what it
// has left behind, can ever write.
func (s *supervisor) drained(p *program) {
	if p != nil && !p.alive {
		p.close()
	}
}

func (p *program) close() {
	for i, fd := range p.reads {
		if fd >= 0 {
			_ = unix.Close(fd)
			p.reads[i] = -1
		}
	}
}

// forget drops the oldest of the programs that have ended, beyond those to be kept.
func (s *supervisor) forget() {
	ended := 0
	for i := len(s.programs) - 1; i >= 0; i-- {
		p := s.programs[i]
		if p.alive || p.name == "" {
			continue
		}
		if ended++; ended > initproto.MaxEnded {
			p.close()
			s.programs = slices.Delete(s.programs, i, i+1)
		}
	}
}
