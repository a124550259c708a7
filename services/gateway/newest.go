package gateway

import (
	"context"
	"sync"
)

// newest asks for the newest revision of all tasks, for however many at a time: whoever
// asks gets an answer to a question that was put after that, and no more than one is under
// way. The zero value needs only look.
type newest struct {
	look func() (uint64, error)

	turn sync.Mutex // of the one that is under way
	mu   sync.Mutex
	next *question // under mu: it is not under way yet
}

type question struct {
	answered chan struct{}
	revision uint64
	err      error
}

func (n *newest) ask(ctx context.Context) (uint64, error) {
	n.mu.Lock()
	q, first := n.next, n.next == nil
	if first {
		q = &question{answered: make(chan struct{})}
		n.next = q
	}
	n.mu.Unlock()
	if first {
		n.put(q)
	}
	select {
	case <-q.answered:
		return q.revision, q.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// put puts a question when the one before has its answer. look is bounded, so it does not
// end with whoever came first.
func (n *newest) put(q *question) {
	n.turn.Lock()
	defer n.turn.Unlock()
	n.mu.Lock()
	n.next = nil // who comes from here on is not answered by this one
	n.mu.Unlock()
	q.revision, q.err = n.look()
	close(q.answered)
}
