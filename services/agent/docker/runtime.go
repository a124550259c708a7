package docker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/client"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

// ErrLocked says that another agent uses the state folder.
var ErrLocked = errors.New("another agent uses this state folder")

// Config is what New needs. Worker, StateDir and InitPath must be given.
type Config struct {
	Host    string // of the Docker Engine; "" is DOCKER_HOST with its TLS variables, or the local socket
	Cluster string // containers of another cluster are never touched; "" is "dayfly"
	Worker  schemas.WorkerID

	// StateDir holds everything that outlives the agent. An agent that runs in a container
	// itself must see it under the same path as the host: its parts are bind-mounted.
	StateDir string
	InitPath string // the dayfly-init binary; a copy of it is used

	Slots  int          // tasks at a time; 0 is 16 for each processor
	CPUs   schemas.CPUs // that tasks may have together; 0: all of the machine's. More promise them several times over
	Memory schemas.Size // that tasks may have together; 0: all of the machine's
	GPUs   int          // that tasks may have; below 0: as many as NVIDIA's driver shows here
	Labels map[string]string

	StartsInFlight   int // 0 is the number of processors, at least 2
	RemovalsInFlight int // 0 is the number of processors, at least 2

	AuthFile    string                // a Docker config.json with "auths"; "" is none
	Credentials map[string]Credential // by registry host; they go before AuthFile

	// CredentialsFile has registry credentials by their names (see README.md), and goes
	// before the two above. It is read again when it changes; "" is none.
	CredentialsFile string

	// Above CacheHigh images that this agent pulled are removed, those not used for longest
	// first, down to CacheLow; without marks none ever is. CacheRest is how long an image
	// stays after it was used; 0 is 5 minutes.
	CacheHigh, CacheLow Mark
	CacheRest           time.Duration

	Logger  zerolog.Logger
	Metrics prometheus.Registerer // nil: nobody asks
}

// Runtime implements agent.Runtime. It is safe for concurrent use.
type Runtime struct {
	cfg      Config
	log      zerolog.Logger
	metrics  *metrics
	docker   *client.Client
	lock     *os.File
	null     *os.File
	initPath string
	seccomp  string
	boot     string
	cpus     int
	arch     string
	v2       bool
	bounds   bool // the storage driver bounds a writable root

	starts   chan struct{} // a place in it is one start in flight
	removals chan struct{}
	pulls    pulls
	stock    *stock
	wallet   *wallet
	// dockerRoot is the folder of Docker's data, if Docker runs on this machine.
	dockerRoot string

	// Everything that this process started ends with ctx, and Close waits for it.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex
	closed   bool                // guarded
	attempts map[string]*attempt // guarded; by container name
	images   map[string]image    // guarded; by id
	permit   time.Duration       // guarded
	// walletSaid is the fault of the credentials that was logged last.
	walletSaid string // guarded
}

var _ agent.Runtime = (*Runtime)(nil)

// New opens the state folder and asks Docker what it is. ErrLocked says that
// another agent has the folder; any other error that Docker does not answer or that
// the machine lacks something.
func New(cfg Config) (*Runtime, error) {
	if cfg.Worker == "" || cfg.StateDir == "" || cfg.InitPath == "" {
		return nil, errors.New("docker runtime: Worker, StateDir and InitPath are needed")
	}
	if cfg.Cluster == "" {
		cfg.Cluster = "dayfly"
	}
	if cfg.StartsInFlight <= 0 {
		cfg.StartsInFlight = max(2, runtime.NumCPU())
	}
	if cfg.RemovalsInFlight <= 0 {
		cfg.RemovalsInFlight = max(2, runtime.NumCPU())
	}
	cfg.CacheRest = cmp.Or(cfg.CacheRest, 5*time.Minute)
	dir, err := filepath.Abs(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	cfg.StateDir = dir
	for _, d := range []string{"", "run", "permit"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, fmt.Errorf("make state folder: %w", err)
		}
	}
	if err := os.Chmod(filepath.Join(dir, "permit"), 0o755); err != nil {
		return nil, fmt.Errorf("make state folder: %w", err)
	}
	r := &Runtime{
		cfg: cfg, log: cfg.Logger, metrics: newMetrics(cfg.Metrics), boot: bootID(),
		starts: make(chan struct{}, cfg.StartsInFlight), removals: make(chan struct{}, cfg.RemovalsInFlight),
		attempts: map[string]*attempt{}, images: map[string]image{}, wallet: &wallet{path: cfg.CredentialsFile},
	}
	r.stock = newStock(r)
	r.ctx, r.cancel = context.WithCancel(context.Background())
	if r.lock, err = lockFolder(dir); err != nil {
		return nil, err
	}
	if err := r.open(); err != nil {
		_ = r.Close()
		return nil, err
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(newImageMetrics(r.stock))
	}
	r.goDo(func() { r.stock.follow(r.ctx) })
	return r, nil
}

func (r *Runtime) open() (err error) {
	if err := forgetOldBoot(r.cfg.StateDir, r.boot); err != nil {
		return fmt.Errorf("prepare permit: %w", err)
	}
	if r.initPath, err = installInit(r.cfg.InitPath, r.cfg.StateDir); err != nil {
		return err
	}
	if r.seccomp, err = seccompProfile(); err != nil {
		return fmt.Errorf("make seccomp profile: %w", err)
	}
	if r.null, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
		return err
	}
	// The API version is never pinned: the client takes the newest that both know.
	if r.cfg.Host != "" {
		r.docker, err = client.New(client.WithHost(r.cfg.Host))
	} else {
		r.docker, err = client.New(client.WithTLSClientConfigFromEnv(), client.WithHostFromEnv())
	}
	if err != nil {
		return fmt.Errorf("docker client: %w", err)
	}
	ctx, cancel := context.WithTimeout(r.ctx, 30*time.Second)
	defer cancel()
	info, err := r.docker.Info(ctx, client.InfoOptions{})
	if err != nil {
		return fmt.Errorf("ask docker: %w", err)
	}
	if info.Info.OSType != "linux" {
		return fmt.Errorf("docker runs %s containers, linux is needed", info.Info.OSType)
	}
	seccomp := false
	for _, o := range info.Info.SecurityOptions {
		seccomp = seccomp || strings.HasPrefix(o, "name=seccomp") || o == "seccomp"
	}
	if !seccomp {
		return errors.New("this docker has no seccomp; tasks would not be contained")
	}
	r.dockerRoot = info.Info.DockerRootDir
	if _, err := r.wallet.list(); err != nil {
		return err
	}
	ctx, cancel = context.WithTimeout(r.ctx, 30*time.Second)
	defer cancel()
	if err := r.stock.list(ctx); err != nil {
		return err
	}
	r.cpus, r.arch, r.v2 = info.Info.NCPU, goArch(info.Info.Architecture), info.Info.CgroupVersion == "2"
	r.bounds = bounds(info.Info.Driver, info.Info.DockerRootDir)
	return nil
}

// goArch turns the kernel's name of a machine into Go's.
func goArch(machine string) string {
	switch machine {
	case "x86_64":
		return "amd64"
	case "aarch64":
		return "arm64"
	case "armv7l", "armv6l":
		return "arm"
	case "i686", "i386":
		return "386"
	}
	return machine
}

// Host implements agent.Runtime. The numbers are Docker's: it may run elsewhere
// than the agent.
func (r *Runtime) Host(ctx context.Context) (schemas.Host, error) {
	info, err := r.docker.Info(ctx, client.InfoOptions{})
	if err != nil {
		return schemas.Host{}, fmt.Errorf("ask docker: %w", err)
	}
	if total := schemas.Size(info.Info.MemTotal); r.cfg.Memory > total {
		return schemas.Host{}, fmt.Errorf("tasks may have %s of memory, but this machine has %s", r.cfg.Memory, total)
	}
	version, err := r.docker.ServerVersion(ctx, client.ServerVersionOptions{})
	if err != nil {
		return schemas.Host{}, fmt.Errorf("ask docker: %w", err)
	}
	h := schemas.Host{
		OS: "linux", Arch: goArch(info.Info.Architecture),
		CPUs:   cmp.Or(r.cfg.CPUs, schemas.CPUs(info.Info.NCPU)),
		Memory: cmp.Or(r.cfg.Memory, schemas.Size(info.Info.MemTotal)),
		Slots:  r.cfg.Slots, Labels: r.cfg.Labels,
		Engine: "docker " + info.Info.ServerVersion, Runtime: info.Info.DefaultRuntime,
	}
	if h.Slots == 0 {
		h.Slots = 16 * max(1, info.Info.NCPU)
	}
	if h.GPUs = r.cfg.GPUs; h.GPUs < 0 {
		h.GPUs = 0
		if _, ok := info.Info.Runtimes["nvidia"]; ok {
			h.GPUs = countGPUs("/proc/driver/nvidia/gpus")
		}
	}
	for _, c := range version.Components {
		if c.Name == info.Info.DefaultRuntime {
			h.Runtime = c.Name + " " + c.Version
		}
	}
	return h, nil
}

// countGPUs counts the devices in a folder of NVIDIA's driver.
func countGPUs(dir string) int {
	list, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	return len(list)
}

// Now implements agent.Runtime.
func (r *Runtime) Now() time.Duration { return initproto.Now() }

// Permit implements agent.Runtime: one file for all containers. They read it when
// the instant that they know comes, so a permit that only grows wakes nobody; one
// that shrinks is told to each.
func (r *Runtime) Permit(until time.Duration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := initproto.WriteInstant(filepath.Join(r.cfg.StateDir, "permit", initproto.PermitName), until); err != nil {
		return err
	}
	if until < r.permit {
		for _, a := range r.attempts {
			a.send(initproto.Request{Op: initproto.OpReread})
		}
	}
	r.permit = until
	return nil
}

// Close implements agent.Runtime. It waits for requests to Docker that are under
// way to be broken off; what they leave is found by the next Recover.
func (r *Runtime) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	attempts := make([]*attempt, 0, len(r.attempts))
	for _, a := range r.attempts {
		attempts = append(attempts, a)
	}
	r.mu.Unlock()

	r.cancel()
	for _, a := range attempts {
		a.hangUp()
	}
	r.wg.Wait()
	for _, a := range attempts {
		a.release()
	}
	if r.docker != nil {
		_ = r.docker.Close()
	}
	if r.null != nil {
		_ = r.null.Close()
	}
	return r.lock.Close()
}

var errClosed = errors.New("the runtime is closed")

func (r *Runtime) isClosed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed
}

// goDo runs f until it returns; Close waits for it. It says false once the runtime
// is closed.
func (r *Runtime) goDo(f func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.wg.Go(f)
	return true
}

// enter takes one of the places, or gives up with ctx.
func enter(ctx context.Context, places chan struct{}) error {
	select {
	case places <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (r *Runtime) folder(name string) string { return filepath.Join(r.cfg.StateDir, "run", name) }

func (r *Runtime) keep(a *attempt) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, taken := r.attempts[a.name]; taken || r.closed {
		return false
	}
	r.attempts[a.name] = a
	return true
}

func (r *Runtime) forget(a *attempt) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.attempts[a.name] == a {
		delete(r.attempts, a.name)
	}
}
