package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"dayfly.dev/ops"
	"dayfly.dev/ops/tracing"
	"dayfly.dev/ops/tracing/otlp"
)

// processConfig is what every process that serves is told.
type processConfig struct {
	admin               string
	adminHosts          []string
	printAddrs          string
	insecure            bool
	logLevel, logFormat string
	scale               float64 // of the times of beats, leases, fences and leadership
}

func (p *processConfig) flags(f *pflag.FlagSet, admin string) {
	f.StringVar(&p.admin, "admin", admin, "address of /metrics, /healthz, /readyz and /debug/pprof")
	f.StringSliceVar(&p.adminHosts, "admin-host", nil, "name or address under which the admin port is reached, beside localhost and the address itself; may be repeated")
	f.StringVar(&p.printAddrs, "print-addrs", "", "write the addresses to this file, as JSON, as soon as it listens")
	f.BoolVar(&p.insecure, "insecure-listen", false, "listen beyond this machine although there are no API keys yet")
	f.StringVar(&p.logLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&p.logFormat, "log-format", "auto", "json, console or auto")
	f.Float64Var(&p.scale, "scale", 1, "factor on the times of beats, leases, fences and leadership; the same for all services")
}

func (p *processConfig) check() error {
	if err := checkScale(p.scale); err != nil {
		return err
	}
	if _, err := otlp.Wanted(); err != nil {
		return err
	}
	for _, name := range p.adminHosts {
		if err := ops.CheckHost(name); err != nil {
			return fmt.Errorf("--admin-host %w", err)
		}
	}
	return p.listens("--admin", p.admin)
}

func checkScale(scale float64) error {
	if scale <= 0 || scale > 10 {
		return errors.New("--scale must be more than 0 and at most 10")
	}
	return nil
}

// listens refuses an address that others than this machine reach.
func (p *processConfig) listens(flag, addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%s must be HOST:PORT, such as 127.0.0.1:8080", flag)
	}
	if p.insecure || host == "localhost" || net.ParseIP(host).IsLoopback() {
		return nil
	}
	return fmt.Errorf("%s %s would let everybody who reaches this machine run containers on it: there are no API keys yet.\n"+
		"       Listen on 127.0.0.1 behind a proxy that asks who is there, or give --insecure-listen if the network is yours alone",
		flag, addr)
}

// listensNATS is listens for NATS, which asks everybody for a password: without TLS that
// can be read on the way.
func (p *processConfig) listensNATS(flag, addr string, encrypted bool) error {
	if encrypted {
		_, _, err := natsAddress(flag, addr)
		return err
	}
	if err := p.listens(flag, addr); err != nil {
		return fmt.Errorf("%s %s would send passwords and tasks' inputs unencrypted beyond this machine.\n"+
			"       Give --nats-cert and --nats-key (and --routes-ca for --cluster-listen), or --insecure-listen if the network is yours alone", flag, addr)
	}
	return nil
}

// scaled is one of the times that belong together: whoever waits for another's
// silence waits longer than the other may be silent.
func (p *processConfig) scaled(d time.Duration) time.Duration {
	return time.Duration(float64(d) * p.scale)
}

// serving gives a command of a process that serves its flags from the environment,
// and what to do once they are found to be right.
func (c *cli) serving(cmd *cobra.Command, check func() error, run func(context.Context) error) *cobra.Command {
	cmd.Args, cmd.ValidArgsFunction = cobra.NoArgs, cobra.NoFileCompletions
	ops.BindEnv(cmd.Flags(), "DAYFLY")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		err := ops.ApplyEnv(cmd.Flags(), "DAYFLY")
		if err == nil {
			err = check()
		}
		if err != nil {
			return &usageError{err, cmd.CommandPath()}
		}
		return run(cmd.Context())
	}
	return cmd
}

// process is one that serves: its parts, and what they share.
type process struct {
	cli      *cli
	name     string
	config   processConfig
	logger   func(service string) zerolog.Logger
	log      zerolog.Logger // of the process itself
	registry *prometheus.Registry
	health   *ops.Health
	admin    net.Listener

	traced  bool                          // spans are wanted
	untrace []func(context.Context) error // send what is left of them

	parts   []part                 // in the order in which they are stopped
	address func(*addresses)       // fills in what else it listens on
	up      func(addresses) string // says where it is, once it is ready
}

// part is one part of a process. run ends when its context does. check is the name
// of the check by which it says that it is ready, "" if it has none.
type part struct {
	name  string
	check string
	run   func(context.Context) error
}

// start begins a process: it takes the admin port. stop must be called.
func (c *cli) start(name string, config processConfig) (p *process, stop func(), err error) {
	p = &process{cli: c, name: name, config: config, health: ops.NewHealth(), registry: ops.NewRegistry(version, commit())}
	if p.log, err = ops.NewLogger(c.err, config.logLevel, config.logFormat, name); err != nil {
		return nil, nil, &usageError{err, "dayfly " + name}
	}
	p.traced, _ = otlp.Wanted() // check has asked too
	p.logger = func(service string) zerolog.Logger {
		l, _ := ops.NewLogger(c.err, config.logLevel, config.logFormat, service) // it went well above
		return l
	}
	if p.admin, err = listen("--admin", config.admin); err != nil {
		return nil, nil, err
	}
	return p, func() { p.admin.Close() }, nil
}

// tracer gives that of a service, nil where the environment asks for none.
func (p *process) tracer(service string) *tracing.Tracer {
	if !p.traced {
		return nil
	}
	t, flush, err := otlp.Open(context.Background(), service, version, p.log)
	if err != nil { // tasks are worth more than their traces
		p.log.Error().Err(err).Str("service", service).Msg("no spans")
		return nil
	}
	p.untrace = append(p.untrace, flush)
	return t
}

// listen takes a port. Whoever comes early waits in the listener.
func listen(flag, addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, &hintError{err, "another address with " + flag + ", or end what listens there"}
	}
	return l, nil
}

// interruptedIsFine makes an ordered end by a signal a success.
func interruptedIsFine(ctx context.Context, err error) error {
	var in interrupted
	if errors.As(context.Cause(ctx), &in) && (err == nil || errors.As(err, &in) || errors.Is(err, context.Canceled)) {
		return nil
	}
	return err
}

// stopAfter bounds how long one service may take to end.
const stopAfter = 15 * time.Second

// flushWithin bounds how long the spans that are left may take to be sent.
const flushWithin = 3 * time.Second

// run runs the parts, and the admin port after them, until ctx ends or one of them does.
func (p *process) run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	type running struct {
		part
		cancel context.CancelCauseFunc
		done   chan struct{}
	}
	var all []running
	parts := append(p.parts, part{"admin", "", func(ctx context.Context) error {
		return ops.Serve(ctx, p.admin, ops.Admin(p.registry, p.health, ops.NewHosts(p.config.adminHosts)), p.log)
	}})
	for _, one := range parts {
		// Not gctx: each is stopped in its turn.
		if one.check != "" { // until the service puts its own in this place
			p.health.Add(one.check, func(context.Context) error { return errors.New("not started yet") })
		}
		sctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
		r := running{one, cancel, make(chan struct{})}
		all = append(all, r)
		g.Go(func() error {
			defer close(r.done)
			err := r.run(sctx)
			switch {
			case sctx.Err() != nil:
				if err != nil && !errors.Is(err, context.Canceled) {
					p.log.Warn().Err(err).Str("service", r.name).Msg("ended badly")
				}
				return nil
			case err == nil:
				return fmt.Errorf("%s ended by itself", r.name)
			}
			return fmt.Errorf("%s: %w", r.name, err)
		})
	}
	g.Go(func() error {
		<-gctx.Done()
		if ctx.Err() != nil {
			p.cli.say("ending; tasks go on running")
		}
		for _, r := range all {
			r.cancel(context.Cause(gctx))
			select {
			case <-r.done:
			case sig := <-p.cli.signals:
				p.cli.tell("left at once by %s", sig)
				os.Exit(signalCode(sig))
			case <-time.After(stopAfter):
				p.log.Warn().Str("service", r.name).Msg("does not end")
			}
		}
		return nil
	})
	g.Go(func() error { return p.announce(gctx) })
	err := g.Wait()
	p.flush()
	return err
}

// flush sends the spans that are left.
func (p *process) flush() {
	ctx, cancel := context.WithTimeout(context.Background(), flushWithin)
	defer cancel()
	var all sync.WaitGroup
	for _, flush := range p.untrace {
		all.Go(func() {
			if err := flush(ctx); err != nil {
				p.log.Warn().Err(err).Msg("spans not sent")
			}
		})
	}
	all.Wait()
}

// addresses is what --print-addrs writes.
type addresses struct {
	Service string            `json:"service"`
	HTTP    string            `json:"http,omitempty"`
	Ingress string            `json:"ingress,omitempty"`
	Admin   string            `json:"admin"`
	NATS    string            `json:"nats,omitempty"`
	Routes  string            `json:"routes,omitempty"` // where other NATS servers connect
	Worker  string            `json:"worker,omitempty"`
	Cluster string            `json:"cluster,omitempty"`
	Shims   map[string]string `json:"shims,omitempty"` // by name
	PID     int               `json:"pid"`
}

// announce writes the addresses, for scripts: whoever comes early waits in the
// listeners. It tells people once all checks pass.
func (p *process) announce(ctx context.Context) error {
	a := addresses{Service: p.name, Admin: "http://" + p.admin.Addr().String(), PID: os.Getpid()}
	if p.address != nil {
		p.address(&a)
	}
	if p.config.printAddrs != "" {
		b, err := json.MarshalIndent(a, "", "  ")
		if err == nil {
			err = writeFile(p.config.printAddrs, append(b, '\n'), 0o600)
		}
		if err != nil {
			return fmt.Errorf("--print-addrs: %w", err)
		}
	}
	if !p.ready(ctx) {
		return nil
	}
	p.cli.tell("%s", p.up(a))
	return nil
}

// ready waits until all checks pass, or ctx ends.
func (p *process) ready(ctx context.Context) bool {
	const remindAfter = 10 * time.Second
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	remind := time.NewTimer(remindAfter)
	defer remind.Stop()
	for {
		ready, checks := p.health.Run(ctx)
		if ctx.Err() != nil || ready {
			return ready && ctx.Err() == nil
		}
		select {
		case <-tick.C:
		case <-remind.C:
			for _, c := range checks {
				if !c.OK {
					p.cli.tell("not ready yet: %s: %s", c.Name, c.Error)
				}
			}
		case <-ctx.Done():
			return false
		}
	}
}
