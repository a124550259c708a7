package main

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rogpeppe/go-internal/testscript"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/ops"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/fakeruntime"
	"dayfly.dev/services/gateway"
	"dayfly.dev/services/placer"
	"dayfly.dev/services/reaper"
)

// TestAgainstTheServices runs testdata/real, each script against real services on a
// NATS server of their own, with containers that are only played (see fakeruntime). All
// requests go through a wire that scripts can cut:
//
//	cutwire N…    breaks the next connections after so many bytes of answer
func TestAgainstTheServices(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/real",
		Setup: func(e *testscript.Env) error {
			w := newWire(t, startServices(t))
			e.Values["wire"] = w
			e.Setenv("DAYFLY_URL", "http://"+w.addr)
			e.Setenv("HOME", e.WorkDir)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code": cmdCode,
			"cutwire": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Value("wire").(*wire).cut(numbers(ts, args))
			},
			"setvar": func(ts *testscript.TestScript, _ bool, args []string) { // setvar VAR FILE
				ts.Setenv(args[0], trim(ts.ReadFile(args[1])))
			},
		},
	})
}

func trim(s string) string {
	for len(s) > 0 && s[len(s)-1] == '\n' {
		s = s[:len(s)-1]
	}
	return s
}

// startServices runs one of each until the test ends and gives the address of the API.
func startServices(t *testing.T) string {
	t.Helper()
	const worker schemas.WorkerID = "w1"
	server := natstest.Server(t)
	gw, pl, rp, ag := natstest.Connect(t, server), natstest.Connect(t, server), natstest.Connect(t, server), natstest.ConnectAgent(t, server, worker)
	if err := bus.Provision(t.Context(), gw, schemas.Assets(time.Hour), 1); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	log, health := natstest.Logger(t), ops.NewHealth()
	reg := func() prometheus.Registerer { return prometheus.NewRegistry() }
	host := schemas.Host{OS: "linux", Arch: "amd64", CPUs: 4, Memory: 8 << 30, Slots: 16, Engine: "fake"}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, run := range []func() error{
		func() error {
			return gateway.Run(ctx, gateway.Deps{Conn: gw, Logger: log, Metrics: reg(), Health: health, Listener: ln}, gateway.Config{})
		},
		func() error {
			return placer.Run(ctx, placer.Deps{Conn: pl, Logger: log, Metrics: reg(), Health: health}, placer.DefaultConfig())
		},
		func() error {
			return reaper.Run(ctx, reaper.Deps{Conn: rp, Logger: log, Metrics: reg(), Health: health}, reaper.DefaultConfig())
		},
		func() error {
			return agent.Run(ctx, agent.Deps{Conn: ag, Runtime: fakeruntime.New(fakeruntime.Config{Host: host}), Logger: log, Metrics: reg(), Health: health},
				agent.DefaultConfig(worker, t.TempDir()))
		},
	} {
		running.Go(func() {
			if err := run(); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return ln.Addr().String()
}

// wire passes TCP connections on and can break them.
type wire struct {
	addr, to string
	mu       sync.Mutex
	cuts     []int // under mu: bytes of answer after which the next connections break
}

func newWire(t *testing.T, to string) *wire {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{addr: ln.Addr().String(), to: to}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go w.pass(c)
		}
	}()
	return w
}

func (w *wire) cut(after []int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cuts = after
}

func (w *wire) pass(c net.Conn) {
	defer c.Close()
	d, err := net.Dial("tcp", w.to)
	if err != nil {
		return
	}
	defer d.Close()
	w.mu.Lock()
	limit := int64(1) << 60
	if len(w.cuts) > 0 {
		limit, w.cuts = int64(w.cuts[0]), w.cuts[1:]
	}
	w.mu.Unlock()
	go func() {
		_, _ = io.Copy(d, c)
		d.Close()
	}()
	_, _ = io.CopyN(c, d, limit)
}
