package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// copies measures a file of 16 MiB into a task's folder on the disk and out of it, by
// dayfly and by docker cp in turns, which reaches no folder in memory.
func copies(ctx context.Context, c *client.Client, task schemas.Task, n int) error {
	const size = 16 << 20
	dir, err := os.MkdirTemp("", "dayfly-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "x")
	if err := os.WriteFile(file, make([]byte, size), 0o600); err != nil {
		return err
	}
	docker := func(from, to string) error {
		if out, err := exec.CommandContext(ctx, "docker", "cp", "-q", from, to).CombinedOutput(); err != nil {
			return fmt.Errorf("docker cp: %w: %s", err, out)
		}
		return nil
	}
	inside := fmt.Sprintf("dayfly-%s-%d:/data/", task.ID, task.Attempt)
	var times [4]sample
	for i := range n + 5 {
		for k, one := range []func() error{
			func() error {
				f, err := os.Open(file)
				if err != nil {
					return err
				}
				defer f.Close()
				_, err = c.PutFile(ctx, task.ID, "/data/ours", f, size, 0)
				return err
			},
			func() error { return docker(file, inside+"theirs") },
			func() error {
				d, err := c.GetFiles(ctx, task.ID, "/data/ours")
				if err != nil {
					return err
				}
				defer d.Close()
				f, err := os.Create(filepath.Join(dir, "back"))
				if err != nil {
					return err
				}
				_, err = io.Copy(f, d)
				return errors.Join(err, f.Close())
			},
			func() error { return docker(inside+"theirs", filepath.Join(dir, "back")) },
		} {
			began := time.Now()
			if err := one(); err != nil {
				return err
			}
			if i >= 5 { // warm
				times[k] = append(times[k], time.Since(began))
			}
		}
	}
	fmt.Println("a file of 16 MiB to and from the task's own disk, in turns")
	for k, name := range []string{"in, dayfly", "in, docker cp", "out, dayfly", "out, docker cp"} {
		fmt.Printf("  %-15s %4.0f MB/s  %s\n", name, size/1e3/times[k].at(.5), times[k])
	}
	return nil
}

// beats measures what a copy of 500 MB after another does to the worker's heartbeats and
// to the tasks beside it: the time between two beats as the bus sees them, ten times as
// often as usual, and the life of short tasks from POST to final.
func beats(ctx context.Context, bin string, n int) (err error) {
	n = max(n, 100)
	s, err := harness.NewSite(ctx, harness.SiteOptions{Bin: bin, Scale: 0.1})
	if err != nil {
		return err
	}
	image := "dayfly-bench:" + strings.ToLower(rand.Text()[:10])
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, s.Remove(clean), harness.RemoveImage(clean, image))
	}()
	if err := errors.Join(harness.MakeImage(ctx, image), s.Start(ctx)); err != nil {
		return err
	}
	text, err := os.ReadFile(s.Core())
	if err != nil {
		return err
	}
	var secrets struct {
		Core string `json:"core"`
	}
	if err := json.Unmarshal(text, &secrets); err != nil {
		return err
	}
	conn, err := bus.Connect(ctx, bus.Config{Name: "bench", URL: s.URLs(), User: natsd.CoreUser, Password: secrets.Core, Logger: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer conn.Close()
	c, err := client.New(s.Gateway[0].Addrs.HTTP)
	if err != nil {
		return err
	}
	big, err := c.Create(ctx, schemas.Spec{Image: image, Command: []string{"sleep", "1h"}, Resources: schemas.Resources{Memory: 800 << 20, CPUs: 1, Disk: 600 << 20}},
		client.CreateOptions{Wait: client.UntilRunning})
	if err != nil {
		return err
	}
	fmt.Println("beside copies of 500 MB, a beat each 0.5 s")
	for _, copying := range []bool{false, true} {
		var work sync.WaitGroup
		within, stop := context.WithCancel(ctx)
		copied := 0
		if copying {
			work.Go(func() {
				for within.Err() == nil {
					if _, err := c.PutFile(within, big.ID, "/task/output/x", io.LimitReader(endless{}, 500<<20), 500<<20, 0); err == nil {
						copied++
					}
				}
			})
		}
		var lives sample
		var failed error
		work.Go(func() {
			for within.Err() == nil {
				began := time.Now()
				var t schemas.Task
				err := s.Call(within, 0, http.MethodPost, "/v1/tasks?wait=done&timeout=60s", map[string]any{"image": image, "command": []string{"true"}}, &t)
				if err != nil && within.Err() == nil {
					failed = err
					return
				}
				if err == nil {
					lives = append(lives, time.Since(began))
				}
			}
		})
		intervals, err := listen(within, conn, n)
		stop()
		work.Wait()
		if err = errors.Join(err, failed); err != nil {
			return err
		}
		fmt.Printf("  %-24s between beats %s\n  %-24s short tasks   %s\n", map[bool]string{false: "nothing is copied", true: fmt.Sprintf("%d copies", copied)}[copying], intervals, "", lives)
	}
	return nil
}

// listen gives the times between n beats.
func listen(ctx context.Context, conn *bus.Conn, n int) (sample, error) {
	sub, err := conn.NC.SubscribeSync("$KV." + schemas.BucketWorkers + ".>")
	if err != nil {
		return nil, err
	}
	defer sub.Unsubscribe()
	var intervals sample
	var last time.Time
	for len(intervals) < n {
		if _, err := sub.NextMsgWithContext(ctx); err != nil {
			return nil, err
		}
		now := time.Now()
		if !last.IsZero() {
			intervals = append(intervals, now.Sub(last))
		}
		last = now
	}
	return intervals, nil
}
