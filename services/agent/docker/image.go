package docker

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// Credential opens a registry.
type Credential struct {
	Username, Password string
	IdentityToken      string // instead of a password
}

// Image implements agent.Runtime. What is present is used without asking the
// registry, unless the spec says "always". progress is called by this call alone,
// never after it.
func (r *Runtime) Image(ctx context.Context, spec schemas.Spec, progress func(string)) (agent.Image, error) {
	ref, err := parseImage(spec.Image)
	if err != nil {
		return agent.Image{}, err
	}
	var present error
	if spec.Pull != schemas.PullAlways {
		img, err := r.inspectImage(ctx, ref.String(), spec.Image)
		// An image for another machine may be an old one: what the tag means now may fit.
		if _, unfit := errors.AsType[*agent.StartError](err); unfit && spec.Pull != schemas.PullNever {
			present = err
		} else if err == nil || !cerrdefs.IsNotFound(err) {
			return img.Image, err
		}
		if spec.Pull == schemas.PullNever {
			return agent.Image{}, &agent.StartError{Reason: schemas.ReasonImage,
				Message: fmt.Sprintf(`image %q is not on this worker, and pull is "never"; set pull to "missing", or load the image there first`, spec.Image)}
		}
	}
	auth, err := r.auth(reference.Domain(ref))
	if err != nil {
		return agent.Image{}, fmt.Errorf("image %s: %w", spec.Image, err)
	}
	if err := r.pulls.wait(ctx, r, ref.String(), auth, progress); err != nil {
		if ctx.Err() != nil {
			return agent.Image{}, fmt.Errorf("pull image %s: %w", spec.Image, context.Cause(ctx))
		}
		err = r.pullFault(err, ref, spec.Image, auth)
		if _, fault := errors.AsType[*agent.StartError](err); fault && present != nil {
			err = present
		}
		return agent.Image{}, err
	}
	img, err := r.inspectImage(ctx, ref.String(), spec.Image)
	return img.Image, err
}

func parseImage(asked string) (reference.Named, error) {
	fault := func(format string) error {
		return &agent.StartError{Reason: schemas.ReasonImage, Message: fmt.Sprintf(format, asked)}
	}
	parsed, err := reference.ParseAnyReference(asked)
	if err != nil {
		return nil, fault(`%q is not an image reference; write one such as "busybox" or "registry.lan/web:1"`)
	}
	ref, ok := parsed.(reference.Named)
	if !ok {
		return nil, fault(`%q is the id of an image, which no registry knows; name the image, such as "busybox" or "registry.lan/web@sha256:…"`)
	}
	return reference.TagNameOnly(ref), nil
}

// imageByID gives what is known of an image, and asks Docker if it is nothing.
func (r *Runtime) imageByID(ctx context.Context, id string) (image, error) {
	r.mu.Lock()
	img, ok := r.images[id]
	r.mu.Unlock()
	if ok {
		return img, nil
	}
	return r.inspectImage(ctx, id, id)
}

// inspectImage looks at a local image. NotFound comes back as Docker's error.
func (r *Runtime) inspectImage(ctx context.Context, name, asked string) (image, error) {
	got, err := r.docker.ImageInspect(ctx, name)
	if err != nil {
		return image{}, fmt.Errorf("inspect image %s: %w", asked, err)
	}
	// Docker runs what it has, also where it asked for another platform (20.10).
	arch := got.Architecture
	if got.Os != "" && got.Os != "linux" || arch != "" && arch != r.arch && !(arch == "386" && r.arch == "amd64") && !(arch == "arm" && r.arch == "arm64") {
		return image{}, &agent.StartError{Reason: schemas.ReasonImageArch,
			Message: fmt.Sprintf("image %q is for %s/%s, this worker is linux/%s; build the image for that", asked, got.Os, arch, r.arch)}
	}
	img := image{Image: agent.Image{Ref: asked, ID: got.ID, Bytes: got.Size}}
	img.Digest = repoDigest(got.RepoDigests, name)
	if c := got.Config; c != nil {
		img.entrypoint, img.command, img.env = c.Entrypoint, c.Cmd, c.Env
		img.user, img.workdir = c.User, c.WorkingDir
		img.volumes = slices.Sorted(maps.Keys(c.Volumes))
		img.Port = lowestPort(slices.Collect(maps.Keys(c.ExposedPorts)))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.images) >= 1024 {
		clear(r.images) // a cache: they are inspected again
	}
	r.images[got.ID] = img
	return img, nil
}

// lowestPort is the lowest TCP port of what an image exposes, such as "8080/tcp"; 0 if
// there is none.
func lowestPort(exposed []string) (lowest int) {
	for _, e := range exposed {
		number, protocol, _ := strings.Cut(e, "/")
		n, err := strconv.ParseUint(number, 10, 16)
		if err == nil && n > 0 && (protocol == "" || protocol == "tcp") && (lowest == 0 || int(n) < lowest) {
			lowest = int(n)
		}
	}
	return lowest
}

// repoDigest picks what the repository that was asked for calls an image, of all
// the names that Docker has for it.
func repoDigest(all []string, name string) (found string) {
	asked, err := reference.ParseNormalizedNamed(name)
	for _, d := range all {
		repo, digest, ok := strings.Cut(d, "@")
		if !ok {
			continue
		}
		if found == "" {
			found = digest
		}
		if own, notName := reference.ParseNormalizedNamed(repo); err == nil && notName == nil && own.Name() == asked.Name() {
			found = digest
			if c, ok := asked.(reference.Canonical); !ok || c.Digest().String() == digest {
				return found
			}
		}
	}
	return found
}

// auth finds the login for a registry, in the form that Docker takes; "" is none.
func (r *Runtime) auth(host string) (string, error) {
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
	c, _ := forRegistry(file.Auths, host)
	if c.Auth != "" {
		plain, err := base64.StdEncoding.DecodeString(c.Auth)
		user, password, ok := strings.Cut(string(plain), ":")
		if err != nil || !ok {
			return "", fmt.Errorf("registry credentials in %s: auth of %s is not user:password in base64", r.cfg.AuthFile, host)
		}
		c.Username, c.Password, c.Auth = user, strings.Trim(password, "\x00"), ""
	}
	if c == (registry.AuthConfig{}) {
		return "", nil // not there, or kept by a credential helper
	}
	c.ServerAddress = host
	return authconfig.Encode(c)
}

// forRegistry finds what is kept for a registry, which tools write as
// "registry.lan", "https://registry.lan" or "https://index.docker.io/v1/".
func forRegistry[C any](all map[string]C, host string) (C, bool) {
	if c, ok := all[host]; ok {
		return c, true
	}
	for _, k := range slices.Sorted(maps.Keys(all)) {
		_, rest, schemed := strings.Cut(k, "://")
		if !schemed {
			rest = k
		}
		name, _, _ := strings.Cut(rest, "/")
		if name == "index.docker.io" || name == "registry-1.docker.io" {
			name = "docker.io"
		}
		if name == host {
			return all[k], true
		}
	}
	var none C
	return none, false
}

// pulls lets one pull of an image serve all who wait for it.
type pulls struct {
	mu      sync.Mutex
	running map[[2]string]*pull // guarded
}

type pull struct {
	cancel  context.CancelFunc
	waiting int           // guarded by pulls.mu
	said    string        // guarded by pulls.mu
	changed chan struct{} // guarded by pulls.mu; closed when said changes
	done    chan struct{}
	err     error // valid once done is closed
}

// wait joins the pull of (name, auth), or begins it. When the last who waits has
// left, the pull is broken off. Each tells its own progress, so that a slow one keeps
// nobody else; it may miss sentences, never the latest.
func (ps *pulls) wait(ctx context.Context, r *Runtime, name, auth string, progress func(string)) error {
	key := [2]string{name, auth}
	p, err := ps.join(r, key)
	if err != nil {
		return err
	}
	for told := ""; ; {
		ps.mu.Lock()
		said, changed := p.said, p.changed
		ps.mu.Unlock()
		if said != told && progress != nil {
			progress(said)
			told = said
		}
		select {
		case <-p.done:
			return p.err
		case <-ctx.Done():
			ps.leave(p, key)
			return context.Cause(ctx)
		case <-changed:
		}
	}
}

func (ps *pulls) join(r *Runtime, key [2]string) (*pull, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.running[key]
	if p == nil {
		ctx, cancel := context.WithCancel(r.ctx)
		p = &pull{cancel: cancel, changed: make(chan struct{}), done: make(chan struct{})}
		if !r.goDo(func() { ps.run(ctx, r, p, key) }) {
			cancel()
			return nil, errors.New("the runtime is closed")
		}
		if ps.running == nil {
			ps.running = map[[2]string]*pull{}
		}
		ps.running[key] = p
	}
	p.waiting++
	return p, nil
}

func (ps *pulls) leave(p *pull, key [2]string) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p.waiting--
	if p.waiting == 0 {
		p.cancel()
		if ps.running[key] == p {
			delete(ps.running, key) // who comes now begins anew
		}
	}
}

func (ps *pulls) run(ctx context.Context, r *Runtime, p *pull, key [2]string) {
	defer p.cancel()
	p.err = r.pullImage(ctx, key[0], key[1], func(s string) {
		ps.mu.Lock()
		defer ps.mu.Unlock()
		if s != p.said {
			p.said = s
			close(p.changed)
			p.changed = make(chan struct{})
		}
	})
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.running[key] == p {
		delete(ps.running, key)
	}
	close(p.done)
}

func (r *Runtime) pullImage(ctx context.Context, name, auth string, say func(string)) (err error) {
	began := time.Now()
	defer func() { r.metrics.done(ctx, "pull", began, err) }()
	short := name
	if ref, err := reference.ParseNormalizedNamed(name); err == nil {
		short = reference.FamiliarString(ref)
	}
	say("pulling " + short)
	resp, err := r.docker.ImagePull(ctx, name, client.ImagePullOptions{RegistryAuth: auth})
	if err != nil {
		return err
	}
	defer resp.Close()
	all := layers{}
	for m, err := range resp.JSONMessages(ctx) {
		if err != nil {
			return err
		}
		if m.Error != nil {
			return m.Error
		}
		if s := all.add(m); s != "" {
			say("pulling " + short + ": " + s)
		}
	}
	return ctx.Err()
}

// layers sums up what Docker tells of each layer.
type layers map[string]layer

type layer struct {
	now, all int64 // bytes
	got      bool
}

// add gives what there is to say after a message, "" if that is nothing new.
func (l layers) add(m jsonstream.Message) string {
	if m.ID == "" {
		return ""
	}
	one := l[m.ID]
	switch {
	case m.Status == "Pulling fs layer", m.Status == "Waiting":
	case strings.HasPrefix(m.Status, "Retrying in"):
		l[m.ID] = layer{}
		return "the registry broke off, trying again" // Docker counts seconds; we do not
	case m.Status == "Downloading":
		if p := m.Progress; p != nil {
			one.now, one.all = p.Current, max(p.Total, p.Current)
		}
	case m.Status == "Verifying Checksum", m.Status == "Download complete", m.Status == "Extracting", m.Status == "Pull complete":
		one.now, one.got = one.all, true
	default:
		return "" // of the tag, or a layer that is there already
	}
	l[m.ID] = one
	var now, all int64
	got := true
	for _, one := range l {
		now, all, got = now+one.now, all+one.all, got && one.got
	}
	const kib, mib = 1 << 10, 1 << 20
	switch {
	case got && (m.Status == "Extracting" || m.Status == "Pull complete"):
		return "unpacking"
	case all == 0:
		return ""
	case all < mib:
		return fmt.Sprintf("%.1f of %.1f KiB", float64(now)/kib, float64(all)/kib)
	}
	return fmt.Sprintf("%.1f of %.1f MiB", float64(now)/mib, float64(all)/mib)
}

// What Docker and registries say when something is wrong. They have no codes for it,
// only words. Each has a space in it: an image's name, which is also in these texts,
// cannot pass for it.
var (
	saysPlatform = []string{"no matching manifest for", "does not match the specified platform", "no match for platform"}
	saysDenied   = []string{"pull access denied", "access to the resource is denied", "unauthorized: ", "401 unauthorized", "authentication required",
		"authorization failed", "failed to authorize", "no basic auth credentials", "denied: ", "403 forbidden", "incorrect username or password"}
	saysMissing  = []string{"manifest unknown", " not found", "name unknown", "repository does not exist"}
	saysAway     = []string{"connection refused", "no such host", "i/o timeout", "tls handshake timeout", "no route to host", "network is unreachable", "while awaiting headers", "while waiting for connection"}
	saysInsecure = []string{"server gave http response to https client"}
	saysWorker   = []string{"no space left on device", "read-only file system", "input/output error", "context canceled"}
)

// pullFault decides whose fault it is that an image is not there: the image's and
// its registry's, or this worker's.
func (r *Runtime) pullFault(err error, ref reference.Named, asked, auth string) error {
	text := redact(strings.TrimPrefix(err.Error(), "Error response from daemon: "), auth)
	lower, host := strings.ToLower(text), reference.Domain(ref)
	if lower == "denied" || lower == "unauthorized" {
		lower += ": " // a registry that said no more than that
	}
	says := func(words []string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(lower, w) })
	}
	fault := func(reason schemas.Reason, format string, args ...any) error {
		return &agent.StartError{Reason: reason, Message: fmt.Sprintf(format, args...)}
	}
	switch {
	case errors.Is(err, context.Canceled), r.ctx.Err() != nil, client.IsErrConnectionFailed(err),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return fmt.Errorf("pull image %s: docker broke off: %w", asked, err)
	case says(saysWorker):
		return fmt.Errorf("pull image %s: %s", asked, clip(text))
	case says(saysPlatform):
		return fault(schemas.ReasonImageArch, "image %q is not built for linux/%s, which this worker is; build the image for that", asked, r.arch)
	case says(saysDenied) && auth == "":
		return fault(schemas.ReasonImage, "registry %s does not give image %q without a login; check the name, or give the worker a login for %s", host, asked, host)
	case says(saysDenied):
		return fault(schemas.ReasonImage, "registry %s refuses image %q to the login that the worker has for it; check the name, and that login's password and rights", host, asked)
	case cerrdefs.IsNotFound(err), says(saysMissing):
		return fault(schemas.ReasonImage, "registry %s has no image %q; check its name and tag", host, asked)
	case says(saysInsecure):
		return fault(schemas.ReasonImagePull, "registry %s of image %q speaks plain HTTP; give it TLS, or add it to insecure-registries of the worker's Docker", host, asked)
	case says(saysAway):
		return fault(schemas.ReasonImagePull, "registry %s of image %q cannot be reached; check its name, and that it runs: %s", host, asked, clip(text))
	}
	return fault(schemas.ReasonImagePull, "registry %s did not give image %q; look at the registry, or try again later: %s", host, asked, clip(text))
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
