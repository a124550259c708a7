package gateway

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// fleet is what the gateway knows of the workers.
type fleet struct {
	lease  time.Duration
	beats  *bus.View[schemas.Beat]
	drains *bus.View[schemas.Drain]

	mu    sync.Mutex
	seen  map[schemas.WorkerID]time.Time // under mu: when the last beat came, by our clock
	sums  map[schemas.WorkerID]*sum      // under mu: what is assigned
	hosts []schemas.Host                 // under mu: of workers that are not lost; nil: ask the view
	stale uint64                         // under mu: how often hosts became out of date
}

// sum adds up what the tasks of one worker were promised, in whole numbers so that
// nothing is left over when they go.
type sum struct {
	tasks        int
	nano, memory int64
	gpus         int
}

func newFleet(c *bus.Conn, lease time.Duration) *fleet {
	f := &fleet{lease: lease, seen: map[schemas.WorkerID]time.Time{}, sums: map[schemas.WorkerID]*sum{}}
	f.beats = bus.NewView(c, schemas.BucketWorkers, func(_ string, _ nats.Header, data []byte) (b schemas.Beat, err error) {
		err = schemas.Decode(data, &b)
		b.Unknown = nil // may be long, and is not shown
		return b, err
	}, bus.ViewOptions[schemas.Beat]{OnChange: f.beatChanged})
	f.drains = bus.NewView(c, schemas.BucketDrains, func(_ string, _ nats.Header, data []byte) (d schemas.Drain, err error) {
		return d, schemas.Decode(data, &d)
	}, bus.ViewOptions[schemas.Drain]{})
	return f
}

func (f *fleet) beatChanged(c bus.Change[schemas.Beat]) {
	w := schemas.WorkerID(c.Key)
	f.mu.Lock()
	defer f.mu.Unlock()
	if !c.HadOld || c.Deleted || c.Old.Lost() != c.New.Lost() || c.Old.Host.CPUs != c.New.Host.CPUs || c.Old.Host.Memory != c.New.Host.Memory || c.Old.Host.GPUs != c.New.Host.GPUs {
		f.hosts = nil
		f.stale++
	}
	switch {
	case c.Deleted:
		delete(f.seen, w)
	case !c.HadOld || !c.New.Lost(): // the verdict is no beat
		f.seen[w] = time.Now()
	}
}

// count moves a task's resources between the sums when the task moves between
// workers. It belongs to the goroutine of taskChanged.
func (f *fleet) count(old, now *item) {
	if now != nil && old != nil {
		now.size = old.size // a spec never changes
	}
	var to schemas.WorkerID
	if now != nil && now.state.Held() {
		worker, _, _ := strings.Cut(now.holder, " ")
		to = schemas.WorkerID(worker)
		if now.size == nil {
			now.size = now.resources()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if old != nil && old.counted != "" {
		f.add(old.counted, old.size, -1)
	}
	if to != "" && now.size != nil {
		now.counted = to
		f.add(to, now.size, 1)
	}
}

func (f *fleet) add(w schemas.WorkerID, r *schemas.Resources, sign int) {
	s := f.sums[w]
	if s == nil {
		s = &sum{}
		f.sums[w] = s
	}
	s.tasks += sign
	s.nano += int64(sign) * r.CPUs.Nano()
	s.memory += int64(sign) * int64(r.Memory)
	s.gpus += sign * r.GPUs
	if s.tasks == 0 {
		delete(f.sums, w)
	}
}

// resources reads only that part of the record.
func (it *item) resources() *schemas.Resources {
	var r struct {
		Spec struct {
			Resources schemas.Resources `json:"resources"`
		} `json:"spec"`
	}
	b := it.body.Load()
	if b == nil || schemas.Decode(b.raw, &r) != nil {
		return nil
	}
	return &r.Spec.Resources
}

// misfit says why no worker could ever hold the task, nil if one could or none is
// known. A worker that is silent may come back; one that is lost does not count. Of
// the constraints only those on the host itself count: labels can be given later.
func (f *fleet) misfit(spec schemas.Spec) *schemas.Error {
	need := spec.Resources
	refuse := func(field, format string, args ...any) *schemas.Error {
		return &schemas.Error{Status: http.StatusUnprocessableEntity, Code: schemas.CodeNoCapacity, Field: field, Detail: fmt.Sprintf(format, args...)}
	}
	hosts := f.known()
	if len(hosts) == 0 {
		return nil
	}
	for key, has := range map[string]func(schemas.Host) string{
		"arch": func(h schemas.Host) string { return h.Arch },
		"os":   func(h schemas.Host) string { return h.OS },
	} {
		want, asked := spec.Constraints[key]
		if !asked {
			continue
		}
		there := map[string]bool{}
		for _, h := range hosts {
			there[has(h)] = true
		}
		hosts = slices.DeleteFunc(slices.Clone(hosts), func(h schemas.Host) bool { return has(h) != want })
		if len(hosts) == 0 {
			return refuse("constraints."+key, "no worker is of that kind; there are: %s", strings.Join(slices.Sorted(maps.Keys(there)), ", "))
		}
	}
	var largest, fastest schemas.Host
	gpus := 0
	for _, h := range hosts {
		if h.CPUs >= need.CPUs && h.Memory >= need.Memory && h.GPUs >= need.GPUs {
			return nil
		}
		if h.Memory > largest.Memory || h.Memory == largest.Memory && h.CPUs > largest.CPUs {
			largest = h
		}
		if h.CPUs > fastest.CPUs {
			fastest = h
		}
		gpus = max(gpus, h.GPUs)
	}
	switch {
	case largest.Memory < need.Memory:
		return refuse("resources.memory", "no worker has as much memory; the largest has %s", largest.Memory)
	case fastest.CPUs < need.CPUs:
		return refuse("resources.cpus", "no worker has as many CPUs; the largest has %s", fastest.CPUs)
	case gpus == 0 && need.GPUs > 0:
		return refuse("resources.gpus", "no worker has a GPU")
	case gpus < need.GPUs:
		return refuse("resources.gpus", "no worker has as many GPUs; the most that one has is %d", gpus)
	case need.GPUs > 0:
		return refuse("resources", "no worker has all of it at once: the memory, the CPUs and the GPUs")
	}
	return refuse("resources", "no worker has both; the one with the most memory has %s and %s CPUs", largest.Memory, largest.CPUs)
}

// known lists the hosts that are not lost.
func (f *fleet) known() []schemas.Host {
	f.mu.Lock()
	hosts, stale := f.hosts, f.stale
	f.mu.Unlock()
	if hosts != nil {
		return hosts
	}
	hosts = []schemas.Host{}
	f.beats.Range(func(_ string, b schemas.Beat, _ uint64) bool {
		if !b.Lost() {
			hosts = append(hosts, b.Host)
		}
		return true
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stale == stale {
		f.hosts = hosts
	}
	return hosts
}

// worker is one as the API shows it.
func (f *fleet) worker(b schemas.Beat, now time.Time) schemas.Worker {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := schemas.Worker{
		ID: b.Worker, State: "ready", Epoch: b.Epoch, Version: b.Version, Host: b.Host,
		Running: b.Running, Load: b.Load, RegisteredAt: b.Since,
	}
	if seen, ok := f.seen[b.Worker]; ok {
		w.BeatAgo = schemas.Duration(now.Sub(seen).Round(time.Millisecond))
	}
	if s := f.sums[b.Worker]; s != nil {
		w.Assigned = schemas.Allocation{Tasks: s.tasks, CPUs: schemas.CPUs(float64(s.nano) / 1e9), Memory: schemas.Size(s.memory), GPUs: s.gpus}
	}
	w.Free = schemas.Allocation{Tasks: b.Host.Slots, CPUs: b.Host.CPUs, Memory: b.Host.Memory, GPUs: b.Host.GPUs}.Less(w.Assigned)
	_, _, draining := f.drains.Get(string(b.Worker))
	switch {
	case b.Lost():
		w.State = "lost"
	case w.BeatAgo.Std() > f.lease:
		w.State = "silent"
	case draining:
		w.State = "draining"
	}
	return w
}

// listWorkers is GET /v1/workers.
func (g *Gateway) listWorkers(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	return answer(w, http.StatusOK, g.workers(time.Now()))
}

// workers lists all of them as they are now.
func (g *Gateway) workers(now time.Time) schemas.WorkerList {
	beats := map[string]schemas.Beat{}
	g.fleet.beats.Range(func(key string, b schemas.Beat, _ uint64) bool {
		b.Worker = schemas.WorkerID(key)
		beats[key] = b
		return true
	})
	list := schemas.WorkerList{Items: []schemas.Worker{}}
	for _, key := range slices.Sorted(maps.Keys(beats)) {
		list.Items = append(list.Items, g.fleet.worker(beats[key], now))
	}
	return list
}

// getWorker is GET /v1/workers/{id}.
func (g *Gateway) getWorker(w *response, r *http.Request) error {
	none := noWorker()
	id, err := schemas.ParseWorkerID(r.PathValue("id"))
	if err != nil {
		return none
	}
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	b, _, ok := g.fleet.beats.Get(string(id))
	if !ok {
		return none
	}
	b.Worker = id
	return answer(w, http.StatusOK, g.fleet.worker(b, time.Now()))
}
