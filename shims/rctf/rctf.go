// Package rctf answers the protocol by which rCTF asks its Docker instancer for a team's
// instance of a challenge: one path, /v1/instances/, and four methods.
//
//	POST    what is there    PUT  start one    PATCH  more time    DELETE  stop it
//
// All that is needed comes with each request, so an event moves here by its apiUrl. A team
// has one instance of a challenge.
package rctf

import (
	"context"
	"errors"
	"net/http"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/shims/shim"
)

// Labels of the tasks.
const (
	labelTeam      = "rctf.teamId"
	labelChallenge = "rctf.challengeIntegrationId"
)

// Status of an instance.
type Status string

// The statuses.
const (
	Stopped  Status = "stopped"
	Starting Status = "starting"
	Running  Status = "running"
	Stopping Status = "stopping"
	Errored  Status = "errored"
)

// Form is the body of every request.
type Form struct {
	Kind        string `json:"kind"`
	Token       string `json:"rctfAuthToken"`
	TeamID      string `json:"teamId"`
	ChallengeID string `json:"challengeIntegrationId"`

	// With PUT and PATCH.
	TimeoutMilliseconds int64 `json:"timeoutMilliseconds"`

	// With PUT.
	Config Config   `json:"config"`
	Expose []Expose `json:"expose"`
	Flags  []Flag   `json:"flags"`
}

// Expose is a port that players reach.
type Expose struct {
	Kind          string `json:"kind"` // http, https, tcp or tcp-ssl
	HostPrefix    string `json:"hostPrefix"`
	ContainerName string `json:"containerName"` // of a service
	ContainerPort int    `json:"containerPort"`
	Title         string `json:"title"`
}

// Flag is a flag of the team.
type Flag struct {
	Provider string `json:"provider"`
	Flag     string `json:"flag"`
}

// Details is the answer.
type Details struct {
	Kind      string      `json:"kind"` // instancerInstanceDetails
	Status    Status      `json:"status"`
	TimeLeft  *int64      `json:"timeLeftMilliseconds"`
	Endpoints *[]Endpoint `json:"endpoints"` // in the order of expose; null if there is no instance
}

// Endpoint is where a port is reached.
type Endpoint struct {
	Kind string `json:"kind"`
	Host string `json:"host"`
	Port int    `json:"port"`
}

// Failure is an error.
type Failure struct {
	Kind    string `json:"kind"` // instancerError
	Message string `json:"message"`
}

type handler struct{ *shim.Shim }

// New makes the handler.
func New(c *client.Client, cfg shim.Config) http.Handler {
	h := handler{shim.New(c, cfg, shim.Protocol{
		Name: "rctf", BodyToken: true,
		Fail: func(w http.ResponseWriter, p shim.Problem) {
			_ = shim.Answer(w, p.Status, Failure{"instancerError", p.Message})
		},
		Fields: fields,
	})}
	for _, path := range []string{" /v1/instances/{$}", " /v1/instances"} {
		h.Handle("POST"+path, h.get)
		h.Handle("PUT"+path, h.start)
		h.Handle("PATCH"+path, h.extend)
		h.Handle("DELETE"+path, h.stop)
	}
	return h
}

// read reads a form and finds whose instance it is about.
func (h handler) read(w http.ResponseWriter, r *http.Request) (f Form, one shim.One, err error) {
	if err = shim.Read(w, r, &f, shim.Lenient); err != nil {
		return f, one, err
	}
	if !h.Trusts(f.Token) {
		return f, one, shim.Refuse(http.StatusUnprocessableEntity, "Invalid token")
	}
	one, err = h.One(map[string]string{labelTeam: f.TeamID, labelChallenge: f.ChallengeID})
	return f, one, err
}

func (h handler) get(w http.ResponseWriter, r *http.Request) error {
	_, one, err := h.read(w, r)
	if err != nil {
		return err
	}
	t, found, err := one.Newest(r.Context())
	if err != nil {
		return err
	}
	d := stopped()
	if found {
		d = details(t)
	}
	return shim.Answer(w, http.StatusOK, d)
}

func (h handler) start(w http.ResponseWriter, r *http.Request) error {
	f, one, err := h.read(w, r)
	if err != nil {
		return err
	}
	spec, err := h.spec(f)
	if err != nil {
		return err
	}
	t, made, err := one.Ensure(r.Context(), spec)
	if err == nil && !made {
		err = shim.Refuse(http.StatusBadRequest, "Instance already exists, stop it first")
	}
	if err != nil {
		return err
	}
	return shim.Answer(w, http.StatusOK, details(t))
}

func (h handler) extend(w http.ResponseWriter, r *http.Request) error {
	f, one, err := h.read(w, r)
	if err != nil {
		return err
	}
	ttl, err := timeout(f)
	if err != nil {
		return err
	}
	t, found, err := one.Newest(r.Context())
	switch {
	case err != nil:
		return err
	case !found || t.State.Final():
		return notFound()
	}
	if t, err = h.Client.Extend(r.Context(), t.ID, ttl); err != nil {
		return err
	}
	return shim.Answer(w, http.StatusOK, details(t))
}

// stopWithin bounds the wait for the end of an instance. One that takes longer is shown as
// stopping.
const stopWithin = 20 * time.Second

func (h handler) stop(w http.ResponseWriter, r *http.Request) error {
	_, one, err := h.read(w, r)
	if err != nil {
		return err
	}
	t, found, err := one.Newest(r.Context())
	switch {
	case err != nil:
		return err
	case !found || t.State.Final() && t.State != schemas.Failed:
		return notFound()
	}
	if t, err = h.Client.Cancel(r.Context(), t.ID, nil); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), stopWithin)
	defer cancel()
	if t, err = h.Client.Wait(ctx, t.ID); err != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return err
	}
	d := stopped()
	if err != nil {
		d.Status = Stopping
	}
	return shim.Answer(w, http.StatusOK, d)
}

func notFound() error { return shim.Refuse(http.StatusNotFound, "Instance not found") }

func stopped() Details { return Details{Kind: "instancerInstanceDetails", Status: Stopped} }

// details shows a task as an instance.
func details(t schemas.Task) Details {
	d := stopped()
	switch {
	case t.State == schemas.Failed:
		d.Status = Errored
	case t.State.Final():
	case t.Cancel != nil:
		d.Status = Stopping
	case t.Ready:
		d.Status = Running
	default:
		d.Status = Starting
	}
	if t.State.Final() {
		return d
	}
	left := t.SecondsLeft * 1000
	if t.ExpiresAt.IsZero() { // its time begins when it runs
		left = t.Spec.TTL.Std().Milliseconds()
	}
	d.TimeLeft = &left
	list := []Endpoint{}
	for _, e := range t.Endpoints {
		one := Endpoint{Kind: "tcp", Host: e.Host, Port: e.Port}
		if e.Protocol != schemas.ProtocolTCP {
			one.Kind = scheme(e.URL)
		}
		list = append(list, one)
	}
	d.Endpoints = &list
	return d
}
