package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"dayfly.dev/bus"
	"dayfly.dev/ops"
	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/blobs"
)

// Config of an agent. DefaultConfig has the values that production uses.
type Config struct {
	Worker   schemas.WorkerID
	StateDir string // for the journal
	Version  string

	Beat  time.Duration // between two heartbeats
	Lease time.Duration // how long after the last acknowledged beat tasks may run

	// HoldBack is how long a report that is not the last waits for a better one, so that
	// a short task sends a single report. A start that took longer is reported at once.
	HoldBack time.Duration
	LogLimit int64         // bytes of log kept of one attempt
	LogDelay time.Duration // how long log bytes gather before a chunk is sent

	ArtifactLimit int64         // bytes kept of what one attempt leaves in its output folder; 0: nothing is
	ArtifactTime  time.Duration // how long they may take to be stored, the bus being there

	// Linger is how long an agent that is told to stop waits until what has ended by then is
	// closed and its containers are removed. The next agent does what is left.
	Linger      time.Duration
	MaxSessions int // sessions with tasks at a time; 0: this worker offers none

	BlobCache int64 // bytes on the disk that blobs may take; 0: this worker takes none
	// Kinds are the only tasks that this worker takes; nil: all, of any kind and of none.
	Kinds []string

	// ExecKeep is how long a program waits for its client to come back before it is hung
	// up on, and ExecGrace how long it then has until it is killed.
	ExecKeep, ExecGrace time.Duration
}

// DefaultConfig has the values that production uses, for one worker.
func DefaultConfig(w schemas.WorkerID, stateDir string) Config {
	return Config{
		Worker: w, StateDir: stateDir, Version: "dev",
		Beat: 5 * time.Second, Lease: 30 * time.Second,
		HoldBack: 30 * time.Millisecond, LogLimit: 64 << 20, LogDelay: 50 * time.Millisecond,
		ArtifactLimit: 256 << 20, ArtifactTime: 10 * time.Minute,
		Linger:      3 * time.Second,
		MaxSessions: 1024,
		BlobCache:   10 << 30,
		ExecKeep:    time.Minute, ExecGrace: 5 * time.Second,
	}
}

// Deps are what an agent stands on.
type Deps struct {
	Conn    *bus.Conn // of the AGENTS account
	Runtime Runtime
	Logger  zerolog.Logger
	Metrics prometheus.Registerer
	Health  *ops.Health
	Tracer  *tracing.Tracer // may be nil
}

// Errors of Run.
var (
	// ErrNameTaken says that another agent lives under the worker's name.
	ErrNameTaken = errors.New("another agent is alive under this worker's name; give this one another --worker")
)

// Run runs the agent until ctx ends. The tasks go on running then, for the next
// agent to take back.
func Run(ctx context.Context, deps Deps, cfg Config) error {
	a, err := newAgent(deps, cfg)
	if err != nil {
		return err
	}
	defer a.journal.close()
	a.ctx, a.stop = context.WithCancelCause(context.WithoutCancel(ctx))
	defer a.stop(nil)
	lingered := make(chan struct{})
	unhook := context.AfterFunc(ctx, func() {
		defer close(lingered)
		a.linger()
		a.stop(context.Cause(ctx))
	})
	defer func() {
		if !unhook() {
			<-lingered
		}
	}()

	defer a.bulk.Close()
	closeBlobs, err := a.openBlobs()
	if err != nil {
		return err
	}
	defer closeBlobs()
	host, err := a.rt.Host(ctx)
	if err != nil {
		return fmt.Errorf("ask the runtime about this host: %w", err)
	}
	host.Kinds = cfg.Kinds
	a.host = host
	a.metrics.host(deps.Metrics, cfg, host)
	if err := a.recover(ctx); err != nil {
		return err
	}
	// What was recovered is watched from here on, whether the bus is there or not.
	defer a.attempts.Wait()
	if err := a.register(a.ctx); err != nil {
		a.stop(nil)
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	g, gctx := errgroup.WithContext(a.ctx)
	g.Go(func() error { return a.beats(gctx) })
	g.Go(func() error { return a.orders(gctx) })
	g.Go(func() error { return a.wanted.run(gctx) })
	if cfg.MaxSessions > 0 {
		g.Go(func() error { return a.serveSessions(gctx) })
	}
	err = g.Wait()
	a.stop(err)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// Agent is one worker's agent.
type Agent struct {
	cfg     Config
	conn    *bus.Conn
	rt      Runtime
	log     zerolog.Logger
	metrics *metrics
	tracer  *tracing.Tracer
	journal *journal
	table   *bus.Table[schemas.Beat]
	wanted  *wanted
	boot    string
	host    schemas.Host
	blobs   *blobs.Cache // nil: this worker takes none

	pulling  atomic.Int32    // attempts whose images are being pulled
	ctx      context.Context // of the attempts: ends with Run
	stop     context.CancelCauseFunc
	attempts sync.WaitGroup
	uploads  chan struct{} // a place in it is an attempt that stores its artifacts
	bulk     *bus.Aside    // for blobs and artifacts: beats do not wait behind them

	mu       sync.Mutex
	epoch    schemas.Epoch               // under mu
	live     map[schemas.TaskID]*attempt // under mu: not closed
	over     map[*attempt]struct{}       // under mu: no process is left, and a container may be
	gpus     map[int]bool                // under mu: the devices that attempts have
	used     schemas.Allocation          // under mu: by attempts that are not over
	beat     bus.Entry[schemas.Beat]     // under mu: the last acknowledged
	lease    time.Duration               // under mu: its end, on the runtime's clock
	filter   schemas.BlobFilter          // under mu: of the blobs that are here
	filterOf int                         // under mu: the version of the cache that it is of
	newest   uint64                      // under mu: stream sequence of the newest order handled
}

func newAgent(deps Deps, cfg Config) (*Agent, error) {
	if _, err := schemas.ParseWorkerID(string(cfg.Worker)); err != nil {
		return nil, fmt.Errorf("worker name: %w", err)
	}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make state folder: %w", err)
	}
	j, err := openJournal(cfg.StateDir, deps.Runtime.Now())
	if err != nil {
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	a := &Agent{
		cfg: cfg, conn: deps.Conn, rt: deps.Runtime, tracer: deps.Tracer, journal: j, boot: boot,
		log:     deps.Logger.With().Str("worker", string(cfg.Worker)).Logger(),
		metrics: newMetrics(deps.Metrics),
		table:   bus.NewTable(deps.Conn, schemas.BucketWorkers, beatCodec),
		live:    map[schemas.TaskID]*attempt{},
		uploads: make(chan struct{}, uploadsAtOnce),
		bulk:    bus.NewAside(deps.Conn, "bulk"),
		gpus:    map[int]bool{},
		over:    map[*attempt]struct{}{},
	}
	a.wanted = newWanted(a)
	if deps.Health != nil {
		deps.Health.Add("agent: lease", a.checkLease)
	}
	return a, nil
}

// ended says that no process of an attempt is left, and done that the agent has done
// with it.
func (a *Agent) ended(t *attempt) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.over[t] = struct{}{}
}

func (a *Agent) done(t *attempt) {
	close(t.removed)
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.over, t)
}

// linger waits until what has ended by now is removed, for a while.
func (a *Agent) linger() {
	a.mu.Lock()
	over := slices.Collect(maps.Keys(a.over))
	a.mu.Unlock()
	end := time.NewTimer(a.cfg.Linger)
	defer end.Stop()
	for _, t := range over {
		select {
		case <-t.removed:
		case <-end.C:
			return
		case <-a.ctx.Done():
			return
		}
	}
}

// bootID names this boot of the host.
func bootID() (string, error) {
	b, err := os.ReadFile(filepath.Join("/proc", "sys", "kernel", "random", "boot_id"))
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func (a *Agent) checkLease(context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.rt.Now() >= a.lease {
		return errors.New("no beat was acknowledged within the lease; tasks that need a permit have ended")
	}
	return nil
}

// recover takes back what an earlier agent left. Each attempt of the journal is
// either found by the runtime, or was never begun.
func (a *Agent) recover(ctx context.Context) error {
	found, err := a.rt.Recover(ctx)
	if err != nil {
		return fmt.Errorf("recover attempts: %w", err)
	}
	head := a.journal.registered()
	sameBoot := head.Boot == a.boot && head.Epoch != ""
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, att := range found {
		e, known := a.journal.get(att.Assignment().Task)
		if !sameBoot || !known || e.Closed || e.Assignment != att.Assignment() {
			a.attempts.Go(func() { a.clear(att, e, sameBoot && known && e.Assignment == att.Assignment()) })
			continue
		}
		a.adopt(e, att)
	}
	if !sameBoot {
		a.forgetJudges()
		return nil // the journal belongs to another life; register begins anew
	}
	for _, e := range a.journal.open() {
		if a.live[e.Task] == nil {
			a.adopt(e, nil)
		}
	}
	a.forgetJudges()
	a.epoch = head.Epoch
	return nil
}

// clear removes what is left of an attempt that no record waits for. If it was closed
// a moment before the agent ended, the last of its log may have been lost with a
// server that ended too: that is sent again first.
func (a *Agent) clear(found Attempt, e entry, closed bool) {
	if closed {
		t := &attempt{agent: a, Assignment: e.Assignment, log: a.log, reconnected: a.conn.Reconnected()}
		safe := offsets{e.Stdout, e.Stderr}
		_ = t.newShipper(found.Output(), safe).ship(a.ctx)
	}
	a.remove(found)
}

// adopt goes on with an attempt of an earlier agent; found is nil if nothing of it
// was ever begun. It runs under a.mu.
func (a *Agent) adopt(e entry, found Attempt) {
	t := a.track(e)
	t.recovered = true
	t.unsaid.Store(true)
	t.reserved = true
	a.use(1, e.Needs, e.GPUs)
	a.metrics.adopted.Inc()
	t.run(func() { t.resume(found) })
}

// track makes the live attempt of a journal entry. It runs under a.mu.
func (a *Agent) track(e entry) *attempt {
	ctx, cancel := context.WithCancelCause(a.ctx)
	log := a.log.With().Str("task", string(e.Task)).Int("attempt", e.Attempt)
	if id := tracing.ID(e.Trace); id != "" {
		log = log.Str("trace_id", id)
	}
	t := &attempt{
		agent: a, Assignment: e.Assignment, noPermit: e.NoPermit, needs: e.Needs, health: e.Health, isJudge: e.Judge, gpus: e.GPUs, ctx: ctx, cancel: cancel,
		revision: e.Revision, applied: e.Applied, closed: make(chan struct{}), dead: make(chan struct{}), removed: make(chan struct{}),
		safe: offsets{e.Stdout, e.Stderr}, reconnected: a.conn.Reconnected(),
		trace: e.Trace, log: log.Logger(),
	}
	a.live[e.Task] = t
	return t
}

// remove takes an attempt's container away, however often it must be tried.
func (a *Agent) remove(att Attempt) {
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 10*time.Second) {
		err := att.Remove(a.ctx)
		if err == nil || a.ctx.Err() != nil {
			return
		}
		a.log.Warn().Err(err).Str("task", string(att.Assignment().Task)).Msg("remove container")
		select {
		case <-time.After(wait):
		case <-a.ctx.Done():
			return
		}
	}
}
