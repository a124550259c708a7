package placer

import (
	"container/heap"
	"slices"
	"time"

	"dayfly.dev/schemas"
)

// book is everything that a decision is made from. It knows no bus and reads no
// clock, and is not safe for concurrent use: Placer guards it.
//
// A task counts on a worker from choice until its record is seen not to be held any
// more, so what is promised never exceeds what a worker has, however late the view.
type book struct {
	cfg   Config
	by    score
	fleet *fleet
	queue *queue
	tasks map[schemas.TaskID]*task
	holds map[*task]*hold
	rest  timers

	counts    map[schemas.State]int // of all records that are not final
	unordered map[schemas.TaskID]time.Time
	holdsAt   time.Time // of the last pass over the holds
}

func newBook(cfg Config) *book {
	return &book{
		cfg: cfg, by: scores[cfg.Policy], fleet: newFleet(cfg.Lease), queue: newQueue(),
		tasks: map[schemas.TaskID]*task{}, holds: map[*task]*hold{},
		counts: map[schemas.State]int{}, unordered: map[schemas.TaskID]time.Time{},
	}
}

// changed takes what the view of tasks tells: the record of id is now s.
func (b *book) changed(id schemas.TaskID, s seen, revision uint64, now time.Time) {
	t := b.tasks[id]
	if s.state.Final() {
		b.forget(id, s.state)
		return
	}
	if t == nil {
		t = &task{id: id, phase: resting}
		b.tasks[id] = t
	}
	was := t.state
	t.revision, t.state, t.need = revision, s.state, s.need
	if s.state.Held() {
		b.unqueue(t)
		if t.worker != s.worker {
			b.untake(t)
			t.worker = s.worker
			b.fleet.take(t.worker, t.need)
		}
		t.phase, t.queued = held, nil
		if s.state != schemas.Assigned {
			delete(b.unordered, id)
		} else if was != schemas.Assigned && !t.writing && revision != t.ordered {
			b.unordered[id] = now // somebody else's choice: it may have died before it sent the order
		}
		return
	}
	delete(b.unordered, id)
	if was != schemas.Queued || t.queued == nil || t.attempt != s.queued.attempt {
		t.since = now
	}
	if t.writing { // the write meets this change at its compare-and-set
		t.queued = s.queued
		t.phase = chosen // it may have been seen held, and given back, before the write returned
		return
	}
	b.unqueue(t)
	b.untake(t)
	t.queued = s.queued
	b.enqueue(t, now)
}

// count keeps the numbers of records by state.
func (b *book) count(state schemas.State, n int) {
	if b.counts[state] += n; b.counts[state] == 0 {
		delete(b.counts, state)
	}
}

// forget drops a task that is final or gone. end is the state that it ended in, if that is
// known.
func (b *book) forget(id schemas.TaskID, end schemas.State) {
	t := b.tasks[id]
	if t == nil {
		return
	}
	if t.worker != "" && (t.state == schemas.Running || end == schemas.Completed) {
		b.fleet.get(t.worker).fetched(t.need.blobs)
	}
	b.unqueue(t)
	b.untake(t)
	t.wake++
	delete(b.tasks, id)
	delete(b.unordered, id)
}

// enqueue puts a queued task in the queue, or lets it rest first.
func (b *book) enqueue(t *task, now time.Time) {
	if until := t.rests(); now.Before(until) {
		b.restUntil(t, until)
		return
	}
	t.phase = waiting
	b.queue.add(t, now)
	if end := t.avoidEnds(now); !end.IsZero() {
		b.wakeAt(t, end) // it has another shape then
	}
}

func (b *book) restUntil(t *task, until time.Time) {
	t.phase, t.until = resting, until
	b.wakeAt(t, until)
}

func (b *book) unqueue(t *task) {
	b.release(t)
	t.wake++
	if t.shape != nil {
		b.queue.remove(t)
	}
}

func (b *book) untake(t *task) {
	if t.worker != "" {
		b.fleet.give(t.worker, t.need)
		t.worker = ""
	}
}

// decision is one task for one worker.
type decision struct {
	task     schemas.TaskID
	revision uint64 // of the record that it was made from
	queued   *queued
	worker   schemas.WorkerID
	epoch    schemas.Epoch
	since    time.Time
}

// next decides about the task whose turn it is and promises it the worker's room.
// ok is false when nothing can be placed now. refused, if not nil, is told of each
// task that was found to fit nowhere.
func (b *book) next(now time.Time, refused func(*task)) (d decision, ok bool) {
	b.wakeDue(now)
	if now.Sub(b.holdsAt) >= holdsEvery {
		b.holdsAt = now
		b.holdBack(now)
	}
	if len(b.fleet.better) > few {
		b.retry(now)
	}
	for {
		s := b.queue.next()
		t, w := b.rescue(s, now)
		switch {
		case t != nil:
		case s == nil:
			b.fleet.tried() // they have been tried for everything that waits
			return decision{}, false
		default:
			t, w = s.head(), b.fleet.choose(s, b.by, now, slices.Values(b.fleet.list))
		}
		if w == nil {
			b.queue.block(s)
			if refused != nil {
				refused(t)
			}
			continue
		}
		b.unqueue(t)
		t.phase, t.worker, t.writing = chosen, w.id, true
		b.fleet.take(w.id, t.need)
		b.fleet.last = w.index
		return decision{task: t.id, revision: t.revision, queued: t.queued, worker: w.id, epoch: w.epoch, since: t.since}, true
	}
}

// holdsEvery is how often the holds are looked at.
const holdsEvery = time.Second

// few workers that became better are tried for the blocked shapes one by one, so that
// the end of one task does not bring all that waits into motion.
const few = 4

// rescue finds the first task of a blocked shape that fits on one of few workers which
// have become better, if its turn is before that of the shape s.
func (b *book) rescue(s *shape, now time.Time) (t *task, w *worker) {
	if len(b.fleet.better) == 0 {
		return nil, nil
	}
	for _, r := range b.queue.shapes {
		first := r.head()
		if !r.blocked || t != nil && before(t, first) || s != nil && before(s.head(), first) {
			continue
		}
		if b.fits(r, now) {
			t = first
		}
	}
	if t != nil {
		w = b.fleet.choose(t.shape, b.by, now, slices.Values(b.fleet.better))
	}
	return t, w
}

// retry lets the blocked shapes have another turn that fit on a worker which has
// become better. The others are as blocked as before.
func (b *book) retry(now time.Time) {
	for _, s := range b.queue.shapes {
		if s.blocked && b.fits(s, now) {
			b.queue.unblock(s)
		}
	}
	b.fleet.tried()
}

func (b *book) fits(s *shape, now time.Time) bool {
	s.hopeless = false
	x := trial{shape: s, now: now, alive: now.Add(-b.fleet.lease), lease: b.fleet.lease}
	for _, w := range b.fleet.better {
		if w.known && x.takes(w) {
			return true
		}
	}
	return false
}

// outcome is what came of writing a decision.
type outcome int

const (
	written   outcome = iota // the record says so, and the order was sent
	overtaken                // the record had changed: the view will tell, or has told
	failed                   // it could not be written: again in a while
)

// wrote ends the writing of a decision. revision is that of the record written.
func (b *book) wrote(d decision, o outcome, revision uint64, now time.Time) {
	t := b.tasks[d.task]
	if t == nil || !t.writing {
		return
	}
	t.writing = false
	if o == written {
		t.ordered = revision
	}
	if t.phase == held {
		if o != written && t.state == schemas.Assigned {
			b.unordered[t.id] = now
		}
		return
	}
	switch {
	case o == written && t.revision <= revision:
		return // stays chosen until the view tells
	case o == overtaken && t.revision <= d.revision:
		b.untake(t)
		t.phase, t.until = resting, time.Time{}
	case o == failed:
		b.untake(t)
		b.restUntil(t, now.Add(retryAfter))
	default: // queued again meanwhile, or still and changed
		b.untake(t)
		b.enqueue(t, now)
	}
}

// retryAfter is how long a task rests whose assignment could not be written.
const retryAfter = 200 * time.Millisecond

// known gives what a task needs that has been seen.
func (b *book) known(id schemas.TaskID) (need, bool) {
	if t := b.tasks[id]; t != nil {
		return t.need, true
	}
	return need{}, false
}

// orphans takes the assigned tasks whose order may never have been sent, first those
// that have been so since before.
func (b *book) orphans(before time.Time, most int) []schemas.TaskID {
	var list []schemas.TaskID
	for id, since := range b.unordered {
		if len(list) == most {
			break
		}
		if !since.After(before) {
			list = append(list, id)
			delete(b.unordered, id)
		}
	}
	slices.Sort(list)
	return list
}

// unsent says that the order of a task has still to be sent, if it is assigned.
func (b *book) unsent(id schemas.TaskID, now time.Time) {
	if b.tasks[id] != nil {
		b.unordered[id] = now
	}
}

// oldest is when the task that has waited longest was first seen queued.
func (b *book) oldest() (first time.Time) {
	for _, s := range b.queue.shapes {
		if t := s.head(); first.IsZero() || t.since.Before(first) {
			first = t.since
		}
	}
	return first
}

// due is when next may find more to do though nothing changes: a rest is over, or
// the holds are to be looked at.
func (b *book) due() (time.Time, bool) {
	at, ok := b.rest.first()
	if len(b.queue.shapes) > 0 || len(b.holds) > 0 {
		if look := b.holdsAt.Add(holdsEvery); !ok || look.Before(at) {
			at, ok = look, true
		}
	}
	return at, ok
}

// timer wakes one task; one of an older generation has been overtaken.
type timer struct {
	at   time.Time
	task *task
	wake int
}

type timers []timer

func (h timers) Len() int           { return len(h) }
func (h timers) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h timers) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *timers) Push(x any)        { *h = append(*h, x.(timer)) }
func (h *timers) Pop() any {
	old := *h
	x := old[len(old)-1]
	old[len(old)-1] = timer{}
	*h = old[:len(old)-1]
	return x
}

func (h *timers) first() (time.Time, bool) {
	for len(*h) > 0 {
		if t := (*h)[0]; t.wake == t.task.wake {
			return t.at, true
		}
		heap.Pop(h)
	}
	return time.Time{}, false
}

func (b *book) wakeAt(t *task, at time.Time) {
	t.wake++
	heap.Push(&b.rest, timer{at: at, task: t, wake: t.wake})
}

func (b *book) wakeDue(now time.Time) {
	for {
		at, ok := b.rest.first()
		if !ok || at.After(now) {
			return
		}
		t := heap.Pop(&b.rest).(timer).task
		b.unqueue(t)
		if t.phase == resting || t.phase == waiting {
			b.requeue(t, now)
		}
	}
}

// requeue gives a task that has rested its place, or one with a new shape another.
func (b *book) requeue(t *task, now time.Time) {
	t.phase, t.until = waiting, time.Time{}
	b.queue.add(t, now)
	if end := t.avoidEnds(now); !end.IsZero() {
		b.wakeAt(t, end)
	}
}
