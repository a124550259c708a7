package bus

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// ViewStatus says how a view is.
type ViewStatus struct {
	Bucket  string
	Keys    int
	Pending uint64        // messages that are known to be still to come
	Behind  time.Duration // for how long it has not had all there is; 0: it has, as far as it knows
}

// Views says how the views are that run on this connection, by bucket. Several of one
// bucket count as one: all their keys, and what the worst of them lacks.
func (c *Conn) Views() []ViewStatus {
	c.mu.Lock()
	views := slices.Collect(maps.Keys(c.views))
	c.mu.Unlock()
	of := map[string]ViewStatus{}
	for _, status := range views {
		s := (*status)()
		sum := of[s.Bucket]
		of[s.Bucket] = ViewStatus{Bucket: s.Bucket, Keys: sum.Keys + s.Keys, Pending: max(sum.Pending, s.Pending), Behind: max(sum.Behind, s.Behind)}
	}
	return slices.SortedFunc(maps.Values(of), func(a, b ViewStatus) int { return strings.Compare(a.Bucket, b.Bucket) })
}

// track makes a view one of Views until the function that it gives is called.
func (c *Conn) track(status func() ViewStatus) (end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.views[&status] = struct{}{}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.views, &status)
	}
}

func (v *View[V]) status() ViewStatus {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := ViewStatus{Bucket: v.bucket, Keys: len(v.entries), Pending: v.waiting}
	if !v.behind.IsZero() {
		s.Behind = time.Since(v.behind)
	}
	return s
}

// lag takes note of how many messages are still to come, and whether the view has all
// there is; v.mu is held.
func (v *View[V]) lag(pending uint64, all bool) {
	v.waiting = pending
	if all {
		v.behind = time.Time{}
	} else if v.behind.IsZero() {
		v.behind = time.Now()
	}
}
