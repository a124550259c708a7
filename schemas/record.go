package schemas

import (
	"slices"
	"time"
)

// State is where a task is in its life.
type State string

// The states. The last four are final.
const (
	Queued    State = "queued"
	Assigned  State = "assigned"
	Starting  State = "starting"
	Running   State = "running"
	Completed State = "completed"
	Failed    State = "failed"
	Canceled  State = "canceled"
	Expired   State = "expired"
)

// States lists all states in the order of a task's life.
func States() []State {
	return []State{Queued, Assigned, Starting, Running, Completed, Failed, Canceled, Expired}
}

// Final says whether a task in this state can never change again.
func (s State) Final() bool {
	return s == Completed || s == Failed || s == Canceled || s == Expired
}

// Held says whether a worker holds the task.
func (s State) Held() bool { return s == Assigned || s == Starting || s == Running }

// Reason says, for machines, why a task is in its state.
type Reason string

// The reasons.
const (
	ReasonNone         Reason = ""
	ReasonExit         Reason = "exit"           // ended with an exit code of its own
	ReasonOOM          Reason = "oom"            // killed for want of memory
	ReasonSignal       Reason = "signal"         // killed by a signal that was not ours
	ReasonImage        Reason = "image"          // the image does not exist or may not be pulled
	ReasonImageAuth    Reason = "image_auth"     // the registry refuses the login for the image, or asks for one
	ReasonImagePull    Reason = "image_pull"     // the registry did not give the image
	ReasonImageArch    Reason = "image_platform" // the image is for another kind of machine
	ReasonPullTimeout  Reason = "pull_timeout"
	ReasonNotFound     Reason = "command_not_found"      // exit code 127
	ReasonNotExec      Reason = "command_not_executable" // exit code 126
	ReasonUnhealthy    Reason = "unhealthy"              // its health check failed too often
	ReasonBlobMissing  Reason = "blob_missing"           // a blob that it needs is not stored any more
	ReasonStart        Reason = "start"                  // the container could not be made or started
	ReasonStartTimeout Reason = "start_timeout"
	ReasonQueueTimeout Reason = "queue_timeout"
	ReasonCanceled     Reason = "canceled"
	ReasonExpired      Reason = "expired"
	ReasonWorkerLost   Reason = "worker_lost"
	ReasonGaveBack     Reason = "gave_back" // the worker could not hold it
	ReasonRestored     Reason = "restored"  // its record is from a backup, and it may have run since
)

// Record is the truth about one task: its spec and its status, the value of its
// key in the bucket "tasks". It changes only through Next and compare-and-set.
// Its fields are only ever added to; those this version does not know are kept.
type Record struct {
	Version int     `json:"v"`
	ID      TaskID  `json:"id"`
	Batch   BatchID `json:"batch,omitzero"` // the batch that it is an item of
	Spec    Spec    `json:"spec"`
	Trace   string  `json:"trace,omitzero"` // W3C traceparent of the request that made it: what is done for the task belongs below it
	// Blobs are those that the spec names, with what accepting it has found out about them.
	Blobs []BlobUse `json:"blobs,omitzero"`
	// Instance says that the task is the instance of a template for an owner.
	Instance *InstanceOf `json:"instance,omitzero"`
	// Exposed is the port that the image exposes; 0 if it is not known, or not asked for.
	Exposed int `json:"exposed_port,omitzero"`
	// Public has the ports at the gateways that belong to its tcp ports, by their names.
	Public map[string]int `json:"public_ports,omitzero"`

	State   State  `json:"state"`
	Reason  Reason `json:"reason,omitzero"`
	Message string `json:"message,omitzero"`

	// The assignment of the current attempt, or of the last; worker and epoch are empty
	// while the task is queued.
	Attempt int      `json:"attempt,omitzero"`
	Worker  WorkerID `json:"worker,omitzero"`
	Epoch   Epoch    `json:"epoch,omitzero"`

	Restarts  int    `json:"restarts,omitzero"`
	RestartTo int    `json:"restart_to,omitzero"` // a client asked for a restart: so many there shall be at least
	Progress  string `json:"progress,omitzero"`   // while starting: what the worker is doing
	// ImagePull is how far the image is, while starting.
	ImagePull *Pull `json:"image_pull,omitzero"`
	// ImageID and ImageDigest are what the spec's image meant to the first worker that
	// resolved it. Every later attempt runs the same.
	ImageID     string `json:"image_id,omitzero"`
	ImageDigest string `json:"image_digest,omitzero"`

	AcceptedAt time.Time `json:"accepted_at"`
	QueuedAt   time.Time `json:"queued_at"`        // when it last began to wait; a give-back goes on waiting
	BackAt     time.Time `json:"back_at,omitzero"` // when it was last put back; NotBefore and Avoid are of the same clock
	AssignedAt time.Time `json:"assigned_at,omitzero"`
	StartingAt time.Time `json:"starting_at,omitzero"`
	RunningAt  time.Time `json:"running_at,omitzero"` // the first time, of any attempt
	ReadyAt    time.Time `json:"ready_at,omitzero"`   // with a health check: when the present run, or the last, first passed it
	EndedAt    time.Time `json:"ended_at,omitzero"`
	// ExpiresAt is set at the first "running" and moved only by extensions.
	ExpiresAt time.Time `json:"expires_at,omitzero"`

	TTL        Duration `json:"ttl"`                 // effective: the spec's, or a longer one asked for before it ran
	MaxTTL     Duration `json:"max_ttl"`             // the operator's limit when it was accepted
	Extensions int      `json:"extensions,omitzero"` // how often the deadline was moved, or is to be said anew
	Applied    int      `json:"applied,omitzero"`    // how many of those the worker has carried out

	Cancel       *CancelMark `json:"cancel,omitzero"`
	WorkerLostAt time.Time   `json:"worker_lost_at,omitzero"` // on_lost wait: its worker is away

	Tries     int       `json:"tries,omitzero"`      // attempts that reached "starting"; bounded by max_attempts
	GiveBacks int       `json:"give_backs,omitzero"` // in a row
	NotBefore time.Time `json:"not_before,omitzero"` // queued again: wait until then
	Avoid     []Avoid   `json:"avoid,omitzero"`      // workers to skip for a while
	Holders   []Holder  `json:"holders,omitzero"`    // who held which attempt: whose logs count

	Result *JudgeResult `json:"result,omitzero"` // of a judge, in the present attempt or the last
	Exit   *Exit        `json:"exit,omitzero"`
	Usage  *Usage       `json:"usage,omitzero"`
	Stdout string       `json:"stdout,omitzero"` // the first MaxInlineOutput bytes
	Stderr string       `json:"stderr,omitzero"`
	Logs   *LogSum      `json:"logs,omitzero"`

	Artifacts   []Artifact   `json:"artifacts,omitzero"` // the first of them
	ArtifactSum *ArtifactSum `json:"artifact_sum,omitzero"`

	History []Change `json:"history"`
	// Forgotten is the revision of the newest entry that History had to drop; 0: it has all.
	Forgotten uint64   `json:"forgotten,omitzero"`
	LastOps   []string `json:"last_ops,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Bounds of what a record keeps.
const (
	RecordVersion   = 1
	MaxHistory      = 32
	MaxLastOps      = 8
	MaxHolders      = 16
	MaxInlineOutput = 16 << 10
)

// CancelMark is a client's wish to end the task.
type CancelMark struct {
	At    time.Time `json:"at"`
	By    string    `json:"by"`
	Grace Duration  `json:"grace"`

	Unknown Unknown `json:",embed"`
}

// Avoid names a worker that the placer skips until a time.
type Avoid struct {
	Worker WorkerID  `json:"worker"`
	Until  time.Time `json:"until"`

	Unknown Unknown `json:",embed"`
}

// Holder is one attempt and who held it.
type Holder struct {
	Attempt int      `json:"attempt"`
	Worker  WorkerID `json:"worker"`
	Epoch   Epoch    `json:"epoch"`

	Unknown Unknown `json:",embed"`
}

// Change is one entry of a record's history.
type Change struct {
	At      time.Time `json:"at"`
	State   State     `json:"state"`
	Reason  Reason    `json:"reason,omitzero"`
	By      string    `json:"by"`
	Attempt int       `json:"attempt,omitzero"`
	Worker  WorkerID  `json:"worker,omitzero"`
	Note    string    `json:"note,omitzero"` // what changed besides the state
	// Revision is that of the record whose write made the entry. The writer cannot know it:
	// the next one fills it in, so in a record it is 0 where it is the record's own.
	Revision uint64 `json:"revision,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Exit is how the main process ended.
type Exit struct {
	Code      int  `json:"code"`            // 128 + signal if a signal ended it
	Signal    int  `json:"signal,omitzero"` // 0 if none did
	OOMKilled bool `json:"oom_killed"`      // any process of the task was killed for want of memory
	TimedOut  bool `json:"timed_out"`       // the deadline ended it

	Unknown Unknown `json:",embed"`
}

// Usage is what the attempt used.
type Usage struct {
	CPUMillis  int64 `json:"cpu_ms"`
	WallMillis int64 `json:"wall_ms"`
	MemoryPeak Size  `json:"memory_peak_bytes"`

	Unknown Unknown `json:",embed"`
}

// LogSum says how much was logged and whether all of it is kept.
type LogSum struct {
	StdoutBytes int64  `json:"stdout_bytes"` // kept
	StderrBytes int64  `json:"stderr_bytes"` // kept
	Truncated   bool   `json:"truncated"`
	Why         string `json:"why,omitzero"` // "limit", "disk_full" or "worker_lost"
	Dropped     int64  `json:"dropped_bytes,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Why a log is not complete.
const (
	LogsLimit      = "limit"       // it reached the limit for logs
	LogsDiskFull   = "disk_full"   // the worker's disk took no more of it
	LogsWorkerLost = "worker_lost" // its end went with its worker
)

// NewRecord is the record of a task that was just accepted. policy gives the
// longest lifetime.
func NewRecord(id TaskID, spec Spec, p Policy, m Meta) Record {
	m = m.tidy()
	r := Record{
		Version: RecordVersion, ID: id, Spec: spec, State: Queued,
		AcceptedAt: m.At, QueuedAt: m.At, TTL: spec.TTL, MaxTTL: max(p.MaxTTL, spec.TTL),
	}
	r.note(m, "accepted")
	return r
}

// Assignment is the current or last assignment.
func (r *Record) Assignment() Assignment {
	return Assignment{Task: r.ID, Attempt: r.Attempt, Worker: r.Worker, Epoch: r.Epoch}
}

// Headers go with the record on the bus, so that views need not decode it.
func (r Record) Headers() map[string][]string {
	h := map[string][]string{HeaderState: {string(r.State)}}
	if r.State.Held() {
		h[HeaderHolder] = []string{string(r.Worker) + " " + string(r.Epoch)}
	}
	if len(r.Blobs) > 0 && !r.State.Final() {
		h[HeaderBlobs] = []string{blobsHeader(r.Blobs)}
	}
	if len(r.Ports()) > 0 {
		h[HeaderPorts] = []string{r.portsHeader()}
	}
	if r.Instance != nil {
		h[HeaderInstance] = []string{r.Instance.Key()}
	}
	if r.State.Final() && r.Spec.Callback != nil {
		h[HeaderCallback] = r.Spec.Callback.header(r.EndedAt)
	}
	return h
}

// TimeLeft is what is left of the TTL at now: all of it before the task first ran, and
// never more than all of it, whatever the clock said by which the task began to run.
func (r *Record) TimeLeft(now time.Time) time.Duration {
	if r.ExpiresAt.IsZero() {
		return r.TTL.Std()
	}
	return max(0, min(r.ExpiresAt.Sub(now), r.ExpiresAt.Sub(r.RunningAt)))
}

// Wrote says whether the record carries the write op: it settles writes whose
// outcome is unknown.
func (r Record) Wrote(op string) bool { return op != "" && slices.Contains(r.LastOps, op) }

// HeldBy says whether worker w held the attempt, so that its logs count.
func (r *Record) HeldBy(w WorkerID, attempt int) bool {
	return slices.ContainsFunc(r.Holders, func(h Holder) bool { return h.Worker == w && h.Attempt == attempt })
}

func (r *Record) note(m Meta, note string) {
	r.History = append(r.History, Change{
		At: m.At, State: r.State, Reason: r.Reason, By: m.By, Attempt: r.Attempt, Worker: r.Worker, Note: note,
	})
	if n := len(r.History); n > MaxHistory { // keep how it began and what came last
		r.Forgotten = max(r.Forgotten, r.History[n-MaxHistory].Revision, 1)
		r.History = slices.Delete(r.History, 1, 1+n-MaxHistory)
	}
	r.op(m)
}

// seal fills in the revision of the entries that the last write made: it is the one
// that this write replaces.
func (r *Record) seal(on uint64) {
	for i := len(r.History) - 1; i >= 0 && r.History[i].Revision == 0; i-- {
		r.History[i].Revision = on
	}
	r.Result = r.Result.sealed(on)
}

// Changes is the history with all revisions, of a record that is at revision.
func (r *Record) Changes(revision uint64) []Change {
	c := Record{History: slices.Clone(r.History)}
	c.seal(revision)
	return c.History
}

// op remembers the write's id.
func (r *Record) op(m Meta) {
	if m.Op != "" {
		r.LastOps = append(r.LastOps, m.Op)
		if n := len(r.LastOps); n > MaxLastOps {
			// The first made the record. Whoever did not hear that it was made finds it here, however
			// much has become of the task since.
			r.LastOps = slices.Delete(r.LastOps, 1, n-MaxLastOps+1)
		}
	}
}

// clone copies what Next may change in place, so that the caller's record stays
// as it was.
func (r Record) clone() Record {
	r.History = slices.Clone(r.History)
	r.LastOps = slices.Clone(r.LastOps)
	r.Avoid = slices.Clone(r.Avoid)
	r.Holders = slices.Clone(r.Holders)
	return r
}
