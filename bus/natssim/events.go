package natssim

import (
	"container/heap"
	"time"
)

// event is something that will happen.
type event struct {
	at time.Time
	n  uint64 // of two at a time the one that was planned first comes first
	do func()
}

// events is a heap of them.
type events []event

func (q events) Len() int      { return len(q) }
func (q events) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *events) Push(e any)   { *q = append(*q, e.(event)) }

func (q events) Less(i, j int) bool {
	if q[i].at.Equal(q[j].at) {
		return q[i].n < q[j].n
	}
	return q[i].at.Before(q[j].at)
}

func (q *events) Pop() any {
	last := len(*q) - 1
	e := (*q)[last]
	(*q)[last] = event{}
	*q = (*q)[:last]
	return e
}

// at plans what shall be done then. s.mu is held, now and when it is done.
func (s *Server) at(when time.Time, do func()) {
	s.events++
	heap.Push(&s.queue, event{when, s.events, do})
	if s.queue[0].n == s.events {
		s.timer.Reset(time.Until(when))
	}
}

// run does what was planned, until the server is stopped. It is one goroutine, since one
// for each message would cost more than the message.
func (s *Server) run() {
	defer close(s.ended)
	for s.step() {
		<-s.timer.C
	}
}

// step does what is due, and says whether there is more to come.
func (s *Server) step() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.queue) > 0 && !s.stopped && !s.queue[0].at.After(time.Now()) {
		heap.Pop(&s.queue).(event).do()
	}
	if len(s.queue) > 0 {
		s.timer.Reset(time.Until(s.queue[0].at))
	}
	return !s.stopped
}
