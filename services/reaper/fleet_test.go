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
