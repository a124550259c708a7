package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/test/stack"
)

// control measures the whole life of a task (POST until the final record is seen
// over HTTP) with the fake runtime, with the server's default sync and with every
// record write synced. Everything, the load too, shares this process.
func control(ctx context.Context, n int) error {
	if n == 0 {
		n = 400
	}
	for _, always := range []bool{false, true} {
		if err := controlRun(ctx, n, always); err != nil {
			return err
		}
	}
	return nil
}

func controlRun(ctx context.Context, n int, always bool) error {
	dir, err := os.MkdirTemp("", "dayfly-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	s, err := stack.Start(ctx, stack.Options{Dir: dir, SyncAlways: always, Agents: 50, Logger: zerolog.New(os.Stderr).Level(zerolog.WarnLevel)})
	if err != nil {
		return err
	}
	defer s.Stop()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 512}}
	defer client.CloseIdleConnections()
	one := func() error { return runOne(ctx, client, s.URL) }
	for range 100 { // warm up
		if err := one(); err != nil {
			return err
		}
	}
	mode := "default sync"
	if always {
		mode = "SyncAlways"
	}
	fmt.Printf("control plane, fake runtime, 50 agents, %s; one fsync of 1200 B here: %v\n", mode, fsync(dir))

	var serial sample
	cpu, flushes, began := cpuTime(), flushCount(dir), time.Now()
	for range n {
		t := time.Now()
		if err := one(); err != nil {
			return err
		}
		serial = append(serial, time.Since(t))
	}
	fmt.Printf("  serial       %s  %6.0f tasks/s  cpu %.2f ms/task  flushes/task %.2f\n", serial,
		float64(n)/time.Since(began).Seconds(), perTask(cpuTime()-cpu, n), float64(flushCount(dir)-flushes)/float64(n))
	for _, clients := range []int{32, 256} {
		var total atomic.Int64
		var mu sync.Mutex
		var all sample
		var failed error
		cpu, flushes, began := cpuTime(), flushCount(dir), time.Now()
		var wg sync.WaitGroup
		for range clients {
			wg.Go(func() {
				for time.Since(began) < 3*time.Second && ctx.Err() == nil {
					t := time.Now()
					err := one()
					mu.Lock()
					if err != nil {
						failed = err
						mu.Unlock()
						return
					}
					all = append(all, time.Since(t))
					mu.Unlock()
					total.Add(1)
				}
			})
		}
		wg.Wait()
		if failed != nil {
			return failed
		}
		count := int(total.Load())
		fmt.Printf("  %3d clients  %s  %6.0f tasks/s  cpu %.2f ms/task  flushes/task %.2f\n", clients, all,
			float64(count)/time.Since(began).Seconds(), perTask(cpuTime()-cpu, count), float64(flushCount(dir)-flushes)/float64(count))
	}
	return nil
}

var body = []byte(`{"image":"fake","command":["exit","0"]}`)

// runOne posts a task and waits for its final record.
func runOne(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, "POST", url+"/v1/tasks?wait=done&timeout=30s", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusCreated || !bytes.Contains(b, []byte(`"state":"completed"`)) {
		return fmt.Errorf("%s: %.300s", res.Status, b)
	}
	return nil
}

func perTask(d time.Duration, n int) float64 { return d.Seconds() * 1000 / float64(max(n, 1)) }

// cpuTime is what this process has used of all processors.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// fsync is the median of a small append with fsync in dir: the ruler for figures
// with synced writes.
func fsync(dir string) time.Duration {
	f, err := os.Create(filepath.Join(dir, "fsync"))
	if err != nil {
		return 0
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var s sample
	for range 100 {
		t := time.Now()
		_, _ = f.Write(make([]byte, 1200))
		_ = f.Sync()
		s = append(s, time.Since(t))
	}
	return time.Duration(s.at(.5) * float64(time.Millisecond))
}

// flushCount is how often the disk under dir was told to flush since boot, by
// anybody (field 16 of the block device's stat).
func flushCount(dir string) int64 {
	var st syscall.Stat_t
	if syscall.Stat(dir, &st) != nil {
		return 0
	}
	major, minor := (st.Dev>>8)&0xfff, st.Dev&0xff|(st.Dev>>12)&0xfff00
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/stat", major, minor))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	if len(f) < 16 {
		return 0
	}
	n, _ := strconv.ParseInt(f[15], 10, 64)
	return n
}
