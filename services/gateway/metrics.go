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

	artifactBytes prometheus.Counter
	artifactsLost prometheus.Counter

	sessions     *prometheus.CounterVec
	sessionsOpen *prometheus.GaugeVec
	sessionBytes *prometheus.CounterVec
	resumes      prometheus.Counter
	refused      *prometheus.CounterVec
	execs        prometheus.Histogram

	blobUploads *prometheus.CounterVec
	blobBytes   *prometheus.CounterVec

	batches    prometheus.Counter
	batchItems *prometheus.CounterVec
	itemMade   prometheus.Histogram
	batchDone  prometheus.Histogram
	batchOpen  prometheus.GaugeFunc

	templates      prometheus.Gauge
	templateFaults prometheus.Gauge
	templateDigest prometheus.Gauge
	instances      *prometheus.CounterVec
	renewals       *prometheus.CounterVec
	instancesOpen  prometheus.GaugeFunc
}

// newMetrics makes them; batches gives the number of those that are not done, instances of
// those that are not over.
func newMetrics(reg prometheus.Registerer, batches, instances func() int) *metrics {
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

		artifactBytes: prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_artifact_bytes_total", Help: "Bytes of artifacts handed out."}),
		artifactsLost: prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_artifacts_lost_total", Help: "Requests for artifacts of which what is stored is not what their worker reported."}),

		sessions:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_sessions_total", Help: "Execs, consoles and requests for files of tasks that were begun, by result: ok, failed, or broken where a side was lost."}, []string{"kind", "result"}),
		sessionsOpen: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "dayfly_sessions_open", Help: "Execs, consoles and requests for files of tasks under way."}, []string{"kind"}),
		sessionBytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_session_bytes_total", Help: "Bytes of execs, consoles and files: in is to the task."}, []string{"kind", "direction"}),
		resumes:      prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_console_resumes_total", Help: "Consoles that a client went on with after its connection broke."}),
		refused:      prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_sessions_refused_total", Help: "Execs, consoles, requests for files and tunnels that were not begun, by the code of the error."}, []string{"kind", "code"}),
		execs:        prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_exec_seconds", Help: "Execs that were waited for, from the request to the end of the program.", Buckets: ops.BucketsFast}),

		blobUploads: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_blob_uploads_total", Help: "Blobs sent by clients, by what came of it: stored, there already, refused, or broken off."}, []string{"result"}),
		blobBytes:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_blob_bytes_total", Help: "Bytes of blobs that clients sent (in) and got (out)."}, []string{"direction"}),

		batches:    prometheus.NewCounter(prometheus.CounterOpts{Name: "dayfly_batches_accepted_total", Help: "Batches accepted."}),
		batchItems: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_batch_items_total", Help: "Items of batches that got their result, by result."}, []string{"result"}),
		itemMade:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_batch_item_make_seconds", Help: "How long it took to make the task of a batch's item.", Buckets: ops.BucketsFast}),
		batchDone:  prometheus.NewHistogram(prometheus.HistogramOpts{Name: "dayfly_batch_seconds", Help: "From a batch's acceptance to the result of its last item.", Buckets: ops.BucketsLife}),
		batchOpen: prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "dayfly_batches_open", Help: "Batches that are not done, as every gateway knows them."},
			func() float64 { return float64(batches()) }),

		templates:      prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_templates", Help: "Templates that hold."}),
		templateFaults: prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_template_faults", Help: "What is wrong with files of templates; what they said before holds."}),
		templateDigest: prometheus.NewGauge(prometheus.GaugeOpts{Name: "dayfly_templates_digest", Help: "A number that is the same at gateways that have read the same templates."}),
		instances:      prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_instance_requests_total", Help: "Answered PUTs of instances, by what became of them: created, replaced (created where one is over), exists."}, []string{"result"}),
		renewals:       prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dayfly_instance_renewals_total", Help: "Answered renewals of instances: ok, or the code of the error."}, []string{"result"}),
		instancesOpen: prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "dayfly_instances_open", Help: "Instances that are not over, as every gateway knows them."},
			func() float64 { return float64(instances()) }),
	}
	for _, result := range []string{instanceCreated, instanceReplaced, instanceExists} {
		m.instances.WithLabelValues(result)
	}
	m.renewals.WithLabelValues("ok")
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
	for _, result := range []string{blobStored, blobThere, blobRefused, blobBroken} {
		m.blobUploads.WithLabelValues(result)
	}
	for _, direction := range []string{"in", "out"} {
		m.blobBytes.WithLabelValues(direction)
	}
	for _, kind := range []string{"logs", "sse", "wait", "artifacts"} {
		m.streams.WithLabelValues(kind)
	}
	if reg != nil {
		reg.MustRegister(m.requests, m.inFlight, m.submitted, m.rejected, m.replays, m.streams, m.panics, m.foreign, m.artifactBytes, m.artifactsLost,
			m.sessions, m.sessionsOpen, m.sessionBytes, m.resumes, m.refused, m.execs,
			m.blobUploads, m.blobBytes, m.batches, m.batchItems, m.itemMade, m.batchDone, m.batchOpen,
			m.templates, m.templateFaults, m.templateDigest, m.instances, m.renewals, m.instancesOpen)
	}
	return m
}
