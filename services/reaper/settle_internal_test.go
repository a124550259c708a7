package reaper

import (
	"fmt"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

func TestUnknownAttemptsOfManyWorkersAreBounded(t *testing.T) {
	u := newUnknown()
	attempt := func(worker, n int) schemas.Assignment {
		return schemas.Assignment{Task: schemas.TaskID(fmt.Sprintf("t-01jd%022d", n)), Attempt: 1, Worker: schemas.WorkerID(fmt.Sprintf("w%d", worker)), Epoch: "e1"}
	}
	of, all := map[int]int{}, 0
	for n := range 2 * unknownMost {
		for worker := range 8 {
			if _, ok := u.since(attempt(worker, n)); ok {
				of[worker]++
				all++
			}
		}
	}
	if all != unknownMost {
		t.Errorf("%d attempts are tried again", all)
	}
	alone := newUnknown()
	for n := range 2 * unknownMost {
		if _, ok := alone.since(attempt(0, n)); ok != (n < unknownOfEach) {
			t.Fatalf("attempt %d of one worker: %v", n, ok)
		}
	}
	if _, ok := u.since(attempt(0, 0)); !ok {
		t.Error("one that is remembered is refused")
	}
	u.forget(attempt(0, 0))
	if _, ok := u.since(attempt(9, 0)); !ok {
		t.Error("the place of one that is explained stays taken")
	}
	u.prune(time.Now().Add(time.Hour))
	if len(u.first) != 0 {
		t.Errorf("%d workers are remembered for ever", len(u.first))
	}
}
