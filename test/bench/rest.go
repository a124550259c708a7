package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// restOptions of the rest bench.
type restOptions struct {
	bin       string
	sleepers  int // real containers
	followers int // readers of all events
}

// rest measures what `up` takes while it has little to do: with no task, with many
// sleeping containers of the real Docker, and with many followers of all events; and how
// long after a change the last of them has heard of it.
func rest(ctx context.Context, o restOptions) (err error) {
	up, err := harness.New(o.bin)
	if err != nil {
		return err
	}
	up.Args = []string{"--slots", fmt.Sprint(o.sleepers + 10), "--cpus", fmt.Sprint(o.sleepers)}
	image := "dayfly-bench:" + up.Cluster
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
		defer cancel()
		err = errors.Join(err, up.Remove(clean), harness.RemoveImage(clean, image))
	}()
	if err := harness.MakeImage(ctx, image); err != nil {
		return err
	}
	if err := up.Start(ctx); err != nil {
		return err
	}
	watch := func(what string) {
		wait(ctx, 5*time.Second) // what was put off comes to its end
		cpu, began := cpuOf(up.Pid()), time.Now()
		wait(ctx, 30*time.Second)
		fmt.Printf("  %-44s cpu %.2f %% of one processor, RSS %d MiB\n", what,
			100*(cpuOf(up.Pid())-cpu).Seconds()/time.Since(began).Seconds(), rssOf(up.Pid())>>20)
	}
	fmt.Println("up, one process with everything")
	watch("no task")

	body, err := json.Marshal(map[string]any{"image": image, "command": []string{"sleep", "1h"}, "ttl": "2h",
		"resources": map[string]any{"memory": "16MiB", "disk": "1MiB"}, "timeouts": map[string]string{"stop": "0s"}})
	if err != nil {
		return err
	}
	began := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(o.sleepers + 1)
	for range o.sleepers {
		g.Go(func() error {
			var t schemas.Task
			if err := harness.Call(gctx, http.MethodPost, up.URL+"/v1/tasks", "", json.RawMessage(bytes.Clone(body)), &t); err != nil {
				return err
			}
			return harness.Poll(gctx, func() error {
				if err := up.Call(gctx, http.MethodGet, "/v1/tasks/"+string(t.ID)+"?wait=running&timeout=60s", nil, &t); err != nil {
					return err
				}
				switch {
				case t.State.Final():
					return harness.Fatal(fmt.Errorf("task %s: %s", t.State, t.Message))
				case t.State != schemas.Running:
					return errors.New("not yet running")
				}
				return nil
			})
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	fmt.Printf("  %d real containers started in %.1f s\n", o.sleepers, time.Since(began).Seconds())
	watch(fmt.Sprintf("%d sleeping containers", o.sleepers))
	if o.followers == 0 {
		return nil
	}
	if err := followed(ctx, up, o.followers, image); err != nil {
		return err
	}
	return ctx.Err()
}

// followed starts followers of all events, and some tasks that they hear of.
func followed(ctx context.Context, up *harness.Up, n int, image string) error {
	const tasks = 20
	ctx, stop := context.WithCancel(ctx)
	var readers sync.WaitGroup
	defer readers.Wait()
	defer stop()
	transport := &http.Transport{MaxIdleConnsPerHost: n}
	defer transport.CloseIdleConnections()
	c, err := client.New(up.URL, client.WithHTTPClient(&http.Client{Transport: transport}))
	if err != nil {
		return err
	}
	var heard, failed atomic.Int64
	var mu sync.Mutex
	var delays sample
	ready := make(chan struct{}, n)
	for range n {
		readers.Go(func() {
			first := true
			for e, err := range c.Events(ctx, client.EventOptions{Follow: true, Labels: map[string]string{"bench": "rest"}}) {
				if err != nil {
					if ctx.Err() == nil {
						failed.Add(1)
					}
					return
				}
				if first {
					first = false
					ready <- struct{}{}
					continue
				}
				if e.State.Final() {
					delay := time.Since(e.At)
					mu.Lock()
					delays = append(delays, delay)
					mu.Unlock()
					heard.Add(1)
				}
			}
		})
	}
	one := map[string]any{"image": image, "command": []string{"true"}, "labels": map[string]string{"bench": "rest"}}
	var t schemas.Task
	if err := up.Call(ctx, http.MethodPost, "/v1/tasks?wait=done", one, &t); err != nil {
		return err
	}
	for i := range n {
		select {
		case <-ready:
		case <-time.After(30 * time.Second):
			return fmt.Errorf("%d of %d followers have heard nothing, %d were refused", n-i, n, failed.Load())
		}
	}
	err = harness.Poll(ctx, func() error { // each hears of the end of the first task too
		if heard.Load() < int64(n) {
			return errors.New("not all have heard of the first")
		}
		return nil
	})
	if err != nil {
		return err
	}
	cpu, began := cpuOf(up.Pid()), time.Now()
	wait(ctx, 30*time.Second)
	fmt.Printf("  %-44s cpu %.2f %% of one processor, RSS %d MiB\n", fmt.Sprintf("and %d followers of all events", n),
		100*(cpuOf(up.Pid())-cpu).Seconds()/time.Since(began).Seconds(), rssOf(up.Pid())>>20)
	mu.Lock()
	delays = delays[:0]
	mu.Unlock()
	heard.Store(0)
	for range tasks {
		if err := up.Call(ctx, http.MethodPost, "/v1/tasks?wait=done", one, &t); err != nil {
			return err
		}
	}
	err = harness.Poll(ctx, func() error {
		if got := heard.Load(); got < int64(n)*tasks {
			return fmt.Errorf("%d of %d events came", got, n*tasks)
		}
		return nil
	})
	if err != nil {
		return err
	}
	mu.Lock()
	defer mu.Unlock()
	fmt.Printf("  the end of a task, heard by each of them: %s after it was settled; %d failed\n", delays, failed.Load())
	return nil
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
