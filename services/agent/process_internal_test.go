package agent

import (
	"context"
	"testing"

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
