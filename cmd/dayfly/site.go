package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
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

// site is everything in one process, each service with a connection of its own:
//
//	http ──▶ gateway ─┐
//	          placer ─┤ in-process connections     ┌─ agent ── docker runtime ──▶ Docker
//	          reaper ─┴──▶ natsd (account CORE) ◀──┘ (account AGENTS)
//
// They are started from right to left and stopped in the order of services: what
// lets work in first, NATS last. Tasks go on running without us.
type site struct {
	cli      *cli
	config   upConfig
	logger   func(service string) zerolog.Logger
	log      zerolog.Logger // of the site itself
	registry *prometheus.Registry
	health   *ops.Health

	http, ingress, admin net.Listener
	server               *natsd.Server
	runtime              *docker.Runtime
	conns                map[string]*bus.Conn
}

// service is one part of the site. run ends when its context does. check is the
// name of the check by which it says that it is ready, "" if it has none.
type service struct {
	name  string
	check string
	run   func(context.Context) error
}

// up runs the site until a signal.
func (c *cli) up(ctx context.Context, u upConfig) (err error) {
	ctx, stop := c.interruptible(ctx)
	defer stop()
	s := &site{cli: c, config: u, health: ops.NewHealth(), conns: map[string]*bus.Conn{}}
	if s.log, err = ops.NewLogger(c.err, u.logLevel, u.logFormat, "up"); err != nil {
		return &usageError{err, "dayfly up"}
	}
	s.logger = func(service string) zerolog.Logger {
		l, _ := ops.NewLogger(c.err, u.logLevel, u.logFormat, service) // it went well above
		return l
	}
	s.registry = ops.NewRegistry(version, commit())
	unlock, err := s.takeFolder()
	if err != nil {
		return err
	}
	defer unlock()
	defer s.close()
	if err := s.open(ctx); err != nil {
		return interruptedIsFine(ctx, err)
	}
	return interruptedIsFine(ctx, s.run(ctx))
}

// interruptedIsFine makes an ordered end by a signal a success.
func interruptedIsFine(ctx context.Context, err error) error {
	var in interrupted
	if errors.As(context.Cause(ctx), &in) && (err == nil || errors.As(err, &in) || errors.Is(err, context.Canceled)) {
		return nil
	}
	return err
}

// takeFolder makes the data folder ours alone and finds the cluster's name in it.
func (s *site) takeFolder() (unlock func(), err error) {
	dir, err := filepath.Abs(s.config.data)
	if err != nil {
		return nil, err
	}
	s.config.data = dir
	hint := "--data with a folder that this user may write to"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, &hintError{fmt.Errorf("make the data folder: %w", err), hint}
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, &hintError{fmt.Errorf("open the data folder: %w", err), hint}
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer lock.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock the data folder: %w", err)
		}
		owner := make([]byte, 32)
		n, _ := lock.Read(owner)
		return nil, &hintError{fmt.Errorf("another dayfly (process %s) uses %s", orElse(strings.TrimSpace(string(owner[:n])), "unknown"), dir),
			"end it first, or another --data"}
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := lock.Truncate(0); err != nil {
		return nil, fmt.Errorf("lock the data folder: %w", err)
	}
	if _, err := lock.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		return nil, fmt.Errorf("lock the data folder: %w", err)
	}
	if s.config.cluster == "" {
		if s.config.cluster, err = clusterName(dir); err != nil {
			return nil, err
		}
	}
	return func() { lock.Close() }, nil // the lock goes with it
}

// clusterName gives the name that tells this dayfly's containers from those of
// others on the same Docker; it is made up once for a data folder.
func clusterName(dir string) (string, error) {
	path := filepath.Join(dir, "cluster")
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		b = []byte("dayfly-" + strings.ToLower(rand.Text()[:10]) + "\n")
		err = writeFile(path, b, 0o600)
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

// writeFile replaces a file as a whole.
func writeFile(name string, b []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return os.Rename(f.Name(), name)
}

// open takes the ports and starts what the services stand on.
func (s *site) open(ctx context.Context) error {
	u := s.config
	initPath, err := findInit(u.init)
	if err == nil {
		err = checkInit(initPath)
	}
	if err != nil {
		return &hintError{err, "make build, or --init PATH; dayfly doctor looks deeper"}
	}
	for _, l := range []struct {
		flag, addr string
		into       *net.Listener
	}{{"--http", u.http, &s.http}, {"--ingress", u.ingress, &s.ingress}, {"--admin", u.admin, &s.admin}} {
		if *l.into, err = net.Listen("tcp", l.addr); err != nil {
			return &hintError{err, "another address with " + l.flag + ", or end what listens there"}
		}
	}
	worker := schemas.WorkerID(u.worker)
	coreSecret, agentSecret := rand.Text(), rand.Text() // for this life of the server
	nd := natsd.Config{
		Dir: filepath.Join(u.data, "nats"), SyncAlways: u.sync == "always", CorePassword: coreSecret,
		Workers: map[schemas.WorkerID]string{worker: agentSecret}, Logger: s.logger("nats"),
	}
	if u.nats != "" {
		host, port, err := net.SplitHostPort(u.nats)
		if err != nil {
			return err
		}
		if nd.Port, err = strconv.Atoi(port); err != nil {
			return &usageError{errors.New("--nats must be HOST:PORT with a number"), "dayfly up"}
		}
		if nd.Port == 0 {
			nd.Port = -1 // a free one
		}
		nd.Host = host
	}
	if u.sync != "always" {
		s.log.Warn().Msg("accepted tasks may be lost when this machine loses power: --sync default")
		s.health.Add("sync relaxed: accepted tasks may be lost with the power", func(context.Context) error { return nil })
	}
	if s.server, err = natsd.Start(ctx, nd); err != nil {
		return &hintError{err, "the log above; dayfly doctor looks deeper"}
	}
	for _, name := range []string{"gateway", "placer", "reaper"} {
		if _, err := s.connect(ctx, bus.Config{Name: name, User: natsd.CoreUser, Password: coreSecret}); err != nil {
			return err
		}
	}
	if err := bus.Provision(ctx, s.conns["gateway"], schemas.Assets(u.logAge), 1); err != nil {
		return err
	}
	if _, err := s.connect(ctx, bus.Config{Name: "agent", User: u.worker, Password: agentSecret,
		InboxPrefix: schemas.AgentInbox(worker), APIPrefix: schemas.AgentAPIPrefix}); err != nil {
		return err
	}
	labels, err := pairs("worker-label", u.labels)
	if err != nil {
		return &usageError{err, "dayfly up"}
	}
	dc := docker.Config{
		Cluster: s.config.cluster, Worker: worker, StateDir: filepath.Join(u.data, "agent"), InitPath: initPath,
		Slots: u.slots, Labels: map[string]string{}, AuthFile: dockerConfig(), Logger: s.logger("agent"),
	}
	for k, v := range labels {
		dc.Labels[k] = v.(string)
	}
	if s.runtime, err = docker.New(dc); err != nil {
		return &hintError{err, "dayfly doctor, which says what is missing on this machine"}
	}
	return nil
}

// connect makes a service's connection and watches it.
func (s *site) connect(ctx context.Context, c bus.Config) (*bus.Conn, error) {
	c.InProcess = provider{s.server}
	c.Logger = s.logger(c.Name)
	conn, err := bus.Connect(ctx, c)
	if err != nil {
		return nil, err
	}
	conn.Observe = ops.NewBusMetrics(s.registry, c.Name, conn.Connected).Observe
	s.health.Add(c.Name+": nats", func(context.Context) error {
		if !conn.Connected() {
			return errors.New("not connected")
		}
		return nil
	})
	s.conns[c.Name] = conn
	return conn, nil
}

type provider struct{ *natsd.Server }

var _ nats.InProcessConnProvider = provider{}

// close gives back what open took, in the opposite order.
func (s *site) close() {
	if s.runtime != nil {
		if err := s.runtime.Close(); err != nil {
			s.log.Warn().Err(err).Msg("docker runtime not closed")
		}
	}
	for _, c := range s.conns {
		c.Close()
	}
	if s.server != nil {
		s.server.Shutdown()
	}
	for _, l := range []net.Listener{s.http, s.ingress, s.admin} {
		if l != nil {
			l.Close() // again, where a service has done it
		}
	}
}

// services are the parts in the order in which they are stopped.
func (s *site) services() []service {
	scale := func(d time.Duration) time.Duration { return time.Duration(float64(d) * s.config.scale) }
	policy := schemas.DefaultPolicy()
	policy.MaxTTL = schemas.Duration(s.config.maxTTL)
	return []service{
		{"gateway", "gateway: views", func(ctx context.Context) error {
			return gateway.Run(ctx, gateway.Deps{Conn: s.conns["gateway"], Listener: s.http,
				Logger: s.logger("gateway"), Metrics: s.registry, Health: s.health},
				gateway.Config{Policy: policy, Retention: s.config.retention, Lease: scale(30 * time.Second)})
		}},
		{"ingress", "", func(ctx context.Context) error { return ops.Serve(ctx, s.ingress, http.HandlerFunc(noIngress)) }},
		{"placer", "placer: views", func(ctx context.Context) error {
			// Nobody else holds this data folder, so an earlier leader of this name is dead.
			cfg := placer.DefaultConfig()
			cfg.Identity, cfg.Lease = "up-"+s.config.cluster, scale(cfg.Lease)
			return placer.Run(ctx, placer.Deps{Conn: s.conns["placer"],
				Logger: s.logger("placer"), Metrics: s.registry, Health: s.health}, cfg)
		}},
		{"agent", "agent: lease", func(ctx context.Context) error {
			cfg := agent.DefaultConfig(schemas.WorkerID(s.config.worker), filepath.Join(s.config.data, "agent"))
			cfg.Version, cfg.Beat, cfg.Lease = version, scale(cfg.Beat), scale(cfg.Lease)
			return agent.Run(ctx, agent.Deps{Conn: s.conns["agent"], Runtime: s.runtime,
				Logger: s.logger("agent"), Metrics: s.registry, Health: s.health}, cfg)
		}},
		{"reaper", "reaper: views", func(ctx context.Context) error {
			cfg := reaper.DefaultConfig()
			cfg.Retention, cfg.Fence, cfg.Redrive = s.config.retention, scale(cfg.Fence), scale(cfg.Redrive)
			return reaper.Run(ctx, reaper.Deps{Conn: s.conns["reaper"],
				Logger: s.logger("reaper"), Metrics: s.registry, Health: s.health}, cfg)
		}},
		{"admin", "", func(ctx context.Context) error { return ops.Serve(ctx, s.admin, ops.Admin(s.registry, s.health)) }},
	}
}

// noIngress answers on the ingress port until tasks can have endpoints.
func noIngress(w http.ResponseWriter, _ *http.Request) {
	http.Error(w, "dayfly: no task has an endpoint", http.StatusNotFound)
}

// stopAfter bounds how long one service may take to end.
const stopAfter = 15 * time.Second

// run runs the services until ctx ends or one of them does.
func (s *site) run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	type running struct {
		service
		cancel context.CancelCauseFunc
		done   chan struct{}
	}
	var all []running
	for _, sv := range s.services() {
		// Not gctx: each is stopped in its turn.
		if sv.check != "" { // until the service puts its own in this place
			s.health.Add(sv.check, func(context.Context) error { return errors.New("not started yet") })
		}
		sctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
		r := running{sv, cancel, make(chan struct{})}
		all = append(all, r)
		g.Go(func() error {
			defer close(r.done)
			err := r.run(sctx)
			switch {
			case sctx.Err() != nil:
				if err != nil && !errors.Is(err, context.Canceled) {
					s.log.Warn().Err(err).Str("service", r.name).Msg("ended badly")
				}
				return nil
			case err == nil:
				return fmt.Errorf("%s ended by itself", r.name)
			}
			return fmt.Errorf("%s: %w", r.name, err)
		})
	}
	g.Go(func() error {
		<-gctx.Done()
		if ctx.Err() != nil {
			s.cli.say("ending; tasks go on running")
		}
		for _, r := range all {
			r.cancel(context.Cause(gctx))
			select {
			case <-r.done:
			case sig := <-s.cli.signals:
				s.cli.tell("left at once by %s", sig)
				os.Exit(signalCode(sig))
			case <-time.After(stopAfter):
				s.log.Warn().Str("service", r.name).Msg("does not end")
			}
		}
		return nil
	})
	g.Go(func() error { return s.announce(gctx) })
	return g.Wait()
}

// addresses is what --print-addrs writes.
type addresses struct {
	HTTP    string `json:"http"`
	Ingress string `json:"ingress"`
	Admin   string `json:"admin"`
	NATS    string `json:"nats,omitempty"`
	Worker  string `json:"worker"`
	Cluster string `json:"cluster"`
	PID     int    `json:"pid"`
}

func (s *site) addresses() addresses {
	return addresses{
		HTTP: "http://" + s.http.Addr().String(), Ingress: "http://" + s.ingress.Addr().String(), Admin: "http://" + s.admin.Addr().String(),
		NATS: s.server.URL(), Worker: s.config.worker, Cluster: s.config.cluster, PID: os.Getpid(),
	}
}

// announce writes the addresses, for scripts: whoever comes early waits in the
// listeners. It tells people once all checks pass.
func (s *site) announce(ctx context.Context) error {
	a := s.addresses()
	if s.config.printAddrs != "" {
		b, err := json.MarshalIndent(a, "", "  ")
		if err == nil {
			err = writeFile(s.config.printAddrs, append(b, '\n'), 0o600)
		}
		if err != nil {
			return fmt.Errorf("--print-addrs: %w", err)
		}
	}
	if !s.ready(ctx) {
		return nil
	}
	s.cli.tell("dayfly is up: API %s, admin %s, worker %s, data in %s", a.HTTP, a.Admin, a.Worker, s.config.data)
	s.cli.say("try: dayfly run%s busybox echo hi", urlFlag(a.HTTP))
	return nil
}

func urlFlag(url string) string {
	if url == defaultURL {
		return ""
	}
	return " --url " + url
}

// ready waits until all checks pass, or ctx ends.
func (s *site) ready(ctx context.Context) bool {
	const remindAfter = 10 * time.Second
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	remind := time.NewTimer(remindAfter)
	defer remind.Stop()
	for {
		ready, checks := s.health.Run(ctx)
		if ctx.Err() != nil || ready {
			return ready && ctx.Err() == nil
		}
		select {
		case <-tick.C:
		case <-remind.C:
			for _, c := range checks {
				if !c.OK {
					s.cli.tell("not ready yet: %s: %s", c.Name, c.Error)
				}
			}
		case <-ctx.Done():
			return false
		}
	}
}
