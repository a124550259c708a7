package bus_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

func bucket(t testing.TB, c *bus.Conn, first uint64) *bus.Table[string] {
	t.Helper()
	if err := bus.Provision(t.Context(), c, []schemas.Asset{{Name: "things", Bucket: true, TTL: true, First: first}}, 1); err != nil {
		t.Fatal(err)
	}
	return bus.NewTable(c, "things", bus.Codec[string]{
		Encode: func(s string) ([]byte, nats.Header, error) { return []byte(s), nil, nil },
		Decode: func(b []byte) (string, error) { return string(b), nil },
	})
}

// Two keys are always changed one after the other, so in no state of the bucket is the
// first older than the second, or more than one ahead; and none is ever missing.
func TestSnapshotIsOneState(t *testing.T) {
	c := natstest.Connect(t, natstest.Server(t))
	table := bucket(t, c, 0)
	var pair [2]bus.Entry[string]
	for i := range pair {
		e, err := table.Create(t.Context(), fmt.Sprint("k", i), "0", "")
		if err != nil {
			t.Fatal(err)
		}
		pair[i] = e
	}
	for i := range 500 { // what must be read beside them
		if _, err := table.Create(t.Context(), fmt.Sprint("other", i), "x", ""); err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	write := func() error {
		for n := 1; ; n++ {
			for i := range pair {
				e, err := table.Replace(ctx, pair[i], fmt.Sprint(n), "")
				if ctx.Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				pair[i] = e
			}
		}
	}
	go func() { ended <- write() }()
	last := ""
	for range 20 {
		list, sequence, err := c.Snapshot(t.Context(), "things")
		if err != nil {
			t.Error(err)
			break
		}
		values := map[string]string{}
		for _, e := range list {
			values[e.Key] = string(e.Data)
			if e.Revision > sequence {
				t.Errorf("%s is of revision %d, the state of %d", e.Key, e.Revision, sequence)
			}
		}
		var a, b int
		fmt.Sscan(values["k0"], &a)
		fmt.Sscan(values["k1"], &b)
		if len(list) != 502 || a < b || a > b+1 {
			t.Errorf("%d keys, the pair is %q and %q", len(list), values["k0"], values["k1"])
		}
		last = values["k1"]
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if last == "0" {
		t.Error("nothing was written meanwhile")
	}
}

// A bucket is filled behind all revisions that were known, forgets nothing of the
// headers, and stays behind them over a restart.
func TestFill(t *testing.T) {
	s := natstest.Server(t)
	c := natstest.Connect(t, s)
	const first = 1_000_000_007
	table := bucket(t, c, first)
	entries := []bus.Stored{{Key: "a", Data: []byte("1")}, {Key: "b", Data: []byte("2"), Header: nats.Header{jetstream.MsgTTLHeader: {"1h"}, "S": {"done"}}}}
	if err := c.Fill(t.Context(), "things", entries); err != nil {
		t.Fatal(err)
	}
	if err := c.Fill(t.Context(), "things", entries[:1]); !errors.Is(err, bus.ErrConflict) {
		t.Errorf("a key was written over: %v", err)
	}
	natstest.Restart(t, s)
	bucket(t, c, 0) // as a service makes it
	list, _, err := c.Snapshot(t.Context(), "things")
	if err != nil || len(list) != 2 || list[0].Revision != first || list[1].Header.Get("S") != "done" || list[1].Header.Get(jetstream.MsgTTLHeader) != "1h" {
		t.Errorf("%+v, %v", list, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	e, err := table.Get(ctx, "a")
	if err == nil {
		e, err = table.Replace(ctx, e, "3", "")
	}
	if err != nil || e.Revision != first+2 {
		t.Errorf("revision %d, %v", e.Revision, err)
	}
}
