package docker

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

const (
	drainWithin = 5 * time.Second  // for the pipes' end once no process is left
	stopSlack   = 15 * time.Second // beyond the grace, before Docker is asked to kill
)

// attempt implements agent.Attempt.
//
// While it runs three goroutines sleep on it: serve reads the connection to init,
// and one pump for each pipe. None of them wakes while nothing happens.
type attempt struct {
	rt    *Runtime
	meta  meta
	name  string
	dir   string
	spool *spool

	done   chan struct{}
	met    chan struct{} // closed at the first hello that was not idle, or with done
	served chan struct{} // closed when serve has returned

	removal sync.Mutex // one Remove at a time

	mu        sync.Mutex // guards all below
	container string     // id, "" while there is none
	conn      *initproto.Conn
	listener  *net.UnixListener
	hungUp    bool
	asked     bool // the run request went out, now or under an earlier agent
	ran       bool
	startedAt time.Duration
	deadline  time.Duration
	cgroup    cgroup
	uid, gid  int // of the task
	pipes     [2]*os.File
	pumps     chan struct{} // closed when the pumps have returned; nil if there are none
	output    *os.File      // /task/output
	current   agent.RunState
	runs      chan struct{} // closed when current changes
	restartTo int           // restarts that were asked for
	oomBefore int64         // kills for want of memory in the runs before the present one
	calls     map[uint64]chan answer
	lastCall  uint64
	stopBy    time.Duration // when a stop's grace is over; 0: none was asked
	backstop  *time.Timer
	removing  bool
	finishing bool
	outcome   agent.Outcome
}

var _ agent.Attempt = (*attempt)(nil)

func (r *Runtime) newAttempt(m meta) (*attempt, error) {
	a := &attempt{
		rt: r, meta: m, name: ContainerName(m.Assignment), done: make(chan struct{}),
		met: make(chan struct{}), served: make(chan struct{}), runs: make(chan struct{}),
		calls: map[uint64]chan answer{}, lastCall: firstCall,
	}
	a.dir = r.folder(a.name)
	var err error
	a.spool, err = openSpool(a.dir, m.LogLimit, r.null)
	return a, err
}

func (a *attempt) log() *zerolog.Logger {
	l := a.rt.log.With().Str("task", string(a.meta.Assignment.Task)).Int("attempt", a.meta.Assignment.Attempt).Logger()
	return &l
}

// Assignment implements agent.Attempt.
func (a *attempt) Assignment() schemas.Assignment { return a.meta.Assignment }

// StartedFor implements agent.Attempt.
func (a *attempt) StartedFor() (time.Duration, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.ran {
		return 0, false
	}
	return max(0, initproto.Now()-a.startedAt), true
}

// Done implements agent.Attempt.
func (a *attempt) Done() <-chan struct{} { return a.done }

// Outcome implements agent.Attempt.
func (a *attempt) Outcome() agent.Outcome {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.outcome
}

// Output implements agent.Attempt.
func (a *attempt) Output() agent.Output { return a.spool }

// Stop implements agent.Attempt. An init that does not answer is killed through
// Docker some time after the grace.
func (a *attempt) Stop(grace time.Duration) {
	grace = max(grace, 0)
	a.mu.Lock()
	defer a.mu.Unlock()
	by := initproto.Now() + grace
	if a.finishing || a.stopBy != 0 && by >= a.stopBy {
		return
	}
	a.stopBy = by
	// The next agent must know that it was we who asked.
	if err := initproto.WriteInstant(filepath.Join(a.dir, "stopped"), by); err != nil {
		a.log().Warn().Err(err).Msg("cannot note a stop")
	}
	a.sendLocked(initproto.Request{Op: initproto.OpStop, Grace: grace})
	if a.backstop != nil {
		a.backstop.Stop()
	}
	id := a.container
	a.backstop = time.AfterFunc(grace+stopSlack, func() {
		a.rt.goDo(func() {
			a.log().Warn().Msg("init does not end the task, killing its container")
			_, _ = a.rt.docker.ContainerKill(a.rt.ctx, id, client.ContainerKillOptions{Signal: "KILL"})
		})
	})
}

// SetDeadline implements agent.Attempt.
func (a *attempt) SetDeadline(timeLeft time.Duration) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.finishing:
		return nil
	case initproto.Now() >= a.deadline: // init has sent TERM, and takes nothing back
		return agent.ErrOver
	}
	return a.setDeadlineLocked(timeLeft)
}

func (a *attempt) setDeadlineLocked(timeLeft time.Duration) error {
	at := initproto.Now() + timeLeft
	if err := initproto.WriteInstant(filepath.Join(a.dir, "c", initproto.DeadlineName), at); err != nil {
		return err
	}
	a.deadline = at
	a.sendLocked(initproto.Request{Op: initproto.OpReread})
	return nil
}

// Remove implements agent.Attempt.
func (a *attempt) Remove(ctx context.Context) error {
	a.removal.Lock()
	defer a.removal.Unlock()
	if a.rt.isClosed() { // its containers are the next agent's
		return fmt.Errorf("remove %s: %w", a.name, errClosed)
	}
	if err := enter(ctx, a.rt.removals); err != nil {
		return fmt.Errorf("remove %s: %w", a.name, err)
	}
	defer func() { <-a.rt.removals }()
	a.mu.Lock()
	a.removing = true
	id := a.container
	a.sendLocked(initproto.Request{Op: initproto.OpTaken}) // if it has ended it need not be killed
	a.mu.Unlock()
	if id != "" {
		if err := a.rt.removeContainer(ctx, id); err != nil {
			return fmt.Errorf("remove %s: %w", a.name, err)
		}
	}
	a.finish(agent.Outcome{By: schemas.EndedStop, Message: "it was removed while it ran"})
	a.hangUp()
	<-a.served
	a.release()
	if err := os.RemoveAll(a.dir); err != nil {
		return fmt.Errorf("remove %s: %w", a.name, err)
	}
	a.rt.forget(a)
	return nil
}

// removeContainer takes a container away, whatever it is doing, with its anonymous
// volumes. One that is not there is fine.
func (r *Runtime) removeContainer(ctx context.Context, id string) error {
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		began := time.Now()
		_, err := r.docker.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		if cerrdefs.IsNotFound(err) {
			err = nil
		}
		r.metrics.done(ctx, "remove", began, err)
		if err == nil {
			return nil
		}
		// "Already in progress" is another removal's; "device busy" goes away by itself.
		if ctx.Err() != nil || client.IsErrConnectionFailed(err) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return err
		}
	}
}

func (a *attempt) containerID() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.container
}

func (a *attempt) wasRun() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked
}

func (a *attempt) over() bool {
	select {
	case <-a.done:
		return true
	default:
		return false
	}
}

func (a *attempt) send(req initproto.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sendLocked(req)
}

// sendLocked sends if init is there. What it must know later is said again when it
// dials: the files speak for themselves, and a stop is repeated by attach.
func (a *attempt) sendLocked(req initproto.Request, fds ...int) {
	if a.conn == nil {
		return
	}
	_ = a.conn.SetWriteDeadline(time.Now().Add(sendWithin))
	if err := a.conn.Send(req, fds...); err != nil {
		a.log().Warn().Err(err).Str("request", string(req.Op)).Msg("init does not take a request")
	}
}

// serve reads what init says until the attempt is over and init is gone, or the
// runtime is closed. It is the only one that calls attach, exited and settle.
func (a *attempt) serve(conn *initproto.Conn, watchAfter time.Duration) {
	defer close(a.served)
	for {
		if conn == nil {
			if conn = a.redial(watchAfter); conn == nil {
				return
			}
		}
		a.read(conn)
		a.dropConn(conn)
		if a.over() || a.rt.ctx.Err() != nil {
			return
		}
		conn, watchAfter = nil, 0
	}
}

func (a *attempt) read(conn *initproto.Conn) {
	buf := make([]byte, initproto.MaxReply)
	for {
		var m initproto.Reply
		fds, err := conn.Receive(buf, &m)
		if err == nil && m.ID != 0 {
			a.answer(m, fds)
			continue
		}
		initproto.CloseAll(fds) // none is due but with an answer
		if err != nil {
			if errors.Is(err, initproto.ErrMessage) {
				a.log().Warn().Err(err).Msg("init speaks nonsense, hanging up")
			}
			return
		}
		switch {
		case m.Event == initproto.EventExited && m.Exit != nil:
			a.exited(*m.Exit)
		case m.Event == initproto.EventPaused, m.Event == initproto.EventStarted:
			a.mu.Lock()
			a.runIsLocked(m, m.Event == initproto.EventStarted)
			a.mu.Unlock()
		}
	}
}

// runIsLocked takes init's word on the present run. An init that was taken over gains
// nothing by a wrong count: it goes up only, and no further than the policy and the
// restarts that were asked for let it.
func (a *attempt) runIsLocked(m initproto.Reply, up bool) {
	most := math.MaxInt32
	switch policy := a.meta.Again; {
	case policy == nil:
		most = a.restartTo
	case policy.Max > 0:
		most = a.restartTo + policy.Max
	}
	n := min(m.Restarts, most)
	known := n == a.current.Restarts && up == a.current.Up && (a.current.Last != nil || m.Exit == nil)
	if n < a.current.Restarts || known {
		return
	}
	if n > a.current.Restarts { // written first: what was reported must not be forgotten
		if err := initproto.WriteInstant(filepath.Join(a.dir, "restarts"), time.Duration(n)); err != nil {
			a.log().Warn().Err(err).Msg("cannot note a restart")
		}
		a.oomBefore, _ = a.cgroup.oomKills()
	}
	next := agent.RunState{Restarts: n, Up: up, Last: a.current.Last}
	if m.Exit != nil {
		next.Last = exitOf(*m.Exit)
	}
	a.setRunLocked(next)
}

func (a *attempt) setRunLocked(r agent.RunState) {
	if a.finishing {
		return
	}
	a.current = r
	close(a.runs)
	a.runs = make(chan struct{})
}

// exitOf is the exit that init tells of, as far as it can be true.
func exitOf(e initproto.Exit) *schemas.Exit {
	return &schemas.Exit{Code: e.Code & 0xff, Signal: min(max(e.Signal, 0), 64)}
}

// Restart implements agent.Attempt. An init that is not there is told when it dials.
func (a *attempt) Restart(to int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.finishing || to <= a.restartTo || to <= a.current.Restarts {
		return
	}
	// The next agent must believe init that it was restarted so often.
	if err := initproto.WriteInstant(filepath.Join(a.dir, "restart_to"), time.Duration(to)); err != nil {
		a.log().Warn().Err(err).Msg("cannot note a restart")
	}
	a.restartTo = to
	a.sendLocked(initproto.Request{Op: initproto.OpAgain, Restarts: to})
}

// Run implements agent.Attempt.
func (a *attempt) Run() (agent.RunState, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.current, a.runs
}

// Fail implements agent.Attempt. An init that is not there is not told: who looks
// after the task's health sees that it goes on, and says it again.
func (a *attempt) Fail(restarts int) {
	a.send(initproto.Request{Op: initproto.OpFail, Restarts: restarts})
}

func (a *attempt) dropConn(conn *initproto.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	_ = conn.Close()
	if a.conn == conn {
		a.conn = nil
	}
	a.failCallsLocked()
}

// redial waits for init to come back, and for Docker to say that it never will. A
// closed connection alone proves nothing. It returns nil when there is nothing more
// to wait for.
func (a *attempt) redial(watchAfter time.Duration) *initproto.Conn {
	for {
		l, err := listen(filepath.Join(a.dir, "c"))
		if err == nil {
			a.mu.Lock()
			if a.hungUp {
				a.mu.Unlock()
				_ = l.Close()
				return nil
			}
			a.listener = l
			a.mu.Unlock()
		} else {
			a.log().Error().Err(err).Msg("cannot listen for init")
		}
		ctx, cancel := context.WithCancel(a.rt.ctx)
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			state, known := a.watch(ctx, watchAfter)
			if known {
				a.settle(state)
			}
			if l != nil {
				_ = l.Close()
			}
		}()
		var g *greeting
		if l != nil {
			g, err = a.accept(l)
		} else {
			<-watched
		}
		cancel()
		<-watched
		switch {
		case err == nil && g != nil:
			if a.attach(g) {
				return g.conn
			}
			_ = g.conn.Close()
		case a.over() || a.rt.ctx.Err() != nil || a.isHungUp():
			return nil
		}
		if a.over() {
			return nil
		}
	}
}

func (a *attempt) isHungUp() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.hungUp
}

// watch waits until the container does not run. It knows nothing if ctx ends first.
// A nil state says that there is no container.
func (a *attempt) watch(ctx context.Context, after time.Duration) (state *container.State, known bool) {
	for pause := after; ; pause = min(max(2*pause, 100*time.Millisecond), 5*time.Second) {
		if pause > 0 {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return nil, false
			}
		}
		id := a.containerID()
		w := a.rt.docker.ContainerWait(ctx, id, client.ContainerWaitOptions{Condition: container.WaitConditionNotRunning})
		var err error
		select { // both end with ctx
		case err = <-w.Error:
		case <-w.Result:
		}
		if ctx.Err() != nil {
			return nil, false
		}
		if err == nil {
			state, err = a.rt.state(ctx, id)
			if err == nil && (state == nil || !state.Running) {
				return state, true
			}
		}
		if err != nil && cerrdefs.IsNotFound(err) {
			return nil, true
		}
	}
}

// state inspects a container; nil if there is none.
func (r *Runtime) state(ctx context.Context, id string) (*container.State, error) {
	got, err := r.docker.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if cerrdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return got.Container.State, nil
}

// attach takes a connection of init after the run, in this agent's life or under an
// earlier one: the descriptors, and what was missed. False: of no use.
func (a *attempt) attach(g *greeting) bool {
	a.mu.Lock()
	if a.hungUp {
		a.mu.Unlock()
		a.closeFiles(g)
		return false
	}
	a.adoptLocked(g)
	if g.hello.Phase == initproto.PhaseIdle {
		// An earlier agent was killed between create and run. Nothing was started, and the
		// container goes with Remove.
		a.mu.Unlock()
		a.finish(agent.Outcome{By: schemas.EndedLost, Message: "its start was broken off"})
		return true
	}
	if !a.ran {
		a.ran, a.startedAt = true, min(max(g.hello.Started, 0), initproto.Now())
		_ = initproto.WriteInstant(filepath.Join(a.dir, "started"), a.startedAt)
	}
	a.asked = true
	if g.hello.Phase == initproto.PhaseRunning && g.hello.Restarts > 0 {
		a.oomBefore, _ = a.cgroup.oomKills() // of which run they were is not known
	}
	a.runIsLocked(g.hello, g.hello.Phase == initproto.PhaseRunning && g.hello.Pid != 0)
	if a.stopBy != 0 {
		a.sendLocked(initproto.Request{Op: initproto.OpStop, Grace: max(0, a.stopBy-initproto.Now())})
	}
	if a.restartTo > a.current.Restarts {
		a.sendLocked(initproto.Request{Op: initproto.OpAgain, Restarts: a.restartTo})
	}
	a.sendLocked(initproto.Request{Op: initproto.OpReread})
	select {
	case <-a.met:
	default:
		close(a.met)
	}
	a.mu.Unlock()
	if g.hello.Phase == initproto.PhaseEnded {
		a.exited(*g.hello.Exit)
	}
	return true
}

// adoptLocked takes over the greeting's connection and descriptors.
func (a *attempt) adoptLocked(g *greeting) {
	a.conn = g.conn
	a.uid, a.gid = int(g.peer.Uid), int(g.peer.Gid)
	if g.peer.Pid > 0 {
		a.cgroup = findCgroup(int(g.peer.Pid))
	}
	if fd, ok := g.files[initproto.FileOutput]; ok {
		delete(g.files, initproto.FileOutput)
		var st unix.Stat_t
		if a.output == nil && unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			a.output = os.NewFile(uintptr(fd), "output")
		} else {
			_ = unix.Close(fd)
		}
	}
	if a.pumps == nil && !a.finishing {
		var pipes [2]*os.File
		for i, name := range streamNames {
			if fd, ok := g.files[name]; ok {
				delete(g.files, name)
				p, err := adoptPipe(fd)
				if err != nil {
					a.log().Warn().Err(err).Str("stream", name).Msg("a log is lost")
					continue
				}
				pipes[i] = p
			}
		}
		a.pumpLocked(pipes)
	}
	a.closeFiles(g)
}

func (a *attempt) closeFiles(g *greeting) {
	for _, fd := range g.files {
		_ = unix.Close(fd)
	}
	g.files = nil
}

// pumpLocked starts a pump for each pipe that there is.
func (a *attempt) pumpLocked(pipes [2]*os.File) {
	a.pipes, a.pumps = pipes, make(chan struct{})
	var wg sync.WaitGroup
	for i, p := range pipes {
		if p != nil {
			wg.Go(func() { a.spool.pump(p, i) })
		}
	}
	pumps := a.pumps
	go func() { // ends with the pumps, which hangUp interrupts; release waits for it
		wg.Wait()
		close(pumps)
	}()
}

// drain waits for the pipes' end.
func (a *attempt) drain() {
	a.mu.Lock()
	pipes, pumps := a.pipes, a.pumps
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
		interrupt(pipes)
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
	pipes, pumps := a.pipes, a.pumps
	a.mu.Unlock()
	if pumps != nil {
		interrupt(pipes)
		<-pumps
	}
	if err := writeJSON(filepath.Join(a.dir, "outcome.json"), outcome(o)); err != nil {
		a.log().Warn().Err(err).Msg("cannot keep an outcome")
	}
	a.mu.Lock()
	a.outcome = o
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

// hangUp ends serve and the pumps. What is still in the pipes stays there.
func (a *attempt) hangUp() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hungUp = true
	if a.conn != nil {
		_ = a.conn.Close()
	}
	if a.listener != nil {
		_ = a.listener.Close()
	}
	if a.backstop != nil {
		a.backstop.Stop()
	}
	interrupt(a.pipes)
}

// release closes the descriptors, after hangUp and the end of serve.
func (a *attempt) release() {
	a.mu.Lock()
	pumps := a.pumps
	a.mu.Unlock()
	if pumps != nil {
		<-pumps
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, p := range a.pipes {
		if p != nil {
			_ = p.Close()
			a.pipes[i] = nil
		}
	}
	if a.output != nil {
		_ = a.output.Close()
		a.output = nil
	}
	a.spool.close()
}
