package natsd

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"dayfly.dev/schemas"
)

// The two accounts, and the user by which servers of a cluster know one another.
const (
	coreAccount   = "CORE"
	agentsAccount = "AGENTS"
	routeUser     = "route"
)

func host(c Config) string {
	if c.Host == "" {
		return "127.0.0.1"
	}
	return c.Host
}

// checkConfig refuses what the text could not say.
func checkConfig(c Config) error {
	if c.CorePassword == "" {
		return errors.New("the core services need a password")
	}
	if err := checkPassword(c.CorePassword); err != nil {
		return fmt.Errorf("password of %s: %w", CoreUser, err)
	}
	for w, password := range c.Workers {
		if _, err := schemas.ParseWorkerID(string(w)); err != nil {
			return err
		}
		if w == CoreUser {
			return fmt.Errorf("a worker cannot be called %q: that is the user of the core services", w)
		}
		if password == "" {
			return fmt.Errorf("worker %s needs a password", w)
		}
		if err := checkPassword(password); err != nil {
			return fmt.Errorf("password of %s: %w", w, err)
		}
	}
	if c.JoinSecret != "" {
		if err := checkPassword(c.JoinSecret); err != nil {
			return fmt.Errorf("join secret: %w", err)
		}
	}
	texts := []string{c.Name, c.Dir, c.Host}
	if c.TLS != nil {
		texts = append(texts, c.TLS.Cert, c.TLS.Key, c.TLS.CA)
	}
	if c.Cluster != nil {
		if c.Cluster.Name == "" || c.Name == "" {
			return errors.New("a server of a cluster needs a name, and so does the cluster")
		}
		if c.Cluster.Secret == "" {
			return errors.New("the servers of a cluster need a secret")
		}
		if err := checkPassword(c.Cluster.Secret); err != nil {
			return fmt.Errorf("secret of the cluster: %w", err)
		}
		for _, r := range c.Cluster.Routes {
			if _, _, err := net.SplitHostPort(r); err != nil {
				return fmt.Errorf("route %q must be HOST:PORT", r)
			}
		}
		texts = append(append(texts, c.Cluster.Name, c.Cluster.Host), c.Cluster.Routes...)
	}
	for _, text := range texts {
		if strings.ContainsAny(text, "\"\\\n\r\x00") {
			return fmt.Errorf("%q: quotes, backslashes and line breaks cannot stand in the configuration", text)
		}
	}
	return nil
}

func checkPassword(s string) error {
	for _, r := range s {
		if r <= ' ' || r > '~' || r == '"' || r == '\\' {
			return errors.New("only printable ASCII without spaces, quotes and backslashes")
		}
	}
	return nil
}

// ConfigText is the configuration of the server as a nats-server reads it. What an
// embedded server has beyond that (no signals, perhaps no listener) Start adds.
func ConfigText(c Config) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	name := c.Name
	if name == "" {
		name = "dayfly"
	}
	line("server_name: %s", quote(name))
	line("host: %s", quote(host(c)))
	if c.Port != 0 {
		line("port: %d", c.Port)
	}
	line("ping_interval: \"15s\"") // half-open agents are found in half a minute
	if c.TLS != nil {
		line("tls { cert_file: %s, key_file: %s }", quote(c.TLS.Cert), quote(c.TLS.Key))
	}
	line("")
	line("jetstream {")
	line("  store_dir: %s", quote(c.Dir))
	if c.MaxStore > 0 {
		line("  max_file_store: %d", c.MaxStore)
	}
	if c.SyncAlways {
		line("  sync_interval: always")
	}
	line("  limits { default_max_consumers: -1 }") // views and agents are consumers; the default is 1,000 per stream
	line("}")
	if c.Cluster != nil {
		clusterHost := c.Cluster.Host
		if clusterHost == "" {
			clusterHost = host(c)
		}
		line("")
		line("cluster {")
		line("  name: %s", quote(c.Cluster.Name))
		line("  listen: %s", quote(clusterHost+":"+strconv.Itoa(c.Cluster.Port)))
		line("  authorization { user: %s, password: %s, timeout: 5 }", quote(routeUser), quote(c.Cluster.Secret))
		if c.TLS != nil && c.TLS.CA != "" {
			line("  tls { cert_file: %s, key_file: %s, ca_file: %s, verify: true }", quote(c.TLS.Cert), quote(c.TLS.Key), quote(c.TLS.CA))
		}
		line("  routes: [")
		for _, r := range c.Cluster.Routes {
			line("    %s", quote((&url.URL{Scheme: "nats-route", User: url.UserPassword(routeUser, c.Cluster.Secret), Host: r}).String()))
		}
		line("  ]")
		line("}")
	}
	line("")
	line("# Agents live in an account without JetStream: a reply subject escapes subject")
	line("# permissions, so what they may reach is what CORE exports to them.")
	line("accounts {")
	line("  %s {", coreAccount)
	line("    jetstream: enabled")
	line("    users: [ { user: %s, password: %s } ]", quote(CoreUser), quote(c.CorePassword))
	line("    exports: [")
	for _, s := range schemas.AgentServices() {
		response := ""
		if s.Streamed {
			response = ", response_type: stream"
		}
		line("      { service: %s, accounts: [ AGENTS ]%s }", quote(s.Subject), response)
	}
	line("    ]")
	line("    imports: [")
	for _, s := range schemas.CoreServices() {
		line("      { service: { account: AGENTS, subject: %s } }", quote(s.Subject))
	}
	line("    ]")
	line("  }")
	line("  %s {", agentsAccount)
	line("    exports: [")
	for _, s := range schemas.CoreServices() {
		line("      { service: %s, accounts: [ CORE ] }", quote(s.Subject))
	}
	line("    ]")
	line("    imports: [")
	for _, s := range schemas.AgentServices() {
		to := ""
		if s.As != "" {
			to = ", to: " + quote(s.As)
		}
		line("      { service: { account: CORE, subject: %s }%s }", quote(s.Subject), to)
	}
	line("    ]")
	line("    users: [")
	for _, w := range slices.Sorted(maps.Keys(c.Workers)) {
		publish, subscribe := schemas.AgentPermissions(w)
		line("      { user: %s, password: %s, permissions: {", quote(string(w)), quote(c.Workers[w]))
		line("          publish: { allow: [ %s ] }", list(publish))
		line("          subscribe: { allow: [ %s ] }", list(subscribe))
		line("          allow_responses: { max: 1000, expires: \"1m\" } } }")
	}
	line("    ]")
	line("  }")
	line("}")
	return b.String()
}

// quote is enough for what checkConfig lets through.
func quote(s string) string { return `"` + s + `"` }

func list(subjects []string) string {
	quoted := make([]string, len(subjects))
	for i, s := range subjects {
		quoted[i] = quote(s)
	}
	return strings.Join(quoted, ", ")
}
