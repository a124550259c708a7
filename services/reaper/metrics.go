package reaper

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/ops"
	"dayfly.dev/schemas"
)

type metrics struct {
	reports    *prometheus.CounterVec
	again      prometheus.Counter
	finished   *prometheus.CounterVec
	requeued   *prometheus.CounterVec
	lost       prometheus.Counter
	redriven   prometheus.Counter
	lag        prometheus.Histogram
	start      prometheus.Histogram
	lifetime   prometheus.Histogram
	lastSweep  prometheus.Gauge
	unanswered prometheus.Gauge
	callbacks  *prometheus.CounterVec
	overdue    prometheus.GaugeFunc

	collected        *prometheus.CounterVec
	artifactChunks   prometheus.Gauge
	artifactsFilled  prometheus.Gauge
	blobsGone        *prometheus.CounterVec
	blobs, blobBytes prometheus.Gauge
}

// newMetrics makes them; oldest gives the age of the oldest callback that is not delivered.
func newMetrics(reg prometheus.Registerer, oldest func() float64) *metrics {
	m := &metrics{
		reports:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_reports_total", Help: "Reports of workers, by what came of them."}, []string{"result"}),
		again:      prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_reports_redelivered_total", Help: "Reports that came again because the first delivery was not acknowledged in time, or could not be settled yet."}),
		finished:   ops.TasksFinished(reg),
		requeued:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_tasks_requeued_total", Help: "Tasks that went back to the queue, by reason."}, []string{"reason"}),
		lost:       prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_workers_lost_total", Help: "Workers declared lost by this reaper."}),
		redriven:   prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_orders_redriven_total", Help: "Orders sent again because nothing had come of them."}),
		lag:        prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_reap_lag_seconds", Help: "From a task's deadline to its final record.", Buckets: []float64{.1, .5, 1, 2, 5, 10, 30, 60}}),
		start:      prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_task_start_seconds", Help: "From accepted to running.", Buckets: ops.BucketsStart}),
		lifetime:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_task_lifetime_seconds", Help: "From running to final.", Buckets: ops.BucketsLife}),
		lastSweep:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_reaper_last_sweep_timestamp_seconds", Help: "When this reaper last looked at what is due."}),
		unanswered: prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_tasks_unanswered", Help: "Tasks of whose orders nothing has come for minutes although their worker beats, as every reaper knows."}),
		callbacks:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_callbacks_total", Help: "Tries to deliver a callback from here, by what came of them."}, []string{"outcome"}),
		overdue:    prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "dayfly_callback_oldest_seconds", Help: "Age of the oldest callback that is not delivered yet."}, oldest),
	}
	m.blobsGone = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_blobs_collected_total", Help: "Blobs removed by this reaper: unused for long, to make room, by a client's wish (removed), or the rest of an upload that broke off (orphan)."}, []string{"why"})
	m.blobs = prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_blobs", Help: "Blobs in the store, as every reaper knows them."})
	m.blobBytes = prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_blobs_bytes", Help: "Bytes of the blobs in the store, as every reaper knows them."})
	for _, why := range []string{collectedUnused, collectedRoom, collectedOrphan, collectedRemoved} {
		m.blobsGone.WithLabelValues(why)
	}
	m.collected = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_artifacts_collected_total", Help: "Attempts of which stored artifacts were taken away: their record is gone, or has left them, or they are more than a task can have (excess); unknown are chunks that were never any."}, []string{"why"})
	m.artifactChunks = prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_artifact_chunks", Help: "Chunks of artifacts that are stored, at this reaper's last look; each has up to 256 KiB."})
	m.artifactsFilled = prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_artifact_store_filled", Help: "The part of the bounds of stored artifacts that is taken, 0 to 1, by bytes or by chunks, as every reaper knows it."})
	for _, why := range []string{"record_gone", "superseded", "excess", "unknown"} {
		m.collected.WithLabelValues(why)
	}
	for _, result := range []string{"settled", "unchanged", "stale", "ahead", "unknown", "refused", "error"} {
		m.reports.WithLabelValues(result)
	}
	for _, reason := range []schemas.Reason{schemas.ReasonGaveBack, schemas.ReasonWorkerLost} {
		m.requeued.WithLabelValues(string(reason))
	}
	for _, outcome := range []string{string(schemas.DeliveryDelivered), string(schemas.DeliveryRefused), string(schemas.DeliveryGaveUp), "retry", "interrupted"} {
		m.callbacks.WithLabelValues(outcome)
	}
	m.finished.WithLabelValues(string(schemas.Completed), string(schemas.ReasonExit))
	m.finished.WithLabelValues(string(schemas.Canceled), string(schemas.ReasonCanceled))
	m.finished.WithLabelValues(string(schemas.Expired), string(schemas.ReasonExpired))
	for _, reason := range failures {
		m.finished.WithLabelValues(string(schemas.Failed), string(reason))
	}
	if reg != nil {
		reg.MustRegister(m.reports, m.again, m.requeued, m.lost, m.redriven, m.lag, m.start, m.lifetime, m.lastSweep, m.unanswered, m.callbacks, m.overdue, m.collected, m.artifactChunks, m.artifactsFilled, m.blobsGone, m.blobs, m.blobBytes)
	}
	return m
}

// failures are the reasons for which tasks fail.
var failures = []schemas.Reason{
	schemas.ReasonExit, schemas.ReasonOOM, schemas.ReasonSignal, schemas.ReasonImage, schemas.ReasonImagePull, schemas.ReasonImageArch,
	schemas.ReasonPullTimeout, schemas.ReasonNotFound, schemas.ReasonNotExec, schemas.ReasonBlobMissing, schemas.ReasonStart, schemas.ReasonStartTimeout,
	schemas.ReasonQueueTimeout, schemas.ReasonWorkerLost,
}

// reasonLabel keeps the label to the reasons that there are: that of a failure is the
// worker's word, and a worker may say anything.
func reasonLabel(rec schemas.Record) string {
	if rec.State == schemas.Failed && !slices.Contains(failures, rec.Reason) {
		return "other"
	}
	return string(rec.Reason)
}

// transition counts one change of state.
func (m *metrics) transition(before, after schemas.Record) {
	switch {
	case after.State.Final():
		m.finished.WithLabelValues(string(after.State), reasonLabel(after)).Inc()
		if after.State == schemas.Expired && !after.ExpiresAt.IsZero() {
			m.lag.Observe(after.EndedAt.Sub(after.ExpiresAt).Seconds())
		}
		if !after.RunningAt.IsZero() {
			m.lifetime.Observe(after.EndedAt.Sub(after.RunningAt).Seconds())
		}
	case after.State == schemas.Queued:
		m.requeued.WithLabelValues(string(after.Reason)).Inc()
	}
	if before.RunningAt.IsZero() && !after.RunningAt.IsZero() {
		m.start.Observe(after.RunningAt.Sub(after.AcceptedAt).Seconds())
	}
}
