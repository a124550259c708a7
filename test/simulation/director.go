package simulation

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natssim"
	"dayfly.dev/schemas"
	"dayfly.dev/test/faults"
)

// Rules beside those of package faults.
const (
	Unassigned faults.Rule = "unassigned"  // an attempt was started that no record has ever named
	Overfull   faults.Rule = "overfull"    // a worker was given more tasks than it has room for
	Usurped    faults.Rule = "usurped"     // a placer led while another did
	Left       faults.Rule = "left behind" // a host keeps a container that no record needs
)

// within is how long after the last fault all tasks shall be final and all hosts empty.
const within = 8 * time.Minute

// role is a process that is started again when it was killed.
type role struct {
	name  string
	start func() *process

	mu  sync.Mutex
	now *process // under mu: nil while it is down
}

// Outcome of one simulated run.
type Outcome struct {
	faults.Result
	Virtual time.Duration
	world   *world
}

// simulate runs one seed. It is called in a bubble of testing/synctest, and all that it
// starts has ended when it returns.
func simulate(seed uint64, dir string) Outcome {
	w := newWorld(seed, dir)
	provisioned := w.launch("setup", "", func(ctx context.Context, _ *process, conn *bus.Conn, _ zerolog.Logger) error {
		return bus.Provision(ctx, conn, schemas.Assets(time.Hour), 1)
	})
	<-provisioned.ended

	var roles []*role
	add := func(name string, start func() *process) {
		r := &role{name: name, start: start}
		r.now = start()
		roles = append(roles, r)
	}
	for i := range 2 {
		name := fmt.Sprintf("placer%d", i+1)
		add(name, func() *process { return w.runPlacer(name) })
	}
	for i := range 2 {
		name := fmt.Sprintf("reaper%d", i+1)
		add(name, func() *process { return w.runReaper(name) })
	}
	agents := len(roles)
	for i := range 2 + w.number(2) {
		h := w.newHost(i)
		w.hosts = append(w.hosts, h)
		add(string(h.worker), func() *process { return h.runAgent(h.states > 0 && w.chance(0.35)) })
	}
	var clients []*process
	for i := range 2 {
		var wishes []wish
		for range 2 + w.number(6) {
			wishes = append(wishes, w.wish())
		}
		clients = append(clients, w.runClients(fmt.Sprintf("gateway%d", i+1), wishes))
	}

	var all sync.WaitGroup
	for range w.number(12) {
		at := w.between(0, 120*time.Second)
		if w.chance(0.5) { // agents are the most delicate
			r := roles[agents+w.number(len(roles)-agents)]
			all.Go(func() { w.fault(at, r, clients) })
			continue
		}
		r := roles[w.number(len(roles))]
		all.Go(func() { w.fault(at, r, clients) })
	}
	all.Wait()
	for _, c := range clients {
		<-c.ended
	}
	w.server.SetFaults(natssim.Faults{})
	w.add(faults.Event{Healed: &faults.Healed{Within: within}})
	w.tell("director", "everything is healed")
	w.settle()

	for _, r := range roles {
		r.now.kill()
	}
	for _, h := range w.hosts {
		found, _ := h.runtime.Recover(context.Background())
		for _, a := range found {
			_ = a.Remove(context.Background())
		}
	}
	w.all.Wait()
	w.server.Stop()
	o := Outcome{Result: faults.Check(w.history), Virtual: w.now(), world: w}
	o.Violations = append(o.Violations, w.strays...)
	return o
}

// settle waits until everything is over.
func (w *world) settle() {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	end := time.Now().Add(within)
	for {
		open := 0
		for _, h := range w.hosts {
			open += h.runtime.Live()
		}
		w.mu.Lock()
		for _, r := range w.records {
			if !r.State.Final() {
				open++
			}
		}
		w.mu.Unlock()
		if open == 0 {
			return
		}
		<-tick.C
		if !time.Now().Before(end) {
			break
		}
	}
	for _, h := range w.hosts {
		found, _ := h.runtime.Recover(context.Background())
		for _, a := range found {
			id := a.Assignment()
			w.strays = append(w.strays, faults.Violation{Rule: Left, Task: id.Task, At: w.now(), What: fmt.Sprintf("attempt %d on %s", id.Attempt, id.Worker)})
		}
	}
}

// fault makes one fault and heals it.
func (w *world) fault(at time.Duration, r *role, clients []*process) {
	time.Sleep(at)
	if w.chance(0.6) { // in the middle of something
		w.nextStored([]string{"$KV.tasks.", "$KV.tasks.", "$KV.workers.", "$KV.leaders.", "dayfly.work.", "dayfly.work.", "dayfly.reports."}[w.number(7)])
		time.Sleep(w.between(0, 1500*time.Microsecond))
	}
	lengths := []time.Duration{100 * time.Millisecond, 2 * time.Second, 12 * time.Second, 50 * time.Second, 100 * time.Second, 130 * time.Second}
	most := lengths[w.number(len(lengths))]
	long := w.between(most/2, most)
	kind := []string{"kill", "kill", "stop", "cut", "cut", "hold", "hold", "server", "container", "gateway"}[w.number(10)]
	target := r.name
	switch kind {
	case "server":
		target, long = "nats", long/4
	case "container":
		target = "hosts"
	case "gateway":
		target = "gateways"
	}
	began := w.now()
	w.tell("director", "%s %s for %v", kind, target, long)
	switch kind {
	case "server":
		w.server.Kill()
		w.mu.Lock()
		w.leader = schemas.Leadership{} // the newest renewal may be forgotten, though it was acknowledged
		w.mu.Unlock()
		time.Sleep(long)
		w.server.Start()
	case "container":
		w.killContainer()
	case "gateway":
		c := clients[w.number(len(clients))]
		if w.chance(0.5) {
			c.link.Hold()
			time.Sleep(long)
			c.link.Release()
			break
		}
		c.link.Cut()
		time.Sleep(long)
		c.link.Heal()
	default:
		w.hurt(kind, r, long)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.history = append(w.history, faults.Event{T: began, Fault: &faults.Fault{Kind: kind, Target: target, Until: w.now(), Effect: "as told"}})
	w.trace = append(w.trace, line{w.now(), "director", kind + " " + target + " is over"})
}

// hurt does something to a process. Of several faults of one process at a time those
// of its connection only count while it lives.
func (w *world) hurt(kind string, r *role, long time.Duration) {
	r.mu.Lock()
	p := r.now
	if kind == "kill" || kind == "stop" {
		r.now = nil
	}
	r.mu.Unlock()
	if p == nil {
		return
	}
	switch kind {
	case "kill", "stop":
		if kind == "kill" {
			p.kill()
		} else {
			p.stop()
		}
		time.Sleep(long)
		r.mu.Lock()
		r.now = r.start()
		r.mu.Unlock()
	case "cut":
		p.link.Cut()
		time.Sleep(long)
		p.link.Heal()
	case "hold":
		w.mu.Lock()
		w.late = w.late || strings.HasPrefix(r.name, "placer")
		w.mu.Unlock()
		p.link.Hold()
		time.Sleep(long)
		p.link.Release()
	}
}

// killContainer ends the process of some attempt as somebody else would.
func (w *world) killContainer() {
	h := w.hosts[w.number(len(w.hosts))]
	found, _ := h.runtime.Recover(context.Background())
	if len(found) > 0 {
		h.runtime.Kill(found[w.number(len(found))].Assignment().Task)
	}
}
