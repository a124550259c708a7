package main

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent/initproto"
)

// How long init waits for an agent.
const (
	dialLeast = 10 * time.Millisecond
	dialMost  = 250 * time.Millisecond
	// linger is how much longer than permit or deadline an ended task's exit and last
	// output wait for an agent that is away.
	linger = time.Minute
	// idleMost is how long init waits to be told what to run. Agents that die between
	// create and run remove the container when they are back; this is for those that
	// never come back.
	idleMost = 10 * time.Minute
)

// supervisor is what init knows. One goroutine, loop, uses it.
type supervisor struct {
	timer  *timer
	oom    *os.File // our own oom_score_adj, nil if it could not be opened
	output int      // directory /task/output, -1 if there is none

	conn *initproto.Conn // nil while there is no agent
	lost chan struct{}   // tells the dialer that conn is gone

	phase     initproto.Phase
	key       string
	permitted bool // runs only while the permit lasts
	grace     time.Duration
	pid       int // of the main process; 0 once it was reaped
	started   time.Duration
	stdout    int // read ends, kept for the agents to come
	stderr    int
	input     int // write end of stdin, or -1
	master    int // of the main process's terminal, or -1
	exit      initproto.Exit

	deadline time.Duration
	permit   time.Duration
	by       initproto.By  // who asked for the end, "" while nobody did
	killAt   time.Duration // when TERM was not enough; 0 is never
	killed   bool          // KILL went to all
	away     time.Duration // since when no agent is connected
	taken    bool

	hold   bool     // the run is of no command: its programs come one by one
	stage  *program // that runs now, or has left processes behind
	places []string // to write, once they were looked for

	env      []string   // of the task
	programs []*program // that execs have started, oldest first
	marks    int        // given to them
	dials    int        // under way
	dialed   chan dialed

	again    *initproto.Again // nil: the command runs again only where that is asked for
	req      initproto.Request
	stdio    []int // kept for the runs to come
	restarts int
	asked    int           // of them
	began    time.Duration // the present run
	pause    time.Duration // before the next
	resumeAt time.Duration // between two runs: when the next begins; else 0

	abandoned bool // no agent can come any more
}

// message is what the reader of a connection passes to loop.
type message struct {
	conn *initproto.Conn
	req  initproto.Request
	fds  []int
	err  error
}

// loop runs until the container shall end, and returns init's exit code.
func (s *supervisor) loop(signals <-chan os.Signal) int {
	conns := make(chan *initproto.Conn)
	messages := make(chan message)
	forgotten := make(chan struct{})
	s.lost = make(chan struct{}, 1)
	s.dialed = make(chan dialed)
	s.away = initproto.Now()
	go dial(conns, s.lost, forgotten)
	for {
		s.timer.set(s.next())
		select {
		case sig := <-signals:
			s.signal(sig)
		case c := <-conns:
			s.connected(c)
			go read(c, messages)
		case m := <-messages:
			s.message(m)
		case d := <-s.dialed:
			s.connect(d)
		case <-forgotten:
			forgotten = nil
			s.end(initproto.ByOutside, 0)
			s.abandoned = true
		case <-s.timer.C:
			s.timer.fired()
		}
		s.check()
		if code, over := s.over(); over {
			return code
		}
	}
}

// dial connects whenever there is no connection, for as long as there is a folder to find
// an agent in. forgotten is closed when that was taken away: its attempt is nobody's then.
func dial(conns chan<- *initproto.Conn, lost <-chan struct{}, forgotten chan<- struct{}) {
	addr := &net.UnixAddr{Name: filepath.Join(initproto.ControlPath, initproto.SocketName), Net: "unixpacket"}
	for pause := dialLeast; ; {
		c, err := net.DialUnix("unixpacket", nil, addr)
		if err != nil {
			var st unix.Stat_t
			if unix.Stat(initproto.ControlPath, &st) == nil && st.Nlink == 0 {
				close(forgotten)
				return
			}
			time.Sleep(pause)
			pause = min(2*pause, dialMost)
			continue
		}
		conns <- initproto.NewConn(c)
		<-lost
		pause = dialLeast
		time.Sleep(pause)
	}
}

func read(c *initproto.Conn, messages chan<- message) {
	buf := make([]byte, initproto.MaxRequest)
	for {
		m := message{conn: c}
		m.fds, m.err = c.Receive(buf, &m.req)
		messages <- m
		if m.err != nil {
			return
		}
		if m.req.Op == initproto.OpRun {
			buf = make([]byte, initproto.MaxExec) // only a run is longer
		}
	}
}

func (s *supervisor) connected(c *initproto.Conn) {
	s.conn = c
	hello := initproto.Reply{Event: initproto.EventHello, Version: initproto.Version, Phase: s.phase, Key: s.key, Started: s.started, Pid: s.pid, Restarts: s.restarts}
	if s.phase == initproto.PhaseEnded || s.resumeAt > 0 || s.restarts > 0 {
		hello.Exit = &s.exit
	}
	var fds []int
	for _, f := range []struct {
		name string
		fd   int
	}{{initproto.FileOutput, s.output}, {initproto.FileStdout, s.stdout}, {initproto.FileStderr, s.stderr},
		{initproto.FileStdin, s.input}, {initproto.FileTerminal, s.master}} {
		if f.fd >= 0 {
			hello.Files, fds = append(hello.Files, f.name), append(fds, f.fd)
		}
	}
	s.send(hello, fds...)
	s.showKept()
}

// send drops the connection if it does not work: the hello of the next one says
// all that is true then.
func (s *supervisor) send(r initproto.Reply, fds ...int) {
	if s.conn == nil {
		return
	}
	_ = s.conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
	if err := s.conn.Send(r, fds...); err != nil {
		_ = s.conn.Close() // its reader tells
	}
}

func (s *supervisor) message(m message) {
	if m.conn != s.conn {
		initproto.CloseAll(m.fds)
		return
	}
	if m.err != nil {
		initproto.CloseAll(m.fds)
		_ = s.conn.Close()
		s.conn = nil
		s.hangUp(m.conn)
		s.away = initproto.Now()
		s.lost <- struct{}{}
		return
	}
	if m.req.Op != initproto.OpRun && m.req.Op != initproto.OpExec {
		initproto.CloseAll(m.fds)
	}
	switch m.req.Op {
	case initproto.OpExec:
		s.reap() // what it would run beside may have ended
		s.exec(m.req, m.fds)
	case initproto.OpSignal:
		s.reap() // its pid may be another's
		if m.req.Main {
			s.signalMain(m.req.Signal)
			break
		}
		s.signalProgram(s.find(m.req), m.req.Signal)
	case initproto.OpShut:
		s.shut()
	case initproto.OpEnd:
		s.reap()
		s.endProgram(s.find(m.req), m.req.Grace)
	case initproto.OpDial:
		s.dial(m.req)
	case initproto.OpFail:
		s.reap()
		if s.pid != 0 && m.req.Restarts == s.restarts && s.by == "" {
			s.end(initproto.ByFail, s.grace)
		}
	case initproto.OpAgain:
		s.reap() // it may have ended by itself before
		s.runAgain(m.req.Restarts)
	case initproto.OpRun:
		s.run(m.req, m.fds)
	case initproto.OpStop:
		s.reap() // it may have ended by itself before
		s.end(initproto.ByStop, m.req.Grace)
	case initproto.OpReread:
		s.reread()
	case initproto.OpTaken:
		if m.req.Name != "" {
			s.drained(s.find(m.req))
			break
		}
		s.taken = s.phase != initproto.PhaseRunning
	}
}

// reread reads both files; what cannot be read stays as it was.
func (s *supervisor) reread() {
	if t, err := initproto.ReadInstant(filepath.Join(initproto.ControlPath, initproto.DeadlineName)); err == nil {
		s.deadline = t
	}
	if t, err := initproto.ReadInstant(filepath.Join(initproto.PermitPath, initproto.PermitName)); err == nil {
		s.permit = t
	}
}

// check does what time asks for. It never believes an instant that it has not just
// read: the file may have been replaced since.
func (s *supervisor) check() {
	if s.phase != initproto.PhaseRunning {
		return
	}
	now := initproto.Now()
	if s.late(now) {
		s.reread()
		s.reap()
		switch {
		case s.phase != initproto.PhaseRunning:
			return
		case s.permitted && now >= s.permit:
			s.end(initproto.ByPermit, 0)
		case now >= s.deadline && s.killAt == 0:
			s.end(initproto.ByDeadline, s.grace)
		}
	}
	s.checkPrograms(now)
	switch {
	case s.resumeAt > 0 && s.by != "":
		s.finish()
	case s.resumeAt > 0 && now >= s.resumeAt:
		s.resume()
	case s.killAt > 0 && now >= s.killAt:
		s.kill()
	}
}

func (s *supervisor) late(now time.Duration) bool {
	return !s.killed && (s.permitted && now >= s.permit || s.killAt == 0 && now >= s.deadline)
}

// next is when check or over have something to do; 0 is never.
func (s *supervisor) next() time.Duration {
	var at time.Duration
	sooner := func(t time.Duration) {
		if at == 0 || t < at {
			at = max(t, 1)
		}
	}
	switch s.phase {
	case initproto.PhaseIdle:
		sooner(s.away + idleMost)
	case initproto.PhaseRunning:
		if s.killed {
			return 0
		}
		if s.permitted {
			sooner(s.permit)
		}
		if s.killAt == 0 {
			sooner(s.deadline)
		} else {
			sooner(s.killAt)
		}
		if s.resumeAt > 0 {
			sooner(s.resumeAt)
		}
		for _, p := range s.programs {
			if p.killAt > 0 {
				sooner(p.killAt)
			}
		}
	case initproto.PhaseEnded:
		if s.conn == nil {
			sooner(s.lingerUntil())
		}
	}
	return at
}

// lingerUntil is how long an ended task waits for an agent that is away: as long as
// that agent may still come back and be believed.
func (s *supervisor) lingerUntil() time.Duration {
	until := s.deadline + s.grace
	if s.permitted {
		until = s.permit
	}
	return max(until, s.away) + linger
}

// over says whether init shall exit, and with which code.
func (s *supervisor) over() (int, bool) {
	now := initproto.Now()
	switch s.phase {
	case initproto.PhaseIdle:
		if s.by != "" || s.taken || s.conn == nil && now >= s.away+idleMost {
			return initproto.CodeBroken, true
		}
	case initproto.PhaseEnded:
		if !s.taken && s.conn == nil && now >= s.lingerUntil() {
			s.reread() // the permit goes on while another task's agent renews it
			s.taken = now >= s.lingerUntil()
		}
		if s.taken || s.abandoned {
			return s.code(), true
		}
	}
	return 0, false
}

func (s *supervisor) code() int {
	switch s.exit.By {
	case initproto.ByDeadline:
		return initproto.CodeDeadline
	case initproto.ByPermit:
		return initproto.CodePermit
	case initproto.ByStop:
		return initproto.CodeStop
	case initproto.ByOutside:
		return initproto.CodeOutside
	case initproto.ByFail:
		return initproto.CodeFailed
	}
	return s.exit.Code
}

// end sends TERM to every process of the task, and KILL after grace. The first to
// ask is the one who ended it; later ones only make it sooner. The end of this run alone
// gives way to any other: an unhealthy one to a restart, both to the end of the task.
func (s *supervisor) end(by initproto.By, grace time.Duration) {
	if s.phase == initproto.PhaseEnded {
		return
	}
	first := s.runAlone() && s.by != by
	if first {
		s.by = by
	}
	if s.phase == initproto.PhaseIdle {
		return // over ends init
	}
	if s.hold { // between two programs there is nothing to send TERM to, and none of them deserves it
		s.endHold()
		return
	}
	if at := initproto.Now() + max(grace, 0); s.killAt == 0 || at < s.killAt {
		s.killAt = at
	}
	if grace <= 0 {
		s.kill()
		return
	}
	if first {
		_ = unix.Kill(-1, unix.SIGTERM)
		_ = unix.Kill(-1, unix.SIGCONT) // a stopped process gets its TERM too
	}
}

// runAlone says whether nobody has asked for more than the end of the present run.
func (s *supervisor) runAlone() bool {
	return s.by == "" || s.by == initproto.ByFail || s.by == initproto.ByAgain
}

func (s *supervisor) kill() {
	s.killed = true
	_ = unix.Kill(-1, unix.SIGKILL)
}

func (s *supervisor) signal(sig os.Signal) {
	s.reap()
	if sig != unix.SIGTERM || s.hold { // a submission would gain another attempt by it; dockerd's KILL comes later
		return
	}
	// dockerd stops the container, and sends KILL itself when its patience ends. A task
	// can send this too: it gains no more than to be given another of its own attempts.
	if s.phase != initproto.PhaseEnded && s.runAlone() {
		s.by = initproto.ByOutside
	}
	_ = unix.Kill(-1, unix.SIGTERM)
}

// reap takes every dead child. When the main process is among them the others are
// killed, and when none is left the run has ended: never before.
func (s *supervisor) reap() {
	if s.phase != initproto.PhaseRunning || s.resumeAt > 0 {
		return
	}
	for {
		var ws unix.WaitStatus
		var ru unix.Rusage
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, &ru)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ECHILD:
			s.stageIsOver()
			if s.pid == 0 {
				s.ended()
			}
			return
		case err != nil || pid == 0:
			if s.pid == 0 {
				s.kill() // also those forked since
			}
			s.clearStage()
			return
		case s.stage != nil:
			s.stageReaped(pid, ws, &ru)
		case pid == s.pid:
			s.pid, s.exit = 0, exitOf(ws)
			s.exit.Wall = initproto.Now() - s.started
			s.kill()
		default:
			s.reaped(pid, ws)
		}
	}
}

func exitOf(ws unix.WaitStatus) initproto.Exit {
	if ws.Signaled() {
		return initproto.Exit{Code: 128 + int(ws.Signal()), Signal: int(ws.Signal())}
	}
	return initproto.Exit{Code: ws.ExitStatus()}
}

// ended takes the end of a run.
func (s *supervisor) ended() {
	if s.runsAgain() {
		s.rest()
	} else {
		s.finish()
	}
}

// finish is the end of the task.
func (s *supervisor) finish() {
	s.phase, s.resumeAt = initproto.PhaseEnded, 0
	initproto.CloseAll(s.stdio) // or the pipes would have no end
	s.stdio = nil
	s.shut()
	s.exit.By = initproto.ByItself
	if s.by != "" {
		s.exit.By = s.by
	}
	var ru unix.Rusage
	if unix.Getrusage(unix.RUSAGE_CHILDREN, &ru) == nil {
		s.exit.CPU = time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	}
	s.send(initproto.Reply{Event: initproto.EventExited, Exit: &s.exit, Restarts: s.restarts})
}

// shut is the end of stdin, once the agent has closed its own write end.
func (s *supervisor) shut() {
	if s.input >= 0 {
		_ = unix.Close(s.input)
		s.input = -1
	}
}

// signalMain signals what has the terminal, as its keys would, or the main process's group.
func (s *supervisor) signalMain(n int) {
	if s.pid == 0 || !slices.Contains(signalled, unix.Signal(n)) {
		return
	}
	group := s.pid
	if s.master >= 0 {
		if fg, err := unix.IoctlGetInt(s.master, unix.TIOCGPGRP); err == nil && fg > 1 {
			group = fg
		}
	}
	_ = unix.Kill(-group, unix.Signal(n))
}

// setOOM sets our oom_score_adj. Anybody may raise it, and lower it again to what
// it was at the start.
func (s *supervisor) setOOM(adj int) {
	if s.oom != nil {
		_, _ = s.oom.WriteAt([]byte(strconv.Itoa(adj)), 0)
	}
}

func (s *supervisor) getOOM() int {
	if s.oom == nil {
		return 0
	}
	b := make([]byte, 16)
	n, _ := s.oom.ReadAt(b, 0)
	for n > 0 && b[n-1] == '\n' {
		n--
	}
	adj, _ := strconv.Atoi(string(b[:n]))
	return adj
}
