package docker_test

import (
	"io"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/docker"
)

// Programs follow each other without one that cleans, and without a request to Docker, as
// long as they leave nothing. What they leave the next one does not find.
func TestStagesInARow(t *testing.T) {
	cfg := config(t, t.TempDir(), "w-row")
	reg := prometheus.NewRegistry()
	cfg.Metrics = reg
	rt, err := docker.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rt.Close() })
	if err := rt.Permit(rt.Now() + time.Minute); err != nil {
		t.Fatal(err)
	}
	req := request(t, rt, "w-row")
	req.Spec.Judge = &schemas.Judge{}
	a := start(t, rt, req)
	run := func(memory schemas.Size, argv ...string) string {
		t.Helper()
		p, err := a.Stage(t.Context(), agent.Command{Argv: argv, Stdio: agent.StdioPipes}, memory)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		_ = p.Stdin().Close()
		out, err := io.ReadAll(p.Stdout())
		if err != nil {
			t.Fatal(err)
		}
		<-p.Done()
		if exit, err := p.Exit(); err != nil || exit.Code != 0 {
			t.Fatalf("%q: %+v %v", argv, exit, err)
		}
		return strings.TrimSpace(string(out))
	}
	tidy := func(want bool, when string) {
		t.Helper()
		if docker.Tidy(a) != want {
			t.Errorf("%s: tidy is %t", when, !want)
		}
	}
	tidy(true, "a new container")
	run(64<<20, "/bin/echo", "x")
	tidy(true, "nothing was left")
	small := docker.MemoryLimit(a)
	run(128<<20, "/bin/echo", "x")
	if grown := docker.MemoryLimit(a) - small; small > 0 && (grown < 56<<20 || grown > 72<<20) {
		t.Errorf("a program with 64 MiB more has %d MiB more", grown>>20)
	}
	run(64<<20, "/bin/guest", "write", "/tmp/x", "left")
	tidy(false, "a file was left")
	if got := run(64<<20, "/bin/guest", "ls", "/tmp"); got != "" {
		t.Errorf("the next one finds %q", got)
	}
	tidy(true, "it was removed")
	run(64<<20, "/bin/guest", "chmod", "/task/output")
	tidy(true, "a mode is set back")
	if small == 0 {
		return // the cgroup is out of sight, and Docker sets the limits
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetValue() == "update" {
					t.Errorf("Docker was asked %d times to set a limit", m.GetHistogram().GetSampleCount())
				}
			}
		}
	}
}
