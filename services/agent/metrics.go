package agent

import (
	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/ops"
)

type metrics struct {
	orders   *prometheus.CounterVec
	started  prometheus.Histogram
	ended    *prometheus.CounterVec
	adopted  prometheus.Counter
	logBytes prometheus.Counter
	beats    *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		orders:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_agent_orders_total", Help: "Orders handled, by what they want."}, []string{"want"}),
		started:  prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_agent_start_seconds", Help: "From the order to the started process, image included.", Buckets: ops.BucketsStart}),
		ended:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_agent_attempts_ended_total", Help: "Attempts that ended, by who ended them."}, []string{"by"}),
		adopted:  prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_agent_attempts_adopted_total", Help: "Attempts of an earlier agent taken back."}),
		logBytes: prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_agent_log_bytes_total", Help: "Bytes of task logs stored on the bus."}),
		beats:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_agent_beats_total", Help: "Heartbeats, by result."}, []string{"result"}),
	}
	if reg != nil {
		reg.MustRegister(m.orders, m.started, m.ended, m.adopted, m.logBytes, m.beats)
	}
	return m
}
