package schemas

import (
	"cmp"
	"time"
)

// Spec is what a client asks for. It never changes once the task is accepted.
// ParseSpec reads one over the defaults; Validate says what is wrong with it.
type Spec struct {
	Image       string            `json:"image"`
	Entrypoint  []string          `json:"entrypoint,omitzero"` // nil: the image's own
	Command     []string          `json:"command,omitzero"`    // nil: the image's own
	Env         map[string]string `json:"env,omitzero"`
	Workdir     string            `json:"workdir,omitzero"`
	User        string            `json:"user,omitzero"` // "1000:1000" (default) or "image"
	Stdin       string            `json:"stdin,omitzero"`
	Files       []File            `json:"files,omitzero"` // placed in /task/input
	Resources   Resources         `json:"resources,omitzero"`
	Tmpfs       map[string]Size   `json:"tmpfs,omitzero"` // further writable places in memory, by path
	ReadOnly    *bool             `json:"read_only,omitzero"`
	CapAdd      []string          `json:"cap_add,omitzero"`
	Mounts      *Mounts           `json:"mounts,omitzero"`
	Ports       []Port            `json:"ports,omitzero"`
	Network     Network           `json:"network,omitzero"`
	Runtime     string            `json:"runtime,omitzero"`
	TTL         Duration          `json:"ttl,omitzero"` // lifetime, from the first "running"
	Timeouts    Timeouts          `json:"timeouts,omitzero"`
	Pull        ImagePolicy       `json:"pull,omitzero"`
	Restart     *Restart          `json:"restart,omitzero"`
	Health      *Health           `json:"health,omitzero"`
	MaxAttempts int               `json:"max_attempts,omitzero"`
	OnLost      OnLost            `json:"on_lost,omitzero"`
	Priority    int               `json:"priority,omitzero"` // 1 (low) to 9 (high); 5 if not given
	Constraints map[string]string `json:"constraints,omitzero"`
	Kind        string            `json:"kind,omitzero"`
	Callback    *Callback         `json:"callback,omitzero"`
	Labels      map[string]string `json:"labels,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Resources bound what a task may use. They are also what placement counts.
type Resources struct {
	CPUs   CPUs `json:"cpus,omitzero"`
	Memory Size `json:"memory,omitzero"` // memory and swap together, tmpfs and output counted in
	Pids   int  `json:"pids,omitzero"`
	Disk   Size `json:"disk,omitzero"` // of /task/output, in memory
	GPUs   int  `json:"gpus,omitzero"`

	Unknown Unknown `json:",embed"`
}

// File is placed in /task/input before the process starts.
type File struct {
	Path    string `json:"path"`
	Content string `json:"content,omitzero"`
	Base64  string `json:"base64,omitzero"`
	Blob    string `json:"blob,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Mounts are other places for the input and output folders.
type Mounts struct {
	Input  string `json:"input,omitzero"`
	Output string `json:"output,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Timeouts bound the phases before and after running; the TTL bounds running.
type Timeouts struct {
	Queue Duration `json:"queue,omitzero"` // waiting for a worker
	Pull  Duration `json:"pull,omitzero"`  // pulling the image
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
	return s.complete(p)
}

// complete fills in what follows from other fields, and checks the spec.
func (s Spec) complete(p Policy) (Spec, error) {
	s.completePorts()
	if s.OnLost == "" {
		s.OnLost = OnLostRequeue
		if len(s.Ports) > 0 {
			s.OnLost = OnLostWait
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
	if errs := s.Validate(p); len(errs) > 0 {
		return Spec{}, InvalidSpec(errs)
	}
	return s, nil
}
