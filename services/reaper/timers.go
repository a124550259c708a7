package reaper

import (
	"container/heap"
	"slices"
	"sync"
	"time"

	"dayfly.dev/schemas"
)

// timers says which task is to be looked at when. A task has one time: the earliest
// it was given.
type timers struct {
	mu   sync.Mutex
	heap timerHeap                    // under mu
	at   map[schemas.TaskID]time.Time // under mu: what counts; the heap may hold outdated ones
	wake chan struct{}
}

func newTimers() *timers {
	return &timers{at: map[schemas.TaskID]time.Time{}, wake: make(chan struct{}, 1)}
}

// add asks for a look at id, unless an earlier one is already due.
func (t *timers) add(id schemas.TaskID, at time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old, ok := t.at[id]; ok && !at.Before(old) {
		return
	}
	t.at[id] = at
	if len(t.heap) > 2*len(t.at)+1024 { // most are outdated, and may be so for days
		t.compact()
	}
	heap.Push(&t.heap, timer{id, at})
	if t.heap[0].id == id {
		select {
		case t.wake <- struct{}{}:
		default:
		}
	}
}

// compact drops what is outdated from the heap, where else it would stay until its
// time: that of a task which ended early is its deadline. t.mu is held, and t.at may
// already have what is still to be pushed.
func (t *timers) compact() {
	t.heap = slices.DeleteFunc(t.heap, func(x timer) bool {
		at, ok := t.at[x.id]
		return !ok || !at.Equal(x.at)
	})
	heap.Init(&t.heap)
}

// drop forgets id.
func (t *timers) drop(id schemas.TaskID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.at, id)
}

// pop takes the tasks that are due, at most n, and says when the next one is.
func (t *timers) pop(now time.Time, n int) (ids []schemas.TaskID, next time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.heap) > 0 {
		first := t.heap[0]
		if at, ok := t.at[first.id]; !ok || !at.Equal(first.at) {
			heap.Pop(&t.heap) // outdated
			continue
		}
		if first.at.After(now) || len(ids) == n {
			return ids, first.at
		}
		heap.Pop(&t.heap)
		delete(t.at, first.id)
		ids = append(ids, first.id)
	}
	return ids, time.Time{}
}

type timer struct {
	id schemas.TaskID
	at time.Time
}

type timerHeap []timer

func (h timerHeap) Len() int           { return len(h) }
func (h timerHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h timerHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *timerHeap) Push(x any)        { *h = append(*h, x.(timer)) }
func (h *timerHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	*h = old[:len(old)-1]
	return last
}
