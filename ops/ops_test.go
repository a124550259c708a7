package ops_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"
	"github.com/spf13/pflag"
	"go.uber.org/goleak"

	"dayfly.dev/ops"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEnvironmentSetsFlagsThatWereNotGiven(t *testing.T) {
	t.Setenv("DAYFLY_LOG_LEVEL", "warn")
	t.Setenv("DAYFLY_SLOTS", "7")
	fs := pflag.NewFlagSet("x", pflag.ContinueOnError)
	level, slots := fs.String("log-level", "info", "level"), fs.Int("slots", 1, "slots")
	ops.BindEnv(fs, "DAYFLY")
	if !strings.Contains(fs.Lookup("slots").Usage, "DAYFLY_SLOTS") {
		t.Error("the help does not name the variable")
	}
	if err := fs.Parse([]string{"--slots", "3"}); err != nil {
		t.Fatal(err)
	}
	if err := ops.ApplyEnv(fs, "DAYFLY"); err != nil {
		t.Fatal(err)
	}
	if *level != "warn" || *slots != 3 {
		t.Errorf("level %q slots %d, want warn and 3", *level, *slots)
	}
	t.Setenv("DAYFLY_SLOTS", "many")
	fs = pflag.NewFlagSet("x", pflag.ContinueOnError)
	fs.Int("slots", 1, "slots")
	if err := ops.ApplyEnv(fs, "DAYFLY"); err == nil || !strings.Contains(err.Error(), "DAYFLY_SLOTS") {
		t.Errorf("error %v does not name the variable", err)
	}
}

func TestLoggerWritesJSONAndRefusesUnknownLevels(t *testing.T) {
	var b bytes.Buffer
	log, err := ops.NewLogger(&b, "info", "json", "gateway")
	if err != nil {
		t.Fatal(err)
	}
	log.Debug().Msg("hidden")
	log.Info().Str("task", "t-1").Msg("placed")
	var line map[string]string
	if err := json.Unmarshal(b.Bytes(), &line); err != nil {
		t.Fatal(err)
	}
	if line["service"] != "gateway" || line["task"] != "t-1" || !strings.HasSuffix(line["time"], "Z") {
		t.Errorf("line %v", line)
	}
	if _, err := ops.NewLogger(&b, "loud", "json", ""); err == nil {
		t.Error("an unknown level was taken")
	}
	if _, err := ops.NewLogger(&b, "info", "xml", ""); err == nil {
		t.Error("an unknown format was taken")
	}
}

func TestReadyzTellsWhichCheckFails(t *testing.T) {
	health := ops.NewHealth()
	health.Add("disk", func(context.Context) error { return nil })
	health.Add("nats", func(context.Context) error { return errors.New("not connected") })
	srv := httptest.NewServer(ops.Admin(ops.NewRegistry("1", "c"), health, ops.NewHosts(nil)))
	defer srv.Close()
	get := func(path string) (int, string) {
		res, err := srv.Client().Get(srv.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(b)
	}
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, "not connected") {
		t.Errorf("/readyz %d %s", code, body)
	}
	health.Add("nats", func(context.Context) error { return nil })
	if code, _ := get("/readyz"); code != 200 {
		t.Errorf("/readyz %d once all is well", code)
	}
	if code, _ := get("/healthz"); code != 200 {
		t.Errorf("/healthz %d", code)
	}
	if code, body := get("/metrics"); code != 200 || !strings.Contains(body, "dayfly_build_info") {
		t.Errorf("/metrics %d", code)
	}
}

func TestMetricsPassTheLinter(t *testing.T) {
	reg := ops.NewRegistry("1", "c")
	m := ops.NewBusMetrics(reg, "gateway", func() bool { return true }, func() uint64 { return 0 })
	m.Observe("tasks", "get", 0, nil)
	m.Observe("tasks", "conflict", 0, nil)
	for _, service := range []string{"gateway", "placer"} {
		ops.NewViewMetrics(reg, service, func(yield func(string, int, uint64, time.Duration)) { yield("tasks", 3, 1, time.Second) })
	}
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
}

func TestServicesOfOneProcessShareTheCounterOfFinishedTasks(t *testing.T) {
	reg := prometheus.NewRegistry()
	for range 2 {
		ops.TasksFinished(reg).WithLabelValues("canceled", "canceled").Inc()
	}
	if n := testutil.ToFloat64(ops.TasksFinished(reg).WithLabelValues("canceled", "canceled")); n != 2 {
		t.Errorf("%v counted, want 2", n)
	}
	ops.TasksFinished(nil).WithLabelValues("canceled", "canceled").Inc()
}

func TestWhatTheServerComplainsAboutIsALogEvent(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var out bytes.Buffer
	done := make(chan error, 1)
	go func() {
		done <- ops.Serve(ctx, ln, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("oh") }), zerolog.New(&out))
	}()
	if _, err := http.Get("http://" + ln.Addr().String()); err == nil {
		t.Error("a request that panicked was answered")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	var line map[string]string
	if err := json.Unmarshal(out.Bytes(), &line); err != nil {
		t.Fatalf("%v: %s", err, out.Bytes())
	}
	if line["level"] != "warn" || !strings.Contains(line["error"], "panic serving") {
		t.Errorf("line %v", line)
	}
}

func TestServeEndsWithItsContextAndEndsOpenRequests(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	open := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		done <- ops.Serve(ctx, ln, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			close(open)
			<-r.Context().Done()
		}), zerolog.Nop())
	}()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		if res, err := http.Get("http://" + ln.Addr().String()); err == nil {
			res.Body.Close()
		}
		http.DefaultClient.CloseIdleConnections()
	}()
	<-open
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	<-answered
}
