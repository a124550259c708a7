package placer

import (
	"slices"
	"time"
)

// hold keeps a worker free for a task that fits nowhere and has waited long.
//
// What fits nowhere is passed over, so that it does not stop what is smaller. Were
// that all, a stream of small tasks would take every bit of room that comes free and
// the large one would wait for ever. So once it has waited for HoldAfter, one worker
// that could hold it if it were empty takes nothing that stands behind it in the
// queue. Tasks end, at the latest with their TTL, so it comes to its turn. At most a
// quarter of the workers are held back at a time, and at least one.
type hold struct {
	task   *task
	worker *worker
}

// lets says whether the first task of a shape may go to the held worker all the same.
func (h *hold) lets(s *shape) bool {
	first := s.head()
	return first == h.task || first != nil && before(first, h.task)
}

// holdBack makes and ends holds. It is a pass over the blocked shapes, made about
// once a second.
func (b *book) holdBack(now time.Time) {
	for t, h := range b.holds {
		w := h.worker
		if t.phase != waiting || !w.known || w.lost || w.draining || b.fleet.silence(w, now) > b.fleet.lease || !b.fleet.couldHold(w, t.shape, now) {
			b.release(t)
		}
	}
	if b.cfg.HoldAfter <= 0 {
		return
	}
	var late []*task
	for _, s := range b.queue.shapes {
		if t := s.head(); s.blocked && !s.hopeless && t.hold == nil && now.Sub(t.since) >= b.cfg.HoldAfter {
			late = append(late, t)
		}
	}
	slices.SortFunc(late, func(x, y *task) int {
		if before(x, y) {
			return -1
		}
		return 1
	})
	most := max(1, len(b.fleet.list)/4)
	for _, t := range late[:min(len(late), holdTries)] {
		if len(b.holds) >= most {
			return
		}
		w := b.nearest(t.shape, now)
		if w == nil {
			t.shape.hopeless = true // until a worker becomes better
			continue
		}
		h := &hold{task: t, worker: w}
		b.holds[t], t.hold, w.hold = h, h, h
	}
}

// holdTries bounds how many tasks one pass looks for a worker for.
const holdTries = 64

// nearest is the worker that misses least for the shape, of those that could hold it
// empty and are not held back.
func (b *book) nearest(s *shape, now time.Time) *worker {
	var best *worker
	var least float64
	for _, w := range b.fleet.list {
		if w.hold != nil || !b.fleet.couldHold(w, s, now) {
			continue
		}
		free := w.free()
		misses := share(max(0, s.need.cpus-free.cpus), w.total.cpus) + share(max(0, s.need.memory-free.memory), w.total.memory) +
			share(int64(max(0, s.need.gpus-free.gpus)), int64(w.total.gpus))
		if best == nil || misses < least {
			best, least = w, misses
		}
	}
	return best
}

// release ends the hold for a task, if there is one.
func (b *book) release(t *task) {
	h := t.hold
	if h == nil {
		return
	}
	delete(b.holds, t)
	t.hold, h.worker.hold = nil, nil
	b.fleet.improved(h.worker)
}
