package test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	traces "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// spans is an OpenTelemetry collector that keeps what it is sent.
type spans struct {
	mu   sync.Mutex
	all  map[string]*traces.Span // under mu: by id
	from map[string]string       // under mu: id to service.name
}

func (s *spans) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var req collector.ExportTraceServiceRequest
	if err == nil {
		err = proto.Unmarshal(body, &req)
	}
	if err != nil || r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/x-protobuf" {
		http.Error(w, "not OTLP", http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, rs := range req.ResourceSpans {
		service := ""
		for _, a := range rs.Resource.Attributes {
			if a.Key == "service.name" {
				service = a.Value.GetStringValue()
			}
		}
		for _, ss := range rs.ScopeSpans {
			for _, span := range ss.Spans {
				s.all[string(span.SpanId)], s.from[string(span.SpanId)] = span, service
			}
		}
	}
}

// named gives the spans of one trace by service and name.
func (s *spans) named(trace string) map[string][]*traces.Span {
	s.mu.Lock()
	defer s.mu.Unlock()
	named := map[string][]*traces.Span{}
	for id, span := range s.all {
		if hex.EncodeToString(span.TraceId) == trace {
			name := strings.TrimPrefix(s.from[id], "dayfly-") + ": " + span.Name
			named[name] = append(named[name], span)
		}
	}
	return named
}

// One task is one trace through all services, in which each span stands below what caused
// it, also when all of them are killed while the task runs.
func TestATaskIsOneTrace(t *testing.T) {
	const trace, above = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	got := &spans{all: map[string]*traces.Span{}, from: map[string]string{}}
	to := httptest.NewServer(got)
	defer to.Close()
	announced := make(chan string, 1)
	backend := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case announced <- r.Header.Get("Traceparent"):
		default:
		}
	}))
	defer backend.Close()

	up := newUp(t, "--callback-allow", "127.0.0.1/32")
	up.Env = []string{"OTEL_EXPORTER_OTLP_ENDPOINT=" + to.URL, "OTEL_BSP_SCHEDULE_DELAY=20"}
	s := newSite(t, testImage(t), up)
	body := fmt.Sprintf(`{"image":%q,"command":["sleep","1h"],"ttl":"10m","on_lost":"wait","resources":{"memory":"32MiB"},"callback":{"url":%q}}`, s.image, backend.URL)
	req, err := http.NewRequestWithContext(s.ctx, "POST", up.URL+"/v1/tasks?wait=running", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Traceparent", "00-"+trace+"-"+above+"-01")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(res.Body)
	res.Body.Close()
	var task schemas.Task
	if err := errors.Join(err, schemas.Decode(answer, &task)); err != nil || res.StatusCode != 201 {
		t.Fatalf("%d %s %v", res.StatusCode, answer, err)
	}
	come := func(names ...string) {
		t.Helper()
		err := harness.Poll(s.ctx, func() error {
			named := got.named(trace)
			for _, name := range names {
				if named[name] == nil {
					return fmt.Errorf("no span %q", name)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	const post = "gateway: POST /v1/tasks"
	come(post, "gateway: accept", "gateway: wait", "placer: queued", "placer: order",
		"agent: image", "agent: start", "agent: docker create", "agent: docker start", "agent: report", "reaper: settle")
	if err := up.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := up.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	s.until(task.ID, func(t schemas.Task) bool { return t.State == schemas.Running })
	if err := s.Call(s.ctx, "DELETE", "/v1/tasks/"+string(task.ID)+"?grace=0s", nil, nil); err != nil {
		t.Fatal(err)
	}
	s.ends(task.ID, schemas.Canceled, schemas.ReasonCanceled)
	select {
	case parent := <-announced:
		if !strings.HasPrefix(parent, "00-"+trace+"-") {
			t.Errorf("the callback came with traceparent %q", parent)
		}
	case <-s.ctx.Done():
		t.Fatal("no callback came")
	}
	come("agent: run", "reaper: callback")

	named := got.named(trace)
	ids := map[string]string{string(unhex(t, above)): "the client's"}
	for name, list := range named {
		for _, span := range list {
			ids[string(span.SpanId)] = name
		}
	}
	below := map[string][]string{
		"the client's":  {post},
		post:            {"gateway: accept", "gateway: wait", "placer: queued", "placer: order", "gateway: order", "reaper: order", "reaper: callback"},
		"placer: order": {"agent: image", "agent: start", "agent: run", "agent: report"},
		"agent: start":  {"agent: docker create", "agent: docker start"},
		"agent: report": {"reaper: settle"},
	}
	seen := 0
	for parent, children := range below {
		for _, child := range children {
			for _, span := range named[child] {
				seen++
				if ids[string(span.ParentSpanId)] != parent {
					t.Errorf("%s is below %q, not below %s", child, ids[string(span.ParentSpanId)], parent)
				}
				if span.EndTimeUnixNano < span.StartTimeUnixNano {
					t.Errorf("%s ends before it begins", child)
				}
			}
		}
	}
	if seen != len(ids)-1 {
		t.Errorf("%d spans have a known place, of %d", seen, len(ids)-1)
	}
	for name, n := range map[string]int{post: 1, "gateway: accept": 1, "placer: queued": 1, "placer: order": 1, "agent: start": 1, "agent: run": 1} {
		if len(named[name]) != n {
			t.Errorf("%d spans %q, not %d", len(named[name]), name, n)
		}
	}
	log, err := os.ReadFile(up.Log.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, service := range []string{"gateway", "placer", "agent", "reaper"} {
		found := false
		for line := range strings.Lines(string(log)) {
			found = found || strings.Contains(line, `"service":"`+service+`"`) && strings.Contains(line, `"trace_id":"`+trace+`"`) && strings.Contains(line, string(task.ID))
		}
		if !found {
			t.Errorf("no line of the %s has the trace", service)
		}
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
