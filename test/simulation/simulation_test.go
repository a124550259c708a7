package simulation

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"dayfly.dev/test/faults"
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

// TestSimulation runs SEEDS seeds from SEED on.
func TestSimulation(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	first, n := setting(t, "SEED", 1), setting(t, "SEEDS", 100)
	began, virtual, failed := time.Now(), time.Duration(0), 0
	for seed := first; seed < first+n && failed < 5; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			cryptotest.SetGlobalRandom(t, seed)
			dir := t.TempDir()
			var o Outcome
			synctest.Test(t, func(*testing.T) { o = simulate(seed, dir) })
			virtual += o.Virtual
			if len(o.Violations) > 0 {
				failed++
				t.Error(o.report(seed))
			}
		})
	}
	took := time.Since(began)
	t.Logf("%d seeds in %v, %.0f a minute; %v of virtual time", n, took.Round(time.Millisecond), float64(n)/took.Minutes(), virtual.Round(time.Second))
}

// report says what is wrong, and what happened to the tasks that it is about.
func (o Outcome) report(seed uint64) string {
	var b strings.Builder
	fmt.Fprintf(&b, "make simulate SEED=%d SEEDS=1\n", seed)
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

var _ = faults.Check
