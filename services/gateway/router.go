package gateway

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway/ingress"
)

// startWait is how long a request for a task that is not known or does not run yet is
// held: another gateway may have said so already.
const startWait = 250 * time.Millisecond

// router shows the ingress what of the tasks it needs.
type router struct{ g *Gateway }

var _ ingress.Router = router{}

// Find implements ingress.Router.
func (r router) Find(ctx context.Context, label string) (ingress.Target, error) {
	begin, cancel := context.WithTimeout(ctx, r.g.cfg.OpTimeout)
	defer cancel()
	select {
	case <-r.g.tasks.Ready():
	case <-begin.Done():
		return ingress.Target{}, unavailable()
	}
	e, ok := r.g.endpoints.find(ctx, label, startWait)
	if !ok {
		return ingress.Target{}, noEndpoint()
	}
	it, err := r.g.whenRunning(ctx, e.task, startWait)
	if err != nil {
		return ingress.Target{}, err
	}
	for _, p := range schemas.ParsePortsHeader(it.ports) {
		if p.Name == e.name {
			return ingress.Target{Task: e.task, Port: p.Port, Protocol: p.Protocol, Life: r.g.life(it)}, nil
		}
	}
	return ingress.Target{}, noEndpoint()
}

func noEndpoint() *schemas.Error {
	return &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Detail: "nothing has this address, or it is long gone"}
}

// whenRunning gives a task that runs, and waits a moment for one that does not yet.
func (g *Gateway) whenRunning(ctx context.Context, id schemas.TaskID, patience time.Duration) (*item, error) {
	it, _, ok := g.tasks.Get(string(id))
	if ok && !it.state.Final() && it.state != schemas.Running {
		wait, cancel := context.WithTimeout(ctx, patience)
		_ = g.tasks.Wait(wait, string(id), func(now *item, _ uint64, exists bool) bool {
			it, ok = now, exists
			return !exists || now.state.Final() || now.state == schemas.Running
		})
		cancel()
	}
	switch {
	case !ok:
		return nil, noEndpoint()
	case it.state == schemas.Running:
		return it, nil
	case it.state.Final():
		return nil, g.ended(ctx, id)
	}
	return nil, &schemas.Error{Status: http.StatusServiceUnavailable, Code: schemas.CodeStarting, Task: id, State: it.state,
		Detail: fmt.Sprintf("it does not run yet (%s)", it.state), RetryAfter: schemas.Duration(time.Second)}
}

// ended says since when a task is over, and why.
func (g *Gateway) ended(ctx context.Context, id schemas.TaskID) error {
	e := &schemas.Error{Status: http.StatusGone, Code: schemas.CodeEnded, Task: id, Detail: "it ended"}
	it, _, ok := g.tasks.Get(string(id))
	if !ok {
		return e
	}
	b := it.body.Load()
	if b == nil {
		return e
	}
	r, err := b.listed()
	if err != nil {
		return e
	}
	e.State = r.State
	e.Detail = fmt.Sprintf("it ended %s ago (%s)", schemas.Duration(max(0, time.Since(r.EndedAt)).Truncate(time.Second)), r.State)
	return e
}

// life tells one holder of a task, and one process of its agent, from others.
func (g *Gateway) life(it *item) string {
	worker, epoch, _ := strings.Cut(it.holder, " ")
	beat, _, _ := g.fleet.beats.Get(worker)
	return epoch + "." + beat.Instance
}

// Enter implements ingress.Router.
func (r router) Enter(id schemas.TaskID) (leave func(), err error) { return r.g.visits.enter(id) }

// Dial implements ingress.Router.
func (r router) Dial(ctx context.Context, id schemas.TaskID, port int) (net.Conn, error) {
	c, err := r.g.dial(ctx, id, port)
	return c, forVisitors(err)
}

// forVisitors words an error for people who know nothing of tasks.
func forVisitors(err error) error {
	e, ok := err.(*schemas.Error)
	if !ok {
		return err
	}
	told := *e
	switch e.Code {
	case schemas.CodeNoListener:
		told.Detail, told.RetryAfter = "what runs here does not listen on its port, or not yet", schemas.Duration(2*time.Second)
	case schemas.CodeWorkerAway:
		told.Detail = "the machine that runs it cannot be reached at the moment"
	case schemas.CodeStateConflict:
		told.Status, told.Code, told.Detail, told.RetryAfter = http.StatusServiceUnavailable, schemas.CodeStarting, "it has just ended, or is being started again", schemas.Duration(time.Second)
	case schemas.CodeTooManyRequests:
		told.Status, told.Detail, told.RetryAfter = http.StatusServiceUnavailable, "too many connections are open to the machine that runs it", schemas.Duration(time.Second)
	}
	return &told
}

// visits bounds how many connections from outside one task has at a time.
type visits struct {
	limit int

	mu  sync.Mutex
	now map[schemas.TaskID]int // under mu
}

func newVisits(limit int) *visits {
	return &visits{limit: limit, now: map[schemas.TaskID]int{}}
}

func (v *visits) enter(id schemas.TaskID) (leave func(), err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.now[id] >= v.limit {
		return nil, &schemas.Error{Status: http.StatusServiceUnavailable, Code: schemas.CodeTooManyRequests, Task: id,
			Detail: "too many others are here at the same time", RetryAfter: schemas.Duration(time.Second)}
	}
	v.now[id]++
	return sync.OnceFunc(func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.now[id]--; v.now[id] == 0 {
			delete(v.now, id)
		}
	}), nil
}
