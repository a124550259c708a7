package docker

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

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
// registry, unless the spec says "always".
func (r *Runtime) Image(ctx context.Context, spec schemas.Spec, progress func(string)) (agent.Image, error) {
	ref, err := reference.ParseNormalizedNamed(spec.Image)
	if err != nil {
		return agent.Image{}, &agent.StartError{Reason: schemas.ReasonImage, Message: fmt.Sprintf("%q is not an image reference", spec.Image)}
	}
	name := reference.TagNameOnly(ref).String()
	if spec.Pull != schemas.PullAlways {
		img, err := r.inspectImage(ctx, name, spec.Image)
		if err == nil || !cerrdefs.IsNotFound(err) {
			return img.Image, err
		}
		if spec.Pull == schemas.PullNever {
			return agent.Image{}, &agent.StartError{Reason: schemas.ReasonImage, Message: fmt.Sprintf(`image %q is not on this worker, and pull is "never"`, spec.Image)}
		}
	}
	auth, err := r.auth(reference.Domain(ref))
	if err != nil {
		return agent.Image{}, fmt.Errorf("image %s: %w", spec.Image, err)
	}
	if err := r.pulls.wait(ctx, r, name, auth, progress); err != nil {
		return agent.Image{}, pullFault(err, spec.Image)
	}
	img, err := r.inspectImage(ctx, name, spec.Image)
	return img.Image, err
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
			Message: fmt.Sprintf("image %q is for %s/%s, this worker is linux/%s; use an image that is built for it", asked, got.Os, arch, r.arch)}
	}
	img := image{Image: agent.Image{Ref: asked, ID: got.ID, Bytes: got.Size}}
	for _, d := range got.RepoDigests {
		if repo, digest, ok := strings.Cut(d, "@"); ok && (img.Digest == "" || strings.HasPrefix(name, repo)) {
			img.Digest = digest
		}
	}
	if c := got.Config; c != nil {
		img.entrypoint, img.command, img.env = c.Entrypoint, c.Cmd, c.Env
		img.user, img.workdir = c.User, c.WorkingDir
		img.volumes = slices.Sorted(maps.Keys(c.Volumes))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.images) >= 1024 {
		clear(r.images) // a cache: they are inspected again
	}
	r.images[got.ID] = img
	return img, nil
}

// auth finds the credentials of a registry, in the form that Docker takes.
func (r *Runtime) auth(host string) (string, error) {
	keys := []string{host}
	if host == "docker.io" {
		keys = append(keys, "https://index.docker.io/v1/", "index.docker.io", "registry-1.docker.io")
	}
	for _, k := range keys {
		if c, ok := r.cfg.Credentials[k]; ok {
			return authconfig.Encode(registry.AuthConfig{Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken, ServerAddress: host})
		}
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
		return "", fmt.Errorf("registry credentials in %s are not valid JSON", r.cfg.AuthFile)
	}
	for _, k := range append(keys, "https://"+host, "http://"+host) {
		c, ok := file.Auths[k]
		if !ok {
			continue
		}
		if plain, err := base64.StdEncoding.DecodeString(c.Auth); err == nil && c.Auth != "" {
			c.Username, c.Password, _ = strings.Cut(string(plain), ":")
			c.Auth = ""
		}
		c.ServerAddress = host
		return authconfig.Encode(c)
	}
	return "", nil
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

func (r *Runtime) pullImage(ctx context.Context, name, auth string, say func(string)) error {
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

// pullFault decides whose fault it is that an image is not there. Docker and
// registries have no codes for it, only words.
func pullFault(err error, asked string) error {
	text := strings.ToLower(err.Error())
	has := func(words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(text, w) })
	}
	fault := func(reason schemas.Reason, format string) error {
		return &agent.StartError{Reason: reason, Message: fmt.Sprintf(format, asked)}
	}
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		client.IsErrConnectionFailed(err), has("no space left"):
		return fmt.Errorf("pull image %s: %w", asked, err)
	case has("no matching manifest", "does not match the specified platform", "no match for platform"):
		return fault(schemas.ReasonImageArch, "image %q is not built for this worker's kind of machine")
	case has("pull access denied", "unauthorized", "authentication required", "access denied", "denied:", "no basic auth credentials", "forbidden"):
		return fault(schemas.ReasonImage, "image %q may not be pulled: it does not exist, or its registry wants other credentials; check the name, or give the worker a login")
	case cerrdefs.IsNotFound(err), has("manifest unknown", "not found", "name unknown", "repository does not exist"):
		return fault(schemas.ReasonImage, "image %q does not exist in its registry; check name and tag")
	}
	return &agent.StartError{Reason: schemas.ReasonImagePull,
		Message: fmt.Sprintf("the registry of image %q did not give it: %s", asked, clip(strings.TrimPrefix(err.Error(), "Error response from daemon: ")))}
}
