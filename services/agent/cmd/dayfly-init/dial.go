package main

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent/initproto"
)

// dialMay is how long a dial may take: a listener whose queue is full does not answer.
const dialMay = 5 * time.Second

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
		s.refuse(req, &fault{initproto.FaultBusy, 0, fmt.Sprintf("%d dials are under way already", initproto.MaxDials)})
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
		kind := initproto.FaultDial
		if errors.Is(d.err, unix.ECONNREFUSED) {
			kind = initproto.FaultRefused
		}
		if d.agent == s.conn {
			s.refuse(initproto.Request{ID: d.id}, &fault{kind, 0, d.err.Error()})
		}
		return
	}
	defer d.conn.Close()
	if raw, err := d.conn.SyscallConn(); err == nil && d.agent == s.conn {
		_ = raw.Control(func(fd uintptr) { s.send(initproto.Reply{ID: d.id, Event: initproto.EventConnected}, int(fd)) })
	}
}
