package natsd_test

import (
	"context"
	"errors"
	"math"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"dayfly.dev/bus/natsd"
)

// boundMemory runs BoundMemory until the end of the test.
func boundMemory(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- natsd.BoundMemory(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// limitBecomes waits until the limit is as asked.
func limitBecomes(t *testing.T, what string, ok func(limit int64) bool) int64 {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		limit := debug.SetMemoryLimit(-1)
		if ok(limit) {
			return limit
		}
		if time.Now().After(end) {
			t.Fatalf("the limit is %d MiB, not %s", limit>>20, what)
		}
	}
}

func TestMemoryIsBoundAboveWhatIsLive(t *testing.T) {
	boundMemory(t)
	least := limitBecomes(t, "set", func(l int64) bool { return l != math.MaxInt64 })
	const much = 256 << 20
	live := make([]byte, much)
	runtime.GC()
	limitBecomes(t, "above what is live", func(l int64) bool { return l > much })
	runtime.KeepAlive(live)
	live = nil
	runtime.GC()
	limitBecomes(t, "what it was", func(l int64) bool { return l == least })
}

func TestAnOperatorsLimitOfMemoryStays(t *testing.T) {
	const own = 3 << 30
	debug.SetMemoryLimit(own)
	defer debug.SetMemoryLimit(math.MaxInt64)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := natsd.BoundMemory(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if limit := debug.SetMemoryLimit(-1); limit != own {
		t.Errorf("it is %d now", limit)
	}
}
