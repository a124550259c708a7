package simulation

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
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

// TestSimulation runs SEEDS seeds from SEED on, until FAILURES of them have failed.
func TestSimulation(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	first, n, most := setting(t, "SEED", 1), setting(t, "SEEDS", 100), setting(t, "FAILURES", 5)
	sz, name := small, ""
	if os.Getenv("HARD") != "" {
		sz, name = hard, "HARD=1 "
	}
	began, virtual, failed := time.Now(), time.Duration(0), uint64(0)
	seen := map[string]int{}
	for seed := first; seed < first+n && failed < most; seed++ {
		cryptotest.SetGlobalRandom(t, seed)
		dir := filepath.Join(t.TempDir(), fmt.Sprint(seed))
		var o Outcome
		// The client library pools its timers, and one of another bubble must not be used.
		runtime.GC()
		runtime.GC()
		synctest.Test(t, func(*testing.T) { o = simulate(seed, sz, dir) })
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		virtual += o.Virtual
		o.count(seen)
		if len(o.Violations) > 0 {
			failed++
			t.Error(o.report(name, seed))
		}
	}
	took := time.Since(began)
	t.Logf("%d seeds in %v, %.0f a minute; %v of virtual time", n, took.Round(time.Millisecond), float64(n)/took.Minutes(), virtual.Round(time.Second))
	for _, what := range slices.Sorted(maps.Keys(seen)) {
		t.Logf("%6d %s", seen[what], what)
	}
}

// count adds up what happened, to be shown with -v: a simulation that meets nothing
// proves nothing.
func (o Outcome) count(seen map[string]int) {
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
		show := !strings.Contains(l.text, "t-") && l.who != "bus"
		for id := range about {
			show = show || strings.Contains(l.text, id)
		}
		if show {
			fmt.Fprintf(&b, "%10.4fs %-8s %.400s\n", l.at.Seconds(), l.who, l.text)
		}
	}
	return b.String()
}
