package reaper

import (
	"testing"
	"time"

	"dayfly.dev/schemas"
)

func TestTimersDoNotGrowWithEachLook(t *testing.T) {
	due := newTimers[schemas.TaskID]()
	start := time.Now()
	expires := start.Add(365 * 24 * time.Hour)
	due.add("t-0", expires.Add(-time.Hour)) // another, whose turn is before the old ones of t-1
	for i := range 100_000 {                // a scan each minute, and a task that is looked at and left
		now := start.Add(time.Duration(i) * time.Minute)
		due.add("t-1", now)
		if ids, _ := due.pop(now, 10); len(ids) != 1 {
			t.Fatalf("look %d: due are %v", i, ids)
		}
		due.add("t-1", expires)
	}
	if n := len(due.heap); n > 10_000 {
		t.Errorf("%d timers for two tasks", n)
	}
	if ids, next := due.pop(expires, 10); len(ids) != 2 || !next.IsZero() {
		t.Errorf("in the end due are %v, then %s", ids, next)
	}
}

func TestTimersGiveEachTaskOnceInOrder(t *testing.T) {
	due := newTimers[schemas.TaskID]()
	now := time.Now()
	for i := range 5000 {
		due.add("t-b", now.Add(time.Duration(5000-i)*time.Second))
		due.add("t-a", now.Add(time.Duration(4999-i)*time.Second))
	}
	due.add("t-c", now)
	due.drop("t-c")
	ids, next := due.pop(now.Add(time.Hour), 10)
	if len(ids) != 2 || ids[0] != schemas.TaskID("t-a") || ids[1] != "t-b" || !next.IsZero() {
		t.Errorf("due %v, next %s", ids, next)
	}
}
