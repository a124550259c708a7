package placer

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"dayfly.dev/schemas"
)

var t0 = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

const gib = schemas.Size(1 << 30)

func host(cpus schemas.CPUs, memory schemas.Size, slots int) schemas.Host {
	return schemas.Host{OS: "linux", Arch: "amd64", CPUs: cpus, Memory: memory, Slots: slots}
}

func beat(id string, h schemas.Host) schemas.Beat {
	return schemas.Beat{Worker: schemas.WorkerID(id), Epoch: "e1", Host: h}
}

// ask is a queued record as the view shows it. mods change it.
func ask(n int, mods ...func(*queued, *seen)) (schemas.TaskID, seen) {
	s := seen{
		state: schemas.Queued, need: need{resources: resourcesOf(schemas.Resources{CPUs: 0.5, Memory: gib / 4})},
		queued: &queued{accepted: t0.Add(time.Duration(n) * time.Millisecond), priority: 5, image: "busybox"},
	}
	for _, m := range mods {
		m(s.queued, &s)
	}
	s.queued.labels = canonical(s.queued.constraints)
	return schemas.TaskID(fmt.Sprintf("t-%026d", n)), s
}

func needs(cpus schemas.CPUs, memory schemas.Size) func(*queued, *seen) {
	return func(_ *queued, s *seen) {
		s.need.resources = resourcesOf(schemas.Resources{CPUs: cpus, Memory: memory})
	}
}

func priority(p int) func(*queued, *seen) { return func(q *queued, _ *seen) { q.priority = p } }

func heldBy(w schemas.WorkerID, s seen) seen {
	return seen{state: schemas.Assigned, worker: w, need: s.need}
}

func testBook(policy Policy) *book {
	cfg := DefaultConfig()
	cfg.Policy = policy
	return newBook(cfg)
}

// place makes every decision there is and lets the view show it.
func place(b *book, now time.Time) (list []decision) {
	for {
		d, ok := b.next(now, nil)
		if !ok {
			return list
		}
		list = append(list, d)
		settle(b, d, now)
	}
}

func settle(b *book, d decision, now time.Time) {
	need := b.tasks[d.task].need
	b.wrote(d, written, d.revision+1, now)
	b.changed(d.task, seen{state: schemas.Assigned, worker: d.worker, need: need}, d.revision+1, now)
}

func TestScoresMatchTheHandComputed(t *testing.T) {
	f := newFleet(time.Minute)
	f.beat(beat("a", host(4, 8*gib, 10)), t0)
	f.beat(beat("b", host(4, 8*gib, 10)), t0)
	a := f.get("a")
	f.take("a", need{resources: resourcesOf(schemas.Resources{CPUs: 1, Memory: 2 * gib})})
	s := &shape{shapeKey: shapeKey{need: resourcesOf(schemas.Resources{CPUs: 1, Memory: 2 * gib}), image: "busybox"}}
	// After it: 2 of 4 CPUs, 4 of 8 GiB, 2 of 10 slots.
	near(t, "weighted", weighted(f, a, s), 0.5*0.5+0.3*0.5+0.2*0.2)
	// N = 2: 2^0.5 - 2^0.25 for CPU and for memory, 2^0.2 - 2^0.1 for slots.
	near(t, "epvm", epvm(f, a, s), 2*(math.Pow(2, 0.5)-math.Pow(2, 0.25))+math.Pow(2, 0.2)-math.Pow(2, 0.1))
	a.imageSet = map[string]struct{}{"busybox": {}}
	near(t, "weighted with the image", weighted(f, a, s), 0.44-0.05)
	near(t, "an empty worker", weighted(f, f.get("b"), s), 0.5*0.25+0.3*0.25+0.2*0.1)
}

// A worker that says it has more images than a beat may name is believed as many.
func TestAWorkersImagesAreBounded(t *testing.T) {
	f, b := newFleet(time.Minute), beat("a", host(4, 8*gib, 10))
	for n := range 4 * schemas.MaxBeatImages {
		b.Images = append(b.Images, fmt.Sprintf("image:%d", n))
	}
	f.beat(b, t0)
	if a := f.get("a"); len(a.imageSet) != schemas.MaxBeatImages || !a.hasImage("image:0") {
		t.Errorf("%d are remembered", len(a.imageSet))
	}
}

func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if math.Abs(got-want) > 1e-12 {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

func TestPoliciesChoose(t *testing.T) {
	for policy, want := range map[Policy]string{
		// a is half as large as b and c: its first task costs what their second does.
		Weighted:   "b c a b c b",
		RoundRobin: "a b c a b c",
		// N = 3: the first task costs 0.387 on a; on b 0.182, then 0.205, then 0.231.
		EPVM: "b c b c b c",
	} {
		t.Run(string(policy), func(t *testing.T) {
			b := testBook(policy)
			b.fleet.beat(beat("a", host(2, 4*gib, 0)), t0)
			b.fleet.beat(beat("b", host(4, 8*gib, 0)), t0)
			b.fleet.beat(beat("c", host(4, 8*gib, 0)), t0)
			for n := range 6 {
				id, s := ask(n)
				b.changed(id, s, 1, t0)
			}
			var got []string
			for _, d := range place(b, t0) {
				got = append(got, string(d.worker))
			}
			if g := strings.Join(got, " "); g != want {
				t.Errorf("chose %s, want %s", g, want)
			}
		})
	}
}

func TestFiltersRefuseAndExplain(t *testing.T) {
	full := func(w *worker) { w.used, w.tasks = resources{cpus: 2e9, memory: int64(4 * gib)}, 2 }
	for name, c := range map[string]struct {
		worker func(*worker)
		task   func(*queued, *seen)
		filter string
		says   string
	}{
		"lost":                       {worker: func(w *worker) { w.lost = true }, filter: "lost", says: "register"},
		"silent":                     {worker: func(w *worker) { w.seen = t0.Add(-42 * time.Second) }, filter: "silent", says: "no beat for 42s"},
		"draining":                   {worker: func(w *worker) { w.draining = true }, filter: "draining", says: "nothing new"},
		"another architecture":       {task: constrained("arch", "arm64"), filter: "arch", says: "asks for arm64, it is amd64"},
		"a label of another value":   {task: constrained("zone", "b"), filter: "constraints", says: "asks the label zone=b, it has zone=a"},
		"a label that is not there":  {task: constrained("disk", "ssd"), filter: "constraints", says: "no such label"},
		"a kind":                     {worker: func(w *worker) { w.host.Kinds = []string{"python"} }, task: func(q *queued, _ *seen) { q.kind = "judge" }, filter: "kind", says: "judge"},
		"registry credentials":       {task: func(q *queued, _ *seen) { q.credentials = "team-a" }, filter: "credentials", says: `no registry credentials "team-a"`},
		"a worker that gave it back": {task: func(q *queued, _ *seen) { q.avoid = []avoid{{"w", time.Minute}} }, filter: "avoid", says: "gave the task back"},
		"GPUs":                       {task: func(_ *queued, s *seen) { s.need.gpus = 2 }, filter: "gpus", says: "asks 2 GPUs, 1 of 1 are free"},
		"slots":                      {worker: func(w *worker) { w.tasks = 3 }, filter: "slots", says: "all 3 slots"},
		"cpus":                       {worker: full, filter: "cpus", says: "asks 0.5 CPUs, 0 of 2 are free"},
		"memory":                     {task: needs(0.5, 5*gib), filter: "memory", says: "asks 5GiB memory, 4GiB of 4GiB is free"},
	} {
		t.Run(name, func(t *testing.T) {
			b := testBook(Weighted)
			h := host(2, 4*gib, 3)
			h.Labels, h.GPUs = map[string]string{"zone": "a"}, 1
			b.fleet.beat(beat("w", h), t0)
			if c.worker != nil {
				c.worker(b.fleet.get("w"))
			}
			mods := []func(*queued, *seen){}
			if c.task != nil {
				mods = append(mods, c.task)
			}
			id, s := ask(1, mods...)
			b.changed(id, s, 1, t0)
			if list := place(b, t0); len(list) != 0 {
				t.Fatalf("placed on %s", list[0].worker)
			}
			y := b.why(id, t0)
			if len(y.Workers) != 1 || y.Workers[0].Filter != c.filter || !strings.Contains(y.Workers[0].Detail, c.says) {
				t.Errorf("explained by %+v, want filter %s saying %q", y.Workers, c.filter, c.says)
			}
			if y.Position != 1 || y.Summary == "" {
				t.Errorf("position %d, summary %q", y.Position, y.Summary)
			}
		})
	}
}

func constrained(k, v string) func(*queued, *seen) {
	return func(q *queued, _ *seen) { q.constraints = map[string]string{k: v} }
}

func TestWhyInOneSentence(t *testing.T) {
	b := testBook(Weighted)
	id, s := ask(1, needs(1, 4*gib))
	b.changed(id, s, 1, t0)
	place(b, t0)
	says(t, b, id, "no worker is there yet: start an agent")

	for i, free := range []float64{1.0, 2.1, 2, 1.5, 1.7} {
		w := fmt.Sprintf("wrk-%02d", i+1)
		b.fleet.beat(beat(w, host(8, 8*gib, 0)), t0)
		b.fleet.take(schemas.WorkerID(w), need{resources: resources{memory: int64(8*gib) - int64(free*float64(gib))}})
	}
	b.fleet.drain("wrk-04", true)
	b.fleet.drain("wrk-05", true)
	place(b, t0)
	says(t, b, id, "waits for memory: asks 4GiB, the most free is 2.1GiB on wrk-02 (2 of 5 are draining)")

	big, s := ask(2, needs(1, 64*gib))
	b.changed(big, s, 1, t0)
	says(t, b, big, "no worker is large enough: asks 64GiB memory, the largest has 8GiB (wrk-01) (2 of 5 are draining)")

	back, s := ask(3, func(q *queued, _ *seen) { q.wait, q.note = 3*time.Second, "worker wrk-02 has no free slot" })
	b.changed(back, s, 1, t0)
	says(t, b, back, "is tried again in 3s; tried before: worker wrk-02 has no free slot")
	if y := b.why("t-unknown", t0); y.Position != 0 || !strings.Contains(y.Summary, "not in the queue") {
		t.Errorf("an unknown task: %+v", y)
	}
}

func says(t *testing.T, b *book, id schemas.TaskID, want string) {
	t.Helper()
	if y := b.why(id, t0); y.Summary != want {
		t.Errorf("says %q\nwant %q", y.Summary, want)
	}
}

func TestPriorityThenFirstComeFirstServed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := testBook(Weighted)
		type entry struct{ n, priority int }
		var all []entry
		for _, n := range rapid.Permutation(slices.Collect(maps.Keys(map[int]bool{1: true, 2: true, 3: true, 4: true, 5: true, 6: true, 7: true, 8: true}))).Draw(t, "order") {
			e := entry{n, rapid.IntRange(1, 9).Draw(t, "priority")}
			id, s := ask(e.n, priority(e.priority), needs(schemas.CPUs(rapid.IntRange(1, 2).Draw(t, "cpus"))/2, gib))
			b.changed(id, s, uint64(e.n), t0)
			all = append(all, e)
		}
		gone := rapid.IntRange(1, 8).Draw(t, "gone")
		id, _ := ask(gone)
		b.changed(id, seen{state: schemas.Canceled}, 100, t0)
		all = slices.DeleteFunc(all, func(e entry) bool { return e.n == gone })
		slices.SortFunc(all, func(a, b entry) int {
			if a.priority != b.priority {
				return b.priority - a.priority
			}
			return a.n - b.n
		})
		for i, e := range all {
			id, _ := ask(e.n)
			if y := b.why(id, t0); y.Position != i+1 {
				t.Fatalf("task %d is at %d, want %d", e.n, y.Position, i+1)
			}
		}
		b.fleet.beat(beat("w", host(100, 100*gib, 0)), t0)
		for i, d := range place(b, t0) {
			if want, _ := ask(all[i].n); d.task != want {
				t.Fatalf("placed %s as number %d, want %s", d.task, i, want)
			}
		}
	})
}

func TestALargeTaskNeitherBlocksNorStarves(t *testing.T) {
	b := testBook(Weighted)
	b.fleet.beat(beat("w1", host(4, 4*gib, 0)), t0)
	b.fleet.beat(beat("w2", host(1, 1*gib, 0)), t0)
	id0, s0 := ask(0, needs(2, 2*gib))
	b.changed(id0, s0, 1, t0)
	place(b, t0) // on w1
	large, s := ask(1, needs(4, 4*gib))
	b.changed(large, s, 1, t0)
	small, s2 := ask(2, needs(1, gib))
	b.changed(small, s2, 1, t0)
	if list := place(b, t0); len(list) != 1 || list[0].task != small {
		t.Fatalf("the small task behind it should be placed, got %v", list)
	}

	now := t0.Add(b.cfg.HoldAfter + time.Second)
	b.fleet.awake(now)
	place(b, now)
	next, s3 := ask(3, needs(1, gib))
	b.changed(next, s3, 1, now)
	if list := place(b, now); len(list) != 1 || list[0].worker != "w2" {
		t.Fatalf("w1 should be held back and w2 taken, got %+v", list)
	}
	waits, s4 := ask(4, needs(1, gib))
	b.changed(waits, s4, 1, now)
	if list := place(b, now); len(list) != 0 {
		t.Fatalf("nothing should be placed, got %+v", list)
	}
	if y := b.why(waits, now); !strings.Contains(y.Summary, "w1 is kept free for "+string(large)) {
		t.Errorf("says %q", y.Summary)
	}
	urgent, s5 := ask(5, needs(1, gib), priority(9))
	b.changed(urgent, s5, 1, now)
	if list := place(b, now); len(list) != 1 || list[0].task != urgent {
		t.Fatalf("a higher priority should pass, got %+v", list)
	}
	b.changed(urgent, seen{state: schemas.Completed}, 9, now)
	b.changed(small, seen{state: schemas.Completed}, 9, now)
	b.changed(id0, seen{state: schemas.Completed}, 9, now)
	if list := place(b, now); len(list) == 0 || list[0].task != large {
		t.Fatalf("the large task should have its turn, got %+v", list)
	}
	if len(b.holds) != 0 {
		t.Error("a hold is left")
	}
}

func TestNoHoldForWhatCanNeverFit(t *testing.T) {
	b := testBook(Weighted)
	b.fleet.beat(beat("w", host(4, 4*gib, 0)), t0)
	huge, s := ask(1, needs(64, gib))
	b.changed(huge, s, 1, t0)
	now := t0.Add(2 * b.cfg.HoldAfter)
	b.fleet.awake(now)
	place(b, now)
	small, s2 := ask(2)
	b.changed(small, s2, 1, now)
	if list := place(b, now); len(list) != 1 || list[0].task != small {
		t.Fatalf("placed %v", list)
	}
}

func TestAGivenBackTaskRestsAndAvoidsItsWorker(t *testing.T) {
	b := testBook(Weighted)
	b.fleet.beat(beat("w", host(4, 4*gib, 0)), t0)
	id, s := ask(1, func(q *queued, _ *seen) { q.wait, q.avoid = time.Second, []avoid{{"w", 30 * time.Second}} })
	b.changed(id, s, 1, t0)
	for _, c := range []struct {
		after  time.Duration
		places int
	}{{0, 0}, {2 * time.Second, 0}, {29 * time.Second, 0}, {30 * time.Second, 1}} {
		if list := place(b, t0.Add(c.after)); len(list) != c.places {
			t.Errorf("after %s %d were placed, want %d", c.after, len(list), c.places)
		}
	}
}

func TestASilentWorkerTakesNothingUntilItsNextBeat(t *testing.T) {
	b := testBook(Weighted)
	b.fleet.beat(beat("w", host(4, 4*gib, 0)), t0)
	id, s := ask(1)
	now := t0.Add(31 * time.Second)
	b.changed(id, s, 1, now)
	if list := place(b, now); len(list) != 0 {
		t.Fatal("placed on a silent worker")
	}
	b.fleet.beat(beat("w", host(4, 4*gib, 0)), now)
	if list := place(b, now); len(list) != 1 {
		t.Fatal("not placed after its beat")
	}
}

func TestWritesThatAreOvertaken(t *testing.T) {
	setup := func() (*book, decision, seen) {
		b := testBook(Weighted)
		b.fleet.beat(beat("w1", host(4, 4*gib, 0)), t0)
		b.fleet.beat(beat("w2", host(2, 2*gib, 0)), t0)
		id, s := ask(1)
		b.changed(id, s, 1, t0)
		d, ok := b.next(t0, nil)
		if !ok || d.worker != "w1" {
			t.Fatalf("chose %+v", d)
		}
		return b, d, s
	}
	used := func(b *book, w schemas.WorkerID) int { return b.fleet.get(w).tasks }

	t.Run("another placer was quicker", func(t *testing.T) {
		b, d, s := setup()
		b.changed(d.task, heldBy("w2", s), 2, t0)
		b.wrote(d, overtaken, 2, t0)
		if used(b, "w1") != 0 || used(b, "w2") != 1 {
			t.Error("it should count on w2 alone")
		}
		if list := b.orphans(t0, 10); len(list) != 1 {
			t.Error("its order may not have been sent, so it should be sent again")
		}
	})
	t.Run("another placer was quicker and the view is late", func(t *testing.T) {
		b, d, s := setup()
		b.wrote(d, overtaken, 2, t0)
		if _, ok := b.next(t0.Add(time.Hour), nil); ok {
			t.Error("chosen again from a record that is known to be old")
		}
		b.changed(d.task, heldBy("w2", s), 2, t0)
		if used(b, "w1") != 0 || used(b, "w2") != 1 {
			t.Error("it should count on w2 alone")
		}
	})
	t.Run("the write failed", func(t *testing.T) {
		b, d, _ := setup()
		b.wrote(d, failed, 0, t0)
		if used(b, "w1") != 0 {
			t.Error("the promise should be taken back")
		}
		if _, ok := b.next(t0.Add(time.Second), nil); !ok {
			t.Error("it should be tried again")
		}
	})
	t.Run("the write failed and was done after all", func(t *testing.T) {
		b, d, s := setup()
		b.wrote(d, failed, 0, t0)
		b.changed(d.task, heldBy("w1", s), 2, t0)
		if list := b.orphans(t0, 10); len(list) != 1 {
			t.Error("its order should be sent")
		}
	})
	for name, viewFirst := range map[string]bool{"the view is quicker than the answer": true, "the answer is quicker than the view": false} {
		t.Run(name, func(t *testing.T) {
			b, d, s := setup()
			if viewFirst {
				b.changed(d.task, heldBy("w1", s), 2, t0)
			}
			b.wrote(d, written, 2, t0)
			if !viewFirst {
				b.changed(d.task, heldBy("w1", s), 2, t0)
			}
			if list := b.orphans(t0, 10); len(list) != 0 {
				t.Error("its order was sent already")
			}
		})
	}
	t.Run("it was given back before the answer came", func(t *testing.T) {
		b, d, s := setup()
		b.changed(d.task, heldBy("w1", s), 2, t0)
		again := *s.queued
		again.attempt = 1
		s.queued = &again
		b.changed(d.task, s, 3, t0)
		b.wrote(d, written, 2, t0)
		if used(b, "w1") != 0 {
			t.Error("the promise should be taken back")
		}
		if _, ok := b.next(t0, nil); !ok {
			t.Error("it should be placed again")
		}
	})
	t.Run("it was extended before the answer came", func(t *testing.T) {
		b, d, s := setup()
		b.changed(d.task, s, 2, t0)
		b.wrote(d, written, 3, t0)
		if _, ok := b.next(t0, nil); ok {
			t.Error("it is placed already")
		}
		b.changed(d.task, heldBy("w1", s), 3, t0)
		if used(b, "w1") != 1 {
			t.Error("it should count once")
		}
	})
	t.Run("it was canceled before the answer came", func(t *testing.T) {
		b, d, _ := setup()
		b.changed(d.task, seen{state: schemas.Canceled}, 2, t0)
		b.wrote(d, overtaken, 2, t0)
		if used(b, "w1") != 0 || len(b.tasks) != 0 {
			t.Error("nothing should be left of it")
		}
	})
}

// TestNeverMoreThanThereIs drives the book with anything that may happen in any
// order. After each step no worker is promised more than it has, what is promised is
// exactly what its tasks need, and whoever waits has an explanation.
func TestNeverMoreThanThereIs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := testBook(rapid.SampledFrom([]Policy{Weighted, RoundRobin, EPVM}).Draw(t, "policy"))
		now, revision, made := t0, uint64(0), 0
		asked := map[schemas.TaskID]seen{}
		inFlight := map[schemas.TaskID]decision{}
		workers := []string{"a", "b", "c"}
		hosts := map[string]schemas.Host{"a": host(2, 2*gib, 3), "b": host(1, 4*gib, 0), "c": host(4, gib, 8)}
		pick := func(t *rapid.T, m map[schemas.TaskID]seen, state schemas.State) (schemas.TaskID, bool) {
			var ids []schemas.TaskID
			for id := range m {
				if x := b.tasks[id]; x != nil && (state == "" || x.state == state) {
					ids = append(ids, id)
				}
			}
			if len(ids) == 0 {
				return "", false
			}
			slices.Sort(ids)
			return rapid.SampledFrom(ids).Draw(t, "task"), true
		}
		t.Repeat(map[string]func(*rapid.T){
			"create": func(t *rapid.T) {
				made++
				revision++
				id, s := ask(made, priority(rapid.IntRange(4, 6).Draw(t, "priority")),
					needs(schemas.CPUs(rapid.SampledFrom([]float64{0.25, 0.5, 1, 2, 5}).Draw(t, "cpus")), rapid.SampledFrom([]schemas.Size{gib / 4, gib, 3 * gib}).Draw(t, "memory")))
				if rapid.IntRange(0, 4).Draw(t, "constrained") == 0 {
					constrained("arch", "arm64")(s.queued, &s)
					s.queued.labels = canonical(s.queued.constraints)
				}
				asked[id] = s
				b.changed(id, s, revision, now)
			},
			"beat": func(t *rapid.T) {
				w := rapid.SampledFrom(workers).Draw(t, "worker")
				x := beat(w, hosts[w])
				x.Epoch = schemas.Epoch(rapid.SampledFrom([]string{"e1", "e2"}).Draw(t, "epoch"))
				if rapid.IntRange(0, 5).Draw(t, "lost") == 0 {
					x.LostAt = now
				}
				b.fleet.beat(x, now)
			},
			"drain": func(t *rapid.T) {
				b.fleet.drain(schemas.WorkerID(rapid.SampledFrom(workers).Draw(t, "worker")), rapid.Bool().Draw(t, "on"))
			},
			"gone": func(t *rapid.T) {
				b.fleet.gone(schemas.WorkerID(rapid.SampledFrom(workers).Draw(t, "worker")))
			},
			"choose": func(t *rapid.T) {
				if d, ok := b.next(now, nil); ok {
					inFlight[d.task] = d
				}
			},
			"write ends": func(t *rapid.T) {
				ids := slices.Sorted(maps.Keys(inFlight))
				if len(ids) == 0 {
					return
				}
				d := inFlight[rapid.SampledFrom(ids).Draw(t, "task")]
				delete(inFlight, d.task)
				switch o := rapid.SampledFrom([]outcome{written, written, overtaken, failed}).Draw(t, "outcome"); {
				case o != written:
					b.wrote(d, o, 0, now)
				case b.tasks[d.task] != nil && b.tasks[d.task].revision == d.revision:
					revision++
					if rapid.Bool().Draw(t, "the view is quicker") {
						b.changed(d.task, heldBy(d.worker, asked[d.task]), revision, now)
						b.wrote(d, written, revision, now)
					} else {
						b.wrote(d, written, revision, now)
						b.changed(d.task, heldBy(d.worker, asked[d.task]), revision, now)
					}
				default:
					b.wrote(d, overtaken, 0, now)
				}
			},
			"end": func(t *rapid.T) {
				if id, ok := pick(t, asked, ""); ok {
					revision++
					b.changed(id, seen{state: schemas.Completed}, revision, now)
				}
			},
			"give back": func(t *rapid.T) {
				if id, ok := pick(t, asked, schemas.Assigned); ok {
					revision++
					s, q := asked[id], *asked[id].queued
					q.attempt++
					q.wait = 200 * time.Millisecond
					q.avoid = []avoid{{b.tasks[id].worker, 30 * time.Second}}
					s.queued = &q
					asked[id] = s
					b.changed(id, s, revision, now)
				}
			},
			"time passes": func(t *rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(1, 70_000).Draw(t, "ms")) * time.Millisecond)
			},
			"": func(t *rapid.T) {
				promised := map[schemas.WorkerID]resources{}
				counts := map[schemas.WorkerID]int{}
				for id, x := range b.tasks {
					if x.worker != "" {
						p := promised[x.worker]
						p.cpus, p.memory, p.gpus = p.cpus+x.need.cpus, p.memory+x.need.memory, p.gpus+x.need.gpus
						promised[x.worker] = p
						counts[x.worker]++
					}
					if x.phase == waiting && x.shape == nil || x.phase != waiting && x.shape != nil {
						t.Fatalf("%s is in phase %d and in a queue: %v", id, x.phase, x.shape != nil)
					}
					if x.phase == waiting && x.shape.blocked {
						if n := len(b.fleet.whyNot(x.shape, now)); n != len(b.fleet.list) && len(b.fleet.better) == 0 {
							t.Fatalf("%s is blocked, and only %d of %d workers say why", id, n, len(b.fleet.list))
						}
					}
					if x.shape != nil {
						for _, w := range b.fleet.list {
							if x := b.fleet.trial(x.shape, now); x.takes(w) != (x.refusal(w) == nil) {
								t.Fatalf("the filters and takes disagree about %s on %s", id, w.id)
							}
						}
					}
					if y := b.why(id, now); y.Summary == "" {
						t.Fatalf("%s has no explanation", id)
					}
				}
				for id, w := range b.fleet.byID {
					if w.used != promised[id] || w.tasks != counts[id] {
						t.Fatalf("%s has %+v in %d tasks, they need %+v in %d", id, w.used, w.tasks, promised[id], counts[id])
					}
					if w.known && (w.used.cpus > w.total.cpus || w.used.memory > w.total.memory || w.host.Slots > 0 && w.tasks > w.host.Slots) {
						t.Fatalf("%s is promised %+v of %+v, %d tasks", id, w.used, w.total, w.tasks)
					}
				}
				for x, h := range b.holds {
					if x.phase != waiting || h.worker.hold != h {
						t.Fatalf("a hold for %s is left", x.id)
					}
				}
			},
		})
	})
}

func TestTurnsKeepOrderAndCount(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var turns turns
		var in []*task
		for _, n := range rapid.SliceOf(rapid.IntRange(0, 50)).Draw(t, "ops") {
			id, s := ask(n)
			if i := slices.IndexFunc(in, func(x *task) bool { return x.id == id }); i >= 0 {
				turns.remove(in[i])
				in = slices.Delete(in, i, i+1)
			} else {
				x := &task{id: id, queued: s.queued}
				turns.insert(x)
				in = append(in, x)
			}
			slices.SortFunc(in, func(a, b *task) int { return strings.Compare(string(a.id), string(b.id)) })
			if turns.len() != len(in) || len(in) > 0 && turns.first() != in[0] {
				t.Fatalf("%d tasks, want %d", turns.len(), len(in))
			}
			for i, x := range in {
				if turns.ahead(x) != i {
					t.Fatalf("%s has %d before it, want %d", x.id, turns.ahead(x), i)
				}
			}
		}
	})
}

func BenchmarkPlace(b *testing.B) {
	for _, policy := range []Policy{Weighted, EPVM, RoundRobin} {
		for _, workers := range []int{50, 1000} {
			b.Run(fmt.Sprintf("%s/10000 tasks/%d workers", policy, workers), func(b *testing.B) {
				for b.Loop() {
					bk := testBook(policy)
					for i := range workers {
						bk.fleet.beat(beat(fmt.Sprintf("w%04d", i), host(1000, 1000*gib, 0)), t0)
					}
					for n := range 10_000 {
						id, s := ask(n)
						bk.changed(id, s, uint64(n+1), t0)
					}
					if got := len(place(bk, t0)); got != 10_000 {
						b.Fatalf("placed %d", got)
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/10_000, "ns/task")
			})
		}
	}
}

// BenchmarkFull is a full fleet with a long queue of many shapes: tasks end, and each
// end lets one in.
func BenchmarkFull(b *testing.B) {
	for _, shapes := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprintf("100000 queued/%d shapes", shapes), func(b *testing.B) {
			bk := testBook(Weighted)
			var running []schemas.TaskID
			for i := range 50 {
				bk.fleet.beat(beat(fmt.Sprintf("w%04d", i), host(100, 1000*gib, 10)), t0)
			}
			for n := range 100_000 {
				id, s := ask(n, needs(0.5, gib/4+schemas.Size(n%shapes)))
				bk.changed(id, s, 1, t0)
			}
			for _, d := range place(bk, t0) {
				running = append(running, d.task)
			}
			n := 100_000
			for b.Loop() {
				ended := running[0]
				bk.changed(ended, seen{state: schemas.Completed}, 9, t0)
				id, s := ask(n, needs(0.5, gib/4+schemas.Size(n%shapes)))
				bk.changed(id, s, 1, t0)
				n++
				list := place(bk, t0)
				if len(list) != 1 {
					b.Fatalf("placed %d", len(list))
				}
				running = append(running[1:], list[0].task)
			}
		})
	}
}
