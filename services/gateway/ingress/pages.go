package ingress

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"math"
	"net/http"
	"strconv"
	"strings"

	"dayfly.dev/schemas"
)

// codeHeader tells an answer of dayfly's own from one of a task, by the code of the reason.
const codeHeader = "Dayfly-Code"

const style = `:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:20vh auto 0;padding:0 1.5rem}h1{font-size:1.4rem}p{opacity:.75}`

const pageText = `<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
{{with .Again}}<meta http-equiv="refresh" content="{{.}}">
{{end}}<title>{{.Title}}</title>
<style>` + style + `</style>
<h1>{{.Title}}</h1>
<p>{{.Detail}}.{{if .Again}} This page tries again by itself.{{end}}</p>
</html>
`

// pages are what people see where no task answers.
type pages struct {
	text   *template.Template
	policy string
}

func newPages() pages {
	sum := sha256.Sum256([]byte(style))
	return pages{template.Must(template.New("page").Parse(pageText)),
		"default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"}
}

// titles of pages, by code.
var titles = map[schemas.Code]string{
	schemas.CodeNotFound: "Nothing is here", schemas.CodeStarting: "Starting", schemas.CodeEnded: "It is over",
	schemas.CodeNoListener: "Nobody listens", schemas.CodeWorkerAway: "Out of reach", schemas.CodeTooManyRequests: "Too busy",
}

// refuse answers instead of the task: as a page, as a problem or as text, by what is
// accepted.
func (s *Server) refuse(w *response, r *http.Request, err error) {
	var e *schemas.Error
	if !errors.As(err, &e) {
		if r.Context().Err() == nil {
			s.log.Error().Err(err).Msg("ingress failed")
		}
		e = &schemas.Error{Status: http.StatusInternalServerError, Code: schemas.CodeInternal, Detail: "something went wrong on our side"}
	}
	if w.wrote {
		panic(http.ErrAbortHandler)
	}
	s.metrics.Failures.WithLabelValues(string(e.Code)).Inc()
	h := w.Header()
	clear(h)
	h.Set(codeHeader, string(e.Code))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", s.pages.policy)
	h.Set("Referrer-Policy", "no-referrer")
	if w.bodyError() != nil { // what may still come of it is no request
		h.Set("Connection", "close")
	}
	again := int(math.Ceil(e.RetryAfter.Std().Seconds()))
	if again > 0 {
		h.Set("Retry-After", strconv.Itoa(again))
	}
	body := s.pages.draw(h, r, e, again)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(e.Status)
	_, _ = w.Write(body)
	if w.stall > 0 { // what is left would wait for the client without end
		_ = w.FlushError()
	}
}

func (p pages) draw(h http.Header, r *http.Request, e *schemas.Error, again int) []byte {
	title := titles[e.Code]
	if title == "" {
		title = http.StatusText(e.Status)
	}
	accept := strings.ToLower(strings.Join(r.Header["Accept"], ","))
	switch {
	case strings.Contains(accept, "text/html"):
		if r.Method != http.MethodGet {
			again = 0
		}
		var b bytes.Buffer
		err := p.text.Execute(&b, struct {
			Title, Detail string
			Again         int
		}{title, upper(e.Detail), again})
		if err == nil {
			h.Set("Content-Type", "text/html; charset=utf-8")
			return b.Bytes()
		}
	case strings.Contains(accept, "json"):
		if b, err := schemas.Encode(schemas.Error{Status: e.Status, Code: e.Code, Title: title, Detail: e.Detail, RetryAfter: e.RetryAfter}); err == nil {
			h.Set("Content-Type", "application/problem+json")
			return b
		}
	}
	h.Set("Content-Type", "text/plain; charset=utf-8")
	return fmt.Appendf(nil, "%s: %s.\n", title, e.Detail)
}

func upper(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}
