package agent

import (
	"context"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"dayfly.dev/schemas"
)

// over is an attempt that has ended, and spoke the process of it, which has written something.
type over struct{ Attempt }

func (over) Done() <-chan struct{} { c := make(chan struct{}); close(c); return c }
func (over) Output() Output        { return quiet{} }

type quiet struct{ Output }

func (quiet) Changed() <-chan struct{} { return nil }

type spoke struct{ Main }

func (spoke) End(schemas.Stream) int64 { return 5 }
func (spoke) Hold(*[2]int64)           {}
func (spoke) ReadAt(_ schemas.Stream, p []byte, off int64) (int, int64, error) {
	return copy(p, "hello"[off:]), off, nil
}

// A client that attaches when the last of the output was read for others is not told of an
// end without that output: its session breaks, and it comes back to the log.
func TestWhoAttachesAfterTheLastReadIsSentAway(t *testing.T) {
	e := &execution{task: over{}, main: spoke{}, changed: make(chan struct{})}
	for i := range e.out {
		e.follow(t.Context(), i) // nobody is there
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	(&holder{e: e, end: cancel}).take(schemas.ExecAttach{})
	if err := context.Cause(ctx); err != errGap {
		t.Errorf("it stays: %v", err)
	}
}

// A client's word makes room for no more than was sent to it, and what is gone is not sent.
func TestAClientAcknowledgesNoMoreThanWasSent(t *testing.T) {
	e := &execution{task: over{}, changed: make(chan struct{})}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	h := &holder{e: e, acks: true, end: cancel}
	h.take(schemas.ExecAttach{})
	e.out[0].add(make([]byte, schemas.ExecWindow))
	h.next[0] = 100
	for _, ack := range []int64{50, math.MaxInt64, math.MinInt64} {
		h.obey(schemas.ExecControl{Ack: &schemas.ExecOffsets{Stdout: ack, Stderr: ack}})
	}
	if got := e.out[0].acked; got != 100 {
		t.Errorf("%d are acknowledged of 100", got)
	}
	if got := e.out[1].acked; got != 0 {
		t.Errorf("%d are acknowledged of nothing", got)
	}
	e.out[0].add(make([]byte, 2*schemas.ExecWindow)) // as of a program that nobody holds back any more
	if err := h.send(ctx); err != errGap {
		t.Errorf("sent across a gap: %v", err)
	}
}

// Whoever comes back to a program that is being ended is told so, and it ends.
func TestAProgramThatIsBeingEndedIsTakenByNobody(t *testing.T) {
	e := &execution{task: over{}, changed: make(chan struct{}), dropping: true}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	h := &holder{e: e, end: cancel}
	h.take(schemas.ExecAttach{})
	if err := h.send(ctx); err != errOver {
		t.Errorf("it goes on: %v", err)
	}
}

// What is left of a program that is over waits for its client, as long as that takes some of it.
func TestWhoTakesNothingHoldsNoProgramThatIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const keep = time.Minute
		e := &execution{task: over{}, changed: make(chan struct{}), of: &sessions{agent: &Agent{cfg: Config{ExecKeep: keep}}}}
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		h := &holder{e: e, acks: true, end: cancel}
		h.take(schemas.ExecAttach{})
		e.out[0].add(make([]byte, 100))
		h.next[0] = 100
		hurrying, calm := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			e.hurry(hurrying)
		}()
		time.Sleep(time.Hour) // it runs: its client may wait
		e.mu.Lock()
		e.ended, e.moved = true, time.Now()
		e.wakeLocked()
		e.mu.Unlock()
		for n := range int64(10) { // slow, but it takes
			time.Sleep(keep - time.Second)
			h.acked(schemas.ExecOffsets{Stdout: n + 1})
		}
		if ctx.Err() != nil {
			t.Fatal("a slow client is sent away")
		}
		time.Sleep(keep + time.Second)
		if err := context.Cause(ctx); err != errIdle {
			t.Errorf("one that takes nothing stays: %v", err)
		}
		calm()
		<-done
	})
}
