package docker

import (
	"context"
	"sync"
	"time"

	"github.com/moby/moby/client"
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

// imageMetrics asks the Engine at a scrape which images it has, unless it did so a
// moment ago. An Engine that does not answer says nothing.
type imageMetrics struct {
	docker        *client.Client
	images, bytes *prometheus.Desc

	mu    sync.Mutex
	asked time.Time // under mu
	count int       // under mu
	size  int64     // under mu
}

const (
	imagesEvery  = 15 * time.Second
	imagesWithin = 2 * time.Second
)

func newImageMetrics(docker *client.Client) *imageMetrics {
	return &imageMetrics{docker: docker,
		images: prometheus.NewDesc("dayfly_image_cache_images", "Images that the worker's Docker Engine has. dayfly removes none.", nil, nil),
		bytes:  prometheus.NewDesc("dayfly_image_cache_bytes", "Sizes of the images that the worker's Docker Engine has; a layer counts for each image that has it.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (m *imageMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- m.images
	ch <- m.bytes
}

// Collect implements prometheus.Collector.
func (m *imageMetrics) Collect(ch chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if time.Since(m.asked) >= imagesEvery {
		ctx, cancel := context.WithTimeout(context.Background(), imagesWithin)
		defer cancel()
		list, err := m.docker.ImageList(ctx, client.ImageListOptions{})
		if err != nil {
			return
		}
		m.asked, m.count, m.size = time.Now(), len(list.Items), 0
		for _, image := range list.Items {
			m.size += image.Size
		}
	}
	ch <- prometheus.MustNewConstMetric(m.images, prometheus.GaugeValue, float64(m.count))
	ch <- prometheus.MustNewConstMetric(m.bytes, prometheus.GaugeValue, float64(m.size))
}
