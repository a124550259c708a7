// Package instances asks a dayfly of several processes for the instances of many owners,
// while gateways are killed.
package instances

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// patience bounds each wait for a fact.
const patience = 2 * time.Minute

var binary string

func TestMain(m *testing.M) {
	harness.Main(m, func(_, dayfly string) error {
		binary = dayfly
		return nil
	})
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// site is a dayfly with templates.
type site struct {
	*harness.Site
	t testing.TB
}

func start(t testing.TB, o harness.SiteOptions, templates map[string]string) site {
	t.Helper()
	dir := t.TempDir()
	for name, text := range templates {
		if err := os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	o.Bin, o.GatewayArgs = binary, append(o.GatewayArgs, "--templates", dir)
	s, err := harness.NewSite(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, p := range s.All() {
				t.Logf("--- %s\n%s", p.Name, p.Tail())
			}
		}
		if err := s.Remove(within(t, time.Minute)); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	return site{s, t}
}

// ask asks one gateway for an instance.
func (s site) ask(gateway int, method, path string, body any) (i schemas.Instance, status int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	status, err = harness.Request(ctx, http.DefaultTransport, method, s.Gateway[gateway].Addrs.HTTP+"/v1/instances/"+path, "", body, &i)
	return i, status, err
}

func (s site) must(gateway int, method, path string, body any) schemas.Instance {
	s.t.Helper()
	i, status, err := s.ask(gateway, method, path, body)
	if err != nil {
		s.t.Fatalf("%s %s: %d %v", method, path, status, err)
	}
	return i
}

// visit asks a hostname, through the ingress of one gateway, for its page.
func (s site) visit(gateway int, i schemas.Instance) string {
	s.t.Helper()
	req, err := http.NewRequestWithContext(within(s.t, patience), "GET", s.Gateway[gateway].Addrs.Ingress, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	req.Host = i.Endpoints[0].Host
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return fmt.Sprintf("%d %s", res.StatusCode, strings.TrimSpace(string(b)))
}

func TestAHundredPutsThroughTwoGatewaysMakeOneContainer(t *testing.T) {
	image := "dayfly-guest:instances-" + strings.ToLower(rand.Text()[:10])
	if err := harness.MakeImage(within(t, 2*time.Minute), image); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := harness.RemoveImage(within(t, time.Minute), image); err != nil {
			t.Error(err)
		}
	})
	s := start(t, harness.SiteOptions{Gateways: 2, GatewayArgs: []string{"--endpoint-url", "http://*.localhost"}}, map[string]string{"web": "image: " + image + `
command: [http, "8000"]
ports: [{name: web, port: 8000}]
health: {http: {port: 8000}}
resources: {cpus: 0.1, memory: 32MiB}
ttl: 5m
extensions: 1
timeouts: {stop: 1s}
values: {flag: {env: FLAG}, key: {path: key.txt}}
`})
	values := func(n int) any {
		return map[string]any{"values": map[string]string{"flag": fmt.Sprintf("CTF{%d}", n), "key": "k"}}
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	tasks, made, winner := map[schemas.TaskID]bool{}, 0, 0
	for n := range 100 {
		all.Go(func() {
			i, status, err := s.ask(n%2, "PUT", "web/team%20one?wait=ready&timeout=30s", values(n))
			mu.Lock()
			defer mu.Unlock()
			if err != nil || !i.Ready {
				t.Errorf("%v, %+v", err, i)
			}
			tasks[i.Task] = true
			if status == http.StatusCreated {
				made, winner = made+1, n
			}
		})
	}
	all.Wait()
	containers, err := harness.Containers(within(t, patience), s.Cluster)
	if err != nil || len(containers) != 1 || len(tasks) != 1 || made != 1 {
		t.Fatalf("%d containers, %d tasks, made %d times (%v)", len(containers), len(tasks), made, err)
	}

	first := s.must(0, "GET", "web/team%20one", nil)
	for n := range 2 {
		if page := s.visit(n, first); page != "200 hello" {
			t.Errorf("gateway %d: %s", n, page)
		}
	}
	var exec schemas.ExecResult
	for _, c := range []struct{ command, want string }{{"env FLAG", fmt.Sprintf("CTF{%d}", winner)}, {"cat /task/input/key.txt", "k"}} {
		if err := s.Call(within(t, patience), 1, "POST", "/v1/tasks/"+string(first.Task)+"/exec",
			map[string]any{"command": append([]string{"/bin/guest"}, strings.Fields(c.command)...)}, &exec); err != nil || !strings.Contains(exec.Stdout, c.want) {
			t.Errorf("%s: %+v (%v)", c.command, exec, err)
		}
	}
	if i := s.must(1, "PATCH", "web/team%20one", map[string]any{"ttl": "10m"}); *i.RenewalsLeft != 0 || i.SecondsLeft < 590 || i.Connection != first.Connection {
		t.Errorf("%+v", i)
	}

	// A gateway dies, the other ends the instance and makes another, with the same address.
	s.Gateway[0].Kill()
	s.must(1, "DELETE", "web/team%20one", nil)
	second := s.must(1, "PUT", "web/team%20one?wait=ready&timeout=30s", values(200))
	if second.Task == first.Task || second.Endpoints[0].Host != first.Endpoints[0].Host || *second.RenewalsLeft != 1 {
		t.Errorf("%+v, then %+v", first, second)
	}
	if page := s.visit(1, second); page != "200 hello" {
		t.Error(page)
	}
	if err := errors.Join(s.Gateway[0].Start(within(t, patience)), s.Gateway[0].Ready(within(t, patience))); err != nil {
		t.Fatal(err)
	}
	if page := s.visit(0, second); page != "200 hello" {
		t.Errorf("a gateway that has just come back: %s", page)
	}
	if err := s.Call(within(t, patience), 0, "POST", "/v1/workers/w1/drain", map[string]any{}, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.ask(1, "PATCH", "web/team%20one", map[string]any{"renew": true}); !errors.Is(err, schemas.CodeDraining) {
		t.Errorf("a renewal on a draining worker: %v", err)
	}
}
