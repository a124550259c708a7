// Package gridx answers the HTTP API of a gridx coordinator, to which clients submit jobs
// for borrowed machines:
//
//	POST /jobs      {kind, payload, requires_gpu, limits} → {job_id, …}
//	GET  /jobs      the newest jobs
//	GET  /jobs/ID   its status, and its result once it is done
//	GET  /workers   the workers
//
// A job runs in the sandbox of gridx's own document: its image reads /work/input/task.json
// and writes below /work/output.
package gridx

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net/http"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/shims/shim"
)

// The contract of a job's container.
const (
	Input   = "/work/input" // task.json is in it
	Output  = "/work/output"
	TmpSize = schemas.Size(256 << 20) // of /tmp
)

// images are the runners of the kinds that there are, and of those with a GPU.
var images = map[string]struct{ plain, gpu string }{
	"python": {"gridx-job-python", "gridx-job-gpu"},
}

const (
	labelPayload = "gridx.payload_hash"
	maxJobs      = 1000 // of one list
	// maxInline is how large a task.json a request of ours has room for, whatever has to be escaped in it.
	maxInline = 128 << 10
)

// Submission is the body of POST /jobs.
type Submission struct {
	Kind        string   `json:"kind"`
	Payload     shim.Raw `json:"payload"`
	RequiresGPU bool     `json:"requires_gpu"`
	Limits      Limits   `json:"limits"`
}

// Payload is that of kind python. One of the first two is given.
type Payload struct {
	MainPy     string   `json:"main_py,omitzero"` // in base64
	ScriptText string   `json:"script_text,omitzero"`
	Args       []string `json:"args,omitzero"`
}

// Limits of a job. The site's defaults hold where one is 0.
type Limits struct {
	CPUs   schemas.CPUs `json:"cpus"`
	Memory schemas.Size `json:"memory"` // "512m" as Docker takes it, or bytes
}

// task is what the runner finds in task.json.
type task struct {
	Kind    string  `json:"kind"`
	Payload Payload `json:"payload"`
}

// Job is a job as its client sees it. The result is there once the job is over.
type Job struct {
	JobID          string     `json:"job_id"`
	Kind           string     `json:"kind"`
	Status         string     `json:"status"` // queued, assigned, running, completed, failed or canceled
	PayloadHash    string     `json:"payload_hash"`
	RequiresGPU    bool       `json:"requires_gpu"`
	ResourceLimits Limits     `json:"resource_limits"`
	AssignedWorker string     `json:"assigned_worker"`
	CreatedAt      time.Time  `json:"created_at"`
	StartedAt      time.Time  `json:"started_at,omitzero"`
	FinishedAt     time.Time  `json:"finished_at,omitzero"`
	Error          string     `json:"error,omitzero"` // why it failed, or why it waits
	ExitCode       *int       `json:"exit_code,omitzero"`
	Stdout         *string    `json:"stdout,omitzero"`
	Stderr         *string    `json:"stderr,omitzero"`
	Artifacts      []Artifact `json:"artifacts,omitzero"`
}

// Artifact is a file that a job left in its output folder.
type Artifact struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Worker is a worker as clients see it.
type Worker struct {
	WorkerID string    `json:"worker_id"`
	Status   string    `json:"status"` // idle, busy, draining or disconnected
	Caps     Caps      `json:"caps"`
	Running  int       `json:"running"`
	LastSeen time.Time `json:"last_seen"`
}

// Caps is what a worker can do.
type Caps struct {
	CPUCores float64 `json:"cpu_cores"`
	GPU      bool    `json:"gpu"`
}

type handler struct{ *shim.Shim }

// New makes the handler.
func New(c *client.Client, cfg shim.Config) http.Handler {
	h := handler{shim.New(c, cfg, shim.Protocol{
		Name: "gridx",
		Fail: func(w http.ResponseWriter, p shim.Problem) {
			_ = shim.Answer(w, p.Status, map[string]string{"error": p.Message})
		},
		Fields: map[string]string{"resources.cpus": "limits.cpus", "resources.memory": "limits.memory", "files": "payload"},
	})}
	h.Handle("POST /jobs", h.submit)
	h.Handle("GET /jobs", h.list)
	h.Handle("GET /jobs/{id}", h.get)
	h.Handle("GET /workers", h.workers)
	return h
}

func (h handler) submit(w http.ResponseWriter, r *http.Request) error {
	var s Submission
	if err := shim.Read(w, r, &s); err != nil {
		return err
	}
	spec, err := h.spec(r.Context(), s)
	if err != nil {
		return err
	}
	t, err := h.Client.Create(r.Context(), spec, client.CreateOptions{})
	if err != nil {
		return err
	}
	return shim.Answer(w, http.StatusCreated, job(t))
}

// spec makes a task of a job, in the sandbox of the document:
//
//	--read-only --cap-drop=ALL --security-opt=no-new-privileges:true --pids-limit=256
//	--cpus --memory --network=none --user 1000:1000 --tmpfs /tmp:rw,size=256m
//	-v …/input:/work/input:ro -v …/output:/work/output:rw
//
// What of it is not named here is what every task has.
func (h handler) spec(ctx context.Context, s Submission) (schemas.Spec, error) {
	image, ok := images[s.Kind]
	if !ok {
		return schemas.Spec{}, shim.Refuse(http.StatusUnprocessableEntity, `kind: must be "python"; others are not on the whitelist`)
	}
	p, err := payload(s.Payload)
	if err != nil {
		return schemas.Spec{}, err
	}
	input, err := schemas.Encode(task{s.Kind, p})
	if err != nil {
		return schemas.Spec{}, shim.Refuse(http.StatusUnprocessableEntity, "payload: must be text in UTF-8")
	}
	sum := sha256.Sum256(s.Payload)
	spec := h.Spec(map[string]string{labelPayload: hex.EncodeToString(sum[:])})
	spec.Labels["gridx.kind"] = s.Kind
	spec.Image = image.plain
	spec.Network, spec.User = schemas.NetworkNone, "1000:1000"
	spec.Resources = schemas.Resources{CPUs: s.Limits.CPUs, Memory: s.Limits.Memory, Pids: 256}
	if s.RequiresGPU {
		spec.Image, spec.Resources.GPUs = image.gpu, 1
	}
	spec.Tmpfs = map[string]schemas.Size{"/tmp": TmpSize}
	file := schemas.File{Path: "task.json", Content: string(input)}
	if len(input) > maxInline {
		blob, _, err := h.Client.PutBlob(ctx, bytes.NewReader(input), int64(len(input)))
		if err != nil {
			return spec, err
		}
		file = schemas.File{Path: file.Path, Blob: blob.Blob}
	}
	spec.Files = []schemas.File{file}
	spec.Mounts = &schemas.Mounts{Input: Input, Output: Output}
	return spec, nil
}

// payload reads that of kind python.
func payload(raw []byte) (p Payload, err error) {
	if schemas.DecodeStrict(raw, &p) != nil {
		return p, shim.Refuse(http.StatusUnprocessableEntity, "payload: must be an object with main_py (in base64) or script_text, and perhaps args, a list of strings")
	}
	if (p.MainPy == "") == (p.ScriptText == "") {
		return p, shim.Refuse(http.StatusUnprocessableEntity, "payload: give one of main_py and script_text")
	}
	if _, err := base64.StdEncoding.DecodeString(p.MainPy); err != nil {
		return p, shim.Refuse(http.StatusUnprocessableEntity, "payload.main_py: is not standard base64")
	}
	return p, nil
}

// job shows a task of ours, without its result.
func job(t schemas.Task) Job {
	s := t.Spec
	j := Job{
		JobID: string(t.ID), Kind: s.Labels["gridx.kind"], Status: status(t.State), PayloadHash: s.Labels[labelPayload],
		RequiresGPU: s.Resources.GPUs > 0, ResourceLimits: Limits{s.Resources.CPUs, s.Resources.Memory}, AssignedWorker: string(t.Worker),
		CreatedAt: t.Timings.Accepted, StartedAt: t.Timings.Running, FinishedAt: t.Timings.Ended,
	}
	switch {
	case t.State == schemas.Failed || t.State == schemas.Expired:
		j.Error = cmp.Or(t.Message, string(t.Reason))
	case t.Why != nil:
		j.Error = "waits: " + t.Why.Summary
	}
	if t.State.Final() && t.Exit != nil {
		j.ExitCode = &t.Exit.Code
	}
	return j
}

// status has no word for a job whose time was over but failed.
func status(s schemas.State) string {
	switch s {
	case schemas.Starting:
		return string(schemas.Assigned)
	case schemas.Expired:
		return string(schemas.Failed)
	}
	return string(s)
}

func (h handler) get(w http.ResponseWriter, r *http.Request) error {
	none := shim.Refuse(http.StatusNotFound, "there is no such job")
	id, err := schemas.ParseTaskID(r.PathValue("id"))
	if err != nil {
		return none
	}
	t, err := h.Client.Get(r.Context(), id, client.GetOptions{})
	if err != nil {
		return err
	}
	if !h.Mine(t) {
		return none
	}
	j := job(t)
	if t.State.Final() {
		out, errs, err := h.Output(r.Context(), t)
		if err != nil {
			return err
		}
		stdout, stderr := shim.Text(out), shim.Text(errs)
		j.Stdout, j.Stderr = &stdout, &stderr
		if j.Artifacts, err = h.artifacts(r.Context(), t); err != nil {
			return err
		}
	}
	return shim.Answer(w, http.StatusOK, j)
}

// artifacts lists what the job left in its output folder.
func (h handler) artifacts(ctx context.Context, t schemas.Task) (list []Artifact, err error) {
	items := t.Artifacts
	if t.ArtifactSum != nil && t.ArtifactSum.Count > len(items) {
		all, err := h.Client.Artifacts(ctx, t.ID)
		if err != nil {
			return nil, err
		}
		items = all.Items
	}
	for _, a := range items {
		list = append(list, Artifact{a.Name, a.Size, a.SHA256})
	}
	return list, nil
}

func (h handler) list(w http.ResponseWriter, r *http.Request) error {
	list := []Job{}
	for t, err := range h.Client.All(r.Context(), client.ListOptions{Labels: map[string]string{shim.Label: h.Name}}) {
		if err != nil {
			return err
		}
		if list = append(list, job(t)); len(list) == maxJobs {
			break
		}
	}
	return shim.Answer(w, http.StatusOK, list)
}

func (h handler) workers(w http.ResponseWriter, r *http.Request) error {
	workers, err := h.Client.Workers(r.Context())
	if err != nil {
		return err
	}
	list := []Worker{}
	for _, wk := range workers.Items {
		one := Worker{
			WorkerID: string(wk.ID), Status: wk.State, Running: wk.Running, LastSeen: time.Now().UTC().Add(-wk.BeatAgo.Std()).Truncate(time.Second),
			Caps: Caps{CPUCores: float64(wk.Host.CPUs), GPU: wk.Host.GPUs > 0},
		}
		switch {
		case wk.State == "silent" || wk.State == "lost":
			one.Status = "disconnected"
		case wk.State == "ready" && wk.Assigned.Tasks > 0:
			one.Status = "busy"
		case wk.State == "ready":
			one.Status = "idle"
		}
		list = append(list, one)
	}
	return shim.Answer(w, http.StatusOK, list)
}
