// Command demo shows dayfly at work on this machine's Docker Engine, from nothing:
// it makes its image offline, starts `dayfly up` with its data in a temporary
// folder, runs tasks over HTTP, kills dayfly in the middle of one, prints what
// happened, and leaves nothing behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

func main() {
	bin := flag.String("bin", "bin/dayfly", "the dayfly binary")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	ctx, stop := context.WithTimeout(ctx, 2*time.Minute)
	defer stop()
	d := &demo{began: time.Now()}
	err := d.run(ctx, *bin)
	d.print()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
	fmt.Printf("\nAll of it held, in %.1f s. Nothing is left behind.\n", time.Since(d.began).Seconds())
}

type demo struct {
	up    *harness.Up
	image string
	began time.Time
	rows  [][3]string
	site  schemas.TaskID // the web server
}

// step does one thing and keeps what came of it for the table.
func (d *demo) step(what string, fn func() (string, error)) error {
	fmt.Printf("· %s\n", what)
	began := time.Now()
	seen, err := fn()
	took := fmt.Sprintf("%d ms", time.Since(began).Milliseconds())
	if err != nil {
		d.rows = append(d.rows, [3]string{what, "FAILED", took})
		return fmt.Errorf("%s: %w", what, err)
	}
	d.rows = append(d.rows, [3]string{what, seen, took})
	return nil
}

func (d *demo) print() {
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "WHAT\tSEEN\tTOOK")
	for _, r := range d.rows {
		fmt.Fprintf(w, "%s\t%s\t%s\n", r[0], r[1], r[2])
	}
	w.Flush()
}

func (d *demo) run(ctx context.Context, bin string) (err error) {
	if d.up, err = harness.New(bin); err != nil {
		return err
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		if e := d.up.Remove(clean); err == nil {
			err = e
		}
		if d.image != "" {
			if e := harness.RemoveImage(clean, d.image); err == nil {
				err = e
			}
		}
	}()
	for _, s := range []struct {
		what string
		do   func() (string, error)
	}{
		{"make a tiny image, offline", func() (string, error) { return d.makeImage(ctx) }},
		{"start dayfly: NATS, gateway, placer, agent, reaper", func() (string, error) {
			return "the API answers", d.up.Start(ctx)
		}},
		{"run a job that exits with 7", func() (string, error) { return d.job(ctx) }},
		{"start a long task and extend it", func() (string, error) { return d.extend(ctx) }},
		{"cancel a task that ignores TERM", func() (string, error) { return d.cancel(ctx) }},
		{"kill -9 dayfly under a running task, start it again", func() (string, error) { return d.survive(ctx) }},
		{"serve a web page with no network at all", func() (string, error) { return d.web(ctx) }},
		{"put a file into it and run a command there", func() (string, error) { return d.reach(ctx) }},
		{"run a task on a terminal, resize it, press Ctrl-C", func() (string, error) { return d.terminal(ctx) }},
		{"let a task's time run out", func() (string, error) { return d.expire(ctx) }},
		{"ask for something impossible", func() (string, error) { return d.refuse(ctx) }},
		{"stop; see that no container is left", func() (string, error) { return d.empty(ctx) }},
	} {
		if err := d.step(s.what, s.do); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) makeImage(ctx context.Context) (string, error) {
	d.image = "dayfly-demo:" + d.up.Cluster
	if err := harness.MakeImage(ctx, d.image); err != nil {
		return "", err
	}
	return d.image, nil
}

func (d *demo) create(ctx context.Context, query, ttl string, command ...string) (schemas.Task, error) {
	var t schemas.Task
	err := d.up.Call(ctx, "POST", "/v1/tasks"+query, map[string]any{
		"image": d.image, "command": command, "ttl": ttl, "resources": map[string]any{"memory": "64MiB"},
		"timeouts": map[string]any{"stop": "1s"},
	}, &t)
	return t, err
}

func (d *demo) wait(ctx context.Context, id schemas.TaskID, until string) (schemas.Task, error) {
	var t schemas.Task
	for {
		err := d.up.Call(ctx, "GET", "/v1/tasks/"+string(id)+"?wait="+until+"&timeout=20s", nil, &t)
		if err != nil || t.State.Final() || until == "running" && t.State == schemas.Running {
			return t, err
		}
	}
}

func (d *demo) job(ctx context.Context) (string, error) {
	t, err := d.create(ctx, "?wait=done&timeout=30s", "1m", "exit", "7", "hello", "from", "a", "sandbox")
	if err != nil {
		return "", err
	}
	var log string
	if err := d.up.Call(ctx, "GET", "/v1/tasks/"+string(t.ID)+"/logs", nil, &log); err != nil {
		return "", err
	}
	if t.State != schemas.Failed || t.Exit == nil || t.Exit.Code != 7 || !strings.Contains(log, "hello from a sandbox") {
		return "", fmt.Errorf("state %s, exit %+v, log %q", t.State, t.Exit, log)
	}
	return fmt.Sprintf("%s with exit code %d; it said %q", t.State, t.Exit.Code, strings.TrimSpace(log)), nil
}

func (d *demo) extend(ctx context.Context) (string, error) {
	t, err := d.create(ctx, "?wait=running&timeout=30s", "20s", "sleep", "1h")
	if err != nil {
		return "", err
	}
	before := t.ExpiresAt
	if err := d.up.Call(ctx, "POST", "/v1/tasks/"+string(t.ID)+"/extend", map[string]string{"ttl": "5m"}, &t); err != nil {
		return "", err
	}
	if gain := t.ExpiresAt.Sub(before); gain < 4*time.Minute {
		return "", fmt.Errorf("the deadline moved by %s", gain)
	}
	return fmt.Sprintf("running; %d s left instead of 20", t.SecondsLeft), d.up.Call(ctx, "DELETE", "/v1/tasks/"+string(t.ID)+"?grace=0s", nil, nil)
}

func (d *demo) cancel(ctx context.Context) (string, error) {
	t, err := d.create(ctx, "?wait=running&timeout=30s", "5m", "ignore-term")
	if err != nil {
		return "", err
	}
	err = harness.Poll(ctx, func() error { // it says so once it ignores TERM
		var log string
		err := d.up.Call(ctx, "GET", "/v1/tasks/"+string(t.ID)+"/logs", nil, &log)
		if err == nil && !strings.Contains(log, "ready") {
			err = errors.New("the task did not get ready")
		}
		return err
	})
	if err != nil {
		return "", err
	}
	if err := d.up.Call(ctx, "DELETE", "/v1/tasks/"+string(t.ID)+"?grace=500ms", nil, nil); err != nil {
		return "", err
	}
	if t, err = d.wait(ctx, t.ID, "done"); err != nil || t.State != schemas.Canceled {
		return "", fmt.Errorf("state %s: %w", t.State, err)
	}
	return "canceled: TERM, half a second of grace, KILL", nil
}

func (d *demo) survive(ctx context.Context) (string, error) {
	const lines = 300
	t, err := d.create(ctx, "?wait=running&timeout=30s", "5m", "count", fmt.Sprint(lines), "10ms")
	if err != nil {
		return "", err
	}
	if err := d.up.Kill(); err != nil {
		return "", err
	}
	if err := d.up.Start(ctx); err != nil {
		return "", err
	}
	if t, err = d.wait(ctx, t.ID, "done"); err != nil {
		return "", err
	}
	var log string
	if err := d.up.Call(ctx, "GET", "/v1/tasks/"+string(t.ID)+"/logs", nil, &log); err != nil {
		return "", err
	}
	if got := strings.Count(log, "\n"); t.State != schemas.Completed || t.Attempt != 1 || got != lines {
		return "", fmt.Errorf("state %s, attempt %d, %d of %d lines", t.State, t.Attempt, got, lines)
	}
	return fmt.Sprintf("completed in its first attempt; all %d lines are there", lines), nil
}

func (d *demo) expire(ctx context.Context) (string, error) {
	t, err := d.create(ctx, "?wait=done&timeout=30s", "2s", "sleep", "1h")
	if err != nil {
		return "", err
	}
	if t.State != schemas.Expired {
		return "", fmt.Errorf("state %s (%s)", t.State, t.Message)
	}
	return fmt.Sprintf("expired %d ms after its 2 s", max(0, t.Timings.Ended.Sub(t.ExpiresAt).Milliseconds())), nil
}

func (d *demo) refuse(ctx context.Context) (string, error) {
	err := d.up.Call(ctx, "POST", "/v1/tasks", map[string]any{"image": d.image, "resources": map[string]any{"memory": "4TiB"}}, nil)
	if err == nil {
		return "", fmt.Errorf("it was accepted")
	}
	return err.Error(), nil
}

func (d *demo) empty(ctx context.Context) (string, error) {
	err := harness.Poll(ctx, func() error {
		ids, err := d.up.Containers(ctx)
		if err == nil && len(ids) > 0 {
			err = fmt.Errorf("%d containers are left", len(ids))
		}
		return err
	})
	if err != nil {
		return "", err
	}
	return "none", d.up.Stop()
}
