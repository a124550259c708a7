package reaper

import (
	"container/heap"
	"slices"
	"sync"
	"time"
)

// timers says what is to be looked at when, by its id. An id has one time: the earliest
// it was given.
type timers[ID comparable] struct {
	mu   sync.Mutex
	heap timerHeap[ID]    // under mu
	at   map[ID]time.Time // under mu: what counts; the heap may hold outdated ones
	wake chan struct{}
}

func newTimers[ID comparable]() *timers[ID] {
	return &timers[ID]{at: map[ID]time.Time{}, wake: make(chan struct{}, 1)}
}

// add asks for a look at id, unless an earlier one is already due.
func (t *timers[ID]) add(id ID, at time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old, ok := t.at[id]; ok && !at.Before(old) {
		return
	}
	t.at[id] = at
	if len(t.heap) > 2*len(t.at)+1024 { // most are outdated, and may be so for days
		t.compact()
	}
	heap.Push(&t.heap, timer[ID]{id, at})
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
func (t *timers[ID]) compact() {
	t.heap = slices.DeleteFunc(t.heap, func(x timer[ID]) bool {
		at, ok := t.at[x.id]
		return !ok || !at.Equal(x.at)
	})
	heap.Init(&t.heap)
}

// drop forgets id.
func (t *timers[ID]) drop(id ID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.at, id)
}

// pop takes what is due, at most n, and says when the next one is.
func (t *timers[ID]) pop(now time.Time, n int) (ids []ID, next time.Time) {
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

type timer[ID comparable] struct {
	id ID
	at time.Time
}

type timerHeap[ID comparable] []timer[ID]

func (h timerHeap[ID]) Len() int           { return len(h) }
func (h timerHeap[ID]) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h timerHeap[ID]) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *timerHeap[ID]) Push(x any)        { *h = append(*h, x.(timer[ID])) }
func (h *timerHeap[ID]) Pop() any {
	old := *h
	last := old[len(old)-1]
	*h = old[:len(old)-1]
	return last
}
