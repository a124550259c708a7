package gateway

import (
	"maps"
	"sync"

	"dayfly.dev/schemas"
)

// tally counts the tasks of the view by state.
type tally struct {
	mu sync.Mutex
	of map[schemas.State]int // under mu
}

// changed takes one change of the view into account.
func (t *tally) changed(old, now *item) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old != nil {
		t.of[old.state]--
	}
	if now != nil {
		t.of[now.state]++
	}
}

func (t *tally) counts() map[schemas.State]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.of)
}
