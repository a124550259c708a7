package schemas

import "time"

// Want is what an order asks of a worker.
type Want string

// The wishes. Each replaces the one before it.
const (
	WantRun   Want = "run"   // hold the attempt: start it, or keep it running
	WantStop  Want = "stop"  // let no process of it be left, then report
	WantClose Want = "close" // the report is settled: forget all but the attempt's number
)

// Order is what a worker shall make true for one task. It is cumulative: only the
// newest counts, and a worker ignores one of an older revision.
type Order struct {
	Assignment
	Revision   uint64   `json:"revision"` // of the record that it was made from
	Want       Want     `json:"want"`
	Restarts   int      `json:"restarts,omitzero"`   // as the record has it
	RestartTo  int      `json:"restart_to,omitzero"` // with run: while there were fewer restarts, the command runs again
	Extensions int      `json:"extensions,omitzero"`
	TimeLeft   Duration `json:"time_left,omitzero"` // until the deadline; clocks of two machines are never compared
	Counting   bool     `json:"counting,omitzero"`  // the deadline stands: TimeLeft counts from now, not from the start of the process
	Grace      Duration `json:"grace,omitzero"`     // with stop
	Expired    bool     `json:"expired,omitzero"`   // with stop: its time is over, and no client asked
	Spec       *Spec    `json:"spec,omitzero"`      // with run
	// Image is the one to run, whatever the spec's name for it means by now; nil until it
	// was resolved.
	Image *Resolved `json:"image,omitzero"`

	Blobs []BlobUse `json:"blobs,omitzero"` // with run: those that the spec names

	Unknown Unknown `json:",embed"`
}

// NewOrder is the order that follows from a record: run it while a worker holds
// it, stop it once a client canceled it or its time is over, close it when it is
// final or has moved on. a says which attempt the order is for.
func NewOrder(r Record, revision uint64, a Assignment, now time.Time) Order {
	o := Order{Assignment: a, Revision: revision, Want: WantClose}
	if a != r.Assignment() || !r.State.Held() {
		return o
	}
	o.Restarts, o.RestartTo, o.Extensions = r.Restarts, r.RestartTo, r.Extensions
	switch {
	case r.Cancel != nil:
		o.Want, o.Grace = WantStop, r.Cancel.Grace
	case !r.ExpiresAt.IsZero() && !now.Before(r.ExpiresAt):
		o.Want, o.Grace, o.Expired = WantStop, r.Spec.Timeouts.Stop, true
	default:
		spec := r.Spec.revealed()
		spec.Callback = nil // no worker learns a secret that it does not need
		o.Want, o.Spec, o.Blobs = WantRun, &spec, r.Blobs
		if r.ImageID != "" {
			o.Image = &Resolved{ID: r.ImageID, Digest: r.ImageDigest}
		}
		o.TimeLeft, o.Counting = Duration(r.TimeLeft(now)), !r.ExpiresAt.IsZero()
	}
	return o
}

// Phase is how far an attempt has come, as its worker says it.
type Phase string

// The phases, in their order.
const (
	PhaseAccepted Phase = "accepted" // the worker has it: pulling, creating
	PhaseRunning  Phase = "running"  // the process was started
	PhaseEnded    Phase = "ended"    // no process is left, or ever will be
)

func (p Phase) rank() int {
	switch p {
	case PhaseAccepted:
		return 1
	case PhaseRunning:
		return 2
	case PhaseEnded:
		return 3
	}
	return 0
}

// EndedBy says who ended an attempt.
type EndedBy string

// Who ended it.
const (
	EndedItself   EndedBy = "itself"    // the process ended, or the task's own fault kept it from starting
	EndedStop     EndedBy = "stop"      // we stopped it because an order said so
	EndedDeadline EndedBy = "deadline"  // its time was over
	EndedPermit   EndedBy = "permit"    // it was killed because the worker's permit was over
	EndedGaveBack EndedBy = "gave_back" // the worker could not run it; nothing was started
	EndedLost     EndedBy = "lost"      // its container was killed or taken away by somebody else
)

// Report is what a worker says is true of one attempt. It is cumulative: the
// newest says all, and it may come late, twice or out of order.
type Report struct {
	Assignment
	Phase    Phase        `json:"phase"`
	Restarts int          `json:"restarts,omitzero"`
	Revision uint64       `json:"revision,omitzero"` // of the newest order handled
	Applied  int          `json:"applied,omitzero"`  // extensions carried out
	RanFor   Duration     `json:"ran_for,omitzero"`  // since the process was started, at sending
	Ran      bool         `json:"ran,omitzero"`      // the process was started at all
	Ready    bool         `json:"ready,omitzero"`    // the present run has passed its health check
	Last     *Exit        `json:"last,omitzero"`     // how the run before the present one ended
	Port     int          `json:"port,omitzero"`     // with running: the lowest TCP port that the image exposes, if the spec names none
	Progress string       `json:"progress,omitzero"` // with accepted
	Pull     *Pull        `json:"pull,omitzero"`     // with accepted, while the image is pulled
	Judge    *JudgeResult `json:"judge,omitzero"`    // of a judge: what has come of it so far
	// Image is which image it is, once that is known.
	Image *Resolved `json:"image,omitzero"`
	End   *End      `json:"end,omitzero"` // with ended

	Unknown Unknown `json:",embed"`
}

// End is how an attempt ended.
type End struct {
	By      EndedBy `json:"by"`
	Reason  Reason  `json:"reason,omitzero"`
	Message string  `json:"message,omitzero"`
	Exit    *Exit   `json:"exit,omitzero"`
	Usage   Usage   `json:"usage,omitzero"`
	Stdout  string  `json:"stdout,omitzero"`
	Stderr  string  `json:"stderr,omitzero"`
	Logs    LogSum  `json:"logs,omitzero"`

	Artifacts   []Artifact   `json:"artifacts,omitzero"` // the first of them
	ArtifactSum *ArtifactSum `json:"artifact_sum,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Beat is a worker's heartbeat, the value of its key in the bucket "workers".
// Only the worker writes it, by compare-and-set; and the reaper, once, to say
// that the worker is lost.
type Beat struct {
	Worker   WorkerID  `json:"worker"`
	Epoch    Epoch     `json:"epoch"`
	Instance string    `json:"instance"` // a random id of the agent's process
	Sequence uint64    `json:"sequence"`
	At       time.Time `json:"at"` // by the worker's clock: for people only
	Version  string    `json:"version"`
	Since    time.Time `json:"since"` // when the agent registered, by its clock
	Host     Host      `json:"host"`

	Running int    `json:"running"`        // attempts with a container
	Order   uint64 `json:"order,omitzero"` // stream sequence of the newest order handled
	// Reported says that everything it took back from an earlier agent has been reported.
	// Kept names the tasks of earlier epochs that are still with it; once Reported is
	// true, a task of an earlier epoch that is not among them is gone.
	Reported bool     `json:"reported"`
	Kept     []TaskID `json:"kept,omitzero"`

	// Images are names (see ImageName) of images that it has, those used last first.
	Images []string   `json:"images,omitzero"`
	Cache  ImageCache `json:"image_cache,omitzero"`
	// Wanted is the revision of the WantedImages that it has read last, and Missing what it
	// lacks of those.
	Wanted  uint64         `json:"wanted,omitzero"`
	Missing []MissingImage `json:"missing,omitzero"`
	// Unnamed is how many more it lacks, for which Missing has no room.
	Unnamed int  `json:"missing_unnamed,omitzero"`
	Load    Load `json:"load,omitzero"`

	Blobs BlobFilter `json:"blobs,omitzero"` // what is in its cache

	// LostAt is the reaper's verdict. A worker that reads it on its own key ends all
	// that it runs and registers anew.
	LostAt time.Time `json:"lost_at,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Lost says whether the reaper has declared this registration lost.
func (b *Beat) Lost() bool { return !b.LostAt.IsZero() }

// Host is what a worker's machine offers to tasks.
type Host struct {
	OS     string            `json:"os"`
	Arch   string            `json:"arch"` // as Go names it: amd64, arm64
	CPUs   CPUs              `json:"cpus"`
	Memory Size              `json:"memory_bytes"`
	Slots  int               `json:"slots"` // tasks at a time
	GPUs   int               `json:"gpus,omitzero"`
	Cache  Size              `json:"blob_cache_bytes,omitzero"` // the most that blobs may take there; 0: it takes none
	Labels map[string]string `json:"labels,omitzero"`
	Kinds  []string          `json:"kinds,omitzero"` // the only tasks that it takes; nil: all, of any kind and of none
	// Credentials are the names of the registry credentials that it has.
	Credentials []string `json:"registry_credentials,omitzero"`
	Engine      string   `json:"engine,omitzero"`  // such as "docker 20.10.24"
	Runtime     string   `json:"runtime,omitzero"` // such as "runc 1.1.5"

	Unknown Unknown `json:",embed"`
}

// Load is what the machine is doing, for people and for placement.
type Load struct {
	CPU    float64 `json:"cpu,omitzero"` // 0 to 1, over the last beat
	Memory Size    `json:"memory_bytes,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Drain says that a worker takes nothing new.
type Drain struct {
	Since time.Time `json:"since"`
	By    string    `json:"by"`
}

// IdempotencyEntry remembers which task a key made.
type IdempotencyEntry struct {
	Fingerprint string    `json:"fingerprint"` // of the request's body, by the site's key
	Task        TaskID    `json:"task,omitzero"`
	Batch       BatchID   `json:"batch,omitzero"`
	At          time.Time `json:"at"`
}

// Leadership is the lease by which one replica of a service leads.
type Leadership struct {
	Holder string   `json:"holder"` // identity of the replica
	Term   uint64   `json:"term"`   // grows with each new holder
	Beat   uint64   `json:"beat"`   // grows with each renewal
	Length Duration `json:"length"` // how long others wait after the last change that they saw
}

// Why says why a queued task waits.
type Why struct {
	Task     TaskID         `json:"task"`
	Position int            `json:"position"` // 1 is next; 0 if it is not in the queue
	Summary  string         `json:"summary"`  // one sentence for people
	Workers  []WhyNotWorker `json:"workers,omitzero"`
}

// WhyNotWorker says which filter kept a task from a worker.
type WhyNotWorker struct {
	Worker WorkerID `json:"worker"`
	Filter string   `json:"filter"`
	Detail string   `json:"detail"`
}

// Stream is one of a task's two output streams.
type Stream string

// The streams.
const (
	Stdout Stream = "stdout"
	Stderr Stream = "stderr"
)

// MaxLogChunk is the most bytes of a log in one message.
const MaxLogChunk = 64 << 10

// Headers of messages. A log chunk's body is the bytes themselves.
const (
	HeaderState    = "S"              // on a record: its state, so that views need not decode
	HeaderHolder   = "H"              // on a record that a worker holds: "<worker> <epoch>"
	HeaderCallback = "C"              // on a final record that announces its end: since when, and to which host
	HeaderBlobs    = "B"              // on what is not over and names blobs, a record or a batch: see ParseBlobsHeader
	HeaderPorts    = "P"              // on the record of a task with ports: see ParsePortsHeader
	HeaderInstance = "I"              // on the record of an instance: its key in the bucket "instances"
	HeaderAttempt  = "Dayfly-Attempt" // on a log chunk
	HeaderStream   = "Dayfly-Stream"  // on a log chunk: stdout or stderr
	HeaderOffset   = "Dayfly-Offset"  // on a log chunk: of its first byte in its stream
	HeaderTime     = "Dayfly-Time"    // on a log chunk: when it was read, RFC 3339, by the worker's clock
)
