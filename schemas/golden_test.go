package schemas_test

import (
	"crypto/sha256"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"dayfly.dev/schemas"
)

var update = flag.Bool("update", false, "write the golden files anew")

// Every message as it stands on the wire. A change here is a change of the contract:
// fields are only ever added.
func TestGoldenFiles(t *testing.T) {
	written := map[string]bool{}
	for name, v := range messages(t) {
		file := filepath.Join("testdata", "golden", name+".json")
		written[filepath.Base(file)] = true
		t.Run(name, func(t *testing.T) {
			text := jsontext.Value(encode(t, v))
			if err := text.Indent(jsontext.WithIndent("  ")); err != nil {
				t.Fatal(err)
			}
			text = append(text, '\n')
			if *update {
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, text, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			golden, err := os.ReadFile(file)
			if err != nil {
				t.Fatalf("%v; write it with go test -run Golden -update", err)
			}
			if string(golden) != string(text) {
				t.Errorf("%s has\n%s\nthe code writes\n%s\nIf the contract shall change: go test -run Golden -update", file, golden, text)
			}
			compact := jsontext.Value(golden).Clone() // unknown fields keep their white space
			if err := compact.Compact(); err != nil {
				t.Fatal(err)
			}
			back := reflect.New(reflect.TypeOf(v))
			if err := schemas.Decode(compact, back.Interface()); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(back.Elem().Interface(), v) {
				t.Errorf("%s reads as another value:\n%s", file, encode(t, back.Interface()))
			}
		})
	}
	files, err := os.ReadDir(filepath.Join("testdata", "golden"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !written[f.Name()] {
			t.Errorf("%s belongs to no message; delete it", f.Name())
		}
	}
}

// messages gives an example of every message by the name of its file.
func messages(t *testing.T) map[string]any {
	spec, err := schemas.ParseSpec([]byte(`{"image": "busybox:1.36", "entrypoint": ["/bin/sh", "-c"], "command": ["echo hi"],
		"env": {"LANG": "C"}, "workdir": "/task/input", "stdin": "in", "files": [{"path": "main.py", "content": "print(1)"}, {"path": "data.bin", "base64": "AAE="}],
		"resources": {"cpus": 0.5, "memory": "256MiB", "pids": 256, "disk": "64MiB"}, "tmpfs": {"/var/cache": "16MiB"}, "read_only": true,
		"ttl": "1h30m", "timeouts": {"queue": "5m", "stop": "0s"}, "restart": {"policy": "never"}, "max_attempts": 2,
		"constraints": {"zone": "a"}, "labels": {"owner": "litmus"}}`), schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	second := func(n int) time.Time { return t0.Add(time.Duration(n) * time.Second) }
	by := func(n int, who string) schemas.Meta {
		return schemas.Meta{At: second(n), By: who, Op: who + "-op", On: uint64(n)}
	}
	settle := func(r schemas.Record, n int, rep schemas.Report) schemas.Record {
		rep.Assignment = r.Assignment()
		return must(t, r, schemas.Settle{Meta: by(n, "reaper"), Report: rep})
	}
	end := &schemas.End{
		By: schemas.EndedItself, Reason: schemas.ReasonExit, Message: "exit code 7", Exit: &schemas.Exit{Code: 7},
		Usage: schemas.Usage{CPUMillis: 12, WallMillis: 1034, MemoryPeak: 1 << 20}, Stdout: "hi\n", Stderr: "no\n",
		Logs:        schemas.LogSum{StdoutBytes: 3, StderrBytes: 3},
		Artifacts:   []schemas.Artifact{{Name: "out/a.txt", Size: 3, SHA256: strings.Repeat("0a", 32)}},
		ArtifactSum: &schemas.ArtifactSum{Count: 1, Bytes: 3, Skipped: 1, Truncated: true, Why: schemas.ArtifactsLimit, Stored: 3, ListBytes: 120, ListSHA256: strings.Repeat("0b", 32)},
	}
	endedBy := func(by schemas.EndedBy) *schemas.End {
		e := *end
		e.By, e.Reason, e.Message = by, "", ""
		e.Exit = &schemas.Exit{Code: 137, Signal: 9}
		e.Logs = schemas.LogSum{StdoutBytes: 3, StderrBytes: 3, Truncated: true, Why: "limit", Dropped: 99}
		return &e
	}
	acceptedReport := schemas.Report{Phase: schemas.PhaseAccepted, Revision: 3, Progress: "pulling busybox:1.36: 1.0 of 4.0 MiB",
		Pull: &schemas.Pull{Done: 1 << 20, Total: 4 << 20, Layers: 3, Ready: 1}}
	image := &schemas.Resolved{ID: "sha256:" + strings.Repeat("1d", 32), Digest: "sha256:" + strings.Repeat("d1", 32)}
	runningReport := schemas.Report{Phase: schemas.PhaseRunning, Revision: 3, Image: image, Ran: true, RanFor: schemas.Duration(30 * time.Millisecond)}
	readyReport := schemas.Report{Phase: schemas.PhaseRunning, Revision: 3, Restarts: 2, Ran: true, Ready: true, RanFor: schemas.Duration(time.Minute), Last: &schemas.Exit{Code: 7}}
	endedReport := schemas.Report{Phase: schemas.PhaseEnded, Revision: 5, Restarts: 1, Applied: 1, Ran: true, RanFor: schemas.Duration(time.Minute), End: end}

	queued := schemas.NewRecord(taskID, spec, schemas.DefaultPolicy(), by(0, "gateway"))
	queued.Trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	assigned := must(t, queued, schemas.Choose{Meta: by(1, "placer"), Worker: "w1", Epoch: "e1"})
	starting := settle(assigned, 2, acceptedReport)
	running := settle(starting, 3, runningReport)
	extended := must(t, running, schemas.AskExtend{Meta: by(60, "gateway"), TTL: schemas.Duration(2 * time.Hour)})
	restarting := must(t, running, schemas.AskRestart{Meta: by(60, "gateway")})
	completed := settle(extended, 63, schemas.Report{Phase: schemas.PhaseEnded, Ran: true, Applied: 1, End: func() *schemas.End {
		e := *end
		e.Message, e.Exit = "", &schemas.Exit{}
		return &e
	}()})
	failed := settle(extended, 63, endedReport)
	marked := must(t, running, schemas.AskCancel{Meta: by(5, "gateway"), Grace: schemas.Duration(3 * time.Second)})
	canceled := settle(marked, 9, schemas.Report{Phase: schemas.PhaseEnded, Ran: true, End: endedBy(schemas.EndedStop)})
	expired := settle(running, 5403, schemas.Report{Phase: schemas.PhaseEnded, Ran: true, End: endedBy(schemas.EndedDeadline)})
	gaveBack := settle(assigned, 2, schemas.Report{Phase: schemas.PhaseEnded, End: &schemas.End{By: schemas.EndedGaveBack, Message: "no room"}})
	lost := must(t, running, schemas.Lose{Meta: by(90, "reaper"), Worker: "w1", Epoch: "e1"})
	waiting := running
	waiting.Spec.OnLost = schemas.OnLostWait
	waiting = must(t, waiting, schemas.Lose{Meta: by(90, "reaper"), Worker: "w1", Epoch: "e1"})

	checked := running
	checked.Spec.Restart = &schemas.Restart{Policy: schemas.RestartOnFailure, Max: 5, Backoff: schemas.Duration(schemas.DefaultBackoff)}
	checked.Spec.Health = &schemas.Health{HTTP: &schemas.HTTPCheck{Port: 8080, Path: "/up"}, Interval: schemas.Duration(time.Second),
		Timeout: schemas.Duration(time.Second), Retries: 3, StartPeriod: schemas.Duration(5 * time.Second)}
	ready := settle(checked, 63, readyReport)

	blobID := schemas.BlobIDOf(sha256.Sum256([]byte("hi\n")))
	withBlobs := queued
	withBlobs.Spec.Files = []schemas.File{{Path: "data", Blob: blobID}}
	withBlobs.Spec.Stdin, withBlobs.Spec.StdinBlob = "", blobID
	withBlobs.Blobs = []schemas.BlobUse{{Blob: blobID, Size: 3, Upload: "upload"}}
	assignedBlobs := must(t, withBlobs, schemas.Choose{Meta: by(1, "placer"), Worker: "w1", Epoch: "e1"})

	terminal := queued
	terminal.Spec.Stdin, terminal.Spec.StdinOpen, terminal.Spec.TTY, terminal.Spec.Window = "", true, true, &schemas.Window{Rows: 24, Cols: 80}

	a := running.Assignment()
	own := func(rep schemas.Report) schemas.Report { rep.Assignment = a; return rep }
	beat := schemas.Beat{
		Worker: "w1", Epoch: "e1", Instance: "i1", Sequence: 41, At: second(5), Version: "0.1.0", Since: t0,
		Host: schemas.Host{OS: "linux", Arch: "amd64", CPUs: 2, Memory: 8 << 30, Slots: 32, Labels: map[string]string{"zone": "a"},
			Kinds: []string{"judge"}, Credentials: []string{"team-a"}, Engine: "docker 20.10.24", Runtime: "runc 1.1.5"},
		Running: 3, Order: 77, Reported: true, Kept: []schemas.TaskID{taskID}, Images: []string{"busybox:1.36", "busybox@sha256:d1d1d1d1d1d1"},
		Cache: schemas.ImageCache{Images: 3, Bytes: 6 << 20, Own: 1, OwnAll: 4 << 20}, Wanted: 9,
		Missing: []schemas.MissingImage{{Image: "registry.lan/web:1", State: schemas.MissingFailed, Message: "registry registry.lan cannot be reached"}}, Unnamed: 2,
		Blobs: schemas.NewBlobFilter([]schemas.BlobID{blobID}), Load: schemas.Load{CPU: 0.25, Memory: 1 << 30},
	}
	wanted := schemas.WantedImages{Items: []schemas.WantedImage{{Image: "registry.lan/web:1", By: schemas.ByOperator, Since: t0, Workers: []schemas.WorkerID{"w1"},
		Constraints: map[string]string{"zone": "a"}, Credentials: "team-a"}}}
	lostBeat := beat
	lostBeat.LostAt = second(80)
	later := queued // as a newer service writes it
	later.Unknown = schemas.Unknown{"generation": jsontext.Value("2")}
	later.Spec.Resources.Unknown = schemas.Unknown{"io": jsontext.Value(`{"read":"1MiB"}`)}
	_, invalid := schemas.ParseSpec([]byte(`{"image":"a","ttl":"0s","priority":99}`), schemas.DefaultPolicy())
	why := schemas.Why{Task: taskID, Position: 2, Summary: "No worker has 0.5 CPUs free; 1 task is ahead of it.", Workers: []schemas.WhyNotWorker{
		{Worker: "w1", Filter: "cpus", Detail: "0.1 of 2 CPUs are free, 0.5 are needed"},
	}}
	queuedView := queued.View(1, second(7))
	queuedView.Why = &why
	listed := running.View(4, second(7))
	listed.History = nil
	announced := canceled
	announced.Spec.Callback = &schemas.Callback{URL: "https://judge.example/dayfly", Secret: "sixteen or more bytes"}
	delivery := schemas.Delivery{State: schemas.DeliveryDelivered, Tries: 2, LastStatus: 204, DeliveredAt: second(101), Op: "op"}
	announcedView := announced.View(7, second(102))
	announcedView.Callback = delivery.View()
	open := running
	open.Spec.Ports = []schemas.Port{{Name: "web", Port: 8080, Protocol: schemas.ProtocolHTTP}, {Name: "shell", Port: 7000, Protocol: schemas.ProtocolTCP}}
	open.Public = map[string]int{"shell": 20007}
	openView := open.View(4, second(7))
	openView.Endpoints = []schemas.Endpoint{{Name: "web", URL: "http://abcdefghijklmnopqrstuvwxyz.tasks.example", Host: "abcdefghijklmnopqrstuvwxyz.tasks.example", Port: 80, Protocol: schemas.ProtocolHTTP},
		{Name: "shell", URL: "tcp://tasks.example:20007", Host: "tasks.example", Port: 20007, Protocol: schemas.ProtocolTCP}}
	const batchID = schemas.BatchID("b-01arz3ndektsv4rrffq69g5000")
	batch, err := schemas.NewBatch(batchID, schemas.BatchRequest{Items: 4, Labels: map[string]string{"contest": "7"}, Callback: announced.Spec.Callback},
		"upload", []int{0, 3}, by(0, "gateway")).Next(schemas.BatchStep{Meta: by(2, "gateway"), Begun: 4, Made: 3, Results: []byte("cf..")})
	if err != nil {
		t.Fatal(err)
	}

	template := parseTemplate(t, `{"image": "busybox", "ports": [{"name": "sh", "port": 9000, "protocol": "tcp"}], "extensions": 3,
		"values": {"flag": {"env": "FLAG"}}, "secrets": [{"path": "admin.txt", "value": "hunter2"}], "connection": "nc {host} {port}"}`)
	instanceSpec, instanceOf, err := template.Make("pwn-1", "litmus", schemas.InstanceRequest{Values: map[string]string{"flag": "CTF{x}"}}, schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	instance := schemas.NewRecord(taskID, instanceSpec, schemas.DefaultPolicy(), schemas.Meta{At: t0, By: "gateway", Op: "op1"})
	instance.Instance, instance.Public = &instanceOf, map[string]int{"sh": 20007}
	instanceTask := instance.View(7, second(1))
	instanceTask.Endpoints = []schemas.Endpoint{{Name: "sh", URL: "tcp://tasks.example:20007", Host: "tasks.example", Port: 20007, Protocol: schemas.ProtocolTCP}}
	return map[string]any{
		"record_queued": queued, "record_assigned": assigned, "record_starting": starting, "record_running": running,
		"record_running_extended": extended, "record_running_cancel_asked": marked, "record_running_restart_asked": restarting, "record_running_worker_away": waiting,
		"record_queued_given_back": gaveBack, "record_queued_lost": lost, "record_queued_of_a_newer_version": later,
		"record_running_ready": ready, "record_completed": completed, "record_failed": failed, "record_canceled": canceled, "record_expired": expired,
		"order_run": schemas.NewOrder(running, 4, a, second(10)), "order_run_first": schemas.NewOrder(assigned, 2, a, second(1)),
		"order_run_again": schemas.NewOrder(restarting, 5, a, second(60)),
		"order_stop":      schemas.NewOrder(marked, 5, a, second(5)), "order_close": schemas.NewOrder(failed, 6, a, second(64)),
		"report_accepted": own(acceptedReport), "report_running": own(runningReport), "report_ended": own(endedReport), "report_ready": own(readyReport),
		"report_gave_back": own(schemas.Report{Phase: schemas.PhaseEnded, Revision: 2, End: &schemas.End{By: schemas.EndedGaveBack, Message: "no room"}}),
		"beat":             beat, "beat_lost": lostBeat,
		"record_queued_with_blobs": withBlobs, "order_run_with_blobs": schemas.NewOrder(assignedBlobs, 2, assignedBlobs.Assignment(), second(1)),
		"blob_list":     schemas.BlobList{Items: []schemas.BlobInfo{{Blob: blobID, Size: 3, StoredAt: t0, UsedAt: second(7), InUse: true}}, NextCursor: "7"},
		"blob":          schemas.Blob{Size: 3, Upload: "upload", StoredAt: t0, UsedAt: second(7), Op: "op"},
		"wanted_images": wanted,
		"image_list": schemas.ImageList{
			Items:   []schemas.Image{{WantedImage: wanted.Items[0], Status: []schemas.ImageStatus{{Worker: "w1", State: schemas.ImagePresent}}}},
			Workers: []schemas.WorkerImages{{Worker: "w1", Cache: beat.Cache, Names: beat.Images}}},
		"drain":       schemas.Drain{Since: t0, By: "admin"},
		"idempotency": schemas.IdempotencyEntry{Fingerprint: "sha256:00", Task: taskID, At: t0},
		"leadership":  schemas.Leadership{Holder: "placer-1", Term: 3, Beat: 12, Length: schemas.Duration(5 * time.Second)},
		"why":         why,
		"task_queued": queuedView, "task_running": running.View(4, second(7)), "task_failed": failed.View(6, second(99)),
		"task_list":      schemas.TaskList{Items: []schemas.Task{listed}, NextCursor: "bmV4dA"},
		"extend_request": schemas.ExtendRequest{TTL: schemas.Duration(90 * time.Minute)},
		"worker_list": schemas.WorkerList{Items: []schemas.Worker{{
			ID: "w1", State: "ready", Epoch: "e1", Version: "0.1.0", Host: beat.Host, Assigned: schemas.Allocation{Tasks: 3, CPUs: 1.5, Memory: 768 << 20},
			Running: 3, Load: beat.Load, BeatAgo: schemas.Duration(1200 * time.Millisecond), RegisteredAt: t0,
		}}},
		"record_queued_with_terminal": terminal,
		"record_running_with_ports":   open, "task_running_with_ports": openView, "record_instance": instance, "task_instance": instanceTask, "instance": instanceTask.AsInstance("litmus"),
		"instance_entry":   schemas.InstanceEntry{Template: "pwn-1", Owner: "litmus", Task: taskID, At: t0},
		"instance_request": schemas.InstanceRequest{Values: map[string]string{"flag": "CTF{x}"}, TTL: schemas.Duration(time.Hour)},
		"renew_request":    schemas.RenewRequest{Renew: true},
		"instance_list":    schemas.InstanceList{Items: []schemas.Instance{instanceTask.AsInstance("litmus")}, NextCursor: "bmV4dA"},
		"template_list": schemas.TemplateList{Items: []schemas.TemplateView{{Name: "pwn-1", Digest: "88a8042f9a40fbee", ReadAt: t0, Template: template.Public()}}, Digest: "b7b307ae88042cce",
			Faults: []schemas.TemplateFault{{File: "web.yaml", Line: 4, Column: 10, Field: "max_ttl", Message: "must be at least the ttl (2h) and at most 24h here"}}},
		"port_lease":                      schemas.PortLease{Task: taskID, Name: "shell", Op: "op"},
		"hostname_key":                    schemas.HostnameKey{Secret: []byte("sixteen or more bytes")},
		"record_canceled_to_be_announced": announced, "task_announced": announcedView, "delivery": delivery,
		"delivery_pending":  schemas.Delivery{State: schemas.DeliveryPending, Tries: 1, LastStatus: 503, LastError: "status 503", NextAt: second(101), Op: "op"},
		"batch":             batch,
		"batch_items":       schemas.BatchPart{jsontext.Value(`{"command":["echo","1"]}`), jsontext.Value(`{"name":"two"}`)},
		"batch_status":      batch.View(3, func(int) schemas.State { return schemas.Running }),
		"batch_list":        schemas.BatchList{Items: []schemas.BatchStatus{batch.View(3, nil)}, NextCursor: string(batchID)},
		"batch_item_list":   schemas.BatchItemList{Items: []schemas.BatchItem{{Index: 3, Name: "d", Task: batchID.Task(3), State: schemas.Running}}, NextCursor: "4"},
		"idempotency_batch": schemas.IdempotencyEntry{Fingerprint: "sha256:00", Batch: batchID, At: t0},
		"task_event": schemas.TaskEvent{ID: 812, Task: taskID, At: second(2), State: schemas.Running, By: "reaper", Note: "worker reported", Attempt: 1, Worker: "w1",
			Labels: map[string]string{"owner": "litmus"}, Truncated: true},
		"artifact_list": schemas.ArtifactList{Task: taskID, Items: end.Artifacts, Skipped: []schemas.ArtifactSkipped{{Name: `"bell\a"`, Why: "a link"}},
			Sum: schemas.ArtifactSum{Count: 1, Bytes: 3, Skipped: 1}},
		"artifact_line": schemas.ArtifactLine{Name: "out/a.txt", Offset: 7, Size: 3, SHA256: strings.Repeat("0a", 32)}, "artifact_line_skipped": schemas.ArtifactLine{Name: "fifo", Skipped: "a pipe"},
		"log_line":        schemas.LogLine{Attempt: 1, Stream: schemas.Stdout, Offset: 16, At: t0, Data: "hi\n"},
		"log_line_binary": schemas.LogLine{Attempt: 1, Stream: schemas.Stderr, Offset: 19, At: t0, Base64: "/wA="},
		"error_invalid":   *invalid.(*schemas.Error),
		"error_state": schemas.Error{Status: 409, Code: schemas.CodeStateConflict, Title: "Conflict", Detail: "the task is final",
			Task: taskID, State: schemas.Failed, RequestID: "r1"},
		"error_unavailable": schemas.Error{Status: 503, Code: schemas.CodeUnavailable, RetryAfter: schemas.Duration(2 * time.Second), Detail: "the bus is away; nothing was done"},
	}
}

// Each state of a record and each phase of a report has a golden file.
func TestGoldenFilesCoverTheContract(t *testing.T) {
	all := messages(t)
	for _, s := range schemas.States() {
		if r, ok := all["record_"+string(s)].(schemas.Record); !ok || r.State != s {
			t.Errorf("no record that is %s", s)
		}
	}
	for _, want := range []schemas.Want{schemas.WantRun, schemas.WantStop, schemas.WantClose} {
		if o, ok := all["order_"+string(want)].(schemas.Order); !ok || o.Want != want {
			t.Errorf("no order to %s", want)
		}
	}
	for _, p := range []schemas.Phase{schemas.PhaseAccepted, schemas.PhaseRunning, schemas.PhaseEnded} {
		if r, ok := all["report_"+string(p)].(schemas.Report); !ok || r.Phase != p {
			t.Errorf("no report of %s", p)
		}
	}
}
