// Package metrics asks a real Prometheus, which scrapes a dayfly at work, every query
// of every dashboard and rule: a query that finds nothing is a name that nobody
// exports, or a label that has another value.
package metrics

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"dayfly.dev/bus/port"
	"dayfly.dev/deploy/grafana"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// patience bounds each wait for a fact.
const patience = 90 * time.Second

func TestEveryQueryFindsData(t *testing.T) {
	bin, err := harness.Binaries(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	s := start(t, ctx, bin)
	lint(t, s.helper.Addrs.Admin)

	loaded, stop := context.WithCancel(ctx)
	var load sync.WaitGroup
	defer load.Wait()
	defer stop()
	load.Go(func() { s.load(loaded) })
	load.Go(func() { s.loseWorker(t, loaded) })

	prom := prometheus(t, ctx, s.admin, s.helper.Addrs.Admin)
	queries := append(panels(), rules(t, ctx, prom)...)
	results := map[string]string{}
	err = harness.Poll(ctx, func() error {
		missing := 0
		for _, q := range queries {
			if results[q.name] == "ok" {
				continue // what once had data need not have it still
			}
			results[q.name] = ask(ctx, prom, q.expr)
			if results[q.name] != "ok" {
				missing++
			}
		}
		if missing > 0 {
			return fmt.Errorf("%d of %d queries find nothing", missing, len(queries))
		}
		return nil
	})
	lint(t, s.admin) // by now with every label
	for _, q := range queries {
		if r := results[q.name]; r != "ok" {
			t.Errorf("%s: %s\n    %s", r, q.name, q.expr)
		} else {
			t.Logf("ok: %s", q.name)
		}
	}
	if err != nil {
		t.Errorf("%v; %s", err, s.up.Tail())
	}
}

// site is a dayfly with Docker, and a second worker whose tasks are only played.
type site struct {
	up     *harness.Up
	admin  string // of up
	helper *harness.Process
	image  string
}

// Labels of the two workers, for constraints.
var onDocker, onHelper = map[string]string{"metrics": "docker"}, map[string]string{"metrics": "helper"}

func start(t *testing.T, ctx context.Context, bin string) *site {
	t.Helper()
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	out, err := exec.CommandContext(ctx, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
		"-subj", "/CN=test", "-addext", "subjectAltName=DNS:*.localhost", "-keyout", key, "-out", cert).CombinedOutput()
	if err != nil {
		t.Fatalf("%v (make setup installs it)\n%s", err, out)
	}
	up, err := harness.New(bin, "--nats", "127.0.0.1:0", "--scale", "0.1", "--worker-label", "metrics=docker", "--callback-allow", "127.0.0.1/32",
		"--ingress-cert", cert, "--ingress-key", key, "--endpoint-url", "https://*.localhost")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{up: up, image: "dayfly-test:" + up.Cluster}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := up.Remove(ctx); err != nil {
			t.Error(err)
		}
		if err := harness.RemoveImage(ctx, s.image); err != nil {
			t.Error(err)
		}
	})
	if err := harness.MakeImage(ctx, s.image); err != nil {
		t.Fatal(err)
	}
	if err := up.Start(ctx); err != nil {
		t.Fatal(err)
	}
	var addrs harness.Addrs
	b, err := os.ReadFile(filepath.Join(up.Dir, "addrs.json"))
	if err == nil {
		err = json.Unmarshal(b, &addrs)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.admin = addrs.Admin
	token, err := exec.CommandContext(ctx, bin, "credentials", "worker", filepath.Join(up.Dir, "data", "credentials.json"), "helper").Output()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "helper.credentials")
	if err := os.WriteFile(file, token, 0o600); err != nil {
		t.Fatal(err)
	}
	s.helper = &harness.Process{Name: "helper", Bin: bin, Dir: dir,
		Args: []string{"agent", "--nats", addrs.NATS, "--credentials", file, "--data", filepath.Join(dir, "helper"),
			"--runtime", "fake", "--scale", "0.1", "--cluster", up.Cluster, "--worker-label", "metrics=helper"},
		Listen: map[string]string{"--admin": "127.0.0.1:0"}}
	t.Cleanup(s.helper.Kill)
	if err := s.helper.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.helper.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) call(ctx context.Context, method, path, key string, in, out any) error {
	return harness.Call(ctx, method, s.up.URL+path, key, in, out)
}

// load does again and again what the panels show, so that each rate has something to
// look at. What it asks for may fail: some of it shall.
func (s *site) load(ctx context.Context) {
	task := func(where map[string]string, command string, ttl time.Duration) schemas.Spec {
		return schemas.Spec{Image: s.image, Command: strings.Fields(command), Constraints: where, TTL: schemas.Duration(ttl)}
	}
	for round := 0; ctx.Err() == nil; round++ {
		var all sync.WaitGroup
		for i, spec := range []schemas.Spec{
			task(onDocker, "echo hi", time.Minute),
			task(onDocker, "exit 3", time.Minute),
			task(onDocker, "leave 1 100", time.Minute), // an artifact
			task(onDocker, "sleep 1m", time.Second),    // reaped at its deadline
			{Image: s.image, Constraints: onDocker, TTL: schemas.Duration(time.Minute), Judge: &schemas.Judge{
				Run: schemas.JudgeStage{Command: []string{"echo", "hi"}}, Tests: []schemas.JudgeTest{{Expected: "hi"}, {Expected: "other"}}}},
			{Image: "127.0.0.1:1/dayfly/none", Constraints: onDocker, TTL: schemas.Duration(time.Minute)},
		} {
			all.Go(func() {
				key := fmt.Sprintf("%d-%d", round, i)
				for range 2 { // the second is a replay
					_ = s.call(ctx, "POST", "/v1/tasks?wait=done&timeout=20s", key, spec, nil)
				}
			})
		}
		all.Go(func() { s.batch(ctx) })
		all.Go(func() { s.reach(ctx, task(onDocker, "sleep 1m", time.Minute)) })
		all.Go(func() {
			_ = s.call(ctx, "POST", "/v1/tasks", "", `{"image": ""}`, nil)
			_ = s.call(ctx, "GET", "/v1/tasks/none", "", nil, nil)
			_ = s.call(ctx, "GET", "/v1/tasks", "", nil, nil)
			s.contend(ctx, task(onDocker, "sleep 2s", time.Minute))
		})
		all.Go(func() {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+s.up.Ingress, nil)
			if err != nil {
				return
			}
			req.Host = strings.Repeat("a", schemas.LabelBytes) + ".localhost"                    // that of no task
			transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} // its own certificate
			defer transport.CloseIdleConnections()
			if res, err := (&http.Client{Transport: transport}).Do(req); err == nil {
				res.Body.Close()
			}
		})
		all.Wait()
	}
}

// batch runs a small batch to its end. Its callback goes to the API itself, which
// refuses it.
func (s *site) batch(ctx context.Context) {
	var b schemas.BatchStatus
	body := fmt.Sprintf(`{"template": {"image": %q, "command": ["echo", "hi"], "constraints": {"metrics": "docker"}, "ttl": "1m"},
		"items": [{}, {}], "callback": {"url": "%s/v1/none"}}`, s.image, s.up.URL)
	if s.call(ctx, "POST", "/v1/batches", "", body, &b) != nil {
		return
	}
	_ = harness.Poll(ctx, func() error {
		err := s.call(ctx, "GET", "/v1/batches/"+string(b.ID), "", nil, &b)
		if err == nil && b.State != schemas.BatchDone {
			err = fmt.Errorf("the batch is %s", b.State)
		}
		return err
	})
}

// reach runs programs in a task and reads a file of it, some of which is refused.
func (s *site) reach(ctx context.Context, spec schemas.Spec) {
	var made schemas.Task
	if s.call(ctx, "POST", "/v1/tasks?wait=running&timeout=20s", "", spec, &made) != nil {
		return
	}
	path := "/v1/tasks/" + string(made.ID)
	_ = s.call(ctx, "POST", path+"/exec", "", `{"command": ["echo", "hi"]}`, nil)
	_ = s.call(ctx, "POST", path+"/exec", "", `{"command": ["none"], "background": true}`, nil) // by the agent
	_ = s.call(ctx, "GET", path+"/files?path=/tmp&list=1", "", nil, nil)
	_ = s.call(ctx, "DELETE", path+"?grace=0s", "", nil, nil)
	_ = s.call(ctx, "GET", path+"?wait=done&timeout=20s", "", nil, nil)
	_ = s.call(ctx, "POST", path+"/exec", "", `{"command": ["echo", "hi"]}`, nil) // by the gateway
}

// contend lets several write one record at once.
func (s *site) contend(ctx context.Context, spec schemas.Spec) {
	var made schemas.Task
	if s.call(ctx, "POST", "/v1/tasks?wait=running&timeout=20s", "", spec, &made) != nil {
		return
	}
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			_ = s.call(ctx, "POST", fmt.Sprintf("/v1/tasks/%s/extend", made.ID), "", fmt.Sprintf(`{"ttl": "%dm"}`, 10+i), nil)
		})
	}
	all.Wait()
}

// loseWorker kills the second worker under a task, which is queued again then and
// canceled in the queue: that must count among the finished tasks. No other task is
// canceled.
func (s *site) loseWorker(t *testing.T, ctx context.Context) {
	var made schemas.Task
	spec := schemas.Spec{Image: "any", Command: []string{"sleep", "1h"}, Constraints: onHelper}
	if err := s.call(ctx, "POST", "/v1/tasks?wait=running&timeout=20s", "", spec, &made); err != nil {
		t.Errorf("start a task on the second worker: %v", err)
		return
	}
	s.helper.Kill()
	path := "/v1/tasks/" + string(made.ID)
	err := harness.Poll(ctx, func() error {
		if err := s.call(ctx, "GET", path, "", nil, &made); err != nil || made.State != schemas.Queued {
			return fmt.Errorf("state %s: %w", made.State, err)
		}
		return nil
	})
	if err == nil {
		err = s.call(ctx, "DELETE", path, "", nil, &made)
	}
	if err != nil && ctx.Err() == nil {
		t.Errorf("cancel a task in the queue: %v", err)
	}
}

var taskID = regexp.MustCompile(`t-[0-9a-z]{26}`)

// lint lets promtool look at what a process exports, and that no task is named there.
func lint(t *testing.T, admin string) {
	t.Helper()
	body, err := get(t.Context(), admin+"/metrics")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "promtool", "check", "metrics")
	cmd.Stdin = bytes.NewReader(body)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics of %s: %v (make setup installs it)\n%s", admin, err, out)
	}
	if id := taskID.Find(body); id != nil {
		t.Errorf("metrics of %s name the task %s: labels without end", admin, id)
	}
}

func get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	return io.ReadAll(res.Body)
}

// prometheus starts one that scrapes the admin ports, and gives its address.
func prometheus(t *testing.T, ctx context.Context, admins ...string) string {
	t.Helper()
	rules, err := filepath.Abs("../../deploy/prometheus/rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	var targets []string
	for _, a := range admins {
		targets = append(targets, strconv.Quote(strings.TrimPrefix(a, "http://")))
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	text := fmt.Sprintf("global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [%q]\nscrape_configs:\n"+
		"  - {job_name: dayfly, static_configs: [{targets: [%s]}]}\n", rules, strings.Join(targets, ", "))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	kept, err := port.Keep("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(kept.Close)
	addr := kept.String()
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("prometheus", "--config.file", config, "--storage.tsdb.path", filepath.Join(dir, "data"), "--web.listen-address", addr, "--log.level", "warn")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v (make setup installs it)", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	err = poll(ctx, func() error {
		_, err := get(ctx, "http://"+addr+"/-/ready")
		return err
	})
	if err != nil {
		said, _ := os.ReadFile(log.Name())
		t.Fatalf("prometheus does not answer: %v\n%s", err, said)
	}
	return "http://" + addr
}

func poll(ctx context.Context, fn func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return harness.Poll(ctx, fn)
}

type query struct{ name, expr string }

// panels lists the queries of all dashboards, their variables filled in.
func panels() (list []query) {
	fill := strings.NewReplacer(grafana.RateInterval, "20s", grafana.WorkerVariable, ".+")
	for _, d := range grafana.All() {
		for _, r := range d.Rows {
			for _, p := range r.Panels {
				for i, q := range p.Queries {
					list = append(list, query{fmt.Sprintf("%s, %s, %c", d.Title, p.Title, 'A'+i), fill.Replace(q.Expr)})
				}
			}
		}
	}
	return list
}

// A selector in an expression: a metric of ours, and what is asked of its labels.
var selector = regexp.MustCompile(`\bdayfly[a-z0-9_:]+(\{[^}]*\})?`)

// rules lists the expressions of all rules. Those of alerts find nothing while all is
// well, so that each selector in them is asked for instead, and they themselves only
// to be understood.
func rules(t *testing.T, ctx context.Context, prom string) (list []query) {
	t.Helper()
	var answer struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Type, Name, Query string }
			}
		}
	}
	err := poll(ctx, func() error {
		body, err := get(ctx, prom+"/api/v1/rules")
		if err == nil {
			err = json.Unmarshal(body, &answer)
		}
		if err == nil && len(answer.Data.Groups) == 0 {
			err = fmt.Errorf("no rules: %s", body)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range answer.Data.Groups {
		for i, r := range g.Rules {
			name := fmt.Sprintf("rule %d %s", i+1, r.Name)
			if r.Type == "recording" {
				list = append(list, query{name, r.Query})
				continue
			}
			list = append(list, query{name, "absent(" + r.Query + ") or vector(1)"})
			for _, s := range selector.FindAllString(r.Query, -1) {
				list = append(list, query{name + ": " + s, "count(" + s + ")"})
			}
		}
	}
	// What this test did by itself.
	list = append(list, query{"a task canceled in the queue is finished", `sum(dayfly_tasks_finished_total{state="canceled"}) > 0`})
	return list
}

// ask says "ok" if the query finds a number, "EMPTY", or "ERROR" and why.
func ask(ctx context.Context, prom, expr string) string {
	body, err := get(ctx, prom+"/api/v1/query?query="+url.QueryEscape(expr))
	var answer struct {
		Status, Error string
		Data          struct {
			Result []struct{ Value [2]any }
		}
	}
	if err == nil {
		err = json.Unmarshal(body, &answer)
	}
	switch {
	case err != nil:
		return "ERROR: " + err.Error()
	case answer.Status != "success":
		return "ERROR: " + answer.Error
	}
	for _, r := range answer.Data.Result {
		text, _ := r.Value[1].(string)
		if v, err := strconv.ParseFloat(text, 64); err == nil && !math.IsNaN(v) {
			return "ok"
		}
	}
	return "EMPTY"
}
