package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// query is a checked query string: only known parameters, each once.
type query struct{ values url.Values }

// parseQuery refuses what the operation does not know. Names that end in "*" may come more than
// once. Errors name the parameter and never repeat a value.
func parseQuery(w *response, r *http.Request) (query, error) {
	names := w.names
	if r.URL.RawQuery == "" {
		return query{}, nil
	}
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return query{}, badQuery("", "the query string is not well formed")
	}
	for _, name := range sorted(values) {
		many := slices.Contains(names, name+"*")
		switch {
		case !many && !slices.Contains(names, name):
			return query{}, badQuery(shownName(name), "there is no such parameter here; there are: "+cmp.Or(strings.ReplaceAll(strings.Join(names, ", "), "*", ""), "none"))
		case !many && len(values[name]) > 1:
			return query{}, badQuery(name, "stands there twice")
		}
		for _, v := range values[name] {
			if !utf8.ValidString(v) {
				return query{}, badQuery(name, "is not valid UTF-8")
			}
		}
	}
	return query{values}, nil
}

func sorted(v url.Values) []string {
	names := make([]string, 0, len(v))
	for name := range v {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// shownName is a parameter's name if that can be told from a value gone astray.
func shownName(name string) string {
	if len(name) > 32 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz_-") != "" {
		return ""
	}
	return name
}

func (q query) get(name string) string { return q.values.Get(name) }
func (q query) has(name string) bool   { return q.values.Has(name) }

// flag reads a switch: given without a value it is on.
func (q query) flag(name string) (bool, error) {
	switch v := q.get(name); {
	case !q.has(name), v == "0", v == "false":
		return false, nil
	case v == "", v == "1", v == "true":
		return true, nil
	}
	return false, badQuery(name, "must be 1 or 0")
}

func (q query) number(name string, fallback, least, most int) (int, error) {
	if !q.has(name) {
		return fallback, nil
	}
	v := q.get(name)
	n, err := strconv.Atoi(v)
	if err != nil || len(v) > 10 || n < least || n > most {
		return 0, badQuery(name, "must be a whole number from "+strconv.Itoa(least)+" to "+strconv.Itoa(most))
	}
	return n, nil
}

func (q query) duration(name string, fallback, most time.Duration) (time.Duration, error) {
	if !q.has(name) {
		return fallback, nil
	}
	var d schemas.Duration
	if err := d.UnmarshalText([]byte(q.get(name))); err != nil {
		return 0, badQuery(name, err.Error())
	}
	if d < 0 || d.Std() > most {
		return 0, badQuery(name, "must be 0s to "+schemas.Duration(most).String())
	}
	return d.Std(), nil
}

// patience is what a request waits for: "", "running", "ready" or "done", and how long.
type patience struct {
	until   string
	timeout time.Duration
}

const waitDefault = 30 * time.Second

func (g *Gateway) parsePatience(q query) (patience, error) {
	p := patience{until: q.get("wait")}
	if !q.has("wait") {
		if q.has("timeout") {
			return p, badQuery("timeout", "goes with wait")
		}
		return p, nil
	}
	if p.until != "running" && p.until != "ready" && p.until != "done" {
		return p, badQuery("wait", "must be running, ready or done")
	}
	var err error
	p.timeout, err = q.duration("timeout", waitDefault, 24*time.Hour)
	p.timeout = min(p.timeout, g.cfg.WaitMax)
	return p, err
}

// satisfied says whether a task has come so far. Only a running one is asked whether it is
// ready: that is in the record, and not in its header.
func (p patience) satisfied(s schemas.State, ready func() bool) bool {
	return s.Final() || s == schemas.Running && (p.until == "running" || p.until == "ready" && ready())
}

// checkContentType takes JSON in UTF-8, as it is.
func checkContentType(h http.Header) error {
	wrong := func(detail string) error {
		return &schemas.Error{Status: http.StatusUnsupportedMediaType, Code: schemas.CodeContentType, Detail: detail}
	}
	if e := h.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		return wrong("send the body without a Content-Encoding")
	}
	given := h.Values("Content-Type")
	if len(given) == 1 && given[0] == "application/json" {
		return nil
	}
	if len(given) != 1 {
		return wrong("send Content-Type: application/json")
	}
	kind, params, err := mime.ParseMediaType(given[0])
	if err != nil || kind != "application/json" {
		return wrong("send Content-Type: application/json")
	}
	for name, v := range params {
		if name == "charset" && !strings.EqualFold(v, "utf-8") {
			return wrong("send JSON in UTF-8")
		}
	}
	return nil
}

// readAll reads a body whose length is known or not (-1). What is announced is not
// yet there: only little is set aside for it.
func readAll(r io.Reader, length int64) ([]byte, error) {
	if length < 0 || length > 64<<10 {
		return io.ReadAll(r)
	}
	b := make([]byte, length)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	return b, nil
}

// etag is the revision as an entity tag.
func etag(revision uint64) string { return `"` + strconv.FormatUint(revision, 10) + `"` }

// precondition is an If-Match: the revisions of which a task must have one. nil takes any.
type precondition []string

func parsePrecondition(h http.Header) (precondition, error) {
	var tags precondition
	for _, line := range h.Values("If-Match") {
		for tag := range strings.SplitSeq(line, ",") {
			tag = strings.TrimSpace(tag)
			if tag != "*" && (len(tag) < 3 || len(tag) > 22 || tag[0] != '"' || tag[len(tag)-1] != '"' || strings.Trim(tag[1:len(tag)-1], "0123456789") != "") {
				return nil, badHeader("If-Match", `must be ETags of this task, such as "1234" with its quotes, or *`)
			}
			tags = append(tags, tag)
		}
	}
	return tags, nil
}

var errPrecondition = errors.New("the task is at another revision")

// check gives an error that is errPrecondition where the entry is not at such a revision.
func (p precondition) check(e bus.Entry[record]) error {
	if p == nil || slices.Contains(p, "*") || slices.Contains(p, etag(e.Revision)) {
		return nil
	}
	return fmt.Errorf("%w: %w", errPrecondition, &schemas.Error{Status: http.StatusPreconditionFailed, Code: schemas.CodePrecondition, Field: "If-Match",
		Task: schemas.TaskID(e.Key), State: e.Value.State, Detail: "the task has changed since then; read it again and decide anew"})
}

// matches says whether an If-None-Match names the tag.
func matches(h http.Header, tag string) bool {
	for _, line := range h.Values("If-None-Match") {
		for given := range strings.SplitSeq(line, ",") {
			given = strings.TrimSpace(given)
			if given == "*" || strings.TrimPrefix(given, "W/") == tag {
				return true
			}
		}
	}
	return false
}
