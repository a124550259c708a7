// Package natstest gives a test a NATS server of its own, with dayfly's accounts, in
// less than a tenth of a second.
package natstest

import (
	"context"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/port"
	"dayfly.dev/schemas"
)

// Password is that of every user.
const Password = "test"

// Option of Server.
type Option func(*natsd.Config)

// SyncAlways makes each write wait for the disk.
func SyncAlways() Option { return func(c *natsd.Config) { c.SyncAlways = true } }

// Workers replaces the agents' users, which are w1, w2 and w3.
func Workers(workers ...schemas.WorkerID) Option {
	return func(c *natsd.Config) {
		c.Workers = map[schemas.WorkerID]string{}
		for _, w := range workers {
			c.Workers[w] = Password
		}
	}
}

// Dir keeps the server's files there rather than in a folder of the test.
func Dir(dir string) Option { return func(c *natsd.Config) { c.Dir = dir } }

const patience = time.Minute

// Server starts a fresh server, in-process and on a port that is its own over restarts,
// and stops it with the test. It has no streams; see bus.Provision.
func Server(t testing.TB, opts ...Option) *natsd.Server {
	t.Helper()
	p, err := port.Keep("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	cfg := natsd.Config{Port: int(p.Port()), CorePassword: Password, Logger: Logger(t)}
	Workers("w1", "w2", "w3")(&cfg)
	for _, o := range opts {
		o(&cfg)
	}
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := natsd.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return s
}

// Connect connects as a core service, in-process, until the end of the test.
func Connect(t testing.TB, s *natsd.Server) *bus.Conn {
	t.Helper()
	return connect(t, bus.Config{Name: t.Name(), InProcess: s.InProcess(), User: natsd.CoreUser, Password: Password, Logger: Logger(t)})
}

// ConnectAgent connects as the agent of a worker, over TCP, until the end of the test.
func ConnectAgent(t testing.TB, s *natsd.Server, worker schemas.WorkerID) *bus.Conn {
	t.Helper()
	return connect(t, bus.Config{
		Name: t.Name(), URL: s.URL(), User: string(worker), Password: Password,
		InboxPrefix: schemas.AgentInbox(worker), APIPrefix: schemas.AgentAPIPrefix, Logger: Logger(t),
	})
}

func connect(t testing.TB, c bus.Config) *bus.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := bus.Connect(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

// Restart stops the server, if it runs, and starts it again on the same folder and
// port.
func Restart(t testing.TB, s *natsd.Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.Restart(ctx); err != nil {
		t.Fatal(err)
	}
}

// Logger is silent; make it write to t to look closer.
func Logger(testing.TB) zerolog.Logger { return zerolog.Nop() }
