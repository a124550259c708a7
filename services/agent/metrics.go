package agent

import (
	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/ops"
	"dayfly.dev/schemas"
)

type metrics struct {
	orders   *prometheus.CounterVec
	again    prometheus.Counter
	image    *prometheus.HistogramVec
	started  *prometheus.HistogramVec
	ended    *prometheus.CounterVec
	adopted  prometheus.Counter
	logBytes prometheus.Counter
	beats    *prometheus.CounterVec
	sessions *prometheus.GaugeVec
	begun    *prometheus.CounterVec
	refused  *prometheus.CounterVec
	execs    prometheus.Gauge
	verdicts *prometheus.CounterVec
	wanted   *prometheus.CounterVec

	artifacts       *prometheus.CounterVec
	artifactBytes   prometheus.Counter
	artifactSeconds prometheus.Histogram

	blobs, blobCache prometheus.Gauge
	blobBytes        prometheus.Counter
}

// What came of the image of an attempt.
const (
	imagePresent = "present"
	imagePulled  = "pulled"
	imageFailed  = "failed"
)

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		orders:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_agent_orders_total", Help: "Orders handled, by what they want."}, []string{"want"}),
		again:    prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_agent_orders_redelivered_total", Help: "Orders that came again because the first delivery was not acknowledged."}),
		image:    prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "dayfly_agent_image_seconds", Help: "How long the image of an attempt took: present, pulled, or failed.", Buckets: append([]float64{.005, .01, .025}, ops.BucketsStart...)}, []string{"result"}),
		started:  prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "dayfly_agent_start_seconds", Help: "From the order to the started process, image included, by what the image took: present or pulled.", Buckets: ops.BucketsStart}, []string{"image"}),
		ended:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_agent_attempts_ended_total", Help: "Attempts that ended, by who ended them."}, []string{"by"}),
		adopted:  prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_agent_attempts_adopted_total", Help: "Attempts of an earlier agent taken back."}),
		logBytes: prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_agent_log_bytes_total", Help: "Bytes of task logs stored on the bus."}),
		beats:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_agent_beats_total", Help: "Heartbeats, by result."}, []string{"result"}),
		sessions: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "dayfly_agent_sessions_open", Help: "Sessions with tasks of this worker, by kind."}, []string{"kind"}),
		begun:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_agent_sessions_total", Help: "Sessions with tasks of this worker that were begun, by kind."}, []string{"kind"}),
		refused:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_agent_sessions_refused_total", Help: "Requests of gateways for a session that were refused, by the code of the error."}, []string{"code"}),
		execs:    prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_agent_execs", Help: "Programs in the foreground beside tasks, held by a session or waiting for their client to come back."}),
		verdicts: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_agent_judge_tests_total", Help: "Tests of judges that were run, by verdict."}, []string{"verdict"}),
		wanted:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_agent_wanted_images_total", Help: "Tries to make an image present before a task asks for it, by result: ok, failed."}, []string{"result"}),
	}
	for _, v := range schemas.Verdicts()[:6] { // a compile error is of no test
		m.verdicts.WithLabelValues(string(v))
	}
	for _, result := range []string{"ok", "failed"} {
		m.wanted.WithLabelValues(result)
	}
	m.artifacts = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_agent_artifacts_total", Help: "What ended attempts left in their output folders: files that were stored, and what was skipped."}, []string{"result"})
	m.artifactBytes = prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_agent_artifact_bytes_total", Help: "Bytes of artifacts stored on the bus."})
	m.artifactSeconds = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_agent_artifact_seconds", Help: "How long the artifacts of an attempt took to be stored, where it left any.", Buckets: append([]float64{.005, .01, .025}, ops.BucketsStart...)})
	for _, result := range []string{"stored", "skipped"} {
		m.artifacts.WithLabelValues(result)
	}
	m.blobs = prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_blob_cache_blobs", Help: "Blobs that are in this worker's cache, whole."})
	m.blobCache = prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_blob_cache_bytes", Help: "Bytes that blobs take in this worker's cache, those under way counted whole."})
	m.blobBytes = prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_blob_fetched_bytes_total", Help: "Bytes of blobs that this worker has fetched."})
	for _, kind := range schemas.SessionKinds() {
		m.sessions.WithLabelValues(string(kind))
		m.begun.WithLabelValues(string(kind))
	}
	for _, result := range []string{"ok", "conflict", "error"} {
		m.beats.WithLabelValues(result)
	}
	for _, want := range []schemas.Want{schemas.WantRun, schemas.WantStop, schemas.WantClose} {
		m.orders.WithLabelValues(string(want))
	}
	for _, by := range []schemas.EndedBy{schemas.EndedItself, schemas.EndedStop, schemas.EndedDeadline, schemas.EndedPermit, schemas.EndedGaveBack, schemas.EndedLost} {
		m.ended.WithLabelValues(string(by))
	}
	if reg != nil {
		reg.MustRegister(m.orders, m.again, m.image, m.started, m.ended, m.adopted, m.logBytes, m.beats, m.sessions, m.begun, m.refused, m.execs, m.verdicts, m.wanted,
			m.artifacts, m.artifactBytes, m.artifactSeconds, m.blobs, m.blobCache, m.blobBytes)
	}
	return m
}

// host registers who this worker is.
func (m *metrics) host(reg prometheus.Registerer, cfg Config, h schemas.Host) {
	info := prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_worker_info", Help: "Always 1; the labels say what the worker is.", ConstLabels: prometheus.Labels{
		"worker": string(cfg.Worker), "version": cfg.Version, "os": h.OS, "arch": h.Arch, "engine": h.Engine, "runtime": h.Runtime}})
	info.Set(1)
	if reg != nil {
		reg.MustRegister(info)
	}
}
