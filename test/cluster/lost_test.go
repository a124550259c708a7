//go:build cluster

package cluster

import (
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/docker"
	"dayfly.dev/test/harness"
)

// worker is what the API says of w1.
func worker(t testing.TB, s *harness.Site) (w schemas.Worker, err error) {
	t.Helper()
	return w, s.Call(t.Context(), 0, "GET", "/v1/workers/w1", nil, &w)
}

// killUntilLost kills w1's agent and returns when it was declared lost.
func killUntilLost(t testing.TB, s *harness.Site) {
	t.Helper()
	s.Agent[0].Kill()
	eventually(t, "w1 is lost", func() error {
		w, err := worker(t, s)
		if err == nil && w.State != "lost" {
			err = fmt.Errorf("it is %s", w.State)
		}
		return err
	})
}

// A worker is dead for longer than a fence. Its task with on_lost: wait runs on without
// it, is given to nobody else, says that its worker is lost, and is taken back: the same
// attempt in the same container, with all of its log. One with on_lost: fail fails, and
// its process is dead by then.
func TestWaitAndFailOverALostWorker(t *testing.T) {
	s, image := withDocker(t, harness.SiteOptions{Scale: 0.1})
	of, overlaps := lives(t, s)
	const lines = 250
	task := func(onLost string, command ...string) schemas.TaskID {
		sp := contained(image, command...)
		sp["on_lost"] = onLost
		id := create(t, s, sp).ID
		until(t, s, id, schemas.Running)
		return id
	}
	wait, fail := task("wait", "count", fmt.Sprint(lines), "100ms"), task("fail", "sleep", "1h")
	// Somebody who could take them.
	other, err := s.NewAgent(t.Context(), "w2")
	if err != nil {
		t.Fatal(err)
	}
	s.Agent = append(s.Agent, other)
	if err := errors.Join(other.Start(within(t, patience)), other.Ready(within(t, patience))); err != nil {
		t.Fatal(err)
	}

	killUntilLost(t, s)
	eventually(t, "one failed", func() error {
		now := get(t, s, fail)
		if now.State != schemas.Failed || now.Reason != schemas.ReasonWorkerLost {
			return fmt.Errorf("it is %s (%s)", now.State, now.Reason)
		}
		return nil
	})
	eventually(t, "one waits", func() error {
		now := get(t, s, wait)
		if now.WorkerLostAt.IsZero() {
			return errors.New("its worker is not shown as lost")
		}
		if now.State != schemas.Running || now.Attempt != 1 || now.Worker != "w1" {
			return harness.Fatal(fmt.Errorf("it is %s in attempt %d on %s", now.State, now.Attempt, now.Worker))
		}
		return nil
	})
	for _, p := range processes(t, s, 1) {
		if strings.Contains(p, "sleep") {
			t.Errorf("it failed, and runs: %s", p)
		}
	}
	before := epochOf(t, s)
	if err := errors.Join(s.Agent[0].Start(within(t, patience)), s.Agent[0].Ready(within(t, patience))); err != nil {
		t.Fatal(err)
	}
	if epochOf(t, s) == before {
		t.Error("a lost worker came back under its epoch")
	}
	eventually(t, "it is taken back", func() error {
		if now := get(t, s, wait); !now.WorkerLostAt.IsZero() {
			return fmt.Errorf("it is %s, and its worker is shown as lost", now.State)
		}
		return nil
	})
	done := until(t, s, wait, schemas.Completed)
	if n := len(of(wait)); done.Attempt != 1 || n != 1 {
		t.Errorf("it took %d attempts and %d containers", done.Attempt, n)
	}
	var want strings.Builder
	for i := range lines {
		fmt.Fprintf(&want, "%d\n", i+1)
	}
	var log string
	if err := call(within(t, patience), s, "GET", "/v1/tasks/"+string(wait)+"/logs?stream=stdout", "", nil, &log); err != nil {
		t.Fatal(err)
	}
	if log != want.String() {
		t.Errorf("log of %d bytes, want %d", len(log), want.Len())
	}
	if list := overlaps(); len(list) > 0 {
		t.Errorf("lived at the same time: %v", list)
	}
	none(t, s)
}

func epochOf(t testing.TB, s *harness.Site) schemas.Epoch {
	t.Helper()
	w, err := worker(t, s)
	if err != nil {
		t.Fatal(err)
	}
	return w.Epoch
}

// none waits until a site has no container.
func none(t testing.TB, s *harness.Site) {
	t.Helper()
	eventually(t, "no container is left", func() error {
		list, err := harness.Containers(t.Context(), s.Cluster)
		if err == nil && len(list) > 0 {
			err = fmt.Errorf("there are %d", len(list))
		}
		return err
	})
}

// What an agent's folder does not know, but bears its cluster and worker, is removed. The
// containers of another agent, of another cluster's agent with the same name and the same
// task, and what only looks alike are never touched.
func TestOrphansAreRemovedAndNobodyElses(t *testing.T) {
	s, image := withDocker(t, harness.SiteOptions{Agents: 2, Scale: 0.1})
	neighbour := start(t, harness.SiteOptions{Scale: 0.1}) // its worker is w1, too
	long := func(s *harness.Site) schemas.Task {
		return until(t, s, create(t, s, contained(image, "sleep", "1h")).ID, schemas.Running)
	}
	theirs := long(neighbour)
	// Both workers of the site have one.
	var kept []schemas.Task
	for _, w := range []string{"w1", "w2"} {
		if err := s.Call(t.Context(), 0, "POST", "/v1/workers/"+w+"/drain", "{}", nil); err != nil {
			t.Fatal(err)
		}
		kept = append(kept, long(s))
		if err := s.Call(t.Context(), 0, "POST", "/v1/workers/"+w+"/undrain", "{}", nil); err != nil {
			t.Fatal(err)
		}
	}
	if kept[0].Worker == kept[1].Worker {
		t.Fatalf("both run on %s", kept[0].Worker)
	}

	engine, err := client.New(client.FromEnv)
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	id := "t-" + strings.ToLower(rand.Text()[:26])
	made := map[string]string{}
	lay := func(what, name, cluster, worker string) {
		t.Helper()
		got, err := engine.ContainerCreate(t.Context(), client.ContainerCreateOptions{Name: name, Config: &container.Config{
			Image: image, Cmd: []string{"sleep", "1h"}, Labels: map[string]string{
				docker.LabelCluster: cluster, docker.LabelWorker: worker, docker.LabelTask: id, docker.LabelAttempt: "1", docker.LabelEpoch: "e",
			}}, HostConfig: &container.HostConfig{NetworkMode: "none"}})
		if err == nil {
			made[what] = got.ID
			_, err = engine.ContainerStart(t.Context(), got.ID, client.ContainerStartOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	name := docker.ContainerName(schemas.Assignment{Task: schemas.TaskID(id), Attempt: 1})
	lay("orphan", name, s.Cluster, "w1")
	lay("of another name", "dayfly-test-"+id, s.Cluster, "w1")
	// The very name is taken, so these bear that of another attempt, as labels do.
	for what, c := range map[string][2]string{"of the other agent": {s.Cluster, "w2"}, "of the other cluster": {neighbour.Cluster, "w1"}} {
		id = "t-" + strings.ToLower(rand.Text()[:26])
		lay(what, docker.ContainerName(schemas.Assignment{Task: schemas.TaskID(id), Attempt: 1}), c[0], c[1])
	}

	agent := s.Agent[0]
	agent.Kill()
	if err := errors.Join(agent.Start(within(t, patience)), agent.Ready(within(t, patience))); err != nil {
		t.Fatal(err)
	}
	there := func(what string) bool {
		t.Helper()
		list, err := engine.ContainerList(t.Context(), client.ContainerListOptions{Filters: make(client.Filters).Add("id", made[what])})
		if err != nil {
			t.Fatal(err)
		}
		return len(list.Items) == 1
	}
	eventually(t, "the orphan is removed", func() error {
		if there("orphan") {
			return errors.New("it runs")
		}
		return nil
	})
	if n := strings.Count(agent.Log(), "nothing can be made of a container"); n != 1 {
		t.Errorf("it removed %d containers:\n%s", n, agent.Tail())
	}
	for what := range made {
		if what != "orphan" && !there(what) {
			t.Errorf("the container %s is gone", what)
		}
	}
	for _, task := range kept {
		if now := get(t, s, task.ID); now.State != schemas.Running || now.Attempt != 1 {
			t.Errorf("the task on %s is %s in attempt %d", task.Worker, now.State, now.Attempt)
		}
	}
	if now := get(t, neighbour, theirs.ID); now.State != schemas.Running || now.Attempt != 1 {
		t.Errorf("the neighbour's task is %s in attempt %d", now.State, now.Attempt)
	}
}
