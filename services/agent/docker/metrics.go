package docker

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/ops"
	"dayfly.dev/ops/tracing"
)

type metrics struct {
	ops   *prometheus.HistogramVec
	leaks *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		ops: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "dayfly_docker_op_seconds",
			Help: "Requests to the Docker Engine: pull, create, start, remove.", Buckets: append([]float64{.005, .01, .025}, ops.BucketsStart...)}, []string{"op", "result"}),
		leaks: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_leaks_detected_total",
			Help: "What an agent found when it started and could make nothing of: containers of its worker, folders of attempts."}, []string{"kind"}),
	}
	m.leaks.WithLabelValues("container")
	m.leaks.WithLabelValues("folder")
	if reg != nil {
		reg.MustRegister(m.ops, m.leaks)
	}
	return m
}

// done records a request that began at start, also below the span in ctx if there is one.
func (m *metrics) done(ctx context.Context, op string, start time.Time, err error) {
	tracing.Step(ctx, "docker "+op, start, err)
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.ops.WithLabelValues(op, result).Observe(time.Since(start).Seconds())
}
