package harness

import (
	"context"
	"testing"
	"time"
)

// removeWithin is how long it may take to end a dayfly and all that it left.
const removeWithin = 2 * time.Minute

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
