package docker

import (
	"os"
	"path/filepath"
	"testing"
)

// A mark that cannot be set back, as in version 2 before Linux 6.12, tells of earlier programs too:
// it counts only where this one moved it.
func TestAPeakThatCannotBeSetBack(t *testing.T) {
	g := cgroup{memory: t.TempDir(), v2: true}
	mark := func(s string) {
		t.Helper()
		path := filepath.Join(g.memory, "memory.peak")
		if err := os.WriteFile(path, []byte(s+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mark("9000")
	f, err := os.Open(filepath.Join(g.memory, "memory.peak"))
	if err != nil {
		t.Fatal(err)
	}
	p := &peak{file: f}
	p.was = p.mark()
	defer p.close()
	for _, c := range []struct {
		mark      string
		now, want int64
	}{{"9000", 100, 100}, {"9000", 700, 700}, {"9000", 200, 700}, {"9500", 300, 9500}} {
		mark(c.mark)
		if got := p.most(c.now); got != c.want {
			t.Errorf("mark %s, now %d: %d, want %d", c.mark, c.now, got, c.want)
		}
	}
	if got := (cgroup{}).newPeak().most(5); got != 5 {
		t.Errorf("without a cgroup in sight: %d", got)
	}
}
