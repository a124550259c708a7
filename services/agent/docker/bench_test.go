package docker_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/docker"
)

// BenchmarkColdStart measures, round robin so that all meet the same load:
//
//	start       Runtime.Start: until the task's process has been started
//	same        the raw calls create and start with the identical configuration
//	none        the same again, but network none as libnetwork makes it
//
// It prints medians, ninetieth percentiles and the ratios of start to the others.
// Removals are between the measurements.
func BenchmarkColdStart(b *testing.B) {
	rt := openIn(b, b.TempDir(), "w-bench")
	if err := rt.Permit(rt.Now() + time.Hour); err != nil {
		b.Fatal(err)
	}
	var own, same, none []time.Duration
	for b.Loop() {
		req := request(b, rt, "w-bench", "sleep", "1h")
		begin := time.Now()
		a, err := rt.Start(b.Context(), req)
		own = append(own, time.Since(begin))
		if err != nil {
			b.Fatal(err)
		}
		got := inspect(b, docker.ContainerName(req.Assignment))
		same = append(same, raw(b, got, true))
		none = append(none, raw(b, got, false))
		if err := a.Remove(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
	p := func(d []time.Duration, q float64) float64 {
		slices.Sort(d)
		return float64(d[int(q*float64(len(d)-1))].Microseconds()) / 1000
	}
	for _, q := range []float64{0.5, 0.9} {
		fmt.Printf("p%.0f of %d: start %.1f ms, same %.1f ms, none %.1f ms; start/same %.2f, start/none %.2f\n", 100*q, len(own),
			p(own, q), p(same, q), p(none, q), p(own, q)/p(same, q), p(own, q)/p(none, q))
	}
	b.ReportMetric(p(own, 0.5)/p(none, 0.5), "×none")
	b.ReportMetric(p(own, 0.5)/p(same, 0.5), "×same")
}

// raw creates and starts a copy of a container, and removes it.
func raw(b *testing.B, of container.InspectResponse, disabled bool) time.Duration {
	b.Helper()
	config := *of.Config
	config.NetworkDisabled = disabled
	begin := time.Now()
	c, err := site.docker.ContainerCreate(b.Context(), client.ContainerCreateOptions{Config: &config, HostConfig: of.HostConfig})
	if err != nil {
		b.Fatal(err)
	}
	_, err = site.docker.ContainerStart(b.Context(), c.ID, client.ContainerStartOptions{})
	took := time.Since(begin)
	_, _ = site.docker.ContainerRemove(context.Background(), c.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
	if err != nil {
		b.Fatal(err)
	}
	return took
}

// BenchmarkExec and BenchmarkDial measure what sessions, tunnels and health checks cost
// through init.
func BenchmarkExec(b *testing.B) {
	rt := openIn(b, b.TempDir(), "w-bench")
	a := start(b, rt, request(b, rt, "w-bench", "sleep", "1h"))
	for b.Loop() {
		if exit, err := agent.Execute(b.Context(), a, agent.Command{Argv: []string{"/bin/exit", "0"}}, nil, nil); err != nil || exit.Code != 0 {
			b.Fatal(exit, err)
		}
	}
}

func BenchmarkDial(b *testing.B) {
	rt := openIn(b, b.TempDir(), "w-bench")
	a := start(b, rt, request(b, rt, "w-bench", "tcp", "80"))
	for {
		changed := a.Output().Changed()
		if kept, _ := a.Output().Size(schemas.Stdout); kept > 0 {
			break // it listens
		}
		<-changed
	}
	for b.Loop() {
		c, err := a.Dial(b.Context(), 80)
		if err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}
