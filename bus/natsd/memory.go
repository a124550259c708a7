package natsd

import (
	"context"
	"math"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// leastMemory is what a process with a server may always use. What a server of a site needs
// is below half of it, so nothing is collected earlier for it while no blobs move.
const leastMemory = 128 << 20

// BoundMemory keeps the memory of a process with a server close to what is in use, until
// ctx ends. A limit that is set already, as by GOMEMLIMIT, it leaves alone.
//
// Each message that is asked for brings a block of 4 MiB of the stream's file into memory,
// which is then held weakly: it goes with the next collection, and its buffer stays in a
// pool for two more. The collector takes all of this for live and lets the heap double
// before it looks again; by then more blocks have come than the last time. So without a
// limit the heap grows for as long as somebody reads on.
//
// The limit is raised to a quarter above what is live, as thousands of tasks or workers
// may need more; near a fixed one the server would do little else than collect.
func BoundMemory(ctx context.Context) error {
	if debug.SetMemoryLimit(-1) != math.MaxInt64 {
		<-ctx.Done()
		return ctx.Err()
	}
	defer debug.SetMemoryLimit(math.MaxInt64)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for limit := int64(0); ; {
		if next := max(leastMemory, memoryInUse()/4*5); next != limit {
			limit = next
			debug.SetMemoryLimit(limit)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// memoryInUse is what a collection could not give back now: what counts for the limit,
// with what the last collection found live in the place of the heap.
func memoryInUse() int64 {
	s := []metrics.Sample{
		{Name: "/memory/classes/total:bytes"}, {Name: "/gc/heap/live:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"}, {Name: "/memory/classes/heap/released:bytes"},
	}
	metrics.Read(s)
	n := int64(s[0].Value.Uint64() + s[1].Value.Uint64())
	for _, heap := range s[2:] {
		n -= int64(heap.Value.Uint64())
	}
	return n
}
