package reaper

import (
	"testing"
	"time"
)

// A reaper that was itself stopped has not seen the beats of that time, so no worker
// is silent for it until it has watched for a whole fence again.
func TestAStoppedReaperSeesNobodySilent(t *testing.T) {
	const fence = 75 * time.Second
	f, start := newFleet(), time.Now()
	f.saw("w1", 7, start)
	last, now := start, start
	tick := func(d time.Duration) map[string]bool {
		now = last.Add(d)
		f.awake(last, now, fence)
		last = now
		silent := map[string]bool{}
		for w := range f.silent(now, fence) {
			silent[string(w)] = true
		}
		return silent
	}
	for range 3 {
		if s := tick(fence / 20); len(s) > 0 {
			t.Fatalf("silent at once: %v", s)
		}
	}
	if s := tick(2 * fence); len(s) > 0 {
		t.Fatalf("after 2 fences in which this reaper was stopped it holds %v for silent", s)
	}
	for waited := time.Duration(0); waited < fence-fence/20; waited += fence / 20 {
		if s := tick(fence / 20); len(s) > 0 {
			t.Fatalf("silent %v after it woke: %v", waited, s)
		}
	}
	if s := tick(fence / 20); !s["w1"] {
		t.Fatal("a worker that is silent for a whole fence while it was watched is not seen as such")
	}
}

// What a server that was killed may have forgotten has not stood: a verdict counts only
// from when this reaper last came to the bus.
func TestAVerdictStandsFromTheLastReconnect(t *testing.T) {
	f, start := newFleet(), time.Now()
	stood := func(revision uint64, after time.Duration) time.Duration {
		return f.stood("w1", revision, start.Add(after))
	}
	f.saw("w1", 7, start)
	if d := stood(7, 2*time.Second); d != 2*time.Second {
		t.Fatalf("it stood %v", d)
	}
	f.restart(start.Add(3 * time.Second))
	if d := stood(7, 4*time.Second); d != time.Second {
		t.Fatalf("it stood %v since the reconnect", d)
	}
	if d := stood(8, 4*time.Second); d != 0 {
		t.Fatalf("another revision stood %v", d)
	}
}
