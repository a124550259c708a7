package grafana

import "fmt"

// Units as Grafana names them.
const (
	seconds   = "s"
	perSecond = "ops"
	bytes     = "bytes"
	rateBytes = "Bps"
	count     = "short"
	ratio     = "percentunit"
)

// All lists the dashboards.
func All() []Dashboard {
	return []Dashboard{overview(), whereTimeGoes(), workers(), reliability(), api()}
}

// rate is the rate of a counter, summed by labels.
func rate(by, counter string) string {
	return sumBy(by, fmt.Sprintf("rate(%s[%s])", counter, RateInterval))
}

func sumBy(by, expr string) string {
	if by == "" {
		return fmt.Sprintf("sum(%s)", expr)
	}
	return fmt.Sprintf("sum by (%s) (%s)", by, expr)
}

// quantile of a histogram, for each value of the labels by. selector may be "".
func quantile(q float64, by, histogram, selector string) string {
	le := "le"
	if by != "" {
		le += ", " + by
	}
	return fmt.Sprintf("histogram_quantile(%v, %s)", q, rate(le, histogram+"_bucket"+selector))
}

// quantiles of one histogram, without labels.
func quantiles(histogram string, qs ...float64) (list []Query) {
	for _, q := range qs {
		list = append(list, Query{quantile(q, "", histogram, ""), fmt.Sprintf("p%v", q*100)})
	}
	return list
}

func mean(histogram string) string {
	return rate("", histogram+"_sum") + " / " + rate("", histogram+"_count")
}

func one(expr, legend string) []Query { return []Query{{expr, legend}} }

func overview() Dashboard {
	return Dashboard{UID: "dayfly-overview", Title: "dayfly / Overview", Rows: []Row{
		{"Now", []Panel{
			{Title: "Running", About: "Tasks that run.", Unit: count, Stat: true, Queries: one(`sum(dayfly_tasks{state="running"})`, "running")},
			{Title: "Queued", About: "Tasks that wait for a worker.", Unit: count, Stat: true, Alert: "DayflyPendingStuck", Queries: one(`sum(dayfly_tasks{state="queued"})`, "queued")},
			{Title: "Waits longest", About: "How long the task has waited that waits longest.", Unit: seconds, Stat: true, Alert: "DayflyPendingStuck", Queries: one(`max(dayfly_pending_oldest_seconds)`, "oldest")},
			{Title: "Not our fault", About: "The part of tasks that ended without dayfly being to blame: no registry, Docker, queue timeout or lost worker. It should be above 99 %.", Unit: ratio, Stat: true, Alert: "DayflyStartFailures",
				Queries: one(`1 - `+rate("", `dayfly_tasks_finished_total{state="failed",reason=~"image_pull|pull_timeout|start|start_timeout|queue_timeout|worker_lost"}`)+` / `+rate("", "dayfly_tasks_finished_total"), "good")},
			{Title: "Start, p95", About: "From accepted to running.", Unit: seconds, Stat: true, Alert: "DayflyStartSlow", Queries: one(quantile(0.95, "", "dayfly_task_start_seconds", ""), "p95")},
			{Title: "Workers ready", About: "Workers that take tasks.", Unit: count, Stat: true, Alert: "DayflyWorkerLost", Queries: one(`sum(dayfly_workers{state="ready"})`, "ready")},
		}},
		{"Tasks", []Panel{
			{Title: "In and out", About: "Tasks accepted, ended and refused.", Unit: perSecond, Queries: []Query{
				{rate("", "dayfly_tasks_submitted_total"), "accepted"}, {rate("", "dayfly_tasks_finished_total"), "ended"}, {rate("", "dayfly_tasks_rejected_total"), "refused"}}},
			{Title: "How they end", About: "Tasks that became final, by state and reason.", Unit: perSecond, Stack: true, Alert: "DayflyStartFailures",
				Queries: one(rate("state, reason", "dayfly_tasks_finished_total"), "{{state}}: {{reason}}")},
			{Title: "Start", About: "From accepted to running.", Unit: seconds, Alert: "DayflyStartSlow", Queries: quantiles("dayfly_task_start_seconds", 0.5, 0.95, 0.99)},
		}},
		{"Fleet", []Panel{
			{Title: "Capacity promised", About: "The part of what workers have that is promised to tasks.", Unit: ratio, Alert: "DayflyCapacityLow", Queries: []Query{
				{`sum(dayfly_worker_allocated_slots) / sum(dayfly_worker_allocatable_slots)`, "slots"},
				{`sum(dayfly_worker_allocated_cpu_cores) / sum(dayfly_worker_allocatable_cpu_cores)`, "cpu"},
				{`sum(dayfly_worker_allocated_memory_bytes) / sum(dayfly_worker_allocatable_memory_bytes)`, "memory"}}},
			{Title: "Workers", About: "Workers by state.", Unit: count, Stack: true, Alert: "DayflyWorkerLost", Queries: one(`sum by (state) (dayfly_workers)`, "{{state}}")},
			{Title: "Tasks", About: "Records that are not final, by state.", Unit: count, Stack: true, Queries: one(`sum by (state) (dayfly_tasks{state=~"queued|assigned|starting|running"})`, "{{state}}")},
			{Title: "Alerts that fire", About: "Those of dayfly. Empty is good.", Unit: count, Queries: one(`count by (alertname) (ALERTS{alertname=~"Dayfly.+",alertstate="firing"})`, "{{alertname}}")},
		}},
	}}
}

func whereTimeGoes() Dashboard {
	return Dashboard{UID: "dayfly-time", Title: "dayfly / Where time goes", Rows: []Row{
		{"From accepted to running", []Panel{
			{Title: "The whole", About: "From accepted to running, over all attempts.", Unit: seconds, Alert: "DayflyStartSlow", Queries: quantiles("dayfly_task_start_seconds", 0.5, 0.95, 0.99)},
			{Title: "Its parts, mean", About: "Placing is the wait for a worker and the write of the record; on the worker is from the order to the process, image included.", Unit: seconds, Stack: true, Alert: "DayflyStartSlow",
				Queries: []Query{{mean("dayfly_placement_seconds"), "placing"}, {mean("dayfly_agent_start_seconds"), "on the worker"}}},
		}},
		{"Placing", []Panel{
			{Title: "Placing", About: "From when the leading placer saw a task queued to its record naming a worker.", Unit: seconds, Alert: "DayflyPendingStuck", Queries: quantiles("dayfly_placement_seconds", 0.5, 0.95, 0.99)},
			{Title: "Placements", About: "Tries to place a task, by what came of them.", Unit: perSecond, Alert: "DayflyPendingStuck", Queries: one(rate("result", "dayfly_placements_total"), "{{result}}")},
		}},
		{"On the worker", []Panel{
			{Title: "Start, p95", About: "From the order to the process, by whether the image had to be pulled.", Unit: seconds, Alert: "DayflyStartSlow", Queries: one(quantile(0.95, "image", "dayfly_agent_start_seconds", ""), "image {{image}}")},
			{Title: "Image, p95", About: "How long it took to have the image.", Unit: seconds, Alert: "DayflyStartSlow", Queries: one(quantile(0.95, "result", "dayfly_agent_image_seconds", ""), "{{result}}")},
			{Title: "Docker, p95", About: "Requests to the Docker Engine.", Unit: seconds, Alert: "DayflyStartSlow", Queries: one(quantile(0.95, "op", "dayfly_docker_op_seconds", ""), "{{op}}")},
		}},
		{"Records", []Panel{
			{Title: "Writes, p99", About: "Writes of tasks' records, which wait for the disk.", Unit: seconds, Alert: "DayflyStartSlow", Queries: one(quantile(0.99, "service, op", "dayfly_kv_op_seconds", `{bucket="tasks",op=~"create|replace"}`), "{{service}} {{op}}")},
			{Title: "Operations", About: "Operations on buckets.", Unit: perSecond, Queries: one(rate("bucket, op", "dayfly_kv_op_seconds_count"), "{{bucket}} {{op}}")},
			{Title: "How long tasks run", About: "From running to final.", Unit: seconds, Queries: quantiles("dayfly_task_lifetime_seconds", 0.5, 0.95)},
		}},
	}}
}

func workers() Dashboard {
	gauges := func(allocated, allocatable string) []Query {
		const of = `{worker=~"$worker"}`
		return []Query{{"dayfly_worker_" + allocated + of, "{{worker}} promised"}, {"dayfly_worker_" + allocatable + of, "{{worker}} has"}}
	}
	// ofWorker gives what agents count the name of their worker.
	ofWorker := func(by, counter string) string {
		return sumBy("worker"+by, fmt.Sprintf(`rate(%s[%s]) * on (job, instance) group_left (worker) dayfly_worker_info{worker=~"$worker"}`, counter, RateInterval))
	}
	return Dashboard{UID: "dayfly-workers", Title: "dayfly / Workers", Workers: true, Rows: []Row{
		{"As the placer sees them", []Panel{
			{Title: "Slots", About: "Tasks at a time.", Unit: count, Alert: "DayflyCapacityLow", Queries: gauges("allocated_slots", "allocatable_slots")},
			{Title: "Processors", About: "What tasks asked for, not what they use.", Unit: count, Alert: "DayflyCapacityLow", Queries: gauges("allocated_cpu_cores", "allocatable_cpu_cores")},
			{Title: "Memory", About: "What tasks asked for, not what they use.", Unit: bytes, Alert: "DayflyCapacityLow", Queries: gauges("allocated_memory_bytes", "allocatable_memory_bytes")},
			{Title: "GPUs", About: "What tasks asked for.", Unit: count, Alert: "DayflyCapacityLow", Queries: gauges("allocated_gpus", "allocatable_gpus")},
		}},
		{"Beats", []Panel{
			{Title: "Age of the newest beat", About: "Silent from 30 s, lost from 75 s.", Unit: seconds, Alert: "DayflyWorkerLost", Queries: one(`dayfly_worker_beat_age_seconds{worker=~"$worker"}`, "{{worker}}")},
			{Title: "Beats", About: "By result; of agents that Prometheus reaches, as all that follows.", Unit: perSecond, Alert: "DayflyWorkerLost", Queries: one(ofWorker(", result", "dayfly_agent_beats_total"), "{{worker}} {{result}}")},
			{Title: "Agents", About: "Which version runs where.", Unit: count, Queries: one(`dayfly_worker_info{worker=~"$worker"}`, "{{worker}}: {{version}} {{engine}} {{arch}}")},
		}},
		{"Attempts", []Panel{
			{Title: "Started", About: "Processes started.", Unit: perSecond, Queries: one(ofWorker("", "dayfly_agent_start_seconds_count"), "{{worker}}")},
			{Title: "Ended", About: "By who ended them.", Unit: perSecond, Stack: true, Queries: one(ofWorker(", by", "dayfly_agent_attempts_ended_total"), "{{worker}} {{by}}")},
			{Title: "Images that failed", About: "Attempts whose image could not be had.", Unit: perSecond, Alert: "DayflyPullFailures", Queries: one(ofWorker("", `dayfly_agent_image_seconds_count{result="failed"}`), "{{worker}}")},
			{Title: "Images", About: "Sizes of the images on the worker, layers that several share counted for each.", Unit: bytes,
				Queries: one(`dayfly_image_cache_bytes * on (job, instance) group_left (worker) dayfly_worker_info{worker=~"$worker"}`, "{{worker}}")},
			{Title: "Blobs", About: "In the caches of the workers, those under way counted whole.", Unit: bytes,
				Queries: one(`dayfly_blob_cache_bytes * on (job, instance) group_left (worker) dayfly_worker_info{worker=~"$worker"}`, "{{worker}}")},
			{Title: "Blobs fetched", About: "Bytes of blobs that came to the workers.", Unit: rateBytes, Queries: one(ofWorker("", "dayfly_blob_fetched_bytes_total"), "{{worker}}")},
			{Title: "Images of its own", About: "Sizes of those that the agent pulled: above the high mark the ones that were not used for longest go.", Unit: bytes,
				Queries: one(`dayfly_image_cache_own_bytes * on (job, instance) group_left (worker) dayfly_worker_info{worker=~"$worker"}`, "{{worker}}")},
			{Title: "Images removed", About: "To stay below the high mark. One that is removed and pulled again and again wants a higher mark.", Unit: perSecond, Queries: one(ofWorker("", "dayfly_image_removals_total"), "{{worker}}")},
			{Title: "Wanted images", About: "Tries to have an image before a task asks for it, by result.", Unit: perSecond, Alert: "DayflyPullFailures", Queries: one(ofWorker(", result", "dayfly_agent_wanted_images_total"), "{{worker}} {{result}}")},
			{Title: "Tests judged", About: "Tests that judges ran, by verdict.", Unit: perSecond, Stack: true, Queries: one(ofWorker(", verdict", "dayfly_agent_judge_tests_total"), "{{worker}} {{verdict}}")},
			{Title: "Docker errors", About: "Requests to the Docker Engine that failed.", Unit: perSecond, Alert: "DayflyStartFailures", Queries: one(ofWorker(", op", `dayfly_docker_op_seconds_count{result="error"}`), "{{worker}} {{op}}")},
		}},
		{"Artifacts", []Panel{
			{Title: "Files", About: "What ended attempts left in their output folders: stored, and skipped.", Unit: perSecond, Queries: one(ofWorker(", result", "dayfly_agent_artifacts_total"), "{{worker}} {{result}}")},
			{Title: "Stored", About: "Bytes of artifacts stored on the bus.", Unit: rateBytes, Queries: one(ofWorker("", "dayfly_agent_artifact_bytes_total"), "{{worker}}")},
			{Title: "Storing, p95", About: "How long the artifacts of an attempt take to be stored; its end is reported after that.", Unit: seconds, Queries: one(quantile(0.95, "instance", "dayfly_agent_artifact_seconds", ""), "{{instance}}")},
			{Title: "Handed out", About: "Bytes of artifacts that clients got.", Unit: rateBytes, Queries: one(rate("", "dayfly_artifact_bytes_total"), "handed out")},
			{Title: "Chunks", About: "Stored at the reapers' last look; at 1,000,000 no more are taken. Their bytes are those of ARTIFACTS in Reliability.", Unit: count, Alert: "DayflyJetStreamFull", Queries: one(`max(dayfly_artifact_chunks)`, "chunks")},
			{Title: "Taken away", About: "Attempts of which nothing is kept any more, by why: unknown is what a worker made up.", Unit: perSecond, Alert: "DayflyArtifactsMadeUp", Queries: one(rate("why", "dayfly_artifacts_collected_total"), "{{why}}")},
			{Title: "Filled", About: "The part of the bounds of stored artifacts that is taken, by bytes or by chunks.", Unit: ratio, Alert: "DayflyArtifactsFull", Queries: one(`max(dayfly_artifact_store_filled)`, "filled")},
			{Title: "Should not be", About: "Requests for artifacts of which what is stored is not what their worker reported.", Unit: count, Queries: one(`sum(dayfly_artifacts_lost_total)`, "lost")},
		}},
		{"Agents", []Panel{
			{Title: "Logs", About: "Bytes of task logs stored on the bus.", Unit: rateBytes, Queries: one(ofWorker("", "dayfly_agent_log_bytes_total"), "{{worker}}")},
			{Title: "Memory", About: "Of the agents' processes.", Unit: bytes, Queries: one(`process_resident_memory_bytes * on (job, instance) group_left (worker) dayfly_worker_info{worker=~"$worker"}`, "{{worker}}")},
			{Title: "Processor", About: "Of the agents' processes, in cores.", Unit: count, Queries: one(ofWorker("", "process_cpu_seconds_total"), "{{worker}}")},
		}},
	}}
}

func reliability() Dashboard {
	return Dashboard{UID: "dayfly-reliability", Title: "dayfly / Reliability", Rows: []Row{
		{"Ends", []Panel{
			{Title: "Reap lag", About: "From a task's deadline to its final record.", Unit: seconds, Alert: "DayflyReapLag", Queries: quantiles("dayfly_reap_lag_seconds", 0.5, 0.99)},
			{Title: "Last sweep", About: "How long ago each reaper last looked at what is due; a minute at most.", Unit: seconds, Alert: "DayflyReaperStuck", Queries: one(`time() - dayfly_reaper_last_sweep_timestamp_seconds`, "{{instance}}")},
			{Title: "Reports", About: "Reports of workers, by what came of them.", Unit: perSecond, Stack: true, Alert: "DayflyRedeliveries", Queries: one(rate("result", "dayfly_reports_total"), "{{result}}")},
			{Title: "Unanswered", About: "Tasks of whose orders nothing has come for minutes although their worker beats.", Unit: count, Alert: "DayflyWorkerUnanswering", Queries: one(`max(dayfly_tasks_unanswered)`, "tasks")},
			{Title: "Redriven, resent, redelivered", About: "Orders sent again because nothing had come of them, and messages that came again.", Unit: perSecond, Alert: "DayflyRedeliveries", Queries: []Query{
				{rate("", "dayfly_orders_redriven_total"), "redriven by reapers"}, {rate("", "dayfly_placer_orders_resent_total"), "resent by placers"},
				{rate("", "dayfly_reports_redelivered_total"), "reports again"}, {rate("", "dayfly_agent_orders_redelivered_total"), "orders again"}}},
		}},
		{"Workers", []Panel{
			{Title: "Lost", About: "Workers declared lost.", Unit: count, Alert: "DayflyWorkerLost", Queries: one(`sum(increase(dayfly_workers_lost_total[`+RateInterval+`]))`, "lost")},
			{Title: "Queued again", About: "Tasks that went back to the queue.", Unit: perSecond, Alert: "DayflyWorkerLost", Queries: one(rate("reason", "dayfly_tasks_requeued_total"), "{{reason}}")},
			{Title: "Adopted", About: "Attempts that a restarted agent took back.", Unit: perSecond, Queries: one(rate("", "dayfly_agent_attempts_adopted_total"), "adopted")},
			{Title: "Should not be", About: "Leaks, reports that were refused, logs of a worker that did not hold the attempt, panics.", Unit: count, Alert: "DayflyLeaks", Queries: []Query{
				{`sum by (kind) (dayfly_leaks_detected_total)`, "leaked {{kind}}"}, {`sum(dayfly_reports_total{result="refused"})`, "reports refused"},
				{`sum(dayfly_log_chunks_foreign_total)`, "foreign logs"}, {`sum(dayfly_http_panics_total)`, "panics"}}},
		}},
		{"NATS", []Panel{
			{Title: "Connected", About: "1 while a service is connected.", Unit: count, Alert: "DayflyNatsDown", Queries: one(`min by (service) (dayfly_nats_connected)`, "{{service}}")},
			{Title: "Reconnects", About: "Connections lost and made again; those that did not take what was sent.", Unit: perSecond, Alert: "DayflyNatsDown", Queries: []Query{
				{rate("service", "dayfly_nats_reconnects_total"), "{{service}}"}, {rate("", "dayfly_nats_slow_consumers_total"), "too slow"}}},
			{Title: "Leaders", About: "Placers that lead: one.", Unit: count, Alert: "DayflyNoPlacerLeader", Queries: []Query{
				{`sum(dayfly_placer_leader)`, "leading"}, {`sum(changes(dayfly_placer_leader[` + RateInterval + `]))`, "changes"}}},
			{Title: "Writes that lost", About: "Compare-and-set writes that met another. A few are usual.", Unit: perSecond, Queries: one(rate("service, bucket", "dayfly_kv_cas_conflicts_total"), "{{service}} {{bucket}}")},
		}},
		{"What services know", []Panel{
			{Title: "Behind", About: "For how long a service has not had all changes of a bucket; moments under load, seconds after a restart.", Unit: seconds, Alert: "DayflyViewBehind",
				Queries: one(`max by (service, bucket) (dayfly_view_behind_seconds)`, "{{service}} {{bucket}}")},
			{Title: "Not seen yet", About: "Changes of a bucket that a service has still to take in.", Unit: count, Alert: "DayflyViewBehind",
				Queries: one(`max by (service, bucket) (dayfly_view_pending_messages)`, "{{service}} {{bucket}}")},
			{Title: "In memory", About: "Keys of a bucket that each service holds.", Unit: count, Queries: one(`max by (service, bucket) (dayfly_view_keys)`, "{{service}} {{bucket}}")},
		}},
		{"Callbacks", []Panel{
			{Title: "Tries", About: "Tries to deliver a callback, by what came of them.", Unit: perSecond, Stack: true, Queries: one(rate("outcome", "dayfly_callbacks_total"), "{{outcome}}")},
			{Title: "Oldest", About: "Age of the oldest callback that is not delivered yet. Each receiver is tried for a day.", Unit: seconds, Queries: one(`max(dayfly_callback_oldest_seconds)`, "oldest")},
		}},
		{"JetStream", []Panel{
			{Title: "Bytes", About: "On the disk, by stream; of servers that dayfly runs.", Unit: bytes, Stack: true, Alert: "DayflyJetStreamFull", Queries: one(`max by (stream) (dayfly_jetstream_store_bytes)`, "{{stream}}")},
			{Title: "Messages", About: "By stream.", Unit: count, Queries: one(`max by (stream) (dayfly_jetstream_messages)`, "{{stream}}")},
			{Title: "Pending", About: "Messages that consumers have not been given, or not acknowledged.", Unit: count, Alert: "DayflyRedeliveries", Queries: one(`max by (stream) (dayfly_jetstream_pending)`, "{{stream}}")},
			{Title: "Disk used", About: "Of what each server may use.", Unit: ratio, Alert: "DayflyJetStreamFull", Queries: one(`dayfly_jetstream_used_bytes / dayfly_jetstream_limit_bytes`, "{{instance}}")},
		}},
	}}
}

func api() Dashboard {
	const requests = "dayfly_http_request_duration_seconds"
	return Dashboard{UID: "dayfly-api", Title: "dayfly / API", Rows: []Row{
		{"Requests", []Panel{
			{Title: "Rate", About: "By route. ?wait marks those that wait for a task.", Unit: perSecond, Queries: one(rate("method, route", requests+"_count"), "{{method}} {{route}}")},
			{Title: "Not answered well", About: "4xx are the clients', 5xx ours.", Unit: perSecond, Alert: "DayflyApiErrors", Queries: one(rate("code_class, route", requests+`_count{code_class=~"4xx|5xx"}`), "{{code_class}} {{route}}")},
			{Title: "p95", About: "Of those that wait for nothing.", Unit: seconds, Alert: "DayflyApiErrors", Queries: one(quantile(0.95, "method, route", requests, `{route!~".*(wait|logs|tunnel.*)"}`), "{{method}} {{route}}")},
			{Title: "p99", About: "Of those that wait for nothing.", Unit: seconds, Alert: "DayflyApiErrors", Queries: one(quantile(0.99, "method, route", requests, `{route!~".*(wait|logs|tunnel.*)"}`), "{{method}} {{route}}")},
		}},
		{"Batches", []Panel{
			{Title: "Under way", About: "Batches that are not done; 64 at the most.", Unit: count, Queries: one(`max(dayfly_batches_open)`, "open")},
			{Title: "Accepted", About: "Batches accepted.", Unit: perSecond, Queries: one(rate("", "dayfly_batches_accepted_total"), "accepted")},
			{Title: "Items", About: "Items that became tasks, and that got their result.", Unit: perSecond, Queries: []Query{
				{rate("", "dayfly_batch_item_make_seconds_count"), "made"}, {rate("result", "dayfly_batch_items_total"), "{{result}}"}}},
			{Title: "Making a task", About: "How long it takes to make the task of an item.", Unit: seconds, Queries: quantiles("dayfly_batch_item_make_seconds", 0.5, 0.99)},
			{Title: "From accepted to done", About: "How long batches take.", Unit: seconds, Queries: quantiles("dayfly_batch_seconds", 0.5, 0.95)},
		}},
		{"Instances", []Panel{
			{Title: "Not over", About: "Instances of templates.", Unit: count, Queries: one(`max(dayfly_instances_open)`, "instances")},
			{Title: "Asked for", About: "PUTs, by what became of them: created, replaced (created where one is over), exists.", Unit: perSecond, Queries: one(rate("result", "dayfly_instance_requests_total"), "{{result}}")},
			{Title: "Renewals", About: "By result.", Unit: perSecond, Queries: one(rate("result", "dayfly_instance_renewals_total"), "{{result}}")},
			{Title: "Templates", About: "Those that hold, and what is wrong with their files.", Unit: count, Alert: "DayflyTemplateFaults", Queries: []Query{
				{`max(dayfly_templates)`, "templates"}, {`max(dayfly_template_faults)`, "faults"}}},
			{Title: "Gateways that differ", About: "Whether gateways have different templates.", Unit: count, Alert: "DayflyTemplatesDiffer", Queries: one(`max(dayfly_templates_digest) != bool min(dayfly_templates_digest)`, "differ")},
		}},
		{"More", []Panel{
			{Title: "Being answered", About: "Requests in flight, and answers that stay open, by kind.", Unit: count, Queries: []Query{
				{`sum(dayfly_http_requests_in_flight)`, "requests"}, {`sum by (kind) (dayfly_streams_open)`, "{{kind}}"}}},
			{Title: "Tasks refused", About: "By the code of the error.", Unit: perSecond, Queries: one(rate("code", "dayfly_tasks_rejected_total"), "{{code}}")},
			{Title: "Replays", About: "Requests answered with the task that an earlier one with the same Idempotency-Key made.", Unit: perSecond, Queries: one(rate("", "dayfly_idempotent_replays_total"), "replays")},
		}},
		{"Programs and files", []Panel{
			{Title: "Ended", About: "Execs, consoles and requests for files, by what came of them; broken is where a side was lost.", Unit: perSecond, Queries: one(rate("kind, result", "dayfly_sessions_total"), "{{kind}} {{result}}")},
			{Title: "Under way", About: "At the gateways and at the agents, by kind, and programs in the foreground.", Unit: count, Queries: []Query{
				{`sum by (kind) (dayfly_sessions_open)`, "{{kind}}"}, {`sum by (kind) (dayfly_agent_sessions_open)`, "agents: {{kind}}"}, {`sum(dayfly_agent_execs)`, "programs"}}},
			{Title: "Begun at the agents", About: "By kind.", Unit: perSecond, Queries: one(rate("kind", "dayfly_agent_sessions_total"), "{{kind}}")},
			{Title: "Refused", About: "Sessions that were not begun, by the code of the error; and those that an agent refused.", Unit: perSecond, Queries: []Query{
				{rate("kind, code", "dayfly_sessions_refused_total"), "{{kind}} {{code}}"}, {rate("code", "dayfly_agent_sessions_refused_total"), "agents: {{code}}"}}},
			{Title: "Resumed", About: "Consoles that a client went on with after its connection broke.", Unit: perSecond, Queries: one(rate("", "dayfly_console_resumes_total"), "consoles")},
			{Title: "Exec", About: "From the request to the end of the program; how long that runs is in it.", Unit: seconds, Queries: quantiles("dayfly_exec_seconds", 0.5, 0.95)},
			{Title: "Bytes", About: "To tasks (in) and from them (out).", Unit: rateBytes, Queries: one(rate("kind, direction", "dayfly_session_bytes_total"), "{{kind}} {{direction}}")},
		}},
		{"Reaching tasks", []Panel{
			{Title: "Requests", About: "To hostnames of tasks, by the class of the answer, which is the task's own or dayfly's.", Unit: perSecond, Queries: one(rate("code_class", "dayfly_ingress_response_seconds_count"), "{{code_class}}")},
			{Title: "Until the answer begins", About: "Requests to hostnames of tasks; how long a task thinks is in it.", Unit: seconds, Queries: quantiles("dayfly_ingress_response_seconds", 0.5, 0.95)},
			{Title: "Answered by dayfly", About: "Requests to hostnames that no task answered, by the reason.", Unit: perSecond, Queries: one(rate("code", "dayfly_ingress_failures_total"), "{{code}}")},
			{Title: "Connections", About: "From outside to tasks, by kind, and TCP ports that are listened on.", Unit: count, Queries: []Query{
				{`sum by (kind) (dayfly_ingress_connections_open)`, "{{kind}}"}, {`max(dayfly_ingress_ports_open)`, "ports"}}},
			{Title: "Bytes", About: "To tasks (in) and from them (out).", Unit: rateBytes, Queries: one(rate("kind, direction", "dayfly_ingress_bytes_total"), "{{kind}} {{direction}}")},
			{Title: "Certificate", About: "How long the certificate of the ingress lasts.", Unit: seconds, Alert: "DayflyCertificateExpires", Queries: one(`min(dayfly_ingress_certificate_expiry_seconds > 0) - time()`, "left")},
			{Title: "Should not be", About: "New certificates that could not be used, and TCP ports of tasks that something else has.", Unit: count, Alert: "DayflyCertificateRefused", Queries: []Query{
				{`sum(dayfly_ingress_certificate_failures_total)`, "certificates"}, {`sum(dayfly_ingress_port_errors_total)`, "ports"}}},
		}},
	}}
}
