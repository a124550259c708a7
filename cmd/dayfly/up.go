package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dayfly.dev/ops"
	"dayfly.dev/schemas"
)

const (
	defaultHTTP    = "127.0.0.1:8080"
	defaultIngress = "127.0.0.1:8081"
	defaultAdmin   = "127.0.0.1:8082"
)

// upConfig is what `dayfly up` is told.
type upConfig struct {
	data, http, ingress, admin, nats string
	worker, cluster                  string
	slots                            int
	sync                             string
	maxTTL, logAge, retention        time.Duration
	init                             string
	printAddrs                       string
	insecure                         bool
	logLevel, logFormat              string
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
kill -9.`,
		Example: `  dayfly up
  dayfly up --data /srv/dayfly --worker lab-3 --slots 20`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	policy := schemas.DefaultPolicy()
	f := cmd.Flags()
	f.StringVar(&u.data, "data", defaultData(), "folder for all that dayfly keeps")
	f.StringVar(&u.http, "http", defaultHTTP, "address of the API")
	f.StringVar(&u.ingress, "ingress", defaultIngress, "address of the ingress to tasks")
	f.StringVar(&u.admin, "admin", defaultAdmin, "address of /metrics, /healthz, /readyz and /debug/pprof")
	f.StringVar(&u.nats, "nats", "", "address of the NATS server for other processes; empty: none, it is used in this one only")
	f.StringVar(&u.worker, "worker", defaultWorker(), "name of this machine's worker")
	f.IntVar(&u.slots, "slots", 0, "tasks at a time on this machine (0: by its memory)")
	f.StringVar(&u.cluster, "cluster", "", "label of this dayfly's containers (default: made up once for the data folder)")
	f.StringVar(&u.sync, "sync", "always", "when NATS writes to the disk: always, before an answer, or default, every two minutes")
	f.DurationVar(&u.maxTTL, "max-ttl", policy.MaxTTL.Std(), "longest lifetime of a task, extensions included")
	f.DurationVar(&u.logAge, "log-age", 24*time.Hour, "how long the logs of tasks are kept")
	f.DurationVar(&u.retention, "retention", 24*time.Hour, "how long a task is kept after its end")
	f.StringVar(&u.init, "init", "", "the dayfly-init binary, if it is not beside dayfly")
	f.StringVar(&u.printAddrs, "print-addrs", "", "write the addresses to this file, as JSON, once all is up")
	f.BoolVar(&u.insecure, "insecure-listen", false, "listen beyond this machine although there are no API keys yet")
	f.StringVar(&u.logLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&u.logFormat, "log-format", "auto", "json, console or auto")
	_ = cmd.RegisterFlagCompletionFunc("sync", cobra.FixedCompletions([]string{"always", "default"}, cobra.ShellCompDirectiveNoFileComp))
	ops.BindEnv(f, "DAYFLY")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		err := ops.ApplyEnv(cmd.Flags(), "DAYFLY")
		if err == nil {
			err = u.check()
		}
		if err != nil {
			return &usageError{err, cmd.CommandPath()}
		}
		return c.up(cmd.Context(), u)
	}
	return cmd
}

// check says what of the configuration cannot be right, before anything is touched.
func (u *upConfig) check() error {
	if _, err := schemas.ParseWorkerID(u.worker); err != nil {
		return errors.New("--worker must be 1 to 63 of a-z, 0-9 and -")
	}
	if u.cluster != "" {
		if _, err := schemas.ParseWorkerID(u.cluster); err != nil {
			return errors.New("--cluster must be 1 to 63 of a-z, 0-9 and -")
		}
	}
	if u.sync != "always" && u.sync != "default" {
		return errors.New("--sync must be always or default")
	}
	if u.slots < 0 {
		return errors.New("--slots must not be negative")
	}
	if u.maxTTL < time.Second || u.logAge < time.Minute || u.retention < time.Minute {
		return errors.New("--max-ttl must be at least 1s, --log-age and --retention at least 1m")
	}
	for _, a := range []struct{ flag, addr string }{
		{"--http", u.http}, {"--ingress", u.ingress}, {"--admin", u.admin}, {"--nats", u.nats},
	} {
		if a.addr == "" && a.flag == "--nats" {
			continue
		}
		host, _, err := net.SplitHostPort(a.addr)
		if err != nil {
			return fmt.Errorf("%s must be HOST:PORT, such as 127.0.0.1:8080", a.flag)
		}
		if u.insecure || host == "localhost" || net.ParseIP(host).IsLoopback() {
			continue
		}
		return fmt.Errorf("%s %s would let everybody who reaches this machine run containers on it: there are no API keys yet.\n"+
			"       Listen on 127.0.0.1 behind a proxy that asks who is there, or give --insecure-listen if the network is yours alone",
			a.flag, a.addr)
	}
	return nil
}
