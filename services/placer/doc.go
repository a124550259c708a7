// Package placer chooses a worker for each queued task.
//
// Any number of placers may run. One leads, by a lease of leadership (lease.go); the
// others follow the same views, so that they can take over within seconds. What is
// decided lives in one book (book.go), which knows no bus:
//
//	tasks ──view──▶ ┌───────────── book ─────────────┐
//	workers ─view─▶ │ queue: whose turn (queue.go)   │──▶ compare-and-set queued→assigned
//	drains ──view─▶ │ fleet: what is free (fleet.go) │──▶ order to the worker
//	                │ filters, scores, holds         │──▶ why a task waits
//	                └────────────────────────────────┘
//
// The view of tasks wakes the placer. A message beside the record would not do so
// sooner: both would come from the server that has just stored the write, and the
// view brings the record and its revision along.
//
// Capacity is what is assigned, not what is used: a task counts on its worker from
// the moment it is chosen until its record leaves assigned, starting and running.
// The worker is the last judge and gives back what it cannot hold.
package placer
