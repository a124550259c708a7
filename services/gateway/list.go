package gateway

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/http"
	"slices"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// Limits of a list.
const (
	listDefault = 100
	listMax     = 1000
)

// list is GET /v1/tasks: newest first, from the view. Tasks that come meanwhile stand
// before the first page, so a cursor neither repeats nor skips. Where the filter takes few,
// the page ends early, with a cursor, after ListLook tasks that were looked at.
func (g *Gateway) list(w *response, r *http.Request) error {
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	f, err := parseFilter(q)
	if err != nil {
		return err
	}
	limit, err := q.number("limit", listDefault, 1, listMax)
	if err != nil {
		return err
	}
	after := ""
	if q.has("cursor") {
		if after, err = f.openCursor(q.get("cursor")); err != nil {
			return err
		}
	}
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	page, err := g.tasksFrom(r.Context(), f, after, limit)
	if err != nil {
		return err
	}
	return answer(w, http.StatusOK, page)
}

// tasksFrom is one page of the tasks that the filter takes, from behind the task after on.
func (g *Gateway) tasksFrom(ctx context.Context, f filter, after string, limit int) (schemas.TaskList, error) {
	page := schemas.TaskList{Items: []schemas.Task{}}
	now := time.Now()
	for looked := 0; ; {
		ids := g.index.before(after, min(256, g.cfg.ListLook))
		for _, id := range ids {
			if id < f.since {
				return page, nil
			}
			t, ok, err := g.listed(id, f, now)
			if err != nil {
				return page, err
			}
			if !ok {
				continue
			}
			if len(page.Items) == limit {
				page.NextCursor = f.cursor(string(page.Items[limit-1].ID))
				return page, nil
			}
			page.Items = append(page.Items, t)
		}
		if len(ids) == 0 || ctx.Err() != nil {
			return page, nil
		}
		after = ids[len(ids)-1]
		if looked += len(ids); looked >= g.cfg.ListLook {
			page.NextCursor = f.cursor(after)
			return page, nil
		}
	}
}

// listed gives one task as lists show it, if the filter takes it.
func (g *Gateway) listed(id string, f filter, now time.Time) (t schemas.Task, ok bool, err error) {
	for {
		it, revision, exists := g.tasks.Get(id)
		if !exists || !f.takesState(it.state) {
			return t, false, nil
		}
		b := it.body.Load()
		if b == nil {
			continue // a newer revision is in the view already
		}
		if !f.mayTake(b.raw) {
			return t, false, nil
		}
		rec, err := b.listed()
		if err != nil {
			return t, false, fmt.Errorf("list %s: %w", id, err)
		}
		if !f.takes(rec) {
			return t, false, nil
		}
		return g.present(rec, revision, now), true, nil
	}
}

// filter says which tasks a list shows.
type filter struct {
	states []schemas.State
	labels []label
	worker schemas.WorkerID
	since  string   // the least id; ids begin with the time of their making
	words  []string // each stands in the id or the image; not of the API
	// needles stand in the bytes of every record that the filter takes, so most others
	// are not decoded.
	needles [][]byte
}

// label is one that a task must have: with this value, or with any.
type label struct {
	name, value string
	any         bool
}

func parseFilter(q query) (f filter, err error) {
	for _, list := range q.values["state"] {
		for word := range strings.SplitSeq(list, ",") {
			s := schemas.State(word)
			if !slices.Contains(schemas.States(), s) {
				return f, badQuery("state", "must be of queued, assigned, starting, running, completed, failed, canceled, expired, with commas between")
			}
			f.states = append(f.states, s)
		}
	}
	if len(q.values["label"]) > schemas.MaxLabels {
		return f, badQuery("label", fmt.Sprintf("must be at most %d", schemas.MaxLabels))
	}
	for _, pair := range q.values["label"] {
		l, refused := label{}, badQuery("label", "must be name=value, or a name alone for any value; names have 1 to 63 letters, digits and -_./")
		var valued bool
		l.name, l.value, valued = strings.Cut(pair, "=")
		l.any = !valued
		if !schemas.LabelName(l.name) || len(l.value) > 256 {
			return f, refused
		}
		needle, err := schemas.Encode(map[string]string{l.name: l.value})
		if err != nil {
			return f, refused
		}
		needle = needle[1 : len(needle)-1]
		if l.any {
			needle = needle[:len(needle)-1] // "name":"
		}
		f.labels = append(f.labels, l)
		f.needles = append(f.needles, needle)
	}
	if q.has("created_after") {
		t, err := parseTime("created_after", q.get("created_after"), time.Now())
		if err != nil {
			return f, err
		}
		f.since = string(schemas.FirstTaskID(t))
	}
	if q.has("worker") {
		if f.worker, err = schemas.ParseWorkerID(q.get("worker")); err != nil {
			return f, badQuery("worker", "must be 1 to 63 of a-z, 0-9 and -")
		}
		f.needles = append(f.needles, []byte(`"worker":"`+string(f.worker)+`"`))
	}
	return f, nil
}

func (f filter) takesState(s schemas.State) bool {
	return len(f.states) == 0 || slices.Contains(f.states, s)
}

func (f filter) mayTake(raw []byte) bool {
	for _, needle := range f.needles {
		if !bytes.Contains(raw, needle) {
			return false
		}
	}
	return true
}

func (f filter) takes(r schemas.Record) bool {
	return (f.worker == "" || r.Worker == f.worker) && f.takesState(r.State) && f.takesLabels(r.Spec.Labels) &&
		!slices.ContainsFunc(f.words, func(word string) bool {
			return !strings.Contains(string(r.ID), word) && !strings.Contains(r.Spec.Image, word)
		})
}

func (f filter) takesLabels(labels map[string]string) bool {
	for _, l := range f.labels {
		if v, ok := labels[l.name]; !ok || !l.any && v != l.value {
			return false
		}
	}
	return true
}

// cursor is the place after a task in the list of this filter, opaque to clients.
func (f filter) cursor(id string) string {
	return base64.RawURLEncoding.EncodeToString(binary.BigEndian.AppendUint32([]byte(id), f.sum(id)))
}

func (f filter) openCursor(c string) (id string, err error) {
	refused := badQuery("cursor", "must be next_cursor of the page before, with the same filters")
	if len(c) > 64 {
		return "", refused
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(c)
	if err != nil || len(b) < 4 {
		return "", refused
	}
	id = string(b[:len(b)-4])
	if _, err := schemas.ParseTaskID(id); err != nil || binary.BigEndian.Uint32(b[len(b)-4:]) != f.sum(id) {
		return "", refused
	}
	return id, nil
}

// sum tells a cursor of this filter from any other text. It is no secret.
func (f filter) sum(id string) uint32 {
	h := fnv.New32a()
	fmt.Fprintf(h, "list 3 %s %q %v %q %q", id, f.states, f.labels, f.worker, f.words)
	return h.Sum32()
}
