package placer

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/ops"
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
			Help: "From when the placer saw a task queued to its record naming a worker.", Buckets: ops.BucketsFast}),
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

var (
	descLeader = prometheus.NewDesc("dayfly_placer_leader", "1 while this placer leads.", nil, nil)
	descOldest = prometheus.NewDesc("dayfly_pending_oldest_seconds", "How long the task has waited that waits longest. The leader's.", nil, nil)
	descTasks  = prometheus.NewDesc("dayfly_tasks", "Records that are not final, by state. The leader's.", []string{"state"}, nil)
	descWrites = prometheus.NewDesc("dayfly_placer_reservations", "Choices that are being written.", nil, nil)
)

func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- descLeader
	ch <- descOldest
	ch <- descTasks
	ch <- descWrites
}

func (c *collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	if !c.p.leading.Load() {
		gauge(descLeader, 0)
		return
	}
	gauge(descLeader, 1)
	gauge(descWrites, float64(len(c.p.writers)))
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	oldest := 0.0
	if at := c.p.book.oldest(); !at.IsZero() {
		oldest = time.Since(at).Seconds()
	}
	gauge(descOldest, oldest)
	for state, n := range c.p.book.counts {
		gauge(descTasks, float64(n), string(state))
	}
}
