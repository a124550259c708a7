package gateway

import (
	"bytes"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway/ui"
)

// listPage is how many tasks one page shows.
const listPage = 100

// pages are the paths for people. They are no part of the API.
func pages() []operation {
	return []operation{
		{method: "GET", path: "/", handle: root},
		{method: "GET", path: "/ui/", handle: drawn((*Gateway).tasksPage), params: []param{{name: "state", in: "query"}, {name: "q", in: "query"}, {name: "cursor", in: "query"}}},
		{method: "GET", path: "/ui/tasks/{id}", handle: drawn((*Gateway).taskPage)},
		{method: "GET", path: "/ui/workers", handle: drawn((*Gateway).workersPage)},
		{method: "GET", path: assetPath, handle: asset()},
	}
}

const assetPath = "/ui/assets/{name}"

// root sends browsers to the pages.
func root(_ *Gateway, w *response, r *http.Request) error {
	if !strings.Contains(r.Header.Get("Accept"), "text/html") {
		return noPath()
	}
	w.Header().Set("Location", "/ui/")
	w.WriteHeader(http.StatusSeeOther)
	return nil
}

func asset() func(*Gateway, *response, *http.Request) error {
	assets := ui.Assets()
	return func(_ *Gateway, w *response, r *http.Request) error {
		a, ok := assets[r.PathValue("name")]
		if !ok {
			return noPath()
		}
		h := w.Header()
		h.Set("Content-Type", a.Type)
		h.Set("Content-Security-Policy", ui.Policy)
		h.Set("Cache-Control", "no-cache")
		h.Set("ETag", a.Tag)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(a.Body))
		return nil
	}
}

// drawn makes a handler of what gives a page; what goes wrong becomes a page too.
func drawn(of func(*Gateway, *response, *http.Request, ui.Frame) (any, error)) func(*Gateway, *response, *http.Request) error {
	return func(g *Gateway, w *response, r *http.Request) error {
		frame := ui.Frame{Now: time.Now()}
		status := http.StatusOK
		content, err := of(g, w, r, frame)
		if e := (*schemas.Error)(nil); errors.As(err, &e) {
			frame.Title = http.StatusText(e.Status)
			if e.Status == http.StatusServiceUnavailable {
				frame.Again = e.RetryAfter.Std()
			}
			status, content = e.Status, ui.Problem{Frame: frame, Detail: e.Detail}
		} else if err != nil {
			return err
		}
		draw, err := g.ui()
		if err != nil {
			return err
		}
		body, err := draw.Draw(content)
		if err != nil {
			return err
		}
		h := w.Header()
		if frame.Again > 0 {
			h.Set("Retry-After", strconv.Itoa(int(frame.Again.Seconds())))
		}
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Content-Security-Policy", ui.Policy)
		h.Set("Referrer-Policy", "same-origin")
		w.send(status, body)
		return nil
	}
}

func (g *Gateway) tasksPage(w *response, r *http.Request, frame ui.Frame) (any, error) {
	q, err := parseQuery(w, r)
	if err != nil {
		return nil, err
	}
	f, err := parseWords(q)
	if err != nil {
		return nil, err
	}
	after := ""
	if q.has("cursor") {
		if after, err = f.openCursor(q.get("cursor")); err != nil {
			return nil, err
		}
	}
	if err := g.upToDate(r.Context()); err != nil {
		return nil, err
	}
	frame.Title, frame.Nav, frame.Events = "Tasks", "tasks", "/v1/events?after=now"
	p := ui.Tasks{Frame: frame, Counts: g.tally.counts(), State: q.get("state"), Query: q.get("q"), First: after == ""}
	p.List, err = g.tasksFrom(r.Context(), f, after, listPage)
	return p, err
}

// parseWords reads what people type into the filter: each word is label=value,
// worker:name, or a part of an id or image.
func parseWords(q query) (filter, error) {
	values := url.Values{}
	if s := q.get("state"); s != "" {
		values.Set("state", s)
	}
	var words []string
	for word := range strings.FieldsSeq(q.get("q")) {
		if name, ok := strings.CutPrefix(word, "worker:"); ok {
			values.Set("worker", name)
		} else if strings.Contains(word, "=") {
			values.Add("label", word)
		} else {
			words = append(words, word)
		}
	}
	f, err := parseFilter(query{values})
	if err != nil {
		return f, err
	}
	for _, word := range words {
		needle, err := schemas.Encode(word)
		if err != nil {
			return f, badQuery("q", "is not valid UTF-8")
		}
		f.words = append(f.words, word)
		f.needles = append(f.needles, needle[1:len(needle)-1])
	}
	return f, nil
}

func (g *Gateway) taskPage(w *response, r *http.Request, frame ui.Frame) (any, error) {
	id, err := taskID(r)
	if err != nil {
		return nil, err
	}
	if _, err := parseQuery(w, r); err != nil {
		return nil, err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	e, err := g.fetch(ctx, id)
	if err != nil {
		return nil, err
	}
	p := ui.Task{Frame: frame, Task: g.present(e.Value.Record, e.Revision, frame.Now)}
	p.Title, p.Nav = string(p.State)+" "+string(id), "tasks"
	if !p.State.Final() {
		p.Events = "/v1/tasks/" + string(id) + "/events"
	}
	if p.State == schemas.Queued {
		p.Why = g.why(r.Context(), id)
	}
	if p.State.Held() {
		_, _, p.Draining = g.fleet.drains.Get(string(p.Worker))
	}
	return p, nil
}

func (g *Gateway) workersPage(w *response, r *http.Request, frame ui.Frame) (any, error) {
	if _, err := parseQuery(w, r); err != nil {
		return nil, err
	}
	if err := g.upToDate(r.Context()); err != nil {
		return nil, err
	}
	frame.Title, frame.Nav, frame.Events = "Workers", "workers", "/v1/events?after=now"
	return ui.Workers{Frame: frame, List: g.workers(frame.Now)}, nil
}
