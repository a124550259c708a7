package schemas

import "time"

// Task is a task as the API shows it.
type Task struct {
	ID       TaskID      `json:"id"`
	Batch    BatchID     `json:"batch,omitzero"`
	Instance *InstanceOf `json:"instance,omitzero"`
	State    State       `json:"state"`
	Ready    bool        `json:"ready"` // it runs, and has passed its health check if it has one
	Reason   Reason      `json:"reason,omitzero"`
	Message  string      `json:"message,omitzero"`
	Why      *Why        `json:"why,omitzero"` // while queued, of a single task
	Progress string      `json:"progress,omitzero"`
	// ImagePull is how far the image is, while the task starts.
	ImagePull *Pull `json:"image_pull,omitzero"`
	// ImageID and ImageDigest are the image that the task runs in all its attempts, once a
	// worker has resolved the name in its spec. An image that was never in a registry has no
	// digest.
	ImageID     string `json:"image_id,omitzero"`
	ImageDigest string `json:"image_digest,omitzero"`

	Attempt  int      `json:"attempt"`
	Restarts int      `json:"restarts"`
	Worker   WorkerID `json:"worker,omitzero"`

	Endpoints []Endpoint `json:"endpoints,omitzero"` // of its ports, until it is over

	Spec    Spec     `json:"spec"`
	Timings Timings  `json:"timings"`
	History []Change `json:"history,omitzero"` // not in lists

	ExpiresAt    time.Time   `json:"expires_at,omitzero"`
	SecondsLeft  int64       `json:"seconds_left,omitzero"`
	Cancel       *CancelMark `json:"cancel,omitzero"`
	WorkerLostAt time.Time   `json:"worker_lost_at,omitzero"`

	Result *JudgeResult `json:"result,omitzero"` // of a judge; in lists without its cases
	Exit   *Exit        `json:"exit,omitzero"`
	Usage  *Usage       `json:"usage,omitzero"`
	Stdout string       `json:"stdout,omitzero"` // the first MaxInlineOutput bytes; not in lists
	Stderr string       `json:"stderr,omitzero"`
	Logs   *LogSum      `json:"logs,omitzero"`

	Artifacts   []Artifact   `json:"artifacts,omitzero"`    // the first MaxInlineArtifacts; not in lists
	ArtifactSum *ArtifactSum `json:"artifact_sum,omitzero"` // of a final task that left anything

	Callback *CallbackStatus `json:"callback,omitzero"` // of a single final task that has one

	Revision uint64 `json:"revision"`
}

// Timings are the moments of a task's life that have come.
type Timings struct {
	Accepted time.Time `json:"accepted_at"`
	Assigned time.Time `json:"assigned_at,omitzero"`
	Starting time.Time `json:"starting_at,omitzero"`
	Running  time.Time `json:"running_at,omitzero"`
	Ready    time.Time `json:"ready_at,omitzero"` // with a health check
	Ended    time.Time `json:"ended_at,omitzero"`
}

// View is the task as the API shows it at now.
func (r *Record) View(revision uint64, now time.Time) Task {
	t := Task{
		ID: r.ID, Batch: r.Batch, Instance: r.Instance, State: r.State, Ready: r.Ready(), Reason: r.Reason, Message: r.Message, Progress: r.Progress,
		ImagePull: r.ImagePull, ImageID: r.ImageID, ImageDigest: r.ImageDigest,
		Attempt: r.Attempt, Restarts: r.Restarts, Worker: r.Worker, Spec: r.Spec,
		Timings: Timings{Accepted: r.AcceptedAt, Assigned: r.AssignedAt, Starting: r.StartingAt, Running: r.RunningAt, Ready: r.ReadyAt, Ended: r.EndedAt},
		History: r.Changes(revision), ExpiresAt: r.ExpiresAt, Cancel: r.Cancel, WorkerLostAt: r.WorkerLostAt,
		Result: r.Result.sealed(revision), Exit: r.Exit, Usage: r.Usage, Stdout: r.Stdout, Stderr: r.Stderr, Logs: r.Logs,
		Artifacts: r.Artifacts, ArtifactSum: r.ArtifactSum.public(), Revision: revision,
	}
	t.Spec.Callback, t.Spec.Secrets = r.Spec.Callback.public(), hidden(r.Spec.Secrets)
	if !r.ExpiresAt.IsZero() && !r.State.Final() {
		t.SecondsLeft = int64(r.TimeLeft(now).Round(time.Second).Seconds())
	}
	return t
}

// Ready says whether the task runs, and has passed its health check if it has one.
func (r *Record) Ready() bool {
	return r.State == Running && (r.Spec.Health == nil || !r.ReadyAt.IsZero())
}

// WithoutBodies is the task as lists show it and callbacks carry it: its spec without
// what may be long or secret.
func (t Task) WithoutBodies() Task {
	t.Spec = t.Spec.withoutBodies()
	return t
}

func (s Spec) withoutBodies() Spec {
	s.Stdin, s.Files, s.Secrets, s.Env, s.Callback, s.Unknown = "", nil, nil, nil, nil, nil
	s.Judge = nil
	return s
}

// TaskList is a page of tasks, newest first.
type TaskList struct {
	Items      []Task `json:"items"`
	NextCursor string `json:"next_cursor,omitzero"`
}

// ExtendRequest is the body of POST /v1/tasks/{id}/extend.
type ExtendRequest struct {
	TTL Duration `json:"ttl"`
}

// Worker is a worker as the API shows it.
type Worker struct {
	ID           WorkerID   `json:"id"`
	State        string     `json:"state"` // ready, draining, silent (no beat for a lease), lost
	Epoch        Epoch      `json:"epoch"`
	Version      string     `json:"version"`
	Host         Host       `json:"host"`
	Assigned     Allocation `json:"assigned"` // what its tasks were promised
	Free         Allocation `json:"free"`     // what they leave of the host
	Running      int        `json:"running"`
	Load         Load       `json:"load"`
	BeatAgo      Duration   `json:"beat_ago"` // by the gateway's clock since it saw the last beat
	RegisteredAt time.Time  `json:"registered_at,omitzero"`
}

// Allocation sums what is assigned to a worker.
type Allocation struct {
	Tasks  int  `json:"tasks"`
	CPUs   CPUs `json:"cpus"`
	Memory Size `json:"memory_bytes"`
	GPUs   int  `json:"gpus"`
}

// Less is what b leaves of a, and never less than nothing.
func (a Allocation) Less(b Allocation) Allocation {
	return Allocation{
		Tasks: max(0, a.Tasks-b.Tasks), CPUs: CPUs(float64(max(0, a.CPUs.Nano()-b.CPUs.Nano())) / 1e9),
		Memory: max(0, a.Memory-b.Memory), GPUs: max(0, a.GPUs-b.GPUs),
	}
}

// WorkerList is the answer of GET /v1/workers, by name.
type WorkerList struct {
	Items []Worker `json:"items"`
}

// TaskEvent is one change of one task, taken from the history of its record: there is
// no other account of it that could differ.
type TaskEvent struct {
	ID      uint64            `json:"id"` // revision of the write; events come in its order, over all tasks
	Task    TaskID            `json:"task"`
	At      time.Time         `json:"at"` // by the clock of the service that wrote
	State   State             `json:"state"`
	Reason  Reason            `json:"reason,omitzero"`
	By      string            `json:"by"`
	Note    string            `json:"note,omitzero"` // what changed besides the state
	Attempt int               `json:"attempt,omitzero"`
	Worker  WorkerID          `json:"worker,omitzero"`
	Labels  map[string]string `json:"labels,omitzero"`
	Judge   *JudgeEvent       `json:"judge,omitzero"` // of a judge: a test, or the compile stage, is done
	// Truncated says that earlier changes of this task which were asked for are no longer kept.
	Truncated bool `json:"truncated,omitzero"`
}

// LogLine is one piece of a task's log as NDJSON and SSE carry it: a run of bytes
// of one stream, not split at lines. Data is text where the bytes are UTF-8, else
// Base64 holds them.
type LogLine struct {
	Attempt int       `json:"attempt"`
	Stream  Stream    `json:"stream"`
	Offset  int64     `json:"offset"`
	At      time.Time `json:"at"`
	Data    string    `json:"data,omitzero"`
	Base64  string    `json:"base64,omitzero"`
}
