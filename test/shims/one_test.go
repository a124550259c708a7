package shims

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// However many ask at a time, through however many processes, there is one container.
func TestOneForEachName(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for name, c := range map[string]struct {
		method, path, body string
		first, others      int // statuses
	}{
		"rctf": {"PUT", "/v1/instances/", `{"teamId": "7d1f", "challengeIntegrationId": "web-demo", "timeoutMilliseconds": 600000,
			"config": {"services": {"app": {"image": "ghcr.io/example/web-demo:latest"}}}}`, 200, 400},
		"poseidon": {"POST", "/start", `{"user_id": "litmus", "challenge_id": "localhost:5000/orca-challenges/our-first-challenge:latest"}`, 200, 200},
	} {
		t.Run(name, func(t *testing.T) {
			u, first := up(t, ctx, name)
			b, err := build()
			if err != nil {
				t.Fatal(err)
			}
			second := &harness.Process{Name: "shim", Bin: b.bin, Dir: t.TempDir(), Args: []string{"shim", name, "--url", u.URL},
				Listen: map[string]string{"--listen": "127.0.0.1:0", "--admin": "127.0.0.1:0"}}
			if err := second.Start(ctx); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := second.Stop(); err != nil {
					t.Error(err)
				}
			})
			if err := second.Ready(ctx); err != nil {
				t.Fatal(err)
			}
			const each = 50
			var all sync.WaitGroup
			var mu sync.Mutex
			statuses := map[int]int{}
			for i := range 2 * each {
				url := first
				if i%2 == 1 {
					url = shimURL(t, second, name)
				}
				all.Go(func() {
					status, err := send(ctx, c.method, url+c.path, c.body)
					mu.Lock()
					defer mu.Unlock()
					if statuses[status]++; err != nil {
						t.Error(err)
					}
				})
			}
			all.Wait()
			if c.first != c.others && (statuses[c.first] != 1 || statuses[c.others] != 2*each-1) || c.first == c.others && statuses[c.first] != 2*each {
				t.Errorf("the answers were %v", statuses)
			}
			var tasks schemas.TaskList
			if err := u.Call(ctx, "GET", "/v1/tasks?label=shim="+name, nil, &tasks); err != nil || len(tasks.Items) != 1 {
				t.Fatalf("there are %d tasks (%v)", len(tasks.Items), err)
			}
			if err := u.Call(ctx, "GET", "/v1/tasks/"+string(tasks.Items[0].ID)+"?wait=running&timeout=30s", nil, nil); err != nil {
				t.Fatal(err)
			}
			containers, err := u.Containers(ctx)
			if err != nil || len(containers) != 1 {
				t.Errorf("there are the containers %v (%v)", containers, err)
			}
		})
	}
}

func shimURL(t *testing.T, p *harness.Process, name string) string {
	t.Helper()
	url := p.Addrs.Shims[name]
	if url == "" {
		t.Fatalf("the process says nothing of the shim %s: %+v", name, p.Addrs)
	}
	return url
}

func send(ctx context.Context, method, url, body string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader([]byte(body)))
	if err != nil {
		return 0, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	said, err := io.ReadAll(res.Body)
	if err == nil && !json.Valid(said) {
		err = fmt.Errorf("%s is no JSON", said)
	}
	return res.StatusCode, err
}
