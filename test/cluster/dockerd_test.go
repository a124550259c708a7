//go:build cluster

package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// A dockerd is told to end or killed under its agent, and comes back. With live-restore no
// task notices. Without, Docker ends all containers: each task is told so by what its spec
// says of a loss, runs once at most, and nothing is left.
func TestDockerdIsRestarted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a dockerd beside the machine's own needs root")
	}
	if _, err := exec.LookPath("dockerd"); err != nil {
		t.Skip(err)
	}
	d, err := harness.NewDockerd()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
	})
	for name, c := range map[string]struct{ live, kill bool }{
		"SIGTERM": {}, "kill -9": {kill: true}, "live-restore, SIGTERM": {live: true}, "live-restore, kill -9": {live: true, kill: true},
	} {
		t.Run(name, func(t *testing.T) {
			if d.Running() {
				if err := d.Stop(); err != nil {
					t.Fatal(err)
				}
			}
			d.LiveRestore = c.live
			if err := d.Start(within(t, patience)); err != nil {
				t.Fatal(err)
			}
			restarted(t, d, c.kill)
		})
	}
}

func restarted(t *testing.T, d *harness.Dockerd, kill bool) {
	s := start(t, harness.SiteOptions{Scale: 0.2, Fake: true}) // of what it started itself nothing is real
	image := "dayfly-test:" + s.Cluster
	if err := harness.MakeImage(t.Context(), image, d.Host); err != nil {
		t.Fatal(err)
	}
	agent, err := s.NewAgent(t.Context(), "real")
	if err != nil {
		t.Fatal(err)
	}
	agent.Args = append(agent.Args, "--runtime", "docker", "--worker-label", "engine=own")
	agent.Env = append(agent.Env, "DOCKER_HOST="+d.Host)
	s.Agent = append(s.Agent, agent)
	if err := errors.Join(agent.Start(within(t, patience)), agent.Ready(within(t, patience))); err != nil {
		t.Fatal(err)
	}
	tasks := map[string]schemas.TaskID{}
	for _, onLost := range []string{"requeue", "fail", "wait"} {
		sp := contained(image, "sleep", "1h")
		sp["on_lost"], sp["constraints"] = onLost, map[string]string{"engine": "own"}
		tasks[onLost] = create(t, s, sp).ID
		until(t, s, tasks[onLost], schemas.Running)
	}
	if kill {
		d.Kill()
	} else if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	// What is lost and tried again may be given back first: dockerd was away.
	want := map[string]string{"requeue": "again", "fail": "failed worker_lost", "wait": "failed worker_lost"}
	for onLost, id := range tasks {
		eventually(t, "on_lost: "+onLost, func() error {
			now := get(t, s, id)
			is := strings.TrimSpace(fmt.Sprint(now.State, " ", now.Reason))
			switch {
			case d.LiveRestore:
				want[onLost] = "running"
			case !now.State.Final() && now.Attempt > 1:
				is = "again"
			}
			if is != want[onLost] || d.LiveRestore && now.Attempt > 1 {
				return fmt.Errorf("it is %s in attempt %d (%s)", is, now.Attempt, now.Message)
			}
			return nil
		})
	}
	for _, id := range tasks {
		now := get(t, s, id)
		if now.State.Final() {
			continue
		}
		if err := s.Call(t.Context(), 0, "DELETE", "/v1/tasks/"+string(id), nil, nil); err != nil {
			t.Fatal(err)
		}
		until(t, s, id, schemas.Canceled)
	}
	eventually(t, "no container is left", func() error {
		list, err := harness.ContainersAt(t.Context(), d.Host, s.Cluster)
		if err == nil && len(list) > 0 {
			err = fmt.Errorf("there are %d", len(list))
		}
		return err
	})
}
