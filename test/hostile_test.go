package test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// hostile is one hostile program: what it runs, and how it must end.
type hostile struct {
	command []string
	spec    map[string]any // laid over the default
	state   schemas.State
	reason  schemas.Reason
	code    int    // -1: any
	stdout  string // must be in it
	check   func(t *testing.T, task schemas.Task)
}

// TestHostilePrograms runs programs that try to take more than they were given, as
// real tasks, each beside a neighbour that must not be disturbed. What the host has
// is looked at before and after.
func TestHostilePrograms(t *testing.T) {
	image := testImage(t)
	up := newUp(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := up.Start(ctx); err != nil {
		t.Fatal(err)
	}
	post := func(query string, over map[string]any, command ...string) (schemas.Task, error) {
		spec := map[string]any{"image": image, "command": command, "ttl": "1m",
			"resources": map[string]any{"memory": "64MiB", "cpus": 0.5, "pids": 64, "disk": "4MiB"},
			"timeouts":  map[string]any{"stop": "500ms"}}
		for k, v := range over {
			spec[k] = v
		}
		var task schemas.Task
		err := up.Call(ctx, "POST", "/v1/tasks"+query, spec, &task)
		return task, err
	}
	neighbour, err := post("?wait=running&timeout=30s", map[string]any{"ttl": "5m"}, "count", "100000", "20ms")
	if err != nil || neighbour.State != schemas.Running {
		t.Fatalf("the neighbour is %s: %v", neighbour.State, err)
	}
	hosts, err := os.ReadFile("/etc/hosts")
	if err != nil {
		t.Fatal(err)
	}
	ok := hostile{state: schemas.Completed, reason: schemas.ReasonExit, code: 0}
	denied := func(name string) hostile { // exits 0 if the kernel denied it
		h := ok
		h.command = []string{"try", name}
		return h
	}
	cases := map[string]hostile{
		"fork bomb": {command: []string{"fork-bomb"}, state: "", code: -1},
		"memory":    {command: []string{"eat", "268435456"}, state: schemas.Failed, reason: schemas.ReasonOOM, code: 137},
		"a child out of memory": {command: []string{"child-oom", "268435456"}, state: schemas.Completed, code: 0, check: func(t *testing.T, task schemas.Task) {
			if !task.Exit.OOMKilled {
				t.Error("oom_killed is not set")
			}
		}},
		"fill the output folder":  {command: []string{"fill", "/task/output/x"}, state: schemas.Completed, code: 0},
		"fill /tmp":               {command: []string{"fill", "/tmp/x"}, state: "", code: -1},
		"inodes":                  {command: []string{"inodes", "/tmp"}, state: schemas.Completed, code: 0},
		"ignores TERM at its TTL": {command: []string{"ignore-term"}, spec: map[string]any{"ttl": "1s"}, state: schemas.Expired, reason: schemas.ReasonExpired, code: -1},
		"daemonised child":        {command: []string{"daemonize"}, state: schemas.Completed, code: 0},
		"setuid binary":           {command: []string{"suid"}, spec: map[string]any{"entrypoint": []string{"/bin/suid"}}, state: schemas.Completed, code: 0, stdout: "euid=1000"},
		"what is of dayfly":       {command: []string{"read-dayfly"}, state: schemas.Completed, code: 0},
		"log flood": {command: []string{"spam", "200000000"}, state: schemas.Completed, code: 0, check: func(t *testing.T, task schemas.Task) {
			if task.Logs == nil || !task.Logs.Truncated || task.Logs.Why != "limit" || task.Logs.StdoutBytes+task.Logs.Dropped != 200_000_000 {
				t.Errorf("logs %+v", task.Logs)
			}
		}},
		"vsock": denied("vsock"), "io_uring": denied("io_uring"), "unshare": denied("unshare"), "unshare mounts": denied("unshare-ns"),
		"mount": denied("mount"), "write to /": denied("write-root"), "write /etc/hosts": denied("write-hosts"), "ptrace init": denied("ptrace"),
		"kill init": denied("kill-init"), "keyctl": denied("keyctl"), "mknod": denied("mknod"), "bpf": denied("bpf"), "the Docker socket": denied("docker"),
		"core pattern": denied("core-pattern"), "raw packets": denied("packet"), "userfaultfd": denied("userfaultfd"), "setns": denied("setns"),
	}
	t.Run("each ends as it must", func(t *testing.T) {
		slots := make(chan struct{}, 3)
		for name, h := range cases {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				slots <- struct{}{}
				defer func() { <-slots }()
				task, err := post("?wait=done&timeout=60s", h.spec, h.command...)
				if err != nil {
					t.Fatal(err)
				}
				for !task.State.Final() {
					if err := up.Call(ctx, "GET", "/v1/tasks/"+string(task.ID)+"?wait=done&timeout=60s", nil, &task); err != nil {
						t.Fatal(err)
					}
				}
				said := fmt.Sprintf("%s (%s: %s), exit %+v, stdout %.200q, stderr %.200q", task.State, task.Reason, task.Message, task.Exit, task.Stdout, task.Stderr)
				if h.state != "" && task.State != h.state || h.reason != "" && task.Reason != h.reason || task.State == schemas.Expired && h.state != schemas.Expired {
					t.Errorf("ended %s, want %s (%s)", said, h.state, h.reason)
				}
				if h.code >= 0 && (task.Exit == nil || task.Exit.Code != h.code) {
					t.Errorf("ended %s, want exit code %d", said, h.code)
				}
				if !strings.Contains(task.Stdout, h.stdout) {
					t.Errorf("ended %s, want %q in stdout", said, h.stdout)
				}
				if h.check != nil {
					h.check(t, task)
				}
				t.Log(said)
			})
		}
	})

	if err := up.Call(ctx, "GET", "/v1/tasks/"+string(neighbour.ID), nil, &neighbour); err != nil || neighbour.State != schemas.Running || neighbour.Attempt != 1 {
		t.Errorf("the neighbour is %s in attempt %d: %v", neighbour.State, neighbour.Attempt, err)
	}
	if now, err := os.ReadFile("/etc/hosts"); err != nil || string(now) != string(hosts) {
		t.Errorf("/etc/hosts of the host has changed: %v", err)
	}
	if err := up.Call(ctx, "DELETE", "/v1/tasks/"+string(neighbour.ID)+"?grace=0s", nil, nil); err != nil {
		t.Error(err)
	}
	err = harness.Poll(ctx, func() error {
		ids, err := up.Containers(ctx)
		if err == nil && len(ids) > 0 {
			err = fmt.Errorf("%d containers are left", len(ids))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
