package placer

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/ops"
	"dayfly.dev/schemas"
)

// world is a bus with all assets, and what a test does to it as gateway and agents.
type world struct {
	t      testing.TB
	server *natsd.Server
	conn   *bus.Conn
	tasks  *bus.Table[schemas.Record]
	beats  *bus.Table[schemas.Beat]

	mu     sync.Mutex
	orders map[schemas.TaskID][]schemas.Order // under mu, as they were sent
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, server: natstest.Server(t), orders: map[schemas.TaskID][]schemas.Order{}}
	w.conn = natstest.Connect(t, w.server)
	if err := bus.Provision(t.Context(), w.conn, schemas.Assets(time.Hour), 1); err != nil {
		t.Fatal(err)
	}
	w.tasks = bus.NewTable(w.conn, schemas.BucketTasks, bus.JSON(schemas.Record.Wrote))
	w.beats = bus.NewTable(w.conn, schemas.BucketWorkers, bus.JSON[schemas.Beat](nil))
	sub, err := w.conn.NC.Subscribe("dayfly.work.>", func(m *nats.Msg) {
		var o schemas.Order
		if err := schemas.Decode(m.Data, &o); err != nil {
			t.Error(err)
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.orders[o.Task] = append(w.orders[o.Task], o)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		t.Fatal(err)
	}
	if err := w.conn.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	return w
}

// steady is a configuration in which a busy machine does not take the leadership away:
// whoever leads next sends orders again.
func steady(identity string) Config {
	c := DefaultConfig()
	c.Identity, c.Leadership = identity, 20*time.Second
	return c
}

type replica struct {
	conn *bus.Conn
	reg  *prometheus.Registry
	stop func()
}

// placer starts a placer; stop ends it and waits.
func (w *world) placer(cfg Config) *replica {
	w.t.Helper()
	r := &replica{conn: natstest.Connect(w.t, w.server), reg: prometheus.NewRegistry()}
	ctx, cancel := context.WithCancel(context.WithoutCancel(w.t.Context()))
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Deps{Conn: r.conn, Logger: natstest.Logger(w.t), Metrics: r.reg, Health: ops.NewHealth()}, cfg)
	}()
	var once sync.Once
	r.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				w.t.Error(err)
			}
		})
	}
	w.t.Cleanup(r.stop)
	return r
}

// kill cuts the replica off from the bus for ever: it cannot even give up its lease.
func (r *replica) kill() { r.conn.NC.Close() }

func (r *replica) leads() bool {
	n, err := testutil.GatherAndCount(r.reg, "dayfly_pending_oldest_seconds")
	return err == nil && n == 1
}

func (w *world) beat(id schemas.WorkerID, h schemas.Host) {
	w.t.Helper()
	_, err := w.beats.Create(w.t.Context(), string(id), schemas.Beat{Worker: id, Epoch: "e1", Host: h}, "")
	if err != nil {
		w.t.Fatal(err)
	}
}

func taskID(n int) schemas.TaskID { return schemas.TaskID(fmt.Sprintf("t-01jd%022d", n)) }

// post creates a queued record as a gateway does.
func (w *world) post(n int, change func(*schemas.Spec)) bus.Entry[schemas.Record] {
	w.t.Helper()
	e, err := w.create(n, change)
	if err != nil {
		w.t.Fatal(err)
	}
	return e
}

func (w *world) create(n int, change func(*schemas.Spec)) (bus.Entry[schemas.Record], error) {
	spec := schemas.DefaultSpec()
	spec.Image, spec.OnLost = "busybox", schemas.OnLostRequeue
	if change != nil {
		change(&spec)
	}
	m := schemas.Meta{At: time.Now().UTC(), By: "gateway", Op: op()}
	return w.tasks.Create(w.t.Context(), string(taskID(n)), schemas.NewRecord(taskID(n), spec, schemas.Policy{MaxTTL: schemas.Duration(time.Hour)}, m), m.Op)
}

func (w *world) posts(from, to int) {
	w.t.Helper()
	var work sync.WaitGroup
	next := make(chan int)
	for range 32 {
		work.Go(func() {
			for n := range next {
				if _, err := w.create(n, nil); err != nil {
					w.t.Error(err)
				}
			}
		})
	}
	for n := from; n < to; n++ {
		next <- n
	}
	close(next)
	work.Wait()
}

func (w *world) ordersOf(id schemas.TaskID) []schemas.Order {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.orders[id])
}

// eventually waits for a fact.
func eventually(t testing.TB, what string, fact func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !fact() {
		if time.Now().After(deadline) {
			t.Fatalf("never came true: %s", what)
		}
		<-tick.C
	}
}

// Of two workers the better one lies about itself so that no record could name it.
func TestAWorkerThatNoRecordCanNameGetsNothing(t *testing.T) {
	w := newWorld(t)
	large := schemas.Host{CPUs: 64, Memory: 1 << 40, Slots: 1000}
	if _, err := w.beats.Create(t.Context(), "w1", schemas.Beat{Worker: "w1", Epoch: schemas.Epoch(strings.Repeat("e", 65)), Host: large}, ""); err != nil {
		t.Fatal(err)
	}
	w.beat("w2", schemas.Host{CPUs: 4, Memory: 8 << 30, Slots: 10})
	w.placer(steady("p1"))
	w.posts(0, 3)
	w.allPlaced(0, 3, 10)
}

// allPlaced checks that each task is assigned exactly once, and that each has orders
// of just that revision.
func (w *world) allPlaced(from, to int, atMost int) {
	w.t.Helper()
	for n := from; n < to; n++ {
		eventually(w.t, fmt.Sprintf("task %d has an order", n), func() bool { return len(w.ordersOf(taskID(n))) > 0 })
		e, err := w.tasks.Get(w.t.Context(), string(taskID(n)))
		if err != nil {
			w.t.Fatal(err)
		}
		if e.Value.State != schemas.Assigned || e.Value.Attempt != 1 {
			w.t.Fatalf("task %d is %s, attempt %d", n, e.Value.State, e.Value.Attempt)
		}
		orders := w.ordersOf(taskID(n))
		for _, o := range orders {
			if o.Revision != e.Revision || o.Assignment != e.Value.Assignment() || o.Want != schemas.WantRun {
				w.t.Fatalf("task %d is at revision %d with %v, its order is for %d, %s, %v", n, e.Revision, e.Value.Assignment(), o.Revision, o.Want, o.Assignment)
			}
		}
		if len(orders) > atMost {
			w.t.Fatalf("task %d has %d orders", n, len(orders))
		}
	}
}

func TestAQueuedRecordIsAssignedAndOrdered(t *testing.T) {
	const workers = `
		# HELP dayfly_workers Workers by state: ready; draining, takes nothing new; silent, no beat for a lease; lost, given up. The leader's.
		# TYPE dayfly_workers gauge
		dayfly_workers{state="draining"} 0
		dayfly_workers{state="lost"} 0
		dayfly_workers{state="ready"} 1
		dayfly_workers{state="silent"} 0
		`
	w := newWorld(t)
	r := w.placer(steady("a"))
	w.beat("w1", host(4, 8*gib, 0))
	eventually(t, "the worker is seen", func() bool { // the task may be seen first, and counted as one that fits nowhere
		return testutil.GatherAndCompare(r.reg, strings.NewReader(workers), "dayfly_workers") == nil
	})
	w.post(1, nil)
	w.allPlaced(1, 2, 1)
	o := w.ordersOf(taskID(1))[0]
	if o.Spec == nil || o.Spec.Image != "busybox" || o.TimeLeft != schemas.Duration(time.Hour) || o.Epoch != "e1" || o.Worker != "w1" {
		t.Errorf("the order is %+v", o)
	}
	eventually(t, "the stream has the order", func() bool {
		s, err := w.conn.JS.Stream(t.Context(), schemas.WorkStream("w1"))
		return err == nil && s.CachedInfo().State.Msgs == 2 // and the one that is kept
	})
	want := `
		# HELP dayfly_placements_total Tries to place a task: placed; no_capacity and constraint, no worker takes it now; conflict, its record had changed; error.
		# TYPE dayfly_placements_total counter
		dayfly_placements_total{result="conflict"} 0
		dayfly_placements_total{result="constraint"} 0
		dayfly_placements_total{result="error"} 0
		dayfly_placements_total{result="no_capacity"} 0
		dayfly_placements_total{result="placed"} 1
		# HELP dayfly_tasks Records that are not final, by state. The leader's.
		# TYPE dayfly_tasks gauge
		dayfly_tasks{state="assigned"} 1
		dayfly_tasks{state="queued"} 0
		dayfly_tasks{state="running"} 0
		dayfly_tasks{state="starting"} 0
		# HELP dayfly_worker_allocated_slots Tasks that are assigned to the worker. The leader's.
		# TYPE dayfly_worker_allocated_slots gauge
		dayfly_worker_allocated_slots{worker="w1"} 1
		` + workers
	eventually(t, "the metrics", func() bool {
		return testutil.GatherAndCompare(r.reg, strings.NewReader(want), "dayfly_placements_total", "dayfly_tasks", "dayfly_worker_allocated_slots", "dayfly_workers") == nil
	})
}

func TestTheFirstBeatMakesTheWorkersQueue(t *testing.T) {
	w := newWorld(t)
	w.placer(steady("a"))
	w.beat("w1", host(4, 8*gib, 0))
	eventually(t, "the consumer is there", func() bool {
		c, err := w.conn.JS.Consumer(t.Context(), schemas.WorkStream("w1"), schemas.WorkConsumer("w1"))
		if err != nil {
			return false
		}
		cfg := c.CachedInfo().Config
		return cfg.FilterSubject == schemas.OrderSubject("w1", "*") && cfg.AckWait == 5*time.Second && cfg.MaxAckPending == -1 && cfg.MaxDeliver == -1
	})
}

func TestWhyIsAnsweredByTheLeader(t *testing.T) {
	w := newWorld(t)
	w.placer(steady("a"))
	w.placer(steady("b"))
	w.beat("w1", host(4, 8*gib, 0))
	w.post(1, func(s *schemas.Spec) { s.Resources.Memory = 64 * gib })
	w.post(2, func(s *schemas.Spec) { s.Resources.Memory = 32 * gib })
	var why schemas.Why
	eventually(t, "why is answered", func() bool {
		m, err := w.conn.NC.Request(schemas.PlacerWhySubject, []byte(taskID(2)), time.Second)
		return err == nil && schemas.Decode(m.Data, &why) == nil && len(why.Workers) == 1
	})
	if why.Task != taskID(2) || why.Position != 2 || why.Workers[0].Filter != "memory" ||
		why.Summary != "no worker is large enough: asks 32GiB memory, the largest has 8GiB (w1)" {
		t.Errorf("says %+v", why)
	}
}

func TestTwoPlacersShareAQueueAndAssignOnce(t *testing.T) {
	w := newWorld(t)
	for _, identity := range []string{"a", "b"} {
		w.placer(steady(identity))
	}
	for n := range 5 {
		w.beat(schemas.WorkerID(fmt.Sprintf("w%d", n)), host(1000, 1000*gib, 0))
	}
	w.posts(0, 500)
	w.allPlaced(0, 500, 1)
}

func TestAnotherTakesOverWhenTheLeaderIsKilled(t *testing.T) {
	w := newWorld(t)
	cfg := steady("a")
	cfg.Leadership = 3 * time.Second // is waited out
	a := w.placer(cfg)
	eventually(t, "a leads", a.leads)
	cfg.Identity = "b"
	b := w.placer(cfg)
	w.posts(0, 1000) // no worker is there
	eventually(t, "b has seen them", func() bool { return b.conn.Connected() })
	w.beat("w1", host(1000, 1000*gib, 0))
	eventually(t, "some are placed", func() bool { return len(w.ordersOf(taskID(0))) > 0 })
	a.kill()
	killed := time.Now()
	w.posts(1000, 1100)
	eventually(t, "b leads", b.leads)
	t.Logf("taken over after %s", time.Since(killed).Round(time.Millisecond))
	w.allPlaced(0, 1100, 2)
}

func TestALeaderThatStopsHandsOverAtOnce(t *testing.T) {
	w := newWorld(t)
	cfg := steady("a")
	cfg.WriteTimeout = time.Hour // is what a leader that died would be waited for
	a := w.placer(cfg)
	eventually(t, "a leads", a.leads)
	cfg.Identity = "b"
	b := w.placer(cfg)
	a.stop()
	eventually(t, "b leads", b.leads)
}

func TestWhatADeadPlacerAssignedIsOrderedAgain(t *testing.T) {
	w := newWorld(t)
	w.beat("w1", host(4, 8*gib, 0))
	e := w.post(1, nil)
	choose := schemas.Choose{Meta: schemas.Meta{At: time.Now(), By: "placer", Op: "dead"}, Worker: "w1", Epoch: "e1"}
	next, err := schemas.Next(e.Value, choose)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.tasks.Replace(t.Context(), e, next, "dead"); err != nil {
		t.Fatal(err)
	}
	w.placer(steady("a"))
	w.allPlaced(1, 2, 1)

	// And one that is assigned by a deposed leader while this one leads.
	e = w.post(2, func(s *schemas.Spec) { s.Constraints = map[string]string{"zone": "none"} })
	if next, err = schemas.Next(e.Value, choose); err != nil {
		t.Fatal(err)
	}
	if _, err := w.tasks.Replace(t.Context(), e, next, "dead"); err != nil {
		t.Fatal(err)
	}
	w.allPlaced(2, 3, 1)
}

func TestPlacingGoesOnAfterARestartOfNATS(t *testing.T) {
	w := newWorld(t)
	w.placer(steady("a"))
	w.beat("w1", host(1000, 1000*gib, 0))
	w.posts(0, 100)
	w.allPlaced(0, 100, 1)
	var work sync.WaitGroup
	work.Go(func() { w.posts(100, 600) })
	eventually(t, "placing is under way", func() bool { return len(w.ordersOf(taskID(120))) > 0 })
	natstest.Restart(t, w.server)
	work.Wait()
	for n := 100; n < 600; n++ {
		eventually(t, fmt.Sprintf("task %d is assigned", n), func() bool {
			e, err := w.tasks.Get(t.Context(), string(taskID(n)))
			return err == nil && e.Value.State == schemas.Assigned && e.Value.Attempt == 1
		})
	}
	w.posts(600, 700)
	w.allPlaced(600, 700, 1)
}

func TestDrainedWorkersTakeNothingNew(t *testing.T) {
	w := newWorld(t)
	drains := bus.NewTable(w.conn, schemas.BucketDrains, bus.JSON[schemas.Drain](nil))
	d, err := drains.Create(t.Context(), "w1", schemas.Drain{Since: time.Now(), By: "test"}, "")
	if err != nil {
		t.Fatal(err)
	}
	w.placer(steady("a"))
	w.beat("w1", host(4, 8*gib, 0))
	w.post(1, nil)
	var why schemas.Why
	eventually(t, "it waits because the worker is draining", func() bool {
		m, err := w.conn.NC.Request(schemas.PlacerWhySubject, []byte(taskID(1)), time.Second)
		return err == nil && schemas.Decode(m.Data, &why) == nil && len(why.Workers) == 1 && why.Workers[0].Filter == "draining"
	})
	if err := drains.Delete(t.Context(), "w1", d.Revision); err != nil {
		t.Fatal(err)
	}
	w.allPlaced(1, 2, 1)
}

// Once the leader has said that a worker is drained, no task is given to it any more,
// though many wait and assignments are being written all the time.
func TestADrainThatIsAnsweredIsTrue(t *testing.T) {
	w := newWorld(t)
	w.placer(steady("a"))
	w.beat("w1", host(1000, 1000*gib, 0))
	w.beat("w2", host(1000, 1000*gib, 0))
	w.posts(0, 50)
	w.allPlaced(0, 50, 1)
	drains := bus.NewTable(w.conn, schemas.BucketDrains, bus.JSON[schemas.Drain](nil))
	stream, err := w.conn.JS.Stream(t.Context(), bus.StreamOf(schemas.BucketTasks))
	if err != nil {
		t.Fatal(err)
	}
	for round := range 5 {
		from, to := 50+300*round, 350+300*round
		var posting sync.WaitGroup
		posting.Go(func() { w.posts(from, to) })
		eventually(t, "tasks are being placed", func() bool { return len(w.ordersOf(taskID(from+50))) > 0 })
		if _, err := drains.Create(t.Context(), "w1", schemas.Drain{Since: time.Now(), By: "test"}, ""); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the leader answers", func() bool { // there is none between two terms
			m, err := w.conn.NC.Request(schemas.PlacerDrainedSubject, []byte("w1"), 5*time.Second)
			return err == nil && string(m.Data) == "w1"
		})
		info, err := stream.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		posting.Wait()
		w.allPlaced(from, to, 2)
		for n := from; n < to; n++ {
			e, err := w.tasks.Get(t.Context(), string(taskID(n)))
			if err != nil {
				t.Fatal(err)
			}
			if e.Value.Worker == "w1" && e.Revision > info.State.LastSeq {
				t.Errorf("round %d: task %d was given to it at revision %d, after the answer at %d", round, n, e.Revision, info.State.LastSeq)
			}
		}
		d, err := drains.Get(t.Context(), "w1")
		if err == nil {
			err = drains.Delete(t.Context(), "w1", d.Revision)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func BenchmarkPlaceThroughNATS(b *testing.B) {
	for _, workers := range []int{50, 1000} {
		b.Run(fmt.Sprintf("10000 tasks/%d workers", workers), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				w := newWorld(b)
				for n := range workers - 1 {
					w.beat(schemas.WorkerID(fmt.Sprintf("w%d", n)), host(1000, 1000*gib, 0))
				}
				const tasks = 10_000
				w.posts(0, tasks)
				r := w.placer(steady("a"))
				eventually(b, "the placer leads", r.leads)
				b.StartTimer()
				start := time.Now()
				eventually(b, "all are placed", func() bool {
					w.mu.Lock()
					defer w.mu.Unlock()
					return len(w.orders) == tasks
				})
				b.ReportMetric(tasks/time.Since(start).Seconds(), "tasks/s")
				b.StopTimer()
				r.stop()
				b.StartTimer()
			}
		})
	}
}

// BenchmarkOneByOne is the way of a single task: from its record's creation to its
// order, with nothing else going on.
func BenchmarkOneByOne(b *testing.B) {
	for _, workers := range []int{50, 1000} {
		b.Run(fmt.Sprintf("%d workers", workers), func(b *testing.B) {
			w := newWorld(b)
			for n := range workers - 1 {
				w.beat(schemas.WorkerID(fmt.Sprintf("w%d", n)), host(1000, 1000*gib, 0))
			}
			r := w.placer(steady("a"))
			eventually(b, "the placer leads", r.leads)
			ordered := make(chan struct{}, 1)
			if _, err := w.conn.NC.Subscribe("dayfly.work.>", func(*nats.Msg) { ordered <- struct{}{} }); err != nil {
				b.Fatal(err)
			}
			if err := w.conn.NC.Flush(); err != nil {
				b.Fatal(err)
			}
			var took []time.Duration
			n := 0
			for b.Loop() {
				start := time.Now()
				w.post(n, nil)
				<-ordered
				took = append(took, time.Since(start))
				n++
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-us")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
		})
	}
}
