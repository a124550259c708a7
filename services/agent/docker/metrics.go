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

	removed, removedBytes prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		ops: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "dayfly_docker_op_seconds",
			Help: "Requests to the Docker Engine: pull, create, start, remove, image_remove.", Buckets: append([]float64{.005, .01, .025}, ops.BucketsStart...)}, []string{"op", "result"}),
		leaks: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_leaks_detected_total",
			Help: "What an agent found when it started and could make nothing of: containers of its worker, folders of attempts."}, []string{"kind"}),
		removed:      prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_image_removals_total", Help: "Images that the agent removed because there was more than the high mark."}),
		removedBytes: prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_image_removed_bytes_total", Help: "Sizes of the images that the agent removed."}),
	}
	m.leaks.WithLabelValues("container")
	m.leaks.WithLabelValues("folder")
	if reg != nil {
		reg.MustRegister(m.ops, m.leaks, m.removed, m.removedBytes)
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

// imageMetrics says what the stock has, as last seen.
type imageMetrics struct {
	stock                              *stock
	images, bytes, ownImages, ownBytes *prometheus.Desc
}

func newImageMetrics(s *stock) *imageMetrics {
	return &imageMetrics{stock: s,
		images:    prometheus.NewDesc("dayfly_image_cache_images", "Images that the worker's Docker Engine has.", nil, nil),
		bytes:     prometheus.NewDesc("dayfly_image_cache_bytes", "Sizes of the images that the worker's Docker Engine has; a layer counts for each image that has it.", nil, nil),
		ownImages: prometheus.NewDesc("dayfly_image_cache_own_images", "Images that the agent pulled and may remove.", nil, nil),
		ownBytes:  prometheus.NewDesc("dayfly_image_cache_own_bytes", "Sizes of the images that the agent pulled and may remove.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (m *imageMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.images, m.bytes, m.ownImages, m.ownBytes} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *imageMetrics) Collect(ch chan<- prometheus.Metric) {
	c := m.stock.r.Images().Cache
	for d, v := range map[*prometheus.Desc]float64{m.images: float64(c.Images), m.bytes: float64(c.Bytes), m.ownImages: float64(c.Own), m.ownBytes: float64(c.OwnAll)} {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v)
	}
}
