package docker

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

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
		if err == nil && m.Event == initproto.EventKept {
			a.kept(m, fds)
			continue
		}
		initproto.CloseAll(fds) // none is due but with these
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
	if a.console != nil && a.console.isShut() && a.meta.Input && !a.meta.TTY {
		a.sendLocked(initproto.Request{Op: initproto.OpShut})
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
	a.conn, a.version = g.conn, g.hello.Version
	a.uid, a.gid = int(g.peer.Uid), int(g.peer.Gid)
	if g.peer.Pid > 0 {
		a.cgroup = findCgroup(int(g.peer.Pid))
	}
	if fd, ok := g.files[initproto.FileOutput]; ok {
		delete(g.files, initproto.FileOutput)
		// A tmpfs and nothing else: an init that was taken over could pass any folder that
		// the task sees, and we read it as root.
		var st unix.Stat_t
		var fs unix.Statfs_t
		if a.output == nil && unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR &&
			unix.Fstatfs(fd, &fs) == nil && fs.Type == unix.TMPFS_MAGIC {
			a.output = os.NewFile(uintptr(fd), "output")
		} else {
			_ = unix.Close(fd)
		}
	}
	select {
	case <-a.folder:
	default:
		close(a.folder)
	}
	if a.console != nil {
		a.adoptConsole(g)
	}
	if a.pumps == nil && !a.finishing && (!a.meta.TTY || a.ran || g.hello.Phase != initproto.PhaseIdle) {
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
		a.pumpLocked(pipes, a.terminalLocked(pipes))
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
// terminal is the write end of stdout's pipe where the process is on a terminal.
func (a *attempt) pumpLocked(pipes [2]*os.File, terminal *os.File) {
	a.pipes, a.pumps = pipes, make(chan struct{})
	var wg sync.WaitGroup
	if terminal != nil {
		shown := a.console.file
		wg.Go(func() { relay(shown, terminal) })
	}
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
