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
	"dayfly.dev/shims"
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
	store    string // for artifacts
	replicas int
	blobs    string
}

func (a *assetConfig) flags(f *pflag.FlagSet) {
	f.DurationVar(&a.logAge, "log-age", 24*time.Hour, "how long the logs of tasks are kept")
	f.StringVar(&a.blobs, "blob-bytes", schemas.Size(schemas.BlobBytes).String(), "how much all blobs may take in NATS, the same at all gateways and reapers; those go first that no task has named for longest")
	f.StringVar(&a.store, "artifact-store", "", "bytes that the artifacts of all tasks may take together, which NATS sets aside, such as 100GiB; 0: what NATS has (default: 10GiB, or less where NATS has less)")
}

func (a *assetConfig) check() error {
	if a.logAge < time.Minute {
		return errors.New("--log-age must be at least 1m")
	}
	if _, err := a.storeSize(); err != nil {
		return err
	}
	if a.replicas != 0 && a.replicas != 1 && a.replicas != 3 {
		return errors.New("--replicas must be 1 or 3")
	}
	_, err := blobSize("--blob-bytes", a.blobs)
	return err
}

// blobSize reads a size that has to do with blobs.
func blobSize(flag, text string) (int64, error) {
	size, err := schemas.ParseSize(text)
	if err != nil || size < 1<<20 || size > schemas.MaxBlobSize {
		return 0, fmt.Errorf("%s must be a size from 1MiB to %s", flag, schemas.Size(schemas.MaxBlobSize))
	}
	return int64(size), nil
}

// defaultStore is what artifacts may take if nobody says it, and leastStore the least that
// is tried where the servers have less than that.
const (
	defaultStore schemas.Size = 10 << 30
	leastStore   schemas.Size = 64 << 20
)

func (a *assetConfig) provision(ctx context.Context, conn *bus.Conn) error {
	size, err := a.storeSize()
	if err != nil {
		return err
	}
	for {
		assets := schemas.Assets(a.logAge)
		for i := range assets {
			if assets[i].Name == schemas.StreamArtifacts {
				assets[i].MaxBytes = int64(size)
			}
		}
		err := bus.Provision(ctx, conn, assets, a.replicas)
		switch {
		case !errors.Is(err, bus.ErrFull):
			return err
		case a.store != "" && size > 0, size <= leastStore:
			return &hintError{fmt.Errorf("NATS has no %s to set aside for artifacts: %w", size, err),
				"give NATS a larger disk, or say with --artifact-store how much artifacts may take"}
		}
		size /= 2
	}
}

func (a *assetConfig) storeSize() (schemas.Size, error) {
	switch a.store {
	case "":
		return defaultStore, nil
	case "0":
		return 0, nil
	}
	size, err := schemas.ParseSize(a.store)
	if err != nil || size < 1<<20 {
		return 0, errors.New("--artifact-store must be a size such as 100GiB, and at least 1MiB, or 0")
	}
	return size, nil
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

func (p *process) reaper(connect connector, r reaperConfig, assets assetConfig, retention time.Duration) {
	tracer := p.tracer("reaper")
	p.part("reaper", "reaper: views", connect, func(ctx context.Context, conn *bus.Conn) error {
		cfg := reaper.DefaultConfig()
		cfg.Retention, cfg.Fence, cfg.Redrive = retention, p.config.scaled(cfg.Fence), p.config.scaled(cfg.Redrive)
		cfg.Callbacks.Allow, cfg.Callbacks.Form, cfg.Collect = r.allow, shims.Announce, p.config.scaled(cfg.Collect)
		cfg.Blobs.Bytes, _ = blobSize("", assets.blobs) // it was checked
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
	labels, kinds         []string
	cacheHigh, cacheLow   string
	credentials           string
	init                  string
	runtime               string
	artifactMax           string
	fakeJournal           string
	blobCache             string
}

const defaultArtifacts = "256MiB"

func (a *agentConfig) flags(f *pflag.FlagSet) {
	f.StringVar(&a.worker, "worker", defaultWorker(), "name of this machine's worker")
	f.IntVar(&a.slots, "slots", 0, "tasks at a time on this machine (0: 16 for each of its CPUs)")
	f.Float64Var(&a.cpus, "cpus", 0, "CPUs that tasks may have together (0: all of this machine's; more promise them several times over, to tasks that mostly wait)")
	f.StringVar(&a.memory, "memory", "", "memory that tasks may have together, such as 8GiB (default: all of this machine's)")
	f.StringVar(&a.artifactMax, "artifact-max-bytes", defaultArtifacts, "bytes of artifacts kept of one task, at most 1GiB, and never more than its disk; 0: none are")
	f.IntVar(&a.gpus, "gpus", -1, "GPUs of this machine that tasks may have (-1: as many as NVIDIA's driver shows)")
	f.StringVar(&a.blobCache, "blob-cache-bytes", "10GiB", "how much blobs may take on this machine's disk; 0: no task that names one comes here")
	f.StringArrayVar(&a.labels, "worker-label", nil, "label K=V of this worker, for --constraint")
	f.StringSliceVar(&a.kinds, "accept-kind", nil, "kind of tasks that this worker takes, and no others; may be repeated (default: all tasks)")
	f.StringVar(&a.cacheHigh, "image-cache-high", "", "above this, images that this worker pulled are removed, those not used for longest first: a size of them all such as 40GiB, or how full Docker's disk is such as 85% (default: none is removed)")
	f.StringVar(&a.cacheLow, "image-cache-low", "", "down to this (default: nine tenths of --image-cache-high)")
	f.StringVar(&a.credentials, "registry-credentials", "", "file with logins of registries, by the names that tasks use; it must be readable by its owner alone")
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
	if a.blobCache != "0" {
		if _, err := blobSize("--blob-cache-bytes", a.blobCache); err != nil {
			return err
		}
	}
	if _, _, err := docker.ParseMarks(a.cacheHigh, a.cacheLow); err != nil {
		return fmt.Errorf("--image-cache-high, --image-cache-low: %w", err)
	}
	if _, err := a.artifactSize(); err != nil {
		return err
	}
	if a.runtime != "docker" && a.runtime != "fake" {
		return errors.New("--runtime must be docker or fake")
	}
	if a.gpus < -1 || a.gpus > schemas.MaxGPUs {
		return fmt.Errorf("--gpus must be -1 to %d", schemas.MaxGPUs)
	}
	for _, k := range a.kinds {
		if !schemas.KindName(k) {
			return errors.New("--accept-kind must be 1 to 63 of a-z, 0-9 and -")
		}
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

// artifactSize is how much of one task's artifacts is kept.
func (a *agentConfig) artifactSize() (schemas.Size, error) {
	size, err := schemas.ParseSize(cmp.Or(a.artifactMax, defaultArtifacts))
	if err != nil || size < 0 || size > schemas.MaxArtifactBytes {
		return 0, errors.New("--artifact-max-bytes must be a size such as 64MiB, at most 1GiB")
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
	high, low, err := docker.ParseMarks(a.cacheHigh, a.cacheLow)
	if err != nil {
		return nil, err
	}
	rt, err := docker.New(docker.Config{
		CacheHigh: high, CacheLow: low, CredentialsFile: a.credentials,
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
		cfg.Kinds = a.kinds
		size, err := a.artifactSize()
		if err != nil {
			return err
		}
		cfg.ArtifactLimit = int64(size)
		cfg.Version, cfg.Beat, cfg.Lease = version, p.config.scaled(cfg.Beat), p.config.scaled(cfg.Lease)
		cfg.BlobCache, _ = blobSize("", a.blobCache) // it was checked; "0" is none
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
