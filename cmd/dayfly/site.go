package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/schemas"
)

// up runs everything in one process, each service with a connection of its own:
//
//	http ──▶ gateway ─┐
//	          placer ─┤ in-process connections     ┌─ agent ── docker runtime ──▶ Docker
//	          reaper ─┴──▶ natsd (account CORE) ◀──┘ (account AGENTS)
//
// They are started from right to left and stopped in the order of parts: what lets
// work in first, NATS last. Tasks go on running without us.
func (c *cli) up(ctx context.Context, u upConfig) (err error) {
	ctx, stop := c.interruptible(ctx)
	defer stop()
	p, closeProcess, err := c.start("up", u.processConfig)
	if err != nil {
		return err
	}
	defer closeProcess()
	if u.agent.data, err = filepath.Abs(u.agent.data); err != nil {
		return err
	}
	unlock, err := takeFolder(u.agent.data)
	if err != nil {
		return err
	}
	defer unlock()

	rt, err := u.agent.open(p)
	if err != nil {
		return err
	}
	defer func() {
		if err := rt.Close(); err != nil {
			p.log.Warn().Err(err).Msg("runtime not closed")
		}
	}()
	entries, err := u.gateway.listen()
	if err != nil {
		return err
	}
	defer entries.close()
	u.shims.hosts = u.gateway.hosts
	shimming, err := u.shims.config()
	if err != nil {
		return err
	}
	spoken, err := u.shims.open()
	if err != nil {
		return err
	}
	defer closeShims(spoken)
	secrets, err := ownCredentials(filepath.Join(u.agent.data, "credentials.json"))
	if err != nil {
		return err
	}
	server, err := u.startNATS(ctx, p, secrets)
	if err != nil {
		return interruptedIsFine(ctx, err)
	}
	defer server.Shutdown()

	worker := schemas.WorkerID(u.agent.worker)
	inside := func(name string) bus.Config {
		return bus.Config{Name: name, InProcess: provider{server}, User: natsd.CoreUser, Password: secrets.Core}
	}
	// All connect, and the streams are there, before anything starts.
	conns := map[string]*bus.Conn{}
	for _, c := range []bus.Config{inside("gateway"), inside("placer"), inside("reaper"),
		agentLogin(inside("agent"), worker, natsd.WorkerToken(secrets.Join, worker))} {
		conn, err := p.connect(ctx, c)
		if err != nil {
			return interruptedIsFine(ctx, err)
		}
		defer conn.Close()
		conns[c.Name] = conn
		if len(conns) == 1 {
			if err := u.assets.provision(ctx, conn); err != nil {
				return interruptedIsFine(ctx, err)
			}
		}
	}
	own := func(name string) connector {
		return func(context.Context) (*bus.Conn, error) {
			p.watch(name, conns[name]) // in the place of "not connected yet"
			return conns[name], nil
		}
	}
	if err := p.shims(spoken, shimming, gatewayURL(entries.api)); err != nil {
		return err
	}
	if err := p.gateway(own("gateway"), entries, u.gateway, u.assets, u.retention); err != nil {
		return err
	}
	// Nobody else holds this data folder, so an earlier leader of this name is dead.
	p.placer(own("placer"), "up-"+u.agent.cluster)
	p.agent(own("agent"), rt, u.agent)
	p.reaper(own("reaper"), u.reaper, u.assets, u.retention)
	p.parts = append(p.parts, part{"memory", "", natsd.BoundMemory})
	p.address = func(a *addresses) {
		u.gateway.addresses(entries, a)
		a.shims(spoken)
		a.NATS, a.Worker, a.Cluster = server.URL(), u.agent.worker, u.agent.cluster
	}
	p.up = func(a addresses) string {
		return fmt.Sprintf("dayfly is up: API %s, admin %s, worker %s, data in %s", a.HTTP, a.Admin, a.Worker, u.agent.data) + tryIt(c, a)
	}
	return interruptedIsFine(ctx, p.run(ctx))
}

func tryIt(c *cli, a addresses) string {
	if c.quiet || !isTerminal(c.err) {
		return ""
	}
	return fmt.Sprintf("\n  try: dayfly run%s busybox echo hi", urlFlag(a.HTTP))
}

func urlFlag(url string) string {
	if url == defaultURL {
		return ""
	}
	return " --url " + url
}

// startNATS starts the embedded server.
func (u *upConfig) startNATS(ctx context.Context, p *process, secrets credentials) (*natsd.Server, error) {
	nd := natsd.Config{
		Dir: filepath.Join(u.agent.data, "nats"), SyncAlways: u.sync == "always",
		CorePassword: secrets.Core, JoinSecret: secrets.Join, Logger: p.logger("nats"),
	}
	if u.nats != "" {
		var err error
		if nd.Host, nd.Port, err = natsAddress("--nats", u.nats); err != nil {
			return nil, &usageError{err, "dayfly up"}
		}
	}
	var err error
	if nd.TLS, err = u.tls.of(); err != nil {
		return nil, err
	}
	sayRelaxed(p, u.sync)
	server, err := natsd.Start(ctx, nd)
	if err != nil {
		return nil, &hintError{err, "the log above; dayfly doctor looks deeper"}
	}
	p.registry.MustRegister(natsMetrics{server})
	return server, nil
}

// sayRelaxed says aloud that accepted tasks may be lost.
func sayRelaxed(p *process, sync string) {
	if sync == "always" {
		return
	}
	p.log.Warn().Msg("accepted tasks may be lost when this machine loses power: --sync default")
	p.health.Add("sync relaxed: accepted tasks may be lost with the power", func(context.Context) error { return nil })
}

func checkSync(sync string) error {
	if sync != "always" && sync != "default" {
		return errors.New("--sync must be always or default")
	}
	return nil
}

// natsAddress takes an address apart; the port 0 is a free one.
func natsAddress(flag, addr string) (host string, port int, err error) {
	host, text, err := net.SplitHostPort(addr)
	if err == nil {
		port, err = strconv.Atoi(text)
	}
	if err != nil {
		return "", 0, fmt.Errorf("%s must be HOST:PORT with a number", flag)
	}
	if port == 0 {
		port = -1
	}
	return host, port, nil
}

type provider struct{ *natsd.Server }

var _ nats.InProcessConnProvider = provider{}
