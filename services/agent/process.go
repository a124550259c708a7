package agent

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"dayfly.dev/schemas"
)

// The streams of the task's own process are served by an execution as well, from the
// first client that attaches to the end of the attempt. Two things differ: what the
// process has written stands in its log, so it is read from there, at any offset, and
// nothing waits in memory while no client is there; and it goes on without a client.

// errGap ends a session whose next bytes are gone. Its client comes back, and is told so.
var errGap = errors.New("a part of the output is gone")

// main gives the execution of the task's own process.
func (s *sessions) main(ctx context.Context, t Attempt) (*execution, error) {
	m := t.Main()
	if m == nil {
		return nil, refuse(schemas.CodeInvalidValue, "the task's process is on no terminal and its stdin is not open, so there is nothing to attach to; follow its log")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.mains[t]; e != nil {
		return e, nil
	}
	fed, err := m.Fed()
	e := &execution{of: s, task: t, main: m, started: s.agent.rt.Now(), changed: make(chan struct{}), since: time.Now(), fed: fed, taken: fed}
	if err != nil {
		e.lost = err.Error()
	}
	s.mains[t] = e
	s.serving.Go(func() {
		e.runMain(ctx)
		s.mu.Lock()
		delete(s.mains, t)
		s.mu.Unlock()
	})
	return e, nil
}

// runMain carries the streams of the task's own process to the attempt's end.
func (e *execution) runMain(ctx context.Context) {
	var outputs, input sync.WaitGroup
	defer input.Wait()
	writing, stop := context.WithCancel(ctx)
	defer stop()
	for i := range e.out {
		outputs.Go(func() { e.follow(ctx, i) })
	}
	input.Go(func() { e.feedMain(writing) })
	select {
	case <-e.task.Done():
	case <-ctx.Done():
	}
	stop()
	e.mu.Lock()
	e.ended, e.moved = true, time.Now()
	e.mu.Unlock()
	hurrying, calm := context.WithCancel(ctx)
	defer calm()
	input.Go(func() { e.hurry(hurrying) })
	outputs.Wait()
	if ctx.Err() != nil {
		return // its sessions break, and their clients come back to the next agent
	}
	e.mu.Lock()
	if o := e.task.Outcome(); e.lost == "" && o.Exit != nil {
		e.exit = &schemas.ExecExit{Code: o.Exit.Code, Signal: o.Exit.Signal, TimedOut: o.Exit.TimedOut}
	} else if e.lost == "" {
		e.lost = "the task has ended"
	}
	e.deaf = true
	e.wakeLocked()
	for e.holder != nil && ctx.Err() == nil { // it shall hear the end
		changed := e.changed
		e.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		e.mu.Lock()
	}
	e.mu.Unlock()
}

// hurry ends the sessions of clients that take nothing of what is left, until ctx ends.
func (e *execution) hurry(ctx context.Context) {
	for ctx.Err() == nil {
		e.mu.Lock()
		changed := e.changed
		wait, bounded := e.patienceLocked()
		e.mu.Unlock()
		await(changed, ctx.Done(), wait, bounded)
	}
}

// follow reads a stream for the client that has it, as far ahead as it acknowledges.
func (e *execution) follow(ctx context.Context, i int) {
	b := make([]byte, 32<<10)
	for {
		news := e.task.Output().Changed() // before the look
		ended := false
		select {
		case <-e.task.Done():
			ended = true
		default:
		}
		e.mu.Lock()
		o, h, changed := &e.out[i], e.holder, e.changed
		at := o.end
		room := schemas.ExecWindow - (o.end - o.acked)
		e.mu.Unlock()
		wait := e.task.Done()
		switch {
		case h != nil && room > 0:
			n, from, err := e.main.ReadAt(streams[i], b[:min(int64(len(b)), room)], at)
			if n > 0 {
				e.took(h, i, at, from, b[:n])
				continue
			}
			if ended || err != nil && err != io.EOF {
				if e.readOut(h) {
					return
				}
				continue
			}
		case ended && h == nil:
			if e.readOut(h) {
				return
			}
			continue
		case ended:
			wait = nil
		}
		if h == nil || room <= 0 {
			news = nil
		}
		select {
		case <-news:
		case <-changed:
		case <-wait:
		case <-ctx.Done():
			return
		}
	}
}

// readOut says that follow is done with a stream, unless another client has come.
func (e *execution) readOut(h *holder) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.read = e.read || e.holder == h
	return e.holder == h
}

// took takes over what follow has read, unless another client has the streams by now.
func (e *execution) took(h *holder, i int, at, from int64, p []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	o := &e.out[i]
	switch {
	case e.holder != h || o.end != at:
		return
	case from != at:
		e.holder = nil
		e.main.Hold(nil)
		h.end(errGap)
		e.wakeLocked()
		return
	}
	o.add(p)
	e.holdLocked()
	e.wakeLocked()
}

// holdLocked says how far the process need not wait any more.
func (e *execution) holdLocked() {
	e.main.Hold(&[2]int64{e.out[0].end, e.out[1].end})
}

// placeLocked makes the streams go on where a client wants them.
func (e *execution) placeLocked(a schemas.ExecAttach) {
	for i, want := range []int64{a.Stdout, a.Stderr} {
		o, end := &e.out[i], e.main.End(streams[i])
		if a.Newest {
			want = max(o.acked, end-schemas.ExecWindow)
		}
		want = min(max(want, 0), end)
		if _, from, err := e.main.ReadAt(streams[i], make([]byte, 1), want); err == nil {
			want = max(want, from)
		}
		o.buf, o.end, o.acked = nil, want, want
	}
	e.holdLocked()
}

// feedMain writes to the process what was taken over, until nobody reads it any more.
func (e *execution) feedMain(ctx context.Context) {
	for {
		e.mu.Lock()
		b, end, deaf, changed := e.in[:min(len(e.in), 32<<10)], e.inEnd, e.deaf || e.lost != "", e.changed
		e.mu.Unlock()
		switch {
		case deaf:
			return
		case len(b) > 0:
			n, err := e.main.Write(ctx, b)
			e.mu.Lock()
			e.in, e.fed = e.in[n:], e.fed+int64(n)
			if len(e.in) == 0 {
				e.in = nil
			}
			e.deaf = err != nil && ctx.Err() == nil
			e.wakeLocked()
			e.mu.Unlock()
			if err != nil {
				return
			}
		case end:
			e.main.CloseInput()
			e.mu.Lock()
			e.deaf = true
			e.wakeLocked()
			e.mu.Unlock()
			return
		default:
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}
}
