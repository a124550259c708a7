package fakeruntime_test

import (
	"path/filepath"
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

// With a journal the containers outlive the process: a new Runtime stands for it.
func TestJournal(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtimetest.Bench {
		cfg := fakeruntime.Config{Journal: filepath.Join(t.TempDir(), "host"), StateDir: t.TempDir()}
		rt := fakeruntime.New(cfg)
		if _, err := rt.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		return runtimetest.Bench{
			Runtime: rt, Worker: "w", Image: "fake", Missing: fakeruntime.MissingImage,
			Left: func(*testing.T) int { return rt.Live() },
			Reopen: func(*testing.T) agent.Runtime {
				_ = rt.Close()
				rt = fakeruntime.New(cfg)
				return rt
			},
		}
	})
}
