package client_test

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/client/clienttest"
	"dayfly.dev/schemas"
)

// told reads events until there are n, or to their end.
func told(t *testing.T, c *client.Client, o client.EventOptions, n int) (got []schemas.TaskEvent) {
	t.Helper()
	for e, err := range c.Events(t.Context(), o) {
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, e); len(got) == n {
			break
		}
	}
	return got
}

func TestEventsResumeWithoutLossOrDoubling(t *testing.T) {
	t.Parallel()
	s, c := start(t)
	s.CutLogs(0, 3, 1, 4, 0, 2)
	made := make(chan error, 1)
	go func() {
		for range 5 {
			if _, err := c.Create(t.Context(), schemas.Spec{Image: "busybox", Command: []string{"exit:0"}}, client.CreateOptions{}); err != nil {
				made <- err
				return
			}
		}
		made <- nil
	}()
	got := told(t, c, client.EventOptions{Follow: true}, 25) // queued, assigned, starting, running, completed
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	if !slices.IsSortedFunc(got, func(a, b schemas.TaskEvent) int { return int(a.ID) - int(b.ID) }) {
		t.Error("not in their order")
	}
	if again := told(t, c, client.EventOptions{}, -1); !slices.EqualFunc(again, got, func(a, b schemas.TaskEvent) bool { return a.ID == b.ID }) {
		t.Errorf("followed %d events, there are %d", len(got), len(again))
	}
	if n := strings.Count(strings.Join(s.Requests(), "\n"), "/v1/events"); n != 8 {
		t.Errorf("%d connections", n)
	}
}

func TestEventsOfOneTaskEndWithIt(t *testing.T) {
	t.Parallel()
	s, c := start(t)
	task := create(t, c, "hold")
	create(t, c, "hold")
	if _, err := c.WaitRunning(t.Context(), task.ID); err != nil {
		t.Fatal(err)
	}
	var states []schemas.State
	for e, err := range c.Events(t.Context(), client.EventOptions{Task: task.ID, Follow: true, States: []schemas.State{schemas.Running, schemas.Completed}}) {
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, e.State)
		if e.State == schemas.Running {
			s.Release(task.ID)
		}
	}
	if !slices.Equal(states, []schemas.State{schemas.Running, schemas.Completed}) {
		t.Error(states)
	}
	for _, err := range c.Events(t.Context(), client.EventOptions{Task: "t-01jd0000000000000000000000"}) {
		if !errors.Is(err, schemas.CodeNotFound) {
			t.Error(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range c.Events(ctx, client.EventOptions{Follow: true}) {
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
}

func TestFiltersByLabel(t *testing.T) {
	t.Parallel()
	s, c := start(t)
	for _, labels := range []map[string]string{{"owner": "a", "n": "1"}, {"owner": "b"}, nil} {
		if _, err := c.Create(t.Context(), schemas.Spec{Image: "busybox", Command: []string{"hold"}, Labels: labels}, client.CreateOptions{Wait: client.UntilRunning}); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []struct {
		labels map[string]string
		has    []string
		want   int
	}{{nil, nil, 3}, {map[string]string{"owner": "a"}, nil, 1}, {nil, []string{"owner"}, 2}, {map[string]string{"owner": "b"}, []string{"n"}, 0}} {
		l, err := c.List(t.Context(), client.ListOptions{Labels: f.labels, HasLabels: f.has, CreatedAfter: time.Now().Add(-time.Hour)})
		if err != nil || len(l.Items) != f.want {
			t.Errorf("%+v: %d tasks, %v", f, len(l.Items), err)
		}
		if n := len(told(t, c, client.EventOptions{Labels: f.labels, HasLabels: f.has, States: []schemas.State{schemas.Queued}}, -1)); n != f.want {
			t.Errorf("%+v: %d events", f, n)
		}
	}
	if all := strings.Join(s.Requests(), "\n"); !strings.Contains(all, "created_after=2") || !strings.Contains(all, "label=n&label=owner%3Db") {
		t.Error(all)
	}
}

func TestIfRevision(t *testing.T) {
	t.Parallel()
	s, c := start(t)
	task := create(t, c, "hold")
	now, err := c.WaitRunning(t.Context(), task.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Cancel(t.Context(), task.ID, nil, client.IfRevision(task.Revision)); !errors.Is(err, schemas.CodePrecondition) || errors.Is(err, schemas.CodeNotFound) {
		t.Errorf("an older revision: %v", err)
	}
	later, err := c.Extend(t.Context(), task.ID, 2*time.Hour, client.IfRevision(now.Revision))
	if err != nil || later.Revision <= now.Revision {
		t.Errorf("revision %d after %d: %v", later.Revision, now.Revision, err)
	}
	var n atomic.Int32
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
		n.Add(1)
		clienttest.Fail(w, schemas.Error{Status: 503, Code: schemas.CodeUnknownOutcome})
		return true
	})
	if _, err := c.Cancel(t.Context(), task.ID, nil, client.IfRevision(later.Revision)); !errors.Is(err, schemas.CodeUnknownOutcome) || n.Load() != 1 {
		t.Errorf("what may have been done was repeated %d times: %v", n.Load(), err)
	}
}
