// Package natsd runs a NATS server with JetStream inside this process, with the two
// accounts that keep agents away from the records: CORE has JetStream and the core
// services, AGENTS has one user per worker and reaches a few subjects of CORE.
//
// The server is made from a configuration text (ConfigText), which serves a
// standalone nats-server as well, with one user for each agent. An embedded server
// knows agents by a token of their own (WorkerToken) and needs no list of them.
package natsd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"dayfly.dev/schemas"
)

// CoreUser is the user of the core services.
const CoreUser = "core"

// Config of one server.
type Config struct {
	Name         string // of the server; "" is "dayfly"
	Dir          string // where JetStream keeps its files; one server at a time uses it
	Host         string // "" is 127.0.0.1
	Port         int    // -1: a free one; 0: no listener, in-process connections only
	SyncAlways   bool   // a write is on the disk before it is acknowledged
	CorePassword string
	JoinSecret   string                      // lets in every agent with the WorkerToken made of it; "": none
	Workers      map[schemas.WorkerID]string // passwords of agents, beside those tokens
	TLS          *TLS                        // nil: no TLS
	Cluster      *Cluster                    // nil: a single server
	MaxStore     int64                       // bytes on the disk; 0 leaves it to the server
	Logger       zerolog.Logger
}

// TLS of the client port: files in PEM. With CA, which has signed the certificates of all
// servers of the cluster, they speak it among themselves too, and each proves who it is.
type TLS struct{ Cert, Key, CA string }

// Cluster makes the server one of several.
type Cluster struct {
	Name   string
	Host   string   // "" is that of the Config
	Port   int      // -1: a free one
	Routes []string // HOST:PORT of the cluster ports of the others; itself among them does no harm
	Secret string   // by which the servers know one another
}

// Server is a running server. It is an nats.InProcessConnProvider that survives
// Restart.
type Server struct {
	mu   sync.Mutex
	cfg  Config         // under mu; Port is what was found
	srv  *server.Server // under mu; nil while it is down
	lock *os.File       // under mu
}

var _ nats.InProcessConnProvider = (*Server)(nil)

// Start starts a server and returns once it accepts connections and JetStream is
// there. ctx bounds the start only. Stop it with Shutdown.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	s := &Server{cfg: cfg}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.start(ctx); err != nil {
		return nil, fmt.Errorf("start nats: %w", err)
	}
	return s, nil
}

func (s *Server) start(ctx context.Context) (err error) {
	if err := checkConfig(s.cfg); err != nil {
		return err
	}
	lock, err := lockDir(s.cfg.Dir)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	opts := &server.Options{}
	if err := opts.ProcessConfigString(ConfigText(s.cfg)); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	opts.NoSigs = true
	opts.DontListen = s.cfg.Port == 0
	opts.LameDuckDuration, opts.LameDuckGracePeriod = lameDuck, lameDuckGrace
	gate := &gate{cfg: s.cfg}
	opts.CustomClientAuthentication = gate
	srv, err := server.NewServer(opts)
	if err != nil {
		return err
	}
	if gate.core, err = srv.LookupAccount(coreAccount); err == nil {
		gate.agents, err = srv.LookupAccount(agentsAccount)
	}
	if err != nil {
		return fmt.Errorf("look up accounts: %w", err)
	}
	log := &logger{log: s.cfg.Logger, fatal: make(chan error, 1)}
	srv.SetLoggerV2(log, false, false, false)
	started := make(chan struct{})
	go func() { defer close(started); srv.Start() }()
	if err := ready(ctx, srv, started, log.fatal); err != nil {
		srv.Shutdown()
		srv.WaitForShutdown()
		<-started
		return err
	}
	if addr, ok := srv.Addr().(*net.TCPAddr); ok {
		s.cfg.Port = addr.Port
	}
	s.srv, s.lock = srv, lock
	return nil
}

func ready(ctx context.Context, srv *server.Server, started <-chan struct{}, fatal <-chan error) error {
	ok := make(chan struct{})
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for {
			if srv.ReadyForConnections(10 * time.Millisecond) {
				close(ok)
				return
			}
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	for _, step := range []<-chan struct{}{started, ok} {
		select {
		case err := <-fatal:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-step:
		}
	}
	select {
	case err := <-fatal:
		return err
	default:
	}
	if !srv.JetStreamEnabled() {
		return errors.New("JetStream did not start")
	}
	return nil
}

// ClusterURL is where the other servers of the cluster connect; "" without one.
func (s *Server) ClusterURL() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.srv == nil || s.srv.ClusterAddr() == nil {
		return ""
	}
	return s.srv.ClusterAddr().String()
}

// URL is where clients connect; "" without a listener.
func (s *Server) URL() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cfg.Port == 0 {
		return ""
	}
	scheme := "nats"
	if s.cfg.TLS != nil {
		scheme = "tls"
	}
	return fmt.Sprintf("%s://%s", scheme, net.JoinHostPort(host(s.cfg), fmt.Sprint(s.cfg.Port)))
}

// InProcess connects without a socket.
func (s *Server) InProcess() nats.InProcessConnProvider { return s }

// InProcessConn implements nats.InProcessConnProvider.
func (s *Server) InProcessConn() (net.Conn, error) {
	s.mu.Lock()
	srv := s.srv
	s.mu.Unlock()
	if srv == nil {
		return nil, errors.New("the server is down")
	}
	return srv.InProcessConn()
}

// Current says what of the cluster this server has not caught up with; nil when it may
// answer for all that it keeps.
func (s *Server) Current() error {
	srv := s.NATS()
	if srv == nil {
		return errors.New("the server is down")
	}
	if h := srv.Healthz(&server.HealthzOptions{}); h.Error != "" {
		return errors.New(h.Error)
	}
	return nil
}

// NATS is the server itself; nil while it is down.
func (s *Server) NATS() *server.Server {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.srv
}

// Shutdown stops the server and waits until it is gone and its folder is free.
func (s *Server) Shutdown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop()
}

// Retire stops a server of a cluster so that its clients hardly notice: it hands over
// what it leads first, and then sends them away one after the other. A single server
// is just stopped. One that catches up with the others may not hear of it for a long
// time: after retireMost Retire returns, for the process to end as if it were killed,
// which loses nothing that was acknowledged.
func (s *Server) Retire() {
	s.mu.Lock()
	srv, lock := s.srv, s.lock
	s.srv, s.lock = nil, nil
	s.mu.Unlock()
	if srv == nil {
		return
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		if s.cfg.Cluster != nil {
			srv.LameDuckShutdown()
		}
		stop(srv, lock)
	}()
	select {
	case <-gone:
	case <-time.After(retireMost):
		s.cfg.Logger.Warn().Dur("after", retireMost).Msg("the server does not stop by itself: leave it")
	}
}

// How long Retire takes to send the clients away, how long it waits before, and how
// long it takes at most.
const (
	lameDuck      = 2 * time.Second
	lameDuckGrace = 300 * time.Millisecond
	retireMost    = 15 * time.Second
)

func (s *Server) stop() {
	if s.srv != nil {
		stop(s.srv, s.lock)
	}
	s.srv, s.lock = nil, nil
}

func stop(srv *server.Server, lock *os.File) {
	srv.Shutdown()
	srv.WaitForShutdown()
	lock.Close()
}

// Restart starts the server again on the same folder and port, after stopping it
// where it runs.
func (s *Server) Restart(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop()
	if err := s.start(ctx); err != nil {
		return fmt.Errorf("restart nats: %w", err)
	}
	return nil
}

// lockDir makes the folder and takes it for this process. The lock goes with the
// process, however that ends.
func lockDir(dir string) (*os.File, error) {
	if dir == "" {
		return nil, errors.New("no folder given")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("another dayfly uses this folder: %s", dir)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// logger takes the server's words: what it notices is of interest when debugging
// only, and a fatal one ends the start instead of the process.
type logger struct {
	log   zerolog.Logger
	fatal chan error
}

func (l *logger) Noticef(format string, v ...any) { l.say(l.log.Debug(), format, v) }
func (l *logger) Warnf(format string, v ...any)   { l.say(l.log.Warn(), format, v) }
func (l *logger) Errorf(format string, v ...any)  { l.say(l.log.Error(), format, v) }
func (l *logger) Debugf(format string, v ...any)  { l.say(l.log.Debug(), format, v) }
func (l *logger) Tracef(format string, v ...any)  { l.say(l.log.Trace(), format, v) }
func (l *logger) Fatalf(format string, v ...any) {
	select {
	case l.fatal <- errors.New(strings.TrimSpace(fmt.Sprintf(format, v...))):
	default:
	}
}

func (l *logger) say(e *zerolog.Event, format string, v []any) {
	if e != nil {
		e.Str("nats", strings.TrimSpace(fmt.Sprintf(format, v...))).Msg("nats server")
	}
}
