package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"

	"dayfly.dev/bus"
	"dayfly.dev/ops"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/docker"
	"dayfly.dev/services/agent/fakeruntime"
	"dayfly.dev/services/placer"
	"dayfly.dev/services/reaper"
)

// The parts that `up` and the single services are made of: each is a service with
// the configuration of its flags. A part gets a function that connects it to the bus,
// which is its own from then on.

// connector connects one part; it waits for NATS until ctx ends.
type connector func(ctx context.Context) (*bus.Conn, error)

// connect makes a connection and watches it.
func (p *process) connect(ctx context.Context, c bus.Config) (*bus.Conn, error) {
	c.Logger = p.logger(c.Name)
	conn, err := bus.Connect(ctx, c)
	if err != nil {
		return nil, err
	}
	conn.Observe = ops.NewBusMetrics(p.registry, c.Name, conn.Connected,
		func() uint64 { return conn.NC.Stats().Reconnects }).Observe
	ops.NewViewMetrics(p.registry, c.Name, func(yield func(string, int, uint64, time.Duration)) {
		for _, v := range conn.Views() {
			yield(v.Bucket, v.Keys, v.Pending, v.Behind)
		}
	})
	p.watch(c.Name, conn)
	return conn, nil
}

// watch makes a connection one of the checks.
func (p *process) watch(name string, conn *bus.Conn) {
	p.health.Add(name+": nats", func(context.Context) error {
		if !conn.Connected() {
			return errors.New("not connected")
		}
		return nil
	})
}

// part makes a part of a service and adds it to those that run.
func (p *process) part(name, check string, connect connector, run func(context.Context, *bus.Conn) error) {
	p.health.Add(name+": nats", notConnectedYet)
	p.parts = append(p.parts, part{name, check, func(ctx context.Context) error {
		conn, err := connect(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		return run(ctx, conn)
	}})
}

func notConnectedYet(context.Context) error { return errors.New("not connected yet") }

// assetConfig says how what NATS stores is made.
type assetConfig struct {
	logAge   time.Duration
	replicas int
}

func (a *assetConfig) flags(f *pflag.FlagSet) {
	f.DurationVar(&a.logAge, "log-age", 24*time.Hour, "how long the logs of tasks are kept")
}

func (a *assetConfig) check() error {
	if a.logAge < time.Minute {
		return errors.New("--log-age must be at least 1m")
	}
	if a.replicas != 0 && a.replicas != 1 && a.replicas != 3 {
		return errors.New("--replicas must be 1 or 3")
	}
	return nil
}

func (a *assetConfig) provision(ctx context.Context, conn *bus.Conn) error {
	return bus.Provision(ctx, conn, schemas.Assets(a.logAge), a.replicas)
}

const defaultLease = 30 * time.Second

// leastLeadership is how short a term may get by --scale: less than that a busy disk
// would end it.
const leastLeadership = 500 * time.Millisecond

// placer takes a fixed identity of a process that holds a lock, "" for any other.
func (p *process) placer(connect connector, identity string) {
	tracer := p.tracer("placer")
	p.part("placer", "placer: views", connect, func(ctx context.Context, conn *bus.Conn) error {
		cfg := placer.DefaultConfig()
		cfg.Identity, cfg.Lease = identity, p.config.scaled(cfg.Lease)
		cfg.Leadership = max(p.config.scaled(cfg.Leadership), leastLeadership)
		return placer.Run(ctx, placer.Deps{Conn: conn, Logger: p.logger("placer"), Metrics: p.registry, Health: p.health, Tracer: tracer}, cfg)
	})
}

// reaperConfig is what a reaper is told.
type reaperConfig struct {
	callbackAllow []string
	allow         []netip.Prefix // of check
}

func (r *reaperConfig) flags(f *pflag.FlagSet) {
	f.StringArrayVar(&r.callbackAllow, "callback-allow", nil, "network of the inside, such as 10.1.0.0/16, that callbacks may reach; may be repeated")
}

func (r *reaperConfig) check() error {
	var err error
	r.allow, err = networks("--callback-allow", r.callbackAllow)
	return err
}

func (p *process) reaper(connect connector, r reaperConfig, retention time.Duration) {
	tracer := p.tracer("reaper")
	p.part("reaper", "reaper: views", connect, func(ctx context.Context, conn *bus.Conn) error {
		cfg := reaper.DefaultConfig()
		cfg.Retention, cfg.Fence, cfg.Redrive = retention, p.config.scaled(cfg.Fence), p.config.scaled(cfg.Redrive)
		cfg.Callbacks.Allow = r.allow
		return reaper.Run(ctx, reaper.Deps{Conn: conn, Logger: p.logger("reaper"), Metrics: p.registry, Health: p.health, Tracer: tracer}, cfg)
	})
}

func checkRetention(d time.Duration) error {
	if d < time.Minute {
		return errors.New("--retention must be at least 1m")
	}
	return nil
}

// agentConfig is what an agent is told.
type agentConfig struct {
	worker, cluster, data string
	slots, gpus           int
	cpus                  float64
	memory                string
	labels                []string
	init                  string
	runtime               string
	fakeJournal           string
}

func (a *agentConfig) flags(f *pflag.FlagSet) {
	f.StringVar(&a.worker, "worker", defaultWorker(), "name of this machine's worker")
	f.IntVar(&a.slots, "slots", 0, "tasks at a time on this machine (0: 16 for each of its CPUs)")
	f.Float64Var(&a.cpus, "cpus", 0, "CPUs that tasks may have together (0: all of this machine's; more promise them several times over, to tasks that mostly wait)")
	f.StringVar(&a.memory, "memory", "", "memory that tasks may have together, such as 8GiB (default: all of this machine's)")
	f.IntVar(&a.gpus, "gpus", -1, "GPUs of this machine that tasks may have (-1: as many as NVIDIA's driver shows)")
	f.StringArrayVar(&a.labels, "worker-label", nil, "label K=V of this worker, for --constraint")
	f.StringVar(&a.cluster, "cluster", "", "label of this dayfly's containers (default: made up once for the data folder)")
	f.StringVar(&a.init, "init", "", "the dayfly-init binary, if it is not beside dayfly")
	f.StringVar(&a.runtime, "runtime", "docker", "docker, or fake: tasks are only played, for tests")
	f.StringVar(&a.fakeJournal, "fake-journal", "", "file in which the fake runtime keeps what it runs, so that it outlives the agent")
	_ = errors.Join(f.MarkHidden("runtime"), f.MarkHidden("fake-journal"))
}

func (a *agentConfig) check() error {
	if _, err := schemas.ParseWorkerID(a.worker); err != nil {
		return errors.New("--worker must be 1 to 63 of a-z, 0-9 and -")
	}
	if a.cluster != "" {
		if _, err := schemas.ParseWorkerID(a.cluster); err != nil {
			return errors.New("--cluster must be 1 to 63 of a-z, 0-9 and -")
		}
	}
	if a.slots < 0 {
		return errors.New("--slots must not be negative")
	}
	if a.cpus < 0 || a.cpus > 1e6 {
		return errors.New("--cpus must be 0 to 1000000")
	}
	if _, err := a.memorySize(); err != nil {
		return err
	}
	if a.runtime != "docker" && a.runtime != "fake" {
		return errors.New("--runtime must be docker or fake")
	}
	if a.gpus < -1 || a.gpus > schemas.MaxGPUs {
		return fmt.Errorf("--gpus must be -1 to %d", schemas.MaxGPUs)
	}
	_, err := pairs("worker-label", a.labels)
	return err
}

// memorySize is what tasks may have together; 0 is all that there is.
func (a *agentConfig) memorySize() (schemas.Size, error) {
	if a.memory == "" {
		return 0, nil
	}
	size, err := schemas.ParseSize(a.memory)
	if err != nil || size < 1<<20 {
		return 0, errors.New("--memory must be a size such as 8GiB")
	}
	return size, nil
}

// stateDir is where an agent keeps what it must not forget.
func (a *agentConfig) stateDir() string { return filepath.Join(a.data, "agent") }

// open finds what an agent stands on, before anything is started.
func (a *agentConfig) open(p *process) (agent.Runtime, error) {
	var err error
	if a.data, err = filepath.Abs(a.data); err != nil {
		return nil, err
	}
	if a.cluster == "" {
		if a.cluster, err = clusterName(a.data); err != nil {
			return nil, err
		}
	}
	labels := map[string]string{}
	given, err := pairs("worker-label", a.labels)
	if err != nil {
		return nil, err
	}
	for k, v := range given {
		labels[k] = v.(string)
	}
	memory, err := a.memorySize()
	if err != nil {
		return nil, err
	}
	if a.runtime == "fake" {
		host := schemas.Host{OS: "linux", Arch: "amd64", CPUs: 1e6, Memory: 1 << 50, Slots: 1e6, GPUs: max(0, a.gpus), Engine: "fake", Labels: labels}
		host.Slots = cmp.Or(a.slots, host.Slots)
		host.CPUs, host.Memory = cmp.Or(schemas.CPUs(a.cpus), host.CPUs), cmp.Or(memory, host.Memory)
		return fakeruntime.New(fakeruntime.Config{Host: host, Journal: a.fakeJournal, StateDir: a.stateDir()}), nil
	}
	initPath, err := findInit(a.init)
	if err == nil {
		err = checkInit(initPath)
	}
	if err != nil {
		return nil, &hintError{err, "make build, or --init PATH; dayfly doctor looks deeper"}
	}
	rt, err := docker.New(docker.Config{
		Cluster: a.cluster, Worker: schemas.WorkerID(a.worker), StateDir: a.stateDir(), InitPath: initPath,
		Slots: a.slots, CPUs: schemas.CPUs(a.cpus), Memory: memory, GPUs: a.gpus, Labels: labels, AuthFile: dockerConfig(), Logger: p.logger("agent"), Metrics: p.registry,
	})
	if err != nil {
		return nil, &hintError{err, "dayfly doctor, which says what is missing on this machine"}
	}
	return rt, nil
}

// agent takes over the runtime and closes it.
func (p *process) agent(connect connector, rt agent.Runtime, a agentConfig) {
	tracer := p.tracer("agent")
	p.part("agent", "agent: lease", connect, func(ctx context.Context, conn *bus.Conn) error {
		cfg := agent.DefaultConfig(schemas.WorkerID(a.worker), a.stateDir())
		cfg.Version, cfg.Beat, cfg.Lease = version, p.config.scaled(cfg.Beat), p.config.scaled(cfg.Lease)
		return agent.Run(ctx, agent.Deps{Conn: conn, Runtime: rt, Logger: p.logger("agent"), Metrics: p.registry, Health: p.health, Tracer: tracer}, cfg)
	})
}

// agentLogin is how the agent of a worker connects.
func agentLogin(c bus.Config, w schemas.WorkerID, token string) bus.Config {
	c.Name, c.User, c.Password = "agent", string(w), token
	c.InboxPrefix, c.APIPrefix = schemas.AgentInbox(w), schemas.AgentAPIPrefix
	return c
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
