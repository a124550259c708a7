package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"dayfly.dev/ops"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
	"dayfly.dev/services/gateway/ingress"
	"dayfly.dev/services/gateway/kinds"
)

// gatewayConfig is what a gateway is told.
type gatewayConfig struct {
	http   string
	hosts  []string
	maxTTL time.Duration
	allow  []string

	ingress           string
	endpointURL       string
	trusted, private  []string
	passAuthorization bool
	cert, key         string
	tcpPorts          string
	kinds             string
	kindsOnly         bool
	backends          []string
	blobMax           string

	templates   string
	maxPerOwner int
}

func (g *gatewayConfig) flags(f *pflag.FlagSet, tcpPorts string) {
	f.StringVar(&g.http, "http", defaultHTTP, "address of the API")
	f.StringSliceVar(&g.hosts, "host", nil, "name or address under which clients reach the API, beside localhost and the address itself; may be repeated")
	f.DurationVar(&g.maxTTL, "max-ttl", schemas.DefaultPolicy().MaxTTL.Std(), "longest lifetime of a task, extensions included")
	f.StringVar(&g.kinds, "kinds", "", "folder of the kinds of tasks that this site has, a YAML file for each; read again when it changes")
	f.BoolVar(&g.kindsOnly, "kinds-only", false, "take no tasks but those of --kinds")
	f.StringSliceVar(&g.allow, "allow", []string{"entrypoint", "tmpfs"}, "what tasks may ask for: entrypoint, tmpfs, image-user (to run as the user that the image names, root perhaps), mounts (other places for input and output), writable-root (on the worker's disk), cap:NAME for a capability such as cap:SETUID, or none")
	f.StringVar(&g.templates, "templates", "", "folder of templates for instances, one YAML file each; read again when it changes, and by SIGHUP")
	f.IntVar(&g.maxPerOwner, "max-per-owner", 0, "instances that one owner may have at a time, over all templates (0: any number)")
	f.StringVar(&g.blobMax, "blob-max-size", "4GiB", "the largest blob that is taken")
	f.StringVar(&g.ingress, "ingress", defaultIngress, "address at which tasks are reached by their hostnames; empty: none")
	f.StringVar(&g.endpointURL, "endpoint-url", "", "how clients reach tasks, such as https://*.tasks.example (default: http://*.localhost and the port of --ingress)")
	f.StringArrayVar(&g.trusted, "trusted-proxy", nil, "network of proxies before the ingress, such as 10.0.0.0/24, whose X-Forwarded-* headers hold; may be repeated")
	f.StringArrayVar(&g.private, "private-cookie", nil, "name of a cookie that no task gets; may be repeated")
	f.BoolVar(&g.passAuthorization, "ingress-pass-authorization", false, "let the Authorization header of visitors through to tasks")
	f.StringVar(&g.tcpPorts, "tcp-ports", tcpPorts, "ports FROM-TO at the host of --ingress for tcp ports of tasks, the same at all gateways; empty: none")
	f.StringArrayVar(&g.backends, "ingress-backend", nil, "URL at which Traefik reaches an ingress of this site (default: this one's); may be repeated")
	f.StringVar(&g.cert, "ingress-cert", "", "certificate of the ingress with its chain, in PEM; read again when it changes")
	f.StringVar(&g.key, "ingress-key", "", "the key of --ingress-cert, in PEM")
}

// policy is what tasks may ask for.
func (g *gatewayConfig) policy() (schemas.Policy, error) {
	p := schemas.Policy{MaxTTL: schemas.Duration(g.maxTTL)}
	for _, what := range g.allow {
		if name, ok := strings.CutPrefix(what, "cap:"); ok {
			if !slices.Contains(schemas.Capabilities, name) {
				return p, fmt.Errorf("--allow cap: must name one of %s", strings.Join(schemas.Capabilities, ", "))
			}
			p.AllowCaps = append(p.AllowCaps, name)
			continue
		}
		switch what {
		case "entrypoint":
			p.AllowEntrypoint = true
		case "tmpfs":
			p.AllowTmpfs = true
		case "image-user":
			p.AllowImageUser = true
		case "mounts":
			p.AllowMounts = true
		case "writable-root":
			p.AllowWritableRoot = true
		case "none":
		default:
			return p, errors.New("--allow must be of entrypoint, tmpfs, image-user, mounts, writable-root and cap:NAME, with commas between, or none")
		}
	}
	return p, nil
}

func (g *gatewayConfig) check(p *processConfig) error {
	if g.maxTTL < time.Second {
		return errors.New("--max-ttl must be at least 1s")
	}
	if g.maxPerOwner < 0 {
		return errors.New("--max-per-owner must not be negative")
	}
	for _, name := range g.hosts {
		if err := ops.CheckHost(name); err != nil {
			return fmt.Errorf("--host %w", err)
		}
	}
	if _, err := g.policy(); err != nil {
		return err
	}
	if _, err := blobSize("--blob-max-size", g.blobMax); err != nil {
		return err
	}
	if g.kindsOnly && g.kinds == "" {
		return errors.New("--kinds-only goes with --kinds")
	}
	if err := p.listens("--http", g.http); err != nil {
		return err
	}
	if g.ingress != "" {
		if err := p.listens("--ingress", g.ingress); err != nil {
			return err
		}
	}
	if (g.cert == "") != (g.key == "") {
		return errors.New("--ingress-cert and --ingress-key go together")
	}
	for _, name := range g.private {
		if name == "" || strings.ContainsAny(name, "=;, \t") {
			return errors.New("--private-cookie must be the name of a cookie")
		}
	}
	if g.endpointURL != "" {
		if _, err := gateway.ParseEndpointURL(g.endpointURL); err != nil {
			return fmt.Errorf("--endpoint-url %w", err)
		}
	}
	for _, b := range g.backends {
		if u, err := url.Parse(b); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.User != nil {
			return errors.New("--ingress-backend must be a URL such as http://10.0.0.5:8081")
		}
	}
	if _, _, err := portRange(g.tcpPorts); err != nil {
		return err
	}
	if g.tcpPorts != "" && g.ingress == "" {
		return errors.New("--tcp-ports goes with --ingress, whose host it listens on")
	}
	_, err := networks("--trusted-proxy", g.trusted)
	return err
}

// portRange reads FROM-TO.
func portRange(s string) (from, to int, err error) {
	if s == "" {
		return 0, 0, nil
	}
	first, last, _ := strings.Cut(s, "-")
	from, err = strconv.Atoi(first)
	if err == nil {
		to, err = strconv.Atoi(last)
	}
	if err != nil || from < 1 || to < from || to > 65535 {
		return 0, 0, errors.New("--tcp-ports must be FROM-TO, such as 20000-20999")
	}
	return from, to, nil
}

// networks reads prefixes of addresses.
func networks(flag string, list []string) (all []netip.Prefix, err error) {
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("%s must be a network such as 10.1.0.0/16 or 10.1.2.3/32", flag)
		}
		all = append(all, p)
	}
	return all, nil
}

// listeners are what a gateway listens on.
type listeners struct{ api, ingress net.Listener }

// listen takes the ports.
func (g *gatewayConfig) listen() (l listeners, err error) {
	if l.api, err = listen("--http", g.http); err != nil {
		return l, err
	}
	if g.ingress != "" {
		if l.ingress, err = listen("--ingress", g.ingress); err != nil {
			l.close()
		}
	}
	return l, err
}

// close closes them, again where the gateway has done it.
func (l listeners) close() {
	l.api.Close()
	if l.ingress != nil {
		l.ingress.Close()
	}
}

// addresses says where they are.
func (g *gatewayConfig) addresses(l listeners, a *addresses) {
	a.HTTP = "http://" + l.api.Addr().String()
	if l.ingress != nil {
		a.Ingress = g.scheme() + "://" + l.ingress.Addr().String()
	}
}

func (g *gatewayConfig) scheme() string {
	if g.cert != "" {
		return "https"
	}
	return "http"
}

// endpoints is how clients reach tasks.
func (g *gatewayConfig) endpoints(l listeners) gateway.EndpointAddress {
	if g.endpointURL != "" {
		a, _ := gateway.ParseEndpointURL(g.endpointURL) // of check
		return a
	}
	a := gateway.EndpointAddress{Scheme: g.scheme(), Domain: "localhost"}
	if l.ingress != nil {
		a.Port = l.ingress.Addr().(*net.TCPAddr).Port
	}
	return a
}

func (p *process) gateway(connect connector, l listeners, g gatewayConfig, assets assetConfig, retention time.Duration) error {
	policy, err := g.policy()
	if err != nil {
		return err
	}
	trusted, err := networks("--trusted-proxy", g.trusted)
	if err != nil {
		return err
	}
	cfg := gateway.Config{Policy: policy, Hosts: g.hosts, Retention: retention, Lease: p.config.scaled(defaultLease), Endpoints: g.endpoints(l),
		Ingress: ingress.Config{TrustedProxies: trusted, PassAuthorization: g.passAuthorization, PrivateCookies: g.private}}
	if g.kinds != "" {
		if cfg.Kinds, err = kinds.Open(g.kinds, policy); err != nil {
			return &hintError{fmt.Errorf("--kinds:\n%w", err), "docs/kinds.md says what these files hold"}
		}
		cfg.KindsOnly = g.kindsOnly
	}
	if cfg.TCP.From, cfg.TCP.To, err = portRange(g.tcpPorts); err != nil {
		return err
	}
	cfg.BlobMaxSize, _ = blobSize("", g.blobMax) // they were checked
	cfg.BlobBytes, _ = blobSize("", assets.blobs)
	cfg.IngressBackends = g.backends
	if l.ingress != nil {
		if len(g.backends) == 0 {
			cfg.IngressBackends = []string{g.scheme() + "://" + l.ingress.Addr().String()}
		}
		cfg.TCP.Host = l.ingress.Addr().(*net.TCPAddr).IP.String()
	}
	cfg.MaxPerOwner = g.maxPerOwner
	templates, err := g.openTemplates(policy)
	if err != nil {
		return err
	}
	deps := gateway.Deps{Templates: templates, Connect: connect, Listener: l.api, Ingress: l.ingress, Logger: p.logger("gateway"), Metrics: p.registry, Health: p.health, Tracer: p.tracer("gateway")}
	if g.cert != "" {
		deps.Certificate = &gateway.CertificateFiles{Certificate: g.cert, Key: g.key}
		if _, err := tls.LoadX509KeyPair(g.cert, g.key); err != nil {
			return &hintError{fmt.Errorf("certificate of the ingress: %w", err), "--ingress-cert and --ingress-key with files in PEM that belong together"}
		}
	}
	if templates != nil {
		p.rereadOn(templates.Poke)
	}
	p.health.Add("gateway: nats", notConnectedYet)
	p.parts = append(p.parts, part{"gateway", "gateway: views", func(ctx context.Context) error { return gateway.Run(ctx, deps, cfg) }})
	return nil
}
