package main

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent/initproto"
)

// A run on hold has no command. Programs come one by one, each alone: when it ends, all
// that it has started is killed, and its end is told once no process but init is left. So
// nothing of one program sees the next.

// heldPid stands for the main process that such a run does not have. No process has it.
const heldPid = -1

// endHold ends the run.
func (s *supervisor) endHold() {
	if s.phase != initproto.PhaseRunning || s.pid == 0 {
		return
	}
	s.pid, s.exit = 0, initproto.Exit{Wall: initproto.Now() - s.started}
	s.kill()
	s.reap()
}

// stageReaped takes the death of one of the processes.
func (s *supervisor) stageReaped(pid int, ws unix.WaitStatus, ru *unix.Rusage) {
	p := s.stage
	p.exit.CPU += time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	p.exit.MaxRSS = max(p.exit.MaxRSS, ru.Maxrss<<10)
	if !p.alive || pid != p.pid {
		return
	}
	exit := exitOf(ws)
	p.alive, p.exit.Code, p.exit.Signal = false, exit.Code, exit.Signal
	p.exit.Wall = initproto.Now() - p.started
	s.clearStage()
}

// clearStage kills what a program that has ended left behind.
func (s *supervisor) clearStage() {
	if s.stage != nil && !s.stage.alive {
		_ = unix.Kill(-1, unix.SIGKILL)
	}
}

// stageIsOver tells of the end of a program, now that no process is left.
func (s *supervisor) stageIsOver() {
	p := s.stage
	if p == nil {
		return
	}
	s.stage = nil
	s.programs = slices.DeleteFunc(s.programs, func(o *program) bool { return o == p })
	clean := s.isTidy()
	p.exit.Self = usedBySelf() - p.self // the look counted in
	var own unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &own) == nil && p.exit.MaxRSS <= own.Maxrss<<10 {
		p.exit.MaxRSS = 0 // a child begins with the mark of its parent
	}
	if p.agent != nil && p.agent == s.conn {
		s.send(initproto.Reply{ID: p.id, Event: initproto.EventExited, Exit: &p.exit, Tidy: clean})
	}
}

// isTidy says whether the next program finds all places to write empty, so that none has to
// be run to clean them. What is mounted never changes.
func (s *supervisor) isTidy() bool {
	if s.places == nil {
		var err error
		if s.places, err = writable(); err != nil {
			s.places = nil
			return false
		}
	}
	return tidy(s.places)
}

func usedBySelf() time.Duration {
	var ru unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &ru) != nil {
		return 0
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}
