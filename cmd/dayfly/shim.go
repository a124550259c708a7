package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"dayfly.dev/client"
	"dayfly.dev/ops"
	"dayfly.dev/shims"
)

const (
	defaultShim = "127.0.0.1:8090"
	adminShim   = "127.0.0.1:8087"
)

// shimConfig is what shims are told.
type shimConfig struct {
	listen []string // NAME=HOST:PORT
	token  string   // a file
	ttl    time.Duration
	hosts  []string
}

// flags are those of `up`, which may have several shims.
func (s *shimConfig) flags(f *pflag.FlagSet) {
	f.StringArrayVar(&s.listen, "shim", nil, "answer another system's protocol too, NAME=HOST:PORT, such as gridx="+defaultShim+"; may be repeated: "+strings.Join(shims.Names(), ", "))
	f.StringVar(&s.token, "shim-token-file", "", "file with the token that callers of shims must show")
	f.DurationVar(&s.ttl, "shim-ttl", 0, "lifetime of a shim's tasks where its protocol names none (0: the default of all tasks)")
}

func (s *shimConfig) check(p *processConfig) error {
	seen := map[string]bool{}
	for _, one := range s.listen {
		name, addr, _ := strings.Cut(one, "=")
		if !slices.Contains(shims.Names(), name) {
			return fmt.Errorf("there is no shim %q; there are %s", name, strings.Join(shims.Names(), ", "))
		}
		if seen[name] {
			return fmt.Errorf("the shim %s is there twice", name)
		}
		seen[name] = true
		if err := p.listens("the address of the shim "+name, addr); err != nil {
			return err
		}
	}
	for _, name := range s.hosts {
		if err := ops.CheckHost(name); err != nil {
			return fmt.Errorf("--host %w", err)
		}
	}
	if s.ttl < 0 || s.ttl > 0 && s.ttl < time.Second {
		return errors.New("the lifetime of a shim's tasks must be at least 1s")
	}
	return nil
}

// config reads the token.
func (s *shimConfig) config() (shims.Config, error) {
	c := shims.Config{TTL: s.ttl, Hosts: s.hosts}
	if s.token == "" {
		return c, nil
	}
	b, err := os.ReadFile(s.token)
	if err != nil {
		return c, fmt.Errorf("token of the shims: %w", err)
	}
	if c.Token = strings.TrimSpace(string(b)); len(c.Token) < 16 {
		return c, &hintError{fmt.Errorf("token of the shims: %s has fewer than 16 bytes", s.token), "openssl rand -hex 16 > " + s.token}
	}
	return c, nil
}

// openShim is a shim and what it listens on.
type openShim struct {
	name string
	net.Listener
}

// open takes the ports.
func (s *shimConfig) open() (all []openShim, err error) {
	for _, one := range s.listen {
		name, addr, _ := strings.Cut(one, "=")
		l, err := listen("the shim "+name, addr)
		if err != nil {
			closeShims(all)
			return nil, err
		}
		all = append(all, openShim{name, l})
	}
	return all, nil
}

// closeShims closes them, again where their servers have done it.
func closeShims(all []openShim) {
	for _, l := range all {
		l.Close()
	}
}

func (a *addresses) shims(all []openShim) {
	for _, l := range all {
		if a.Shims == nil {
			a.Shims = map[string]string{}
		}
		a.Shims[l.name] = "http://" + l.Addr().String()
	}
}

// shims adds a part for each shim. url is where the gateway is.
func (p *process) shims(all []openShim, cfg shims.Config, url string) error {
	if len(all) == 0 {
		return nil
	}
	answers := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "dayfly_shim_answers_total", Help: "Answers of shims, by the first digit of their status.",
	}, []string{"shim", "code"})
	p.registry.MustRegister(answers)
	c, err := client.New(url, client.WithUserAgent("dayfly-shim/"+version), client.WithRetryFor(shortPatience))
	if err != nil {
		return err
	}
	p.health.Add("shims: gateway", func(ctx context.Context) error {
		_, err := c.With(client.WithRetryFor(0)).Workers(ctx)
		return err
	})
	for _, l := range all {
		h, err := shims.New(l.name, c, cfg)
		if err != nil {
			return err
		}
		counted := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s := &statusWriter{ResponseWriter: w, status: http.StatusOK}
			h.ServeHTTP(s, r)
			answers.WithLabelValues(l.name, strconv.Itoa(s.status/100)+"xx").Inc()
		})
		p.parts = append(p.parts, part{"shim " + l.name, "", func(ctx context.Context) error {
			return ops.Serve(ctx, l, counted, p.logger("shim "+l.name))
		}})
	}
	return nil
}

// statusWriter remembers the status of an answer.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap is for http.ResponseController.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// gatewayURL is how this process reaches the gateway that listens on l.
func gatewayURL(l net.Listener) string {
	addr := l.Addr().(*net.TCPAddr)
	host := addr.IP
	if host.IsUnspecified() {
		host = net.IPv4(127, 0, 0, 1)
	}
	return "http://" + net.JoinHostPort(host.String(), strconv.Itoa(addr.Port))
}

func (c *cli) shimCommand() *cobra.Command {
	var k processConfig
	var s shimConfig
	var name, addr string
	cmd := &cobra.Command{
		Use:   "shim NAME",
		Short: "Answer another system's protocol: " + strings.Join(shims.Names(), ", "),
		Long: `shim answers the protocol of another system by calls of dayfly's API, which is at --url.
Programs made for that system go on working when they are pointed here: see docs/shims.md.

It stays in the foreground; SIGTERM ends it in good order. It keeps nothing of its own,
so any number of them may run and any of them may die.`,
		Example: `  dayfly shim gridx --listen 127.0.0.1:8090
  dayfly shim rctf --listen 127.0.0.1:8091 --token-file token --url http://127.0.0.1:8080`,
		PreRun: func(_ *cobra.Command, args []string) { name = args[0] },
	}
	f := cmd.Flags()
	k.flags(f, adminShim)
	f.StringVar(&addr, "listen", defaultShim, "address at which it answers")
	f.StringVar(&s.token, "token-file", "", "file with the token that callers must show")
	f.DurationVar(&s.ttl, "ttl", 0, "lifetime of its tasks where the protocol names none (0: the default of all tasks)")
	f.StringSliceVar(&s.hosts, "host", nil, "name under which callers reach it, beside localhost and addresses; may be repeated")
	check := func() error {
		s.listen = []string{name + "=" + addr}
		return errors.Join(k.check(), s.check(&k))
	}
	c.serving(cmd, check, func(ctx context.Context) error { return c.shim(ctx, k, s) })
	cmd.Args, cmd.ValidArgs, cmd.ValidArgsFunction = cobra.ExactArgs(1), shims.Names(), nil
	return cmd
}

// shim runs the process of one shim until a signal.
func (c *cli) shim(ctx context.Context, k processConfig, s shimConfig) error {
	ctx, stop := c.interruptible(ctx)
	defer stop()
	url, err := c.address()
	if err != nil {
		return err
	}
	cfg, err := s.config()
	if err != nil {
		return err
	}
	p, closeProcess, err := c.start("shim", k)
	if err != nil {
		return err
	}
	defer closeProcess()
	all, err := s.open()
	if err != nil {
		return err
	}
	defer closeShims(all)
	p.address = func(a *addresses) { a.shims(all) }
	p.up = func(a addresses) string {
		return fmt.Sprintf("dayfly shim %s is up: %s, admin %s, API %s", all[0].name, a.Shims[all[0].name], a.Admin, url)
	}
	if err := p.shims(all, cfg, url); err != nil {
		return err
	}
	return interruptedIsFine(ctx, p.run(ctx))
}
