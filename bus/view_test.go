package bus_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

// changes collects what OnChange was told.
type changes struct {
	mu   sync.Mutex
	list []string
}

func (c *changes) add(ch bus.Change[string]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := ch.Key + ":"
	if ch.HadOld {
		s += ch.Old
	}
	s += ">"
	if ch.Deleted {
		s += "gone"
	} else {
		s += ch.New
	}
	c.list = append(c.list, s)
}

func (c *changes) has(s string) bool {
	for _, l := range c.get() {
		if l == s {
			return true
		}
	}
	return false
}

func (c *changes) get() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string{}, c.list...)
}

func view(t testing.TB, c *bus.Conn, bucket string, on func(bus.Change[string])) *bus.View[string] {
	t.Helper()
	v := bus.NewView(c, bucket, decodeText, bus.ViewOptions[string]{OnChange: on})
	run(t, v.Run)
	select {
	case <-v.Ready():
	case <-testContext(t).Done():
		t.Fatal("the view never got ready")
	}
	return v
}

func has(v *bus.View[string], key, want string) func() bool {
	return func() bool { got, _, ok := v.Get(key); return ok && got == want }
}

func TestViewFollowsTheBucket(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	drains := bus.NewTable(c, schemas.BucketDrains, noteCodec)
	a := must[bus.Entry[note]](t)(drains.Create(ctx, "a", note{Text: "1"}, "op"))
	b := must[bus.Entry[note]](t)(drains.Create(ctx, "b", note{Text: "1"}, "op"))
	if err := drains.Delete(ctx, "b", b.Revision); err != nil {
		t.Fatal(err)
	}
	var seen changes
	v := view(t, c, schemas.BucketDrains, seen.add)
	if diff := cmp.Diff([]string{"a:>1"}, seen.get()); diff != "" {
		t.Errorf("when ready: %s", diff)
	}
	a = must[bus.Entry[note]](t)(drains.Replace(ctx, a, note{Text: "2"}, "op2"))
	if err := v.CaughtUp(ctx, a.Revision); err != nil {
		t.Fatal(err)
	}
	if err := drains.Delete(ctx, "a", a.Revision); err != nil {
		t.Fatal(err)
	}
	last := must[bus.Entry[note]](t)(drains.Create(ctx, "c", note{Text: "1"}, "op"))
	if err := v.CaughtUp(ctx, last.Revision); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a:>1", "a:1>2", "a:2>gone", "c:>1"}, seen.get()); diff != "" {
		t.Error(diff)
	}
	if v.Len() != 1 {
		t.Errorf("%d keys", v.Len())
	}
	v.Range(func(key, value string, revision uint64) bool {
		if key != "c" || value != "1" || revision != last.Revision {
			t.Errorf("%s=%s at %d", key, value, revision)
		}
		return true
	})
}

func TestViewOfAnEmptyBucketIsReady(t *testing.T) {
	_, c := setup(t)
	if v := view(t, c, schemas.BucketTasks, nil); v.Len() != 0 {
		t.Error("not empty")
	}
}

func TestViewWaitsForItsBucket(t *testing.T) {
	s := natstest.Server(t)
	c := natstest.Connect(t, s)
	v := bus.NewView(c, schemas.BucketTasks, decodeText, bus.ViewOptions[string]{})
	run(t, v.Run)
	provision(t, c)
	<-v.Ready()
}

func TestViewObserve(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	drains := bus.NewTable(c, schemas.BucketDrains, noteCodec)
	var seen changes
	v := view(t, c, schemas.BucketDrains, seen.add)
	for i := range 200 { // own writes race with the consumer and never go back or come twice
		key := fmt.Sprint("k", i)
		e := must[bus.Entry[note]](t)(drains.Create(ctx, key, note{Text: "1"}, "op"))
		v.Observe(key, "1", e.Revision)
		next := must[bus.Entry[note]](t)(drains.Replace(ctx, e, note{Text: "2"}, "op"))
		v.Observe(key, "2", next.Revision)
		v.Observe(key, "1", e.Revision)
		if got, _, _ := v.Get(key); got != "2" {
			t.Fatalf("own write is not seen: %q", got)
		}
		if err := drains.Delete(ctx, key, next.Revision); err != nil {
			t.Fatal(err)
		}
		if i == 199 {
			until(t, "the deletion is seen", func() bool { _, _, ok := v.Get(key); return !ok })
			v.Observe(key, "2", next.Revision)
			if _, _, ok := v.Get(key); ok {
				t.Error("an old value came back after its deletion")
			}
		}
	}
	until(t, "all are deleted and told", func() bool { return v.Len() == 0 && seen.has("k199:2>gone") })
	perKey := map[string][]string{}
	for _, s := range seen.get() {
		key, _, _ := strings.Cut(s, ":")
		perKey[key] = append(perKey[key], s)
	}
	for i := range 200 {
		want := []string{fmt.Sprintf("k%d:>1", i), fmt.Sprintf("k%d:1>2", i), fmt.Sprintf("k%d:2>gone", i)}
		if diff := cmp.Diff(want, perKey[fmt.Sprint("k", i)]); diff != "" {
			t.Error(diff)
		}
	}
}

func TestViewWait(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	tasks := bus.NewTable(c, schemas.BucketTasks, noteCodec)
	v := view(t, c, schemas.BucketTasks, nil)
	const n = 2000
	var asked atomic.Int64
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			if err := v.Wait(ctx, fmt.Sprint(i), func(s string, _ uint64, ok bool) bool { asked.Add(1); return ok && s == "1" }); err != nil {
				t.Error(err)
			}
		})
	}
	until(t, "all wait", func() bool { return asked.Load() == n })
	for i := range n {
		c.PublishAsync("$KV.tasks."+fmt.Sprint(i), nil, []byte(`{"text":"1"}`), nil)
	}
	all.Wait()
	if got := asked.Load(); got > 2*n {
		t.Errorf("%d waiters were asked %d times", n, got)
	}
	stopped, cancel := context.WithCancel(ctx)
	cancel()
	wantErr(t, v.Wait(stopped, "never", func(string, uint64, bool) bool { return false }), context.Canceled)
	_, err := tasks.Get(ctx, "never")
	wantErr(t, err, bus.ErrNotFound)
}

func TestViewPrefix(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	drains := bus.NewTable(c, schemas.BucketDrains, noteCodec)
	for _, key := range []string{"x.a", "x.b", "y.a", "xyz"} {
		must[bus.Entry[note]](t)(drains.Create(ctx, key, note{Text: "1"}, "op"))
	}
	for prefix, want := range map[string]int{"x.": 2, "x": 3, "": 4} {
		v := bus.NewView(c, schemas.BucketDrains, decodeText, bus.ViewOptions[string]{Prefix: prefix})
		run(t, v.Run)
		<-v.Ready()
		if v.Len() != want {
			t.Errorf("prefix %q: %d keys, want %d", prefix, v.Len(), want)
		}
	}
}

func TestViewResumesSoonAfterARestart(t *testing.T) {
	s, c := setup(t)
	ctx := testContext(t)
	tasks := bus.NewTable(c, schemas.BucketTasks, noteCodec)
	var seen changes
	v := view(t, c, schemas.BucketTasks, seen.add)
	e := must[bus.Entry[note]](t)(tasks.Create(ctx, "a", note{Text: "0"}, "op"))
	until(t, "the view sees it", has(v, "a", "0"))
	for i := 1; i <= 3; i++ {
		natstest.Restart(t, s)
		up := time.Now()
		e = must[bus.Entry[note]](t)(tasks.Replace(ctx, e, note{Text: fmt.Sprint(i)}, fmt.Sprint(i)))
		wrote := time.Since(up)
		until(t, "the view sees it", has(v, "a", fmt.Sprint(i)))
		t.Logf("written %v and seen %v after the server was up", wrote, time.Since(up))
	}
	if err := v.CaughtUp(ctx, e.Revision); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a:>0", "a:0>1", "a:1>2", "a:2>3"}, seen.get()); diff != "" {
		t.Error(diff)
	}
}

// A long outage: the view's own connection is away while keys go without a trace.
func TestViewDropsWhatWentMeanwhile(t *testing.T) {
	for name, extra := range map[string]int{"read again": 0, "resumed": 2500} {
		t.Run(name, func(t *testing.T) {
			s, c := setup(t)
			ctx := testContext(t)
			var seen changes
			other := natstest.Connect(t, s)
			drains := bus.NewTable(other, schemas.BucketDrains, noteCodec)
			for _, key := range []string{"a", "b", "c"} {
				must[bus.Entry[note]](t)(drains.Create(ctx, key, note{Text: "1"}, "op"))
			}
			for i := range extra {
				other.PublishAsync(fmt.Sprintf("$KV.drains.x%d", i), nil, []byte(`{"text":"x"}`), nil)
			}
			v := view(t, c, schemas.BucketDrains, seen.add)
			until(t, "all there", func() bool { return v.Len() == 3+extra })

			block := c.Reconnected()
			stream := must[jetstream.Stream](t)(other.JS.Stream(ctx, "KV_drains"))
			if err := stream.Purge(ctx, jetstream.WithPurgeSubject("$KV.drains.b")); err != nil {
				t.Fatal(err)
			}
			if _, _, ok := v.Get("b"); !ok {
				t.Fatal("a purge says nothing, yet it was seen")
			}
			if err := c.NC.ForceReconnect(); err != nil {
				t.Fatal(err)
			}
			<-block
			until(t, "b is dropped and told", func() bool { return seen.has("b:1>gone") })
			if _, _, ok := v.Get("b"); ok || v.Len() != 2+extra {
				t.Errorf("b is there: %v; %d keys", ok, v.Len())
			}
		})
	}
}

// The bucket is made anew, so its revisions begin again.
func TestViewRebuildsWhenRevisionsAreLost(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	drains := bus.NewTable(c, schemas.BucketDrains, noteCodec)
	var seen changes
	v := view(t, c, schemas.BucketDrains, seen.add)
	for i := range 2500 {
		c.PublishAsync(fmt.Sprintf("$KV.drains.x%d", i), nil, []byte(`{"text":"x"}`), nil)
	}
	must[bus.Entry[note]](t)(drains.Create(ctx, "a", note{Text: "old"}, "op"))
	until(t, "all there", func() bool { return v.Len() == 2501 })
	if err := c.JS.DeleteStream(ctx, "KV_drains"); err != nil {
		t.Fatal(err)
	}
	provision(t, c)
	must[bus.Entry[note]](t)(drains.Create(ctx, "a", note{Text: "new"}, "op"))
	until(t, "the new value", has(v, "a", "new"))
	until(t, "the others are gone", func() bool { return v.Len() == 1 })
	e := must[bus.Entry[note]](t)(drains.Create(ctx, "b", note{Text: "1"}, "op"))
	until(t, "a new key", has(v, "b", "1"))
	if err := v.CaughtUp(ctx, e.Revision); err != nil {
		t.Fatal(err)
	}
	if !seen.has("a:old>new") || !seen.has("x7:x>gone") {
		t.Error("changes were not told")
	}
}

func TestViewSkipsWhatDoesNotDecode(t *testing.T) {
	_, c := setup(t)
	ctx := testContext(t)
	v := bus.NewView(c, schemas.BucketDrains, func(key string, h nats.Header, data []byte) (string, error) {
		if string(data) == "bad" {
			return "", fmt.Errorf("bad")
		}
		return string(data), nil
	}, bus.ViewOptions[string]{})
	run(t, v.Run)
	<-v.Ready()
	for _, s := range []string{"good", "bad"} {
		seq := must[uint64](t)(c.Publish(ctx, "$KV.drains.a", nil, []byte(s)))
		if err := v.CaughtUp(ctx, seq); err != nil {
			t.Fatal(err)
		}
		if got, _, _ := v.Get("a"); got != "good" {
			t.Errorf("got %q", got)
		}
	}
}

// A view that has seen revisions of a stream knows nothing of those of the one that
// was made in its place.
func TestViewHasNotCaughtUpWithAStreamMadeAnew(t *testing.T) {
	for name, many := range map[string]int{"read again": 10, "resumed": 2500} {
		t.Run(name, func(t *testing.T) {
			_, c := setup(t)
			ctx := testContext(t)
			drains := bus.NewTable(c, schemas.BucketDrains, noteCodec)
			var seen changes
			hold := make(chan struct{})
			release := sync.OnceFunc(func() { close(hold) })
			var held atomic.Bool
			v := bus.NewView(c, schemas.BucketDrains, decodeText, bus.ViewOptions[string]{OnChange: func(ch bus.Change[string]) {
				if held.Load() {
					<-hold
				}
				seen.add(ch)
			}})
			run(t, v.Run)
			t.Cleanup(release)
			for i := range many {
				c.PublishAsync(fmt.Sprintf("$KV.drains.x%d", i), nil, []byte(`{"text":"x"}`), nil)
			}
			last := must[bus.Entry[note]](t)(drains.Create(ctx, "a", note{Text: "old"}, "op"))
			if err := v.CaughtUp(ctx, last.Revision); err != nil {
				t.Fatal(err)
			}
			held.Store(true)
			if err := c.JS.DeleteStream(ctx, "KV_drains"); err != nil {
				t.Fatal(err)
			}
			provision(t, c)
			e := must[bus.Entry[note]](t)(drains.Create(ctx, "a", note{Text: "new"}, "op"))
			until(t, "the new value", has(v, "a", "new"))
			short, cancel := context.WithCancel(ctx)
			done := make(chan error, 1)
			go func() { done <- v.CaughtUp(short, e.Revision) }()
			until(t, "the others are gone", func() bool { return v.Len() == 1 })
			// OnChange has returned for nothing of the new stream.
			cancel()
			wantErr(t, <-done, context.Canceled)
			release()
			if err := v.CaughtUp(ctx, e.Revision); err != nil {
				t.Fatal(err)
			}
			// A session may begin before "new" is there, and finds no "a" at first.
			replaced := seen.has("a:old>new") || seen.has("a:old>gone") && seen.has("a:>new")
			if !replaced || !seen.has("x7:x>gone") {
				t.Errorf("changes were not told: %v", seen.get())
			}
		})
	}
}
