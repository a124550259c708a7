package natssim_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natssim"
	"dayfly.dev/schemas"
)

var codec = bus.Codec[string]{
	Encode: func(s string) ([]byte, nats.Header, error) { return []byte(s), nil, nil },
	Decode: func(b []byte) (string, error) { return string(b), nil },
}

// site gives a server with all buckets, and a connection to it.
func site(t *testing.T) (*natssim.Server, *natssim.Link, *bus.Conn) {
	t.Helper()
	s := natssim.New(natssim.Config{})
	l := s.Link("test")
	c, err := bus.Connect(t.Context(), bus.Config{InProcess: l, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Stop() })
	if err := bus.Provision(t.Context(), c, schemas.Assets(time.Hour), 1); err != nil {
		t.Fatal(err)
	}
	return s, l, c
}

func TestALostAnswerIsSettledByLooking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, c := site(t)
		tasks := bus.NewTable(c, schemas.BucketTasks, codec)
		e, err := tasks.Create(t.Context(), "a", "1", "")
		if err != nil {
			t.Fatal(err)
		}
		s.SetFaults(natssim.Faults{LostAnswer: 1})
		if e, err = tasks.Replace(t.Context(), e, "2", ""); err != nil {
			t.Fatal(err)
		}
		if now, err := tasks.Get(t.Context(), "a"); err != nil || now.Value != "2" || now.Revision != e.Revision {
			t.Fatalf("%+v, %v", now, err)
		}
	})
}

func TestAWriteThatCannotBeSettledIsNotSaidToBeUndone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, l, c := site(t)
		s.SetFaults(natssim.Faults{LostAnswer: 1})
		cut := time.AfterFunc(time.Second, l.Cut)
		defer cut.Stop()
		_, err := bus.NewTable(c, schemas.BucketTasks, codec).Create(t.Context(), "a", "1", "")
		if !errors.Is(err, bus.ErrUnknownOutcome) || errors.Is(err, bus.ErrUnavailable) {
			t.Fatalf("%v", err)
		}
	})
}
