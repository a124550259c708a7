package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

const (
	defaultHTTP    = "127.0.0.1:8080"
	defaultIngress = "127.0.0.1:8081"
	defaultAdmin   = "127.0.0.1:8082"

	defaultTCPPorts = "20000-20999" // of up
)

// upConfig is what `dayfly up` is told.
type upConfig struct {
	processConfig
	gateway    gatewayConfig
	reaper     reaperConfig
	agent      agentConfig
	shims      shimConfig
	assets     assetConfig
	nats, sync string
	tls        natsTLS
	retention  time.Duration
}

func defaultData() string {
	if os.Geteuid() == 0 {
		return "/var/lib/dayfly"
	}
	if dir := os.Getenv("XDG_DATA_HOME"); dir != "" {
		return filepath.Join(dir, "dayfly")
	}
	if home, err := os.UserHomeDir(); err == nil {
		return filepath.Join(home, ".local", "share", "dayfly")
	}
	return "dayfly-data"
}

// defaultWorker makes a worker's name of the host's.
func defaultWorker() string {
	host, err := os.Hostname()
	if err != nil {
		host = ""
	}
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-':
			return r
		case r == '.' || r == '_':
			return '-'
		}
		return -1
	}, strings.ToLower(host))
	name = strings.Trim(name[:min(len(name), 63)], "-")
	if name == "" {
		return "worker"
	}
	return name
}

func (c *cli) upCommand() *cobra.Command {
	var u upConfig
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run all of dayfly on this machine, with an embedded NATS server",
		Long: `up runs the gateway, the placer, an agent for this machine's Docker and the reaper,
and the NATS server between them, in one process. It stays in the foreground.

Ctrl-C or SIGTERM ends it in good order and leaves the tasks running: the next up
with the same data folder takes them back, if it comes within their lease. So may
kill -9.

With --nats ADDR agents of other machines may join: dayfly credentials worker makes
their credential from DATA/credentials.json.

Where OTEL_EXPORTER_OTLP_ENDPOINT is set it sends spans there.`,
		Example: `  dayfly up
  dayfly up --data /srv/dayfly --worker lab-3 --slots 20`,
	}
	f := cmd.Flags()
	f.StringVar(&u.agent.data, "data", defaultData(), "folder for all that dayfly keeps")
	u.gateway.flags(f, defaultTCPPorts)
	u.reaper.flags(f)
	u.agent.flags(f)
	u.assets.flags(f)
	u.shims.flags(f)
	u.processConfig.flags(f, defaultAdmin)
	f.StringVar(&u.nats, "nats", "", "address of the NATS server for other machines' agents; empty: none, it is used in this process only")
	u.tls.flags(f)
	f.StringVar(&u.sync, "sync", "always", "when NATS writes to the disk: always, before an answer, or default, every two minutes")
	f.DurationVar(&u.retention, "retention", 24*time.Hour, "how long a task is kept after its end")
	_ = cmd.RegisterFlagCompletionFunc("sync", cobra.FixedCompletions([]string{"always", "default"}, cobra.ShellCompDirectiveNoFileComp))
	u.assets.replicas = 1
	return c.serving(cmd, u.check, func(ctx context.Context) error { return c.up(ctx, u) })
}

// check says what of the configuration cannot be right, before anything is touched.
func (u *upConfig) check() error {
	for _, err := range []error{
		u.agent.check(), checkSync(u.sync), u.assets.check(), u.tls.check(), checkRetention(u.retention), u.reaper.check(),
		u.gateway.check(&u.processConfig), u.shims.check(&u.processConfig), u.processConfig.check(),
	} {
		if err != nil {
			return err
		}
	}
	if u.nats == "" {
		return nil
	}
	return u.listensNATS("--nats", u.nats, u.tls.cert != "")
}
