package agent_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// A first beat whose answer is lost may arrive when the agent tries again: it is its own,
// and must be of the epoch that the agent goes on with.
func TestAFirstBeatThatArrivesLateIsOfTheSameEpoch(t *testing.T) {
	b := newBench(t)
	subject := "$KV." + schemas.BucketWorkers + "." + string(worker)
	first := make(chan *nats.Msg, 1)
	_, err := b.core.NC.Subscribe(subject, func(m *nats.Msg) {
		if !bytes.Contains(m.Data, []byte(`"instance"`)) {
			return // not the agent's
		}
		select {
		case first <- m:
		default:
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.core.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	workers, err := b.core.JS.Stream(b.context(), bus.StreamOf(schemas.BucketWorkers))
	if err != nil {
		t.Fatal(err)
	}
	conn := natstest.ConnectAgent(t, b.server, worker)
	var gets, creates atomic.Int32
	conn.Observe = func(bucket, op string, _ time.Duration, err error) {
		switch {
		case op == "get" && errors.Is(err, bus.ErrNotFound) && gets.Add(1) == 2:
			// What the first try sent arrives between the second's look and its write.
			m := <-first
			if _, err := b.core.Publish(context.Background(), subject, nil, m.Data); err != nil {
				t.Error(err)
			}
		case op == "get" && gets.Load() == 1 && creates.Load() == 0:
			// The first try comes to nothing: something else is in the way.
			if _, err := b.core.Publish(context.Background(), subject, nil, []byte(`{"worker":"w1","epoch":"e0"}`)); err != nil {
				t.Error(err)
			}
		case op == "create" && creates.Add(1) == 1:
			if err := workers.Purge(context.Background()); err != nil {
				t.Error(err)
			}
		}
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	b.stop, b.ended = cancel, make(chan error, 1)
	go func() {
		b.ended <- agent.Run(ctx, agent.Deps{Conn: conn, Runtime: b.rt, Logger: zerolog.New(zerolog.NewTestWriter(t))}, b.cfg)
	}()
	t.Cleanup(func() { b.halt() })

	a := assignment(b.registered("e0").Epoch, 1)
	b.run(a, "exit", "7")
	if r := b.end(a); r.End.By != schemas.EndedItself {
		t.Errorf("ended by %s", r.End.By)
	}
	if creates.Load() < 2 {
		t.Error("the first try was not disturbed")
	}
}

// NATS is wiped, and everything ends with it: the worker comes back by itself under its
// own name, whether its agent lived on or was started anew.
func TestAWorkerComesBackAfterNATSWasWiped(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	b.server = natstest.Server(t, natstest.Dir(dir))
	b.core = natstest.Connect(t, b.server)
	provision := func() {
		t.Helper()
		b.until("the streams are made", func() bool {
			return bus.Provision(b.context(), b.core, schemas.Assets(time.Hour), 1) == nil
		})
	}
	provision()
	workers := bus.NewTable(b.core, schemas.BucketWorkers, bus.JSON[schemas.Beat](nil))
	var epoch schemas.Epoch
	registered := func() {
		t.Helper()
		b.until("it has registered anew", func() bool {
			select {
			case err := <-b.ended:
				t.Fatalf("the agent ended: %v", err)
			default:
			}
			e, err := workers.Get(b.context(), string(worker))
			if err != nil || e.Value.Epoch == epoch {
				return false
			}
			epoch = e.Value.Epoch
			return true
		})
	}
	b.start()
	registered()
	for i := range 6 {
		killed := i%2 == 0
		if killed {
			if err := b.halt(); err != nil {
				t.Fatal(err)
			}
		}
		b.server.Shutdown()
		if err := os.RemoveAll(filepath.Join(dir, "jetstream")); err != nil {
			t.Fatal(err)
		}
		natstest.Restart(t, b.server)
		if killed {
			b.start() // before anybody has made the streams
		}
		provision()
		registered()
	}
}
