//go:build cluster

package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// A backup, more work, and then NATS loses its disks. After the restore the tasks of the
// backup end well, nothing runs twice at once, and what the backup did not have is named.
func TestRestoreAfterTheDisksAreLost(t *testing.T) {
	for _, servers := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d NATS", servers), func(t *testing.T) { restored(t, servers) })
	}
}

func restored(t *testing.T, servers int) {
	templates := t.TempDir()
	s, image := withDocker(t, harness.SiteOptions{NATS: servers, Agents: 2, Scale: 0.1, GatewayArgs: []string{"--templates", templates}})
	of, overlaps := lives(t, s)
	task := func(onLost string, command ...string) schemas.TaskID {
		sp := contained(image, command...)
		sp["on_lost"] = onLost
		return create(t, s, sp).ID
	}
	running := func(onLost string, command ...string) schemas.TaskID {
		id := task(onLost, command...)
		until(t, s, id, schemas.Running)
		return id
	}
	drain := func(verb string) {
		for _, w := range []string{"w1", "w2"} {
			if err := s.Call(t.Context(), 0, "POST", "/v1/workers/"+w+"/"+verb, "{}", nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	dayfly := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(within(t, 2*patience), binary, append(args, "--nats", s.URLs(), "--credentials", s.Core())...)
		var problem strings.Builder
		cmd.Stderr = &problem
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("dayfly %s: %v\n%s", args[0], err, problem.String())
		}
		return string(out)
	}

	done, left := task("requeue", "echo", "hi"), task("requeue", "leave", "1", "10")
	until(t, s, done, schemas.Completed)
	until(t, s, left, schemas.Completed)
	artifact := func() error { return s.Call(t.Context(), 0, "GET", "/v1/tasks/"+string(left)+"/artifacts", nil, nil) }
	if err := artifact(); err != nil {
		t.Fatal(err)
	}
	template := "image: " + image + "\ncommand: [sleep, 1h]\non_lost: wait\nresources: {cpus: 0.2, memory: 48MiB, disk: 1MiB}\ntimeouts: {stop: 1s}\n"
	if err := os.WriteFile(filepath.Join(templates, "web.yaml"), []byte(template), 0o644); err != nil {
		t.Fatal(err)
	}
	instance := func() (i schemas.Instance) {
		t.Helper()
		eventually(t, "litmus has an instance", func() error {
			return s.Call(t.Context(), 0, "PUT", "/v1/instances/web/litmus?wait=running", nil, &i)
		})
		return i
	}
	mine := instance()
	requeue, fail := running("requeue", "sleep", "1h"), running("fail", "sleep", "1h")
	wait := running("wait", "sleep", "1h")
	drain("drain")
	queued, queuedWait := task("requeue", "sleep", "1h"), task("wait", "sleep", "1h")
	large := contained(image, "sleep", "1h")
	large["files"] = []map[string]any{{"path": "large", "content": strings.Repeat("large ", 10_000)}} // becomes a blob
	queuedBlob := create(t, s, large).ID
	file := filepath.Join(t.TempDir(), "backup")
	dayfly("backup", file)

	// The world goes on.
	if err := s.Call(t.Context(), 0, "DELETE", "/v1/tasks/"+string(queuedBlob), nil, nil); err != nil {
		t.Fatal(err)
	}
	drain("undrain")
	for _, id := range []schemas.TaskID{queued, queuedWait} {
		until(t, s, id, schemas.Running)
	}
	lost, lostWait := running("requeue", "sleep", "1h"), running("wait", "sleep", "1h")
	// Its worker comes to know later revisions than the restored records would have.
	for i := range 30 {
		ttl := map[string]string{"ttl": fmt.Sprintf("%dm", 90+i)}
		if err := s.Call(t.Context(), 0, "POST", "/v1/tasks/"+string(wait)+"/extend", ttl, nil); err != nil {
			t.Fatal(err)
		}
	}

	for _, list := range [][]*harness.Process{s.NATS, s.Gateway, s.Placer, s.Reaper} {
		for _, p := range list {
			p.Kill()
		}
	}
	for _, n := range s.NATS {
		if err := os.RemoveAll(s.NATSData(n)); err != nil {
			t.Fatal(err)
		}
	}
	start := func(list []*harness.Process) {
		t.Helper()
		for _, p := range list {
			if err := p.Start(within(t, patience)); err != nil {
				t.Fatal(err)
			}
		}
		for _, p := range list {
			if err := p.Ready(within(t, patience)); err != nil {
				t.Fatal(err)
			}
		}
	}
	start(s.NATS)
	list := dayfly("restore", file, "--scale", "0.1")
	t.Logf("restored:\n%s", list)
	for id, now := range map[schemas.TaskID]string{
		requeue: "running queued restored", fail: "running failed restored", wait: "running running -",
		queued: "queued queued restored", queuedWait: "queued failed restored", queuedBlob: "queued queued restored",
		mine.Task: "running running -",
	} {
		if !strings.Contains(strings.Join(strings.Fields(list), " "), string(id)+" "+now) {
			t.Errorf("%s: %s is not in the list", id, now)
		}
	}
	if err := exec.CommandContext(within(t, patience), binary, "restore", file, "--nats", s.URLs(), "--credentials", s.Core()).Run(); err == nil {
		t.Error("it was restored into records")
	}
	for _, list := range [][]*harness.Process{s.Gateway, s.Placer, s.Reaper} {
		start(list)
	}
	eventually(t, "the workers are back", func() error {
		var list schemas.WorkerList
		if err := s.Call(t.Context(), 0, "GET", "/v1/workers", nil, &list); err != nil {
			return err
		}
		if len(list.Items) != 2 {
			return fmt.Errorf("there are %d", len(list.Items))
		}
		return nil
	})
	drain("undrain")

	if now := get(t, s, done); now.State != schemas.Completed || now.Stdout != "hi\n" {
		t.Errorf("what had completed is %s, with %q", now.State, now.Stdout)
	}
	var gone *schemas.Error
	if err := artifact(); !errors.As(err, &gone) || gone.Code != schemas.CodeArtifactLost {
		t.Errorf("artifacts of before: %v", err)
	}
	if now := instance(); now.Task != mine.Task {
		t.Errorf("litmus got %s beside %s", now.Task, mine.Task)
	}
	if now := until(t, s, queuedBlob, schemas.Failed); now.Reason != schemas.ReasonBlobMissing {
		t.Errorf("a task without its blob is %s (%s)", now.State, now.Reason)
	}
	for _, id := range []schemas.TaskID{requeue, queued} {
		if now := until(t, s, id, schemas.Running); now.Attempt <= schemas.RestoreLeap {
			t.Errorf("%s runs in attempt %d", id, now.Attempt)
		}
	}
	for _, id := range []schemas.TaskID{fail, queuedWait} {
		if now := get(t, s, id); now.State != schemas.Failed || now.Reason != schemas.ReasonRestored {
			t.Errorf("%s is %s (%s)", id, now.State, now.Reason)
		}
	}
	eventually(t, "its worker hears of its task again", func() error {
		var now schemas.Task
		if err := s.Call(t.Context(), 0, "POST", "/v1/tasks/"+string(wait)+"/extend", map[string]string{"ttl": "2h"}, &now); err != nil {
			return err
		}
		return nil
	})
	for _, id := range []schemas.TaskID{requeue, queued, wait, mine.Task} {
		if err := s.Call(t.Context(), 0, "DELETE", "/v1/tasks/"+string(id), nil, nil); err != nil {
			t.Fatal(err)
		}
		now := until(t, s, id, schemas.Canceled)
		if (id == wait || id == mine.Task) && (now.Attempt != 1 || len(of(id)) != 1) {
			t.Errorf("it was started anew: attempt %d, containers %+v", now.Attempt, of(id))
		}
	}
	// What the backup does not know is closed, and named.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	err := harness.Poll(ctx, func() error {
		list, err := harness.Containers(ctx, s.Cluster)
		if err == nil && len(list) > 0 {
			err = fmt.Errorf("%d containers are left", len(list))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	named := s.Reaper[0].Log()
	for _, p := range s.Agent {
		named += p.Log()
	}
	for _, id := range []schemas.TaskID{lost, lostWait} {
		var e *schemas.Error
		if err := s.Call(t.Context(), 0, "GET", "/v1/tasks/"+string(id), nil, nil); !errors.As(err, &e) || e.Code != schemas.CodeNotFound {
			t.Errorf("%s, which is not in the backup: %v", id, err)
		}
		if !strings.Contains(named, string(id)) {
			t.Errorf("%s was lost and nobody names it", id)
		}
	}
	if n := len(of(queuedWait)); n != 1 {
		t.Errorf("what may run on a worker that nobody knows of was started %d times", n)
	}
	if list := overlaps(); len(list) > 0 {
		t.Errorf("lived at the same time: %v", list)
	}
}
