package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/schemas"
)

// Where each service answers its operator, unless it is told otherwise: several of
// them may run on one machine.
const (
	adminPlacer = "127.0.0.1:8083"
	adminReaper = "127.0.0.1:8084"
	adminAgent  = "127.0.0.1:8085"
	adminNATS   = "127.0.0.1:8086"
)

// busConfig says where NATS is and by what it knows us.
type busConfig struct {
	nats, credentials, ca string
}

func (b *busConfig) flags(f *pflag.FlagSet) {
	f.StringVar(&b.nats, "nats", nats.DefaultURL, "addresses of NATS servers, with commas between")
	f.StringVar(&b.ca, "nats-ca", "", "who has signed the NATS servers' certificates, in PEM; then they must have one (default with tls://: whom this machine trusts)")
	f.StringVar(&b.credentials, "credentials", "", "file of secrets; see dayfly credentials")
}

func (b *busConfig) check() error {
	if b.credentials == "" {
		return errors.New("--credentials FILE is needed; dayfly credentials makes one")
	}
	for one := range strings.SplitSeq(b.nats, ",") {
		if one = strings.TrimSpace(one); !strings.Contains(one, "://") {
			one = "nats://" + one
		}
		u, err := url.Parse(one)
		if err != nil || u.Host == "" || u.User != nil {
			return errors.New("--nats must be HOST:PORT, nats://HOST:PORT or tls://HOST:PORT, several with commas between")
		}
	}
	if b.ca == "" {
		return nil
	}
	pem, err := os.ReadFile(b.ca)
	if err == nil && !x509.NewCertPool().AppendCertsFromPEM(pem) {
		err = errors.New("no certificate in PEM is in it")
	}
	if err != nil {
		return fmt.Errorf("--nats-ca %s: %w", b.ca, err)
	}
	return nil
}

// core connects a core service and makes what NATS stores, if that is missing.
func (b *busConfig) core(p *process, name string, secrets credentials, assets assetConfig) connector {
	return func(ctx context.Context) (*bus.Conn, error) {
		conn, err := p.connect(ctx, bus.Config{Name: name, URL: b.nats, CA: b.ca, User: natsd.CoreUser, Password: secrets.Core})
		if err != nil {
			return nil, refused(err)
		}
		if err := assets.provision(ctx, conn); err != nil {
			conn.Close()
			return nil, err
		}
		return conn, nil
	}
}

func refused(err error) error {
	if errors.Is(err, nats.ErrAuthorization) {
		return &hintError{err, "--credentials with the secrets of these NATS servers"}
	}
	return err
}

// coreConfig is what every core service is told.
type coreConfig struct {
	processConfig
	bus       busConfig
	assets    assetConfig
	retention time.Duration
}

func (k *coreConfig) flags(f *pflag.FlagSet, admin string) {
	k.processConfig.flags(f, admin)
	k.bus.flags(f)
	k.assets.flags(f)
	f.IntVar(&k.assets.replicas, "replicas", 0, "how many NATS servers keep each record: 1 or 3 (0: 3 on a cluster)")
	f.DurationVar(&k.retention, "retention", 24*time.Hour, "how long a task is kept after its end")
}

func (k *coreConfig) check() error {
	for _, err := range []error{k.processConfig.check(), k.bus.check(), k.assets.check(), checkRetention(k.retention)} {
		if err != nil {
			return err
		}
	}
	return nil
}

// service runs a process of one core service until a signal.
func (c *cli) service(ctx context.Context, name string, k coreConfig, add func(*process, connector) error) error {
	ctx, stop := c.interruptible(ctx)
	defer stop()
	secrets, err := readCore(k.bus.credentials)
	if err != nil {
		return err
	}
	p, closeProcess, err := c.start(name, k.processConfig)
	if err != nil {
		return err
	}
	defer closeProcess()
	p.up = func(a addresses) string { return fmt.Sprintf("dayfly %s is up: admin %s", name, a.Admin) }
	if err := add(p, k.bus.core(p, name, secrets, k.assets)); err != nil {
		return err
	}
	return interruptedIsFine(ctx, p.run(ctx))
}

const serviceHelp = `

It stays in the foreground; SIGTERM ends it in good order. It keeps nothing of its
own, so any number of them may run and any of them may die. Where
OTEL_EXPORTER_OTLP_ENDPOINT is set it sends spans there.`

func (c *cli) gatewayCommand() *cobra.Command {
	var k coreConfig
	var g gatewayConfig
	cmd := &cobra.Command{
		Use:     "gateway",
		Short:   "Run a gateway: the HTTP API",
		Long:    "gateway serves the HTTP API on the records in NATS." + serviceHelp,
		Example: `  dayfly gateway --nats nats://10.0.0.1:4222,nats://10.0.0.2:4222 --credentials core.json`,
	}
	k.flags(cmd.Flags(), defaultAdmin)
	g.flags(cmd.Flags(), "")
	check := func() error { return errors.Join(k.check(), g.check(&k.processConfig)) }
	return c.serving(cmd, check, func(ctx context.Context) error {
		return c.service(ctx, "gateway", k, func(p *process, connect connector) error {
			entries, err := g.listen()
			if err != nil {
				return err
			}
			p.address = func(a *addresses) { g.addresses(entries, a) }
			p.up = func(a addresses) string {
				return fmt.Sprintf("dayfly gateway is up: API %s, admin %s", a.HTTP, a.Admin)
			}
			return p.gateway(connect, entries, g, k.assets, k.retention)
		})
	})
}

func (c *cli) placerCommand() *cobra.Command {
	var k coreConfig
	cmd := &cobra.Command{
		Use:     "placer",
		Short:   "Run a placer: it chooses a worker for each task",
		Long:    "placer chooses a worker for each queued task. Of several one leads, and another takes\nover when it is gone." + serviceHelp,
		Example: `  dayfly placer --nats nats://10.0.0.1:4222,nats://10.0.0.2:4222 --credentials core.json`,
	}
	k.flags(cmd.Flags(), adminPlacer)
	return c.serving(cmd, k.check, func(ctx context.Context) error {
		return c.service(ctx, "placer", k, func(p *process, connect connector) error {
			p.placer(connect, "")
			return nil
		})
	})
}

func (c *cli) reaperCommand() *cobra.Command {
	var k coreConfig
	var r reaperConfig
	cmd := &cobra.Command{
		Use:     "reaper",
		Short:   "Run a reaper: it settles what workers report, and ends what is over",
		Long:    "reaper settles what workers report, and ends what is over: time, cancels, lost\nworkers." + serviceHelp,
		Example: `  dayfly reaper --nats nats://10.0.0.1:4222,nats://10.0.0.2:4222 --credentials core.json`,
	}
	k.flags(cmd.Flags(), adminReaper)
	r.flags(cmd.Flags())
	check := func() error { return errors.Join(k.check(), r.check()) }
	return c.serving(cmd, check, func(ctx context.Context) error {
		return c.service(ctx, "reaper", k, func(p *process, connect connector) error {
			p.reaper(connect, r, k.assets, k.retention)
			return nil
		})
	})
}

func (c *cli) agentCommand() *cobra.Command {
	var k processConfig
	var b busConfig
	var a agentConfig
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run an agent: this machine becomes a worker",
		Long: `agent runs tasks on this machine's Docker. It only dials out.

Ctrl-C or SIGTERM ends it in good order and leaves the tasks running: the next agent
with the same data folder takes them back, if it comes within their lease. So may
kill -9. Its name is that of its credentials. Where OTEL_EXPORTER_OTLP_ENDPOINT is set
it sends spans there.`,
		Example: `  dayfly agent --nats nats://10.0.0.1:4222,nats://10.0.0.2:4222 --credentials lab-3.json`,
	}
	f := cmd.Flags()
	k.flags(f, adminAgent)
	b.flags(f)
	f.StringVar(&a.data, "data", defaultData(), "folder for what the agent must not forget")
	a.flags(f)
	check := func() error { return errors.Join(k.check(), b.check(), a.check()) }
	return c.serving(cmd, check, func(ctx context.Context) error {
		secrets, err := readWorker(b.credentials)
		if err != nil {
			return err
		}
		if f.Changed("worker") && a.worker != string(secrets.Worker) {
			return &usageError{fmt.Errorf("--worker is %s, but %s is for %s", a.worker, b.credentials, secrets.Worker), cmd.CommandPath()}
		}
		a.worker = string(secrets.Worker)
		return c.agent(ctx, k, b, a, secrets)
	})
}

// agent runs the process of an agent until a signal.
func (c *cli) agent(ctx context.Context, k processConfig, b busConfig, a agentConfig, secrets credentials) error {
	ctx, stop := c.interruptible(ctx)
	defer stop()
	p, closeProcess, err := c.start("agent", k)
	if err != nil {
		return err
	}
	defer closeProcess()
	if a.data, err = filepath.Abs(a.data); err != nil {
		return err
	}
	unlock, err := takeFolder(a.data)
	if err != nil {
		return err
	}
	defer unlock()
	rt, err := a.open(p)
	if err != nil {
		return err
	}
	defer func() {
		if err := rt.Close(); err != nil {
			p.log.Warn().Err(err).Msg("runtime not closed")
		}
	}()
	p.address = func(ad *addresses) { ad.Worker, ad.Cluster = a.worker, a.cluster }
	p.up = func(ad addresses) string {
		return fmt.Sprintf("dayfly agent is up: worker %s, admin %s", ad.Worker, ad.Admin)
	}
	p.agent(func(ctx context.Context) (*bus.Conn, error) {
		conn, err := p.connect(ctx, agentLogin(bus.Config{URL: b.nats, CA: b.ca}, schemas.WorkerID(a.worker), secrets.Token))
		return conn, refused(err)
	}, rt, a)
	return interruptedIsFine(ctx, p.run(ctx))
}
