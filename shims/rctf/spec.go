package rctf

import (
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"dayfly.dev/schemas"
	"dayfly.dev/shims/shim"
)

// Config is a challenge in the manner of Docker Compose, with one service.
type Config struct {
	Services map[string]Service `json:"services"`
	Networks map[string]Network `json:"networks"`
	Volumes  map[string]any     `json:"volumes"`
}

// Network is a network that services may share.
type Network struct {
	Driver   string `json:"driver"`
	Internal *bool  `json:"internal"` // true if it is not given
}

// Service is a container.
type Service struct {
	Image       string            `json:"image"`
	Environment map[string]string `json:"environment"`
	Command     Words             `json:"command"`
	Entrypoint  Words             `json:"entrypoint"`
	WorkingDir  string            `json:"working_dir"`
	User        string            `json:"user"`
	Networks    []string          `json:"networks"`
	NetworkMode string            `json:"network_mode"`
	Tmpfs       map[string]string `json:"tmpfs"` // options by path
	Healthcheck *Healthcheck      `json:"healthcheck"`
	ReadOnly    *bool             `json:"read_only"`
	CapAdd      []string          `json:"cap_add"`
	MemLimit    string            `json:"mem_limit"`
	CPUs        *float64          `json:"cpus"`
	PidsLimit   *int              `json:"pids_limit"`
	Restart     string            `json:"restart"`

	// What no task has: refused where it asks for something.
	Privileged  bool              `json:"privileged"`
	SecurityOpt []string          `json:"security_opt"`
	Volumes     []string          `json:"volumes"`
	DNS         []string          `json:"dns"`
	ExtraHosts  []string          `json:"extra_hosts"`
	Sysctls     map[string]string `json:"sysctls"`
}

// Healthcheck is Docker's.
type Healthcheck struct {
	Test        []string         `json:"test"`
	Interval    schemas.Duration `json:"interval"`
	Timeout     schemas.Duration `json:"timeout"`
	Retries     int              `json:"retries"`
	StartPeriod schemas.Duration `json:"start_period"`
}

// Words reads a list of words, and a text that is split at spaces outside of quotes.
type Words []string

// UnmarshalJSON implements json.Unmarshaler.
func (w *Words) UnmarshalJSON(b []byte) error {
	text, err := jsontext.AppendUnquote(nil, b)
	if err != nil {
		return schemas.Decode(b, (*[]string)(w))
	}
	*w, err = split(string(text))
	return err
}

// split takes a command line apart as a shell does, without its variables and patterns.
func split(line string) (words []string, err error) {
	var word strings.Builder
	in, quote := false, rune(0) // inside a word; inside quotes
	escaped := false
	for _, r := range line {
		switch {
		case escaped:
			if quote == '"' && r != '"' && r != '\\' {
				word.WriteByte('\\')
			}
			word.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			in, escaped = true, true
		case quote != 0 && r == quote:
			quote = 0
		case quote == 0 && (r == '\'' || r == '"'):
			in, quote = true, r
		case quote == 0 && strings.ContainsRune(" \t\r\n", r):
			if in {
				words = append(words, word.String())
			}
			word.Reset()
			in = false
		default:
			in = true
			word.WriteRune(r)
		}
	}
	if quote != 0 || escaped {
		return nil, fmt.Errorf("has a quote without its end")
	}
	if in {
		words = append(words, word.String())
	}
	return words, nil
}

// fields are the protocol's names of what can be wrong with a spec.
var fields = map[string]string{
	"image": "image", "resources.memory": "mem_limit", "resources.cpus": "cpus", "resources.pids": "pids_limit",
	"workdir": "working_dir", "env": "environment", "ttl": "timeoutMilliseconds", "health": "healthcheck",
}

// What a service has where it says nothing.
const (
	defaultCPUs = 1
	defaultPids = 1024
)

func refuse(format string, args ...any) error {
	return shim.Refuse(http.StatusUnprocessableEntity, format, args...)
}

// timeout gives the lifetime that a form asks for.
func timeout(f Form) (time.Duration, error) {
	if f.TimeoutMilliseconds < 1000 || f.TimeoutMilliseconds > int64(1000*time.Hour/time.Millisecond) {
		return 0, refuse("timeoutMilliseconds: must be 1000 or more")
	}
	return time.Duration(f.TimeoutMilliseconds) * time.Millisecond, nil
}

// spec makes a task of a form.
func (h handler) spec(f Form) (schemas.Spec, error) {
	spec := h.Spec(map[string]string{labelTeam: f.TeamID, labelChallenge: f.ChallengeID})
	if len(f.Config.Services) != 1 {
		return spec, refuse("config.services: must be one; a task is one container")
	}
	var name string
	var s Service
	for name, s = range f.Config.Services {
	}
	if err := s.beyond(f.Config); err != nil {
		return spec, err
	}
	ttl, err := timeout(f)
	if err != nil {
		return spec, err
	}
	spec.TTL, spec.OnLost = schemas.Duration(ttl), schemas.OnLostWait
	spec.Image, spec.Command, spec.Workdir, spec.User, spec.CapAdd = s.Image, s.Command, s.WorkingDir, s.User, s.CapAdd
	if _, err := strconv.ParseUint(s.User, 10, 16); err == nil { // no group is that of the same number
		spec.User += ":" + s.User
	}
	if len(s.Entrypoint) > 0 {
		spec.Entrypoint = s.Entrypoint
	}
	if s.ReadOnly != nil && !*s.ReadOnly {
		spec.ReadOnly = s.ReadOnly
	}
	spec.Network = s.network(f.Config)
	if err := s.limits(&spec); err != nil {
		return spec, err
	}
	if err := s.tmpfs(&spec); err != nil {
		return spec, err
	}
	if err := s.health(&spec); err != nil {
		return spec, err
	}
	switch s.Restart {
	case "", "always", "unless-stopped":
		spec.Restart = &schemas.Restart{Policy: schemas.RestartAlways}
	case "on-failure":
		spec.Restart = &schemas.Restart{Policy: schemas.RestartOnFailure}
	case "no":
	default:
		return spec, refuse("restart: must be no, always, on-failure or unless-stopped")
	}
	if spec.Ports, err = ports(f.Expose, name); err != nil {
		return spec, err
	}
	return spec, s.environment(&spec, f.Flags)
}

// beyond refuses what no task has.
func (s Service) beyond(c Config) error {
	for _, no := range []struct {
		given bool
		field string
		why   string
	}{
		{s.Privileged, "privileged", "no task is"},
		{slices.ContainsFunc(s.SecurityOpt, func(o string) bool { return strings.TrimSuffix(o, ":true") != "no-new-privileges" }), "security_opt", "every task has no-new-privileges and a seccomp profile, and no other"},
		{len(s.Volumes) > 0 || len(c.Volumes) > 0, "volumes", "nothing outlives a task; use tmpfs"},
		{len(s.DNS) > 0, "dns", "leave it out"},
		{len(s.ExtraHosts) > 0, "extra_hosts", "leave it out"},
		{len(s.Sysctls) > 0, "sysctls", "leave it out"},
		{s.NetworkMode == "host", "network_mode", "no task is in its host's network"},
	} {
		if no.given {
			return refuse("%s: %s", no.field, no.why)
		}
	}
	return nil
}

// network is none, which is enough to be reached, unless the service is to reach others.
func (s Service) network(c Config) schemas.Network {
	if s.NetworkMode == "bridge" {
		return schemas.NetworkEgress
	}
	for _, name := range s.Networks {
		if n, ok := c.Networks[name]; ok && n.Internal != nil && !*n.Internal && n.Driver != "none" {
			return schemas.NetworkEgress
		}
	}
	return schemas.NetworkNone
}

func (s Service) limits(spec *schemas.Spec) error {
	spec.Resources.CPUs, spec.Resources.Pids = defaultCPUs, defaultPids
	if s.CPUs != nil {
		spec.Resources.CPUs = schemas.CPUs(*s.CPUs)
	}
	if s.PidsLimit != nil {
		spec.Resources.Pids = *s.PidsLimit
	}
	if s.MemLimit == "" {
		return nil
	}
	var err error
	if spec.Resources.Memory, err = schemas.ParseSize(s.MemLimit); err != nil {
		return refuse("mem_limit: %s", err)
	}
	return nil
}

// tmpfs reads options such as "size=64m,mode=1777"; of those only the size counts.
func (s Service) tmpfs(spec *schemas.Spec) error {
	for _, at := range slices.Sorted(maps.Keys(s.Tmpfs)) {
		if spec.Tmpfs == nil {
			spec.Tmpfs = map[string]schemas.Size{}
		}
		spec.Tmpfs[at] = 64 << 20
		for option := range strings.SplitSeq(s.Tmpfs[at], ",") {
			text, ok := strings.CutPrefix(option, "size=")
			if !ok {
				continue
			}
			size, err := schemas.ParseSize(text)
			if err != nil {
				return refuse("tmpfs: size %s", err)
			}
			spec.Tmpfs[at] = size
		}
	}
	return nil
}

func (s Service) health(spec *schemas.Spec) error {
	c := s.Healthcheck
	if c == nil || len(c.Test) > 0 && c.Test[0] == "NONE" {
		return nil
	}
	if len(c.Test) < 2 || c.Test[0] != "CMD" && c.Test[0] != "CMD-SHELL" {
		return refuse(`healthcheck.test: must begin with "CMD", "CMD-SHELL" or "NONE"`)
	}
	command := c.Test[1:]
	if c.Test[0] == "CMD-SHELL" {
		command = []string{"/bin/sh", "-c", c.Test[1]}
	}
	spec.Health = &schemas.Health{Exec: command, Interval: c.Interval, Timeout: c.Timeout, Retries: c.Retries, StartPeriod: c.StartPeriod}
	return nil
}

// ports are in the order of expose, so that the endpoints are.
func ports(expose []Expose, service string) (list []schemas.Port, err error) {
	for i, e := range expose {
		p := schemas.Port{Name: "e" + strconv.Itoa(i), Port: e.ContainerPort}
		switch e.Kind {
		case "http", "https":
			p.Protocol = schemas.ProtocolHTTP
		case "tcp", "tcp-ssl":
			p.Protocol = schemas.ProtocolTCP
		default:
			return nil, refuse("expose.%d.kind: must be http, https, tcp or tcp-ssl", i)
		}
		if e.ContainerName != service {
			return nil, refuse("expose.%d.containerName: is no service of config", i)
		}
		list = append(list, p)
	}
	return list, nil
}

// placeholder is $NAME or ${NAME} of those that the protocol knows.
var placeholder = regexp.MustCompile(`\$(?:\{(RCTF_FLAG|RCTF_FLAGS)\}|(RCTF_FLAG|RCTF_FLAGS)\b)`)

// environment fills the team's flags in. A value that names one is the team's secret.
func (s Service) environment(spec *schemas.Spec, flags []Flag) error {
	first := ""
	if len(flags) > 0 {
		first = flags[0].Flag
	}
	list := make([]map[string]string, 0, len(flags))
	for _, f := range flags {
		list = append(list, map[string]string{"provider": f.Provider, "flag": f.Flag})
	}
	all, err := schemas.Encode(list)
	if err != nil {
		return refuse("flags: must be text in UTF-8")
	}
	for _, k := range slices.Sorted(maps.Keys(s.Environment)) {
		v := s.Environment[k]
		if strings.Contains(v, "RCTF_EXPOSED_HOSTNAMES") {
			return refuse("environment.%s: the hostnames of an instance are not known before it starts; leave RCTF_EXPOSED_HOSTNAMES out", k)
		}
		filled := placeholder.ReplaceAllStringFunc(v, func(name string) string {
			if strings.Trim(name, "${}") == "RCTF_FLAG" {
				return first
			}
			return string(all)
		})
		if placeholder.MatchString(v) {
			spec.Secrets = append(spec.Secrets, schemas.Secret{Env: k, Value: filled})
			continue
		}
		if spec.Env == nil {
			spec.Env = map[string]string{}
		}
		spec.Env[k] = filled
	}
	return nil
}

// scheme is that of a URL.
func scheme(url string) string {
	before, _, _ := strings.Cut(url, ":")
	return before
}
