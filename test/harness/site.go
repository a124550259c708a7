package harness

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/moby/client"

	"dayfly.dev/bus/port"
)

// SiteOptions say what a site consists of. Zero of a service is one.
type SiteOptions struct {
	Bin                                 string  // the dayfly binary
	NATS, Gateways, Placers, Reapers    int     // NATS: 1 or 3
	Agents                              int     // -1: none
	Scale                               float64 // 0 is 1
	Fake                                bool    // tasks are only played
	Sync                                string  // of NATS; "" is always
	Host                                string  // address at which NATS listens; "" is the loopback one
	AgentArgs, GatewayArgs, ServiceArgs []string
	ReaperArgs                          []string
}

// Site is a dayfly of many processes on the loopback interface of this machine.
type Site struct {
	Dir     string
	Cluster string // label of its containers
	Image   string // of its tasks, if it has one of its own; it goes with them
	NATS    []*Process
	Gateway []*Process
	Placer  []*Process
	Reaper  []*Process
	Agent   []*Process

	o      SiteOptions
	core   string       // file of credentials
	routes []*port.Port // of the NATS servers
}

// NewSite prepares a site in a temporary folder; nothing runs yet. Remove it.
func NewSite(ctx context.Context, o SiteOptions) (*Site, error) {
	for _, n := range []*int{&o.NATS, &o.Gateways, &o.Placers, &o.Reapers, &o.Agents} {
		*n = max(0, cmp.Or(*n, 1))
	}
	if o.Scale == 0 {
		o.Scale = 1
	}
	dir, err := os.MkdirTemp("", "dayfly-site-")
	if err != nil {
		return nil, err
	}
	s := &Site{Dir: dir, Cluster: "t" + strings.ToLower(rand.Text()[:10]), o: o, core: filepath.Join(dir, "core.json")}
	if out, err := exec.CommandContext(ctx, o.Bin, "credentials", "init", s.core).CombinedOutput(); err != nil {
		return nil, errors.Join(fmt.Errorf("make credentials: %w: %s", err, out), os.RemoveAll(dir))
	}
	var routes []string
	for range o.NATS {
		p, err := port.Keep("127.0.0.1")
		if err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
		s.routes, routes = append(s.routes, p), append(routes, p.String())
	}
	for i := range o.NATS {
		args := []string{"nats", "--credentials", s.core, "--name", fmt.Sprintf("n%d", i+1), "--data", filepath.Join(dir, fmt.Sprintf("data-nats%d", i+1))}
		if o.Sync != "" {
			args = append(args, "--sync", o.Sync)
		}
		if o.NATS > 1 {
			args = append(args, "--cluster-name", s.Cluster, "--cluster-listen", routes[i], "--routes", strings.Join(routes, ","))
		}
		n := s.process(fmt.Sprintf("nats%d", i+1), args, "--listen")
		if o.Host != "" {
			n.Args, n.Listen["--listen"] = append(n.Args, "--insecure-listen"), o.Host+":0"
		}
		s.NATS = append(s.NATS, n)
	}
	return s, nil
}

func (s *Site) process(name string, args []string, listen ...string) *Process {
	p := &Process{Name: name, Bin: s.o.Bin, Dir: s.Dir, Args: append(args, "--scale", fmt.Sprint(s.o.Scale)),
		Listen: map[string]string{"--admin": "127.0.0.1:0"}}
	for _, flag := range listen {
		p.Listen[flag] = "127.0.0.1:0"
	}
	return p
}

// Start starts everything and returns when all of it is ready.
func (s *Site) Start(ctx context.Context) error {
	if err := errAll(len(s.NATS), func(i int) error { return s.NATS[i].Start(ctx) }); err != nil {
		return err
	}
	bus := []string{"--nats", s.URLs(), "--credentials", s.core}
	core := func(service string, n int, extra []string, listen ...string) (list []*Process) {
		for i := range n {
			args := append(append(append([]string{service}, bus...), s.o.ServiceArgs...), extra...)
			list = append(list, s.process(fmt.Sprintf("%s%d", service, i+1), args, listen...))
		}
		return list
	}
	s.Gateway = core("gateway", s.o.Gateways, s.o.GatewayArgs, "--http", "--ingress")
	s.Placer = core("placer", s.o.Placers, nil)
	s.Reaper = core("reaper", s.o.Reapers, s.o.ReaperArgs)
	for i := range s.o.Agents {
		p, err := s.NewAgent(ctx, fmt.Sprintf("w%d", i+1))
		if err != nil {
			return err
		}
		s.Agent = append(s.Agent, p)
	}
	all := s.All()
	return errAll(len(all), func(i int) error {
		if !all[i].Running() {
			if err := all[i].Start(ctx); err != nil {
				return err
			}
		}
		return all[i].Ready(ctx)
	})
}

// URLs is where NATS is.
func (s *Site) URLs() string {
	var list []string
	for _, n := range s.NATS {
		list = append(list, n.Addrs.NATS)
	}
	return strings.Join(list, ",")
}

// Core is the file of the core services' credentials.
func (s *Site) Core() string { return s.core }

// NewAgent makes the agent of a new worker, which nobody has heard of. It belongs to
// the caller, who starts it, and is not among s.Agent.
func (s *Site) NewAgent(ctx context.Context, worker string) (*Process, error) {
	// Worker names are those of one site, but its containers are on everybody's Docker.
	file := filepath.Join(s.Dir, worker+".credentials")
	out, err := exec.CommandContext(ctx, s.o.Bin, "credentials", "worker", s.core, worker).Output()
	if err == nil {
		err = os.WriteFile(file, out, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("credentials of %s: %w", worker, err)
	}
	args := []string{"agent", "--nats", s.URLs(), "--credentials", file, "--data", s.AgentData(worker), "--cluster", s.Cluster}
	if s.o.Fake {
		args = append(args, "--runtime", "fake", "--fake-journal", s.FakeJournal(worker))
	}
	return s.process("agent-"+worker, append(args, s.o.AgentArgs...)), nil
}

// AgentData is the folder of a worker's agent.
func (s *Site) AgentData(worker string) string { return filepath.Join(s.Dir, "data-"+worker) }

// NATSData is the folder of a NATS server.
func (s *Site) NATSData(p *Process) string { return filepath.Join(s.Dir, "data-"+p.Name) }

// FakeJournal is the file in which a worker's fake runtime keeps what it runs. It
// outlives AgentData.
func (s *Site) FakeJournal(worker string) string { return filepath.Join(s.Dir, worker+".host") }

// All lists every process.
func (s *Site) All() (all []*Process) {
	for _, list := range [][]*Process{s.NATS, s.Gateway, s.Placer, s.Reaper, s.Agent} {
		all = append(all, list...)
	}
	return all
}

// Remove kills everything and takes away its containers and its folder.
func (s *Site) Remove(ctx context.Context, more ...*Process) error {
	var err error
	for _, p := range append(s.All(), more...) {
		p.Kill()
		err = errors.Join(err, raced(p.Name, p.Log()))
	}
	if !s.o.Fake {
		agents, _ := filepath.Glob(s.AgentData("*"))
		err = errors.Join(err, RemoveContainers(ctx, s.Cluster, agents...))
	}
	if s.Image != "" {
		err = errors.Join(err, RemoveImage(ctx, s.Image))
	}
	return errors.Join(err, os.RemoveAll(s.Dir))
}

// Call asks one gateway.
func (s *Site) Call(ctx context.Context, gateway int, method, path string, in, out any) error {
	return Call(ctx, method, s.Gateway[gateway].Addrs.HTTP+path, "", in, out)
}

// RemoveContainers takes away what a cluster has on this machine's Engine, until none is
// left: dockerd may still be at work for a dayfly that was killed, and then refuses, or has
// just removed one itself. What it may still create for one is waited for, if the folders of
// its agents are given.
func RemoveContainers(ctx context.Context, cluster string, agents ...string) error {
	engine, err := client.New(client.FromEnv)
	if err != nil {
		return err
	}
	defer engine.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, folder := range agents {
		awaitCreated(ctx, engine, folder)
	}
	return Poll(ctx, func() error {
		list, err := Containers(ctx, cluster)
		if err != nil || len(list) == 0 {
			return err
		}
		for _, id := range list {
			_, e := engine.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
			err = errors.Join(err, e)
		}
		return errors.Join(fmt.Errorf("%d containers are left of %s", len(list), cluster), err)
	})
}

// awaitCreated waits a moment for the containers that an agent may have asked for when it was
// killed: those whose folder is there and which have not begun.
func awaitCreated(ctx context.Context, engine *client.Client, agent string) {
	folders, _ := filepath.Glob(filepath.Join(agent, "run", "dayfly-*"))
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for _, folder := range folders {
		if _, err := os.Stat(filepath.Join(folder, "started")); err == nil {
			continue
		}
		_ = Poll(ctx, func() error {
			_, err := engine.ContainerInspect(ctx, filepath.Base(folder), client.ContainerInspectOptions{})
			return err
		})
	}
}

// Containers lists what a cluster has on the Engine, running or not.
func Containers(ctx context.Context, cluster string) ([]string, error) {
	return ContainersAt(ctx, "", cluster)
}

// ContainersAt is Containers on the Engine at a host; "" is this machine's.
func ContainersAt(ctx context.Context, host, cluster string) ([]string, error) {
	engine, err := engineAt(host)
	if err != nil {
		return nil, err
	}
	defer engine.Close()
	list, err := engine.ContainerList(ctx, client.ContainerListOptions{All: true,
		Filters: make(client.Filters).Add("label", "dayfly.cluster="+cluster)})
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, c := range list.Items {
		ids = append(ids, c.ID)
	}
	return ids, nil
}

// engineAt gives a client of the Engine at a host; "" is this machine's.
func engineAt(host string) (*client.Client, error) {
	if host == "" {
		return client.New(client.FromEnv)
	}
	return client.New(client.WithHost(host))
}

// raced is an error if the race detector found something in a process.
func raced(name, log string) error {
	_, found, ok := strings.Cut(log, "WARNING: DATA RACE")
	if !ok {
		return nil
	}
	return fmt.Errorf("a race in %s:%s", name, found[:min(len(found), 8000)])
}

// Binaries builds dayfly, and dayfly-init beside it, into a folder, for tests. Where the
// tests have the race detector dayfly has it too; what it says fails Remove.
func Binaries(ctx context.Context, dir string) (dayfly string, err error) {
	// A build that compiles all anew takes longer than a caller may think.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
	defer cancel()
	for _, b := range []struct{ out, pkg string }{
		{"dayfly", "dayfly.dev/cmd/dayfly"}, {"dayfly-init", "dayfly.dev/services/agent/cmd/dayfly-init"},
	} {
		args, cgo := []string{"build", "-trimpath"}, "CGO_ENABLED=0"
		if race && b.out == "dayfly" { // init has to be static
			args, cgo = append(args, "-race"), "CGO_ENABLED=1"
		}
		cmd := exec.CommandContext(ctx, "go", append(args, "-o", filepath.Join(dir, b.out), b.pkg)...)
		cmd.Env = append(os.Environ(), cgo)
		cmd.WaitDelay = time.Second
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build %s: %w\n%s", b.pkg, err, out)
		}
	}
	return filepath.Join(dir, "dayfly"), nil
}
