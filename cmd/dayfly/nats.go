package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"dayfly.dev/bus/natsd"
)

// natsConfig is what `dayfly nats` is told.
type natsConfig struct {
	processConfig
	data, name, listen string
	clusterListen      string
	clusterName        string
	routes             []string
	credentials, sync  string
	tls                natsTLS
}

// natsTLS are the files by which a NATS server speaks TLS.
type natsTLS struct{ cert, key, ca string }

func (t *natsTLS) flags(f *pflag.FlagSet) {
	f.StringVar(&t.cert, "nats-cert", "", "certificate of the NATS server with its chain, in PEM; clients then speak TLS")
	f.StringVar(&t.key, "nats-key", "", "the key of --nats-cert, in PEM")
}

func (t *natsTLS) check() error {
	if (t.cert == "") != (t.key == "") {
		return errors.New("--nats-cert and --nats-key go together")
	}
	if t.ca != "" && t.cert == "" {
		return errors.New("--routes-ca needs --nats-cert and --nats-key too")
	}
	return nil
}

// of makes the part of a server's configuration, nil without TLS.
func (t *natsTLS) of() (*natsd.TLS, error) {
	if t.cert == "" {
		return nil, nil
	}
	if _, err := tls.LoadX509KeyPair(t.cert, t.key); err != nil {
		return nil, &hintError{fmt.Errorf("certificate of NATS: %w", err), "--nats-cert and --nats-key with files in PEM that belong together"}
	}
	return &natsd.TLS{Cert: t.cert, Key: t.key, CA: t.ca}, nil
}

func (c *cli) natsCommand() *cobra.Command {
	var n natsConfig
	cmd := &cobra.Command{
		Use:   "nats",
		Short: "Run a NATS server with dayfly's accounts, alone or as one of three",
		Long: `nats runs a NATS server that lets in the core services and the agents of a file of
credentials. With --cluster-listen and --routes three of them keep every record
three times, and any one of them may die.

It stays in the foreground. SIGTERM hands over what it leads and ends it; wait for
/readyz before the next one of a cluster is ended.`,
		Example: `  dayfly nats --name n1 --listen 10.0.0.1:4222 --cluster-listen 10.0.0.1:6222 \
      --routes 10.0.0.1:6222,10.0.0.2:6222,10.0.0.3:6222 --credentials core.json \
      --nats-cert n1.pem --nats-key n1-key.pem --routes-ca ca.pem`,
	}
	f := cmd.Flags()
	n.flags(f, adminNATS)
	f.StringVar(&n.data, "data", defaultData(), "folder; the server keeps its files in nats below it")
	f.StringVar(&n.name, "name", defaultWorker(), "name of the server, unique in its cluster and always the same")
	f.StringVar(&n.listen, "listen", "127.0.0.1:4222", "address for services and agents")
	f.StringVar(&n.clusterListen, "cluster-listen", "", "address for the other servers; empty: this one is alone")
	f.StringVar(&n.clusterName, "cluster-name", "dayfly", "name of the cluster")
	f.StringSliceVar(&n.routes, "routes", nil, "HOST:PORT of the other servers' --cluster-listen, with commas between")
	f.StringVar(&n.credentials, "credentials", "", "file of secrets; see dayfly credentials")
	n.tls.flags(f)
	f.StringVar(&n.tls.ca, "routes-ca", "", "who has signed the --nats-cert of all servers of the cluster, in PEM; they then speak TLS among themselves")
	f.StringVar(&n.sync, "sync", "always", "when it writes to the disk: always, before an answer, or default, every two minutes")
	_ = cmd.RegisterFlagCompletionFunc("sync", cobra.FixedCompletions([]string{"always", "default"}, cobra.ShellCompDirectiveNoFileComp))
	return c.serving(cmd, n.check, func(ctx context.Context) error { return c.nats(ctx, n) })
}

func (n *natsConfig) check() error {
	for _, err := range []error{n.processConfig.check(), checkSync(n.sync), n.tls.check(), n.listensNATS("--listen", n.listen, n.tls.cert != "")} {
		if err != nil {
			return err
		}
	}
	if n.credentials == "" {
		return errors.New("--credentials FILE is needed; dayfly credentials init makes one")
	}
	if n.clusterListen == "" {
		if len(n.routes) > 0 {
			return errors.New("--routes needs --cluster-listen too")
		}
		return nil
	}
	return n.listensNATS("--cluster-listen", n.clusterListen, n.tls.ca != "")
}

// nats runs a NATS server until a signal.
func (c *cli) nats(ctx context.Context, n natsConfig) error {
	ctx, stop := c.interruptible(ctx)
	defer stop()
	secrets, err := readCore(n.credentials)
	if err != nil {
		return err
	}
	data, err := filepath.Abs(n.data)
	if err != nil {
		return err
	}
	p, closeProcess, err := c.start("nats", n.processConfig)
	if err != nil {
		return err
	}
	defer closeProcess()
	nd := natsd.Config{
		Name: n.name, Dir: filepath.Join(data, "nats"), SyncAlways: n.sync == "always",
		CorePassword: secrets.Core, JoinSecret: secrets.Join, Logger: p.logger("nats"),
	}
	if nd.TLS, err = n.tls.of(); err != nil {
		return err
	}
	usage := func(err error) error { return &usageError{err, "dayfly nats"} }
	if nd.Host, nd.Port, err = natsAddress("--listen", n.listen); err != nil {
		return usage(err)
	}
	if n.clusterListen != "" {
		nd.Cluster = &natsd.Cluster{Name: n.clusterName, Routes: n.routes, Secret: secrets.Routes}
		if nd.Cluster.Host, nd.Cluster.Port, err = natsAddress("--cluster-listen", n.clusterListen); err != nil {
			return usage(err)
		}
	}
	sayRelaxed(p, n.sync)
	server, err := natsd.Start(ctx, nd)
	if err != nil {
		return interruptedIsFine(ctx, &hintError{err, "the log above, or another --data, --listen or --cluster-listen"})
	}
	defer server.Shutdown()
	p.registry.MustRegister(natsMetrics{server})
	p.health.Add("nats: replicas", func(context.Context) error { return server.Current() })
	p.parts = append(p.parts, part{"nats", "", func(ctx context.Context) error {
		<-ctx.Done()
		server.Retire()
		return nil
	}}, part{"memory", "", natsd.BoundMemory})
	p.address = func(a *addresses) { a.NATS, a.Routes = server.URL(), server.ClusterURL() }
	p.up = func(a addresses) string { return fmt.Sprintf("dayfly nats is up: %s, admin %s", a.NATS, a.Admin) }
	return interruptedIsFine(ctx, p.run(ctx))
}
