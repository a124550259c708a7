package reaper

import (
	"fmt"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// Tasks that end long before their deadline leave nothing behind until then.
func TestTimersOfEndedTasksGo(t *testing.T) {
	due, now := newTimers(), time.Now()
	due.add("live", now.Add(time.Minute))
	for i := range 50_000 {
		id := schemas.TaskID(fmt.Sprint("t", i))
		due.add(id, now.Add(time.Hour))
		due.add(id, now.Add(time.Duration(i)*time.Millisecond+2*time.Minute))
		due.drop(id)
	}
	if len(due.heap) > 2000 {
		t.Errorf("%d timers of one task", len(due.heap))
	}
	ids, next := due.pop(now.Add(time.Minute), 10)
	if len(ids) != 1 || ids[0] != "live" || !next.IsZero() {
		t.Errorf("popped %v, next %v", ids, next)
	}
}
