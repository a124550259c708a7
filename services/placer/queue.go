package placer

import (
	"container/heap"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// shapeKey is everything about a queued task that decides where it fits. Tasks of
// one key are alike to every filter: where the first of them does not fit, none does.
type shapeKey struct {
	priority int
	need     resources
	image    string
	// credentials of the registry, by their name.
	credentials string
	kind        string
	labels      string // the constraints
	skipped     string // the workers to avoid
	blobs       string // those that it names
}

// shape is the queued tasks of one key, in their order. A task that fits nowhere so
// costs nothing more until a worker gets room: its whole shape is set aside.
type shape struct {
	shapeKey
	constraints map[string]string
	avoid       []schemas.WorkerID
	names       []blob

	tasks    turns
	blocked  bool // it fits on no worker, save those in fleet.better
	hopeless bool // and on none even if that were empty
	index    int  // in queue.ready, -1 if blocked
}

func (s *shape) head() *task { return s.tasks.first() }

// before is the order of the queue: priority, then first come, first served, by when
// the task was accepted, so that a task which was given back keeps its turn. It is
// the one place to change for fair shares between tenants.
func before(a, b *task) bool {
	if a.priority != b.priority {
		return a.priority > b.priority
	}
	if !a.accepted.Equal(b.accepted) {
		return a.accepted.Before(b.accepted)
	}
	return a.id < b.id
}

// queue holds the tasks whose turn may come now.
type queue struct {
	shapes map[shapeKey]*shape
	ready  readyHeap // shapes that may fit somewhere, by their first task
}

func newQueue() *queue { return &queue{shapes: map[shapeKey]*shape{}} }

// add puts a task in its place.
func (q *queue) add(t *task, now time.Time) {
	key := t.shapeKey(now)
	s := q.shapes[key]
	if s == nil {
		s = &shape{shapeKey: key, constraints: t.constraints, avoid: t.avoiding(now), names: t.need.blobs, index: -1}
		q.shapes[key] = s
	}
	t.shape = s
	s.tasks.insert(t)
	if s.head() == t {
		q.unblock(s) // what may go to a worker that is held back depends on the first
	}
}

// remove takes a task out, wherever it stands.
func (q *queue) remove(t *task) {
	s := t.shape
	if s == nil {
		return
	}
	t.shape = nil
	s.tasks.remove(t)
	switch {
	case s.tasks.len() == 0:
		if s.index >= 0 {
			heap.Remove(&q.ready, s.index)
		}
		delete(q.shapes, s.shapeKey)
	case s.index >= 0:
		heap.Fix(&q.ready, s.index)
	}
}

// next is the shape whose first task's turn it is, nil if all are blocked.
func (q *queue) next() *shape {
	if len(q.ready) == 0 {
		return nil
	}
	return q.ready[0]
}

func (q *queue) block(s *shape) {
	if s.index >= 0 {
		heap.Remove(&q.ready, s.index)
	}
	s.blocked = true
}

func (q *queue) unblock(s *shape) {
	s.blocked = false
	if s.index < 0 {
		heap.Push(&q.ready, s)
	} else {
		heap.Fix(&q.ready, s.index)
	}
}

// position of a queued task, 1 is next.
func (q *queue) position(t *task) int {
	n := 1
	for _, s := range q.shapes {
		n += s.tasks.ahead(t)
	}
	return n
}

type readyHeap []*shape

func (h readyHeap) Len() int           { return len(h) }
func (h readyHeap) Less(i, j int) bool { return before(h[i].head(), h[j].head()) }
func (h readyHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i]; h[i].index, h[j].index = i, j }
func (h *readyHeap) Push(x any)        { s := x.(*shape); s.index = len(*h); *h = append(*h, s) }
func (h *readyHeap) Pop() any {
	old := *h
	s := old[len(old)-1]
	old[len(old)-1] = nil
	s.index = -1
	*h = old[:len(old)-1]
	return s
}

// turns is an ordered set of tasks that also counts: a treap, whose nodes are the
// tasks themselves. All of it is O(log n).
type turns struct{ root *task }

// turn is a task's place in a turns.
type turn struct {
	left, right *task
	weight      uint32
	count       int // of the tree under it
}

func (t *turns) len() int { return t.root.size() }

func (t *task) size() int {
	if t == nil {
		return 0
	}
	return t.turn.count
}

func (t *task) recount() { t.turn.count = 1 + t.turn.left.size() + t.turn.right.size() }

func (t *turns) first() *task {
	n := t.root
	for n != nil && n.turn.left != nil {
		n = n.turn.left
	}
	return n
}

func (t *turns) insert(x *task) {
	x.turn = turn{weight: rand.Uint32(), count: 1}
	l, r := split(t.root, x)
	t.root = merge(merge(l, x), r)
}

func (t *turns) remove(x *task) {
	link := &t.root
	for *link != x {
		(*link).turn.count--
		if before(x, *link) {
			link = &(*link).turn.left
		} else {
			link = &(*link).turn.right
		}
	}
	*link = merge(x.turn.left, x.turn.right)
	x.turn = turn{}
}

// ahead counts the tasks whose turn comes before that of x.
func (t *turns) ahead(x *task) int {
	n := 0
	for c := t.root; c != nil; {
		if before(c, x) {
			n += 1 + c.turn.left.size()
			c = c.turn.right
		} else {
			c = c.turn.left
		}
	}
	return n
}

func split(n, at *task) (l, r *task) {
	if n == nil {
		return nil, nil
	}
	if before(n, at) {
		n.turn.right, r = split(n.turn.right, at)
		n.recount()
		return n, r
	}
	l, n.turn.left = split(n.turn.left, at)
	n.recount()
	return l, n
}

func merge(l, r *task) *task {
	switch {
	case l == nil:
		return r
	case r == nil:
		return l
	case l.turn.weight > r.turn.weight:
		l.turn.right = merge(l.turn.right, r)
		l.recount()
		return l
	default:
		r.turn.left = merge(l, r.turn.left)
		r.recount()
		return r
	}
}

func joinWorkers(ids []schemas.WorkerID) string {
	if len(ids) == 0 {
		return ""
	}
	parts := make([]string, len(ids))
	for i, id := range ids {
		parts[i] = string(id)
	}
	slices.Sort(parts)
	return strings.Join(parts, " ")
}
