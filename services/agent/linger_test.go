package agent_test

import (
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// A SIGTERM just after a task's end: its order to close and what was promised of its log
// are still to come.
func TestAStoppedAgentRemovesWhatHasEnded(t *testing.T) {
	b := newBench(t)
	b.cfg.Linger = 20 * time.Second
	b.start()
	epoch := b.registered("").Epoch
	ended, closed, left := assignment(epoch, 1), assignment(epoch, 1), assignment(epoch, 1)
	b.run(left, "sleep", "1h")
	b.report(left, running)
	b.run(ended, "log", "100", "1ms")
	b.end(ended)
	b.run(closed, "log", "100", "1ms")
	b.end(closed)
	b.order(schemas.Order{Assignment: closed, Want: schemas.WantClose})
	b.stop(nil)
	b.order(schemas.Order{Assignment: ended, Want: schemas.WantClose})
	if err := b.halt(); err != nil {
		t.Fatal(err)
	}
	if n := b.rt.Live(); n != 1 {
		t.Errorf("%d containers are left, want that of the task that runs", n)
	}
}

// What nobody closes does not keep an agent from its end, and is still there for the next.
func TestAStoppedAgentHandsOverWhatIsNotClosed(t *testing.T) {
	b := newBench(t)
	b.cfg.Linger = 10 * time.Millisecond
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "exit", "7")
	b.end(a)
	if err := b.halt(); err != nil {
		t.Fatal(err)
	}
	if n := b.rt.Live(); n != 1 {
		t.Fatalf("%d containers are left, want 1", n)
	}
	b.start()
	b.order(schemas.Order{Assignment: a, Want: schemas.WantClose})
	b.until("the container is removed", func() bool { return b.rt.Live() == 0 })
}
