package fakeruntime_test

import (
	"testing"

	"go.uber.org/goleak"

	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/fakeruntime"
	"dayfly.dev/services/agent/runtimetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRuntime(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtimetest.Bench {
		rt := fakeruntime.New(fakeruntime.Config{})
		return runtimetest.Bench{
			Runtime: rt, Worker: "w", Image: "fake", Missing: fakeruntime.MissingImage,
			Left:   func(*testing.T) int { return rt.Live() },
			Reopen: func(*testing.T) agent.Runtime { return rt },
		}
	})
}
