package placer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"dayfly.dev/bus"
	"dayfly.dev/ops"
	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
)

// Config of a placer. DefaultConfig has the values that production uses.
type Config struct {
	// Identity names this placer in the lease of leadership. A process that holds an
	// exclusive lock may give a fixed one: when it comes back it leads at once. Empty is
	// a random one.
	Identity     string
	Policy       Policy
	Lease        time.Duration // a worker takes tasks for so long after its newest beat
	Leadership   time.Duration // how long a leader leads after its newest renewal
	WriteTimeout time.Duration // of writing one assignment, or the lease
	HoldAfter    time.Duration // a task that fits nowhere gets a worker held back for it after this; 0 is never
	InFlight     int           // assignments that are written at a time
}

// DefaultConfig has the values that production uses.
func DefaultConfig() Config {
	return Config{
		Policy: Weighted, Lease: 30 * time.Second, Leadership: 3 * time.Second, WriteTimeout: 2 * time.Second,
		HoldAfter: time.Minute, InFlight: 64,
	}
}

// Deps are what a placer stands on.
type Deps struct {
	Conn    *bus.Conn
	Logger  zerolog.Logger
	Metrics prometheus.Registerer
	Health  *ops.Health
	Tracer  *tracing.Tracer // may be nil
}

// Placer is one replica.
type Placer struct {
	cfg     Config
	conn    *bus.Conn
	log     zerolog.Logger
	metrics *metrics
	tracer  *tracing.Tracer
	elector *elector
	table   *bus.Table[schemas.Record]
	tasks   *bus.View[seen]
	beats   *bus.View[schemas.Beat]
	drains  *bus.View[struct{}]

	leading atomic.Bool
	writers chan struct{} // one for each assignment that is being written
	wake    chan struct{}
	enroll  chan struct{}

	mu    sync.Mutex
	book  *book                          // under mu
	newly map[schemas.WorkerID]time.Time // under mu: workers whose queue is to be made, from when on
	// writing counts the assignments that are being written, or may still arrive. Under mu.
	writing map[schemas.WorkerID]int
}

// Run runs the placer until ctx ends.
func Run(ctx context.Context, deps Deps, cfg Config) error {
	p, err := newPlacer(deps, cfg)
	if err != nil {
		return err
	}
	if deps.Health != nil {
		deps.Health.Add("placer: views", p.checkViews)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.tasks.Run(gctx) })
	g.Go(func() error { return p.beats.Run(gctx) })
	g.Go(func() error { return p.drains.Run(gctx) })
	g.Go(func() error { return p.watchConnection(gctx) })
	g.Go(func() error { return p.lead(gctx) })
	if err := g.Wait(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("placer: %w", err)
	}
	return nil
}

func newPlacer(deps Deps, cfg Config) (*Placer, error) {
	def := DefaultConfig()
	if cfg.Policy == "" {
		cfg.Policy = def.Policy
	}
	if scores[cfg.Policy] == nil {
		return nil, fmt.Errorf("placer: no such placement policy as %q", cfg.Policy)
	}
	if cfg.Lease <= 0 || cfg.Leadership <= 0 || cfg.WriteTimeout <= 0 || cfg.InFlight <= 0 {
		return nil, errors.New("placer: lease, leadership, write timeout and in-flight limit must be above zero")
	}
	if cfg.Identity == "" {
		cfg.Identity = op()
	}
	p := &Placer{
		cfg: cfg, conn: deps.Conn, log: deps.Logger, tracer: deps.Tracer, book: newBook(cfg),
		writers: make(chan struct{}, cfg.InFlight), wake: make(chan struct{}, 1), enroll: make(chan struct{}, 1),
		newly: map[schemas.WorkerID]time.Time{}, writing: map[schemas.WorkerID]int{},
		table: bus.NewTable(deps.Conn, schemas.BucketTasks, bus.JSON(schemas.Record.Wrote)),
		elector: &elector{
			leaders:  bus.NewTable(deps.Conn, schemas.BucketLeaders, bus.JSON[schemas.Leadership](nil)),
			identity: cfg.Identity, length: cfg.Leadership, write: cfg.WriteTimeout, log: deps.Logger,
		},
	}
	p.metrics = newMetrics(deps.Metrics, p)
	p.tasks = bus.NewView(deps.Conn, schemas.BucketTasks, p.decodeTask, bus.ViewOptions[seen]{OnChange: p.taskChanged})
	p.beats = bus.NewView(deps.Conn, schemas.BucketWorkers, decodeBeat, bus.ViewOptions[schemas.Beat]{OnChange: p.beatChanged})
	p.drains = bus.NewView(deps.Conn, schemas.BucketDrains,
		func(string, nats.Header, []byte) (struct{}, error) { return struct{}{}, nil },
		bus.ViewOptions[struct{}]{OnChange: p.drainChanged})
	return p, nil
}

func (p *Placer) checkViews(context.Context) error {
	for name, ready := range map[string]<-chan struct{}{"tasks": p.tasks.Ready(), "workers": p.beats.Ready()} {
		select {
		case <-ready:
		default:
			return fmt.Errorf("the view of %s is not complete yet", name)
		}
	}
	return nil
}

func (p *Placer) decodeTask(key string, h nats.Header, data []byte) (seen, error) {
	s, err := look(h, data, func() (need, bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.book.known(schemas.TaskID(key))
	})
	if err == nil && s.state.Final() {
		err = bus.ErrForget
	}
	return s, err
}

// decodeBeat refuses a beat for which no record could name the worker: every task would be
// chosen for it, since nothing ever comes there.
func decodeBeat(_ string, _ nats.Header, data []byte) (b schemas.Beat, err error) {
	if err = schemas.Decode(data, &b); err == nil && !b.Epoch.Valid() {
		err = errors.New("a beat without a proper epoch")
	}
	return b, err
}

func (p *Placer) taskChanged(c bus.Change[seen]) {
	now := time.Now()
	p.mu.Lock()
	if c.HadOld {
		p.book.count(c.Old.state, -1)
	}
	if c.Deleted {
		p.book.forget(schemas.TaskID(c.Key), stateOf(c.Header))
	} else {
		p.book.count(c.New.state, +1)
		p.book.changed(schemas.TaskID(c.Key), c.New, c.Revision, now)
	}
	p.mu.Unlock()
	p.nudge()
}

func (p *Placer) beatChanged(c bus.Change[schemas.Beat]) {
	w := schemas.WorkerID(c.Key)
	p.mu.Lock()
	registered := false
	if c.Deleted {
		p.book.fleet.gone(w)
		delete(p.newly, w)
	} else {
		c.New.Worker = w // the key is what the bus guards
		registered = p.book.fleet.beat(c.New, time.Now())
		if registered {
			p.newly[w] = time.Time{}
		}
	}
	better := len(p.book.fleet.better) > 0
	p.mu.Unlock()
	if registered {
		select {
		case p.enroll <- struct{}{}:
		default:
		}
	}
	if better {
		p.nudge()
	}
}

func (p *Placer) drainChanged(c bus.Change[struct{}]) {
	p.mu.Lock()
	p.book.fleet.drain(schemas.WorkerID(c.Key), !c.Deleted)
	p.mu.Unlock()
	p.nudge()
}

// watchConnection counts the silence of workers anew after each reconnect.
func (p *Placer) watchConnection(ctx context.Context) error {
	for {
		reconnected := p.conn.Reconnected()
		select {
		case <-ctx.Done():
			return nil
		case <-reconnected:
			p.mu.Lock()
			p.book.fleet.awake(time.Now())
			p.mu.Unlock()
			p.nudge()
		}
	}
}

// nudge wakes the loop of decisions.
func (p *Placer) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// op makes a random id.
func op() string { return strings.ToLower(rand.Text()[:20]) }
