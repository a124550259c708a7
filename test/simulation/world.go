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
	rng      *rand.Rand                         // under mu: of the director
	history  []faults.Event                     // under mu
	trace    []line                             // under mu
	records  map[schemas.TaskID]schemas.Record  // under mu
	assigned map[schemas.Assignment]struct{}    // under mu: what any record has said
	strays   []faults.Violation                 // under mu: found on the way
	beats    map[schemas.WorkerID]time.Duration // under mu: the last of each worker
	leader   schemas.Leadership                 // under mu: as last written
	renewed  time.Duration                      // under mu: when
	forgot   time.Duration                      // under mu: when the server was last killed
	late     time.Duration                      // under mu: until when a placer's message may come later than it counts on
	waiters  []*waiter                          // under mu
	clients  []*client                          // under mu: of the gateways

	answered chan struct{} // closed when nobody meddles any more
}

// line is one line of the trace.
type line struct {
	at   time.Duration
	who  string
	text string
	data []byte // more of it
}

func (l line) String() string { return l.text + " " + string(l.data) }

func newWorld(seed uint64, sz size, dir string) *world {
	w := &world{start: time.Now(), dir: dir, answered: make(chan struct{}), rng: rand.New(rand.NewPCG(seed, 2)),
		records: map[schemas.TaskID]schemas.Record{}, assigned: map[schemas.Assignment]struct{}{}, beats: map[schemas.WorkerID]time.Duration{}}
	w.server = natssim.New(natssim.Config{Seed: seed, Alias: schemas.AgentAPIPrefix, Stored: w.stored})
	w.weather(sz.weather)
	w.add(faults.Event{Run: &faults.Run{Seed: seed, Lease: agent.DefaultConfig("", "").Lease, Fence: reaper.DefaultConfig().Fence, Epoch: w.start}})
	return w
}

// weather is how well the network does from now on, for so long, or for the whole run.
func (w *world) weather(long time.Duration) {
	if !w.chance(0.7) {
		w.server.SetFaults(natssim.Faults{})
		return
	}
	often := func() float64 { return []float64{0.005, 0.02, 0.1}[w.number(3)] }
	most := w.between(20*time.Millisecond, 4*time.Second)
	if most > placer.DefaultConfig().WriteTimeout/2 {
		if long == 0 {
			long = 1 << 62
		}
		w.lateUntil(long)
	}
	w.server.SetFaults(natssim.Faults{Slow: 2 * often(), SlowMost: most, LostAnswer: often(), LostAck: 2 * often(), Spurious: often()})
}

// weathers lets the weather change until the span of the run is over.
func (w *world) weathers(sz size) {
	for w.now() < sz.span {
		long := w.between(sz.weather/4, 2*sz.weather)
		w.weather(long)
		time.Sleep(long)
	}
}

// lateUntil takes note that what a placer sends in the time to come may be late.
func (w *world) lateUntil(long time.Duration) {
	const after = 10 * time.Second // a write is tried again
	w.mu.Lock()
	defer w.mu.Unlock()
	if end := time.Since(w.start) + long; end > w.late-after {
		w.late = end + after
	}
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

func (w *world) count(s spread) int { return s.least + w.number(s.most-s.least+1) }

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
	w.noted(who, fmt.Sprintf(format, args...), nil)
}

// noted is tell without formatting: most lines are never read. data must not change.
func (w *world) noted(who, text string, data []byte) {
	l := line{w.now(), who, text, data}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trace = append(w.trace, l)
}

// moment is a kind of message that the server has just taken.
type moment int

const (
	recordWritten moment = iota
	recordGiven          // to a worker
	recordRuns
	recordLeft   // its worker: final, or queued again
	recordMarked // by a client
	orderSent
	reportSent
	lastReportSent
	beatSent
	registered // a worker's first beat, or the first after it was lost
	verdictWritten
	leaderWritten
)

// sight is what a message is about, as far as it says.
type sight struct {
	worker schemas.WorkerID
	task   schemas.TaskID
}

type waiter struct {
	moment moment
	came   chan sight
}

// next waits, but not for long, for a moment.
func (w *world) next(m moment) sight {
	x := &waiter{m, make(chan sight, 1)}
	w.mu.Lock()
	w.waiters = append(w.waiters, x)
	w.mu.Unlock()
	timer := time.NewTimer(20 * time.Second)
	defer timer.Stop()
	select {
	case s := <-x.came:
		return s
	case <-timer.C:
		return sight{}
	}
}

// came tells those who wait for a moment that it has come.
func (w *world) came(s sight, moments ...moment) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiters = slices.DeleteFunc(w.waiters, func(x *waiter) bool {
		came := slices.Contains(moments, x.moment)
		if came {
			x.came <- s
		}
		return came
	})
}

// stored sees each message that the server takes.
func (w *world) stored(m natssim.Stored) {
	words := strings.Split(m.Subject, ".")
	switch {
	case words[0] == "dayfly":
		w.noted("bus", m.Subject[len("dayfly."):], m.Data)
		s := sight{schemas.WorkerID(words[len(words)-2]), schemas.TaskID(words[len(words)-1])}
		switch {
		case words[1] == "work":
			w.came(s, orderSent)
		case words[1] == "reports" && bytes.Contains(m.Data, []byte(`"phase":"ended"`)):
			w.came(s, reportSent, lastReportSent)
		case words[1] == "reports":
			w.came(s, reportSent)
		}
	case words[1] == schemas.BucketLeaders:
		w.ledBy(m.Data)
		w.came(sight{}, leaderWritten)
	case words[1] == schemas.BucketWorkers:
		s := sight{worker: schemas.WorkerID(words[2])}
		switch {
		case bytes.Contains(m.Data, []byte(`"lost_at":`)):
			w.condemned(s.worker)
			w.came(s, verdictWritten)
		case bytes.Contains(m.Data, []byte(`"sequence":1,`)):
			w.beat(s.worker)
			w.came(s, beatSent, registered)
		default:
			w.beat(s.worker)
			w.came(s, beatSent)
		}
	case words[1] == schemas.BucketTasks:
		w.recorded(schemas.TaskID(words[2]), m)
	}
}

// recorded sees each revision of a record.
func (w *world) recorded(id schemas.TaskID, m natssim.Stored) {
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
	before := w.records[id]
	w.records[id] = r
	if r.State.Held() {
		w.assigned[r.Assignment()] = struct{}{}
		w.promised(r)
	}
	w.mu.Unlock()
	last := r.History[len(r.History)-1]
	w.tell("record", "%s r%d %s attempt %d on %s by %s: %s %s", id, m.Sequence, r.State, r.Attempt, r.Worker, last.By, last.Note, r.Message)
	switch s := (sight{r.Worker, id}); {
	case r.State == schemas.Assigned && before.State == schemas.Queued:
		w.came(s, recordWritten, recordGiven)
	case r.State == schemas.Running && before.State != schemas.Running:
		w.came(s, recordWritten, recordRuns)
	case before.State.Held() && !r.State.Held():
		w.came(sight{before.Worker, id}, recordWritten, recordLeft)
	case last.By == clientName:
		w.came(s, recordWritten, recordMarked)
	default:
		w.came(s, recordWritten)
	}
}

func (w *world) beat(worker schemas.WorkerID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.beats[worker] = time.Since(w.start)
}

// condemned checks that a worker that is declared lost has long been silent: nothing of
// it may run any more.
func (w *world) condemned(worker schemas.WorkerID) {
	now := w.now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if last := w.beats[worker]; now-last < agent.DefaultConfig("", "").Lease {
		w.strays = append(w.strays, faults.Violation{Rule: Hasty, At: now, What: fmt.Sprintf("%s was declared lost %v after its beat", worker, now-last)})
	}
}

// ledBy checks that a leader is followed by another only when its time is over. A
// server that was killed may have forgotten who leads: then two do, until one of them
// renews.
func (w *world) ledBy(data []byte) {
	var l schemas.Leadership
	if err := schemas.Decode(data, &l); err != nil {
		panic(err)
	}
	now := w.now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if was := w.leader; was.Holder != "" && l.Holder != "" && was.Holder != l.Holder && now-w.renewed < was.Length.Std() &&
		(w.forgot == 0 || now-w.forgot > 3*was.Length.Std()) {
		w.strays = append(w.strays, faults.Violation{Rule: Usurped, At: now, What: fmt.Sprintf("%v after the old leader renewed", now-w.renewed)})
	}
	w.leader, w.renewed = l, now
}

// promised checks that a worker has the room that it is given tasks for. w.mu is held.
// A new leader counts on what the old one sent having arrived within a write's timeout;
// where the network does not keep that, the agent is the judge of its room.
func (w *world) promised(r schemas.Record) {
	if time.Since(w.start) < w.late {
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
		p.w.noted(p.name, string(bytes.TrimSuffix(b, []byte("\n"))), nil)
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
	fails   float64 // of starts, for no fault of the task's
	runtime *fakeruntime.Runtime
	states  int // folders that its agents have had
}

func (w *world) newHost(i int) *host {
	h := &host{w: w, worker: schemas.WorkerID(fmt.Sprintf("w%d", i+1)), slots: 1 + w.number(4), fails: []float64{0, 0, 0.2, 0.4}[w.number(4)]}
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
		cfg.Linger = 0 // who is killed waits for nothing
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
func (h *handle) Images() *agent.Images                          { return h.runtime.Images() }
func (h *handle) Keep(images []string)                           { h.runtime.Keep(images) }
func (h *handle) Credentials() []string                          { return h.runtime.Credentials() }

func (h *handle) Image(ctx context.Context, spec schemas.Spec, pinned *schemas.Resolved, progress func(agent.Progress)) (agent.Image, error) {
	return h.runtime.Image(ctx, spec, pinned, progress)
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
	if h.w.chance(h.fails) {
		return nil, errors.New("the host is out of order")
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
