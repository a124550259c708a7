package main

import (
	"fmt"
	"net"
	"strconv"
	"time"

	"dayfly.dev/services/agent/initproto"
)

// dialMay is how long a dial may take: a listener whose queue is full does not answer.
const dialMay = 5 * time.Second

// exec starts a process beside the main one. Its exit is sent when it is reaped.
func (s *supervisor) exec(req initproto.Request, fds []int) {
	defer initproto.CloseAll(fds)
	pid, f := 0, (*fault)(nil)
	switch {
	case s.pid == 0 || s.by != "":
		f = &fault{initproto.FaultStopped, 0, "the task is not running"}
	case len(req.Argv) == 0 || req.Argv[0] == "" || len(fds) != 3:
		f = &fault{initproto.FaultRequest, 0, fmt.Sprintf("an exec needs a command and 3 descriptors, not %d", len(fds))}
	case len(s.execs) >= initproto.MaxExecs:
		f = &fault{initproto.FaultSystem, 0, fmt.Sprintf("%d are running already", initproto.MaxExecs)}
	default:
		pid, f = s.spawn(req.Argv, merge(s.env, req.Env), req.Dir, fds)
	}
	if f != nil {
		s.refuse(req, f)
		return
	}
	s.execs[pid] = req.ID
	s.send(initproto.Reply{ID: req.ID, Event: initproto.EventStarted, Pid: pid})
}

func (s *supervisor) refuse(req initproto.Request, f *fault) {
	s.send(initproto.Reply{ID: req.ID, Event: initproto.EventError, Fault: f.kind, Code: f.code, Message: f.message})
}

// dialed is what came of a dial.
type dialed struct {
	id    uint64
	agent *initproto.Conn // who asked
	conn  *net.TCPConn
	err   error
}

// dial connects in a goroutine of its own; connect takes the outcome.
func (s *supervisor) dial(req initproto.Request) {
	switch {
	case s.pid == 0:
		s.refuse(req, &fault{initproto.FaultStopped, 0, "the task is not running"})
		return
	case s.dials >= initproto.MaxDials:
		s.refuse(req, &fault{initproto.FaultSystem, 0, fmt.Sprintf("%d are under way already", initproto.MaxDials)})
		return
	}
	s.dials++
	agent := s.conn
	go func() {
		d := dialed{id: req.ID, agent: agent}
		var c net.Conn
		if c, d.err = net.DialTimeout("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(req.Port)), dialMay); d.err == nil {
			d.conn = c.(*net.TCPConn)
		}
		s.dialed <- d
	}()
}

func (s *supervisor) connect(d dialed) {
	s.dials--
	if d.err != nil {
		if d.agent == s.conn {
			s.refuse(initproto.Request{ID: d.id}, &fault{initproto.FaultDial, 0, d.err.Error()})
		}
		return
	}
	defer d.conn.Close()
	if raw, err := d.conn.SyscallConn(); err == nil && d.agent == s.conn {
		_ = raw.Control(func(fd uintptr) { s.send(initproto.Reply{ID: d.id, Event: initproto.EventConnected}, int(fd)) })
	}
}
