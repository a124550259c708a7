package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/fakeruntime"
	"dayfly.dev/test/harness"
)

// scaleOptions of the scale bench.
type scaleOptions struct {
	bin     string
	sync    string
	agents  []int
	through int // tasks that go through
	live    int // tasks that then sleep at the same time
}

// scale measures what grows with the number of agents and tasks: many short tasks go
// through, then many sleep, then short ones again beside them. Each core service and
// NATS are processes of their own; the agents and the clients share this one.
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

func scaleRun(ctx context.Context, agents int, o scaleOptions) (err error) {
	s, err := harness.NewSite(ctx, harness.SiteOptions{Bin: o.bin, Fake: true, Agents: -1, Sync: o.sync})
	if err != nil {
		return err
	}
	b := &scaling{site: s, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: scaleClients}}}
	defer func() {
		b.client.CloseIdleConnections()
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, b.stop(), s.Remove(clean))
	}()
	if err := s.Start(ctx); err != nil {
		return err
	}
	b.url = s.Gateway[0].Addrs.HTTP
	began := time.Now()
	if err := b.start(ctx, agents); err != nil {
		return err
	}
	fmt.Printf("scale: %d agents, sync %s, registered after %.1f s\n", agents, o.sync, time.Since(began).Seconds())
	if err := b.each(ctx, scaleClients, 500, func() error { return runOne(ctx, b.client, b.url) }); err != nil {
		return err
	}
	if err := b.rest(ctx, "no task"); err != nil {
		return err
	}
	if err := b.through(ctx, "serial", 1, serially); err != nil {
		return err
	}
	for i, part := range parts(o.through, 2) {
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
	for i, part := range parts(o.live, 4) {
		began := time.Now()
		if err := b.each(ctx, scaleClients, part, func() error { return b.sleep(ctx) }); err != nil {
			return err
		}
		posted := time.Since(began)
		b.live += part
		if err := b.started(ctx); err != nil {
			return err
		}
		took := time.Since(began)
		placed, err := b.placing(ctx, part)
		if err != nil {
			return err
		}
		fmt.Printf("  sleeping, part %d     %6.0f POSTs/s, %6.0f started/s  placing %s\n", i+1,
			float64(part)/posted.Seconds(), float64(part)/took.Seconds(), placed)
	}
	if err := b.rest(ctx, fmt.Sprintf("%d live", o.live)); err != nil {
		return err
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
	site   *harness.Site
	url    string
	client *http.Client
	live   int // tasks that sleep

	runtimes []*fakeruntime.Runtime
	conns    []*bus.Conn
	agents   errgroup.Group
	cancel   context.CancelFunc
}

// start starts the agents and waits until their workers are shown.
func (b *scaling) start(ctx context.Context, n int) error {
	text, err := os.ReadFile(b.site.Core())
	if err != nil {
		return err
	}
	var secrets struct {
		Join string `json:"join"`
	}
	if err := json.Unmarshal(text, &secrets); err != nil {
		return err
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	b.cancel = cancel
	log := zerolog.New(os.Stderr).Level(zerolog.ErrorLevel)
	for i := range n {
		w := schemas.WorkerID(fmt.Sprintf("w%04d", i))
		c, err := bus.Connect(ctx, bus.Config{Name: string(w), URL: b.site.URLs(), User: string(w), Password: natsd.WorkerToken(secrets.Join, w),
			InboxPrefix: schemas.AgentInbox(w), APIPrefix: schemas.AgentAPIPrefix, Logger: log})
		if err != nil {
			return err
		}
		rt := fakeruntime.New(fakeruntime.Config{})
		b.conns, b.runtimes = append(b.conns, c), append(b.runtimes, rt)
		b.agents.Go(func() error {
			return agent.Run(run, agent.Deps{Conn: c, Runtime: rt, Logger: log, Metrics: prometheus.NewRegistry()},
				agent.DefaultConfig(w, filepath.Join(b.site.Dir, "agents", string(w))))
		})
	}
	return harness.Poll(ctx, func() error {
		var list schemas.WorkerList
		err := harness.Call(ctx, http.MethodGet, b.url+"/v1/workers", "", nil, &list)
		if err == nil && len(list.Items) < n {
			err = fmt.Errorf("%d of %d workers", len(list.Items), n)
		}
		return err
	})
}

func (b *scaling) stop() error {
	if b.cancel == nil {
		return nil
	}
	b.cancel()
	err := b.agents.Wait()
	for _, c := range b.conns {
		c.Close()
	}
	return err
}

// each calls fn n times, from some goroutines.
func (b *scaling) each(ctx context.Context, clients, n int, fn func() error) error {
	var left atomic.Int64
	left.Store(int64(n))
	g, gctx := errgroup.WithContext(ctx)
	for range clients {
		g.Go(func() error {
			for left.Add(-1) >= 0 && gctx.Err() == nil {
				if err := fn(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return errors.Join(g.Wait(), ctx.Err())
}

func (b *scaling) through(ctx context.Context, what string, clients, n int) error {
	cpu, began := cpuTime()+b.cpu(), time.Now()
	var mu sync.Mutex
	var all sample
	err := b.each(ctx, clients, n, func() error {
		t := time.Now()
		if err := runOne(ctx, b.client, b.url); err != nil {
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
	took, used := time.Since(began), cpuTime()+b.cpu()-cpu
	placed, err := b.placing(ctx, n)
	if err != nil {
		return err
	}
	fmt.Printf("  %-19s %s  %6.0f tasks/s  cpu %.2f ms/task  placing %s\n", what, all, float64(n)/took.Seconds(), perTask(used, n), placed)
	return nil
}

// placing says how long the newest n tasks waited for their worker: from when the
// gateway was about to write the record until the placer had chosen.
func (b *scaling) placing(ctx context.Context, n int) (string, error) {
	var waits sample
	cursor := ""
	for n > 0 {
		var page schemas.TaskList
		if err := harness.Call(ctx, http.MethodGet, fmt.Sprintf("%s/v1/tasks?limit=%d%s", b.url, min(n, 1000), cursor), "", nil, &page); err != nil {
			return "", err
		}
		for _, t := range page.Items {
			if !t.Timings.Assigned.IsZero() {
				waits = append(waits, t.Timings.Assigned.Sub(t.Timings.Accepted))
			}
		}
		if n -= len(page.Items); page.NextCursor == "" {
			break
		}
		cursor = "&cursor=" + page.NextCursor
	}
	return fmt.Sprintf("p50 %.2f  p99 %.2f ms", waits.at(.5), waits.at(.99)), nil
}

var sleeper = []byte(`{"image":"fake","command":["sleep","20h"],"ttl":"24h"}`)

func (b *scaling) sleep(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, b.url+"/v1/tasks", bytes.NewReader(sleeper))
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
		for _, rt := range b.runtimes {
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

// services are the processes that are looked at.
func (b *scaling) services() []*harness.Process {
	return []*harness.Process{b.site.NATS[0], b.site.Gateway[0], b.site.Placer[0], b.site.Reaper[0]}
}

// restFor is how long a site at rest is watched: two beats of each agent.
const restFor = 10 * time.Second

// rest prints what each process takes while no client asks anything.
func (b *scaling) rest(ctx context.Context, what string) error {
	wait(ctx, 4*time.Second) // what was put off comes to its end
	fmt.Printf("  at rest, %s:", what)
	var before []time.Duration
	for _, p := range b.services() {
		if err := harness.Call(ctx, http.MethodGet, p.Addrs.Admin+"/debug/pprof/heap?gc=1", "", nil, new(string)); err != nil {
			return err
		}
		before = append(before, cpuOf(p.PID()))
	}
	own, began := cpuTime(), time.Now()
	wait(ctx, restFor)
	took := time.Since(began).Seconds()
	for i, p := range b.services() {
		fmt.Printf("  %s heap %d RSS %d MiB cpu %.1f %%,", p.Name, heapOf(ctx, p)>>20, rssOf(p.PID())>>20, 100*(cpuOf(p.PID())-before[i]).Seconds()/took)
	}
	fmt.Printf("  agents and clients RSS %d MiB cpu %.1f %%\n", rssOf(os.Getpid())>>20, 100*(cpuTime()-own).Seconds()/took)
	return ctx.Err()
}

// restarts stops each service and says how long the next one takes from its start until
// its views are complete.
func (b *scaling) restarts(ctx context.Context) error {
	fmt.Print("  views complete after a restart:")
	for _, p := range b.services()[1:] {
		if err := p.Stop(); err != nil {
			return err
		}
		began := time.Now()
		if err := p.Start(ctx); err != nil {
			return err
		}
		if err := p.Ready(ctx); err != nil {
			return err
		}
		fmt.Printf("  %s %.2f s (cpu %.2f s)", p.Name, time.Since(began).Seconds(), cpuOf(p.PID()).Seconds())
	}
	fmt.Println()
	b.url = b.site.Gateway[0].Addrs.HTTP
	return nil
}

// cpu is what the services' processes have used.
func (b *scaling) cpu() (sum time.Duration) {
	for _, p := range b.services() {
		sum += cpuOf(p.PID())
	}
	return sum
}

// cpuOf is the processor time of a process: fields 14 and 15 of its stat, in
// hundredths of a second.
func cpuOf(pid int) time.Duration {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// rssOf is the resident memory of a process.
func rssOf(pid int) uint64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	n, _ := strconv.ParseUint(f[1], 10, 64)
	return n * uint64(os.Getpagesize())
}

// heapOf is the heap that a process has in use, by its own metrics.
func heapOf(ctx context.Context, p *harness.Process) uint64 {
	var text string
	if err := harness.Call(ctx, http.MethodGet, p.Addrs.Admin+"/metrics", "", nil, &text); err != nil {
		return 0
	}
	for line := range strings.SplitSeq(text, "\n") {
		if v, ok := strings.CutPrefix(line, "go_memstats_heap_alloc_bytes "); ok {
			f, _ := strconv.ParseFloat(v, 64)
			return uint64(f)
		}
	}
	return 0
}
