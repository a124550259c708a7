// Package poseidon answers the REST API of Poseidon's master, which a CTF platform's
// backend asks to start and to stop the container of a user's challenge:
//
//	POST /start   {user_id, challenge_id, mem_limit, nano_cpus, protocol} → {hostname, …}
//	POST /stop    {user_id, challenge_id}
//
// A user has one container of a challenge: whoever starts it again gets the same.
package poseidon

import (
	"context"
	"net/http"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/shims/shim"
)

// Labels of the tasks.
const (
	labelUser      = "poseidon.user_id"
	labelChallenge = "poseidon.challenge_id"
)

// What Poseidon's numbers become at the least: Docker takes no less memory, and dayfly no
// less of a processor.
const (
	leastCPUs   = schemas.CPUs(0.01)
	defaultMiB  = 256
	startWithin = 2 * time.Minute
)

// StartRequest is the body of POST /start. Image and name of the challenge are one.
type StartRequest struct {
	UserID      string `json:"user_id"`
	ChallengeID string `json:"challenge_id"` // a reference of an image
	MemLimit    *int64 `json:"mem_limit"`    // MiB; 256 if it is not given
	NanoCPUs    *int64 `json:"nano_cpus"`    // billionths of a processor; the site's default if it is not given
	Protocol    string `json:"protocol"`     // "http" or "tcp"
	// Port is where the challenge listens; the one that the image exposes if it is 0.
	Port int `json:"port"`
}

// StopRequest is the body of POST /stop. That of POST /start will do too.
type StopRequest struct {
	UserID      string `json:"user_id"`
	ChallengeID string `json:"challenge_id"`
}

// Instance is the answer: a container of a challenge. Times are seconds since 1970.
type Instance struct {
	InstanceID  string `json:"instance_id"`
	UserID      string `json:"user_id"`
	ChallengeID string `json:"challenge_id"`
	Worker      string `json:"worker"`
	Hostname    string `json:"hostname"`
	Port        int    `json:"port"` // at that host
	URL         string `json:"url"`
	CreatedAt   int64  `json:"created_at"`
	ExpiresAt   int64  `json:"expires_at"`
}

// Outcome says whether a thing was done, and why not.
type Outcome struct {
	Success      bool   `json:"success"`
	ErrorMessage string `json:"error_message,omitzero"`
}

type handler struct{ *shim.Shim }

// New makes the handler.
func New(c *client.Client, cfg shim.Config) http.Handler {
	h := handler{shim.New(c, cfg, shim.Protocol{
		Name: "poseidon",
		Fail: func(w http.ResponseWriter, p shim.Problem) {
			_ = shim.Answer(w, p.Status, Outcome{ErrorMessage: p.Message})
		},
		Fields: map[string]string{"image": "challenge_id", "resources.memory": "mem_limit", "resources.cpus": "nano_cpus", "ports.0.port": "port"},
	})}
	h.Handle("POST /start", h.start)
	h.Handle("POST /stop", h.stop)
	return h
}

func (h handler) start(w http.ResponseWriter, r *http.Request) error {
	var req StartRequest
	if err := shim.Read(w, r, &req); err != nil {
		return err
	}
	name, err := h.name(req.UserID, req.ChallengeID)
	if err != nil {
		return err
	}
	spec, err := h.spec(req)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), startWithin)
	defer cancel()
	t, made, err := name.Ensure(ctx, spec)
	if err == nil {
		t, err = h.reachable(ctx, t, made)
	}
	if err != nil {
		return err
	}
	at := t.Endpoints[0]
	return shim.Answer(w, http.StatusOK, Instance{
		InstanceID: string(t.ID), UserID: req.UserID, ChallengeID: req.ChallengeID, Worker: string(t.Worker),
		Hostname: at.Host, Port: at.Port, URL: at.URL,
		CreatedAt: t.Timings.Accepted.Unix(), ExpiresAt: t.ExpiresAt.Unix(),
	})
}

func (h handler) name(user, challenge string) (shim.One, error) {
	return h.One(map[string]string{labelUser: user, labelChallenge: challenge})
}

func (h handler) spec(req StartRequest) (schemas.Spec, error) {
	spec := h.Spec(map[string]string{labelUser: req.UserID, labelChallenge: req.ChallengeID})
	spec.Image, spec.OnLost = req.ChallengeID, schemas.OnLostWait
	spec.Resources.Memory = defaultMiB << 20
	if req.MemLimit != nil {
		if *req.MemLimit < 6 || *req.MemLimit > 1<<24 {
			return spec, shim.Refuse(http.StatusUnprocessableEntity, "mem_limit: must be MiB, 6 or more")
		}
		spec.Resources.Memory = schemas.Size(*req.MemLimit << 20)
	}
	if req.NanoCPUs != nil {
		if *req.NanoCPUs <= 0 {
			return spec, shim.Refuse(http.StatusUnprocessableEntity, "nano_cpus: must be billionths of a processor, more than 0")
		}
		spec.Resources.CPUs = max(leastCPUs, schemas.CPUs(float64(*req.NanoCPUs)/1e9))
	}
	protocol := schemas.Protocol(req.Protocol)
	switch {
	case protocol != "" && protocol != schemas.ProtocolHTTP && protocol != schemas.ProtocolTCP:
		return spec, shim.Refuse(http.StatusUnprocessableEntity, `protocol: must be "http" or "tcp"`)
	case req.Port != 0:
		spec.Ports = []schemas.Port{{Port: req.Port, Protocol: protocol}}
		// Not the protocol's: an answer before the challenge listens would be of no use.
		spec.Health = &schemas.Health{TCP: &schemas.TCPCheck{Port: req.Port}, Interval: schemas.Duration(time.Minute), StartPeriod: schemas.Duration(startWithin)}
	case protocol == schemas.ProtocolTCP:
		return spec, shim.Refuse(http.StatusUnprocessableEntity, "port: is needed with protocol tcp")
	}
	return spec, nil
}

// reachable waits until the challenge can be reached. One that this call has made and that
// cannot be is ended.
func (h handler) reachable(ctx context.Context, t schemas.Task, made bool) (schemas.Task, error) {
	id := t.ID
	t, err := h.Client.WaitReady(ctx, id)
	problem := shim.Problem{Status: http.StatusBadGateway}
	switch {
	case err != nil && ctx.Err() != nil:
		problem = shim.Refuse(http.StatusGatewayTimeout, "the challenge did not start within %s", schemas.Duration(startWithin))
	case err != nil:
		return t, err
	case t.State.Final():
		problem.Message = "the challenge did not start: " + string(t.State) + " " + string(t.Reason) + " " + t.Message
	case len(t.Endpoints) == 0:
		problem = shim.Refuse(http.StatusUnprocessableEntity, "the image exposes no port: add EXPOSE to it, or give port")
	default:
		return t, nil
	}
	if made {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if _, err := h.Client.Cancel(ctx, id, nil); err != nil {
			return t, err
		}
	}
	return t, problem
}

func (h handler) stop(w http.ResponseWriter, r *http.Request) error {
	var req StopRequest
	if err := shim.Read(w, r, &req, shim.Lenient); err != nil {
		return err
	}
	name, err := h.name(req.UserID, req.ChallengeID)
	if err != nil {
		return err
	}
	_, found, err := name.End(r.Context())
	if err == nil && !found {
		err = shim.Refuse(http.StatusNotFound, "this user has no container of this challenge")
	}
	if err != nil {
		return err
	}
	return shim.Answer(w, http.StatusOK, Outcome{Success: true})
}
