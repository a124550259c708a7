package docker

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

// drain waits for the pipes' end.
func (a *attempt) drain() {
	a.mu.Lock()
	pumps := a.pumps
	a.mu.Unlock()
	if pumps == nil {
		return
	}
	late := time.NewTimer(drainWithin)
	defer late.Stop()
	select {
	case <-pumps:
	case <-late.C: // somebody outside the container holds a write end
		a.log().Warn().Msg("a pipe has no end, giving up on it")
		a.interrupt()
		<-pumps
	}
}

// exited is init's word that no process is left.
func (a *attempt) exited(e initproto.Exit) {
	if a.over() {
		return
	}
	a.drain()
	if a.rt.ctx.Err() != nil {
		return // closed in the midst of it: the next agent drains the rest
	}
	a.mu.Lock()
	now, deadline, stopped, g, before := initproto.Now(), a.deadline, a.stopBy != 0 || a.removing, a.cgroup, a.oomBefore
	a.mu.Unlock()

	// Init may have been taken over. What it says of us must fit with what we know.
	o := agent.Outcome{
		Exit: exitOf(e),
		Usage: schemas.Usage{
			CPUMillis: max(e.CPU, 0).Milliseconds(), WallMillis: max(e.Wall, 0).Milliseconds(),
		},
	}
	o.Exit.OOMKilled = a.oomKilled(g, before)
	g.usage(&o.Usage)
	switch {
	case e.By == initproto.ByFail:
		o.By, o.Reason, o.Message = schemas.EndedItself, schemas.ReasonUnhealthy, "its health check failed"
	case e.By == initproto.ByDeadline && now >= deadline:
		o.By, o.Reason, o.Exit.TimedOut = schemas.EndedDeadline, schemas.ReasonExpired, true
	case e.By == initproto.ByPermit && !a.meta.Free:
		o.By, o.Message = schemas.EndedPermit, "the worker could not renew its permit"
	case e.By == initproto.ByStop && stopped:
		o.By = schemas.EndedStop
	case e.By == initproto.ByOutside:
		o.By, o.Message = schemas.EndedLost, "Docker was told to stop its container"
	default:
		itself(&o)
	}
	a.finish(o)
}

// itself fills in the reason of an attempt that ended by itself.
func itself(o *agent.Outcome) {
	o.By, o.Reason = schemas.EndedItself, schemas.ReasonExit
	switch {
	case o.Exit.OOMKilled && o.Exit.Code != 0:
		o.Reason, o.Message = schemas.ReasonOOM, "it needed more memory than it may use"
	case o.Exit.Signal != 0:
		o.Reason, o.Message = schemas.ReasonSignal, fmt.Sprintf("ended by signal %s", unix.SignalName(unix.Signal(o.Exit.Signal)))
	}
}

func (a *attempt) oomKilled(g cgroup, before int64) bool {
	if n, ok := g.oomKills(); ok {
		return n > before
	}
	ctx, cancel := context.WithTimeout(a.rt.ctx, 5*time.Second)
	defer cancel()
	state, err := a.rt.state(ctx, a.containerID())
	return err == nil && state != nil && state.OOMKilled
}

// settle is the end without a word from init: Docker's State decides, nil if there
// is no container.
func (a *attempt) settle(state *container.State) {
	if a.over() {
		return
	}
	a.drain()
	a.mu.Lock()
	defer func() { a.mu.Unlock() }()
	o := agent.Outcome{By: schemas.EndedLost}
	killed := &schemas.Exit{Code: 137, Signal: 9}
	switch {
	case a.stopBy != 0 || a.removing:
		o.By = schemas.EndedStop
	case state == nil:
		o.Message = "its container was taken away by somebody else"
	case state.Status == container.StateCreated:
		o.Message = "its start was broken off"
	case state.OOMKilled:
		killed.OOMKilled = true
		o.Exit = killed
		itself(&o)
	case state.ExitCode == initproto.CodeDeadline && initproto.Now() >= a.deadline:
		killed.TimedOut = true
		o.By, o.Reason, o.Exit = schemas.EndedDeadline, schemas.ReasonExpired, killed
	case state.ExitCode == initproto.CodeFailed:
		o.By, o.Reason, o.Exit, o.Message = schemas.EndedItself, schemas.ReasonUnhealthy, killed, "its health check failed"
	case state.ExitCode == initproto.CodePermit && !a.meta.Free:
		o.By, o.Message = schemas.EndedPermit, "the worker could not renew its permit"
	case a.ran && state.ExitCode < initproto.CodeDeadline && !ambiguous[state.ExitCode]:
		// Init went with the task's own code, after a long wait for an agent.
		o.Exit = &schemas.Exit{Code: state.ExitCode}
		if state.ExitCode > 128 && state.ExitCode <= 128+64 {
			o.Exit.Signal = state.ExitCode - 128
		}
		itself(&o)
		o.Message = "it ended while no agent was there; its last output may be missing"
	default:
		o.Message = fmt.Sprintf("its container was killed by somebody else (exit code %d)", state.ExitCode)
	}
	if a.ran && state != nil {
		if end, err := time.Parse(time.RFC3339Nano, state.FinishedAt); err == nil {
			ago := max(0, time.Since(end))
			o.Usage.WallMillis = max(0, initproto.Now()-ago-a.startedAt).Milliseconds()
		}
	}
	a.mu.Unlock()
	a.finish(o)
	a.mu.Lock()
}

// ambiguous exit codes of a container also come from a crash of init or a kill.
var ambiguous = map[int]bool{2: true, 137: true, 255: true}

// finish closes Done, once. The outcome is written down first: an agent that comes
// after this one gives the same.
func (a *attempt) finish(o agent.Outcome) {
	a.mu.Lock()
	if a.finishing {
		a.mu.Unlock()
		<-a.done
		return
	}
	a.finishing = true
	if a.backstop != nil {
		a.backstop.Stop()
	}
	pumps := a.pumps
	a.mu.Unlock()
	a.interrupt()
	if pumps != nil {
		<-pumps
	}
	if err := writeJSON(filepath.Join(a.dir, "outcome.json"), outcome(o)); err != nil {
		a.log().Warn().Err(err).Msg("cannot keep an outcome")
	}
	a.mu.Lock()
	a.outcome = o
	a.loseLocked()
	a.current.Up = false
	close(a.runs)
	select {
	case <-a.met:
	default:
		close(a.met)
	}
	close(a.done)
	a.mu.Unlock()
	a.spool.wake()
}
