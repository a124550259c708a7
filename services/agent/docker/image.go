package docker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"syscall"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// Image implements agent.Runtime. What is present is used without asking the
// registry, unless the spec says "always". progress is called by this call alone,
// never after it.
//
// A pinned image that has a digest is had by that, whatever the name means by now. One
// without was never in a registry: it is used where it is, by its id, and a worker that has
// another under the name cannot run the task.
func (r *Runtime) Image(ctx context.Context, spec schemas.Spec, pinned *schemas.Resolved, progress func(agent.Progress)) (agent.Image, error) {
	ref, err := parseImage(spec.Image)
	if err != nil {
		return agent.Image{}, err
	}
	policy := spec.Pull
	switch {
	case pinned == nil:
	case pinned.Digest == "":
		img, err := r.useImage(ctx, pinned.ID, spec.Image)
		if cerrdefs.IsNotFound(err) {
			return agent.Image{}, fmt.Errorf("this worker does not have the image %s that the task began with under the name %s, which is in no registry; load it there", short(pinned.ID), spec.Image)
		}
		return img.Image, err
	default:
		if ref, err = parseImage(schemas.PinnedImage(spec.Image, pinned.Digest)); err != nil {
			return agent.Image{}, err
		}
		if policy == schemas.PullAlways {
			policy = schemas.PullMissing // what a digest names does not change
		}
	}
	img, err := r.obtainImage(ctx, spec, policy, ref, progress)
	return img.named(pinned), err
}

// named says the digest by which the task has had the image.
func (i image) named(pinned *schemas.Resolved) agent.Image {
	if pinned != nil && pinned.Digest != "" && i.ID != "" {
		i.Digest = pinned.Digest
	}
	return i.Image
}

// short is an id as people read it.
func short(id string) string {
	_, hex, _ := strings.Cut(id, ":")
	return hex[:min(12, len(hex))]
}

// obtainImage makes present what ref names.
func (r *Runtime) obtainImage(ctx context.Context, spec schemas.Spec, policy schemas.ImagePolicy, ref reference.Named, progress func(agent.Progress)) (image, error) {
	var present error
	if policy != schemas.PullAlways {
		img, err := r.useImage(ctx, ref.String(), spec.Image)
		// An image for another machine may be an old one: what the tag means now may fit.
		if _, unfit := errors.AsType[*agent.StartError](err); unfit && policy != schemas.PullNever {
			present = err
		} else if err == nil || !cerrdefs.IsNotFound(err) {
			return img, err
		}
		if policy == schemas.PullNever {
			return image{}, &agent.StartError{Reason: schemas.ReasonImage,
				Message: fmt.Sprintf(`image %q is not on this worker, and pull is "never"; set pull to "missing", or load the image there first`, spec.Image)}
		}
	}
	auth, err := r.auth(spec.Credentials, reference.Domain(ref))
	if err != nil {
		return image{}, fmt.Errorf("image %s: %w", spec.Image, err)
	}
	if err := r.pulls.wait(ctx, r, ref.String(), auth, progress); err != nil {
		if ctx.Err() != nil {
			return image{}, fmt.Errorf("pull image %s: %w", spec.Image, context.Cause(ctx))
		}
		err = r.pullFault(err, ref, spec.Image, auth)
		if _, fault := errors.AsType[*agent.StartError](err); fault && present != nil {
			err = present
		}
		return image{}, err
	}
	return r.useImage(ctx, ref.String(), spec.Image)
}

// useImage looks at a local image that a task is about to use, and keeps it for a while
// from being removed. NotFound comes back as Docker's error.
func (r *Runtime) useImage(ctx context.Context, name, asked string) (image, error) {
	for {
		img, err := r.inspectImage(ctx, name, asked)
		if err != nil {
			return img, err
		}
		removed := r.stock.use(img.ID)
		if removed == nil {
			return img, nil
		}
		select { // it is just being removed: look again afterwards
		case <-removed:
		case <-ctx.Done():
			return image{}, context.Cause(ctx)
		}
	}
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
		reason := schemas.ReasonImageAuth
		if strings.Contains(lower, "does not exist") { // or is private: such a registry does not say which
			reason = schemas.ReasonImage
		}
		return fault(reason, "registry %s does not give image %q without a login; check the name, or give the worker a login for %s", host, asked, host)
	case says(saysDenied):
		return fault(schemas.ReasonImageAuth, "registry %s refuses image %q to the login that the worker has for it; check the name, and that login's password and rights", host, asked)
	case cerrdefs.IsNotFound(err), says(saysMissing):
		return fault(schemas.ReasonImage, "registry %s has no image %q; check its name and tag", host, asked)
	case says(saysInsecure):
		return fault(schemas.ReasonImagePull, "registry %s of image %q speaks plain HTTP; give it TLS, or add it to insecure-registries of the worker's Docker", host, asked)
	case says(saysAway):
		return fault(schemas.ReasonImagePull, "registry %s of image %q cannot be reached; check its name, and that it runs: %s", host, asked, clip(text))
	}
	return fault(schemas.ReasonImagePull, "registry %s did not give image %q; look at the registry, or try again later: %s", host, asked, clip(text))
}
