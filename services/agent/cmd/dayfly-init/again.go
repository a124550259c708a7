package main

import (
	"cmp"
	"io"

	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent/initproto"
)

// runsAgain says whether another run follows the one that has just ended. Whoever
// asked for the end, save for a health check, asked for the end of all runs.
func (s *supervisor) runsAgain() bool {
	p := s.again
	return s.by == initproto.ByAgain || p != nil && (s.by == "" || s.by == initproto.ByFail) &&
		(p.Always || s.exit.Code != 0 || s.by == initproto.ByFail) &&
		(p.Max == 0 || s.restarts-s.asked < p.Max)
}

// runAgain carries out a restart that was asked for. One that comes twice finds that
// there were so many restarts already.
func (s *supervisor) runAgain(to int) {
	switch {
	case s.phase != initproto.PhaseRunning || s.restarts >= to || s.hold:
	case s.resumeAt > 0:
		s.asked++
		s.resumeAt = initproto.Now()
	default:
		s.end(initproto.ByAgain, s.grace)
	}
}

// rest begins the pause between two runs, in which the task has no process. There is
// none before a run that was asked for.
func (s *supervisor) rest() {
	now := initproto.Now()
	if s.by == initproto.ByAgain {
		s.asked++
		s.resumeAt = now
		if s.again != nil {
			s.pause = s.again.Pause
		}
	} else {
		if ran := now - s.began; int64(ran/s.pause) >= int64(s.again.Calm) {
			s.pause = s.again.Pause
		}
		s.resumeAt = now + s.pause
		s.pause = min(2*s.pause, s.again.Most)
	}
	s.by, s.killAt, s.killed = "", 0, false
	s.send(initproto.Reply{Event: initproto.EventPaused, Exit: &s.exit, Restarts: s.restarts})
}

// resume runs the command again. If it cannot be started, that is a run that failed.
func (s *supervisor) resume() {
	s.resumeAt, s.began = 0, initproto.Now()
	s.restarts++
	_, _ = unix.Seek(s.stdio[0], 0, io.SeekStart)
	pid, f := s.spawn(s.req.Argv, s.env, s.req.Dir, s.stdio, s.req.Tty != nil)
	if f != nil {
		s.exit = initproto.Exit{Code: cmp.Or(f.code, 126), Wall: s.began - s.started}
		s.ended()
		return
	}
	s.pid = pid
	s.send(initproto.Reply{Event: initproto.EventStarted, Pid: pid, Restarts: s.restarts})
}
