package ops

import (
	"errors"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// Buckets of histograms, in seconds: of starts, of quick operations, of lifetimes.
var (
	BucketsStart = []float64{.05, .1, .2, .3, .5, .75, 1, 1.5, 2, 3, 5, 10, 30, 60}
	BucketsFast  = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5}
	BucketsLife  = []float64{1, 5, 15, 60, 300, 900, 1800, 3600, 14400, 86400}
)

// NewRegistry makes the registry of one process, with what Go and the operating
// system tell, and dayfly_build_info.
func NewRegistry(version, commit string) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "dayfly_build_info", Help: "Always 1; the labels say what runs.",
		ConstLabels: prometheus.Labels{"version": version, "commit": commit, "goversion": runtime.Version()},
	})
	info.Set(1)
	reg.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}

// TasksFinished is the counter of tasks that became final. A gateway ends those that
// were still queued and a reaper the others: in one process they share it.
func TasksFinished(reg prometheus.Registerer) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_tasks_finished_total",
		Help: "Tasks that became final, by state and reason."}, []string{"state", "reason"})
	if reg == nil {
		return c
	}
	err := reg.Register(c)
	if there := (prometheus.AlreadyRegisteredError{}); errors.As(err, &there) {
		return there.ExistingCollector.(*prometheus.CounterVec)
	}
	if err != nil {
		panic(err) // as MustRegister does
	}
	return c
}

// BusMetrics counts what a service does on the bus. Observe fits bus.Conn.Observe.
type BusMetrics struct {
	ops       *prometheus.HistogramVec
	conflicts *prometheus.CounterVec
}

// NewBusMetrics registers the metrics of one connection. service tells the
// connections of one process apart; connected says whether the server is there, and
// reconnects how often it was found again.
func NewBusMetrics(reg prometheus.Registerer, service string, connected func() bool, reconnects func() uint64) *BusMetrics {
	labels := prometheus.Labels{"service": service}
	m := &BusMetrics{
		ops: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "dayfly_kv_op_seconds",
			Help: "Operations on KV buckets.", Buckets: BucketsFast, ConstLabels: labels}, []string{"bucket", "op", "result"}),
		conflicts: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_kv_cas_conflicts_total",
			Help: "Compare-and-set writes that lost.", ConstLabels: labels}, []string{"bucket"}),
	}
	up := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "dayfly_nats_connected",
		Help: "1 while the service is connected to NATS.", ConstLabels: labels}, func() float64 {
		if connected() {
			return 1
		}
		return 0
	})
	again := prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "dayfly_nats_reconnects_total",
		Help: "How often the connection to NATS was lost and made again.", ConstLabels: labels}, func() float64 { return float64(reconnects()) })
	reg.MustRegister(m.ops, m.conflicts, up, again)
	return m
}

// Observe records one operation.
func (m *BusMetrics) Observe(bucket, op string, d time.Duration, err error) {
	if op == "conflict" {
		m.conflicts.WithLabelValues(bucket).Inc()
		return
	}
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.ops.WithLabelValues(bucket, op, result).Observe(d.Seconds())
}

// EachView calls yield for each view of a service: how many keys it has, how many
// messages are known to be still to come, and for how long it has not had all there is.
type EachView func(yield func(bucket string, keys int, pending uint64, behind time.Duration))

// NewViewMetrics registers what a service's views say of themselves at each scrape.
func NewViewMetrics(reg prometheus.Registerer, service string, each EachView) {
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, []string{"bucket"}, prometheus.Labels{"service": service})
	}
	reg.MustRegister(viewMetrics{each,
		desc("dayfly_view_keys", "Keys of a bucket that a service has in memory."),
		desc("dayfly_view_pending_messages", "Changes of a bucket that a service has not seen yet, as it last heard."),
		desc("dayfly_view_behind_seconds", "For how long a service has not had all changes of a bucket; 0 while it has."),
	})
}

type viewMetrics struct {
	each                  EachView
	keys, pending, behind *prometheus.Desc
}

func (m viewMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- m.keys
	ch <- m.pending
	ch <- m.behind
}

func (m viewMetrics) Collect(ch chan<- prometheus.Metric) {
	m.each(func(bucket string, keys int, pending uint64, behind time.Duration) {
		for desc, value := range map[*prometheus.Desc]float64{m.keys: float64(keys), m.pending: float64(pending), m.behind: behind.Seconds()} {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, bucket)
		}
	})
}
