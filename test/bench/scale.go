package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
	"dayfly.dev/test/stack"
)

// scaleOptions of the scale bench.
type scaleOptions struct {
	agents  []int
	through int    // tasks that go through
	live    int    // tasks that then sleep at the same time
	heap    string // file for a heap profile with all of them live
}

// scale measures what grows with the number of agents and tasks: many short tasks
// go through, then many sleep, then short ones again beside them.
func scale(ctx context.Context, o scaleOptions) error {
	for _, agents := range o.agents {
		if err := scaleRun(ctx, agents, o); err != nil {
			return fmt.Errorf("%d agents: %w", agents, err)
		}
	}
	return nil
}

const (
	scaleClients = 64
	serially     = 500
)

func scaleRun(ctx context.Context, agents int, o scaleOptions) error {
	dir, err := os.MkdirTemp("", "dayfly-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	began := time.Now()
	s, err := stack.Start(ctx, stack.Options{Dir: dir, Agents: agents, Logger: zerolog.New(os.Stderr).Level(zerolog.ErrorLevel)})
	if err != nil {
		return err
	}
	b := &scaling{s: s, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: scaleClients}}}
	defer b.client.CloseIdleConnections()
	defer func() {
		t := time.Now()
		if err := s.Stop(); err != nil {
			fmt.Println("  stop:", err)
		}
		fmt.Printf("  stopped in %.1f s\n", time.Since(t).Seconds())
	}()
	fmt.Printf("scale: %d agents, default sync, registered after %.1f s\n", agents, time.Since(began).Seconds())
	if err := b.each(ctx, scaleClients, 500, func() error { return runOne(ctx, b.client, s.URL) }); err != nil {
		return err
	}
	if err := b.rest(ctx, "no task"); err != nil {
		return err
	}
	if err := b.through(ctx, "serial", 1, serially); err != nil {
		return err
	}
	for i, part := range parts(o.through, 4) {
		if err := b.through(ctx, fmt.Sprintf("through, part %d", i+1), scaleClients, part); err != nil {
			return err
		}
	}
	if err := b.rest(ctx, fmt.Sprintf("%d ended", o.through)); err != nil {
		return err
	}
	if err := b.restarts(ctx); err != nil || o.live == 0 {
		return err
	}
	for i, part := range parts(o.live, 5) {
		began, cpu, before := time.Now(), cpuTime(), b.placing()
		if err := b.each(ctx, scaleClients, part, func() error { return b.sleep(ctx) }); err != nil {
			return err
		}
		posted := time.Since(began)
		b.live += part
		if err := b.started(ctx); err != nil {
			return err
		}
		fmt.Printf("  sleeping, part %d  %6.0f POSTs/s, %6.0f started/s  cpu %.2f ms/task  placing %s\n", i+1,
			float64(part)/posted.Seconds(), float64(part)/time.Since(began).Seconds(), perTask(cpuTime()-cpu, part), b.placing().since(before))
	}
	if err := b.rest(ctx, fmt.Sprintf("%d live", o.live)); err != nil {
		return err
	}
	if o.heap != "" {
		f, err := os.Create(o.heap)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.WriteHeapProfile(f); err != nil {
			return err
		}
	}
	if err := b.through(ctx, "through beside them", scaleClients, max(1, o.through/4)); err != nil {
		return err
	}
	if err := b.through(ctx, "serial beside them", 1, serially); err != nil {
		return err
	}
	return b.restarts(ctx)
}

func parts(n, of int) (list []int) {
	for i := range of {
		list = append(list, n*(i+1)/of-n*i/of)
	}
	return list
}

type scaling struct {
	s      *stack.Stack
	client *http.Client
	live   int // tasks that sleep
}

// each calls fn n times, from some goroutines.
func (b *scaling) each(ctx context.Context, clients, n int, fn func() error) error {
	var left atomic.Int64
	left.Store(int64(n))
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for left.Add(-1) >= 0 && ctx.Err() == nil && failed.Load() == nil {
				if err := fn(); err != nil {
					failed.Store(&err)
				}
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return ctx.Err()
}

func (b *scaling) through(ctx context.Context, what string, clients, n int) error {
	before, cpu, began := b.placing(), cpuTime(), time.Now()
	var mu sync.Mutex
	var all sample
	err := b.each(ctx, clients, n, func() error {
		t := time.Now()
		if err := runOne(ctx, b.client, b.s.URL); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		all = append(all, time.Since(t))
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Printf("  %-19s %s  %6.0f tasks/s  cpu %.2f ms/task  placing %s\n", what, all,
		float64(n)/time.Since(began).Seconds(), perTask(cpuTime()-cpu, n), b.placing().since(before))
	return nil
}

var sleeper = []byte(`{"image":"fake","command":["sleep","20h"],"ttl":"24h"}`)

func (b *scaling) sleep(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, "POST", b.s.URL+"/v1/tasks", bytes.NewReader(sleeper))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := b.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusCreated {
		err = fmt.Errorf("%s: %.300s", res.Status, body)
	}
	return err
}

// started waits until all sleeping tasks have been started.
func (b *scaling) started(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		n := 0
		for _, rt := range b.s.Runtimes {
			n += rt.Live()
		}
		if n >= b.live {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%d of %d started: %w", n, b.live, ctx.Err())
		}
	}
}

// restFor is how long a stack at rest is watched: two beats of each agent.
const restFor = 10 * time.Second

func (b *scaling) rest(ctx context.Context, what string) error {
	wait := func(d time.Duration) {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
	}
	wait(3 * time.Second) // what was put off comes to its end
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	first, err := b.beats(ctx)
	if err != nil {
		return err
	}
	cpu, began := cpuTime(), time.Now()
	wait(restFor)
	used, took := cpuTime()-cpu, time.Since(began)
	last, err := b.beats(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("  at rest, %-15s heap %4d MiB, stacks %3d MiB, RSS %4d MiB, %d goroutines; %.1f %% of one CPU; %.1f beats/s (%.1f expected)\n", what,
		m.HeapAlloc>>20, m.StackInuse>>20, rss()>>20, runtime.NumGoroutine(), 100*used.Seconds()/took.Seconds(),
		float64(last-first)/took.Seconds(), float64(len(b.s.Runtimes))/5)
	return ctx.Err()
}

// beats is how many beats there have been.
func (b *scaling) beats(ctx context.Context) (uint64, error) {
	stream, err := b.s.Conn().JS.Stream(ctx, bus.StreamOf(schemas.BucketWorkers))
	if err != nil {
		return 0, err
	}
	return stream.CachedInfo().State.LastSeq, nil
}

func (b *scaling) restarts(ctx context.Context) error {
	fmt.Print("  views complete after a restart:")
	for _, name := range []string{"placer", "reaper", "gateway"} {
		cpu := cpuTime()
		took, err := b.s.Restart(ctx, name)
		if err != nil {
			return err
		}
		fmt.Printf("  %s %.2f s (cpu %.2f s)", name, took.Seconds(), (cpuTime() - cpu).Seconds())
	}
	fmt.Println()
	return nil
}

// placing is the placer's histogram: how many were placed within each bound.
type placing map[float64]float64

func (b *scaling) placing() placing {
	p := placing{}
	families, err := b.s.Metrics("placer").Gather()
	if err != nil {
		return p
	}
	for _, f := range families {
		if f.GetName() != "dayfly_placement_seconds" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, bucket := range m.GetHistogram().GetBucket() {
				p[bucket.GetUpperBound()] = float64(bucket.GetCumulativeCount())
			}
			p[math.Inf(1)] = float64(m.GetHistogram().GetSampleCount())
		}
	}
	return p
}

// since gives the bounds under which p50 and p99 lie.
func (p placing) since(before placing) string {
	total := p[math.Inf(1)] - before[math.Inf(1)]
	bound := func(q float64) float64 {
		least := math.Inf(1)
		for le, n := range p {
			if n-before[le] >= q*total {
				least = min(least, le)
			}
		}
		return least * 1000
	}
	return fmt.Sprintf("p50 ≤ %g  p99 ≤ %g ms", bound(.5), bound(.99))
}

// rss is the resident memory of this process.
func rss() uint64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	if f := strings.Fields(string(b)); len(f) > 1 {
		n, _ := strconv.ParseUint(f[1], 10, 64)
		return n * uint64(os.Getpagesize())
	}
	return 0
}
