package agent_test

import (
	"context"
	"slices"
	"sync"
	"testing"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/fakeruntime"
)

// Each task has GPUs of its own, also under the agent that takes it back.
func TestEachTaskHasItsOwnGPUs(t *testing.T) {
	b := newBench(t)
	b.rt = fakeruntime.New(fakeruntime.Config{Host: schemas.Host{CPUs: 100, Memory: 1 << 40, Slots: 100, GPUs: 3}})
	var mu sync.Mutex
	given := map[schemas.TaskID][]int{}
	b.over = &spy{Runtime: b.rt, start: func(_ context.Context, req agent.StartRequest, found agent.Attempt) agent.Attempt {
		mu.Lock()
		defer mu.Unlock()
		given[req.Assignment.Task] = req.GPUs
		return found
	}}
	b.start()
	first := b.registered("")
	if first.Host.GPUs != 3 {
		t.Errorf("the beat has %d GPUs", first.Host.GPUs)
	}
	gpus := func(n int) schemas.Assignment {
		t.Helper()
		a := assignment(first.Epoch, 1)
		b.runSpec(a, func(s *schemas.Spec) { s.Resources.GPUs = n }, "sleep", "1h")
		return a
	}
	has := func(a schemas.Assignment, want ...int) {
		t.Helper()
		b.report(a, running)
		mu.Lock()
		defer mu.Unlock()
		if got := given[a.Task]; !slices.Equal(got, want) {
			t.Errorf("has %v, want %v", got, want)
		}
	}
	two := gpus(2)
	has(two, 0, 1)
	if r := b.end(gpus(2)); r.End.By != schemas.EndedGaveBack || r.Ran {
		t.Errorf("more than there are: %+v", r.End)
	}
	has(gpus(0))
	if err := b.halt(); err != nil {
		t.Fatal(err)
	}
	b.start()
	has(gpus(1), 2)
	b.order(schemas.Order{Assignment: two, Want: schemas.WantStop})
	b.end(two)
	has(gpus(1), 0)
}
