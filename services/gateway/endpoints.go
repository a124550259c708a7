package gateway

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// EndpointAddress says how clients reach the ports of tasks.
type EndpointAddress struct {
	Scheme string // http or https
	Domain string // hostnames are LABEL.Domain; TCP ports are at the domain itself
	Port   int
}

// ParseEndpointURL reads "https://*.tasks.example" or "http://*.localhost:8081".
func ParseEndpointURL(s string) (EndpointAddress, error) {
	bad := errors.New("must be http:// or https:// and a domain after *., such as https://*.tasks.example or http://*.localhost:8081")
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return EndpointAddress{}, bad
	}
	domain, ok := strings.CutPrefix(strings.ToLower(u.Hostname()), "*.")
	if !ok || domain == "" || len(domain) > 253-schemas.LabelBytes-1 ||
		strings.Trim(domain, "abcdefghijklmnopqrstuvwxyz0123456789-.") != "" || strings.HasPrefix(domain, ".") || strings.HasSuffix(domain, ".") {
		return EndpointAddress{}, bad
	}
	a := EndpointAddress{Scheme: u.Scheme, Domain: domain, Port: 80}
	if a.Scheme == "https" {
		a.Port = 443
	}
	if p := u.Port(); p != "" {
		if a.Port, err = strconv.Atoi(p); err != nil || a.Port < 1 || a.Port > 65535 {
			return EndpointAddress{}, bad
		}
	}
	return a, nil
}

func (a EndpointAddress) url(host string) string {
	if a.Scheme == "http" && a.Port == 80 || a.Scheme == "https" && a.Port == 443 {
		return a.Scheme + "://" + host
	}
	return fmt.Sprintf("%s://%s:%d", a.Scheme, host, a.Port)
}

// endpoints knows which port of which task a hostname stands for.
type endpoints struct {
	at     EndpointAddress
	loaded chan struct{} // closed once key is there
	key    schemas.HostnameKey

	mu     sync.RWMutex
	labels map[string]endpoint // under mu: as long as their records are in the view
	news   chan struct{}       // under mu: closed when a label comes; nil if nobody waits for one
}

type endpoint struct {
	task schemas.TaskID
	name string
}

func newEndpoints(at EndpointAddress) *endpoints {
	return &endpoints{at: at, loaded: make(chan struct{}), labels: map[string]endpoint{}}
}

// load gets the key of the site, which is made if there is none.
func (e *endpoints) load(ctx context.Context, conn *bus.Conn) error {
	secret := make([]byte, schemas.HostnameKeyBytes)
	_, _ = rand.Read(secret)
	key, err := firstOf(ctx, bus.NewTable(conn, schemas.BucketKeys, bus.JSON[schemas.HostnameKey](nil)), schemas.KeyHostnames, schemas.HostnameKey{Secret: secret})
	if err != nil {
		return err
	}
	e.key = key
	close(e.loaded)
	return nil
}

// label is the first label of the hostname of a port of a task. That of an instance, whose
// key is given, does not change when another task comes to be it.
func (e *endpoints) label(id schemas.TaskID, instance, port string) string {
	if instance != "" {
		return e.key.InstanceLabel(instance, port)
	}
	return e.key.Label(id, port)
}

// learn remembers the hostnames of a task.
func (e *endpoints) learn(id schemas.TaskID, it *item) {
	for _, p := range schemas.ParsePortsHeader(it.ports) {
		if p.Protocol == schemas.ProtocolTCP {
			continue
		}
		label := e.label(id, it.instance, p.Name)
		e.mu.Lock()
		if e.labels[label].task <= id { // an instance's hostname is that of its newest task
			e.labels[label] = endpoint{id, p.Name}
		}
		if e.news != nil {
			close(e.news)
			e.news = nil
		}
		e.mu.Unlock()
	}
}

// forget drops those of a task whose record is gone.
func (e *endpoints) forget(id schemas.TaskID, it *item) {
	if it == nil {
		return
	}
	for _, p := range schemas.ParsePortsHeader(it.ports) {
		label := e.label(id, it.instance, p.Name)
		e.mu.Lock()
		if e.labels[label].task == id {
			delete(e.labels, label)
		}
		e.mu.Unlock()
	}
}

// find gives what a label stands for. It waits a moment for one that is not known: another
// gateway may have answered with it just now.
func (e *endpoints) find(ctx context.Context, label string, patience time.Duration) (endpoint, bool) {
	e.mu.RLock()
	p, ok := e.labels[label]
	e.mu.RUnlock()
	if ok {
		return p, true
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		e.mu.Lock()
		p, ok = e.labels[label]
		if !ok && e.news == nil {
			e.news = make(chan struct{})
		}
		news := e.news
		e.mu.Unlock()
		if ok {
			return p, true
		}
		select {
		case <-news:
		case <-timer.C:
			return p, false
		case <-ctx.Done():
			return p, false
		}
	}
}

// of lists the endpoints of a task that is not over.
func (e *endpoints) of(r schemas.Record) (list []schemas.Endpoint) {
	if r.State.Final() {
		return nil
	}
	instance := ""
	if r.Instance != nil {
		instance = r.Instance.Key()
	}
	for _, p := range r.Ports() {
		if p.Protocol == schemas.ProtocolTCP {
			if public := r.Public[p.Name]; public != 0 {
				list = append(list, schemas.Endpoint{Name: p.Name, Protocol: p.Protocol, Host: e.at.Domain, Port: public,
					URL: fmt.Sprintf("tcp://%s:%d", e.at.Domain, public)})
			}
			continue
		}
		host := e.label(r.ID, instance, p.Name) + "." + e.at.Domain
		list = append(list, schemas.Endpoint{Name: p.Name, Protocol: p.Protocol, Host: host, Port: e.at.Port, URL: e.at.url(host)})
	}
	return list
}

// present is the task as the API shows it at now.
func (g *Gateway) present(r schemas.Record, revision uint64, now time.Time) schemas.Task {
	t := r.View(revision, now)
	t.Endpoints = g.endpoints.of(r)
	return t
}
