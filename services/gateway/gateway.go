package gateway

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
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
	"dayfly.dev/services/gateway/ingress"
	"dayfly.dev/services/gateway/kinds"
	"dayfly.dev/services/gateway/ui"
)

// Config of a gateway. The zero value works; withDefaults says what it means.
type Config struct {
	Policy schemas.Policy // what tasks may ask for; zero: schemas.DefaultPolicy

	Kinds     *kinds.Folder // of tasks; nil: none
	KindsOnly bool          // no task without a kind

	// Hosts are names and addresses under which clients reach this gateway, beside localhost,
	// loopback addresses and the one to which a request came. ops.CheckHost says what one may be.
	Hosts []string

	WaitMax      time.Duration // longest ?wait=, 60 s
	MaxFollowers int           // readers of logs and events at a time, 2048; one more is answered with 429
	ListLook     int           // tasks that one request for a list looks at, 10,000
	EventWindow  int           // events that a reader of them holds which is behind, 4096 and at most twice as many
	CacheBytes   int           // whole records kept in memory beside the short ones, 32 MiB

	// Retention is how long the record of a task is kept that was canceled while it was
	// queued: that write is its last, so nobody else can say it. 24 h.
	Retention time.Duration
	// Lease is how long a worker may be without a beat before it shows as silent. 30 s.
	Lease time.Duration

	// KeyGrace is how long an Idempotency-Key may be without its task: until then the
	// request that brought it may still be at work, and whoever repeats it finishes that
	// work. 60 s.
	KeyGrace time.Duration

	BatchAhead int           // how many tasks of one batch wait for a worker at a time, 256
	MaxBatches int           // batches that are not done; one more is answered with 429, 64
	BatchLease time.Duration // how long a gateway that works on batches may be silent, 5 s

	Unavailable time.Duration // how long a request waits for NATS to come back, 500 ms
	OpTimeout   time.Duration // longest operation on the bus, 3 s
	ExtendWait  time.Duration // how long extend waits for the worker, 2 s
	KeepAlive   time.Duration // between signs of life on a quiet log, 15 s
	LogGap      time.Duration // how long a missing piece of a log is waited for, 2 s
	WriteStall  time.Duration // how long a reader of a log may take for one piece, 30 s

	// Endpoints says how clients reach the ports of tasks: the scheme, the domain and the
	// port of their hostnames. http://*.localhost if it is zero.
	Endpoints EndpointAddress
	Ingress   ingress.Config // its domain is that of Endpoints
	// IngressBackends are the URLs at which a proxy before them reaches the ingresses of the site.
	IngressBackends []string
	TCP             PortRange     // ports for the tcp ports of tasks; zero: none
	PortSweep       time.Duration // how often it is checked whose they are, 10 s
	// PortGrace is how long such a port may belong to a task that nobody knows: its record
	// may be about to be stored. 1 min.
	PortGrace   time.Duration
	BlobMaxSize int64         // bytes of one blob, 4 GiB
	BlobBytes   int64         // bytes of all blobs, 20 GiB
	BlobGrace   time.Duration // the collector's: schemas.BlobGrace

	TemplatesEvery time.Duration // how often the folder of templates is read, 2 s
	InstanceSweep  time.Duration // how often it is checked that instances and their tasks agree, 10 s
	MaxPerOwner    int           // instances that one owner may have at a time; 0: any number

	TaskConns int // connections and requests from outside to one task at a time, 256
}

func (c Config) withDefaults() Config {
	if c.Policy.MaxTTL == 0 {
		c.Policy = schemas.DefaultPolicy()
	}
	if c.Kinds != nil {
		c.Policy.Kinds, c.Policy.KindsOnly = c.Kinds, c.KindsOnly
	}
	c.WaitMax = cmp.Or(c.WaitMax, time.Minute)
	c.MaxFollowers = cmp.Or(c.MaxFollowers, 2048)
	c.ListLook = cmp.Or(c.ListLook, 10_000)
	c.EventWindow = cmp.Or(c.EventWindow, 4096)
	c.CacheBytes = cmp.Or(c.CacheBytes, 32<<20)
	c.Retention = cmp.Or(c.Retention, 24*time.Hour)
	c.Lease = cmp.Or(c.Lease, 30*time.Second)
	c.KeyGrace = cmp.Or(c.KeyGrace, time.Minute)
	c.BatchAhead = cmp.Or(c.BatchAhead, 256)
	c.MaxBatches = cmp.Or(c.MaxBatches, 64)
	c.BatchLease = cmp.Or(c.BatchLease, 5*time.Second)
	c.Unavailable = cmp.Or(c.Unavailable, 500*time.Millisecond)
	c.OpTimeout = cmp.Or(c.OpTimeout, 3*time.Second)
	c.ExtendWait = cmp.Or(c.ExtendWait, 2*time.Second)
	c.KeepAlive = cmp.Or(c.KeepAlive, 15*time.Second)
	c.LogGap = cmp.Or(c.LogGap, 2*time.Second)
	c.WriteStall = cmp.Or(c.WriteStall, 30*time.Second)
	if c.Endpoints == (EndpointAddress{}) {
		c.Endpoints = EndpointAddress{Scheme: "http", Domain: "localhost", Port: 80}
	}
	c.Ingress.Domain = c.Endpoints.Domain
	c.PortSweep = cmp.Or(c.PortSweep, 10*time.Second)
	c.PortGrace = cmp.Or(c.PortGrace, time.Minute)
	c.TemplatesEvery = cmp.Or(c.TemplatesEvery, templatesEvery)
	c.InstanceSweep = cmp.Or(c.InstanceSweep, 10*time.Second)
	c.TaskConns = cmp.Or(c.TaskConns, 256)
	c.BlobMaxSize = cmp.Or(c.BlobMaxSize, 4<<30)
	c.BlobBytes = cmp.Or(c.BlobBytes, schemas.BlobBytes)
	c.BlobGrace = cmp.Or(c.BlobGrace, schemas.BlobGrace)
	return c
}

// Deps are what a gateway stands on.
type Deps struct {
	Conn     *bus.Conn
	Connect  func(context.Context) (*bus.Conn, error) // of Run: makes Conn if that is nil
	Logger   zerolog.Logger
	Metrics  prometheus.Registerer // may be nil
	Health   *ops.Health           // may be nil
	Tracer   *tracing.Tracer       // may be nil
	Listener net.Listener          // of Run

	Templates *Templates // may be nil: there are none; read again while the gateway runs

	// Of Run, each may be nil: where tasks are reached by their hostnames, and the
	// certificate for it.
	Ingress     net.Listener
	Certificate *CertificateFiles
}

// CertificateFiles are a certificate with its chain, and its key, in PEM.
type CertificateFiles struct{ Certificate, Key string }

// Gateway is one replica.
type Gateway struct {
	cfg     Config
	conn    *bus.Conn
	log     zerolog.Logger
	metrics *metrics
	tracer  *tracing.Tracer

	records *bus.Table[record]
	keys    *bus.Table[schemas.IdempotencyEntry]
	drains  *bus.Table[schemas.Drain]
	wanted  *bus.Table[schemas.WantedImages]

	deliveries *bus.Table[schemas.Delivery]
	batches    *batches
	blobs      *blobs
	sessions   *sessions
	endpoints  *endpoints
	visits     *visits
	ports      *ports
	templates  *Templates
	prepulled  string // of instances.run: the digest of the templates whose images workers are asked to hold
	instances  *instances
	ingress    *ingress.Server
	outside    *ingress.Metrics

	tasks  *bus.View[*item]
	recent *recent
	index  index
	tally  tally
	fleet  *fleet

	hosts     ops.Hosts
	handler   http.Handler              // of Run
	page      func() ([]byte, error)    // the docs page
	ui        func() (*ui.Pages, error) // the pages for people
	followers chan struct{}             // one per open log or stream of events
	newest    newest
}

// Run serves the API on deps.Listener, and tasks by their hostnames on deps.Ingress, until
// ctx ends. While it connects it answers that the service is unavailable: a gateway that
// starts during an outage is not silent.
func Run(ctx context.Context, deps Deps, cfg Config) error {
	var open atomic.Pointer[Gateway]
	away := (&Gateway{log: deps.Logger, hosts: ops.NewHosts(cfg.Hosts), ui: sync.OnceValues(ui.New)}).connecting()
	group, ctx := errgroup.WithContext(ctx)
	ready := make(chan *Gateway, 1)
	group.Go(func() error {
		return ops.Serve(ctx, deps.Listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if g := open.Load(); g != nil {
				g.handler.ServeHTTP(w, r)
				return
			}
			away.ServeHTTP(w, r)
		}), deps.Logger)
	})
	group.Go(func() error {
		if deps.Conn == nil {
			conn, err := deps.Connect(ctx)
			if err != nil {
				return err
			}
			defer conn.Close()
			deps.Conn = conn
		}
		g := New(deps, cfg)
		g.handler = g.Handler()
		open.Store(g)
		ready <- g
		return g.KeepViews(ctx)
	})
	if cfg.Kinds != nil {
		group.Go(func() error {
			followKinds(ctx, cfg.Kinds, deps.Logger)
			return nil
		})
	}
	group.Go(func() error {
		if deps.Ingress == nil {
			return nil
		}
		defer deps.Ingress.Close()
		select {
		case g := <-ready: // whoever comes before waits in the listener
			return g.ServeIngress(ctx, deps.Ingress, deps.Certificate)
		case <-ctx.Done():
			return nil
		}
	})
	if err := group.Wait(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("gateway: %w", err)
	}
	return nil
}

// ServeIngress answers requests for the hostnames of tasks until ctx ends: over TLS, if
// there is a certificate.
func (g *Gateway) ServeIngress(ctx context.Context, ln net.Listener, files *CertificateFiles) error {
	var cert *ingress.Certificate
	if files != nil {
		var err error
		if cert, err = ingress.LoadCertificate(files.Certificate, files.Key, g.log, g.outside); err != nil {
			return err
		}
	}
	return g.ingress.Serve(ctx, ln, cert)
}

// New makes a gateway. It answers once KeepViews runs.
func New(deps Deps, cfg Config) *Gateway {
	cfg = cfg.withDefaults()
	g := &Gateway{
		cfg: cfg, conn: deps.Conn, log: deps.Logger, tracer: deps.Tracer,
		records: bus.NewTable(deps.Conn, schemas.BucketTasks, bus.Codec[record]{
			Encode: func(r record) ([]byte, nats.Header, error) { return r.raw, r.Headers(), nil },
			Decode: openRecord,
			Wrote:  func(r record, op string) bool { return r.Wrote(op) },
		}),
		keys:       bus.NewTable(deps.Conn, schemas.BucketIdempotency, bus.JSON[schemas.IdempotencyEntry](nil)),
		drains:     bus.NewTable(deps.Conn, schemas.BucketDrains, bus.JSON[schemas.Drain](nil)),
		wanted:     bus.NewTable(deps.Conn, schemas.BucketImages, bus.JSON[schemas.WantedImages](nil)),
		deliveries: newDeliveries(deps.Conn),

		fleet:     newFleet(deps.Conn, cfg.Lease),
		recent:    newRecent(cfg.CacheBytes),
		followers: make(chan struct{}, cfg.MaxFollowers),
		hosts:     ops.NewHosts(cfg.Hosts),
		page:      sync.OnceValues(docsPage),
		ui:        sync.OnceValues(ui.New),
		tally:     tally{of: map[schemas.State]int{}},
	}
	g.newest.look = func() (uint64, error) { return deps.Conn.LastStored(context.Background(), schemas.BucketTasks) }
	g.batches = newBatches(g)
	g.blobs = newBlobs(g)
	g.templates = deps.Templates
	g.instances = newInstances(g)
	g.metrics = newMetrics(deps.Metrics, g.batches.unfinished, g.instances.open)
	g.sessions = newSessions()
	g.endpoints = newEndpoints(cfg.Endpoints)
	g.visits = newVisits(cfg.TaskConns)
	g.outside = ingress.NewMetrics(deps.Metrics)
	g.ports = newPorts(g, cfg.TCP)
	g.ingress = ingress.New(cfg.Ingress, router{g}, deps.Logger, g.outside)
	g.tasks = bus.NewView(deps.Conn, schemas.BucketTasks, g.decodeItem, bus.ViewOptions[*item]{OnChange: g.taskChanged})
	if deps.Health != nil {
		if g.templates != nil {
			deps.Health.Add("gateway: templates", g.templatesHealth)
		}
		deps.Health.Add("gateway: nats", func(context.Context) error {
			if !g.conn.Connected() {
				return errors.New("not connected")
			}
			return nil
		})
		deps.Health.Add("gateway: views", func(context.Context) error {
			if !g.ready() {
				return errors.New("the copies of tasks and workers are not complete yet")
			}
			return nil
		})
		deps.Health.Add("gateway: sessions", func(context.Context) error {
			select {
			case <-g.sessions.ready:
				return nil
			default:
				return errors.New("sessions with tasks cannot be opened yet")
			}
		})
	}
	return g
}

// KeepViews keeps the in-memory copies up to date until ctx ends.
func (g *Gateway) KeepViews(ctx context.Context) error {
	defer g.ingress.Close()
	if err := g.endpoints.load(ctx, g.conn); err != nil { // before the view needs it
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return g.tasks.Run(ctx) })
	group.Go(func() error { return g.fleet.beats.Run(ctx) })
	group.Go(func() error { return g.fleet.drains.Run(ctx) })
	group.Go(func() error { return g.batches.view.Run(ctx) })
	group.Go(func() error { return g.batches.run(ctx) })
	group.Go(func() error { return g.sessions.run(ctx, g.conn) })
	group.Go(func() error { return g.ports.run(ctx) })
	group.Go(func() error { return g.blobs.run(ctx) })
	group.Go(func() error { return g.instances.run(ctx) })
	group.Go(func() error { g.followTemplates(ctx); return nil })
	return group.Wait()
}

func (g *Gateway) views() []<-chan struct{} {
	all := []<-chan struct{}{g.tasks.Ready(), g.fleet.beats.Ready(), g.fleet.drains.Ready(), g.batches.view.Ready(), g.instances.view.Ready()}
	if g.cfg.TCP.size() > 0 {
		all = append(all, g.ports.view.Ready())
	}
	return all
}

func (g *Gateway) ready() bool {
	for _, ready := range g.views() {
		select {
		case <-ready:
		default:
			return false
		}
	}
	return true
}

// taskChanged keeps what is derived from the view of tasks. The view calls it from
// one goroutine.
func (g *Gateway) taskChanged(c bus.Change[*item]) {
	if c.Deleted {
		g.index.remove(c.Key)
		g.endpoints.forget(schemas.TaskID(c.Key), c.Old)
	} else {
		g.index.add(c.Key)
	}
	g.fleet.count(c.Old, c.New)
	g.tally.changed(c.Old, c.New)
	g.recent.changed(c.Old, c.New)
	g.batches.taskChanged(c)
	g.ports.taskChanged(c)
	g.instances.taskChanged(c)
}

// meta is that of one write: by says who wants it.
func meta(by string) schemas.Meta {
	return schemas.Meta{At: time.Now().UTC(), By: by, Op: rand.Text()}
}

// reach waits a moment for NATS to be there, and for the site's key.
func (g *Gateway) reach(ctx context.Context) error {
	again := g.conn.Reconnected()
	if g.conn.Connected() {
		again = g.endpoints.loaded
	}
	return g.awaited(ctx, again, g.endpoints.loaded)
}

// awaited waits a moment for what there has to be before a request is answered.
func (g *Gateway) awaited(ctx context.Context, all ...<-chan struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, g.cfg.Unavailable)
	defer cancel()
	for _, one := range all {
		select {
		case <-one:
			continue
		default:
		}
		select {
		case <-one:
		case <-ctx.Done():
			return unavailable()
		}
	}
	return nil
}

// onBus gives the context of work on the bus. The client's leaving does not end
// it: an accepted key shall get its task.
func (g *Gateway) onBus(r *http.Request) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(r.Context()), g.cfg.OpTimeout)
}

func unavailable() *schemas.Error {
	return &schemas.Error{Status: http.StatusServiceUnavailable, Code: schemas.CodeUnavailable,
		Detail: "dayfly cannot reach its store at the moment; nothing was done, try again", RetryAfter: schemas.Duration(time.Second)}
}

// busError is what a client hears of a failed operation. What it does not know stays
// as it is, and becomes a 500.
func busError(err error, id schemas.TaskID) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, bus.ErrNotFound):
		return noTask()
	case errors.Is(err, bus.ErrUnknownOutcome):
		return &schemas.Error{Status: http.StatusServiceUnavailable, Code: schemas.CodeUnknownOutcome, Task: id,
			Detail: "it may have been done; ask for the task, or repeat the request with the same Idempotency-Key", RetryAfter: schemas.Duration(time.Second)}
	case errors.Is(err, bus.ErrUnavailable), errors.Is(err, bus.ErrConflict),
		errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return unavailable()
	}
	return err
}

// readError is busError for a read, which leaves nothing unknown.
func readError(err error) error {
	if errors.Is(err, bus.ErrUnknownOutcome) {
		return unavailable()
	}
	return busError(err, "")
}

func noTask() *schemas.Error {
	return &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Detail: "there is no such task; it may be over for longer than records are kept"}
}
