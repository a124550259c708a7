// Package stack runs dayfly's services in this process over an embedded NATS
// server, with fake runtimes in the place of Docker: for measuring the control
// plane and for tests that need many workers.
package stack

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/ops"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/fakeruntime"
	"dayfly.dev/services/gateway"
	"dayfly.dev/services/placer"
	"dayfly.dev/services/reaper"
)

// Options of a stack.
type Options struct {
	Templates  string // folder of templates; "" is none
	Dir        string // of the server and the journals
	SyncAlways bool
	Agents     int
	Logger     zerolog.Logger
	Runtime    fakeruntime.Config
}

// Stack is a running control plane.
type Stack struct {
	URL      string
	Runtimes map[schemas.WorkerID]*fakeruntime.Runtime

	server *natsd.Server
	cancel context.CancelFunc
	wg     sync.WaitGroup
	conns  []*bus.Conn
	mu     sync.Mutex
	err    error // under mu: the first that a service ended with
}

// Start starts everything and returns when all workers are registered.
func Start(ctx context.Context, o Options) (*Stack, error) {
	workers := map[schemas.WorkerID]string{}
	for i := range o.Agents {
		workers[schemas.WorkerID(fmt.Sprintf("w%04d", i))] = rand.Text()
	}
	password := rand.Text()
	server, err := natsd.Start(ctx, natsd.Config{Dir: o.Dir, SyncAlways: o.SyncAlways, CorePassword: password, Workers: workers, Logger: o.Logger})
	if err != nil {
		return nil, err
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s := &Stack{Runtimes: map[schemas.WorkerID]*fakeruntime.Runtime{}, server: server, cancel: cancel}
	if err := s.start(ctx, run, o, password, workers); err != nil {
		return nil, errors.Join(err, s.Stop())
	}
	return s, nil
}

func (s *Stack) start(ctx, run context.Context, o Options, password string, workers map[schemas.WorkerID]string) error {
	connect := func(name, user, password, inbox, api string) (*bus.Conn, error) {
		c, err := bus.Connect(ctx, bus.Config{Name: name, InProcess: inProcess(s.server), User: user, Password: password,
			InboxPrefix: inbox, APIPrefix: api, Logger: o.Logger})
		if err == nil {
			s.conns = append(s.conns, c)
		}
		return c, err
	}
	var core [4]*bus.Conn
	for i, name := range []string{"gateway", "placer", "reaper", "setup"} {
		c, err := connect(name, natsd.CoreUser, password, "", "")
		if err != nil {
			return err
		}
		core[i] = c
	}
	if err := bus.Provision(ctx, core[3], schemas.Assets(time.Hour), 1); err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.URL = "http://" + ln.Addr().String()
	health := ops.NewHealth()
	var templates *gateway.Templates
	if o.Templates != "" {
		if templates, err = gateway.OpenTemplates(o.Templates, schemas.DefaultPolicy()); err != nil {
			return err
		}
	}
	s.run(run, func(ctx context.Context) error {
		return gateway.Run(ctx, gateway.Deps{Templates: templates, Conn: core[0], Logger: o.Logger, Metrics: prometheus.NewRegistry(), Health: health, Listener: ln}, gateway.Config{})
	})
	s.run(run, func(ctx context.Context) error {
		return placer.Run(ctx, placer.Deps{Conn: core[1], Logger: o.Logger, Metrics: prometheus.NewRegistry(), Health: health}, placer.DefaultConfig())
	})
	s.run(run, func(ctx context.Context) error {
		return reaper.Run(ctx, reaper.Deps{Conn: core[2], Logger: o.Logger, Metrics: prometheus.NewRegistry(), Health: health}, reaper.DefaultConfig())
	})
	for w, password := range workers {
		c, err := connect("agent-"+string(w), string(w), password, schemas.AgentInbox(w), schemas.AgentAPIPrefix)
		if err != nil {
			return err
		}
		rt := fakeruntime.New(o.Runtime)
		s.Runtimes[w] = rt
		s.run(run, func(ctx context.Context) error {
			return agent.Run(ctx, agent.Deps{Conn: c, Runtime: rt, Logger: o.Logger, Metrics: prometheus.NewRegistry()},
				agent.DefaultConfig(w, fmt.Sprintf("%s/%s", o.Dir, w)))
		})
	}
	return s.ready(ctx, core[3], len(workers))
}

// inProcess gives the embedded server as a provider of connections.
func inProcess(s *natsd.Server) nats.InProcessConnProvider { return s.InProcess() }

func (s *Stack) run(ctx context.Context, service func(context.Context) error) {
	s.wg.Go(func() {
		if err := service(ctx); err != nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.err == nil {
				s.err = err
			}
		}
	})
}

// ready waits until every worker has beaten.
func (s *Stack) ready(ctx context.Context, c *bus.Conn, workers int) error {
	beats := bus.NewView(c, schemas.BucketWorkers, func(string, nats.Header, []byte) (struct{}, error) { return struct{}{}, nil }, bus.ViewOptions[struct{}]{})
	vctx, cancel := context.WithCancel(ctx)
	var view sync.WaitGroup
	defer view.Wait()
	defer cancel()
	view.Go(func() { _ = beats.Run(vctx) })
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for beats.Len() < workers {
		s.mu.Lock()
		err := s.err
		s.mu.Unlock()
		if err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%d of %d workers registered: %w", beats.Len(), workers, ctx.Err())
		}
	}
	return nil
}

// Stop ends everything and gives the first error that a service ended with.
func (s *Stack) Stop() error {
	s.cancel()
	s.wg.Wait()
	for _, rt := range s.Runtimes {
		_ = rt.Close()
	}
	for _, c := range s.conns {
		c.Close()
	}
	s.server.Shutdown()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}
