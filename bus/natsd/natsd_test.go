package natsd_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func config(t testing.TB) natsd.Config {
	return natsd.Config{Dir: t.TempDir(), CorePassword: "core-secret"}
}

func startErr(t testing.TB, cfg natsd.Config, want string) {
	t.Helper()
	s, err := natsd.Start(t.Context(), cfg)
	if err == nil {
		s.Shutdown()
		t.Fatalf("started, want an error with %q", want)
	}
	if !strings.Contains(err.Error(), want) {
		t.Errorf("got %q, want it to say %q", err, want)
	}
}

func TestStartIsRefused(t *testing.T) {
	t.Run("folder in use", func(t *testing.T) {
		cfg := config(t)
		s, err := natsd.Start(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		startErr(t, cfg, "another dayfly uses this folder")
		s.Shutdown()
		s, err = natsd.Start(t.Context(), cfg)
		if err != nil {
			t.Fatalf("after the first is gone: %v", err)
		}
		s.Shutdown()
	})
	t.Run("folder is a file", func(t *testing.T) {
		cfg := config(t)
		cfg.Dir = filepath.Join(cfg.Dir, "file")
		if err := os.WriteFile(cfg.Dir, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		startErr(t, cfg, "not a directory")
	})
	t.Run("JetStream cannot use its folder", func(t *testing.T) {
		cfg := config(t)
		if err := os.WriteFile(filepath.Join(cfg.Dir, "jetstream"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		startErr(t, cfg, "JetStream")
	})
	t.Run("port in use", func(t *testing.T) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		cfg := config(t)
		cfg.Port = ln.Addr().(*net.TCPAddr).Port
		startErr(t, cfg, "address already in use")
	})
	t.Run("no password", func(t *testing.T) { startErr(t, natsd.Config{Dir: t.TempDir()}, "password") })
	t.Run("password that ends the text", func(t *testing.T) {
		cfg := config(t)
		cfg.CorePassword = "x\"\n}"
		startErr(t, cfg, "printable")
	})
	t.Run("a worker named core", func(t *testing.T) {
		cfg := config(t)
		cfg.Workers = map[schemas.WorkerID]string{"core": "x"}
		startErr(t, cfg, "core")
	})
}

func TestInProcessOnly(t *testing.T) {
	s, err := natsd.Start(t.Context(), config(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	if s.URL() != "" || s.NATS().Addr() != nil {
		t.Errorf("it listens: %q, %v", s.URL(), s.NATS().Addr())
	}
	c, err := bus.Connect(t.Context(), bus.Config{InProcess: s.InProcess(), User: natsd.CoreUser, Password: "core-secret"})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestStartIsQuick(t *testing.T) {
	start := time.Now()
	natstest.Server(t)
	took := time.Since(start)
	t.Log(took)
	if took > 2*time.Second {
		t.Errorf("took %v", took)
	}
}

// The same text serves a standalone server, alone or as one of three.
func TestConfigText(t *testing.T) {
	cfg := config(t)
	cfg.Port, cfg.SyncAlways = 4222, true
	cfg.Workers = map[schemas.WorkerID]string{"w1": "one", "w2": "two"}
	cfg.Cluster = &natsd.Cluster{Name: "dayfly", Port: 6222, Routes: []string{"nats-route://10.0.0.2:6222", "nats-route://10.0.0.3:6222"}}
	path := filepath.Join(t.TempDir(), "nats.conf")
	if err := os.WriteFile(path, []byte(natsd.ConfigText(cfg)), 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := server.ProcessConfigFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if o.Port != 4222 || !o.SyncAlways || !o.JetStream || o.JetStreamLimits.DefaultMaxConsumers != -1 || o.PingInterval != 15*time.Second {
		t.Errorf("options: %+v", o)
	}
	if len(o.Routes) != 2 || o.Cluster.Port != 6222 || len(o.Accounts) != 2 || len(o.Users) != 3 {
		t.Errorf("%d routes, %d accounts, %d users", len(o.Routes), len(o.Accounts), len(o.Users))
	}
}

func TestSetWorkers(t *testing.T) {
	s := natstest.Server(t)
	core := natstest.Connect(t, s)
	old := natstest.ConnectAgent(t, s, "w1")
	if err := s.SetWorkers(map[schemas.WorkerID]string{"w1": natstest.Password, "w9": natstest.Password}); err != nil {
		t.Fatal(err)
	}
	natstest.ConnectAgent(t, s, "w9")
	if !core.Connected() || !old.Connected() {
		t.Error("others were disconnected")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, err := bus.Connect(ctx, bus.Config{URL: s.URL(), User: "w2", Password: natstest.Password})
	if !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("w2 is gone, yet: %v", err)
	}
	natstest.Restart(t, s)
	natstest.ConnectAgent(t, s, "w9")
}
