//go:build faults

package faults

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"dayfly.dev/test/harness"
)

// unit is one process and who looks after it: as a service manager would, the site
// starts it again when it ends by itself.
type unit struct {
	*harness.Process
	mu     sync.Mutex // held while a fault is at it
	worker string     // of an agent
}

// injector injects faults in lanes: one over the agents, one over the hosts of other
// agents, one over the other services, one over NATS, one over everything. Faults of two
// lanes may fall together.
type injector struct {
	rec   *Recorder
	site  *harness.Site
	clock string // a dayfly whose clock can be off
	fence time.Duration
	hosts *hosts // nil: they cannot be hurt here
	log   func(format string, args ...any)
}

// fault is one kind of fault. do breaks something and gives what it saw of it; it
// heals what it broke before it returns.
type fault struct {
	kind string
	do   func(ctx context.Context, targets []*unit) (effect string, err error)
	many int // targets
}

func (in *injector) kinds(part string) []fault {
	during := func(d time.Duration, hurt func(*unit) string) func(context.Context, []*unit) (string, error) {
		return func(ctx context.Context, targets []*unit) (effect string, err error) {
			for _, u := range targets {
				effect = hurt(u)
			}
			sleep(ctx, d)
			for _, u := range targets {
				if e := in.heal(u); e != nil {
					err = e
				}
			}
			return effect, err
		}
	}
	kill := func(u *unit) string { u.Kill(); return "killed" }
	term := func(u *unit) string {
		if err := u.Stop(); err != nil {
			in.log("%v", err)
			return "did not end well"
		}
		return "ended"
	}
	pause := func(u *unit) string {
		if u.Pause() != nil {
			return ""
		}
		return stopped(u)
	}
	half, two := in.fence/2, 2*in.fence
	if part == "all" {
		return []fault{{"kill -9 everything", during(0, kill), 100}}
	}
	clocks := []fault{{ClockOff + " +1h", in.clockOff(time.Hour, two), 1}, {ClockOff + " -1h", in.clockOff(-time.Hour, two), 1}}
	if part == "nats" {
		return append(clocks, []fault{
			{"kill -9", during(time.Second, kill), 1},
			{"stop two of three", during(half, term), 2},
			{"restart all", during(0, term), 3},
			{"SIGSTOP 0.5 fence", during(half, pause), 1},
			{"kill -9 all", during(time.Second, kill), 3},
			{"SIGTERM", during(half, term), 1},
			{"store wiped", in.wipe, 1},
		}...)
	}
	list := append(clocks, []fault{
		{"kill -9", during(200*time.Millisecond, kill), 1},
		{"SIGSTOP 2 fences", during(two, pause), 1},
		{"SIGTERM", during(0, term), 1},
		{"SIGSTOP 0.5 fence", during(half, pause), 1},
	}...)
	if part == "hosts" {
		return append(append(list, fault{"dead for 2 fences", during(two, kill), 1}), in.hosts.kinds(in)...)
	}
	if part != "agents" {
		return append(list, fault{"kill -9 both", during(time.Second, kill), 2})
	}
	return append(list,
		fault{"dead for 2 fences", during(two, kill), 1},
		fault{"state wiped", during(200*time.Millisecond, func(u *unit) string {
			u.Kill()
			if os.RemoveAll(in.site.AgentData(u.worker)) != nil {
				return ""
			}
			return "wiped"
		}), 1},
		fault{"kill -9 all", during(time.Second, kill), 3})
}

// clockOff lets a service end in good order and go on with a clock that is off.
func (in *injector) clockOff(off, d time.Duration) func(context.Context, []*unit) (string, error) {
	return func(ctx context.Context, targets []*unit) (effect string, err error) {
		u := targets[0]
		bin, env := u.Bin, u.Env
		if err := u.Stop(); err != nil {
			in.log("%v", err)
		}
		u.Bin, u.Env = in.clock, append(slices.Clip(env), harness.ClockEnv+"="+off.String())
		if err := in.heal(u); err != nil {
			return "", err
		}
		res, err := http.Get(u.Addrs.Admin + "/healthz")
		if err == nil {
			res.Body.Close()
			says, _ := http.ParseTime(res.Header.Get("Date"))
			if is := time.Until(says).Round(time.Minute); is == off {
				effect = "off by " + is.String()
			}
		}
		sleep(ctx, d)
		if err := u.Stop(); err != nil {
			in.log("%v", err)
		}
		u.Bin, u.Env = bin, env
		return effect, in.heal(u)
	}
}

// wipe takes the store of one NATS server away. Before that, and before anything else
// may happen to them, each server has all that the others have: what two of three
// acknowledged may be gone if one of them is wiped while the third is behind.
func (in *injector) wipe(ctx context.Context, targets []*unit) (effect string, err error) {
	u := targets[0]
	if err := in.whole(ctx); err != nil {
		return "", nil // the run is over
	}
	u.Kill()
	if os.RemoveAll(in.site.NATSData(u.Process)) == nil {
		effect = "wiped"
	}
	sleep(ctx, in.fence)
	if err := in.heal(u); err != nil {
		return effect, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return effect, in.whole(ctx)
}

// whole waits until every NATS server has all that the others have.
func (in *injector) whole(ctx context.Context) error {
	for _, p := range in.site.NATS {
		if err := p.Ready(ctx); err != nil {
			return err
		}
	}
	return nil
}

// stopped says whether the kernel has the process stopped.
func stopped(u *unit) string {
	for range 100 {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", u.PID()))
		if i := bytes.LastIndexByte(b, ')'); i > 0 && len(b) > i+2 && b[i+2] == 'T' {
			return "stopped"
		}
		time.Sleep(10 * time.Millisecond) // each of its threads has to
	}
	return ""
}

// heal lets a unit run, however it was stopped.
func (in *injector) heal(u *unit) error {
	if u.Running() {
		return u.Resume()
	}
	var err error
	for range 20 {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		err = u.Start(ctx)
		cancel()
		if err == nil {
			return nil
		}
		u.Kill()
		time.Sleep(200 * time.Millisecond)
	}
	return err
}

// lane injects one fault after the other until ctx ends, each kind once before any
// comes again.
func (in *injector) lane(ctx context.Context, part string, groups [][]*unit, rng *rand.Rand) error {
	var deck []fault
	least := 2
	first := 1
	switch part {
	case "nats":
		least = 10 // an election takes 4 to 10 s; without a pause nothing would be at work to be hurt
	case "all":
		first, least = 15, 60
	}
	for sleep(ctx, time.Duration(first+rng.IntN(3))*time.Second); ctx.Err() == nil; sleep(ctx, time.Duration(least+rng.IntN(5))*time.Second) {
		if len(deck) == 0 {
			deck = in.kinds(part)
			rng.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		f := deck[0]
		deck = deck[1:]
		units := slices.Clone(groups[rng.IntN(len(groups))])
		if part == "hosts" {
			units = in.hosts.fit(f.kind, units)
		}
		rng.Shuffle(len(units), func(i, j int) { units[i], units[j] = units[j], units[i] })
		units = units[:min(f.many, len(units))]
		// Always in the same order, for lanes that share units.
		slices.SortFunc(units, func(a, b *unit) int { return strings.Compare(a.Name, b.Name) })
		name := ""
		for _, u := range units {
			u.mu.Lock()
			name += " " + u.Name
		}
		began := Now()
		effect, err := f.do(ctx, units)
		in.rec.Add(began, Event{Fault: &Fault{Kind: f.kind, Target: name[1:], Until: Now(), Effect: effect}})
		in.log("%s:%s for %v: %s", f.kind, name, (Now() - began).Round(time.Millisecond), effect)
		for _, u := range units {
			u.mu.Unlock()
		}
		if err != nil {
			return fmt.Errorf("heal %s: %w", name, err)
		}
	}
	return nil
}

// manage starts units again that ended by themselves, until ctx ends.
func (in *injector) manage(ctx context.Context, units []*unit) {
	for ; ctx.Err() == nil; sleep(ctx, 200*time.Millisecond) {
		for _, u := range units {
			if !u.mu.TryLock() {
				continue
			}
			if ctx.Err() == nil && !u.Running() {
				at, tail := Now(), u.Tail()
				err := in.heal(u)
				in.rec.Add(at, Event{Fault: &Fault{Kind: "ended by itself", Target: u.Name, Until: Now(), Effect: "started again"}})
				in.log("%s ended by itself (started again: %v)\n%s", u.Name, err, tail[max(0, len(tail)-600):])
			}
			u.mu.Unlock()
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
