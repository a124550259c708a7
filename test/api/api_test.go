// Package api holds dayfly's HTTP API against what it says of itself: the document at
// /openapi.json is valid OpenAPI 3.1, and every answer is one that it promises.
package api

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
	"github.com/rs/zerolog"

	"dayfly.dev/schemas"
	"dayfly.dev/test/stack"
)

// site is a running dayfly and what its document says.
type site struct {
	testing.TB
	url    string
	doc    *openapi3.T
	router routers.Router
	good   map[string]bool // operations that were seen to succeed
	bad    map[string]bool // and to refuse
}

func start(t *testing.T) *site {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	templates := t.TempDir()
	for name, text := range map[string]string{"web": "image: a\ncommand: [sleep, 1m]\nextensions: 1\nvalues: {flag: {env: FLAG}}\n", "wrong": "image: [\n"} {
		if err := os.WriteFile(filepath.Join(templates, name+".yaml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	st, err := stack.Start(ctx, stack.Options{Dir: t.TempDir(), Templates: templates, Agents: 1, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Stop(); err != nil {
			t.Error(err)
		}
	})
	s := &site{TB: t, url: st.URL, good: map[string]bool{}, bad: map[string]bool{}}
	_, text := s.ask("GET", "/openapi.json", "")
	doc, err := openapi3.NewLoader().LoadFromData(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(ctx); err != nil {
		t.Fatal(err)
	}
	if !doc.IsOpenAPI31OrLater() {
		t.Fatal("not OpenAPI 3.1")
	}
	for _, kind := range []string{"application/x-ndjson", "text/event-stream", "text/html", "application/x-tar"} {
		openapi3filter.RegisterBodyDecoder(kind, openapi3filter.RegisteredBodyDecoder("text/plain"))
	}
	if s.router, err = legacy.NewRouter(doc); err != nil {
		t.Fatal(err)
	}
	s.doc = doc
	return s
}

// ask sends a request and holds the answer against the document, and the request too
// where the answer is one of success.
func (s *site) ask(method, path, body string, header ...string) (*http.Response, []byte) {
	s.Helper()
	request := func() *http.Request {
		req, err := http.NewRequestWithContext(s.Context(), method, s.url+path, strings.NewReader(body))
		if err != nil {
			s.Fatal(err)
		}
		if body != "" {
			req.Header.Set("Content-Type", "application/json")
		}
		for i := 0; i+1 < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		return req
	}
	res, err := http.DefaultClient.Do(request())
	if err != nil {
		s.Fatal(err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		s.Fatal(err)
	}
	if s.router == nil {
		return res, answer
	}
	req := request()
	req.URL.Scheme, req.URL.Host = "", ""
	route, in, err := s.router.FindRoute(req)
	if err != nil {
		s.Fatalf("%s %s: %v", method, path, err)
	}
	options := &openapi3filter.Options{IncludeResponseStatus: true, MultiError: true}
	input := &openapi3filter.RequestValidationInput{Request: req, PathParams: in, Route: route, Options: options}
	if res.StatusCode < 400 {
		s.good[route.Operation.OperationID] = true
		if err := openapi3filter.ValidateRequest(s.Context(), input); err != nil {
			s.Errorf("%s %s %s was taken, but is not what the document takes: %v", method, path, body, err)
		}
	} else {
		s.bad[route.Operation.OperationID] = true
	}
	err = openapi3filter.ValidateResponse(s.Context(), (&openapi3filter.ResponseValidationInput{
		RequestValidationInput: input, Status: res.StatusCode, Header: res.Header, Options: options}).SetBodyBytes(answer))
	if err != nil {
		s.Errorf("%s %s: %d\n%s\nis not what the document promises: %v", method, path, res.StatusCode, answer, err)
	}
	if res.Header.Get("Content-Type") == "application/x-ndjson" {
		s.lines(path, answer)
	}
	return res, answer
}

// lines holds each line of NDJSON against the schema of its kind.
func (s *site) lines(path string, answer []byte) {
	s.Helper()
	kind := "TaskEvent"
	if strings.Contains(path, "/logs") {
		kind = "LogLine"
	}
	for line := range strings.Lines(string(answer)) {
		var v any
		if err := schemas.Decode([]byte(line), &v); err != nil {
			s.Fatal(err)
		}
		if err := s.doc.Components.Schemas[kind].Value.VisitJSON(v, openapi3.EnableJSONSchema2020()); err != nil {
			s.Errorf("%s: %s is no %s: %v", path, line, kind, err)
		}
	}
}

func (s *site) want(status int, method, path, body string, header ...string) (*http.Response, []byte) {
	s.Helper()
	res, answer := s.ask(method, path, body, header...)
	if res.StatusCode != status {
		s.Errorf("%s %s: %d, want %d: %s", method, path, res.StatusCode, status, answer)
	}
	return res, answer
}

func (s *site) create(query, spec string) schemas.Task {
	s.Helper()
	_, answer := s.want(201, "POST", "/v1/tasks"+query, spec)
	var task schemas.Task
	if err := schemas.Decode(answer, &task); err != nil {
		s.Fatal(err)
	}
	return task
}

const none = "/v1/tasks/t-01jd0000000000000000000000"

func TestEveryAnswerIsWhatTheDocumentPromises(t *testing.T) {
	s := start(t)
	done := s.create("?wait=done&timeout=30s", `{"image":"a","command":["echo","hi"],"labels":{"owner":"litmus"},"resources":{"memory":"64MiB","cpus":0.1},"ttl":"5m"}`)
	if done.State != schemas.Completed {
		t.Fatalf("%+v", done)
	}
	failed := s.create("?wait=done", `{"image":"a","command":["exit","3"],"env":{"A":"b"},"files":[{"path":"x","content":"y"}],"tmpfs":{"/cache":4096},"timeouts":{"stop":"0s"}}`)
	running := s.create("?wait=running", `{"image":"a","command":["sleep","5m"],"ttl":"10m"}`)
	waiting := s.create("", `{"image":"a","constraints":{"zone":"nowhere"}}`)
	path := func(task schemas.Task) string { return "/v1/tasks/" + string(task.ID) }

	for _, spec := range []string{`{`, `{"image":"a","image":"b"}`, `{"image":"a","colour":"red"}`, `{"image":1}`, `{}`, `{"image":"a","network":"egress"}`,
		`{"image":"a","ttl":"999h"}`, `{"image":"a","priority":99,"ttl":"0s"}`, `{"image":"a","user":"image"}`, `{"image":"a","resources":{"memory":"lots"}}`,
		`{"image":"a","workdir":"/` + strings.Repeat("x", 60<<10) + `"}`} {
		if res, answer := s.ask("POST", "/v1/tasks", spec); res.StatusCode < 400 {
			t.Errorf("%.80s was taken: %s", spec, answer)
		}
	}
	s.want(201, "POST", "/v1/tasks", `{"image":"a"}`, "Idempotency-Key", "k1")
	s.want(201, "POST", "/v1/tasks", `{"image":"a"}`, "Idempotency-Key", "k1")
	s.want(422, "POST", "/v1/tasks", `{"image":"b"}`, "Idempotency-Key", "k1")
	s.want(400, "POST", "/v1/tasks", `{"image":"b"}`, "Idempotency-Key", "k 1")
	s.want(415, "POST", "/v1/tasks", `{"image":"b"}`, "Content-Type", "text/plain")
	s.want(400, "POST", "/v1/tasks?wait=forever", `{"image":"b"}`)

	for _, query := range []string{"", "?state=completed,failed&state=running", "?label=owner=litmus&label=owner", "?worker=w0000", "?created_after=10m", "?created_after=2026-01-31T12:00:00Z", "?limit=1"} {
		s.want(200, "GET", "/v1/tasks"+query, "")
	}
	for _, query := range []string{"state=done", "label=", "worker=A", "created_after=soon", "limit=0", "cursor=x", "colour=red"} {
		s.want(400, "GET", "/v1/tasks?"+query, "")
	}
	for _, task := range []schemas.Task{done, failed, running, waiting} {
		res, _ := s.want(200, "GET", path(task), "")
		s.want(304, "GET", path(task), "", "If-None-Match", res.Header.Get("ETag"))
	}
	s.want(200, "GET", path(running)+"?wait=done&timeout=1ms", "")
	s.want(400, "GET", path(running)+"?timeout=1ms", "")
	s.want(404, "GET", none, "")

	listening := s.create("?wait=running", `{"image":"a","command":["tcp","7000"],"ttl":"10m","ports":[{"port":8080},{"name":"shell","port":7000,"protocol":"h2c"}]}`)
	ws, _, err := websocket.Dial(t.Context(), s.url+path(listening)+"/tunnel/7000", nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = ws.CloseNow()
	s.instances()
	s.good["openTunnel"] = true // there is nothing to hold against the document
	upgrade := []string{"Connection", "Upgrade", "Upgrade", "websocket", "Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="}
	s.want(502, "GET", path(listening)+"/tunnel/7001", "", upgrade...)
	s.want(409, "GET", path(done)+"/tunnel/7000", "", upgrade...)
	s.want(404, "GET", none+"/tunnel/7000", "", upgrade...)
	s.want(422, "GET", path(listening)+"/tunnel/0", "", upgrade...)
	s.want(400, "GET", path(listening)+"/tunnel/7000", "")
	s.want(403, "GET", path(listening)+"/tunnel/7000", "", append(upgrade, "Origin", "http://evil.example")...)
	s.want(200, "GET", "/v1/ingress/traefik", "")
	s.want(400, "GET", "/v1/ingress/traefik?x=1", "")
	s.want(422, "POST", "/v1/tasks", `{"image":"a","ports":[{"port":1,"protocol":"tcp"}]}`)

	s.want(412, "POST", path(running)+"/extend", `{"ttl":"20m"}`, "If-Match", `"1"`)
	if res, answer := s.ask("POST", path(running)+"/extend", `{"ttl":"20m"}`); res.StatusCode/100 != 2 { // 202 where the worker is slow
		t.Errorf("%d %s", res.StatusCode, answer)
	}
	s.want(409, "POST", path(done)+"/extend", `{"ttl":"20m"}`)
	s.want(422, "POST", path(running)+"/extend", `{"ttl":"0s"}`)
	s.want(404, "POST", none+"/extend", `{"ttl":"20m"}`)

	s.want(412, "POST", path(running)+"/restart", `{}`, "If-Match", `"1"`)
	if res, answer := s.ask("POST", path(running)+"/restart", `{}`); res.StatusCode/100 != 2 { // 202 where the worker is slow
		t.Errorf("%d %s", res.StatusCode, answer)
	}
	s.want(409, "POST", path(done)+"/restart", `{}`)
	s.want(409, "POST", path(waiting)+"/restart", `{}`)
	s.want(422, "POST", path(running)+"/restart", `{"ttl":"20m"}`)
	s.want(404, "POST", none+"/restart", `{}`)

	for _, accept := range []string{"text/plain", "application/x-ndjson", "text/event-stream"} {
		s.want(200, "GET", path(done)+"/logs", "", "Accept", accept)
	}
	s.want(200, "GET", path(done)+"/logs?tail=1&stream=stdout&since=10m&attempt=1&timestamps=1&follow=true", "")
	s.want(400, "GET", path(done)+"/logs?tail=-1", "")
	s.want(400, "GET", path(done)+"/logs", "", "Accept", "text/event-stream", "Last-Event-ID", "x")
	s.want(404, "GET", none+"/logs", "")
	for _, accept := range []string{"application/x-ndjson", "text/event-stream"} {
		s.want(200, "GET", path(done)+"/events", "", "Accept", accept)
		s.want(200, "GET", "/v1/events?follow=0&state=queued,running&label=owner&worker=w0000&after=0", "", "Accept", accept)
	}
	s.want(204, "GET", path(done)+"/events", "", "Last-Event-ID", strconv.FormatUint(done.Revision, 10))
	s.want(204, "GET", "/v1/events?follow=0&after=now", "", "Last-Event-ID", s.newest())
	s.want(404, "GET", none+"/events", "")
	s.want(400, "GET", path(done)+"/events?after=x", "")
	s.want(400, "GET", "/v1/events?after=99999999", "")
	s.want(400, "GET", "/v1/events", "", "Last-Event-ID", "x")

	s.reach(path(running), path(done), none)
	s.data(path(running), path(done), none)
	s.want(412, "DELETE", path(running), "", "If-Match", `"1"`)
	s.want(400, "DELETE", path(running), "", "If-Match", `1`)
	s.want(200, "DELETE", path(running)+"?grace=1s", "")
	s.want(200, "DELETE", path(waiting), "")
	s.want(400, "DELETE", path(waiting)+"?grace=x", "")
	s.want(404, "DELETE", none, "")

	_, answer := s.want(201, "POST", "/v1/batches", `{"template":{"image":"any","command":["exit","0"]},"items":[{},{"name":"two"}]}`)
	var batch schemas.BatchStatus
	if err := schemas.Decode(answer, &batch); err != nil {
		t.Fatal(err)
	}
	b := "/v1/batches/" + string(batch.ID)
	s.want(422, "POST", "/v1/batches", `{"template":{"image":"any"},"items":[{"colour":"red"}]}`)
	s.want(200, "GET", b, "")
	s.want(200, "GET", "/v1/batches?limit=1", "")
	s.want(400, "GET", "/v1/batches?cursor=x", "")
	s.want(200, "GET", b+"/items?limit=1", "")
	s.want(400, "GET", b+"/items?limit=0", "")
	s.want(200, "DELETE", b, "")
	for _, way := range [][2]string{{"GET", ""}, {"DELETE", ""}, {"GET", "/items"}} {
		s.want(404, way[0], "/v1/batches/b-01jd0000000000000000000000"+way[1], "")
	}

	s.want(200, "GET", "/v1/workers", "")
	s.want(400, "GET", "/v1/workers?state=ready", "")
	s.want(200, "GET", "/v1/workers/w0000", "")
	s.want(404, "GET", "/v1/workers/w9", "")
	for _, verb := range []string{"drain", "undrain"} {
		s.want(200, "POST", "/v1/workers/w0000/"+verb, "{}")
		s.want(404, "POST", "/v1/workers/w9/"+verb, "{}")
		s.want(422, "POST", "/v1/workers/w0000/"+verb, `{"x":1}`)
	}
	for _, page := range []string{"/openapi.json", "/docs/"} {
		s.want(200, "GET", page, "")
		s.want(400, "GET", page+"?x=1", "")
	}
	for path, item := range s.doc.Paths.Map() {
		for method, o := range item.Operations() {
			if !s.good[o.OperationID] || !s.bad[o.OperationID] {
				t.Errorf("%s %s: seen to succeed %v, to refuse %v", method, path, s.good[o.OperationID], s.bad[o.OperationID])
			}
		}
	}
}

// newest is the id of the newest event.
func (s *site) newest() string {
	_, answer := s.want(200, "GET", "/v1/events?follow=0", "", "Accept", "text/event-stream")
	id := ""
	for line := range strings.Lines(string(answer)) {
		if v, ok := strings.CutPrefix(line, "id: "); ok {
			id = strings.TrimSpace(v)
		}
	}
	return id
}

// The examples of docs/api.md work as they stand there.
func TestTheExamplesWork(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not here")
	}
	s := start(t)
	s.router = nil
	text, err := os.ReadFile("../../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	var script bytes.Buffer
	script.WriteString("set -eu\n")
	in := false
	for line := range strings.Lines(string(text)) {
		switch {
		case strings.HasPrefix(line, "```"):
			in = line == "```sh\n"
		case in:
			script.WriteString(line)
		}
	}
	cmd := exec.CommandContext(t.Context(), "sh")
	cmd.Stdin = strings.NewReader(strings.ReplaceAll(script.String(), "http://127.0.0.1:8080", s.url))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
