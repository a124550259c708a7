package harness

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"
)

// removeWithin is how long it may take to end a dayfly and all that it left.
const removeWithin = 2 * time.Minute

// Main runs the tests of a package with a dayfly that was built for them. ready gets its
// folder, which goes with it, and its path.
func Main(m *testing.M, ready func(dir, dayfly string) error) {
	dir, err := os.MkdirTemp("", "dayfly-bin-")
	var dayfly string
	if err == nil {
		dayfly, err = Binaries(context.Background(), dir)
	}
	if err == nil {
		err = ready(dir, dayfly)
	}
	code := 1
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// NewFor is New for a test: when that ends, the dayfly goes with all it left. What it said
// last is in the log of a test that failed.
func NewFor(t testing.TB, bin string, args ...string) *Up {
	t.Helper()
	up, err := New(bin, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), removeWithin)
		defer cancel()
		if t.Failed() {
			t.Log(up.Tail())
		}
		if err := up.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	return up
}
