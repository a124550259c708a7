package schemas

import (
	"cmp"
	"time"
)

// Spec is what a client asks for. It never changes once the task is accepted.
// ParseSpec reads one over the defaults; Validate says what is wrong with it.
type Spec struct {
	Image       string            `json:"image,omitzero"`      // needed, save with kind
	Entrypoint  []string          `json:"entrypoint,omitzero"` // nil: the image's own
	Command     []string          `json:"command,omitzero"`    // nil: the image's own
	Env         map[string]string `json:"env,omitzero"`
	Workdir     string            `json:"workdir,omitzero"`
	User        string            `json:"user,omitzero"` // "1000:1000" (default) or "image"
	Stdin       string            `json:"stdin,omitzero"`
	StdinBlob   BlobID            `json:"stdin_blob,omitzero"` // instead of stdin: a blob
	StdinOpen   bool              `json:"stdin_open,omitzero"` // stdin is what clients write that attach to the task
	TTY         bool              `json:"tty,omitzero"`        // the process is on a terminal: all it writes is stdout
	Window      *Window           `json:"window,omitzero"`     // the terminal's size at the start; nil: 24 rows of 80
	Files       []File            `json:"files,omitzero"`      // placed in /task/input
	Secrets     []Secret          `json:"secrets,omitzero"`
	Resources   Resources         `json:"resources,omitzero"`
	Tmpfs       map[string]Size   `json:"tmpfs,omitzero"`     // further writable places in memory, by path
	ReadOnly    *bool             `json:"read_only,omitzero"` // that the image's own folders are; true if not given
	CapAdd      []string          `json:"cap_add,omitzero"`   // such as "SETUID"; only for user "image", and root
	Mounts      *Mounts           `json:"mounts,omitzero"`
	Ports       []Port            `json:"ports,omitzero"`
	Network     Network           `json:"network,omitzero"`
	Runtime     string            `json:"runtime,omitzero"`
	TTL         Duration          `json:"ttl,omitzero"` // lifetime, from the first "running"
	Timeouts    Timeouts          `json:"timeouts,omitzero"`
	Pull        ImagePolicy       `json:"pull,omitzero"`
	Credentials string            `json:"registry_credentials,omitzero"` // a name that workers know; "": what they have for the registry
	Restart     *Restart          `json:"restart,omitzero"`
	Health      *Health           `json:"health,omitzero"`
	MaxAttempts int               `json:"max_attempts,omitzero"`
	OnLost      OnLost            `json:"on_lost,omitzero"`
	Priority    int               `json:"priority,omitzero"` // 1 (low) to 9 (high); 5 if not given
	Constraints map[string]string `json:"constraints,omitzero"`
	Kind        string            `json:"kind,omitzero"`    // a job type of the site, which decides the rest
	Payload     RawJSON           `json:"payload,omitzero"` // with kind, of a request: what the kind makes the task from
	Judge       *Judge            `json:"judge,omitzero"`   // in the place of a command
	Callback    *Callback         `json:"callback,omitzero"`
	Labels      map[string]string `json:"labels,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Resources bound what a task may use. They are also what placement counts.
type Resources struct {
	CPUs   CPUs `json:"cpus,omitzero"`
	Memory Size `json:"memory,omitzero"` // memory and swap together, tmpfs and output counted in
	Pids   int  `json:"pids,omitzero"`
	Disk   Size `json:"disk,omitzero"` // of /task/output, in memory; and of a writable root, where its Docker can bound that
	GPUs   int  `json:"gpus,omitzero"`

	Unknown Unknown `json:",embed"`
}

// File is placed in /task/input before the process starts.
type File struct {
	Path    string `json:"path"`
	Content string `json:"content,omitzero"`
	Base64  string `json:"base64,omitzero"`
	Blob    BlobID `json:"blob,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Mounts are other places for the input and output folders.
type Mounts struct {
	Input  string `json:"input,omitzero"`
	Output string `json:"output,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Where the input and output folders of a task are, unless its mounts say otherwise.
const (
	DefaultInput  = "/task/input"
	DefaultOutput = "/task/output"
)

// InputPath is where the task finds its files.
func (s *Spec) InputPath() string {
	if s.Mounts != nil && s.Mounts.Input != "" {
		return s.Mounts.Input
	}
	return DefaultInput
}

// OutputPath is where the task leaves its artifacts.
func (s *Spec) OutputPath() string {
	if s.Mounts != nil && s.Mounts.Output != "" {
		return s.Mounts.Output
	}
	return DefaultOutput
}

// Timeouts bound the phases before and after running; the TTL bounds running.
type Timeouts struct {
	Queue Duration `json:"queue,omitzero"` // waiting for a worker
	Pull  Duration `json:"pull,omitzero"`  // pulling the image and fetching blobs
	Start Duration `json:"start,omitzero"` // from when its worker begins with it, the image present, to process started
	Stop  Duration `json:"stop"`           // grace between TERM and KILL; 0 is a choice

	Unknown Unknown `json:",embed"`
}

// Restart says when the command runs again in the same container. The pause before a
// run is Backoff, then twice that and so on up to MaxRestartPause; after a run of at
// least RestartCalm times the pause that would follow it, it is Backoff again.
type Restart struct {
	Policy  RestartPolicy `json:"policy,omitzero"`
	Max     int           `json:"max,omitzero"`     // how often; 0 is without limit
	Backoff Duration      `json:"backoff,omitzero"` // 0 is DefaultBackoff

	Unknown Unknown `json:",embed"`
}

// Health is a check that makes a running task ready, or unhealthy. One of HTTP, TCP
// and Exec is given. A run is ready once the check first passes; until then it is made
// more often than each Interval. A run is unhealthy after Retries failures in a row at
// the pace of Interval, the first of them no sooner than Interval and StartPeriod after
// its start; it is then stopped as a failure.
type Health struct {
	HTTP        *HTTPCheck `json:"http,omitzero"`
	TCP         *TCPCheck  `json:"tcp,omitzero"`
	Exec        []string   `json:"exec,omitzero"`     // passes with exit code 0
	Interval    Duration   `json:"interval,omitzero"` // 0 is 10s
	Timeout     Duration   `json:"timeout,omitzero"`  // 0 is 5s
	Retries     int        `json:"retries,omitzero"`  // 0 is 3
	StartPeriod Duration   `json:"start_period,omitzero"`

	Unknown Unknown `json:",embed"`
}

// HTTPCheck passes when a GET of the path is answered with 200 to 399.
type HTTPCheck struct {
	Port int    `json:"port"`
	Path string `json:"path,omitzero"` // "" is "/"

	Unknown Unknown `json:",embed"`
}

// TCPCheck passes when the port takes a connection.
type TCPCheck struct {
	Port int `json:"port"`

	Unknown Unknown `json:",embed"`
}

// Network is what a task may reach.
type Network string

// The network classes.
const (
	NetworkNone     Network = "none"
	NetworkEgress   Network = "egress"
	NetworkInternal Network = "internal"
)

// OnLost says what becomes of a task whose worker was declared lost.
type OnLost string

// The choices of on_lost.
const (
	OnLostRequeue OnLost = "requeue" // another attempt, while there are any
	OnLostFail    OnLost = "fail"
	OnLostWait    OnLost = "wait" // never given to another worker; its own takes it back
)

// RestartPolicy says after which ends the command runs again.
type RestartPolicy string

// The restart policies.
const (
	RestartNever     RestartPolicy = "never"
	RestartOnFailure RestartPolicy = "on_failure" // any exit code but 0, and unhealthy
	RestartAlways    RestartPolicy = "always"
)

// The pauses between runs.
const (
	DefaultBackoff  = time.Second
	MaxRestartPause = time.Minute
	RestartCalm     = 10
)

// Restarts says whether the command may run again at all.
func (s *Spec) Restarts() bool {
	return s.Restart != nil && s.Restart.Policy != "" && s.Restart.Policy != RestartNever
}

// Interactive says whether clients attach to the task's process: it is on a terminal, or
// reads what they write.
func (s *Spec) Interactive() bool { return s.TTY || s.StdinOpen }

// WritableRoot says whether the task may write to the image's own folders.
func (s *Spec) WritableRoot() bool { return s.ReadOnly != nil && !*s.ReadOnly }

// ImagePolicy says when an image is pulled.
type ImagePolicy string

// The choices of pull.
const (
	PullMissing ImagePolicy = "missing"
	PullAlways  ImagePolicy = "always"
	PullNever   ImagePolicy = "never"
)

// DefaultUser is who a task runs as unless it may be the image's user.
const DefaultUser = "1000:1000"

// DefaultSpec is what holds for every field that a client leaves out.
func DefaultSpec() Spec {
	return Spec{
		User:      DefaultUser,
		Resources: Resources{CPUs: 0.5, Memory: 256 << 20, Pids: 256, Disk: 64 << 20},
		Network:   NetworkNone,
		TTL:       Duration(time.Hour),
		Timeouts: Timeouts{
			Queue: Duration(10 * time.Minute), Pull: Duration(10 * time.Minute),
			Start: Duration(time.Minute), Stop: Duration(10 * time.Second),
		},
		Pull:        PullMissing,
		MaxAttempts: 3,
		Priority:    5,
	}
}

// ParseSpec reads a client's JSON over the defaults and checks it. Every error is
// an *Error. A field that is given as zero stays zero, and is refused where zero
// makes no sense; only a missing field gets its default.
func ParseSpec(body []byte, p Policy) (Spec, error) {
	s := DefaultSpec()
	if err := DecodeStrict(body, &s); err != nil {
		return Spec{}, err
	}
	s, err := s.ofKind(p, given(body))
	if err != nil {
		return Spec{}, err
	}
	return s.complete(p)
}

// complete fills in what follows from other fields, and checks the spec.
func (s Spec) complete(p Policy) (Spec, error) {
	s.completePorts()
	if s.OnLost == "" {
		switch {
		case len(s.Ports) > 0:
			s.OnLost = OnLostWait
		case s.Interactive():
			s.OnLost = OnLostFail // nobody would type again what was typed
		default:
			s.OnLost = OnLostRequeue
		}
	}
	if s.Restarts() {
		s.Restart.Backoff = cmp.Or(s.Restart.Backoff, Duration(DefaultBackoff))
	}
	if h := s.Health; h != nil {
		h.Interval = cmp.Or(h.Interval, Duration(10*time.Second))
		h.Timeout = cmp.Or(h.Timeout, Duration(5*time.Second))
		h.Retries = cmp.Or(h.Retries, 3)
		if h.HTTP != nil {
			h.HTTP.Path = cmp.Or(h.HTTP.Path, "/")
		}
	}
	s.Judge = s.Judge.complete(s.Resources.Memory)
	if errs := s.Validate(p); len(errs) > 0 {
		return Spec{}, InvalidSpec(errs)
	}
	return s, nil
}

// CompleteSpec fills in what follows from other fields of a spec that was made, and checks
// it. The error is an *Error.
func CompleteSpec(s Spec, p Policy) (Spec, error) { return s.complete(p) }
