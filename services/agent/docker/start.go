package docker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

const (
	// dockerWithin bounds a request that the caller's ctx no longer does: breaking off a
	// request does not break off what dockerd does.
	dockerWithin = 2 * time.Minute
	helloAfter   = 30 * time.Second // from Docker's "started" to init's hello
)

// Start implements agent.Runtime.
func (r *Runtime) Start(ctx context.Context, req agent.StartRequest) (_ agent.Attempt, err error) {
	b, err := r.box(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := enter(ctx, r.starts); err != nil {
		return nil, fmt.Errorf("start %s: %w", req.Assignment, err)
	}
	leave := func() { <-r.starts }
	ctx, cancel := req.Begin(ctx)
	defer cancel()
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}()
	if req.Assignment.Worker != r.cfg.Worker {
		leave()
		return nil, fmt.Errorf("start %s: this worker is %s", req.Assignment, r.cfg.Worker)
	}
	a, err := r.prepare(req, b)
	if err != nil {
		leave()
		return nil, fmt.Errorf("start %s: %w", req.Assignment, err)
	}
	if answered, err := r.create(ctx, a, b); err != nil {
		leave()
		close(a.served)
		r.abandon(a, answered)
		return nil, startFault(err, req, fmt.Sprintf("create container for %s", req.Assignment))
	}
	if err := r.launch(ctx, a, b, req, leave); err != nil {
		return nil, startFault(err, req, fmt.Sprintf("start %s", req.Assignment))
	}
	return a, nil
}

// box gathers what the container is made from.
func (r *Runtime) box(ctx context.Context, req agent.StartRequest) (*box, error) {
	img, err := r.imageByID(ctx, req.Image.ID)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", req.Assignment, err)
	}
	b := &box{
		cluster: r.cfg.Cluster, a: req.Assignment, spec: req.Spec, image: img,
		dir: r.folder(ContainerName(req.Assignment)), init: r.initPath,
		permit: filepath.Join(r.cfg.StateDir, "permit"), seccomp: r.seccomp, cpus: float64(r.cpus), v2: r.v2, gpus: req.GPUs,
		bounds: r.bounds,
	}
	if field := unsupported(req.Spec); field != "" {
		return nil, &agent.StartError{Reason: schemas.ReasonStart, Message: field + " is not available on this worker; leave it out"}
	}
	if argv := b.argv(); b.spec.Judge == nil && (len(argv) == 0 || argv[0] == "") {
		return nil, &agent.StartError{Reason: schemas.ReasonStart, Message: fmt.Sprintf("image %q names no command to run; give one in command", req.Spec.Image)}
	}
	if len(req.Spec.CapAdd) > 0 && !b.root() {
		return nil, &agent.StartError{Reason: schemas.ReasonStart, Message: fmt.Sprintf("image %q has a user that is not root, and nobody else has a use for capabilities; leave cap_add out", req.Spec.Image)}
	}
	for _, p := range []string{"/proc", "/sys", "/dev"} {
		if w := b.image.workdir; w == p || strings.HasPrefix(w, p+"/") {
			return nil, &agent.StartError{Reason: schemas.ReasonStart, Message: fmt.Sprintf("image %q has its working directory in %s; give another in workdir", req.Spec.Image, p)}
		}
	}
	return b, nil
}

// unsupported names a field of the spec that this runtime would have to ignore. It is
// refused: a sandbox must not differ from what was asked for without a word.
func unsupported(s schemas.Spec) string {
	switch {
	case s.Network != "" && s.Network != schemas.NetworkNone:
		return "network " + string(s.Network)
	case s.Runtime != "":
		return "runtime"
	}
	return ""
}

// prepare makes the folder and the attempt.
func (r *Runtime) prepare(req agent.StartRequest, b *box) (*attempt, error) {
	m := meta{
		Version: 1, Assignment: req.Assignment, Key: newKey(), Free: req.NoPermit,
		Grace: req.Grace, LogLimit: req.LogLimit, BootID: r.boot, Again: again(req.Spec),
		TTY: req.Spec.TTY, Input: req.Spec.StdinOpen,
	}
	if err := makeFolder(b.dir, m, req.Spec, req.Blobs); err != nil {
		if !errors.Is(err, os.ErrExist) {
			_ = os.RemoveAll(b.dir)
		}
		return nil, err
	}
	a, err := r.newAttempt(m)
	if err == nil && !r.keep(a) {
		a.discard()
		err = errors.New("this attempt is there already, or the runtime is closed")
	}
	if err != nil {
		_ = os.RemoveAll(b.dir)
		return nil, err
	}
	return a, nil
}

// again is what init is told of the restart policy.
func again(s schemas.Spec) *initproto.Again {
	if !s.Restarts() {
		return nil
	}
	return &initproto.Again{
		Always: s.Restart.Policy == schemas.RestartAlways, Max: s.Restart.Max,
		Pause: s.Restart.Backoff.Std(), Most: schemas.MaxRestartPause, Calm: schemas.RestartCalm,
	}
}

// create makes the container. Where the outcome is unknown the name tells: what
// stands under it with our labels and was never started is ours. With an error comes
// a channel that is closed once dockerd has answered, nil if it has: only then is it
// known what there is to abandon.
func (r *Runtime) create(ctx context.Context, a *attempt, b *box) (answered <-chan struct{}, err error) {
	for try := 0; ; try++ {
		done := make(chan struct{})
		var failed error // to be read once done is closed
		making := r.goDo(func() {
			defer close(done)
			of := ctx
			// Not the caller's ctx: dockerd would go on making it, and we would not know.
			ctx, cancel := context.WithTimeout(r.ctx, dockerWithin)
			defer cancel()
			began := time.Now()
			created, err := r.docker.ContainerCreate(ctx, b.options())
			r.metrics.done(of, "create", began, err)
			if failed = err; err == nil {
				a.mu.Lock()
				a.container = created.ID
				a.mu.Unlock()
			}
		})
		if !making {
			return nil, errClosed
		}
		select {
		case <-done:
		case <-ctx.Done():
			return done, context.Cause(ctx)
		}
		if failed == nil {
			return nil, nil
		}
		settle, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		id, ours, err := r.leftover(settle, a)
		cancel()
		if err != nil && !cerrdefs.IsConflict(failed) { // Docker is away: what stands under the name goes once it is back
			id, ours = a.name, true
		}
		if ours && cerrdefs.IsConflict(failed) && try == 0 {
			// Of a start that was broken off, whose folder is gone: it has nothing mounted that
			// we could use.
			if err := r.removeContainer(ctx, id); err == nil {
				continue
			}
		}
		if ours {
			a.mu.Lock()
			a.container = id // for abandon
			a.mu.Unlock()
		}
		return nil, failed
	}
}

// leftover finds a container under the attempt's name that bears its labels and was
// never started. An error says that Docker does not tell.
func (r *Runtime) leftover(ctx context.Context, a *attempt) (id string, ours bool, err error) {
	got, err := r.docker.ContainerInspect(ctx, a.name, client.ContainerInspectOptions{})
	if cerrdefs.IsNotFound(err) {
		return "", false, nil
	}
	if err != nil || got.Container.Config == nil || got.Container.State == nil {
		return "", false, err
	}
	as, ok := r.assignmentOf(got.Container.Config.Labels, strings.TrimPrefix(got.Container.Name, "/"))
	return got.Container.ID, ok && as == a.meta.Assignment && got.Container.State.Status == "created", nil
}

// launch starts the container and, as soon as init says hello, the process: it does
// not wait for Docker's own answer. leave is called when Docker has given it.
func (r *Runtime) launch(ctx context.Context, a *attempt, b *box, req agent.StartRequest, leave func()) error {
	l, err := listen(filepath.Join(a.dir, "c"))
	if err != nil {
		leave()
		close(a.served)
		r.abandon(a, nil)
		return err
	}
	a.mu.Lock()
	a.listener = l
	if a.hungUp {
		_ = l.Close()
	}
	a.mu.Unlock()

	started := make(chan error, 1)
	answered := make(chan struct{})
	running := r.goDo(func() {
		defer close(answered)
		defer leave()
		of := ctx
		// Not the caller's ctx: dockerd would go on starting it, and we would not know.
		ctx, cancel := context.WithTimeout(r.ctx, dockerWithin)
		defer cancel()
		began := time.Now()
		_, err := r.docker.ContainerStart(ctx, a.containerID(), client.ContainerStartOptions{})
		r.metrics.done(of, "start", began, err)
		started <- err
	})
	if !running {
		leave()
		close(answered)
		started <- net.ErrClosed
	}
	ran := make(chan error, 1)
	serving := r.goDo(func() {
		g, err := a.accept(l)
		if err == nil {
			err = a.run(g, b, req)
		}
		ran <- err
		if err != nil {
			close(a.served)
			return
		}
		a.serve(g.conn, 0)
	})
	if !serving {
		close(a.served)
		ran <- net.ErrClosed
	}

	var late <-chan time.Time
	for {
		select {
		case err = <-ran:
			if err == nil {
				return nil
			}
			if started != nil {
				select { // Docker's own reason says more than a closed connection
				case e := <-started:
					if e != nil {
						err = e
					}
				default:
				}
			}
		case err = <-started:
			started = nil
			if err == nil {
				late = time.After(helloAfter)
				continue
			}
		case <-late:
			err = errors.New("dayfly-init does not answer")
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		a.send(initproto.Request{Op: initproto.OpStop})
		a.hangUp()
		gone := r.abandon(a, answered)
		if a.wasRun() { // the process may have been started, and must be over before we say that it was not
			<-gone
		}
		return err
	}
}

// abandon takes away what a start that failed has left, in the background: dockerd
// may still be at work on it. The channel is closed when that is done, or the runtime.
func (r *Runtime) abandon(a *attempt, answered <-chan struct{}) <-chan struct{} {
	gone := make(chan struct{})
	away := func() {
		defer close(gone)
		if answered != nil {
			<-answered
		}
		<-a.served
		a.finish(agent.Outcome{By: schemas.EndedLost, Message: "its start failed"})
		for pause := 100 * time.Millisecond; ; pause = min(2*pause, 10*time.Second) {
			ctx, cancel := context.WithTimeout(r.ctx, dockerWithin)
			err := a.Remove(ctx)
			cancel()
			if err == nil || r.ctx.Err() != nil { // what is left then, the next recover removes
				return
			}
			a.log().Warn().Err(err).Msg("cannot remove what a failed start left, trying again")
			select {
			case <-time.After(pause):
			case <-r.ctx.Done():
			}
		}
	}
	if answered == nil && a.containerID() == "" {
		away() // nothing but the folder
	} else if !r.goDo(away) {
		close(gone)
	}
	return gone
}

// run gives init its run and waits for the answer.
func (a *attempt) run(g *greeting, b *box, req agent.StartRequest) error {
	if g.hello.Phase != initproto.PhaseIdle {
		return errors.New("a new container says that it has had its run")
	}
	r := initproto.Request{
		ID: firstCall, Op: initproto.OpRun, Key: a.meta.Key, Argv: b.argv(), Env: b.env(), Free: a.meta.Free, Grace: a.meta.Grace, Again: a.meta.Again,
		Input: a.meta.Input && !a.meta.TTY, Stdin: req.Spec.StdinBlob != "",
	}
	if a.meta.TTY {
		r.Tty = &initproto.Window{Rows: 24, Cols: 80}
		if w := req.Spec.Window; w != nil {
			*r.Tty = initproto.Window{Rows: w.Rows, Cols: w.Cols}
		}
	}
	e, err := openRun(r, req.Spec.Stdin, int(g.peer.Uid), int(g.peer.Gid))
	defer func() {
		for _, f := range e.theirs {
			_ = f.Close()
		}
	}()
	if err != nil {
		e.closeOurs()
		return err
	}
	var fds []int
	for _, f := range e.sent {
		raw, err := f.SyscallConn() // not Fd, which would make them blocking
		if err != nil {
			e.closeOurs()
			return err
		}
		_ = raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) })
	}

	a.mu.Lock()
	if a.hungUp {
		a.mu.Unlock()
		e.closeOurs()
		return net.ErrClosed
	}
	if !a.meta.TTY { // of a terminal the pumps wait until there is one
		a.pumpLocked(e.reads, nil) // from here on release closes them
	}
	if e.input != nil {
		a.console.opens(e.input)
	}
	a.adoptLocked(g)
	err = a.setDeadlineLocked(req.TimeLeft)
	if err == nil {
		a.asked = true
		_ = g.conn.SetDeadline(time.Now().Add(helloAfter))
		if req.Spec.Judge != nil {
			r.Argv, r.Hold = nil, true
		}
		err = g.conn.Send(r, fds...)
	}
	a.mu.Unlock()
	started := false
	defer func() {
		if a.meta.TTY && !started {
			e.closeOurs()
		}
	}()
	if errors.Is(err, unix.EMSGSIZE) {
		return &agent.StartError{Reason: schemas.ReasonStart, Message: "command and environment are too long"}
	}
	if err != nil {
		return fmt.Errorf("send run: %w", err)
	}
	for {
		var m initproto.Reply
		extra, err := g.conn.Receive(make([]byte, initproto.MaxReply), &m)
		if err == nil && a.meta.TTY && m.Event == initproto.EventStarted && len(extra) == 1 {
			started, err = true, a.openTerminal(extra[0], e.reads)
			extra = nil
		}
		initproto.CloseAll(extra)
		if err != nil {
			return fmt.Errorf("wait for init: %w", err)
		}
		switch m.Event {
		case initproto.EventError:
			return refused(m)
		case initproto.EventStarted:
			_ = g.conn.SetDeadline(time.Time{})
			a.mu.Lock()
			a.ran, a.startedAt = true, initproto.Now()
			a.current.Up, a.tidy = true, m.Tidy
			a.mu.Unlock()
			close(a.met)
			// It runs, also if this cannot be noted: init says it to the next agent.
			if err := initproto.WriteInstant(filepath.Join(a.dir, "started"), a.startedAt); err != nil {
				a.log().Warn().Err(err).Msg("cannot note a start")
			}
			return nil
		}
	}
}

// refused turns init's error into ours.
func refused(m initproto.Reply) error {
	switch m.Fault {
	case initproto.FaultNotFound:
		return &agent.StartError{Reason: schemas.ReasonNotFound, Exit: &schemas.Exit{Code: 127}, Message: "command not found: " + clip(m.Message)}
	case initproto.FaultNotExec:
		return &agent.StartError{Reason: schemas.ReasonNotExec, Exit: &schemas.Exit{Code: 126}, Message: "command cannot be run: " + clip(m.Message)}
	case initproto.FaultWorkdir:
		return &agent.StartError{Reason: schemas.ReasonStart, Exit: &schemas.Exit{Code: 126}, Message: clip(m.Message)}
	case initproto.FaultStopped:
		return fmt.Errorf("%w: %s", agent.ErrAway, clip(m.Message))
	case initproto.FaultBusy:
		return fmt.Errorf("%w: %s", agent.ErrBusy, clip(m.Message))
	case initproto.FaultRefused:
		return fmt.Errorf("%w: %s", agent.ErrRefused, clip(m.Message))
	}
	return fmt.Errorf("init refuses: %s (%s)", clip(m.Message), m.Fault)
}

func clip(s string) string {
	s = strings.ToValidUTF8(s, "")
	if len(s) > 512 {
		s = strings.ToValidUTF8(s[:512], "") + "…"
	}
	return s
}

// taskFaults are parts of Docker's messages that say that the task's spec or image
// is at fault: on every worker. Docker has no codes for them.
var taskFaults = []string{
	"chdir to cwd", "is not a directory", "not a directory", "Cannot mkdir", "no matching entries in passwd", "unable to find user",
	"unable to find group", "no matching entries in group", "invalid mount", "Invalid container configuration", "mount destination",
}

// startFault decides whose fault it is that a start failed.
func startFault(err error, req agent.StartRequest, doing string) error {
	var own *agent.StartError
	text := err.Error()
	switch {
	case errors.As(err, &own), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
	case client.IsErrConnectionFailed(err), strings.Contains(text, "no space left"), cerrdefs.IsNotFound(err), cerrdefs.IsConflict(err):
	case cerrdefs.IsInvalidArgument(err) && !strings.Contains(text, "bind source path"),
		slices.ContainsFunc(taskFaults, func(s string) bool { return strings.Contains(text, s) }):
		return &agent.StartError{Reason: schemas.ReasonStart, Exit: &schemas.Exit{Code: 126},
			Message: fmt.Sprintf("Docker cannot start it from image %q: %s", req.Spec.Image, clip(strings.TrimPrefix(text, "Error response from daemon: ")))}
	}
	return fmt.Errorf("%s: %w", doing, err)
}
