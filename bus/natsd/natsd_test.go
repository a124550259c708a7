package natsd_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
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

// With a certificate everybody beyond this process must speak TLS, and check it.
func TestClientsSpeakTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	writeCertificate(t, cert, key)
	cfg := config(t)
	cfg.Port, cfg.TLS = -1, &natsd.TLS{Cert: cert, Key: key}
	cfg.Workers = map[schemas.WorkerID]string{"w1": "w1-secret"}
	s, err := natsd.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	agent := bus.Config{User: "w1", Password: "w1-secret", InboxPrefix: schemas.AgentInbox("w1"), APIPrefix: schemas.AgentAPIPrefix}
	plain := strings.Replace(s.URL(), "tls://", "nats://", 1)
	if plain == s.URL() {
		t.Errorf("the address is %s", plain)
	}
	for name, c := range map[string]struct {
		url, ca string
		in      bool
	}{
		"who trusts it":                       {s.URL(), cert, true},
		"who trusts it and was told nats://":  {plain, cert, true},
		"who trusts others":                   {s.URL(), "", false},
		"who trusts others, and said nats://": {plain, "", false},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if !c.in {
			ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
		}
		k := agent
		k.URL, k.CA = c.url, c.ca
		conn, err := bus.Connect(ctx, k)
		cancel()
		if (err == nil) != c.in {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			if _, err := conn.NC.TLSConnectionState(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			conn.Close()
		}
	}
	core, err := bus.Connect(t.Context(), bus.Config{InProcess: s.InProcess(), User: natsd.CoreUser, Password: "core-secret"})
	if err != nil {
		t.Fatal("within the process: ", err)
	}
	core.Close()
}

// writeCertificate makes one for this machine that signs itself.
func writeCertificate(t *testing.T, certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert}, keyFile: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// The same text serves a standalone server, alone or as one of three.
func TestConfigText(t *testing.T) {
	cfg := config(t)
	cfg.Port, cfg.SyncAlways = 4222, true
	cfg.Workers = map[schemas.WorkerID]string{"w1": "one", "w2": "two"}
	cfg.Name = "n1"
	cfg.Cluster = &natsd.Cluster{Name: "dayfly", Port: 6222, Secret: "s", Routes: []string{"10.0.0.2:6222", "10.0.0.3:6222"}}
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
	if o.Cluster.Password != "s" || o.Routes[0].String() != "nats-route://route:s@10.0.0.2:6222" {
		t.Errorf("the cluster port takes anybody: %v", o.Routes)
	}
	if len(o.Routes) != 2 || o.Cluster.Port != 6222 || len(o.Accounts) != 2 || len(o.Users) != 3 {
		t.Errorf("%d routes, %d accounts, %d users", len(o.Routes), len(o.Accounts), len(o.Users))
	}
}

// A new agent needs nothing but its token, and nobody else gets in.
func TestWhoGetsIn(t *testing.T) {
	const join = "join-secret"
	cfg := config(t)
	cfg.Port, cfg.JoinSecret = -1, join
	cfg.Workers = map[schemas.WorkerID]string{"listed": "its-own"}
	s, err := natsd.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	token := natsd.WorkerToken(join, "w1")
	for name, test := range map[string]struct {
		user, password string
		in             bool
	}{
		"a core service":                    {natsd.CoreUser, "core-secret", true},
		"an agent by its token":             {"w1", token, true},
		"an agent of the list":              {"listed", "its-own", true},
		"an agent of the list by its token": {"listed", natsd.WorkerToken(join, "listed"), true},
		"core with a wrong password":        {natsd.CoreUser, "x", false},
		"core without a password":           {natsd.CoreUser, "", false},
		"core by the token of that name":    {natsd.CoreUser, natsd.WorkerToken(join, natsd.CoreUser), false},
		"nobody":                            {"", "", false},
		"a worker without a token":          {"w1", "", false},
		"a worker with another's token":     {"w2", token, false},
		"a worker with the join secret":     {"w1", join, false},
		"a worker with the core password":   {"w1", "core-secret", false},
		"a name that is none":               {"W1", natsd.WorkerToken(join, "W1"), false},
	} {
		t.Run(name, func(t *testing.T) {
			var opts []nats.Option
			if test.user != "" {
				opts = append(opts, nats.UserInfo(test.user, test.password))
			}
			c, err := nats.Connect(s.URL(), opts...)
			if err == nil {
				c.Close()
			}
			if test.in && err != nil || !test.in && !errors.Is(err, nats.ErrAuthorization) {
				t.Errorf("let in: %v, want %v (%v)", err == nil, test.in, err)
			}
		})
	}
}

// An agent that came by its token has the rights of an agent: its own subjects, in the
// account without JetStream.
func TestTokenGivesNoMore(t *testing.T) {
	cfg := config(t)
	cfg.Port, cfg.JoinSecret = -1, "join-secret"
	s, err := natsd.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	denied := make(chan error, 16)
	c, err := nats.Connect(s.URL(), nats.UserInfo("w1", natsd.WorkerToken("join-secret", "w1")),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { denied <- err }))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, subject := range []string{"$KV.tasks.t-1", "$KV.workers.w2", "dayfly.reports.w2.t-1", "dayfly.work.0.w1.t-1", "$JS.API.STREAM.NAMES"} {
		if err := c.Publish(subject, []byte("x")); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-denied:
			if !errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("%s: %v", subject, err)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("%s: not denied", subject)
		}
	}
	if err := c.Publish("$KV.workers.w1", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-denied:
		t.Errorf("its own beat: %v", err)
	default:
	}
}
