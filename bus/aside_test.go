package bus_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

// An Aside is one connection, whoever asks first, and knows for how long it was away.
func TestAside(t *testing.T) {
	s, core := setup(t)
	a := bus.NewAside(core, "aside")
	first, err := a.Conn(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	if again, err := a.Conn(testContext(t)); again != first || err != nil || first == core {
		t.Error("it is another connection", err)
	}
	if away := first.Away(); away != 0 {
		t.Errorf("at first it was away for %s", away)
	}
	s.Shutdown()
	until(t, "it counts", func() bool { return first.Away() > 50*time.Millisecond })
	natstest.Restart(t, s)
	until(t, "it is back", func() bool {
		at := first.Away()
		return first.Connected() && first.Away() == at
	})

	s.Shutdown()
	b := bus.NewAside(core, "none")
	defer b.Close()
	ctx, cancel := context.WithCancel(testContext(t))
	answers := make(chan error, 2)
	for range 2 {
		go func() {
			_, err := b.Conn(ctx)
			answers <- err
		}()
	}
	cancel()
	for range 2 {
		if err := <-answers; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
}

// A stream that has its most messages takes no more, but another in the place of one.
func TestMostMessages(t *testing.T) {
	_, core := setup(t)
	if err := bus.Provision(testContext(t), core, []schemas.Asset{{Name: "FEW", Subjects: []string{"few.>"}, Latest: true, Refuse: true, MaxMessages: 2}}, 1); err != nil {
		t.Fatal(err)
	}
	for subject, want := range map[string]error{"few.c": bus.ErrFull, "few.a": nil} {
		for _, first := range []string{"few.a", "few.b"} {
			if _, err := core.Publish(testContext(t), first, nil, []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := core.Publish(testContext(t), subject, nil, []byte("y")); !errors.Is(err, want) {
			t.Errorf("%s: %v", subject, err)
		}
	}
}
