package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

var reports = bus.ConsumerSpec{
	Stream: schemas.StreamReports, Durable: "reaper", AckWait: 30 * time.Second, MaxAckPending: -1,
}

// inbox collects what a consumer handled.
type inbox struct {
	mu   sync.Mutex
	list []string
}

func (i *inbox) add(s string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.list = append(i.list, s)
}

func (i *inbox) get() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Clone(i.list)
}

func (i *inbox) has(s string) func() bool {
	return func() bool { return slices.Contains(i.get(), s) }
}

func consume(t testing.TB, c *bus.Conn, o bus.ConsumeOptions, handle func(context.Context, bus.Msg)) (stop func()) {
	t.Helper()
	return run(t, func(ctx context.Context) error { return c.Consume(ctx, o, handle) })
}

func publish(t testing.TB, c *bus.Conn, subject, text string) uint64 {
	t.Helper()
	return must[uint64](t)(c.Publish(testContext(t), subject, nil, []byte(text)))
}

func TestConsumeInOrderPerKeyAndAtOnceOverKeys(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	logs := bus.ConsumerSpec{Stream: schemas.StreamLogs, Durable: "x", AckWait: 30 * time.Second, MaxAckPending: -1}
	if err := c.EnsureConsumer(ctx, logs); err != nil {
		t.Fatal(err)
	}
	if err := c.EnsureConsumer(ctx, logs); err != nil {
		t.Fatalf("twice: %v", err)
	}
	const keys, each = 5, 100
	var mu sync.Mutex
	got := map[string][]string{}
	total := 0
	meet := make(chan struct{}) // the first of each key meet, so they run at the same time
	waiting := 0
	consume(t, c, bus.ConsumeOptions{Stream: logs.Stream, Durable: logs.Durable, Workers: keys, MaxMessages: 100}, func(ctx context.Context, m bus.Msg) {
		mu.Lock()
		first := len(got[m.Subject]) == 0
		got[m.Subject] = append(got[m.Subject], string(m.Data))
		total++
		if first {
			if waiting++; waiting == keys {
				close(meet)
			}
		}
		mu.Unlock()
		if first {
			select {
			case <-meet:
			case <-ctx.Done():
			}
		}
		if err := m.Ack(); err != nil {
			t.Error(err)
		}
	})
	want := map[string][]string{}
	for i := range each {
		for k := range keys {
			subject := schemas.LogSubject("w1", schemas.TaskID(fmt.Sprint("t", k)))
			want[subject] = append(want[subject], fmt.Sprint(i))
			publish(t, c, subject, fmt.Sprint(i))
		}
	}
	until(t, "all handled", func() bool { mu.Lock(); defer mu.Unlock(); return total == keys*each })
	mu.Lock()
	defer mu.Unlock()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestConsumeSurvivesRestartAndItsConsumerMadeAnew(t *testing.T) {
	s, c := setup(t)
	ctx := testContext(t)
	var got inbox
	consume(t, c, bus.ConsumeOptions{Stream: reports.Stream, Durable: reports.Durable}, func(_ context.Context, m bus.Msg) {
		got.add(string(m.Data))
		if err := m.Ack(); err != nil && !errors.Is(err, context.Canceled) {
			t.Log(err)
		}
	})
	if err := c.EnsureConsumer(ctx, reports); err != nil { // it waits for its consumer
		t.Fatal(err)
	}
	publish(t, c, "dayfly.reports.w1.t1", "one")
	until(t, "one", got.has("one"))

	natstest.Restart(t, s)
	publish(t, c, "dayfly.reports.w1.t1", "two")
	until(t, "two", got.has("two"))

	if err := c.DeleteConsumer(ctx, reports.Stream, reports.Durable); err != nil {
		t.Fatal(err)
	}
	if err := c.DeleteConsumer(ctx, reports.Stream, reports.Durable); err != nil {
		t.Fatalf("twice: %v", err)
	}
	publish(t, c, "dayfly.reports.w1.t1", "three")
	if err := c.EnsureConsumer(ctx, reports); err != nil {
		t.Fatal(err)
	}
	until(t, "three", got.has("three"))
}

func TestConsumeWaitsForItsHandlers(t *testing.T) {
	_, c := setup(t)
	if err := c.EnsureConsumer(testContext(t), reports); err != nil {
		t.Fatal(err)
	}
	started, finish := make(chan struct{}), make(chan struct{})
	var ended bool
	ctx, cancel := context.WithCancel(t.Context())
	returned := make(chan error)
	go func() {
		returned <- c.Consume(ctx, bus.ConsumeOptions{Stream: reports.Stream, Durable: reports.Durable}, func(context.Context, bus.Msg) {
			close(started)
			<-finish
			ended = true
		})
	}()
	publish(t, c, "dayfly.reports.w1.t1", "one")
	<-started
	cancel()
	close(finish)
	if err := <-returned; err != nil || !ended {
		t.Errorf("returned %v, handler ended: %v", err, ended)
	}
}

func TestRead(t *testing.T) {
	s, c := setup(t)
	ctx := testContext(t)
	read := func(o bus.ReadOptions) (texts []string) {
		t.Helper()
		o.Stream = schemas.StreamLogs
		err := c.Read(ctx, o, func(m bus.Msg) error { texts = append(texts, string(m.Data)); return nil })
		if err != nil {
			t.Fatal(err)
		}
		return texts
	}
	mine := schemas.LogSubject("*", "t1")
	if got := read(bus.ReadOptions{Filter: mine}); got != nil {
		t.Errorf("of an empty stream: %v", got)
	}
	var want []string
	for i := range 1200 {
		text := fmt.Sprint(i)
		want = append(want, text)
		c.PublishAsync(schemas.LogSubject("w1", "t1"), nil, []byte(text), nil)
	}
	publish(t, c, schemas.LogSubject("w1", "t2"), "other")
	if diff := cmp.Diff(want, read(bus.ReadOptions{Filter: mine})); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(want[1190:], read(bus.ReadOptions{Filter: mine, FromSequence: 1191})); diff != "" {
		t.Error(diff)
	}
	if got := read(bus.ReadOptions{Filter: schemas.LogSubject("*", "t3")}); got != nil {
		t.Errorf("of no match: %v", got)
	}
	stop := errors.New("enough")
	wantErr(t, c.Read(ctx, bus.ReadOptions{Stream: schemas.StreamLogs}, func(bus.Msg) error { return stop }), stop)
	wantErr(t, c.Read(ctx, bus.ReadOptions{Stream: schemas.StreamLogs, Follow: true}, func(bus.Msg) error { return stop }), stop)
	if err := c.Read(ctx, bus.ReadOptions{Stream: "NONE"}, func(bus.Msg) error { return nil }); err == nil {
		t.Error("a stream that does not exist")
	}

	var got inbox
	run(t, func(ctx context.Context) error {
		return c.Read(ctx, bus.ReadOptions{Stream: schemas.StreamLogs, Filter: mine, Follow: true}, func(m bus.Msg) error {
			got.add(string(m.Data))
			return nil
		})
	})
	until(t, "the stored ones", func() bool { return len(got.get()) == 1200 })
	publish(t, c, schemas.LogSubject("w1", "t1"), "1200")
	until(t, "the next", got.has("1200"))
	natstest.Restart(t, s)
	publish(t, c, schemas.LogSubject("w2", "t1"), "1201")
	until(t, "the next after a restart", got.has("1201"))
	if diff := cmp.Diff(append(want, "1200", "1201"), got.get()); diff != "" {
		t.Error(diff)
	}
}
