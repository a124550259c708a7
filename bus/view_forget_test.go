package bus_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

// forgetful is a view that keeps nothing of what reads "final", and counts what it decodes.
func forgetful(t testing.TB, c *bus.Conn, on func(bus.Change[string])) (v *bus.View[string], decoded *atomic.Int64) {
	t.Helper()
	decoded = new(atomic.Int64)
	v = bus.NewView(c, schemas.BucketDrains, func(key string, h nats.Header, data []byte) (string, error) {
		decoded.Add(1)
		s, err := decodeText(key, h, data)
		if s == "final" {
			return "", fmt.Errorf("of %s: %w", key, bus.ErrForget)
		}
		return s, err
	}, bus.ViewOptions[string]{OnChange: on})
	run(t, v.Run)
	select {
	case <-v.Ready():
	case <-testContext(t).Done():
		t.Fatal("the view never got ready")
	}
	return v, decoded
}

func gone(v *bus.View[string], key string) bool { _, _, ok := v.Get(key); return !ok }

func TestViewForgets(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	drains := bus.NewTable(c, schemas.BucketDrains, noteCodec)
	a := must[bus.Entry[note]](t)(drains.Create(ctx, "a", note{Text: "1"}, "op"))
	must[bus.Entry[note]](t)(drains.Create(ctx, "b", note{Text: "final"}, "op"))
	var seen changes
	v, _ := forgetful(t, c, seen.add)
	if diff := cmp.Diff([]string{"a:>1"}, seen.get()); diff != "" || v.Len() != 1 {
		t.Errorf("when ready: %d keys, %s", v.Len(), diff)
	}
	waited := make(chan error, 1)
	asked := make(chan struct{}, 2)
	go func() {
		waited <- v.Wait(ctx, "a", func(_ string, _ uint64, exists bool) bool { asked <- struct{}{}; return !exists })
	}()
	<-asked
	last := must[bus.Entry[note]](t)(drains.Replace(ctx, a, note{Text: "final"}, "op2"))
	if err := v.CaughtUp(ctx, last.Revision); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
	v.Observe("a", "1", a.Revision)
	v.Observe("a", "1", last.Revision)
	if !gone(v, "a") || v.Len() != 0 {
		t.Error("a forgotten key came back")
	}
	again := must[bus.Entry[note]](t)(drains.Replace(ctx, last, note{Text: "2"}, "op3"))
	if err := v.CaughtUp(ctx, again.Revision); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a:>1", "a:1>gone", "a:>2"}, seen.get()); diff != "" {
		t.Error(diff)
	}
}

// Own writes race with the consumer: what is forgotten never comes back and is told once.
func TestViewForgetsOwnWrites(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	drains := bus.NewTable(c, schemas.BucketDrains, noteCodec)
	var seen changes
	v, _ := forgetful(t, c, seen.add)
	var last uint64
	for i := range 300 {
		key := fmt.Sprint("k", i)
		e := must[bus.Entry[note]](t)(drains.Create(ctx, key, note{Text: "1"}, "op"))
		v.Observe(key, "1", e.Revision)
		next := must[bus.Entry[note]](t)(drains.Replace(ctx, e, note{Text: "final"}, "op"))
		v.Forget(key, next.Revision)
		v.Observe(key, "1", e.Revision)
		v.Forget(key, e.Revision)
		if !gone(v, key) {
			t.Fatalf("%s is there", key)
		}
		last = next.Revision
	}
	if err := v.CaughtUp(ctx, last); err != nil {
		t.Fatal(err)
	}
	if v.Len() != 0 {
		t.Errorf("%d keys", v.Len())
	}
	perKey := map[string][]string{}
	for _, s := range seen.get() {
		key, _, _ := strings.Cut(s, ":")
		perKey[key] = append(perKey[key], s)
	}
	for i := range 300 {
		if diff := cmp.Diff([]string{fmt.Sprintf("k%d:>1", i), fmt.Sprintf("k%d:1>gone", i)}, perKey[fmt.Sprint("k", i)]); diff != "" {
			t.Error(diff)
		}
	}
}

// A view with few keys over a bucket with many does not read the bucket again at
// each reconnect, and still finds out what went without a trace.
func TestAForgetfulViewResumes(t *testing.T) {
	for name, many := range map[string]int{"read again": 100, "resumed": 2500} {
		t.Run(name, func(t *testing.T) {
			s, c := setup(t)
			ctx := testContext(t)
			other := natstest.Connect(t, s)
			drains := bus.NewTable(other, schemas.BucketDrains, noteCodec)
			for _, key := range []string{"a", "b"} {
				must[bus.Entry[note]](t)(drains.Create(ctx, key, note{Text: "1"}, "op"))
			}
			for i := range many {
				other.PublishAsync(fmt.Sprintf("$KV.drains.x%d", i), nil, []byte(`{"text":"final"}`), nil)
			}
			end := must[bus.Entry[note]](t)(drains.Create(ctx, "end", note{Text: "final"}, "op"))
			var seen changes
			v, decoded := forgetful(t, c, seen.add)
			if err := v.CaughtUp(ctx, end.Revision); err != nil {
				t.Fatal(err)
			}
			if v.Len() != 2 {
				t.Fatalf("%d keys", v.Len())
			}
			before := decoded.Load()
			back := c.Reconnected()
			stream := must[jetstream.Stream](t)(other.JS.Stream(ctx, "KV_drains"))
			if err := stream.Purge(ctx, jetstream.WithPurgeSubject("$KV.drains.b")); err != nil {
				t.Fatal(err)
			}
			if err := c.NC.ForceReconnect(); err != nil {
				t.Fatal(err)
			}
			<-back
			until(t, "b is dropped and told", func() bool { return seen.has("b:1>gone") })
			if v.Len() != 1 || gone(v, "a") || !gone(v, "x7") {
				t.Errorf("%d keys; a gone: %v", v.Len(), gone(v, "a"))
			}
			next := must[bus.Entry[note]](t)(drains.Create(ctx, "c", note{Text: "1"}, "op"))
			if err := v.CaughtUp(ctx, next.Revision); err != nil {
				t.Fatal(err)
			}
			if again := decoded.Load() - before; many > 2000 && again > 10 {
				t.Errorf("%d messages were decoded again", again)
			}
		})
	}
}

// The bucket is made anew: a revision that was forgotten there stands in nobody's way.
func TestAForgottenKeyOfALostBucket(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	drains := bus.NewTable(c, schemas.BucketDrains, noteCodec)
	var seen changes
	v, _ := forgetful(t, c, seen.add)
	e := must[bus.Entry[note]](t)(drains.Create(ctx, "k", note{Text: "1"}, "op"))
	for i := range 10 {
		e = must[bus.Entry[note]](t)(drains.Replace(ctx, e, note{Text: fmt.Sprint(i)}, "op"))
	}
	e = must[bus.Entry[note]](t)(drains.Replace(ctx, e, note{Text: "final"}, "op"))
	v.Forget("k", e.Revision+100) // as if a later one had been lost with the server
	if !gone(v, "k") {
		t.Error("forgotten, yet there")
	}
	if err := c.JS.DeleteStream(ctx, "KV_drains"); err != nil {
		t.Fatal(err)
	}
	provision(t, c)
	must[bus.Entry[note]](t)(drains.Create(ctx, "k", note{Text: "new"}, "op"))
	until(t, "the new value", has(v, "k", "new"))
}

func TestViewForgetsWhatIsFinalAfterARestart(t *testing.T) {
	s, c := setup(t)
	ctx := testContext(t)
	drains := bus.NewTable(c, schemas.BucketDrains, noteCodec)
	var seen changes
	v, _ := forgetful(t, c, seen.add)
	other := natstest.Connect(t, s)
	theirs := bus.NewTable(other, schemas.BucketDrains, noteCodec)
	a := must[bus.Entry[note]](t)(drains.Create(ctx, "a", note{Text: "1"}, "op"))
	until(t, "a is there", has(v, "a", "1"))
	for range 3 {
		natstest.Restart(t, s)
		if err := settle(ctx, theirs, &a, "final"); err != nil {
			t.Fatal(err)
		}
		until(t, "a is forgotten", func() bool { return gone(v, "a") })
		if err := settle(ctx, theirs, &a, "1"); err != nil {
			t.Fatal(err)
		}
		until(t, "a is back", has(v, "a", "1"))
	}
}

func settle(ctx context.Context, table *bus.Table[note], e *bus.Entry[note], text string) (err error) {
	*e, err = table.Replace(ctx, *e, note{Text: text}, text)
	return err
}
