package simulation

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natssim"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/fakeruntime"
	"dayfly.dev/services/placer"
	"dayfly.dev/services/reaper"
	"dayfly.dev/test/faults"
)

// world is one simulated site.
type world struct {
	server *natssim.Server
	start  time.Time
	dir    string
	hosts  []*host
	all    sync.WaitGroup // everything that was started

	mu       sync.Mutex
	rng      *rand.Rand                        // under mu: of the director
	history  []faults.Event                    // under mu
	trace    []line                            // under mu
	records  map[schemas.TaskID]schemas.Record // under mu
	assigned map[schemas.Assignment]struct{}   // under mu: what any record has said
	strays   []faults.Violation                // under mu: found on the way
	latest   schemas.TaskID                    // under mu: whose record changed last
	leader   schemas.Leadership                // under mu: as last written
	renewed  time.Duration                     // under mu: when
	late     bool                              // under mu: a placer's message may come later than it counts on
	waiters  []*waiter                         // under mu
}

// line is one line of the trace.
type line struct {
	at   time.Duration
	who  string
	text string
}

func newWorld(seed uint64, dir string) *world {
	w := &world{start: time.Now(), dir: dir, rng: rand.New(rand.NewPCG(seed, 2)),
		records: map[schemas.TaskID]schemas.Record{}, assigned: map[schemas.Assignment]struct{}{}}
	w.server = natssim.New(natssim.Config{Seed: seed, Alias: schemas.AgentAPIPrefix, Stored: w.stored})
	if w.chance(0.7) {
		most := w.between(20*time.Millisecond, 4*time.Second)
		w.late = most > placer.DefaultConfig().WriteTimeout/2
		w.server.SetFaults(natssim.Faults{Slow: []float64{0.01, 0.03, 0.2}[w.number(3)], SlowMost: most, LostAnswer: 0.01, LostAck: 0.02, Spurious: 0.005})
	}
	w.add(faults.Event{Run: &faults.Run{Seed: seed, Lease: agent.DefaultConfig("", "").Lease, Fence: reaper.DefaultConfig().Fence, Epoch: w.start}})
	return w
}

// now is the time of the history.
func (w *world) now() time.Duration { return time.Since(w.start) }

func (w *world) chance(p float64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rng.Float64() < p
}

func (w *world) number(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rng.IntN(n)
}

func (w *world) between(least, most time.Duration) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return least + time.Duration(w.rng.Int64N(int64(most-least)))
}

func (w *world) add(e faults.Event) {
	e.T = w.now()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.history = append(w.history, e)
}

func (w *world) tell(who, format string, args ...any) {
	l := line{w.now(), who, fmt.Sprintf(format, args...)}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trace = append(w.trace, l)
}

// nextStored waits, but not for long, until the server takes a message whose subject
// begins so.
func (w *world) nextStored(prefix string) {
	x := &waiter{prefix, make(chan struct{})}
	w.mu.Lock()
	w.waiters = append(w.waiters, x)
	w.mu.Unlock()
	select {
	case <-x.came:
	case <-time.After(20 * time.Second):
	}
}

type waiter struct {
	prefix string
	came   chan struct{}
}

// stored sees each message that the server takes.
func (w *world) stored(m natssim.Stored) {
	w.mu.Lock()
	w.waiters = slices.DeleteFunc(w.waiters, func(x *waiter) bool {
		came := strings.HasPrefix(m.Subject, x.prefix)
		if came {
			close(x.came)
		}
		return came
	})
	w.mu.Unlock()
	if word, short := strings.CutPrefix(m.Subject, "dayfly."); short {
		w.tell("bus", "%s %s", word, m.Data)
		return
	}
	if strings.HasPrefix(m.Subject, "$KV."+schemas.BucketLeaders+".") {
		w.ledBy(m.Data)
	}
	key, ok := strings.CutPrefix(m.Subject, "$KV."+schemas.BucketTasks+".")
	if !ok {
		return
	}
	id := schemas.TaskID(key)
	var r schemas.Record
	if err := schemas.Decode(m.Data, &r); err != nil {
		w.add(faults.Event{Rev: &faults.Rev{Task: id, Revision: m.Sequence, Deleted: true}})
		return
	}
	if !m.Guarded {
		w.add(faults.Event{Write: &faults.Write{Task: id}})
	}
	w.add(faults.Event{Rev: &faults.Rev{Task: id, Revision: m.Sequence, Record: &r}})
	w.mu.Lock()
	w.records[id], w.latest = r, id
	if r.State.Held() {
		w.assigned[r.Assignment()] = struct{}{}
		w.promised(r)
	}
	w.mu.Unlock()
	last := r.History[len(r.History)-1]
	w.tell("record", "%s r%d %s attempt %d on %s by %s: %s %s", id, m.Sequence, r.State, r.Attempt, r.Worker, last.By, last.Note, r.Message)
}

// ledBy checks that a leader is followed by another only when its time is over.
func (w *world) ledBy(data []byte) {
	var l schemas.Leadership
	if err := schemas.Decode(data, &l); err != nil {
		panic(err)
	}
	now := w.now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if was := w.leader; was.Holder != "" && l.Holder != "" && was.Holder != l.Holder && now-w.renewed < was.Length.Std() {
		w.strays = append(w.strays, faults.Violation{Rule: Usurped, At: now, What: fmt.Sprintf("%v after the old leader renewed", now-w.renewed)})
	}
	w.leader, w.renewed = l, now
}

// promised checks that a worker has the room that it is given tasks for. w.mu is held.
// A new leader counts on what the old one sent having arrived within a write's timeout;
// where the network does not keep that, the agent is the judge of its room.
func (w *world) promised(r schemas.Record) {
	if w.late {
		return
	}
	held := 0
	for _, other := range w.records {
		if other.State.Held() && other.Worker == r.Worker {
			held++
		}
	}
	for _, h := range w.hosts {
		if h.worker == r.Worker && r.State == schemas.Assigned && held > h.slots {
			w.strays = append(w.strays, faults.Violation{Rule: Overfull, Task: r.ID, At: time.Since(w.start),
				What: fmt.Sprintf("%s has room for %d tasks and holds %d", r.Worker, h.slots, held)})
		}
	}
}

// process is one run of a service or client.
type process struct {
	w      *world
	name   string
	link   *natssim.Link
	cancel context.CancelFunc
	dead   atomic.Bool
	ended  chan struct{}
}

// launch starts a process. Its connection is closed when run has returned.
func (w *world) launch(name string, worker schemas.WorkerID, run func(context.Context, *process, *bus.Conn, zerolog.Logger) error) *process {
	ctx, cancel := context.WithCancel(context.Background())
	p := &process{w: w, name: name, link: w.server.Link(name), cancel: cancel, ended: make(chan struct{})}
	log := zerolog.New(p)
	config := bus.Config{Name: name, InProcess: p.link, Logger: log}
	if worker != "" {
		config.InboxPrefix, config.APIPrefix = schemas.AgentInbox(worker), schemas.AgentAPIPrefix
	}
	w.all.Go(func() {
		defer close(p.ended)
		defer cancel()
		conn, err := bus.Connect(ctx, config)
		if err != nil {
			return
		}
		if err = run(ctx, p, conn, log); err != nil {
			w.tell(name, "ended: %v", err)
		}
		conn.Close()
	})
	return p
}

// Write takes the process's log.
func (p *process) Write(b []byte) (int, error) {
	if !p.dead.Load() {
		p.w.tell(p.name, "%s", bytes.TrimSuffix(b, []byte("\n")))
	}
	return len(b), nil
}

// kill ends a process as kill -9 does, as far as one process within another can: from
// now on nothing that it does reaches anyone.
func (p *process) kill() {
	p.dead.Store(true)
	p.link.Cut()
	p.cancel()
}

// stop ends it in good order.
func (p *process) stop() {
	p.cancel()
	<-p.ended
	p.dead.Store(true)
}

// host is a machine with an agent.
type host struct {
	w       *world
	worker  schemas.WorkerID
	slots   int
	runtime *fakeruntime.Runtime
	states  int // folders that its agents have had
}

func (w *world) newHost(i int) *host {
	h := &host{w: w, worker: schemas.WorkerID(fmt.Sprintf("w%d", i+1)), slots: 1 + w.number(4)}
	h.runtime = fakeruntime.New(fakeruntime.Config{
		Host:       schemas.Host{OS: "linux", Arch: "amd64", CPUs: 4, Memory: 1 << 30, Slots: h.slots},
		StartDelay: []time.Duration{0, 0, 100 * time.Millisecond, time.Second, 20 * time.Second}[w.number(5)],
	})
	return h
}

func (h *host) folder() string {
	return filepath.Join(h.w.dir, fmt.Sprintf("%s-%d", h.worker, h.states))
}

// runAgent starts an agent on what the one before left, or without its state folder.
// The folder is a copy: the one before may be dead without knowing it yet.
func (h *host) runAgent(wiped bool) *process {
	old := filepath.Join(h.folder(), "journal")
	h.states++
	if err := os.MkdirAll(h.folder(), 0o700); err != nil {
		panic(err)
	}
	if b, err := os.ReadFile(old); err == nil && !wiped {
		if err := os.WriteFile(filepath.Join(h.folder(), "journal"), b, 0o600); err != nil {
			panic(err)
		}
	}
	dir := h.folder()
	return h.w.launch(string(h.worker), h.worker, func(ctx context.Context, p *process, conn *bus.Conn, log zerolog.Logger) error {
		cfg := agent.DefaultConfig(h.worker, dir)
		cfg.MaxSessions = 0
		return agent.Run(ctx, agent.Deps{Conn: conn, Runtime: &handle{h, p}, Logger: log}, cfg)
	})
}

// handle is a host in the hands of one agent's process: useless once that is dead.
type handle struct {
	*host
	p *process
}

var errDead = errors.New("this process is dead")

func (h *handle) check() error {
	if h.p.dead.Load() {
		return errDead
	}
	return nil
}

func (h *handle) Host(ctx context.Context) (schemas.Host, error) { return h.runtime.Host(ctx) }
func (h *handle) Now() time.Duration                             { return h.runtime.Now() }
func (h *handle) Close() error                                   { return nil }

func (h *handle) Image(ctx context.Context, spec schemas.Spec, progress func(string)) (agent.Image, error) {
	return h.runtime.Image(ctx, spec, progress)
}

func (h *handle) Permit(until time.Duration) error {
	if err := h.check(); err != nil {
		return err
	}
	return h.runtime.Permit(until)
}

func (h *handle) Recover(ctx context.Context) ([]agent.Attempt, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	found, err := h.runtime.Recover(ctx)
	slices.SortFunc(found, func(a, b agent.Attempt) int {
		return strings.Compare(fmt.Sprint(a.Assignment()), fmt.Sprint(b.Assignment()))
	})
	for i, a := range found {
		found[i] = &attempt{a, h}
	}
	return found, err
}

func (h *handle) Start(ctx context.Context, req agent.StartRequest) (agent.Attempt, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	a, err := h.runtime.Start(ctx, req)
	if err != nil {
		return nil, err
	}
	h.w.lives(a)
	return &attempt{a, h}, nil
}

// attempt is one in the hands of a process.
type attempt struct {
	agent.Attempt
	h *handle
}

func (a *attempt) Stop(grace time.Duration) {
	if a.h.check() == nil {
		a.Attempt.Stop(grace)
	}
}

func (a *attempt) SetDeadline(left time.Duration) error {
	if err := a.h.check(); err != nil {
		return err
	}
	return a.Attempt.SetDeadline(left)
}

func (a *attempt) Remove(ctx context.Context) error {
	if err := a.h.check(); err != nil {
		return err
	}
	return a.Attempt.Remove(ctx)
}

// lives writes down when an attempt begins and ends.
func (w *world) lives(a agent.Attempt) {
	id := a.Assignment()
	w.add(faults.Event{Life: &faults.Life{Do: "start", Assignment: id}})
	w.tell("host", "%s attempt %d is started on %s", id.Task, id.Attempt, id.Worker)
	w.mu.Lock()
	if _, ok := w.assigned[id]; !ok {
		w.strays = append(w.strays, faults.Violation{Rule: Unassigned, Task: id.Task, At: time.Since(w.start),
			What: fmt.Sprintf("attempt %d was started on %s, and no record ever said so", id.Attempt, id.Worker)})
	}
	w.mu.Unlock()
	w.all.Go(func() {
		<-a.Done()
		o := a.Outcome()
		l := &faults.Life{Do: "end", Assignment: id, By: o.By}
		if o.Exit != nil {
			l.Code = o.Exit.Code
		}
		w.add(faults.Event{Life: l})
		w.tell("host", "%s attempt %d on %s has ended by %s", id.Task, id.Attempt, id.Worker, o.By)
	})
}

func (w *world) runPlacer(name string) *process {
	return w.launch(name, "", func(ctx context.Context, _ *process, conn *bus.Conn, log zerolog.Logger) error {
		return placer.Run(ctx, placer.Deps{Conn: conn, Logger: log}, placer.DefaultConfig())
	})
}

func (w *world) runReaper(name string) *process {
	return w.launch(name, "", func(ctx context.Context, _ *process, conn *bus.Conn, log zerolog.Logger) error {
		return reaper.Run(ctx, reaper.Deps{Conn: conn, Logger: log}, reaper.DefaultConfig())
	})
}
