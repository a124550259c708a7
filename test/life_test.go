package test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// site is a dayfly that runs, and the image of its tasks.
type site struct {
	*harness.Up
	t     *testing.T
	ctx   context.Context
	image string
}

func newSite(t *testing.T, image string, up *harness.Up) *site {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	t.Cleanup(cancel)
	if err := up.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return &site{up, t, ctx, image}
}

func (s *site) post(over map[string]any, command ...string) schemas.Task {
	s.t.Helper()
	spec := map[string]any{"image": s.image, "command": command, "ttl": "5m", "resources": map[string]any{"memory": "32MiB", "cpus": 0.1}}
	for k, v := range over {
		spec[k] = v
	}
	var task schemas.Task
	if err := s.Call(s.ctx, "POST", "/v1/tasks", spec, &task); err != nil {
		s.t.Fatal(err)
	}
	return task
}

// until looks at the task until ok is content with it.
func (s *site) until(id schemas.TaskID, ok func(schemas.Task) bool) (task schemas.Task) {
	s.t.Helper()
	err := harness.Poll(s.ctx, func() error {
		task = schemas.Task{} // what is left out would stay
		if err := s.Call(s.ctx, "GET", "/v1/tasks/"+string(id), nil, &task); err != nil {
			return err
		}
		if !ok(task) {
			if task.State.Final() {
				return harness.Fatal(errors.New("it ended otherwise"))
			}
			return errors.New("not yet")
		}
		return nil
	})
	if err != nil {
		s.t.Fatalf("%v: %s is %s (%s: %s), %d restarts, ready %v, exit %+v\n%s", err, id, task.State, task.Reason, task.Message, task.Restarts, task.Ready, task.Exit, history(task))
	}
	return task
}

func (s *site) ends(id schemas.TaskID, state schemas.State, reason schemas.Reason) schemas.Task {
	s.t.Helper()
	return s.until(id, func(t schemas.Task) bool { return t.State == state && t.Reason == reason })
}

// Each of the timeouts has an end of its own. A Docker Engine that does not answer a
// start is played by a proxy.
func TestTimeouts(t *testing.T) {
	image, up := testImage(t), newUp(t)
	var held atomic.Bool
	let := make(chan struct{})
	up.Env = []string{"DOCKER_HOST=" + dockerProxy(t, func(r *http.Request) {
		if held.Load() && r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/start") {
			select {
			case <-let:
			case <-r.Context().Done():
			}
		}
	})}
	s := newSite(t, image, up)

	mute, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	queued := s.post(map[string]any{"constraints": map[string]string{"zone": "nowhere"}, "timeouts": map[string]any{"queue": "1s"}}, "exit", "0")
	pulled := s.post(map[string]any{"image": mute.Addr().String() + "/mute:1", "timeouts": map[string]any{"pull": "1s"}}, "exit", "0")
	deaf := s.post(map[string]any{"timeouts": map[string]any{"stop": "1s"}}, "ignore-term")
	polite := s.post(map[string]any{"timeouts": map[string]any{"stop": "1m"}}, "term-exit", "7")
	s.ends(queued.ID, schemas.Failed, schemas.ReasonQueueTimeout)
	s.ends(pulled.ID, schemas.Failed, schemas.ReasonPullTimeout)

	for _, id := range []schemas.TaskID{deaf.ID, polite.ID} {
		s.until(id, func(t schemas.Task) bool { return t.State == schemas.Running })
		s.wrote(id, "ready\n")
		if err := s.Call(s.ctx, "DELETE", "/v1/tasks/"+string(id), nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	if end := s.ends(deaf.ID, schemas.Canceled, schemas.ReasonCanceled); end.Exit.Code != 137 || end.Timings.Ended.Sub(end.Cancel.At) < time.Second {
		t.Errorf("ignores TERM: %+v, %s after the cancel", end.Exit, end.Timings.Ended.Sub(end.Cancel.At))
	}
	if end := s.ends(polite.ID, schemas.Canceled, schemas.ReasonCanceled); end.Exit.Code != 7 || end.Stdout != "ready\nterm\n" {
		t.Errorf("ends at TERM: %+v, %q", end.Exit, end.Stdout)
	}

	held.Store(true)
	late := s.post(map[string]any{"timeouts": map[string]any{"start": "1s"}}, "exit", "0")
	s.ends(late.ID, schemas.Failed, schemas.ReasonStartTimeout)
	close(let)
	err = harness.Poll(s.ctx, func() error {
		ids, err := s.Containers(s.ctx)
		if err == nil && len(ids) > 0 {
			err = fmt.Errorf("%d containers are left", len(ids))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// wrote waits until the task's log holds text.
func (s *site) wrote(id schemas.TaskID, text string) {
	s.t.Helper()
	err := harness.Poll(s.ctx, func() error {
		req, err := http.NewRequestWithContext(s.ctx, "GET", s.URL+"/v1/tasks/"+string(id)+"/logs", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		var b strings.Builder
		if err := resp.Write(&b); err != nil {
			return err
		}
		if !strings.Contains(b.String(), text) {
			return fmt.Errorf("the log has no %q", text)
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// dockerProxy stands between a client and the Docker Engine. before may hold a request
// up.
func dockerProxy(t *testing.T, before func(*http.Request)) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "docker"})
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", "/var/run/docker.sock")
	}}
	proxy.Transport, proxy.FlushInterval = transport, -1
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		before(r)
		proxy.ServeHTTP(w, r)
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		server.Close()
		serving.Wait()
		transport.CloseIdleConnections()
	})
	return "unix://" + socket
}

// A task runs again in its container, also while dayfly is dead, and is ready when its
// check says so.
func TestRestartsAndHealth(t *testing.T) {
	s := newSite(t, testImage(t), newUp(t))
	restart := map[string]any{"policy": "on_failure", "backoff": "1s"}
	check := func(path string) map[string]any {
		return map[string]any{"http": map[string]any{"port": 8080, "path": path}, "interval": "500ms", "timeout": "5s", "retries": 4}
	}
	flaky := s.post(map[string]any{"restart": restart}, "flaky", "2", "9", "1h")
	web := s.post(map[string]any{"health": check("/")}, "http", "8080", "500ms")
	sick := s.post(map[string]any{"health": check("/status/500")}, "http", "8080")
	reborn := s.post(map[string]any{"health": check("/until/1s"), "restart": map[string]any{"policy": "always", "max": 1, "backoff": "100ms"}}, "http", "8080")

	s.until(flaky.ID, func(t schemas.Task) bool { return t.State == schemas.Running })
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	if task := s.until(flaky.ID, func(t schemas.Task) bool { return t.Restarts == 2 }); task.Attempt != 1 || !task.Ready {
		t.Errorf("attempt %d, ready %v\n%s", task.Attempt, task.Ready, history(task))
	}
	s.wrote(flaky.ID, "run 1\nrun 2\nrun 3\nready\n")
	awaited := func(id schemas.TaskID) (task schemas.Task) {
		t.Helper()
		if err := s.Call(s.ctx, "GET", "/v1/tasks/"+string(id)+"?wait=ready&timeout=1m", nil, &task); err != nil {
			t.Fatal(err)
		}
		return task
	}
	if task := awaited(web.ID); !task.Ready || task.Timings.Ready.IsZero() {
		t.Errorf("waited for ready: %s, ready %v at %s", task.State, task.Ready, task.Timings.Ready)
	}
	if task := awaited(sick.ID); task.State != schemas.Failed {
		t.Errorf("waited for what never gets ready: %s", task.State)
	}
	if end := s.ends(sick.ID, schemas.Failed, schemas.ReasonUnhealthy); end.Timings.Ready != (time.Time{}) || end.Message == "" {
		t.Errorf("ready at %s, %q", end.Timings.Ready, end.Message)
	}
	if end := s.ends(reborn.ID, schemas.Failed, schemas.ReasonUnhealthy); end.Restarts != 1 {
		t.Errorf("%d restarts\n%s", end.Restarts, history(end))
	}
}

// A client's restart keeps container, log and deadline, with a health check and over a
// kill of dayfly.
func TestAskedRestart(t *testing.T) {
	s := newSite(t, testImage(t), newUp(t))
	task := s.post(map[string]any{"health": map[string]any{"exec": []string{"/bin/exit", "0"}, "interval": "500ms"}}, "flaky", "0", "0", "1h")
	first := s.until(task.ID, func(t schemas.Task) bool { return t.Ready })
	s.wrote(task.ID, "run 1\nready\n")
	path := "/v1/tasks/" + string(task.ID) + "/restart"
	for n := 1; n <= 3; n++ {
		if n == 3 {
			if err := s.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := s.Start(s.ctx); err != nil {
				t.Fatal(err)
			}
		}
		var again schemas.Task
		if err := s.Call(s.ctx, "POST", path, map[string]any{}, &again); err != nil {
			t.Fatal(err)
		}
		again = s.until(task.ID, func(t schemas.Task) bool { return t.Restarts == n && t.Ready })
		if again.Attempt != 1 || !again.ExpiresAt.Equal(first.ExpiresAt) || !again.Timings.Ready.After(first.Timings.Ready) {
			t.Errorf("attempt %d, expires %s, ready %s\n%s", again.Attempt, again.ExpiresAt, again.Timings.Ready, history(again))
		}
		s.wrote(task.ID, fmt.Sprintf("run %d\nready\n", n+1)) // the file that it counts in is still there
	}
	var refused schemas.Task
	if err := s.Call(s.ctx, "DELETE", "/v1/tasks/"+string(task.ID), nil, nil); err != nil {
		t.Fatal(err)
	}
	if end := s.ends(task.ID, schemas.Canceled, schemas.ReasonCanceled); end.Restarts != 3 {
		t.Errorf("%d restarts\n%s", end.Restarts, history(end))
	}
	if err := s.Call(s.ctx, "POST", path, map[string]any{}, &refused); err == nil || !strings.Contains(err.Error(), "state_conflict") {
		t.Errorf("a restart of what is over: %v", err)
	}
}

// What a worker says of its labels and GPUs decides what is placed on it.
func TestLabelsAndGPUs(t *testing.T) {
	s := newSite(t, "fake", newUp(t, "--runtime", "fake", "--gpus", "2", "--worker-label", "zone=a"))
	asks := func(gpus int, constraints map[string]string) schemas.Task {
		return s.post(map[string]any{"resources": map[string]any{"gpus": gpus}, "constraints": constraints}, "sleep", "1h")
	}
	waits := func(id schemas.TaskID, filter string) {
		t.Helper()
		s.until(id, func(t schemas.Task) bool {
			return t.State == schemas.Queued && t.Why != nil && len(t.Why.Workers) == 1 && t.Why.Workers[0].Filter == filter
		})
	}
	running := func(t schemas.Task) bool { return t.State == schemas.Running }
	both := asks(2, map[string]string{"zone": "a", "os": "linux", "arch": "amd64"})
	s.until(both.ID, running)
	waits(asks(0, map[string]string{"zone": "b"}).ID, "constraints")
	var e *schemas.Error
	if err := s.Call(s.ctx, "POST", "/v1/tasks", map[string]any{"image": "any", "resources": map[string]any{"gpus": 3}}, nil); !errors.As(err, &e) || e.Code != schemas.CodeNoCapacity || e.Field != "resources.gpus" {
		t.Errorf("more GPUs than any worker has: %v", err)
	}
	one := asks(1, nil)
	waits(one.ID, "gpus")
	if err := s.Call(s.ctx, "DELETE", "/v1/tasks/"+string(both.ID), nil, nil); err != nil {
		t.Fatal(err)
	}
	s.until(one.ID, running)
}
