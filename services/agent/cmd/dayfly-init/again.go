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
	return p != nil && (s.by == "" || s.by == initproto.ByFail) &&
		(p.Always || s.exit.Code != 0 || s.by == initproto.ByFail) &&
		(p.Max == 0 || s.restarts < p.Max)
}

// rest begins the pause between two runs, in which the task has no process.
func (s *supervisor) rest() {
	now := initproto.Now()
	if ran := now - s.began; int64(ran/s.pause) >= int64(s.again.Calm) {
		s.pause = s.again.Pause
	}
	s.resumeAt = now + s.pause
	s.pause = min(2*s.pause, s.again.Most)
	s.by, s.killAt, s.killed = "", 0, false
	s.send(initproto.Reply{Event: initproto.EventPaused, Exit: &s.exit, Restarts: s.restarts})
}

// resume runs the command again. If it cannot be started, that is a run that failed.
func (s *supervisor) resume() {
	s.resumeAt, s.began = 0, initproto.Now()
	s.restarts++
	_, _ = unix.Seek(s.stdio[0], 0, io.SeekStart)
	pid, f := s.spawn(s.req.Argv, s.env, s.req.Dir, s.stdio)
	if f != nil {
		s.exit = initproto.Exit{Code: cmp.Or(f.code, 126), Wall: s.began - s.started}
		s.ended()
		return
	}
	s.pid = pid
	s.send(initproto.Reply{Event: initproto.EventStarted, Pid: pid, Restarts: s.restarts})
}
