//go:build faults

package faults

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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

// The times of beats, leases and fences, in the proportion of production. Elections of
// NATS servers do not get shorter with them.
const (
	scale = 0.15
	lease = time.Duration(scale * float64(30*time.Second))
	fence = time.Duration(scale * float64(75*time.Second))
)

// number reads an environment variable.
func number(t *testing.T, name string, otherwise float64) float64 {
	v := os.Getenv(name)
	if v == "" {
		return otherwise
	}
	n, err := strconv.ParseFloat(v, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// TestFaults runs for MINUTES (of faults; the short form is one and a half) by SEED, and
// by the seeds after it until it has had SEEDS. The history of a run that failed stays,
// and that of any with HISTORY=folder.
func TestFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes minutes")
	}
	seed := uint64(number(t, "SEED", float64(rand.IntN(1e6))))
	minutes := number(t, "MINUTES", 1.5)
	binary, clock := os.Getenv("MUTANT_BINARY"), os.Getenv("MUTANT_BINARY")
	if binary == "" {
		var err error
		if binary, err = harness.Binaries(t.Context(), t.TempDir()); err != nil {
			t.Fatal(err)
		}
		clock = filepath.Join(filepath.Dir(binary), "dayfly-clock") // an agent looks for init beside it
		o := harness.Overlay{}
		if err := errors.Join(o.Clock(t.Context()), o.Build(t.Context(), clock)); err != nil {
			t.Fatal(err)
		}
	}
	var all Result
	for n := range uint64(number(t, "SEEDS", 1)) {
		t.Run(fmt.Sprint(seed+n), func(t *testing.T) {
			t.Logf("make faults SEED=%d MINUTES=%g", seed+n, minutes)
			r := run(t, seed+n, time.Duration(minutes*float64(time.Minute)), binary, clock)
			for _, v := range r.Violations {
				t.Error(v)
			}
			if r.Accepted == 0 {
				t.Error("no task was accepted")
			}
			all.Add(r)
		})
	}
	var table strings.Builder
	all.Print(&table)
	t.Log("\n" + table.String())
}

// run lets clients and faults at a site of its own for some time, and judges it.
func run(t *testing.T, seed uint64, length time.Duration, binary, clock string) Result {
	rng := func(n uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, n)) }

	dir, err := os.MkdirTemp(os.Getenv("HISTORY"), fmt.Sprintf("dayfly-faults-%d-", seed))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !t.Failed() && os.Getenv("HISTORY") == "" {
			os.RemoveAll(dir)
			return
		}
		t.Logf("history and logs: %s", dir)
	})
	var h *hosts
	if binary != clock { // a mutant shows itself without hosts, and sooner
		h = newHosts(t, rng(4))
	}
	o := harness.SiteOptions{Bin: binary, NATS: 3, Gateways: 2, Placers: 2, Reapers: 2, Agents: 3, Scale: scale, Fake: true, AgentArgs: []string{"--worker-label", fakeEngine}}
	if h != nil {
		o.Host = h.network.Host
	}
	s, err := harness.NewSite(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, p := range s.All() {
			p.Kill()
			_ = os.WriteFile(filepath.Join(dir, p.Name+".log"), []byte(p.Log()), 0o600)
		}
		for _, w := range workers(s) {
			b, _ := os.ReadFile(s.FakeJournal(w))
			_ = os.WriteFile(filepath.Join(dir, w+".host"), b, 0o600)
		}
		if h != nil {
			_ = os.WriteFile(filepath.Join(dir, "dockerd.log"), []byte(h.docker.Log()), 0o600)
			h.leave(t, s)
		}
		if err := s.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	begin, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := s.Start(begin); err != nil {
		t.Fatal(err)
	}
	if h != nil {
		h.join(t, s)
	}

	path := filepath.Join(dir, "history.jsonl")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	out := bufio.NewWriter(file)
	rec := NewRecorder(out)
	now := Now()
	rec.Add(now, Event{Run: &Run{Seed: seed, Lease: lease, Fence: fence, Epoch: time.Now().Add(-now)}})
	c := observe(t, s, rec)

	traffic, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var clients, lanes, managers sync.WaitGroup
	var all []*client
	for i := range 4 {
		one := &client{name: fmt.Sprintf("c%d", i+1), site: s, rec: rec, rng: rng(uint64(10 + i)), run: fmt.Sprint(seed), hosts: h}
		all = append(all, one)
		clients.Go(func() { one.drive(traffic) })
	}
	in := &injector{rec: rec, site: s, clock: clock, fence: fence, hosts: h, log: t.Logf}
	units, parts := manned(s)
	managing, unmanage := context.WithCancel(t.Context())
	defer func() { unmanage(); managers.Wait() }()
	managers.Go(func() { in.manage(managing, units) })
	var early []Violation
	if binary == clock { // a mutant
		lanes.Go(func() { early = hasty(traffic, t, s, rec); cancel() })
	}
	for i, name := range []string{"agents", "services", "nats", "all", "hosts"} {
		if len(parts[name]) == 0 {
			continue
		}
		lanes.Go(func() {
			if err := in.lane(traffic, name, parts[name], rng(uint64(i))); err != nil {
				t.Error(err)
			}
		})
	}
	lanes.Go(func() {
		if err := in.copies(traffic, c, rng(9)); err != nil {
			t.Error(err)
		}
	})
	lanes.Wait()
	clients.Wait()
	if len(early) > 0 {
		return Result{Violations: early, Accepted: 1}
	}

	// What is left of the longest task, of a queue, of an election, and two fences.
	within := 2*fence + 50*time.Second
	healed := Now()
	rec.Add(healed, Event{Healed: &Healed{Within: within}})
	settle(t, rec, all[0], healed+within)
	if h != nil {
		h.empty(t, s, healed+within)
		for _, e := range h.witness.lives() {
			rec.Add(e.T, e)
		}
	}
	unmanage()
	managers.Wait()
	for _, e := range lives(t, s) {
		rec.Add(e.T, e)
	}
	_, err = rec.History()
	if err == nil {
		err = out.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	return judge(t, path)
}

// hasty looks, until ctx ends, for a violation that nothing which comes later can undo.
func hasty(ctx context.Context, t *testing.T, s *harness.Site, rec *Recorder) []Violation {
	// Not AfterFinal: a clock that is off is in the history only once it is right again. Not
	// FinalChanged: the observer may be behind the answers.
	sure := []Rule{StartedTwice, Overlap, Unguarded, IllegalStep, Doubled, StaleRead, CancelIgnored}
	for ; ctx.Err() == nil; sleep(ctx, 3*time.Second) {
		history, _ := rec.History()
		found := slices.DeleteFunc(Check(append(history, lives(t, s)...)).Violations, func(v Violation) bool { return !slices.Contains(sure, v.Rule) })
		if len(found) > 0 {
			return found
		}
	}
	return nil
}

// lives reads the journals of all hosts.
func lives(t *testing.T, s *harness.Site) (list []Event) {
	for _, w := range workers(s) {
		f, err := os.Open(s.FakeJournal(w))
		if errors.Is(err, os.ErrNotExist) {
			continue // a real host
		}
		if err != nil {
			t.Fatal(err)
		}
		one, err := ReadLives(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, one...)
	}
	return list
}

// judge judges a history file.
func judge(t *testing.T, path string) Result {
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	history, err := Read(f)
	if err != nil {
		t.Fatal(err)
	}
	result := Check(history)
	var table strings.Builder
	result.Print(&table)
	t.Log("\n" + table.String())
	return result
}

// TestCheckAgain judges a history that a run has left: HISTORY is its file.
func TestCheckAgain(t *testing.T) {
	path := os.Getenv("HISTORY")
	if info, err := os.Stat(path); err != nil || info.IsDir() {
		t.Skip("HISTORY is no file")
	}
	for _, v := range judge(t, path).Violations {
		t.Error(v)
	}
}

func workers(s *harness.Site) (list []string) {
	for _, p := range s.Agent {
		list = append(list, strings.TrimPrefix(p.Name, "agent-"))
	}
	return list
}

func manned(s *harness.Site) (all []*unit, parts map[string][][]*unit) {
	parts = map[string][][]*unit{}
	add := func(part string, list []*harness.Process) {
		var group []*unit
		for _, p := range list {
			group = append(group, &unit{Process: p, worker: strings.TrimPrefix(p.Name, "agent-")})
		}
		all = append(all, group...)
		parts[part] = append(parts[part], group)
	}
	add("agents", s.Agent[:3])
	if len(s.Agent) > 3 {
		add("hosts", s.Agent[3:])
	}
	add("services", s.Gateway)
	add("services", s.Placer)
	add("services", s.Reaper)
	add("nats", s.NATS)
	parts["all"] = [][]*unit{all}
	return all, parts
}

// observe records every revision of a record, and every write that is no
// compare-and-set, until the test ends.
func observe(t *testing.T, s *harness.Site, rec *Recorder) *bus.Conn {
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
	c, err := bus.Connect(t.Context(), bus.Config{Name: "observer", URL: s.URLs(), User: natsd.CoreUser, Password: secrets.Core, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	view := bus.NewView(c, schemas.BucketTasks, func(_ string, _ nats.Header, data []byte) (r schemas.Record, err error) {
		return r, schemas.Decode(data, &r)
	}, bus.ViewOptions[schemas.Record]{OnChange: func(ch bus.Change[schemas.Record]) {
		rev := &Rev{Task: schemas.TaskID(ch.Key), Revision: ch.Revision, Deleted: ch.Deleted}
		if !ch.Deleted {
			rev.Record = &ch.New
		}
		rec.Add(Now(), Event{Rev: rev})
	}})
	prefix := "$KV." + schemas.BucketTasks + "."
	_, err = c.NC.Subscribe(prefix+">", func(m *nats.Msg) {
		if m.Header.Get(jetstream.ExpectedLastSubjSeqHeader) == "" {
			rec.Add(Now(), Event{Write: &Write{Task: schemas.TaskID(strings.TrimPrefix(m.Subject, prefix))}})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := view.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait(); c.Close() })
	return c
}

// settle waits until every task that any client was told of, and every other that
// there is, is final, and until no attempt is left on a host; both gateways must know
// all tasks then, and show their logs.
func settle(t *testing.T, rec *Recorder, c *client, until time.Duration) {
	told, records := map[schemas.TaskID]bool{}, map[schemas.TaskID]*schemas.Record{}
	waiting := func() error {
		history, _ := rec.History()
		for _, e := range history {
			switch {
			case e.Rev != nil && e.Rev.Record != nil:
				records[e.Rev.Task] = e.Rev.Record
			case e.Op != nil && e.Op.Name == "create" && e.Op.Outcome == OK:
				told[e.Op.Task] = true
			}
		}
		for id := range told {
			if records[id] == nil {
				return fmt.Errorf("%s has no record", id)
			}
		}
		for id, r := range records {
			if !r.State.Final() {
				return fmt.Errorf("%s is %s", id, r.State)
			}
		}
		alive := map[schemas.Assignment]bool{}
		for _, e := range lives(t, c.site) {
			if e.Life.Do == "start" {
				alive[e.Life.Assignment] = true
			} else {
				delete(alive, e.Life.Assignment)
			}
		}
		for a := range alive {
			return fmt.Errorf("%s lives", a)
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), until-Now())
	defer cancel()
	if err := harness.Poll(ctx, waiting); err != nil {
		t.Log(err) // the checker says what it means
	}
	for g := range c.site.Gateway {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		err := harness.Poll(ctx, func() error {
			return harness.Call(ctx, http.MethodGet, c.site.Gateway[g].Addrs.HTTP+"/v1/workers", "", nil, nil)
		})
		cancel()
		if err != nil {
			t.Errorf("gateway %d: %v", g+1, err)
		}
		listed := map[schemas.TaskID]bool{}
		for _, id := range c.list(g).Tasks {
			listed[id] = true
		}
		for id := range told {
			if !listed[id] {
				t.Errorf("gateway %d does not list %s", g+1, id)
			}
			c.get(id, g)
		}
	}
	for id, r := range records {
		if len(r.Spec.Command) == 0 || r.Spec.Command[0] != "log" || r.Attempt == 0 || r.Logs == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		if err := harness.Poll(ctx, func() error { return c.log(ctx, r, c.gateway()) }); err != nil {
			t.Errorf("log of %s: %v", id, err)
		}
		cancel()
	}
}
