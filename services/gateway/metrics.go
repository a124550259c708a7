package gateway

import (
	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/ops"
	"dayfly.dev/schemas"
)

type metrics struct {
	requests  *prometheus.HistogramVec
	inFlight  prometheus.Gauge
	submitted prometheus.Counter
	rejected  *prometheus.CounterVec
	finished  *prometheus.CounterVec
	replays   prometheus.Counter
	streams   *prometheus.GaugeVec
	panics    prometheus.Counter
	foreign   prometheus.Counter

	sessions     *prometheus.CounterVec
	sessionsOpen *prometheus.GaugeVec
	sessionBytes *prometheus.CounterVec
	execs        prometheus.Histogram

	batches    prometheus.Counter
	batchItems *prometheus.CounterVec
	itemMade   prometheus.Histogram
	batchDone  prometheus.Histogram
	batchOpen  prometheus.GaugeFunc
}

// newMetrics makes them; open gives the number of batches that are not done.
func newMetrics(reg prometheus.Registerer, open func() int) *metrics {
	m := &metrics{
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "dayfly_http_request_duration_seconds",
			Help: "Answered requests. Those that wait for a task have a route of their own; logs count when they end.", Buckets: ops.BucketsFast},
			[]string{"route", "method", "code_class"}),
		inFlight:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_http_requests_in_flight", Help: "Requests being answered."}),
		submitted: prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_tasks_submitted_total", Help: "Tasks accepted."}),
		rejected:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_tasks_rejected_total", Help: "Tasks not accepted, by the code of the error."}, []string{"code"}),
		finished:  ops.TasksFinished(reg),
		replays:   prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_idempotent_replays_total", Help: "Requests answered with the task that an earlier one with the same key made."}),
		streams:   prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "dayfly_streams_open", Help: "Answers that stay open, by kind."}, []string{"kind"}),
		panics:    prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_http_panics_total", Help: "Requests that ended in a panic: each is a bug."}),
		foreign:   prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_log_chunks_foreign_total", Help: "Log chunks of workers that did not hold the attempt."}),

		sessions:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_sessions_total", Help: "Execs, consoles and requests for files of tasks that were begun, by result: ok, failed, or broken where a side was lost."}, []string{"kind", "result"}),
		sessionsOpen: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "dayfly_sessions_open", Help: "Execs, consoles and requests for files of tasks under way."}, []string{"kind"}),
		sessionBytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_session_bytes_total", Help: "Bytes of execs, consoles and files: in is to the task."}, []string{"kind", "direction"}),
		execs:        prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_exec_seconds", Help: "Execs that were waited for, from the request to the end of the program.", Buckets: ops.BucketsFast}),

		batches:    prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_batches_accepted_total", Help: "Batches accepted."}),
		batchItems: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_batch_items_total", Help: "Items of batches that got their result, by result."}, []string{"result"}),
		itemMade:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_batch_item_make_seconds", Help: "How long it took to make the task of a batch's item.", Buckets: ops.BucketsFast}),
		batchDone:  prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_batch_seconds", Help: "From a batch's acceptance to the result of its last item.", Buckets: ops.BucketsLife}),
		batchOpen: prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "dayfly_batches_open", Help: "Batches that are not done, as every gateway knows them."},
			func() float64 { return float64(open()) }),
	}
	for _, result := range schemas.ItemResults() {
		m.batchItems.WithLabelValues(string(result))
	}
	for _, kind := range []string{visitExec, visitConsole, visitFiles} {
		m.sessionsOpen.WithLabelValues(kind)
		for _, result := range []string{resultOK, resultFailed, resultBroken} {
			m.sessions.WithLabelValues(kind, result)
		}
		for _, direction := range []string{"in", "out"} {
			m.sessionBytes.WithLabelValues(kind, direction)
		}
	}
	for _, kind := range []string{"logs", "sse", "wait"} {
		m.streams.WithLabelValues(kind)
	}
	if reg != nil {
		reg.MustRegister(m.requests, m.inFlight, m.submitted, m.rejected, m.replays, m.streams, m.panics, m.foreign,
			m.sessions, m.sessionsOpen, m.sessionBytes, m.execs,
			m.batches, m.batchItems, m.itemMade, m.batchDone, m.batchOpen)
	}
	return m
}
