package reaper_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/reaper"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const worker schemas.WorkerID = "w1"

// bench is reapers on a real NATS server; the test plays gateway, placer and agent.
type bench struct {
	t      *testing.T
	server *natsd.Server
	core   *bus.Conn
	table  *bus.Table[schemas.Record]
	beats  *bus.Table[schemas.Beat]
	view   *bus.View[schemas.Record]
	cfg    reaper.Config

	mu     sync.Mutex
	orders []schemas.Order // under mu: all that were published
	news   chan struct{}   // under mu: closed at the next
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, server: natstest.Server(t), cfg: reaper.DefaultConfig()}
	b.core = natstest.Connect(t, b.server)
	if err := bus.Provision(t.Context(), b.core, schemas.Assets(time.Hour), 1); err != nil {
		t.Fatal(err)
	}
	b.table = bus.NewTable(b.core, schemas.BucketTasks, bus.JSON(schemas.Record.Wrote))
	b.beats = bus.NewTable(b.core, schemas.BucketWorkers, bus.JSON[schemas.Beat](nil))
	b.view = bus.NewView(b.core, schemas.BucketTasks, func(_ string, _ nats.Header, data []byte) (r schemas.Record, err error) {
		return r, schemas.Decode(data, &r)
	}, bus.ViewOptions[schemas.Record]{})
	b.background(b.view.Run)
	b.news = make(chan struct{})
	// A work queue cannot be read beside its consumer: listen to what is published.
	sub, err := b.core.NC.Subscribe(schemas.OrderSubject(worker, "*"), func(m *nats.Msg) {
		var o schemas.Order
		if err := schemas.Decode(m.Data, &o); err != nil {
			t.Error(err)
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		b.orders = append(b.orders, o)
		close(b.news)
		b.news = make(chan struct{})
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	b.cfg.Fence, b.cfg.Redrive = 400*time.Millisecond, 500*time.Millisecond
	return b
}

func (b *bench) background(fn func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := fn(ctx); err != nil {
			b.t.Error(err)
		}
	})
	b.t.Cleanup(func() { cancel(); wg.Wait() })
}

func (b *bench) start() {
	conn := natstest.Connect(b.t, b.server)
	b.background(func(ctx context.Context) error {
		return reaper.Run(ctx, reaper.Deps{Conn: conn, Logger: zerolog.Nop()}, b.cfg)
	})
}

func (b *bench) ctx() context.Context {
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	b.t.Cleanup(cancel)
	return ctx
}

func meta() schemas.Meta { return schemas.Meta{At: time.Now().UTC(), By: "test", Op: rand.Text()} }

// accept makes a queued record.
func (b *bench) accept(change func(*schemas.Spec)) schemas.TaskID {
	b.t.Helper()
	id, err := schemas.NewTaskID(time.Now(), rand.Reader)
	if err != nil {
		b.t.Fatal(err)
	}
	spec := schemas.DefaultSpec()
	spec.Image, spec.OnLost = "busybox", schemas.OnLostRequeue
	if change != nil {
		change(&spec)
	}
	m := meta()
	if _, err := b.table.Create(b.ctx(), string(id), schemas.NewRecord(id, spec, schemas.DefaultPolicy(), m), m.Op); err != nil {
		b.t.Fatal(err)
	}
	return id
}

// next applies an event to a record, as another service would.
func (b *bench) next(id schemas.TaskID, event func(schemas.Meta) schemas.Event) schemas.Record {
	b.t.Helper()
	m := meta()
	e, err := b.table.Update(b.ctx(), string(id), m.Op, func(e bus.Entry[schemas.Record]) (schemas.Record, []bus.WriteOption, error) {
		n, err := schemas.Next(e.Value, event(m))
		return n, nil, err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return e.Value
}

func (b *bench) assign(id schemas.TaskID, epoch schemas.Epoch) schemas.Assignment {
	b.t.Helper()
	r := b.next(id, func(m schemas.Meta) schemas.Event { return schemas.Choose{Meta: m, Worker: worker, Epoch: epoch} })
	return r.Assignment()
}

func (b *bench) report(r schemas.Report) {
	b.t.Helper()
	body, err := schemas.Encode(r)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.core.Publish(b.ctx(), schemas.ReportSubject(worker, r.Task), nil, body); err != nil {
		b.t.Fatal(err)
	}
}

// beat writes a worker's heartbeat over whatever stands there.
func (b *bench) beat(change func(*schemas.Beat)) {
	b.t.Helper()
	v := schemas.Beat{Worker: worker, Epoch: "e1", Instance: rand.Text(), Reported: true}
	change(&v)
	e, err := b.beats.Get(b.ctx(), string(worker))
	if err != nil {
		_, err = b.beats.Create(b.ctx(), string(worker), v, "")
	} else {
		_, err = b.beats.Replace(b.ctx(), e, v, "")
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) wait(id schemas.TaskID, what string, ok func(schemas.Record) bool) schemas.Record {
	b.t.Helper()
	var last schemas.Record
	if err := b.view.Wait(b.ctx(), string(id), func(r schemas.Record, _ uint64, _ bool) bool {
		last = r
		return ok(r)
	}); err != nil {
		b.t.Fatalf("%s never came: %v; the record: state %s reason %s %+v", what, err, last.State, last.Reason, last.History)
	}
	return last
}

func (b *bench) state(id schemas.TaskID, s schemas.State) schemas.Record {
	b.t.Helper()
	return b.wait(id, string(s), func(r schemas.Record) bool { return r.State == s })
}

// order waits for an order that ok accepts.
func (b *bench) order(id schemas.TaskID, ok func(schemas.Order) bool) schemas.Order {
	b.t.Helper()
	ctx := b.ctx()
	for {
		b.mu.Lock()
		news, list := b.news, b.orders
		b.mu.Unlock()
		for _, o := range list {
			if o.Task == id && ok(o) {
				return o
			}
		}
		select {
		case <-news:
		case <-ctx.Done():
			b.t.Fatalf("no such order for %s; seen: %+v", id, list)
		}
	}
}

func ended(a schemas.Assignment, by schemas.EndedBy, code int) schemas.Report {
	return schemas.Report{Assignment: a, Phase: schemas.PhaseEnded, Ran: true, End: &schemas.End{By: by, Exit: &schemas.Exit{Code: code}}}
}

func TestReportsMoveATaskToItsEndAndCloseIt(t *testing.T) {
	b := newBench(t)
	b.cfg.Fence = time.Hour // no worker beats here
	b.start()
	id := b.accept(nil)
	a := b.assign(id, "e1")
	b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseAccepted, Progress: "pulling"})
	b.state(id, schemas.Starting)
	b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true, RanFor: schemas.Duration(time.Millisecond)})
	if r := b.state(id, schemas.Running); r.ExpiresAt.IsZero() {
		t.Error("no deadline")
	}
	b.report(ended(a, schemas.EndedItself, 7))
	if r := b.state(id, schemas.Failed); r.Exit.Code != 7 || r.Reason != schemas.ReasonExit {
		t.Errorf("exit %+v reason %s", r.Exit, r.Reason)
	}
	b.order(id, func(o schemas.Order) bool { return o.Want == schemas.WantClose && o.Assignment == a })
}

func TestAStaleReportIsClosedAndChangesNothing(t *testing.T) {
	b := newBench(t)
	b.cfg.Fence = time.Hour // no worker beats here
	b.start()
	id := b.accept(nil)
	old := b.assign(id, "e1")
	b.next(id, func(m schemas.Meta) schemas.Event { return schemas.Lose{Meta: m, Worker: worker, Epoch: "e1"} })
	now := b.assign(id, "e2")
	b.report(ended(old, schemas.EndedItself, 0))
	// The order of the attempt that the worker holds now says it; a close of the old one
	// would take its place.
	b.order(id, func(o schemas.Order) bool { return o.Want == schemas.WantRun && o.Assignment == now })
	b.report(ended(now, schemas.EndedItself, 3))
	if r := b.state(id, schemas.Failed); r.Attempt != 2 || r.Exit.Code != 3 {
		t.Errorf("attempt %d exit %+v", r.Attempt, r.Exit)
	}
	b.report(ended(old, schemas.EndedItself, 0))
	b.order(id, func(o schemas.Order) bool { return o.Want == schemas.WantClose && o.Assignment == old })
}

func TestATaskOfAWorkerThatNobodyKnowsIsLostAfterAFence(t *testing.T) {
	b := newBench(t)
	id := b.accept(nil)
	a := b.assign(id, "e1")
	b.start()
	b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true})
	r := b.wait(id, "queued again", func(r schemas.Record) bool { return r.State == schemas.Queued && r.Attempt > 0 })
	if r.Reason != schemas.ReasonWorkerLost {
		t.Errorf("reason %s", r.Reason)
	}
}

func TestAWorkerCannotSpeakForAnother(t *testing.T) {
	b := newBench(t)
	b.start()
	id := b.accept(nil)
	a := b.assign(id, "e1")
	forged := ended(a, schemas.EndedItself, 0)
	body, _ := schemas.Encode(forged)
	if _, err := b.core.Publish(b.ctx(), schemas.ReportSubject("w2", id), nil, body); err != nil {
		t.Fatal(err)
	}
	b.report(ended(a, schemas.EndedItself, 9))
	if r := b.state(id, schemas.Failed); r.Exit.Code != 9 {
		t.Errorf("exit %+v, want that of the worker's own report", r.Exit)
	}
}

// Reports that no record explains are tried again for a while, and wait in the same line as
// those of all workers.
// A report whose task is no task's id is refused: read as a key a wildcard would be any
// record, and one that cannot be read would be tried again for ever.
func TestAReportOfNoTaskIsRefused(t *testing.T) {
	b := newBench(t)
	b.cfg.Unknown = time.Nanosecond // else they would be tried again for a minute
	id := b.accept(nil)
	a := b.assign(id, "e1")
	b.start()
	for _, odd := range []schemas.TaskID{"*", ">", "a\x7fb", "t-1"} {
		a := a
		a.Task = odd
		b.report(ended(a, schemas.EndedItself, 0))
	}
	b.report(ended(a, schemas.EndedItself, 0))
	b.state(id, schemas.Completed)
	ctx := b.ctx()
	for {
		c, err := b.core.JS.Consumer(ctx, schemas.StreamReports, "reaper")
		if err != nil {
			t.Fatal(err)
		}
		if i := c.CachedInfo(); i.NumPending == 0 && i.NumAckPending == 0 {
			break
		} else if i.NumRedelivered > 0 {
			t.Fatalf("tried again: %+v", i)
		}
		select {
		case <-ctx.Done():
			t.Fatal("reports wait")
		case <-time.After(5 * time.Millisecond):
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, o := range b.orders {
		if o.Task != id {
			t.Errorf("an order came of it: %+v", o)
		}
	}
}

func TestAWorkerThatMakesTasksUpDoesNotStopTheOthers(t *testing.T) {
	b := newBench(t)
	b.cfg.Fence = time.Hour // no worker beats here
	b.start()
	for range 4500 { // more than are under way at a time
		id, err := schemas.NewTaskID(time.Now(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		body, err := schemas.Encode(schemas.Report{Assignment: schemas.Assignment{Task: id, Attempt: 1, Worker: "w2", Epoch: "e1"}, Phase: schemas.PhaseRunning})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.core.NC.Publish(schemas.ReportSubject("w2", id), body); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.core.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	id := b.accept(nil)
	b.report(ended(b.assign(id, "e1"), schemas.EndedItself, 0))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // each of the others is looked up first
	defer cancel()
	if err := b.view.Wait(ctx, string(id), func(r schemas.Record, _ uint64, _ bool) bool { return r.State == schemas.Completed }); err != nil {
		t.Error(err)
	}
}

func TestTwoReapersSettleEachReportOnce(t *testing.T) {
	b := newBench(t)
	b.cfg.Fence = time.Hour // no worker beats here
	b.start()
	b.start()
	var ids []schemas.TaskID
	for range 50 {
		id := b.accept(nil)
		a := b.assign(id, "e1")
		for range 3 {
			b.report(ended(a, schemas.EndedItself, 0))
		}
		ids = append(ids, id)
	}
	for _, id := range ids {
		if r := b.state(id, schemas.Completed); len(r.History) != 3 {
			t.Errorf("history %+v", r.History)
		}
	}
}

func TestAQueuedTaskFailsWhenItsQueueTimeoutIsOver(t *testing.T) {
	b := newBench(t)
	b.start()
	id := b.accept(func(s *schemas.Spec) { s.Timeouts.Queue = schemas.Duration(time.Second) })
	if r := b.state(id, schemas.Failed); r.Reason != schemas.ReasonQueueTimeout {
		t.Errorf("reason %s", r.Reason)
	}
}

func TestALargeRecordIsSettledAndEndedAfterItsBytesWereGivenUp(t *testing.T) {
	b := newBench(t)
	b.cfg.Fence = time.Hour
	b.start()
	text := strings.Repeat("x", 20<<10)
	large := func(s *schemas.Spec) { s.Stdin = text }
	queued := b.accept(func(s *schemas.Spec) { large(s); s.Timeouts.Queue = schemas.Duration(1500 * time.Millisecond) })
	a := b.assign(b.accept(large), "e1")
	b.order(a.Task, func(o schemas.Order) bool { return o.Want == schemas.WantRun && o.Spec.Stdin == text }) // again, from the bucket
	b.state(queued, schemas.Failed)
	b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true})
	b.state(a.Task, schemas.Running)
	b.report(ended(a, schemas.EndedItself, 0))
	if r := b.state(a.Task, schemas.Completed); r.Spec.Stdin != text {
		t.Error("the spec has changed")
	}
}

func TestAnAssignedTaskWithoutReportIsOrderedAgain(t *testing.T) {
	b := newBench(t)
	b.start()
	id := b.accept(nil)
	a := b.assign(id, "e1")
	o := b.order(id, func(o schemas.Order) bool { return o.Want == schemas.WantRun && o.Assignment == a })
	if o.Spec == nil || o.TimeLeft.Std() != time.Hour || o.Counting {
		t.Errorf("order %+v", o)
	}
}

func TestARestartOfWhichNothingCameIsOrderedAgain(t *testing.T) {
	b := newBench(t)
	b.start()
	id := b.accept(nil)
	a := b.assign(id, "e1")
	b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true})
	b.state(id, schemas.Running)
	b.next(id, func(m schemas.Meta) schemas.Event { return schemas.AskRestart{Meta: m} })
	for range 2 {
		b.order(id, func(o schemas.Order) bool { return o.Want == schemas.WantRun && o.RestartTo == 1 })
		b.mu.Lock()
		b.orders = nil
		b.mu.Unlock()
	}
	b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true, Restarts: 1})
	b.wait(id, "it was restarted", func(r schemas.Record) bool { return r.Restarts == 1 })
}

func TestACanceledOrOverdueTaskIsStoppedFromHere(t *testing.T) {
	b := newBench(t)
	b.cfg.Overdue = 0
	b.start()
	canceled, overdue := b.accept(nil), b.accept(func(s *schemas.Spec) {
		s.TTL, s.Timeouts.Stop = schemas.Duration(time.Second), 0
	})
	a, o := b.assign(canceled, "e1"), b.assign(overdue, "e1")
	b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true})
	b.report(schemas.Report{Assignment: o, Phase: schemas.PhaseRunning, Ran: true})
	b.state(canceled, schemas.Running)
	b.state(overdue, schemas.Running)
	b.next(canceled, func(m schemas.Meta) schemas.Event {
		return schemas.AskCancel{Meta: m, Grace: schemas.Duration(time.Millisecond)}
	})
	b.order(canceled, func(o schemas.Order) bool {
		return o.Want == schemas.WantStop && o.Grace == schemas.Duration(time.Millisecond)
	})
	b.order(overdue, func(o schemas.Order) bool { return o.Want == schemas.WantStop })
	b.report(ended(a, schemas.EndedStop, 143))
	b.report(ended(o, schemas.EndedStop, 143))
	b.state(canceled, schemas.Canceled)
	b.state(overdue, schemas.Expired)
}

func TestASilentWorkerIsLostAfterAFenceAndItsTaskGoesOn(t *testing.T) {
	b := newBench(t)
	b.cfg.Fence = 2 * time.Second
	b.beat(func(v *schemas.Beat) {})
	b.start()
	id, fail, wait := b.accept(nil), b.accept(func(s *schemas.Spec) { s.OnLost = schemas.OnLostFail }), b.accept(func(s *schemas.Spec) { s.OnLost = schemas.OnLostWait })
	for _, id := range []schemas.TaskID{id, fail, wait} {
		a := b.assign(id, "e1")
		b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true})
		b.state(id, schemas.Running)
		b.beat(func(v *schemas.Beat) {})
	}
	if r := b.state(id, schemas.Queued); r.Reason != schemas.ReasonWorkerLost || r.Attempt != 1 {
		t.Errorf("record %+v", r)
	}
	if r := b.state(fail, schemas.Failed); r.Reason != schemas.ReasonWorkerLost {
		t.Errorf("reason %s", r.Reason)
	}
	r := b.wait(wait, "the mark that its worker is away", func(r schemas.Record) bool { return !r.WorkerLostAt.IsZero() })
	if r.State != schemas.Running {
		t.Errorf("state %s", r.State)
	}
	if beat, err := b.beats.Get(b.ctx(), string(worker)); err != nil || !beat.Value.Lost() {
		t.Errorf("the verdict does not stand: %+v %v", beat.Value, err)
	}
}

func TestAWorkerThatBeatsIsNotLost(t *testing.T) {
	b := newBench(t)
	b.cfg.Fence = time.Second
	b.beat(func(v *schemas.Beat) {})
	b.start()
	id := b.accept(nil)
	a := b.assign(id, "e1")
	b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true})
	b.state(id, schemas.Running)
	for end := time.Now().Add(4 * b.cfg.Fence); time.Now().Before(end); { // beats are what is tested
		b.beat(func(v *schemas.Beat) {})
		<-time.After(b.cfg.Fence / 6)
	}
	if e, err := b.table.Get(b.ctx(), string(id)); err != nil || e.Value.State != schemas.Running {
		t.Errorf("state %s (%v)", e.Value.State, err)
	}
}

func TestATaskOfAFormerEpochIsLostUnlessItsWorkerKeptIt(t *testing.T) {
	b := newBench(t)
	b.cfg.Fence = time.Hour
	b.beat(func(v *schemas.Beat) { v.Epoch = "e1" })
	b.start()
	wait := func(s *schemas.Spec) { s.OnLost = schemas.OnLostWait }
	plain, kept, gone := b.accept(nil), b.accept(wait), b.accept(wait)
	for _, id := range []schemas.TaskID{plain, kept, gone} {
		a := b.assign(id, "e1")
		b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true})
		b.state(id, schemas.Running)
	}
	b.beat(func(v *schemas.Beat) { v.Epoch, v.Reported, v.Kept = "e2", false, []schemas.TaskID{kept} })
	b.state(plain, schemas.Queued)
	b.wait(gone, "the mark that its worker is away", func(r schemas.Record) bool { return !r.WorkerLostAt.IsZero() })
	b.beat(func(v *schemas.Beat) { v.Epoch, v.Kept = "e2", []schemas.TaskID{kept} })
	if r := b.state(gone, schemas.Failed); r.Reason != schemas.ReasonWorkerLost {
		t.Errorf("reason %s", r.Reason)
	}
	b.report(ended(schemas.Assignment{Task: kept, Attempt: 1, Worker: worker, Epoch: "e1"}, schemas.EndedItself, 0))
	b.state(kept, schemas.Completed)
}

func TestAReaperWithAnOldViewTakesNothingFromANewRegistration(t *testing.T) {
	b := newBench(t)
	b.cfg.Fence = time.Hour
	b.beat(func(v *schemas.Beat) { v.Epoch = "e1" }) // the newest that the reaper can see
	b.start()
	id, other := b.accept(nil), b.accept(func(s *schemas.Spec) { s.Timeouts.Queue = schemas.Duration(time.Second) })
	a := b.assign(id, "e2")
	b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true})
	b.state(id, schemas.Running)
	b.state(other, schemas.Failed) // by then the reaper has looked at both
	if e, err := b.table.Get(b.ctx(), string(id)); err != nil || e.Value.State != schemas.Running {
		t.Errorf("state %s (%v)", e.Value.State, err)
	}
}

func TestReportsAreSettledAcrossARestartOfTheServer(t *testing.T) {
	b := newBench(t)
	b.start()
	id := b.accept(nil)
	a := b.assign(id, "e1")
	b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true})
	b.state(id, schemas.Running)
	natstest.Restart(t, b.server)
	b.report(ended(a, schemas.EndedItself, 0))
	b.state(id, schemas.Completed)
}

func TestUnknownFieldsOfARecordSurviveTheReaper(t *testing.T) {
	b := newBench(t)
	id := b.accept(nil)
	a := b.assign(id, "e1")
	e, err := b.table.Get(b.ctx(), string(id))
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := schemas.Encode(e.Value)
	raw = bytes.Replace(raw, []byte(`{`), []byte(`{"from_the_future":42,`), 1)
	h := nats.Header(e.Value.Headers())
	if _, err := b.core.Publish(b.ctx(), "$KV.tasks."+string(id), h, raw); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.report(ended(a, schemas.EndedItself, 0))
	b.state(id, schemas.Completed)
	e, err = b.table.Get(b.ctx(), string(id))
	if err != nil {
		t.Fatal(err)
	}
	if now, _ := schemas.Encode(e.Value); !bytes.Contains(now, []byte(`"from_the_future":42`)) {
		t.Errorf("the field is gone: %s", now)
	}
}

func TestAKeptTaskIsNoLongerMarkedAsAway(t *testing.T) {
	b := newBench(t)
	b.cfg.Fence = time.Hour
	b.beat(func(v *schemas.Beat) { v.Epoch = "e1" })
	b.start()
	id := b.accept(func(s *schemas.Spec) { s.OnLost = schemas.OnLostWait })
	a := b.assign(id, "e1")
	report := schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true}
	b.report(report)
	b.state(id, schemas.Running)
	lost := func(m schemas.Meta) schemas.Event { return schemas.Lose{Meta: m, Worker: worker, Epoch: "e1"} }
	back := func(r schemas.Record) bool { return r.WorkerLostAt.IsZero() }
	b.next(id, lost)
	b.wait(id, "the mark", func(r schemas.Record) bool { return !back(r) })
	b.beat(func(v *schemas.Beat) { v.Epoch, v.Reported, v.Kept = "e2", false, []schemas.TaskID{id} })
	// A reaper whose view has not seen the mark yet finds nothing new in the report; the
	// worker repeats it when its order comes again.
	for patience := b.ctx(); patience.Err() == nil; {
		b.report(report)
		if r, _, _ := b.view.Get(string(id)); back(r) {
			break
		}
	}
	b.wait(id, "the end of the mark", back)

	other := b.accept(func(s *schemas.Spec) { s.Timeouts.Queue = schemas.Duration(time.Second) })
	b.state(other, schemas.Failed) // by then the reaper has looked at the other too
	if e, err := b.table.Get(b.ctx(), string(id)); err != nil || !back(e.Value) {
		t.Errorf("marked again, though its worker says that it keeps it: %+v (%v)", e.Value.History, err)
	}

	b.next(id, lost) // by a reaper that has not seen the beat yet
	b.order(id, func(o schemas.Order) bool { return o.Want == schemas.WantRun && o.Assignment == a })
}

func TestAReportThatNoRecordExplainsIsClosedThoughItIsRepeated(t *testing.T) {
	b := newBench(t)
	b.cfg.Unknown = 2 * time.Second
	b.start()
	id, err := schemas.NewTaskID(time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := schemas.Assignment{Task: id, Attempt: 1, Worker: worker, Epoch: "e1"}
	b.background(func(ctx context.Context) error { // each repetition replaces the one before
		body, err := schemas.Encode(ended(a, schemas.EndedItself, 0))
		for tick := time.NewTicker(300 * time.Millisecond); err == nil; {
			_, err = b.core.Publish(ctx, schemas.ReportSubject(worker, id), nil, body)
			select {
			case <-tick.C:
			case <-ctx.Done():
				return nil
			}
		}
		return err
	})
	b.order(id, func(o schemas.Order) bool { return o.Want == schemas.WantClose && o.Assignment == a })
}

func TestARecordWithoutHistoryStopsNoReaper(t *testing.T) {
	b := newBench(t)
	b.start()
	id := b.accept(nil)
	m := meta()
	if _, err := b.table.Update(b.ctx(), string(id), m.Op, func(e bus.Entry[schemas.Record]) (schemas.Record, []bus.WriteOption, error) {
		n, err := schemas.Next(e.Value, schemas.Choose{Meta: m, Worker: worker, Epoch: "e1"})
		n.History = nil
		return n, nil, err
	}); err != nil {
		t.Fatal(err)
	}
	b.order(id, func(o schemas.Order) bool { return o.Want == schemas.WantRun })
}

// Of the orders of one task NATS keeps the one that came last, which is not always the
// newest. The report that answers it says what its worker has not heard of.
func TestWhatAWorkerHasNotHeardOfIsSaidAgainAtOnce(t *testing.T) {
	b := newBench(t)
	b.cfg.Redrive = time.Hour
	b.start()
	extended, canceled := b.accept(nil), b.accept(nil)
	assigned := map[schemas.TaskID]schemas.Assignment{}
	for _, id := range []schemas.TaskID{extended, canceled} {
		assigned[id] = b.assign(id, "e1")
		b.report(schemas.Report{Assignment: assigned[id], Phase: schemas.PhaseRunning, Ran: true})
		b.state(id, schemas.Running)
	}
	extend := func(m schemas.Meta) schemas.Event {
		return schemas.AskExtend{Meta: m, TTL: schemas.Duration(2 * time.Hour)}
	}
	b.next(extended, extend)
	b.next(extended, extend)
	b.next(canceled, extend)
	b.next(canceled, func(m schemas.Meta) schemas.Event { return schemas.AskCancel{Meta: m} })
	b.report(schemas.Report{Assignment: assigned[extended], Phase: schemas.PhaseRunning, Ran: true, Applied: 1})
	b.report(schemas.Report{Assignment: assigned[canceled], Phase: schemas.PhaseRunning, Ran: true, Applied: 1})
	if o := b.order(extended, func(o schemas.Order) bool { return o.Extensions == 2 }); o.Want != schemas.WantRun || !o.Counting {
		t.Errorf("order %+v", o)
	}
	b.order(canceled, func(o schemas.Order) bool { return o.Want == schemas.WantStop })
	b.report(schemas.Report{Assignment: assigned[extended], Phase: schemas.PhaseRunning, Ran: true, Applied: 2})
	b.wait(extended, "applied", func(r schemas.Record) bool { return r.Applied == r.Extensions })
}

// A worker counts from the start of the process or from when its order came, and the
// record from when the report came: where a deadline was promised, both shall mean the same.
func TestAWorkerHearsTheDeadlineThatTheRecordShows(t *testing.T) {
	b := newBench(t)
	b.cfg.Redrive = time.Hour
	b.start()
	plain, lengthened := b.accept(nil), b.accept(nil)
	b.next(lengthened, func(m schemas.Meta) schemas.Event {
		return schemas.AskExtend{Meta: m, TTL: schemas.Duration(2 * time.Hour)}
	})
	run := func(id schemas.TaskID, applied int) schemas.Assignment {
		t.Helper()
		a := b.assign(id, "e1")
		b.report(schemas.Report{Assignment: a, Phase: schemas.PhaseRunning, Ran: true, Applied: applied})
		b.state(id, schemas.Running)
		return a
	}
	run(lengthened, 1)
	o := b.order(lengthened, func(o schemas.Order) bool { return o.Counting })
	if o.Extensions != 2 || o.TimeLeft.Std() > 2*time.Hour || o.TimeLeft.Std() < 2*time.Hour-20*time.Second {
		t.Errorf("order %+v", o)
	}
	first := run(plain, 0)
	b.report(ended(first, schemas.EndedLost, 137))
	b.state(plain, schemas.Queued)
	second := run(plain, 0)
	if o := b.order(plain, func(o schemas.Order) bool { return o.Assignment == second && o.Extensions == 1 }); !o.Counting {
		t.Errorf("order %+v", o)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, o := range b.orders {
		if o.Assignment == first && o.Want == schemas.WantRun {
			t.Errorf("needless order %+v", o)
		}
	}
}
