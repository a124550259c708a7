package docker

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/registry"
	"sigs.k8s.io/yaml"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// Credential opens a registry.
type Credential struct {
	Username, Password string
	IdentityToken      string // instead of a password
}

// Bounds of a file of credentials.
const (
	maxCredentials     = 64
	maxCredentialBytes = 1 << 20
)

// named is a credential that tasks ask for by its name. It opens one registry and is sent
// to no other.
type named struct {
	Registry      string `json:"registry"`
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identity_token"`
}

// wallet holds what stands in Config.CredentialsFile, and reads it again when it changes.
// What it reads is told to nobody but Docker.
type wallet struct {
	path string

	mu    sync.Mutex
	seen  stamp                          // under mu: of the file that was read last
	fault error                          // under mu: why that one does not count
	names map[string]named               // under mu
	hosts map[string]registry.AuthConfig // under mu: "auths" of Docker's own format
}

// stamp tells one content of a file from another.
type stamp struct {
	size     int64
	modified time.Time
}

// read looks whether the file is another than was read last. One that cannot be read leaves
// what was known before. It runs under w.mu.
func (w *wallet) read() error {
	info, err := os.Stat(w.path)
	if err != nil {
		w.seen = stamp{}
		w.fault = fmt.Errorf("registry credentials: %w", err)
		return w.fault
	}
	now := stamp{info.Size(), info.ModTime()}
	if now == w.seen && info.Mode().Perm()&0o077 == 0 {
		return w.fault
	}
	w.seen = now
	w.fault = w.load(info)
	return w.fault
}

// load reads the file. No error repeats anything from it.
func (w *wallet) load(info os.FileInfo) error {
	switch {
	case info.Mode().Perm()&0o077 != 0:
		w.seen = stamp{} // its mode may change and nothing else
		return fmt.Errorf("registry credentials: others may read %s; chmod 600 it", w.path)
	case info.Size() > maxCredentialBytes:
		return fmt.Errorf("registry credentials: %s is larger than %s", w.path, schemas.Size(maxCredentialBytes))
	}
	b, err := os.ReadFile(w.path)
	if err != nil {
		return fmt.Errorf("registry credentials: %w", err)
	}
	var file struct {
		Auths       map[string]registry.AuthConfig `json:"auths"`
		Credentials map[string]named               `json:"credentials"`
	}
	if b, err = yaml.YAMLToJSONStrict(b); err != nil || json.Unmarshal(b, &file) != nil {
		return fmt.Errorf("registry credentials: %s is neither YAML with a map of credentials nor Docker's config.json", w.path)
	}
	if len(file.Auths)+len(file.Credentials) > maxCredentials {
		return fmt.Errorf("registry credentials: %s has more than %d", w.path, maxCredentials)
	}
	for _, name := range slices.Sorted(maps.Keys(file.Credentials)) {
		switch c := file.Credentials[name]; {
		case !schemas.ValidCredentials(name):
			return fmt.Errorf("registry credentials: %s has a name with other than letters, digits, dots, colons, dashes and underscores", w.path)
		case c.Registry == "":
			return fmt.Errorf("registry credentials: %q in %s names no registry", name, w.path)
		case c.IdentityToken == "" && (c.Username == "" || c.Password == ""):
			return fmt.Errorf("registry credentials: %q in %s has no username and password, nor an identity_token", name, w.path)
		}
	}
	w.names, w.hosts = file.Credentials, file.Auths
	return nil
}

// errNoCredentials says that there is no file.
var errNoCredentials = errors.New("no credentials")

// find gives the login for a registry: that of a name, or, without one, what the file has
// for the host. errNoCredentials: there is none.
func (w *wallet) find(name, host string) (registry.AuthConfig, error) {
	if w.path == "" {
		return registry.AuthConfig{}, errNoCredentials
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.read(); err != nil && w.names == nil && w.hosts == nil {
		return registry.AuthConfig{}, err
	}
	if c, ok := w.names[name]; ok && name != "" {
		if !sameRegistry(c.Registry, host) {
			return registry.AuthConfig{}, &agent.StartError{Reason: schemas.ReasonImageAuth,
				Message: fmt.Sprintf("the registry credentials %q are for %s, and the image is from %s; name those for it", name, c.Registry, host)}
		}
		return registry.AuthConfig{Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken, ServerAddress: host}, nil
	}
	if name != "" && !sameRegistry(name, host) {
		return registry.AuthConfig{}, errNoCredentials
	}
	if c, ok := w.names[host]; ok && sameRegistry(c.Registry, host) { // it is called as its registry is
		return registry.AuthConfig{Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken, ServerAddress: host}, nil
	}
	if c, ok := forRegistry(w.hosts, host); ok {
		return plain(c, host, w.path)
	}
	return registry.AuthConfig{}, errNoCredentials
}

// list gives the names that tasks may ask for, in order.
func (w *wallet) list() (names []string, err error) {
	if w.path == "" {
		return nil, nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	err = w.read()
	for name := range w.names {
		names = append(names, name)
	}
	for host := range w.hosts {
		if host = hostOf(host); schemas.ValidCredentials(host) {
			names = append(names, host)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), err
}

// Credentials implements agent.Runtime.
func (r *Runtime) Credentials() []string {
	names, err := r.wallet.list()
	r.mu.Lock()
	defer r.mu.Unlock()
	if said := fmt.Sprint(err); err != nil && said != r.walletSaid {
		r.walletSaid = said
		r.log.Error().Err(err).Msg("those that were read before still count")
	} else if err == nil {
		r.walletSaid = ""
	}
	return names
}

// auth finds the login for a registry, in the form that Docker takes; "" is none. name is
// that of the spec.
func (r *Runtime) auth(name, host string) (string, error) {
	c, err := r.wallet.find(name, host)
	switch {
	case err == nil:
		return authconfig.Encode(c)
	case !errors.Is(err, errNoCredentials):
		return "", err
	case name != "":
		return "", fmt.Errorf("this worker has no registry credentials %q", name) // it had them when it was chosen, or never said so
	}
	if c, ok := forRegistry(r.cfg.Credentials, host); ok {
		return authconfig.Encode(registry.AuthConfig{Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken, ServerAddress: host})
	}
	if r.cfg.AuthFile == "" {
		return "", nil
	}
	b, err := os.ReadFile(r.cfg.AuthFile) // each time: it may be replaced while we run
	if err != nil {
		return "", fmt.Errorf("read registry credentials: %w", err)
	}
	var file struct {
		Auths map[string]registry.AuthConfig `json:"auths"`
	}
	if err := json.Unmarshal(b, &file); err != nil {
		return "", fmt.Errorf("registry credentials in %s are not valid JSON", r.cfg.AuthFile) // err may have a secret in it
	}
	found, _ := forRegistry(file.Auths, host)
	if found, err = plain(found, host, r.cfg.AuthFile); err != nil || found == (registry.AuthConfig{ServerAddress: host}) {
		return "", err // not there, or kept by a credential helper
	}
	return authconfig.Encode(found)
}

// plain takes the user and the password out of the one field that Docker's file has them in.
func plain(c registry.AuthConfig, host, file string) (registry.AuthConfig, error) {
	if c.Auth != "" {
		b, err := base64.StdEncoding.DecodeString(c.Auth)
		user, password, ok := strings.Cut(string(b), ":")
		if err != nil || !ok {
			return c, fmt.Errorf("registry credentials in %s: auth of %s is not user:password in base64", file, host)
		}
		c.Username, c.Password, c.Auth = user, strings.Trim(password, "\x00"), ""
	}
	c.ServerAddress = host
	return c, nil
}

// hostOf is the registry that a key of Docker's file is for, which tools write as
// "registry.lan", "https://registry.lan" or "https://index.docker.io/v1/".
func hostOf(key string) string {
	_, rest, schemed := strings.Cut(key, "://")
	if !schemed {
		rest = key
	}
	name, _, _ := strings.Cut(rest, "/")
	if name == "index.docker.io" || name == "registry-1.docker.io" {
		name = "docker.io"
	}
	return name
}

func sameRegistry(key, host string) bool { return key == host || hostOf(key) == host }

// forRegistry finds what is kept for a registry.
func forRegistry[C any](all map[string]C, host string) (C, bool) {
	if c, ok := all[host]; ok {
		return c, true
	}
	for _, k := range slices.Sorted(maps.Keys(all)) {
		if hostOf(k) == host {
			return all[k], true
		}
	}
	var none C
	return none, false
}

// redact takes the login out of a text: a registry may repeat what it was sent.
func redact(text, auth string) string {
	c, err := authconfig.Decode(auth)
	if err != nil {
		return text
	}
	for _, secret := range []string{base64.StdEncoding.EncodeToString([]byte(c.Username + ":" + c.Password)), c.Password, c.IdentityToken, c.RegistryToken} {
		if secret != "" {
			text = strings.ReplaceAll(text, secret, "…")
		}
	}
	return text
}
