// Package shim is what all shims share: a shim answers another system's HTTP protocol by
// calls of dayfly's own API. It translates, and nothing else. What has to be remembered
// about a task is in its labels, so any number of processes may serve the same shim, over
// any gateways, and each may be killed at any moment.
//
//	s := shim.New(c, cfg, shim.Protocol{Name: "gridx", Fail: fail})
//	s.Handle("POST /jobs", submit)
//	http.Serve(listener, s)
package shim

import (
	"crypto/sha256"
	"crypto/subtle"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

// Config is what an operator says about a shim.
type Config struct {
	// Token is a secret that callers must show, where the protocol has it: as
	// "Authorization: Bearer" if it says nothing else. "": nobody is asked.
	Token string
	// TTL is the lifetime of tasks for which the protocol names none; 0: the site's default.
	TTL time.Duration
	// Hosts are names under which callers reach the shim, beside localhost and addresses.
	Hosts []string
}

// Protocol is what sets one shim apart from the others.
type Protocol struct {
	Name string // also the value of the label "shim" of its tasks
	// Fail writes an error as the protocol has it.
	Fail func(http.ResponseWriter, Problem)
	// Fields are the protocol's names of fields of a spec, so that an error names what the
	// caller wrote.
	Fields map[string]string
	// Shown gives the token that a request shows; nil: that of "Authorization: Bearer".
	// BodyToken says that it is in the body: the handlers check it by Shim.Trusts.
	Shown     func(*http.Request) string
	BodyToken bool
}

// Label is the label of a task that says which shim made it.
const Label = "shim"

// maxInFlight bounds the requests that one shim answers at a time: many of them wait for
// a task to start.
const maxInFlight = 512

// Shim is the handler of one protocol.
type Shim struct {
	Config
	Protocol
	Client *client.Client

	mux      *http.ServeMux
	inFlight chan struct{}
}

// New makes a shim without any path.
func New(c *client.Client, cfg Config, p Protocol) *Shim {
	return &Shim{Config: cfg, Protocol: p, Client: c, mux: http.NewServeMux(), inFlight: make(chan struct{}, maxInFlight)}
}

// Handle adds a path, with its method as in http.ServeMux.
func (s *Shim) Handle(pattern string, h func(http.ResponseWriter, *http.Request) error) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			s.Fail(w, s.Explain(err))
		}
	})
}

// fromElsewhere tells what a browser sends for a page of another site.
var fromElsewhere = http.NewCrossOriginProtection()

// ServeHTTP implements http.Handler.
func (s *Shim) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	select {
	case s.inFlight <- struct{}{}:
		defer func() { <-s.inFlight }()
	default:
		w.Header().Set("Retry-After", "1")
		s.Fail(w, Problem{Status: http.StatusServiceUnavailable, Message: "too many requests at a time; try again"})
		return
	}
	switch {
	case !s.ours(r):
		s.Fail(w, Problem{Status: http.StatusMisdirectedRequest, Message: "this shim does not answer under that name; dayfly shim and dayfly up take more names with --host"})
		return
	case fromElsewhere.Check(r) != nil:
		s.Fail(w, Problem{Status: http.StatusForbidden, Message: "a page of another site asked for this"})
		return
	case !s.BodyToken && !s.Trusts(s.shown(r)):
		s.Fail(w, Problem{Status: http.StatusUnauthorized, Message: "the token is missing or wrong"})
		return
	}
	if _, pattern := s.mux.Handler(r); pattern == "" {
		s.none(w, r)
		return
	}
	s.mux.ServeHTTP(w, r)
}

// none answers a path that is not there, or not with this method.
func (s *Shim) none(w http.ResponseWriter, r *http.Request) {
	var allowed []string
	for _, m := range []string{http.MethodDelete, http.MethodGet, http.MethodPatch, http.MethodPost, http.MethodPut} {
		other := r.Clone(r.Context())
		other.Method = m
		if _, pattern := s.mux.Handler(other); pattern != "" {
			allowed = append(allowed, m)
		}
	}
	if len(allowed) == 0 {
		s.Fail(w, Problem{Status: http.StatusNotFound, Message: "there is no such path in this protocol"})
		return
	}
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	s.Fail(w, Problem{Status: http.StatusMethodNotAllowed, Message: "this path takes " + strings.Join(allowed, ", ")})
}

// ours says whether the name in Host is one of this shim's: any site can let its own name
// lead to an address of ours, and is then the same site to a browser.
func (s *Shim) ours(r *http.Request) bool {
	name := strings.TrimSuffix(strings.ToLower((&url.URL{Host: r.Host}).Hostname()), ".")
	if r.Host == "" || name == "localhost" || slices.Contains(s.Hosts, name) {
		return true
	}
	ip, err := netip.ParseAddr(name)
	if err != nil {
		return false
	}
	local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return ip.Unmap().IsLoopback() || local != nil && ip.Unmap() == local.AddrPort().Addr().Unmap()
}

func (s *Shim) shown(r *http.Request) string {
	if s.Protocol.Shown != nil {
		return s.Protocol.Shown(r)
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

// Trusts says whether a token is the right one, or none is asked for.
func (s *Shim) Trusts(token string) bool {
	if s.Token == "" {
		return true
	}
	a, b := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(s.Token))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

// Spec is a task of this shim with the labels given, lacking all else.
func (s *Shim) Spec(labels map[string]string) schemas.Spec {
	spec := schemas.Spec{TTL: schemas.Duration(s.TTL), Labels: map[string]string{Label: s.Name}}
	for k, v := range labels {
		if v != "" {
			spec.Labels[k] = v
		}
	}
	return spec
}

// Mine says whether a task was made by this shim.
func (s *Shim) Mine(t schemas.Task) bool { return t.Spec.Labels[Label] == s.Name }
