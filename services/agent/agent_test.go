package agent_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
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
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/fakeruntime"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const worker schemas.WorkerID = "w1"

// bench is one agent on a real NATS server, and the other side of its messages.
type bench struct {
	t      *testing.T
	server *natsd.Server
	core   *bus.Conn
	rt     *fakeruntime.Runtime
	over   agent.Runtime // what the agent gets instead of rt; nil is rt itself
	beats  *bus.View[schemas.Beat]
	cfg    agent.Config

	mu      sync.Mutex
	reports map[schemas.TaskID][]schemas.Report // under mu: in their order
	news    chan struct{}                       // under mu: closed at the next report

	stop  context.CancelCauseFunc
	conn  *bus.Conn // of the agent that was started last
	ended chan error
	rev   uint64
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, server: natstest.Server(t), rt: fakeruntime.New(fakeruntime.Config{}),
		reports: map[schemas.TaskID][]schemas.Report{}, news: make(chan struct{})}
	t.Cleanup(func() { _ = b.rt.Close() })
	b.core = natstest.Connect(t, b.server)
	if err := bus.Provision(t.Context(), b.core, schemas.Assets(time.Hour), 1); err != nil {
		t.Fatal(err)
	}
	if err := b.core.EnsureConsumer(t.Context(), bus.ConsumerSpec{Stream: schemas.WorkStream(worker), Durable: schemas.WorkConsumer(worker),
		Filter: schemas.OrderSubject(worker, "*"), AckWait: 30 * time.Second, MaxAckPending: -1}); err != nil {
		t.Fatal(err)
	}
	b.cfg = agent.DefaultConfig(worker, t.TempDir())
	b.cfg.Beat, b.cfg.Lease = 50*time.Millisecond, 20*time.Second // a busy machine ends no task
	b.cfg.Linger = 0                                              // nobody closes what ended, unless a test does
	b.beats = bus.NewView(b.core, schemas.BucketWorkers, func(_ string, _ nats.Header, data []byte) (v schemas.Beat, err error) {
		return v, schemas.Decode(data, &v)
	}, bus.ViewOptions[schemas.Beat]{})
	b.background(b.beats.Run)
	b.background(func(ctx context.Context) error {
		return b.core.Read(ctx, bus.ReadOptions{Stream: schemas.StreamReports, Filter: schemas.ReportSubject(worker, "*"), Follow: true}, func(m bus.Msg) error {
			var r schemas.Report
			if err := schemas.Decode(m.Data, &r); err != nil {
				return err
			}
			b.mu.Lock()
			defer b.mu.Unlock()
			b.reports[r.Task] = append(b.reports[r.Task], r)
			close(b.news)
			b.news = make(chan struct{})
			return nil
		})
	})
	return b
}

func (b *bench) background(fn func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = fn(ctx) })
	b.t.Cleanup(func() { cancel(); wg.Wait() })
}

// start starts the agent; halt ends it as SIGTERM does.
func (b *bench) start() {
	b.t.Helper()
	b.conn = natstest.ConnectAgent(b.t, b.server, worker)
	conn := b.conn
	var rt agent.Runtime = b.rt
	if b.over != nil {
		rt = b.over
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	b.stop, b.ended = cancel, make(chan error, 1)
	go func() {
		b.ended <- agent.Run(ctx, agent.Deps{Conn: conn, Runtime: rt, Logger: zerolog.New(zerolog.NewTestWriter(b.t)).Level(zerolog.WarnLevel)}, b.cfg)
	}()
	b.t.Cleanup(func() { b.halt() })
}

func (b *bench) halt() error {
	if b.stop == nil {
		return nil
	}
	b.stop(nil)
	b.stop = nil
	return <-b.ended
}

func (b *bench) context() context.Context {
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	b.t.Cleanup(cancel)
	return ctx
}

// registered waits for a beat that is not lost and of another epoch than not.
func (b *bench) registered(not schemas.Epoch) schemas.Beat {
	b.t.Helper()
	var beat schemas.Beat
	err := b.beats.Wait(b.context(), string(worker), func(v schemas.Beat, _ uint64, ok bool) bool {
		beat = v
		return ok && !v.Lost() && v.Epoch != not
	})
	if err != nil {
		b.t.Fatal("no beat: ", err)
	}
	return beat
}

func (b *bench) order(o schemas.Order) {
	b.t.Helper()
	b.rev++
	o.Revision = b.rev
	body, err := schemas.Encode(o)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.core.Publish(b.context(), schemas.OrderSubject(o.Worker, o.Task), nil, body); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) run(a schemas.Assignment, command ...string) {
	b.t.Helper()
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command, spec.OnLost = "fake", command, schemas.OnLostRequeue
	b.order(schemas.Order{Assignment: a, Want: schemas.WantRun, Spec: &spec, TimeLeft: spec.TTL})
}

// report waits for a report of the attempt that content accepts.
func (b *bench) report(a schemas.Assignment, accept func(schemas.Report) bool) schemas.Report {
	b.t.Helper()
	ctx := b.context()
	for {
		b.mu.Lock()
		news := b.news
		list := b.reports[a.Task]
		b.mu.Unlock()
		for _, r := range list {
			if r.Assignment == a && accept(r) {
				return r
			}
		}
		select {
		case <-news:
		case <-ctx.Done():
			b.t.Fatalf("no such report of %s; seen: %+v", a, list)
		}
	}
}

func (b *bench) end(a schemas.Assignment) schemas.Report {
	b.t.Helper()
	return b.report(a, func(r schemas.Report) bool { return r.Phase == schemas.PhaseEnded })
}

func (b *bench) until(what string, ok func() bool) {
	b.t.Helper()
	ctx := b.context()
	for !ok() {
		select {
		case <-ctx.Done():
			b.t.Fatal("never: ", what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

var taskCount int

func assignment(epoch schemas.Epoch, attempt int) schemas.Assignment {
	taskCount++
	return schemas.Assignment{Task: schemas.TaskID(fmt.Sprintf("t-%026d", taskCount)), Attempt: attempt, Worker: worker, Epoch: epoch}
}

func running(r schemas.Report) bool { return r.Phase == schemas.PhaseRunning }

func TestAShortTaskSendsItsEndUntilItIsClosed(t *testing.T) {
	b := newBench(t)
	b.cfg.HoldBack = time.Minute // however long it takes here
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "exit", "7")
	r := b.end(a)
	if r.End == nil || r.End.By != schemas.EndedItself || r.End.Exit.Code != 7 || !r.Ran {
		t.Fatalf("report %+v", r)
	}
	b.mu.Lock()
	if n := len(b.reports[a.Task]); n != 1 {
		t.Errorf("%d reports of a short task, want only the last", n)
	}
	b.mu.Unlock()
	b.order(schemas.Order{Assignment: a, Want: schemas.WantClose})
	b.until("the container is removed", func() bool { return b.rt.Live() == 0 })
}

func TestAStartedAttemptIsNeverStartedAgain(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "sleep", "1h")
	b.report(a, running)
	b.run(a, "sleep", "1h") // again: the same order under a newer revision
	b.report(a, func(r schemas.Report) bool { return running(r) && r.Revision == b.rev })
	b.order(schemas.Order{Assignment: a, Want: schemas.WantStop})
	if r := b.end(a); r.End.By != schemas.EndedStop {
		t.Errorf("ended by %s", r.End.By)
	}
	b.order(schemas.Order{Assignment: a, Want: schemas.WantClose})
	b.until("removed", func() bool { return b.rt.Live() == 0 })
	b.run(a, "sleep", "1h") // after it was closed
	b.report(a, func(r schemas.Report) bool { return r.Phase == schemas.PhaseEnded && r.Revision == b.rev })
	if n := len(b.rt.Starts(a.Task)); n != 1 {
		t.Errorf("started %d times", n)
	}
}

func TestAStopThatComesFirstKeepsTheTaskFromStarting(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.order(schemas.Order{Assignment: a, Want: schemas.WantStop})
	if r := b.end(a); r.End.By != schemas.EndedGaveBack || r.Ran {
		t.Errorf("report %+v", r)
	}
	b.rev -= 2 // a run order of before, delivered late
	b.run(a, "sleep", "1h")
	next := assignment(a.Epoch, 1)
	b.run(next, "exit", "0") // comes after it
	b.end(next)
	if n := len(b.rt.Starts(a.Task)); n != 0 {
		t.Errorf("started %d times", n)
	}
}

func TestALaterAttemptReplacesAnEarlierOneOnlyWhenThatIsDead(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "sleep", "1h")
	b.report(a, running)
	second := a
	second.Attempt = 2
	b.run(second, "sleep", "1h")
	b.report(second, running)
	b.until("only one is left", func() bool { return b.rt.Live() == 1 })
	b.run(a, "sleep", "1h") // an old order
	if starts := b.rt.Starts(a.Task); len(starts) != 2 {
		t.Errorf("starts %v", starts)
	}
}

func TestOrdersOfAnotherEpochAreIgnored(t *testing.T) {
	b := newBench(t)
	b.start()
	epoch := b.registered("").Epoch
	old := assignment("e0000000000001-old", 1)
	b.run(old, "exit", "0")
	a := assignment(epoch, 1)
	b.run(a, "exit", "0")
	b.end(a)
	if n := len(b.rt.Starts(old.Task)); n != 0 {
		t.Error("an order of another epoch was carried out")
	}
}

func TestARestartedAgentTakesItsTasksBack(t *testing.T) {
	b := newBench(t)
	b.start()
	first := b.registered("")
	a, c := assignment(first.Epoch, 1), assignment(first.Epoch, 1)
	b.run(a, "sleep", "1h")
	b.run(c, "log", "300000", "1h")
	b.report(a, running)
	b.report(c, running)
	if err := b.halt(); err != nil {
		t.Fatal(err)
	}
	if n := b.rt.Live(); n != 2 {
		t.Fatalf("%d attempts live after the agent ended, want 2", n)
	}
	b.start()
	b.beats.Wait(b.context(), string(worker), func(v schemas.Beat, _ uint64, _ bool) bool {
		return v.Instance != first.Instance && v.Reported
	})
	if beat := b.registered(""); beat.Epoch != first.Epoch {
		t.Errorf("epoch %s, want that of before, %s", beat.Epoch, first.Epoch)
	}
	b.order(schemas.Order{Assignment: a, Want: schemas.WantStop})
	b.end(a)
	b.order(schemas.Order{Assignment: c, Want: schemas.WantStop})
	r := b.end(c)
	if r.End.Logs.StdoutBytes != 300000 {
		t.Errorf("logs %+v", r.End.Logs)
	}
	if log := b.log(c); len(log) != 300000 {
		t.Errorf("%d bytes of log are stored, want 300000", len(log))
	}
	if len(b.rt.Starts(a.Task)) != 1 || len(b.rt.Starts(c.Task)) != 1 {
		t.Error("started again")
	}
}

// log joins the stored chunks of an attempt by their offsets.
func (b *bench) log(a schemas.Assignment) []byte {
	b.t.Helper()
	var log []byte
	err := b.core.Read(b.context(), bus.ReadOptions{Stream: schemas.StreamLogs, Filter: schemas.LogSubject(a.Worker, a.Task)}, func(m bus.Msg) error {
		off, err := strconv.ParseInt(m.Header.Get(schemas.HeaderOffset), 10, 64)
		if err != nil || off > int64(len(log)) {
			return fmt.Errorf("a gap: %d bytes, then a chunk at %d (%v)", len(log), off, err)
		}
		log = append(log[:off], m.Data...)
		return nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return log
}

func TestALostWorkerEndsItsTasksAndRegistersAnew(t *testing.T) {
	b := newBench(t)
	b.start()
	first := b.registered("")
	a, keep := assignment(first.Epoch, 1), assignment(first.Epoch, 1)
	b.run(a, "sleep", "1h")
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command, spec.OnLost = "fake", []string{"sleep", "1h"}, schemas.OnLostWait
	b.order(schemas.Order{Assignment: keep, Want: schemas.WantRun, Spec: &spec, TimeLeft: spec.TTL})
	b.report(a, running)
	b.report(keep, running)

	b.declareLost()
	next := b.registered(first.Epoch)
	if !first.Epoch.Before(next.Epoch) {
		t.Errorf("epoch %s does not sort after %s", next.Epoch, first.Epoch)
	}
	if n := b.rt.Live(); n != 1 {
		t.Errorf("%d attempts live, want only the one that waits for its worker", n)
	}
	if len(next.Kept) != 1 || next.Kept[0] != keep.Task {
		t.Errorf("kept %v, want %s", next.Kept, keep.Task)
	}
	b.order(schemas.Order{Assignment: keep, Want: schemas.WantStop}) // under its own, former epoch
	b.end(keep)
	late := assignment(first.Epoch, 1)
	b.run(late, "exit", "0")
	fresh := assignment(next.Epoch, 1)
	b.run(fresh, "exit", "0")
	b.end(fresh)
	if len(b.rt.Starts(late.Task)) != 0 {
		t.Error("an order for the former epoch was carried out")
	}
}

// declareLost writes the reaper's verdict.
func (b *bench) declareLost() {
	b.t.Helper()
	table := bus.NewTable(b.core, schemas.BucketWorkers, bus.Codec[schemas.Beat]{
		Encode: func(v schemas.Beat) ([]byte, nats.Header, error) {
			data, err := schemas.Encode(v)
			return data, nil, err
		},
		Decode: func(data []byte) (v schemas.Beat, err error) { return v, schemas.Decode(data, &v) },
		Wrote:  func(v schemas.Beat, _ string) bool { return v.Lost() },
	})
	_, err := table.Update(b.context(), string(worker), "lost", func(e bus.Entry[schemas.Beat]) (schemas.Beat, []bus.WriteOption, error) {
		v := e.Value
		v.LostAt = time.Now().UTC()
		return v, nil, nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

func TestASecondAgentOfTheSameNameIsRefused(t *testing.T) {
	b := newBench(t)
	b.start()
	b.registered("")
	cfg := b.cfg
	cfg.StateDir = t.TempDir()
	err := agent.Run(b.context(), agent.Deps{Conn: natstest.ConnectAgent(t, b.server, worker), Runtime: fakeruntime.New(fakeruntime.Config{}), Logger: zerolog.Nop()}, cfg)
	if !errors.Is(err, agent.ErrNameTaken) {
		t.Errorf("error %v, want ErrNameTaken", err)
	}
}

func TestWhatTheHostCannotHoldIsGivenBack(t *testing.T) {
	b := newBench(t)
	b.rt = fakeruntime.New(fakeruntime.Config{Host: schemas.Host{CPUs: 8, Memory: 1 << 30, Slots: 1, Arch: "amd64", OS: "linux"}})
	b.start()
	epoch := b.registered("").Epoch
	first, second, refused := assignment(epoch, 1), assignment(epoch, 1), assignment(epoch, 1)
	b.run(first, "sleep", "1h")
	b.report(first, running)
	b.run(second, "sleep", "1h")
	if r := b.end(second); r.End.By != schemas.EndedGaveBack || r.Ran {
		t.Errorf("report %+v", r)
	}
	b.order(schemas.Order{Assignment: first, Want: schemas.WantStop})
	b.end(first)
	b.run(refused, "refuse")
	if r := b.end(refused); r.End.By != schemas.EndedGaveBack {
		t.Errorf("report %+v", r)
	}
}

func TestATasksOwnFaultIsFinal(t *testing.T) {
	b := newBench(t)
	b.start()
	epoch := b.registered("").Epoch
	image, start := assignment(epoch, 1), assignment(epoch, 1)
	b.run(image, "fail", "image")
	if r := b.end(image); r.End.By != schemas.EndedItself || r.End.Reason != schemas.ReasonImage {
		t.Errorf("report %+v", r.End)
	}
	b.run(start, "fail", "start")
	if r := b.end(start); r.End.Reason != schemas.ReasonNotFound || r.End.Exit == nil || r.End.Exit.Code != 127 {
		t.Errorf("report %+v", r.End)
	}
}

func TestAnExtensionMovesTheDeadline(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command = "fake", []string{"sleep", "1h"}
	b.order(schemas.Order{Assignment: a, Want: schemas.WantRun, Spec: &spec, TimeLeft: schemas.Duration(time.Hour)})
	b.report(a, running)
	b.order(schemas.Order{Assignment: a, Want: schemas.WantRun, Spec: &spec, Extensions: 1, TimeLeft: schemas.Duration(50 * time.Millisecond)})
	b.report(a, func(r schemas.Report) bool { return r.Applied == 1 })
	if r := b.end(a); r.End.By != schemas.EndedDeadline {
		t.Errorf("ended by %s", r.End.By)
	}
}

func TestARestartIsCarriedOutOnceHoweverOftenItIsOrdered(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command = "fake", []string{"flaky", "0", "0", "1h"}
	o := schemas.Order{Assignment: a, Want: schemas.WantRun, Spec: &spec, TimeLeft: schemas.Duration(time.Hour)}
	b.order(o)
	b.report(a, running)
	for to := 1; to <= 2; to++ {
		o.RestartTo = to
		for range 3 {
			b.order(o)
		}
		r := b.report(a, func(r schemas.Report) bool { return r.Restarts == to })
		if r.Last == nil || r.Last.Code != 143 || r.Phase != schemas.PhaseRunning {
			t.Errorf("%+v, %+v", r, r.Last)
		}
	}
	b.order(schemas.Order{Assignment: a, Want: schemas.WantStop, Restarts: 2})
	if r := b.end(a); r.Restarts != 2 || r.End.Stdout != "run 1\nready\nrun 2\nready\nrun 3\nready\n" {
		t.Errorf("%d restarts, %q", r.Restarts, r.End.Stdout)
	}
}

func TestTasksGoOnWhileTheBusIsAway(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "sleep", "300ms", "3")
	b.report(a, running)
	natstest.Restart(t, b.server)
	if r := b.end(a); r.End.By != schemas.EndedItself || r.End.Exit.Code != 3 {
		t.Errorf("report %+v", r.End)
	}
}

func TestALapsedLeaseEndsWhatNeedsAPermit(t *testing.T) {
	b := newBench(t)
	b.cfg.Beat, b.cfg.Lease = time.Hour, 300*time.Millisecond // no beat after the first
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "sleep", "1h")
	r := b.end(a)
	if r.End.By != schemas.EndedPermit && r.End.By != schemas.EndedGaveBack {
		t.Errorf("ended by %s", r.End.By)
	}
}
