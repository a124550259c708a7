package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// note is a record that carries the names of the writes that made it.
type note struct {
	Text string   `json:"text"`
	Ops  []string `json:"ops"`
}

var noteCodec = bus.Codec[note]{
	Encode: func(n note) ([]byte, nats.Header, error) {
		b, err := schemas.Encode(n)
		return b, nats.Header{"Text": {n.Text}}, err
	},
	Decode: decodeNote,
	Wrote: func(n note, op string) bool {
		for _, o := range n.Ops {
			if o == op {
				return true
			}
		}
		return false
	},
}

func decodeNote(b []byte) (n note, err error) { return n, schemas.Decode(b, &n) }

func decodeText(key string, h nats.Header, data []byte) (string, error) {
	n, err := decodeNote(data)
	return n.Text, err
}

func provision(t testing.TB, c *bus.Conn) {
	t.Helper()
	if err := bus.Provision(testContext(t), c, schemas.Assets(time.Hour), 1); err != nil {
		t.Fatal(err)
	}
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// setup gives a server with dayfly's assets and a core connection.
func setup(t testing.TB, opts ...natstest.Option) (*natsd.Server, *bus.Conn) {
	t.Helper()
	s := natstest.Server(t, opts...)
	c := natstest.Connect(t, s)
	provision(t, c)
	return s, c
}

// until polls for a fact.
func until(t testing.TB, what string, fact func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !fact() {
		if time.Now().After(deadline) {
			t.Fatalf("never came true: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// run starts a blocking function and waits for it at the end of the test.
func run(t testing.TB, fn func(ctx context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		if err := fn(ctx); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	stop = func() { cancel(); done.Wait() }
	t.Cleanup(stop)
	return stop
}

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
}

func TestProvisionTwiceAndAtOnce(t *testing.T) {
	s := natstest.Server(t)
	ctx := testContext(t)
	var all sync.WaitGroup
	for range 3 {
		c := natstest.Connect(t, s)
		all.Go(func() {
			if err := bus.Provision(ctx, c, schemas.Assets(time.Hour), 1); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	c := natstest.Connect(t, s)
	if err := bus.Provision(ctx, c, schemas.Assets(2*time.Hour), 1); err != nil {
		t.Fatal(err)
	}
	config := func(stream string) jetstream.StreamConfig {
		t.Helper()
		return must[jetstream.Stream](t)(c.JS.Stream(ctx, stream)).CachedInfo().Config
	}
	if got := config(schemas.StreamLogs).MaxAge; got != 2*time.Hour {
		t.Errorf("changed age of the logs: %v", got)
	}
	tasks := config("KV_tasks")
	want := tasks
	want.MaxMsgsPerSubject, want.AllowDirect, want.DenyDelete, want.AllowMsgTTL = 1, false, true, true
	want.Discard, want.SubjectDeleteMarkerTTL, want.MaxConsumers = jetstream.DiscardNew, time.Hour, 20_000
	want.PersistMode = jetstream.DefaultPersistMode
	if diff := cmp.Diff(want, tasks); diff != "" {
		t.Error(diff)
	}
	if beats := config("KV_workers"); beats.PersistMode != jetstream.AsyncPersistMode || !beats.AllowDirect {
		t.Errorf("workers: %+v", beats)
	}
	if work := config("WORK_0"); work.Retention != jetstream.WorkQueuePolicy || work.MaxMsgsPerSubject != 1 {
		t.Errorf("work: %+v", work)
	}
}

func TestTableCreate(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	tasks := bus.NewTable(c, schemas.BucketTasks, noteCodec)

	none, err := tasks.Get(ctx, "a")
	wantErr(t, err, bus.ErrNotFound)
	if none.Gone {
		t.Error("it was never there")
	}

	e := must[bus.Entry[note]](t)(tasks.Create(ctx, "a", note{"one", []string{"op1"}}, "op1"))
	got := must[bus.Entry[note]](t)(tasks.Get(ctx, "a"))
	if got.Created.IsZero() {
		t.Error("no time")
	}
	got.Created = time.Time{}
	if diff := cmp.Diff(e, got); diff != "" {
		t.Error(diff)
	}

	_, err = tasks.Create(ctx, "a", note{"two", []string{"op2"}}, "op2")
	wantErr(t, err, bus.ErrConflict)

	again := must[bus.Entry[note]](t)(tasks.Create(ctx, "a", note{"one", []string{"op1"}}, "op1"))
	if again.Revision != e.Revision {
		t.Errorf("the second copy of a create made revision %d, want %d", again.Revision, e.Revision)
	}
}

func TestTableDeleteAndCreateAgain(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	drains := bus.NewTable(c, schemas.BucketDrains, noteCodec)
	e := must[bus.Entry[note]](t)(drains.Create(ctx, "w1", note{Text: "one"}, "op1"))

	wantErr(t, drains.Delete(ctx, "w1", e.Revision+7), bus.ErrConflict)
	if err := drains.Delete(ctx, "w1", e.Revision); err != nil {
		t.Fatal(err)
	}
	if err := drains.Delete(ctx, "w1", e.Revision); err != nil {
		t.Errorf("deleting twice: %v", err)
	}
	gone, err := drains.Get(ctx, "w1")
	wantErr(t, err, bus.ErrNotFound)
	if !gone.Gone {
		t.Error("it was there")
	}
	_, err = drains.Replace(ctx, e, note{Text: "x"}, "op2")
	wantErr(t, err, bus.ErrConflict)
	must[bus.Entry[note]](t)(drains.Create(ctx, "w1", note{Text: "two"}, "op3"))
}

func TestTableTTL(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	tasks := bus.NewTable(c, schemas.BucketTasks, noteCodec)
	e := must[bus.Entry[note]](t)(tasks.Create(ctx, "a", note{Text: "one"}, "op1"))
	must[bus.Entry[note]](t)(tasks.Replace(ctx, e, note{Text: "two"}, "op2", bus.TTL(time.Millisecond)))
	until(t, "the record expires", func() bool {
		e, err := tasks.Get(ctx, "a")
		return errors.Is(err, bus.ErrNotFound) && e.Gone
	})
	must[bus.Entry[note]](t)(tasks.Create(ctx, "a", note{Text: "three"}, "op3"))
}

func TestTableReplaceSettlesItsOwnFirstCopy(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	tasks := bus.NewTable(c, schemas.BucketTasks, noteCodec)
	e := must[bus.Entry[note]](t)(tasks.Create(ctx, "a", note{Text: "one"}, "op1"))
	first := must[bus.Entry[note]](t)(tasks.Replace(ctx, e, note{"two", []string{"op2"}}, "op2"))
	second := must[bus.Entry[note]](t)(tasks.Replace(ctx, e, note{"two", []string{"op2"}}, "op2"))
	if first.Revision != second.Revision {
		t.Errorf("revisions %d and %d", first.Revision, second.Revision)
	}
	_, err := tasks.Replace(ctx, e, note{"three", []string{"op3"}}, "op3")
	wantErr(t, err, bus.ErrConflict)
}

func TestTableUpdateByMany(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	var conflicts, ops atomic.Int64
	c.Observe = func(bucket, op string, _ time.Duration, err error) {
		ops.Add(1)
		if op == "conflict" {
			conflicts.Add(1)
		}
	}
	tasks := bus.NewTable(c, schemas.BucketTasks, noteCodec)
	must[bus.Entry[note]](t)(tasks.Create(ctx, "a", note{Text: "one"}, "op"))
	const writers, each = 8, 25
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := range each {
				op := fmt.Sprintf("%d-%d", w, i)
				_, err := tasks.Update(ctx, "a", op, func(e bus.Entry[note]) (note, []bus.WriteOption, error) {
					return note{e.Value.Text, append(slices.Clone(e.Value.Ops), op)}, nil, nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	e := must[bus.Entry[note]](t)(tasks.Get(ctx, "a"))
	if len(e.Value.Ops) != writers*each {
		t.Errorf("%d of %d updates are there", len(e.Value.Ops), writers*each)
	}
	if conflicts.Load() == 0 || ops.Load() == 0 {
		t.Errorf("observed %d conflicts, %d operations", conflicts.Load(), ops.Load())
	}
	refuse := errors.New("no")
	saw, err := tasks.Update(ctx, "a", "x", func(e bus.Entry[note]) (note, []bus.WriteOption, error) { return e.Value, nil, refuse })
	if err != refuse || saw.Revision != e.Revision {
		t.Errorf("got %v at %d, want fn's error at %d", err, saw.Revision, e.Revision)
	}
}

func TestWritesOutliveServerRestarts(t *testing.T) {
	s, c := setup(t, natstest.SyncAlways())
	ctx := testContext(t)
	tasks := bus.NewTable(c, schemas.BucketTasks, noteCodec)
	must[bus.Entry[note]](t)(tasks.Create(ctx, "a", note{Text: "one"}, "op"))
	var written atomic.Int64
	stop := run(t, func(run context.Context) error {
		for i := 0; run.Err() == nil; i++ {
			op := fmt.Sprint(i)
			_, err := tasks.Update(ctx, "a", op, func(e bus.Entry[note]) (note, []bus.WriteOption, error) {
				return note{e.Value.Text, append(slices.Clone(e.Value.Ops), op)}, nil, nil
			})
			if err != nil {
				return err
			}
			written.Add(1)
		}
		return nil
	})
	for range 3 {
		before := written.Load()
		until(t, "writes before the restart", func() bool { return written.Load() > before+20 })
		natstest.Restart(t, s)
		before = written.Load()
		until(t, "writes after the restart", func() bool { return written.Load() > before })
	}
	stop()
	e := must[bus.Entry[note]](t)(tasks.Get(ctx, "a"))
	if int64(len(e.Value.Ops)) != written.Load() {
		t.Errorf("%d writes are there, %d were acknowledged", len(e.Value.Ops), written.Load())
	}
	for i, op := range e.Value.Ops {
		if op != fmt.Sprint(i) {
			t.Fatalf("write %d is %q: once and in order is wanted", i, op)
		}
	}
}

func TestUnavailable(t *testing.T) {
	s, c := setup(t)
	ctx := testContext(t)
	until(t, "nobody is there", func() bool {
		short, cancel := context.WithTimeout(ctx, time.Second) // if it ends within a try, the outcome of that is unknown
		defer cancel()
		_, err := c.Publish(short, "nobody.listens", nil, []byte("x"))
		if err == nil {
			t.Fatal("it was stored")
		}
		return errors.Is(err, bus.ErrUnavailable)
	})

	s.Shutdown()
	until(t, "the disconnect is seen", func() bool { return !c.Connected() })
	got := make(chan error, 1)
	c.PublishAsync("dayfly.logs.w1.t1", nil, []byte("x"), func(err error) { got <- err })
	wantErr(t, <-got, bus.ErrUnavailable)
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	_, err := bus.NewTable(c, schemas.BucketTasks, noteCodec).Create(short, "a", note{Text: "x"}, "op")
	wantErr(t, err, bus.ErrUnavailable)

	again := c.Reconnected()
	natstest.Restart(t, s)
	<-again
	if !c.Connected() {
		t.Error("not connected")
	}
}

func TestConnectWaitsForTheServer(t *testing.T) {
	s := natstest.Server(t)
	s.Shutdown()
	type result struct {
		c   *bus.Conn
		err error
	}
	got := make(chan result)
	go func() {
		c, err := bus.Connect(testContext(t), bus.Config{InProcess: s, User: natsd.CoreUser, Password: natstest.Password})
		got <- result{c, err}
	}()
	natstest.Restart(t, s)
	r := <-got
	if r.err != nil {
		t.Fatal(r.err)
	}
	r.c.Close()

	_, err := bus.Connect(testContext(t), bus.Config{URL: s.URL(), User: natsd.CoreUser, Password: "wrong"})
	wantErr(t, err, nats.ErrAuthorization)
}

func TestPublishAsync(t *testing.T) {
	_, c := setup(t)
	const n = 20_000
	var ok, failed atomic.Int64
	for i := range n {
		c.PublishAsync(fmt.Sprintf("dayfly.logs.w1.t%d", i%50), nil, []byte("line"), func(err error) {
			if err != nil {
				failed.Add(1)
			} else {
				ok.Add(1)
			}
		})
	}
	until(t, "every callback", func() bool { return ok.Load()+failed.Load() == n })
	if failed.Load() > 0 {
		t.Errorf("%d failed", failed.Load())
	}
	got := make(chan error, 1)
	c.PublishAsync("nobody.listens", nil, []byte("x"), func(err error) { got <- err })
	wantErr(t, <-got, bus.ErrUnavailable)
}

func TestThisConnectionEndsWithIt(t *testing.T) {
	s, c := setup(t)
	here, cancel := c.ThisConnection(testContext(t))
	defer cancel()
	other, cancelOther := c.ThisConnection(testContext(t))
	cancelOther()
	if here.Err() != nil || other.Err() == nil {
		t.Errorf("before: %v, canceled: %v", here.Err(), other.Err())
	}
	natstest.Restart(t, s)
	<-here.Done()
	wantErr(t, context.Cause(here), bus.ErrUnavailable)
	until(t, "it is connected again", c.Connected)
	next, cancelNext := c.ThisConnection(testContext(t))
	defer cancelNext()
	if next.Err() != nil {
		t.Errorf("on the next connection: %v", next.Err())
	}
	s.Shutdown()
	<-next.Done()
	away, cancelAway := c.ThisConnection(testContext(t))
	defer cancelAway()
	wantErr(t, context.Cause(away), bus.ErrUnavailable)
}
