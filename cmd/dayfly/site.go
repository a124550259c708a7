package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/ops"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/docker"
	"dayfly.dev/services/gateway"
	"dayfly.dev/services/placer"
	"dayfly.dev/services/reaper"
)

// site is one `dayfly up`: a NATS server and the four services around it, each
// with a connection of its own.
//
//	          ┌ gateway ── HTTP
//	natsd ────┼ placer
//	          ├ agent ──── Docker
//	          └ reaper
type site struct {
	config  upConfig
	log     zerolog.Logger
	reg     *prometheus.Registry
	health  *ops.Health
	server  *natsd.Server
	secret  string // password of the core user, for this life of the server
	conns   []*bus.Conn
	runtime *docker.Runtime

	http, ingress, admin net.Listener
}

// up runs the site until a signal ends it.
func (c *cli) up(ctx context.Context, u upConfig) error {
	log, err := ops.NewLogger(c.err, u.logLevel, u.logFormat, "up")
	if err != nil {
		return err
	}
	signal.Stop(c.signals)
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	s := &site{config: u, log: log, reg: ops.NewRegistry(version, commit()), health: ops.NewHealth()}
	defer s.close()
	if err := s.open(ctx); err != nil {
		return err
	}
	if err := s.announce(c); err != nil {
		return err
	}
	return s.run(ctx)
}

// open makes everything that the services stand on. What fails here fails before
// anything was promised to anybody.
func (s *site) open(ctx context.Context) error {
	u := &s.config
	init, err := findInit(u.init)
	if err != nil {
		return fmt.Errorf("%w; run `make build`, or give --init PATH", err)
	}
	if err := os.MkdirAll(u.data, 0o700); err != nil {
		return fmt.Errorf("make the data folder: %w", err)
	}
	if u.data, err = filepath.Abs(u.data); err != nil {
		return err
	}
	if u.cluster == "" {
		if u.cluster, err = clusterName(u.data); err != nil {
			return err
		}
	}
	for _, l := range []struct {
		what, addr string
		to         *net.Listener
	}{{"API", u.http, &s.http}, {"ingress", u.ingress, &s.ingress}, {"admin", u.admin, &s.admin}} {
		if *l.to, err = net.Listen("tcp", l.addr); err != nil {
			return fmt.Errorf("listen for the %s: %w; give another address with a flag, or end what uses it", l.what, err)
		}
	}
	worker := schemas.WorkerID(u.worker)
	s.secret = rand.Text()
	secrets := map[schemas.WorkerID]string{worker: rand.Text()}
	config := natsd.Config{
		Dir: filepath.Join(u.data, "nats"), SyncAlways: u.sync == "always", CorePassword: s.secret, Workers: secrets,
		Logger: s.logger("nats"),
	}
	if u.nats != "" {
		if config.Host, config.Port, err = hostPort(u.nats); err != nil {
			return err
		}
	}
	if s.server, err = natsd.Start(ctx, config); err != nil {
		return fmt.Errorf("start NATS: %w", err)
	}
	s.runtime, err = docker.New(docker.Config{
		Cluster: u.cluster, Worker: worker, StateDir: filepath.Join(u.data, "agent"), InitPath: init, Slots: u.slots,
		AuthFile: dockerConfig(), Logger: s.logger("agent"),
	})
	if err != nil {
		return fmt.Errorf("reach Docker: %w", err)
	}
	setup, err := s.connect(ctx, "setup", bus.Config{User: natsd.CoreUser, Password: s.secret})
	if err != nil {
		return err
	}
	if err := bus.Provision(ctx, setup, schemas.Assets(u.logAge), 1); err != nil {
		return err
	}
	return s.connectServices(ctx, worker, secrets[worker])
}

// The places of the services' connections in site.conns.
const (
	connSetup = iota
	connGateway
	connPlacer
	connReaper
	connAgent
)

func (s *site) connectServices(ctx context.Context, worker schemas.WorkerID, secret string) error {
	for _, name := range []string{"gateway", "placer", "reaper"} {
		if _, err := s.connect(ctx, name, bus.Config{User: natsd.CoreUser, Password: s.secret}); err != nil {
			return err
		}
	}
	_, err := s.connect(ctx, "agent", bus.Config{
		User: string(worker), Password: secret,
		InboxPrefix: schemas.AgentInbox(worker), APIPrefix: schemas.AgentAPIPrefix,
	})
	return err
}

func (s *site) connect(ctx context.Context, name string, c bus.Config) (*bus.Conn, error) {
	c.Name, c.InProcess, c.Logger = name, s.server.InProcess(), s.logger(name)
	conn, err := bus.Connect(ctx, c)
	if err != nil {
		return nil, err
	}
	conn.Observe = ops.NewBusMetrics(s.reg, name, conn.Connected).Observe
	s.conns = append(s.conns, conn)
	return conn, nil
}

// run runs the services until ctx ends: the gateway ends first, so that what was
// accepted is still placed, and the server last.
func (s *site) run(ctx context.Context) error {
	u := s.config
	policy := schemas.DefaultPolicy()
	policy.MaxTTL = schemas.Duration(u.maxTTL)
	deps := func(i int) (*bus.Conn, zerolog.Logger) {
		return s.conns[i], s.logger([]string{"setup", "gateway", "placer", "reaper", "agent"}[i])
	}
	worker := schemas.WorkerID(u.worker)

	inner, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	back, bctx := errgroup.WithContext(inner)
	back.Go(func() error {
		conn, log := deps(connPlacer)
		// Nobody else holds this data folder, so an earlier leader of this name is dead.
		return placer.Run(bctx, placer.Deps{Conn: conn, Logger: log, Metrics: s.reg, Health: s.health}, placer.Config{Identity: "up-" + u.cluster})
	})
	back.Go(func() error {
		conn, log := deps(connReaper)
		config := reaper.DefaultConfig()
		config.Retention = u.retention
		return reaper.Run(bctx, reaper.Deps{Conn: conn, Logger: log, Metrics: s.reg, Health: s.health}, config)
	})
	back.Go(func() error {
		conn, log := deps(connAgent)
		config := agent.DefaultConfig(worker, filepath.Join(u.data, "agent"))
		config.Version = version
		return agent.Run(bctx, agent.Deps{Conn: conn, Runtime: s.runtime, Logger: log, Metrics: s.reg, Health: s.health}, config)
	})

	front, fctx := errgroup.WithContext(ctx)
	front.Go(func() error {
		conn, log := deps(connGateway)
		return gateway.Run(fctx, gateway.Deps{Conn: conn, Logger: log, Metrics: s.reg, Health: s.health, Listener: s.http},
			gateway.Config{Policy: policy, Retention: u.retention})
	})
	front.Go(func() error { return ops.Serve(fctx, s.ingress, http.HandlerFunc(noTask)) })
	front.Go(func() error { return ops.Serve(fctx, s.admin, ops.Admin(s.reg, s.health)) })
	front.Go(func() error { // a service that ends ends all
		select {
		case <-fctx.Done():
			return nil
		case <-bctx.Done():
			return errors.New("a service ended")
		}
	})
	err := front.Wait()
	stop()
	if e := back.Wait(); e != nil {
		err = e // the reason, not what followed from it
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// noTask answers on the ingress port until tasks can have ports.
func noTask(w http.ResponseWriter, _ *http.Request) {
	http.Error(w, "no task has this hostname", http.StatusNotFound)
}

// close gives up what open made, the server last.
func (s *site) close() {
	for _, l := range []net.Listener{s.http, s.ingress, s.admin} {
		if l != nil {
			_ = l.Close() // again, where its server has closed it
		}
	}
	if s.runtime != nil {
		_ = s.runtime.Close()
	}
	for _, c := range s.conns {
		c.Close()
	}
	if s.server != nil {
		s.server.Shutdown()
	}
}

// addresses is what --print-addrs writes.
type addresses struct {
	HTTP    string `json:"http"`
	Ingress string `json:"ingress"`
	Admin   string `json:"admin"`
	NATS    string `json:"nats,omitempty"`
	Worker  string `json:"worker"`
	Cluster string `json:"cluster"`
}

// announce says where everything is. The listeners are open by now: whoever comes
// early waits in them.
func (s *site) announce(c *cli) error {
	a := addresses{
		HTTP: "http://" + s.http.Addr().String(), Ingress: "http://" + s.ingress.Addr().String(), Admin: "http://" + s.admin.Addr().String(),
		Worker: s.config.worker, Cluster: s.config.cluster,
	}
	if s.config.nats != "" {
		a.NATS = s.server.URL()
	}
	if path := s.config.printAddrs; path != "" {
		b, err := json.MarshalIndent(a, "", "  ")
		if err == nil {
			err = os.WriteFile(path+".new", append(b, '\n'), 0o600)
		}
		if err == nil {
			err = os.Rename(path+".new", path)
		}
		if err != nil {
			return fmt.Errorf("write the addresses: %w", err)
		}
	}
	fmt.Fprintf(c.err, "dayfly is up: API %s, admin %s, worker %s, data in %s\n", a.HTTP, a.Admin, a.Worker, s.config.data)
	fmt.Fprintf(c.err, "try: curl -s '%s/v1/tasks?wait=done' -H 'Content-Type: application/json' -d '{\"image\":\"busybox\",\"command\":[\"echo\",\"hi\"]}'\n", a.HTTP)
	return nil
}

func (s *site) logger(service string) zerolog.Logger {
	log, err := ops.NewLogger(os.Stderr, s.config.logLevel, s.config.logFormat, service)
	if err != nil {
		return s.log
	}
	return log
}

// clusterName gives the name that tells this dayfly's containers from those of
// others on the same Docker; it is made up once for a data folder.
func clusterName(dir string) (string, error) {
	path := filepath.Join(dir, "cluster")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		b = []byte("dayfly-" + strings.ToLower(rand.Text()[:10]) + "\n")
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		return "", fmt.Errorf("name of the cluster: %w", err)
	}
	name := strings.TrimSpace(string(b))
	if _, err := schemas.ParseWorkerID(name); err != nil {
		return "", fmt.Errorf("%s does not hold a cluster's name (1 to 63 of a-z, 0-9, -)", path)
	}
	return name, nil
}

func hostPort(addr string) (string, int, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.Atoi(port)
	if n == 0 {
		n = -1 // natsd's word for a free one
	}
	return host, n, err
}

// dockerConfig is the Docker CLI's file with the logins of registries, if there is
// one.
func dockerConfig() string {
	dir := os.Getenv("DOCKER_CONFIG")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return ""
		}
		dir = filepath.Join(home, ".docker")
	}
	path := filepath.Join(dir, "config.json")
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	return path
}
