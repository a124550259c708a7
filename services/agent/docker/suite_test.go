package docker_test

import (
	"testing"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/docker"
	"dayfly.dev/services/agent/runtimetest"
)

func TestRuntime(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtimetest.Bench {
		dir, worker := t.TempDir(), schemas.WorkerID("w-"+randomID())
		rt := openIn(t, dir, worker)
		return runtimetest.Bench{
			Runtime: rt, Worker: worker, Image: site.image, Missing: "dayfly-guest:not-there", Files: true,
			Left: func(t *testing.T) int { return len(containersOf(t, worker)) },
			Reopen: func(t *testing.T) agent.Runtime {
				if err := rt.Close(); err != nil {
					t.Fatal(err)
				}
				next, err := docker.New(config(t, dir, worker))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { next.Close() })
				rt = next
				return rt
			},
		}
	})
}
