package placer

import (
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/ops"
	"dayfly.dev/schemas"
)

type metrics struct {
	placement  prometheus.Histogram
	placements *prometheus.CounterVec
	resent     prometheus.Counter
}

// newMetrics registers the metrics of a placer. What only the leader knows is
// exported by the leader alone, so that the sum over placers is right.
func newMetrics(reg prometheus.Registerer, p *Placer) *metrics {
	m := &metrics{
		placement: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_placement_seconds",
			Help:    "From when the placer saw a task queued to its record naming a worker.",
			Buckets: append(slices.Clone(ops.BucketsFast), 10, 60, 300, 900)}),
		placements: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_placements_total",
			Help: "Tries to place a task: placed; no_capacity and constraint, no worker takes it now; conflict, its record had changed; error."}, []string{"result"}),
		resent: prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_placer_orders_resent_total",
			Help: "Orders of assigned tasks sent because this placer did not know that they had been."}),
	}
	for _, result := range []string{"placed", "no_capacity", "constraint", "conflict", "error"} {
		m.placements.WithLabelValues(result)
	}
	if reg != nil {
		reg.MustRegister(m.placement, m.placements, m.resent, &collector{p: p})
	}
	return m
}

// collector exports what is read from the book at each scrape.
type collector struct{ p *Placer }

func ofLeader(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("dayfly_"+name, help+" The leader's.", labels, nil)
}

var (
	descLeader  = prometheus.NewDesc("dayfly_placer_leader", "1 while this placer leads.", nil, nil)
	descOldest  = ofLeader("pending_oldest_seconds", "How long the task has waited that waits longest.")
	descTasks   = ofLeader("tasks", "Records that are not final, by state.", "state")
	descWrites  = ofLeader("placer_reservations", "Choices that are being written.")
	descWorkers = ofLeader("workers", "Workers by state: ready; draining, takes nothing new; silent, no beat for a lease; lost, given up.", "state")
	descAge     = ofLeader("worker_beat_age_seconds", "How long ago the worker's newest beat was seen.", "worker")

	descSlots       = ofLeader("worker_allocatable_slots", "How many tasks the worker takes at a time.", "worker")
	descTaken       = ofLeader("worker_allocated_slots", "Tasks that are assigned to the worker.", "worker")
	descCPUs        = ofLeader("worker_allocatable_cpu_cores", "Processors that the worker has for tasks.", "worker")
	descCPUsTaken   = ofLeader("worker_allocated_cpu_cores", "Processors promised to the worker's tasks.", "worker")
	descMemory      = ofLeader("worker_allocatable_memory_bytes", "Memory that the worker has for tasks.", "worker")
	descMemoryTaken = ofLeader("worker_allocated_memory_bytes", "Memory promised to the worker's tasks.", "worker")
	descGPUs        = ofLeader("worker_allocatable_gpus", "GPUs that the worker has for tasks.", "worker")
	descGPUsTaken   = ofLeader("worker_allocated_gpus", "GPUs promised to the worker's tasks.", "worker")
)

func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descLeader, descOldest, descTasks, descWrites, descWorkers, descAge,
		descSlots, descTaken, descCPUs, descCPUsTaken, descMemory, descMemoryTaken, descGPUs, descGPUsTaken} {
		ch <- d
	}
}

func (c *collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	if !c.p.leading.Load() {
		gauge(descLeader, 0)
		return
	}
	now := time.Now()
	counts := map[schemas.State]int{}
	oldest := 0.0
	c.p.mu.Lock()
	for _, s := range schemas.States() {
		if !s.Final() {
			counts[s] = c.p.book.counts[s]
		}
	}
	if at := c.p.book.oldest(); !at.IsZero() {
		oldest = now.Sub(at).Seconds()
	}
	workers := make([]worker, 0, len(c.p.book.fleet.list))
	for _, w := range c.p.book.fleet.list {
		workers = append(workers, *w)
	}
	c.p.mu.Unlock()

	gauge(descLeader, 1)
	gauge(descWrites, float64(len(c.p.writers)))
	gauge(descOldest, oldest)
	for s, n := range counts {
		gauge(descTasks, float64(n), string(s))
	}
	states := map[string]int{"ready": 0, "draining": 0, "silent": 0, "lost": 0}
	for _, w := range workers {
		id := string(w.id)
		gauge(descAge, now.Sub(w.seen).Seconds(), id)
		switch {
		case w.lost:
			states["lost"]++
			continue // what it had is nobody's
		case now.Sub(w.seen) > c.p.cfg.Lease:
			states["silent"]++
		case w.draining:
			states["draining"]++
		default:
			states["ready"]++
		}
		if w.host.Slots > 0 { // else it sets no bound
			gauge(descSlots, float64(w.host.Slots), id)
		}
		gauge(descTaken, float64(w.tasks), id)
		gauge(descCPUs, float64(w.total.cpus)/1e9, id)
		gauge(descCPUsTaken, float64(w.used.cpus)/1e9, id)
		gauge(descMemory, float64(w.total.memory), id)
		gauge(descMemoryTaken, float64(w.used.memory), id)
		gauge(descGPUs, float64(w.total.gpus), id)
		gauge(descGPUsTaken, float64(w.used.gpus), id)
	}
	for s, n := range states {
		gauge(descWorkers, float64(n), s)
	}
}
