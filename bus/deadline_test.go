package bus_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
)

// asleep is the context of a process that was stopped and has just gone on: its
// deadline is over, but the timer that says so runs only a little later.
type asleep struct{ context.Context }

func (a asleep) Deadline() (time.Time, bool) { return time.Now().Add(-time.Second), true }

func TestNothingIsSentAfterTheDeadline(t *testing.T) {
	s := natstest.Server(t)
	c := natstest.Connect(t, s)
	heard, err := c.NC.SubscribeSync("late")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Publish(asleep{ctx}, "late", nil, []byte("x")); !errors.Is(err, bus.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	if err := c.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := heard.Pending(); n > 0 {
		t.Error("it was sent")
	}
}
