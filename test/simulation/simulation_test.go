package simulation

import (
	"fmt"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"
)

func setting(t *testing.T, name string, otherwise uint64) uint64 {
	v := os.Getenv(name)
	if v == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// verdict is what came of one seed.
type verdict struct {
	Seed    uint64
	Virtual time.Duration
	Met     map[string]int
	Report  string // "" if nothing is wrong
}

// TestSimulation runs SEEDS seeds from SEED on, by PROCESSES at a time, until FAILURES of
// them have failed. HARD=1 makes each a long and dense one.
func TestSimulation(t *testing.T) {
	if isLane() {
		serveLane(t)
		return
	}
	first, n, most := setting(t, "SEED", 1), setting(t, "SEEDS", 100), setting(t, "FAILURES", 5)
	began, virtual, ran, failed := time.Now(), time.Duration(0), 0, uint64(0)
	seen := map[string]int{}
	take := func(v verdict) (enough bool) {
		ran++
		virtual += v.Virtual
		for what, k := range v.Met {
			seen[what] += k
		}
		if v.Report != "" {
			failed++
			t.Error(v.Report)
		}
		return failed >= most
	}
	if processes := setting(t, "PROCESSES", uint64(runtime.NumCPU())); processes > 1 && n > 1 {
		runLanes(t, int(processes), first, n, take)
	} else {
		for seed := first; seed < first+n && !take(runSeed(t, seed)); seed++ {
		}
	}
	took := time.Since(began)
	t.Logf("%d seeds in %v, %.0f a minute; %v of virtual time", ran, took.Round(time.Millisecond), float64(ran)/took.Minutes(), virtual.Round(time.Second))
	for _, what := range slices.Sorted(maps.Keys(seen)) {
		t.Logf("%6d %s", seen[what], what)
	}
}

// memory is where the agents' folders are: files on a disk cost a tenth of the time. "" is
// the usual place.
func memory() string {
	const shm = "/dev/shm"
	if i, err := os.Stat(shm); err != nil || !i.IsDir() {
		return ""
	}
	return shm
}

// runSeed runs one seed in this process. One processor is quickest: hardly ever may two
// goroutines of a run go on at the same instant.
func runSeed(t *testing.T, seed uint64) verdict {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	sz, name := small, ""
	if os.Getenv("HARD") != "" {
		sz, name = hard, "HARD=1 "
	}
	cryptotest.SetGlobalRandom(t, seed)
	dir, err := os.MkdirTemp(memory(), "dayfly-simulation-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	// The client library pools its timers, and one of another bubble must not be used.
	runtime.GC()
	runtime.GC()
	var o Outcome
	synctest.Test(t, func(*testing.T) { o = simulate(seed, sz, dir) })
	v := verdict{Seed: seed, Virtual: o.Virtual, Met: o.met()}
	if len(o.Violations) > 0 {
		v.Report = o.report(name, seed)
	}
	return v
}

// met counts what happened, to be shown with -v: a simulation that meets nothing proves
// nothing.
func (o Outcome) met() map[string]int {
	seen := map[string]int{}
	for _, group := range []struct {
		name string
		of   map[string]int
	}{{"final", o.Finals}, {"requeued", o.Requeues}, {"ended by", o.Lives}, {"op", o.Ops}} {
		for what, n := range group.of {
			seen[group.name+": "+what] += n
		}
	}
	for _, f := range o.Faults {
		seen["fault: "+f.Kind]++
	}
	return seen
}

// report says what is wrong, and what happened to the tasks that it is about.
func (o Outcome) report(name string, seed uint64) string {
	var b strings.Builder
	fmt.Fprintf(&b, "make simulate %sSEED=%d SEEDS=1\n", name, seed)
	about := map[string]bool{}
	for _, v := range o.Violations {
		fmt.Fprintln(&b, v)
		about[string(v.Task)] = true
	}
	for _, l := range o.world.trace {
		text := l.String()
		show := !strings.Contains(text, "t-") && l.who != "bus"
		for id := range about {
			show = show || id != "" && strings.Contains(text, id)
		}
		if show {
			fmt.Fprintf(&b, "%10.4fs %-8s %.400s\n", l.at.Seconds(), l.who, text)
		}
	}
	return b.String()
}
