package reaper

import (
	"context"
	"crypto/rand"
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

// Config of a reaper. DefaultConfig has the values that production uses.
type Config struct {
	Retention time.Duration // how long a final record is kept
	Fence     time.Duration // how long a worker's beat must be unchanged before it is lost
	Redrive   time.Duration // how long nothing may come of an order before it is sent again
	Overdue   time.Duration // how long after its deadline and grace a task is stopped from here
	Scan      time.Duration // between two looks at every record, the safety net
	Collect   time.Duration // between two looks at the artifacts that are stored
	Callbacks Callbacks
	Blobs     Blobs
	Unknown   time.Duration // how long a report that no record explains is tried again before its attempt is closed
}

// DefaultConfig has the values that production uses.
func DefaultConfig() Config {
	return Config{
		Retention: 24 * time.Hour, Fence: 75 * time.Second, Redrive: 15 * time.Second,
		Overdue: 2 * time.Second, Scan: time.Minute, Collect: 10 * time.Minute, Unknown: time.Minute, Callbacks: defaultCallbacks(), Blobs: defaultBlobs(),
	}
}

// Deps are what a reaper stands on.
type Deps struct {
	Conn    *bus.Conn
	Logger  zerolog.Logger
	Metrics prometheus.Registerer
	Health  *ops.Health
	Tracer  *tracing.Tracer // may be nil
}

// task is what the view keeps of a record that can still change. Of a final one it
// keeps nothing but its callback: those stay in the bucket for their retention, and only
// their number grows.
type task struct {
	holder string // "<worker> <epoch>", "" if none
	blobs  string // schemas.HeaderBlobs
	body   *body  // nil once final

	callback string // schemas.HeaderCallback: it is final, and that is to be announced
}

// body is an encoded record. A large one is kept until the first look at it, in which a
// short task ends; after that it is read from the bucket when it is needed.
type body struct{ raw atomic.Pointer[[]byte] }

const largeRecord = 4 << 10

func newBody(raw []byte) *body {
	b := &body{}
	b.raw.Store(&raw)
	return b
}

// looked gives up the bytes of a large record.
func (b *body) looked() {
	if raw := b.raw.Load(); raw != nil && len(*raw) > largeRecord {
		b.raw.Store(nil)
	}
}

// Reaper is one replica.
type Reaper struct {
	cfg     Config
	conn    *bus.Conn
	log     zerolog.Logger
	metrics *metrics
	tracer  *tracing.Tracer
	table   *bus.Table[schemas.Record]
	workers *bus.Table[schemas.Beat]
	tasks   *bus.View[task]
	beats   *bus.View[schemas.Beat]
	due     *timers[schemas.TaskID]
	fleet   *fleet
	unknown *unknown

	suspected chan struct{}
	mu        sync.Mutex
	suspects  map[schemas.WorkerID]struct{} // under mu: whose tasks are to be looked at
	silent    map[schemas.TaskID]time.Time  // under mu: whose workers do not answer, and since when that is seen here
	courier   *courier
	blobs     *blobCollector
}

// Run runs the reaper until ctx ends.
func Run(ctx context.Context, deps Deps, cfg Config) error {
	r := &Reaper{
		cfg: cfg, conn: deps.Conn, log: deps.Logger, tracer: deps.Tracer,
		table: bus.NewTable(deps.Conn, schemas.BucketTasks, bus.JSON(schemas.Record.Wrote)),
		workers: bus.NewTable(deps.Conn, schemas.BucketWorkers,
			// A verdict of unknown outcome is told by the verdict itself: nobody takes it back
			// under the same epoch.
			bus.JSON(func(b schemas.Beat, _ string) bool { return b.Lost() })),
		due: newTimers[schemas.TaskID](), fleet: newFleet(), unknown: newUnknown(),
		suspected: make(chan struct{}, 1), suspects: map[schemas.WorkerID]struct{}{}, silent: map[schemas.TaskID]time.Time{},
	}
	r.courier = newCourier(deps.Conn, r.table, deps.Logger, cfg)
	r.metrics = newMetrics(deps.Metrics, r.courier.oldest)
	r.courier.metrics, r.courier.tracer = r.metrics, r.tracer
	r.tasks = bus.NewView(deps.Conn, schemas.BucketTasks, decodeTask, bus.ViewOptions[task]{OnChange: r.taskChanged})
	r.beats = bus.NewView(deps.Conn, schemas.BucketWorkers, decodeBeat, bus.ViewOptions[schemas.Beat]{OnChange: r.beatChanged})

	r.blobs = newBlobCollector(deps.Conn, r.tasks, deps.Logger, cfg.Blobs)
	r.blobs.metrics = r.metrics

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.tasks.Run(ctx) })
	g.Go(func() error { return r.beats.Run(ctx) })
	g.Go(func() error { return r.reports(ctx) })
	g.Go(func() error { return r.sweeps(ctx) })
	g.Go(func() error { return r.watchFleet(ctx) })
	g.Go(func() error { return r.blobs.run(ctx) })
	g.Go(func() error { return r.collect(ctx) })
	g.Go(func() error { return r.courier.run(ctx, r.tasks.Ready()) })
	if deps.Health != nil {
		deps.Health.Add("reaper: views", r.checkViews)
	}
	err := g.Wait()
	if ctx.Err() != nil && err == context.Canceled {
		return nil
	}
	return err
}

func (r *Reaper) checkViews(context.Context) error {
	select {
	case <-r.tasks.Ready():
	default:
		return fmt.Errorf("the view of tasks is not complete yet")
	}
	return nil
}

func decodeTask(_ string, h nats.Header, data []byte) (task, error) {
	if schemas.State(h.Get(schemas.HeaderState)).Final() {
		callback := h.Get(schemas.HeaderCallback)
		if callback == "" {
			return task{}, bus.ErrForget
		}
		return task{callback: callback}, nil
	}
	return newTask(h, data), nil
}

func decodeBeat(_ string, _ nats.Header, data []byte) (b schemas.Beat, err error) {
	return b, schemas.Decode(data, &b)
}

// taskChanged keeps a look at every record that is not final: the first soon, so
// that a short task is never decoded here.
func (r *Reaper) taskChanged(c bus.Change[task]) {
	id := schemas.TaskID(c.Key)
	r.courier.changed(c.Key, c.Old.callback, c.New.callback)
	if c.Deleted || c.New.body == nil {
		r.due.drop(id)
		r.unanswered(schemas.Record{ID: id}, false)
		return
	}
	r.due.add(id, time.Now().Add(firstLook))
}

// firstLook is how long after a change a record is looked at.
const firstLook = time.Second

func (r *Reaper) meta() schemas.Meta {
	return schemas.Meta{At: time.Now().UTC(), By: "reaper", Op: strings.ToLower(rand.Text()[:20])}
}

// entry gives a record that may still change, from the view if it is there.
func (r *Reaper) entry(ctx context.Context, id schemas.TaskID) (bus.Entry[schemas.Record], error) {
	if t, revision, ok := r.tasks.Get(string(id)); ok && t.body != nil {
		if raw := t.body.raw.Load(); raw != nil {
			e := bus.Entry[schemas.Record]{Key: string(id), Revision: revision}
			if schemas.Decode(*raw, &e.Value) == nil {
				return e, nil
			}
		}
	}
	return r.table.Get(ctx, string(id))
}

// apply changes a record by one event, starting from e. The order that follows is
// sent: a worker that held the task before learns that it is over.
func (r *Reaper) apply(ctx context.Context, e bus.Entry[schemas.Record], event func(schemas.Meta) schemas.Event) (bus.Entry[schemas.Record], error) {
	m := r.meta()
	var before schemas.Record
	after, err := r.table.UpdateFrom(ctx, e, m.Op, func(e bus.Entry[schemas.Record]) (schemas.Record, []bus.WriteOption, error) {
		before, m.On = e.Value, e.Revision
		next, err := schemas.Next(e.Value, event(m))
		if err != nil || !next.State.Final() {
			return next, nil, err
		}
		return next, []bus.WriteOption{bus.TTL(r.cfg.Retention)}, nil
	})
	if err != nil {
		return after, err
	}
	rec := after.Value
	r.observe(after)
	if before.State != rec.State {
		r.metrics.transition(before, rec)
		tracing.Log(r.log.Info(), rec.Trace).Str("task", string(rec.ID)).Int("attempt", rec.Attempt).Str("from", string(before.State)).
			Str("state", string(rec.State)).Str("reason", string(rec.Reason)).Msg("task")
	}
	if before.State.Held() && !rec.State.Held() {
		r.order(rec, after.Revision, before.Assignment())
	}
	return after, nil
}

// observe folds an own write into the view.
func (r *Reaper) observe(e bus.Entry[schemas.Record]) {
	h := nats.Header(e.Value.Headers())
	if e.Value.State.Final() {
		if callback := h.Get(schemas.HeaderCallback); callback != "" {
			r.tasks.Observe(e.Key, task{callback: callback}, e.Revision)
		} else {
			r.tasks.Forget(e.Key, e.Revision)
		}
		return
	}
	raw, err := schemas.Encode(e.Value)
	if err != nil {
		return
	}
	r.tasks.Observe(e.Key, newTask(h, raw), e.Revision)
}

// order sends the order that follows from a record to the worker of an assignment.
// It is not waited for: what is lost is sent again. Where the same worker holds a later
// attempt by now, the order of that one says the same and must not be overwritten.
func (r *Reaper) order(rec schemas.Record, revision uint64, a schemas.Assignment) {
	if now := rec.Assignment(); rec.State.Held() && now.Worker == a.Worker && now.Attempt > a.Attempt {
		a = now
	}
	o := schemas.NewOrder(rec, revision, a, time.Now())
	body, err := schemas.Encode(o)
	if err != nil {
		r.log.Error().Err(err).Str("task", string(a.Task)).Msg("encode order")
		return
	}
	span := r.tracer.Start(rec.Trace, "order", tracing.Producer)
	span.Task(string(a.Task), a.Attempt)
	span.Set("dayfly.want", string(o.Want))
	r.conn.PublishAsync(schemas.OrderSubject(a.Worker, a.Task), tracing.Header(span.Traceparent()), body, func(err error) {
		span.End(err)
		if err != nil {
			r.log.Debug().Err(err).Str("task", string(a.Task)).Msg("send order")
		}
	})
}
