package docker

import (
	"context"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
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
	killAgain   = 10 * time.Second // and then asked again
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

	console *console // nil unless clients may attach to its process

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
	output    *os.File      // the output folder
	folder    chan struct{} // closed once init has had its chance to bring it
	current   agent.RunState
	runs      chan struct{} // closed when current changes
	restartTo int           // restarts that were asked for
	oomBefore int64         // kills for want of memory in the runs before the present one
	version   int           // of init's protocol
	limited   int64         // the memory that the container may use, 0 if it is not known
	tidy      bool          // of a judge: init has said that nothing is to be cleaned before the next program
	calls     map[uint64]chan answer
	lastCall  uint64
	stopBy    time.Duration // when a stop's grace is over; 0: none was asked
	backstop  *time.Timer
	removing  bool

	backgrounds []*background // oldest first
	tails       sync.WaitGroup

	finishing bool
	outcome   agent.Outcome
}

var _ agent.Attempt = (*attempt)(nil)

func (r *Runtime) newAttempt(m meta) (*attempt, error) {
	a := &attempt{
		rt: r, meta: m, name: ContainerName(m.Assignment), done: make(chan struct{}),
		met: make(chan struct{}), served: make(chan struct{}), runs: make(chan struct{}), folder: make(chan struct{}),
		calls: map[uint64]chan answer{}, lastCall: firstCall,
	}
	a.dir = r.folder(a.name)
	var err error
	if a.spool, err = openSpool(a.dir, m.LogLimit, r.null); err != nil {
		return a, err
	}
	if err = a.newConsole(); err != nil {
		a.spool.close()
	}
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

// OutputFolder implements agent.Attempt. Init brings it with its hello; the descriptor
// keeps the folder also when the container is gone.
func (a *attempt) OutputFolder(ctx context.Context) (*os.File, error) {
	select {
	case <-a.folder:
	default:
		select {
		case <-a.folder:
		case <-a.served:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.output == nil {
		return nil, agent.ErrGone
	}
	fd, err := unix.FcntlInt(a.output.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the output folder: %w", err)
	}
	return os.NewFile(uintptr(fd), "output"), nil
}

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
	a.killAfterLocked(grace + stopSlack)
}

// killAfterLocked kills the container when so much time is over and the attempt is not: again
// and again, since dockerd may be away.
func (a *attempt) killAfterLocked(d time.Duration) {
	if a.backstop != nil {
		a.backstop.Stop()
	}
	id := a.container
	a.backstop = time.AfterFunc(d, func() {
		a.rt.goDo(func() {
			a.log().Warn().Msg("init does not end the task, killing its container")
			again := time.NewTicker(killAgain)
			defer again.Stop()
			for {
				ctx, cancel := context.WithTimeout(a.rt.ctx, dockerWithin)
				if _, err := a.rt.docker.ContainerKill(ctx, id, client.ContainerKillOptions{Signal: "KILL"}); err != nil {
					a.log().Warn().Err(err).Msg("kill a container")
				}
				cancel()
				select {
				case <-a.done:
					return
				case <-a.rt.ctx.Done():
					return
				case <-again.C:
				}
			}
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
	a.interruptLocked()
	a.loseLocked()
}

// release closes the descriptors, after hangUp and the end of serve.
func (a *attempt) release() {
	a.mu.Lock()
	pumps := a.pumps
	a.mu.Unlock()
	if pumps != nil {
		<-pumps
	}
	a.tails.Wait()
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
	a.discard()
}

// discard closes what newAttempt opened.
func (a *attempt) discard() {
	a.spool.close()
	if a.console != nil {
		a.console.close()
	}
}

// interruptLocked ends the pumps, and a write to stdin.
func (a *attempt) interruptLocked() {
	a.spool.letGo()
	interrupt(a.pipes)
	if a.console != nil {
		a.console.interrupt()
	}
}

func (a *attempt) interrupt() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.interruptLocked()
}
