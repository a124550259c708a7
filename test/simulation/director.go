package simulation

import (
	"context"
	"fmt"
	"slices"
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
	Hasty      faults.Rule = "hasty"       // a worker was declared lost while its permit was not over
	Left       faults.Rule = "left behind" // a host keeps a container that no record needs
)

// size is how much happens in one run.
type size struct {
	span     time.Duration // in which wishes and faults begin
	within   time.Duration // how long after the last fault all tasks shall be final and all hosts empty
	hosts    spread
	wishes   spread // of each gateway
	meddlers int
	faults   spread
	long     float64       // how many of the tasks and faults last long
	weather  time.Duration // how long the network stays as it is; 0: for the whole run
}

// spread is a number between two.
type spread struct{ least, most int }

// A small run is over in an instant; a hard one goes on for longer, with more of
// everything, so that what happens rarely happens in each.
var (
	small = size{span: 2 * time.Minute, within: 8 * time.Minute, hosts: spread{2, 3}, wishes: spread{2, 7}, meddlers: 4, faults: spread{0, 11}, long: 0.15}
	hard  = size{span: 30 * time.Minute, within: 12 * time.Minute, hosts: spread{3, 5}, wishes: spread{150, 250}, meddlers: 350, faults: spread{100, 200}, long: 0.4, weather: time.Minute}
)

// role is a process that is started again when it was killed.
type role struct {
	service string
	name    string
	start   func() *process

	mu  sync.Mutex
	now *process // under mu: nil while it is down
}

// director breaks things and mends them.
type director struct {
	*world
	long     float64 // share of faults
	roles    []*role
	gateways []*process
	all      sync.WaitGroup // faults that are not over
}

// Outcome of one simulated run.
type Outcome struct {
	faults.Result
	Virtual time.Duration
	world   *world
}

// simulate runs one seed. It is called in a bubble of testing/synctest, and all that it
// starts has ended when it returns.
func simulate(seed uint64, sz size, dir string) Outcome {
	w := newWorld(seed, sz, dir)
	provisioned := w.launch("setup", "", func(ctx context.Context, _ *process, conn *bus.Conn, _ zerolog.Logger) error {
		return bus.Provision(ctx, conn, schemas.Assets(time.Hour), 1)
	})
	<-provisioned.ended

	d := &director{world: w, long: sz.long}
	add := func(service, name string, start func() *process) {
		r := &role{service: service, name: name, start: start}
		r.now = start()
		d.roles = append(d.roles, r)
	}
	for i := range 2 {
		name := fmt.Sprintf("placer%d", i+1)
		add("placer", name, func() *process { return w.runPlacer(name) })
	}
	for i := range 2 {
		name := fmt.Sprintf("reaper%d", i+1)
		add("reaper", name, func() *process { return w.runReaper(name) })
	}
	for i := range w.count(sz.hosts) {
		h := w.newHost(i)
		w.hosts = append(w.hosts, h)
		add("agent", string(h.worker), func() *process { return h.runAgent(h.states > 0 && w.chance(0.35)) })
	}
	for i := range 2 {
		var wishes []wish
		for range w.count(sz.wishes) {
			wishes = append(wishes, w.wish(sz))
		}
		d.gateways = append(d.gateways, w.runClients(fmt.Sprintf("gateway%d", i+1), wishes))
	}

	if sz.weather > 0 {
		d.all.Go(func() { w.weathers(sz) })
	}
	for range sz.meddlers {
		d.all.Go(func() { w.meddle(sz.span) })
	}
	for range w.count(sz.faults) {
		at := w.between(0, sz.span)
		d.all.Go(func() { d.fault(at) })
	}
	d.all.Wait()
	close(w.answered)
	for _, g := range d.gateways {
		<-g.ended
	}
	w.server.SetFaults(natssim.Faults{})
	w.add(faults.Event{Healed: &faults.Healed{Within: sz.within}})
	w.tell("director", "everything is healed")
	w.settle(sz.within)

	for _, r := range d.roles {
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
	time.Sleep(time.Minute) // the client library ends some of its goroutines in a while
	o := Outcome{Result: faults.Check(w.history), Virtual: w.now(), world: w}
	o.Violations = append(o.Violations, w.strays...)
	return o
}

// settle waits until everything is over.
func (w *world) settle(within time.Duration) {
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

// moments are what a fault may wait for: those after which something is half done.
var moments = []moment{recordWritten, recordGiven, recordGiven, recordRuns, recordLeft, recordMarked, orderSent, orderSent, reportSent, lastReportSent, lastReportSent, lastReportSent,
	beatSent, registered, verdictWritten, leaderWritten}

// fault makes one fault and heals it. Another may follow before it is healed.
func (d *director) fault(at time.Duration) {
	time.Sleep(at)
	var s sight
	kinds := []string{"kill", "kill", "stop", "cut", "cut", "hold", "hold", "slow", "server", "container", "gateway", "gateway"}
	if d.chance(0.6) { // in the middle of something
		s = d.next(moments[d.number(len(moments))])
		time.Sleep(d.between(0, []time.Duration{500 * time.Microsecond, 1500 * time.Microsecond, 8 * time.Millisecond}[d.number(3)]))
		kinds = append(kinds, "server", "server", "server") // the newest is what it has not written yet
	}
	if d.chance(0.2) {
		soon := d.between(0, 50*time.Millisecond)
		if d.chance(0.5) {
			soon *= 100
		}
		d.all.Go(func() { d.fault(soon) })
	}
	long := d.length()
	kind := kinds[d.number(len(kinds))]
	victims := d.victims(s)
	target := ""
	for _, r := range victims {
		target = strings.TrimSpace(target + " " + r.name)
	}
	switch kind {
	case "server":
		target, long = "nats", long/10
	case "container":
		target = "hosts"
	case "gateway":
		target = "gateways"
	}
	began := d.now()
	d.tell("director", "%s %s for %v", kind, target, long)
	switch kind {
	case "server":
		d.server.Kill()
		d.mu.Lock()
		d.leader, d.forgot = schemas.Leadership{}, began
		d.mu.Unlock()
		time.Sleep(long)
		d.server.Start()
	case "container":
		d.killContainer()
	case "gateway":
		d.hurtLink([]string{"cut", "hold", "slow", "slow"}[d.number(4)], d.gateways[d.number(len(d.gateways))].link, long)
	default:
		var each sync.WaitGroup
		for _, r := range victims {
			each.Go(func() { d.hurt(kind, r, long) })
		}
		each.Wait()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.history = append(d.history, faults.Event{T: began, Fault: &faults.Fault{Kind: kind, Target: target, Until: d.now(), Effect: "as told"}})
	d.trace = append(d.trace, line{d.now(), "director", kind + " " + target + " is over", nil})
}

// longest is how long a fault lasts at most.
const longest = 130 * time.Second

// length is how long a fault lasts: of each order of magnitude equally often, and some
// long enough for a worker to be lost.
func (d *director) length() time.Duration {
	if d.chance(d.long) {
		return d.between(60*time.Second, longest)
	}
	decade := 50 * time.Millisecond
	for range d.number(3) {
		decade *= 10
	}
	return d.between(decade, 10*decade)
}

// victims chooses whom a fault hurts: often the worker that s is about, half of the
// rest agents, which are the most delicate, and sometimes all of a service.
func (d *director) victims(s sight) []*role {
	var agents, core []*role
	for _, r := range d.roles {
		if r.service == "agent" {
			agents = append(agents, r)
		} else {
			core = append(core, r)
		}
	}
	for _, r := range agents {
		if r.name == string(s.worker) && d.chance(0.4) {
			return []*role{r}
		}
	}
	if d.chance(0.5) {
		return []*role{agents[d.number(len(agents))]}
	}
	one := core[d.number(len(core))]
	if d.chance(0.7) {
		return []*role{one}
	}
	return slices.DeleteFunc(core, func(r *role) bool { return r.service != one.service })
}

// hurt does something to a process. Of several faults of one process at a time those
// of its connection only count while it lives.
func (d *director) hurt(kind string, r *role, long time.Duration) {
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
	default:
		d.hurtLink(kind, p.link, long)
	}
}

// hurtLink breaks a connection, holds it back, or makes it slow. After the first two it
// may be slow for a while.
func (d *director) hurtLink(kind string, link *natssim.Link, long time.Duration) {
	slow := time.Duration(0)
	if d.chance(0.5) {
		slow = d.between(time.Second, 10*time.Second)
	}
	if kind != "cut" || slow > 0 {
		d.lateUntil(long + slow)
	}
	switch kind {
	case "hold":
		link.Hold()
		time.Sleep(long)
		link.Release()
	case "cut":
		link.Cut()
		time.Sleep(long)
		link.Heal()
	case "slow":
		slow = long
	}
	if slow > 0 {
		link.Slow(d.between(50*time.Millisecond, 4*time.Second), slow)
		time.Sleep(slow)
	}
}

// killContainer ends the process of some attempt as somebody else would.
func (d *director) killContainer() {
	h := d.hosts[d.number(len(d.hosts))]
	found, _ := h.runtime.Recover(context.Background())
	if len(found) > 0 {
		h.runtime.Kill(found[d.number(len(found))].Assignment().Task)
	}
}
