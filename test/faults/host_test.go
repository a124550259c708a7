//go:build faults

package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"dayfly.dev/test/harness"
)

// The workers of which the host itself is hurt:
//
//	w4  fake runtime      a namespace of its own    state folder on a small tmpfs
//	d1  the machine's     a namespace of its own    state folder on a small tmpfs
//	    Docker Engine
//	d2  a dockerd of its own, which is hurt
//
// Only tasks with the constraint engine=docker go to d1 and d2, and those go nowhere else.
type hosts struct {
	network *harness.Network
	docker  *harness.Dockerd
	image   string
	witness *witness
	rng     *rand.Rand // of the lane

	behind map[string]*harness.Namespace // by worker
	small  map[string]bool               // by worker
}

const (
	fakeEngine = "engine=fake"
	realEngine = "engine=docker"
	smallBytes = 16 << 20 // dayfly-init, a journal, and some logs
)

// newHosts prepares what must be there before the site. It gives nil, and says why,
// where that is impossible.
func newHosts(t *testing.T, rng *rand.Rand) *hosts {
	if os.Geteuid() != 0 {
		t.Log("NO FAULTS OF HOSTS and no real containers: network namespaces, mounts and a dockerd need root")
		return nil
	}
	for _, name := range []string{"ip", "iptables", "nsenter", "dockerd"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Logf("NO FAULTS OF HOSTS and no real containers: %v", err)
			return nil
		}
	}
	h := &hosts{witness: &witness{}, rng: rng, behind: map[string]*harness.Namespace{}, small: map[string]bool{}}
	var err error
	if h.network, err = harness.NewNetwork(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.network.Remove(); err != nil {
			t.Error(err)
		}
	})
	if h.docker, err = harness.NewDockerd(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.docker.Remove(); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := h.docker.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return h
}

// join adds the workers to a site that runs. They end with it.
func (h *hosts) join(t *testing.T, s *harness.Site) {
	h.image = "dayfly-test:" + s.Cluster
	if err := harness.MakeImage(t.Context(), h.image, "", h.docker.Host); err != nil {
		t.Fatal(err)
	}
	h.behind["w4"], h.behind["d1"] = h.network.NS[0], h.network.NS[1]
	for _, w := range []string{"w4", "d1", "d2"} {
		dir := s.AgentData(w)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if w != "d2" {
			if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=700", smallBytes)); err != nil {
				t.Fatal(err)
			}
			h.small[w] = true
		}
		p, err := s.NewAgent(t.Context(), w)
		if err != nil {
			t.Fatal(err)
		}
		if w != "w4" {
			p.Args = append(p.Args, "--runtime", "docker", "--worker-label", realEngine)
			home, err := homeOf(w, dir)
			if err != nil {
				t.Fatal(err)
			}
			h.witness.homes = append(h.witness.homes, home)
		}
		if w == "d2" {
			p.Env = append(p.Env, "DOCKER_HOST="+h.docker.Host)
		}
		if ns := h.behind[w]; ns != nil {
			p.Under, p.Listen["--admin"] = ns.Enter(), ns.Addr+":0"
			p.Args = append(p.Args, "--insecure-listen")
		}
		s.Agent = append(s.Agent, p)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		err = errors.Join(p.Start(ctx), p.Ready(ctx))
		cancel()
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { h.witness.watch(ctx) })
	t.Cleanup(func() { cancel(); watching.Wait() })
}

// leave takes away what the workers have left, before the site itself goes.
func (h *hosts) leave(t *testing.T, s *harness.Site) {
	// A site that has settled has no container left.
	err := harness.RemoveContainers(context.Background(), s.Cluster)
	if h.image != "" {
		err = errors.Join(err, harness.RemoveImage(context.Background(), h.image))
	}
	for w := range h.small {
		err = errors.Join(err, syscall.Unmount(s.AgentData(w), syscall.MNT_DETACH))
	}
	if err != nil {
		t.Error(err)
	}
}

// real turns a task of the fake runtime into one of the guest image, which has most of
// its commands.
func (h *hosts) real(spec map[string]any) {
	command := spec["command"].([]string)
	switch {
	case len(command) == 1 && command[0] == "sleep":
		command = []string{"sleep", "1h"}
	case command[0] == "log":
		command = []string{"spam", command[1]}
	case command[0] == "oom":
		command = []string{"eat", "268435456"}
	case command[0] == "fail":
		command, spec["entrypoint"] = []string{"fail", "start"}, []string{"/nowhere"}
	}
	spec["command"], spec["image"] = command, h.image
	spec["constraints"] = map[string]string{"engine": "docker"}
	spec["resources"] = map[string]any{"cpus": 0.2, "memory": "48MiB", "disk": "1MiB"}
}

// empty checks that no container of the site is left on either Engine.
func (h *hosts) empty(t *testing.T, s *harness.Site, until time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), max(until-Now(), 5*time.Second))
	defer cancel()
	err := harness.Poll(ctx, func() error {
		for _, host := range []string{"", h.docker.Host} {
			list, err := harness.ContainersAt(ctx, host, s.Cluster)
			if err != nil {
				return err
			}
			if len(list) > 0 {
				return fmt.Errorf("%d containers are left on the Engine %q: %v", len(list), host, list)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// fit leaves the workers that a kind of fault can hurt.
func (h *hosts) fit(kind string, units []*unit) []*unit {
	return slices.DeleteFunc(units, func(u *unit) bool {
		switch word, _, _ := strings.Cut(kind, " "); word {
		case "cut", "deaf":
			return h.behind[u.worker] == nil
		case "disk":
			return !h.small[u.worker]
		case "dockerd":
			return u.worker != "d2"
		}
		return false
	})
}

// kinds are the faults of hosts.
func (h *hosts) kinds(in *injector) []fault {
	half, two := in.fence/2, 2*in.fence
	term := h.docker.Stop
	kill := func() error { h.docker.Kill(); return nil }
	return []fault{
		{"cut off 2 fences", h.cut(two, false), 1},
		{"cut off 0.5 fence", h.cut(half, false), 1},
		{"deaf 2 fences", h.cut(two, true), 1},
		{"disk full 2 fences", h.full(in, two, false), 1},
		{"disk full, kill -9", h.full(in, half, true), 1},
		{"dockerd SIGTERM", h.restart(in, 0, term, false), 1},
		{"dockerd kill -9", h.restart(in, 0, kill, false), 1},
		{"dockerd dead 0.5 fence", h.restart(in, half, kill, false), 1},
		{"dockerd and agent kill -9", h.restart(in, time.Second, kill, true), 1},
		{"state wiped", func(_ context.Context, targets []*unit) (string, error) {
			u := targets[0]
			u.Kill()
			// The folder itself may be a mount point.
			inside, err := filepath.Glob(filepath.Join(in.site.AgentData(u.worker), "*"))
			for _, path := range inside {
				err = errors.Join(err, os.RemoveAll(path))
			}
			return "wiped", errors.Join(err, in.heal(u))
		}, 1},
	}
}

// cut lets all packets of a worker's agent vanish for a while, or only those to it.
func (h *hosts) cut(d time.Duration, deaf bool) func(context.Context, []*unit) (string, error) {
	return func(ctx context.Context, targets []*unit) (effect string, err error) {
		ns := h.behind[targets[0].worker]
		err = ns.Cut(deaf)
		sleep(ctx, d)
		probe, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		if e := targets[0].Ready(probe); e != nil {
			effect = "out of reach"
		}
		cancel()
		return effect, errors.Join(err, ns.Heal())
	}
}

// full fills the state folder to the last byte for a while. The agent may be killed and
// started meanwhile: it cannot stay, and shall not have spoilt anything.
func (h *hosts) full(in *injector, d time.Duration, kill bool) func(context.Context, []*unit) (string, error) {
	return func(ctx context.Context, targets []*unit) (effect string, err error) {
		u := targets[0]
		dir := in.site.AgentData(u.worker)
		ballast := filepath.Join(dir, "ballast")
		for until := Now() + d; ; {
			// What the agent gives back is filled again.
			if fill(ballast) && effect == "" {
				effect = "full"
			}
			if kill {
				kill = false
				u.Kill()
				start, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				if e := u.Start(start); e != nil {
					u.Kill()
					effect += ", did not start"
				}
				cancel()
			}
			if Now() >= until || ctx.Err() != nil {
				break
			}
			sleep(ctx, 100*time.Millisecond)
		}
		err = os.Remove(ballast)
		if !u.Running() {
			effect += ", ended"
			err = errors.Join(err, in.heal(u))
		}
		return effect, err
	}
}

// fill appends to a file until nothing goes in any more.
func fill(path string) (full bool) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return errors.Is(err, syscall.ENOSPC)
	}
	defer f.Close()
	for block := bytes.Repeat([]byte{'x'}, 64<<10); len(block) > 0; {
		if _, err := f.Write(block); err != nil {
			full = errors.Is(err, syscall.ENOSPC)
			block = block[:len(block)/2]
		}
	}
	return full
}

// restart ends the dockerd, and perhaps its worker's agent with it, and starts it again
// after a while, with or without --live-restore by the seed.
func (h *hosts) restart(in *injector, d time.Duration, end func() error, agentToo bool) func(context.Context, []*unit) (string, error) {
	return func(ctx context.Context, targets []*unit) (effect string, err error) {
		effect = fmt.Sprintf("ended, live-restore %v", h.docker.LiveRestore)
		if e := end(); e != nil {
			in.log("%v", e)
			effect = "did not end well"
		}
		if agentToo {
			targets[0].Kill()
		}
		sleep(ctx, d)
		h.docker.LiveRestore = h.rng.IntN(2) == 0
		start, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err = h.docker.Start(start)
		return fmt.Sprintf("%s, then %v", effect, h.docker.LiveRestore), errors.Join(err, in.heal(targets[0]))
	}
}
