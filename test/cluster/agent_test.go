//go:build cluster

package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// withDocker starts a site whose tasks are containers, and makes their image.
func withDocker(t testing.TB, o harness.SiteOptions) (*harness.Site, string) {
	t.Helper()
	s := start(t, o)
	s.Image = "dayfly-test:" + s.Cluster
	if err := harness.MakeImage(t.Context(), s.Image); err != nil {
		t.Fatal(err)
	}
	return s, s.Image
}

// contained is a small container that runs command.
func contained(image string, command ...string) map[string]any {
	m := spec(command...)
	m["image"] = image
	m["resources"] = map[string]any{"memory": "48MiB", "cpus": 0.2, "disk": "1MiB"}
	return m
}

// life is when the container of one attempt lived, from Docker's own events.
type life struct {
	attempt    int
	start, die int64 // ns; 0: not seen
}

// lives follows Docker's events of a site. overlaps lists attempts of one task that
// lived at the same time.
func lives(t testing.TB, s *harness.Site) (of func(schemas.TaskID) []life, overlaps func() []string) {
	t.Helper()
	engine, err := client.New(client.FromEnv)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	events := engine.Events(ctx, client.EventsListOptions{
		Filters: make(client.Filters).Add("type", "container").Add("label", "dayfly.cluster="+s.Cluster)})
	var mu sync.Mutex
	seen := map[schemas.TaskID]map[string]*life{}
	var following sync.WaitGroup
	following.Go(func() {
		for {
			select {
			case m := <-events.Messages:
				id := schemas.TaskID(m.Actor.Attributes["dayfly.task"])
				mu.Lock()
				if seen[id] == nil {
					seen[id] = map[string]*life{}
				}
				l := seen[id][m.Actor.ID]
				if l == nil {
					l = &life{}
					l.attempt, _ = strconv.Atoi(m.Actor.Attributes["dayfly.attempt"])
					seen[id][m.Actor.ID] = l
				}
				switch string(m.Action) {
				case "start":
					l.start = m.TimeNano
				case "die":
					l.die = m.TimeNano
				}
				mu.Unlock()
			case <-events.Err:
				return
			}
		}
	})
	t.Cleanup(func() { cancel(); following.Wait(); engine.Close() })
	of = func(id schemas.TaskID) (list []life) {
		mu.Lock()
		defer mu.Unlock()
		for _, l := range seen[id] {
			if l.start > 0 {
				list = append(list, *l)
			}
		}
		return list
	}
	overlaps = func() (list []string) {
		mu.Lock()
		ids := make([]schemas.TaskID, 0, len(seen))
		for id := range seen {
			ids = append(ids, id)
		}
		mu.Unlock()
		for _, id := range ids {
			all := of(id)
			for i, a := range all {
				for _, b := range all[i+1:] {
					if (a.die == 0 || a.die > b.start) && (b.die == 0 || b.die > a.start) {
						list = append(list, fmt.Sprintf("%s: attempts %+v and %+v", id, a, b))
					}
				}
			}
		}
		return list
	}
	return of, overlaps
}

// An agent is told to stop and another binary takes its place: no task notices, and no
// byte of a log is lost. kill -9 is as good.
func TestAnAgentUpgradeKillsNoTask(t *testing.T) {
	s, image := withDocker(t, harness.SiteOptions{Scale: 0.3})
	of, overlaps := lives(t, s)
	const lines = 60
	var tasks []schemas.Task
	for range 3 {
		tasks = append(tasks, create(t, s, contained(image, "count", strconv.Itoa(lines), "100ms")))
	}
	for _, task := range tasks {
		until(t, s, task.ID, schemas.Running)
	}
	agent := s.Agent[0]
	newer := filepath.Join(s.Dir, "newer")
	for _, name := range []string{"dayfly", "dayfly-init"} {
		copyFile(t, filepath.Join(filepath.Dir(agent.Bin), name), filepath.Join(newer, name))
	}
	if err := agent.Stop(); err != nil {
		t.Fatal(err)
	}
	agent.Bin = filepath.Join(newer, "dayfly")
	if err := errors.Join(agent.Start(within(t, patience)), agent.Ready(within(t, patience))); err != nil {
		t.Fatal(err)
	}
	agent.Kill()
	if err := errors.Join(agent.Start(within(t, patience)), agent.Ready(within(t, patience))); err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for i := range lines {
		fmt.Fprintf(&want, "%d\n", i+1)
	}
	for _, task := range tasks {
		done := until(t, s, task.ID, schemas.Completed)
		if done.Attempt != 1 || len(of(task.ID)) != 1 {
			t.Errorf("%s took %d attempts and %d containers", task.ID, done.Attempt, len(of(task.ID)))
		}
		var log string
		if err := call(within(t, patience), s, "GET", "/v1/tasks/"+string(task.ID)+"/logs?stream=stdout", "", nil, &log); err != nil {
			t.Fatal(err)
		}
		if log != want.String() {
			t.Errorf("%s: log of %d bytes, want %d", task.ID, len(log), want.Len())
		}
	}
	if list := overlaps(); len(list) > 0 {
		t.Errorf("lived at the same time: %v", list)
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o700)
	if err == nil {
		_, err = io.Copy(out, in)
		err = errors.Join(err, out.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// processes lists what runs in the containers of an attempt. Of one that has ended by
// its permit there is dayfly-init, which keeps the exit for the agent a while.
func processes(t testing.TB, s *harness.Site, attempt int) (list []string) {
	t.Helper()
	engine, err := client.New(client.FromEnv)
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	found, err := engine.ContainerList(t.Context(), client.ContainerListOptions{
		Filters: make(client.Filters).Add("label", "dayfly.cluster="+s.Cluster, "dayfly.attempt="+strconv.Itoa(attempt))})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range found.Items {
		top, err := engine.ContainerTop(t.Context(), c.ID, client.ContainerTopOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range top.Processes {
			list = append(list, strings.Join(p, " "))
		}
	}
	return list
}

// An agent that is stopped for two fences was lost: its tasks are dead by their permit
// before another worker has them. It finds that out when it wakes, and registers anew.
func TestALostWorkerReturns(t *testing.T) {
	s, image := withDocker(t, harness.SiteOptions{Agents: 2, Scale: 0.1})
	of, _ := lives(t, s)
	task := create(t, s, contained(image, "sleep", "1h"))
	before := until(t, s, task.ID, schemas.Running)
	agent := s.Agent[0]
	if before.Worker == "w2" {
		agent = s.Agent[1]
	}
	var registered schemas.Worker
	if err := s.Call(t.Context(), 0, "GET", "/v1/workers/"+string(before.Worker), nil, &registered); err != nil {
		t.Fatal(err)
	}
	if err := agent.Pause(); err != nil {
		t.Fatal(err)
	}
	var after schemas.Task
	eventually(t, "another worker has it", func() error {
		if after = get(t, s, task.ID); after.Attempt < 2 || after.State != schemas.Running {
			return fmt.Errorf("it is %s in attempt %d", after.State, after.Attempt)
		}
		return nil
	})
	if after.Worker == before.Worker {
		t.Errorf("it runs on %s again", after.Worker)
	}
	if list := processes(t, s, 1); len(list) != 1 || !strings.HasSuffix(list[0], "/.dayfly/init") {
		t.Errorf("attempt 2 runs, and of attempt 1 there is still %q", list)
	}
	if err := agent.Resume(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the worker is back under a new epoch", func() error {
		var w schemas.Worker
		if err := s.Call(t.Context(), 0, "GET", "/v1/workers/"+string(before.Worker), nil, &w); err != nil {
			return err
		}
		if w.State != "ready" || w.Epoch == registered.Epoch {
			return fmt.Errorf("it is %s, epoch %s", w.State, w.Epoch)
		}
		return nil
	})
	eventually(t, "only the second container is left", func() error {
		list, err := harness.Containers(t.Context(), s.Cluster)
		if err == nil && len(list) != 1 {
			err = fmt.Errorf("there are %d", len(list))
		}
		return err
	})
	if n := len(of(task.ID)); n != 2 {
		t.Errorf("%d containers were started", n)
	}
	if now := get(t, s, task.ID); now.State != schemas.Running || now.Attempt != 2 {
		t.Errorf("it is %s in attempt %d", now.State, now.Attempt)
	}
}

// An agent whose folder is gone knows nothing of its tasks. It waits until whoever used
// the name is surely silent, registers anew, and its tasks are tried again: their old
// containers are gone before.
func TestAWipedFolder(t *testing.T) {
	s, image := withDocker(t, harness.SiteOptions{Scale: 0.1})
	_, overlaps := lives(t, s)
	task := create(t, s, contained(image, "sleep", "1h"))
	until(t, s, task.ID, schemas.Running)
	agent := s.Agent[0]
	agent.Kill()
	if err := os.RemoveAll(s.AgentData("w1")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(agent.Start(within(t, patience)), agent.Ready(within(t, patience))); err != nil {
		t.Fatal(err)
	}
	var now schemas.Task
	eventually(t, "it runs again", func() error {
		if now = get(t, s, task.ID); now.Attempt != 2 || now.State != schemas.Running {
			return fmt.Errorf("it is %s in attempt %d (%s)", now.State, now.Attempt, now.Message)
		}
		return nil
	})
	eventually(t, "only one container is left", func() error {
		list, err := harness.Containers(t.Context(), s.Cluster)
		if err == nil && len(list) != 1 {
			err = fmt.Errorf("there are %d", len(list))
		}
		return err
	})
	if list := overlaps(); len(list) > 0 {
		t.Errorf("lived at the same time: %v", list)
	}
}

// Two agents under one name: the second is refused, and the first does not notice.
func TestTwoAgentsUnderOneName(t *testing.T) {
	s := start(t, harness.SiteOptions{Fake: true, Scale: 0.1})
	long := create(t, s, spec("sleep", "10m"))
	until(t, s, long.ID, schemas.Running)
	second, err := s.NewAgent(t.Context(), "w1")
	if err != nil {
		t.Fatal(err)
	}
	defer second.Kill()
	for i, a := range second.Args {
		if a == "--data" {
			second.Args[i+1] = t.TempDir()
		}
	}
	second.Name = "second"
	if err := second.Start(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-second.Exited():
	case <-within(t, patience).Done():
		t.Fatal("it runs")
	}
	if !strings.Contains(second.Log(), "another agent is alive under this worker's name") {
		t.Errorf("it says:\n%s", second.Tail())
	}
	if now := get(t, s, long.ID); now.State != schemas.Running || now.Attempt != 1 {
		t.Errorf("the task is %s in attempt %d", now.State, now.Attempt)
	}
}
