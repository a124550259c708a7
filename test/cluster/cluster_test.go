//go:build cluster

// Package cluster runs dayfly as production does: several of each service as
// processes of their own, and three NATS servers. It stops, kills and replaces them
// while clients go on.
package cluster

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

var binary string

func TestMain(m *testing.M) {
	harness.Main(m, func(_, dayfly string) error {
		binary = dayfly
		return nil
	})
}

// patience bounds each wait for a fact.
const patience = 40 * time.Second

func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// start starts a site that is taken away when the test ends.
func start(t testing.TB, o harness.SiteOptions) *harness.Site {
	t.Helper()
	o.Bin = binary
	s, err := harness.NewSite(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, p := range s.All() {
				t.Logf("--- %s\n%s", p.Name, p.Tail())
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	return s
}

// eventually waits until fn is content.
func eventually(t testing.TB, what string, fn func() error) {
	t.Helper()
	began := time.Now()
	if err := harness.Poll(within(t, patience), fn); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if took := time.Since(began); took > 100*time.Millisecond {
		t.Logf("%s: %v", what, took.Round(time.Millisecond))
	}
}

// connect gives a core service's connection to some of the NATS servers.
func connect(t testing.TB, s *harness.Site, urls string) *bus.Conn {
	t.Helper()
	b, err := os.ReadFile(s.Core())
	if err != nil {
		t.Fatal(err)
	}
	var secrets struct {
		Core string `json:"core"`
	}
	if err := json.Unmarshal(b, &secrets); err != nil {
		t.Fatal(err)
	}
	c, err := bus.Connect(within(t, patience), bus.Config{Name: t.Name(), URL: urls, User: natsd.CoreUser, Password: secrets.Core, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// spec is a task that is over at once, or lives until it is ended.
func spec(command ...string) map[string]any {
	return map[string]any{"image": "any", "command": command, "ttl": "10m", "timeouts": map[string]any{"stop": "1s"}}
}

// passing says that asking again may help.
func passing(err error) bool {
	var e *schemas.Error
	return !errors.As(err, &e) || e.Status >= 500
}

// call asks the gateways in turn until one answers.
func call(ctx context.Context, s *harness.Site, method, path, key string, in, out any) error {
	n := 0
	return harness.Poll(ctx, func() error {
		g := s.Gateway[n%len(s.Gateway)]
		n++
		err := harness.Call(ctx, method, g.Addrs.HTTP+path, key, in, out)
		if err != nil && !passing(err) {
			return harness.Fatal(err)
		}
		return err
	})
}

func create(t testing.TB, s *harness.Site, spec map[string]any) schemas.Task {
	t.Helper()
	var task schemas.Task
	if err := call(within(t, patience), s, "POST", "/v1/tasks", rand.Text(), spec, &task); err != nil {
		t.Fatal(err)
	}
	return task
}

func get(t testing.TB, s *harness.Site, id schemas.TaskID) schemas.Task {
	t.Helper()
	var task schemas.Task
	if err := call(within(t, patience), s, "GET", "/v1/tasks/"+string(id), "", nil, &task); err != nil {
		t.Fatal(err)
	}
	return task
}

// until waits until a task is in a state.
func until(t testing.TB, s *harness.Site, id schemas.TaskID, want schemas.State) schemas.Task {
	t.Helper()
	var task schemas.Task
	eventually(t, fmt.Sprintf("%s is %s", id, want), func() error {
		task = get(t, s, id)
		switch {
		case task.State == want:
			return nil
		case task.State.Final():
			return harness.Fatal(fmt.Errorf("it is %s (%s: %s)", task.State, task.Reason, task.Message))
		}
		return fmt.Errorf("it is %s", task.State)
	})
	return task
}

// traffic creates short tasks, one after the other, until it is stopped.
type traffic struct {
	mu      sync.Mutex
	ids     map[schemas.TaskID]bool
	err     error
	longest time.Duration // that a client waited for one task to be accepted
}

// traffick starts clients. finish stops them and checks that every accepted task
// completes.
func traffick(t testing.TB, s *harness.Site, clients int) (finish func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	f := &traffic{ids: map[schemas.TaskID]bool{}}
	var running sync.WaitGroup
	for range clients {
		running.Go(func() {
			for ctx.Err() == nil {
				began := time.Now()
				var task schemas.Task
				err := call(ctx, s, "POST", "/v1/tasks", rand.Text(), spec("exit", "0"), &task)
				f.mu.Lock()
				switch {
				case err == nil:
					f.ids[task.ID] = true
					f.longest = max(f.longest, time.Since(began))
				case ctx.Err() == nil && f.err == nil:
					f.err = err
				}
				f.mu.Unlock()
				select { // not a wait: the pace of the clients
				case <-time.After(20 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		})
	}
	t.Cleanup(func() { cancel(); running.Wait() })
	return func() {
		t.Helper()
		cancel()
		running.Wait()
		if f.err != nil {
			t.Fatal(f.err)
		}
		t.Logf("%d tasks accepted, the slowest after %v", len(f.ids), f.longest.Round(time.Millisecond))
		var slowest schemas.Task
		defer func() {
			if !t.Failed() {
				return
			}
			for id := range f.ids {
				t.Logf("%s\n%s", id, history(get(t, s, id)))
			}
		}()
		eventually(t, "all tasks completed", func() error {
			for id := range f.ids {
				task := get(t, s, id)
				switch {
				case task.State == schemas.Completed:
					delete(f.ids, id)
					if lifetime(task) > lifetime(slowest) {
						slowest = task
					}
				case task.State.Final():
					return harness.Fatal(fmt.Errorf("%s is %s (%s: %s)", id, task.State, task.Reason, task.Message))
				default:
					return fmt.Errorf("%d tasks are left, %s is %s", len(f.ids), id, task.State)
				}
			}
			return nil
		})
		t.Logf("the slowest ended after %v", lifetime(slowest))
		if lifetime(slowest) > 3*time.Second {
			t.Logf("%s\n%s", slowest.ID, history(slowest))
		}
	}
}

func history(t schemas.Task) string {
	var b strings.Builder
	for _, c := range t.History {
		fmt.Fprintf(&b, "  %s %s attempt %d by %s %s %s\n", c.At.Format("15:04:05.000"), c.State, c.Attempt, c.By, c.Worker, c.Note)
	}
	return b.String()
}

func lifetime(t schemas.Task) time.Duration { return t.Timings.Ended.Sub(t.Timings.Accepted) }

// leader names the process that leads a stream.
func leader(t testing.TB, s *harness.Site, c *bus.Conn, stream string) *harness.Process {
	t.Helper()
	var p *harness.Process
	eventually(t, stream+" has a leader", func() error {
		info, err := streamInfo(t.Context(), c, stream)
		if err != nil {
			return err
		}
		for i, n := range s.NATS {
			if fmt.Sprintf("n%d", i+1) == info.Cluster.Leader {
				p = n
				return nil
			}
		}
		return fmt.Errorf("nobody leads: %+v", info.Cluster)
	})
	return p
}

func streamInfo(ctx context.Context, c *bus.Conn, stream string) (*jetstream.StreamInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	st, err := c.JS.Stream(ctx, stream)
	if err != nil {
		return nil, err
	}
	return st.CachedInfo(), nil
}

// Three servers form, one is killed, clients go on, it comes back and catches up; then
// each is replaced in order, as an operator upgrades them.
func TestNATSServersDie(t *testing.T) {
	s := start(t, harness.SiteOptions{NATS: 3, Gateways: 2, Placers: 2, Reapers: 2, Agents: 2, Fake: true})
	c := connect(t, s, s.URLs())
	for _, a := range schemas.Assets(time.Hour) {
		name := a.Name
		if a.Bucket {
			name = bus.StreamOf(name)
		}
		info, err := streamInfo(t.Context(), c, name)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if info.Config.Replicas != 3 || len(info.Cluster.Replicas) != 2 {
			t.Errorf("%s is kept %d times", name, info.Config.Replicas)
		}
	}
	finish := traffick(t, s, 3)
	reads := readsAreFresh(t, s)
	for range 50 {
		create(t, s, spec("exit", "0"))
	}

	dead := leader(t, s, c, bus.StreamOf(schemas.BucketTasks))
	dead.Kill()
	t.Logf("killed %s", dead.Name)
	long := create(t, s, spec("sleep", "10m"))
	until(t, s, long.ID, schemas.Running)
	if err := dead.Start(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	if err := dead.Ready(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	current(t, c, bus.StreamOf(schemas.BucketTasks))

	for _, n := range s.NATS {
		if err := n.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := n.Start(within(t, patience)); err != nil {
			t.Fatal(err)
		}
		if err := n.Ready(within(t, patience)); err != nil {
			t.Fatal(err)
		}
		t.Logf("restarted %s", n.Name)
	}
	current(t, c, bus.StreamOf(schemas.BucketTasks))
	reads()
	finish()
	if now := get(t, s, long.ID); now.State != schemas.Running || now.Attempt != 1 {
		t.Errorf("the long task is %s in attempt %d", now.State, now.Attempt)
	}
}

// current waits until every replica of a stream has all of it.
func current(t testing.TB, c *bus.Conn, stream string) {
	t.Helper()
	eventually(t, stream+" is whole on every server", func() error {
		info, err := streamInfo(t.Context(), c, stream)
		if err != nil {
			return err
		}
		for _, r := range info.Cluster.Replicas {
			if !r.Current || r.Offline {
				return fmt.Errorf("%s is behind by %d", r.Name, r.Lag)
			}
		}
		return nil
	})
}

// readsAreFresh writes a key and reads it through every server after each write. What
// was written must be read, whatever happens to the servers meanwhile.
func readsAreFresh(t testing.TB, s *harness.Site) (stop func()) {
	t.Helper()
	table := func(url string) *bus.Table[schemas.Leadership] {
		return bus.NewTable(connect(t, s, url), schemas.BucketLeaders, bus.Codec[schemas.Leadership]{
			Encode: func(l schemas.Leadership) ([]byte, nats.Header, error) {
				b, err := schemas.Encode(l)
				return b, nil, err
			},
			Decode: func(b []byte) (l schemas.Leadership, err error) { return l, schemas.Decode(b, &l) },
		})
	}
	writer := table(s.URLs())
	var readers []*bus.Table[schemas.Leadership]
	for _, n := range s.NATS {
		readers = append(readers, table(n.Addrs.NATS))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		e, err := writer.Create(ctx, "probe", schemas.Leadership{Holder: "probe"}, "")
		for term := uint64(1); ctx.Err() == nil; term++ {
			if err != nil { // nothing is promised of it
				e, err = writer.Get(ctx, "probe")
				continue
			}
			for i, r := range readers {
				got, err := r.Get(ctx, "probe")
				if err == nil && got.Revision < e.Revision {
					t.Errorf("server %d gives revision %d after %d was written", i+1, got.Revision, e.Revision)
				}
			}
			e, err = writer.Replace(ctx, e, schemas.Leadership{Holder: "probe", Term: term}, "")
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	return func() { cancel(); running.Wait() }
}

// Whoever has no credential stays out, on every server; a new worker's own lets its
// agent in, although nobody has heard of it before.
func TestNewAgentNeedsOnlyItsCredential(t *testing.T) {
	s := start(t, harness.SiteOptions{NATS: 1, Fake: true})
	fresh, err := s.NewAgent(t.Context(), "never-heard-of")
	if err != nil {
		t.Fatal(err)
	}
	defer fresh.Kill()
	if err := fresh.Start(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	if err := fresh.Ready(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new worker is shown", func() error {
		return s.Call(t.Context(), 0, http.MethodGet, "/v1/workers/never-heard-of", nil, nil)
	})

	forged, err := s.NewAgent(t.Context(), "forged")
	if err != nil {
		t.Fatal(err)
	}
	for i, a := range forged.Args {
		if a == "--credentials" {
			if err := os.WriteFile(forged.Args[i+1], []byte(`{"worker": "forged", "token": "guessed"}`), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := forged.Start(within(t, patience)); err == nil {
		eventually(t, "the forged one ends", func() error {
			if forged.Running() {
				return errors.New("it runs")
			}
			return nil
		})
	}
	if err := s.Call(t.Context(), 0, http.MethodGet, "/v1/workers/forged", nil, nil); err == nil {
		t.Error("the forged worker is shown")
	}
}
