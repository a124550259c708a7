// Package ui draws the pages for people: tasks, one task, workers. It is given what the
// API knows and writes HTML that is complete without scripts; the scripts in assets ask
// for the same page again when something changed and take over what differs, so there
// is one account of how things look, and it is here.
package ui

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/url"
	"path"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// Policy is the Content-Security-Policy of every page: nothing but our own files.
const Policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; " +
	"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

//go:embed *.html
var sources embed.FS

//go:embed assets
var assets embed.FS

// Asset is a file that pages ask for.
type Asset struct {
	Type, Tag string // Content-Type and ETag
	Body      []byte
}

// Assets gives all of them by name.
func Assets() map[string]Asset {
	types := map[string]string{".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
	files, err := assets.ReadDir("assets")
	if err != nil {
		panic(err) // they are part of the program
	}
	all := map[string]Asset{}
	for _, f := range files {
		body, err := assets.ReadFile("assets/" + f.Name())
		if err != nil {
			panic(err)
		}
		sum := sha256.Sum256(body)
		all[f.Name()] = Asset{Type: types[path.Ext(f.Name())], Tag: `"` + base64.RawURLEncoding.EncodeToString(sum[:12]) + `"`, Body: body}
	}
	return all
}

// Frame is what every page has.
type Frame struct {
	Title string
	Nav   string    // tasks or workers
	Now   time.Time // all that is said to be so long ago or to come counts from here
	// Events is the address of a stream of events, each of which may change the page.
	Events string
	Again  time.Duration // the browser asks again after so long, without scripts too; 0: it does not
}

// Tasks is the list.
type Tasks struct {
	Frame
	Counts map[schemas.State]int
	State  string // the filters, as in the address
	Query  string
	List   schemas.TaskList
	First  bool // it begins with the newest
}

// Task is one of them.
type Task struct {
	Frame
	schemas.Task
	Draining bool // its worker is, so it gets no more time
}

// Workers is the fleet.
type Workers struct {
	Frame
	List schemas.WorkerList
}

// Problem is what is shown instead of a page.
type Problem struct {
	Frame
	Detail string
}

// Pages draws.
type Pages struct{ t *template.Template }

// New reads the templates.
func New() (*Pages, error) {
	t, err := template.New("ui").Funcs(template.FuncMap{
		"ago": ago, "short": short, "stamp": stamp, "sentence": sentence, "when": when, "after": func(first, t time.Time) string { return "+" + short(t.Sub(first)) }, "bars": bars,
		"command": command, "size": func(n int64) string { return schemas.Size(n).String() },
		"segments": segments,
		"beat":     func(d schemas.Duration) string { return ago(time.Time{}.Add(d.Std()), time.Time{}) },
	}).ParseFS(sources, "*.html")
	if err != nil {
		return nil, fmt.Errorf("read the templates of the pages: %w", err)
	}
	return &Pages{t}, nil
}

// segments escapes each part of a path, for an address.
func segments(name string) string {
	parts := strings.Split(name, "/")
	for i, p := range parts {
		parts[i] = url.PathEscape(p)
	}
	return strings.Join(parts, "/")
}

// Draw makes the page of a Tasks, Task, Workers or Problem.
func (p *Pages) Draw(page any) ([]byte, error) {
	var b bytes.Buffer
	if err := p.t.ExecuteTemplate(&b, fmt.Sprintf("%T", page), page); err != nil {
		return nil, fmt.Errorf("draw %T: %w", page, err)
	}
	return b.Bytes(), nil
}

// Tab is a choice of states in the list of tasks.
type Tab struct {
	Name, Link string
	Count      int
	Here       bool
}

// Tabs are the choices.
func (p Tasks) Tabs() []Tab {
	tabs := []Tab{}
	for _, choice := range []struct {
		name, states string
		of           []schemas.State
	}{
		{"all", "", schemas.States()},
		{"live", "queued,assigned,starting,running", schemas.States()[:4]},
		{"queued", "queued", []schemas.State{schemas.Queued}},
		{"starting", "assigned,starting", []schemas.State{schemas.Assigned, schemas.Starting}},
		{"running", "running", []schemas.State{schemas.Running}},
		{"completed", "completed", []schemas.State{schemas.Completed}},
		{"failed", "failed", []schemas.State{schemas.Failed}},
		{"canceled", "canceled", []schemas.State{schemas.Canceled}},
		{"expired", "expired", []schemas.State{schemas.Expired}},
	} {
		tab := Tab{Name: choice.name, Link: p.link(choice.states, ""), Here: p.State == choice.states}
		for _, s := range choice.of {
			tab.Count += p.Counts[s]
		}
		tabs = append(tabs, tab)
	}
	return tabs
}

// Newest and Older are the first page and the next one.
func (p Tasks) Newest() string { return p.link(p.State, "") }
func (p Tasks) Older() string  { return p.link(p.State, p.List.NextCursor) }

func (p Tasks) link(state, cursor string) string {
	q := url.Values{}
	for name, value := range map[string]string{"state": state, "q": p.Query, "cursor": cursor} {
		if value != "" {
			q.Set(name, value)
		}
	}
	return (&url.URL{Path: "/ui/", RawQuery: q.Encode()}).String()
}
