package docker_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/docker"
)

func present(t testing.TB, image string) bool {
	t.Helper()
	_, err := site.docker.ImageInspect(t.Context(), image)
	if err != nil && !cerrdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	return err == nil
}

func forget(t testing.TB, image string) {
	t.Helper()
	if _, err := site.docker.ImageRemove(t.Context(), image, client.ImageRemoveOptions{}); err != nil {
		t.Fatal(err)
	}
}

// pullOutside pulls as somebody else than an agent would.
func pullOutside(t testing.TB, image string) {
	t.Helper()
	resp, err := site.docker.ImagePull(t.Context(), image, client.ImagePullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := resp.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// What others pull, tag and remove is seen, by its tag and by its digest.
func TestImagesFollowDocker(t *testing.T) {
	s, rt := openStore(t, false), puller(t, nil)
	p := s.push(t, "web", "1", runtime.GOARCH, 100)
	image := s.host + "/web:1"
	if rt.Images().Has(image) {
		t.Fatal("it is there before it was pulled")
	}
	pullOutside(t, image)
	waitFor(t, "the image is seen", func() bool { return rt.Images().Has(image) })
	i := rt.Images()
	if digest := s.host + "/web@" + p.digest; !i.Has(digest) || !slices.Contains(i.Names, schemas.ImageName(digest)) || i.Cache.Images == 0 || i.Cache.Own != 0 {
		t.Errorf("%+v", i)
	}
	if _, err := site.docker.ImageTag(t.Context(), client.ImageTagOptions{Source: image, Target: s.host + "/web:other"}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the tag is seen", func() bool { return rt.Images().Has(s.host + "/web:other") })
	// What a task uses comes first.
	if _, _, err := obtain(t, rt, image, schemas.PullMissing); err != nil {
		t.Fatal(err)
	}
	if first := rt.Images().Names[0]; !strings.HasPrefix(first, s.host+"/web:") {
		t.Errorf("%s is first, and was not used last", first)
	}
	forget(t, s.host+"/web:other")
	forget(t, image)
	waitFor(t, "its end is seen", func() bool { return !rt.Images().Has(image) })
}

// However many there are, a beat stays small, and those used last are in it.
func TestManyImagesFitInABeat(t *testing.T) {
	var names []string
	for i := range 5000 {
		names = append(names, fmt.Sprintf("registry.lan/some/project/image-%d:1", i))
	}
	i := agent.NewImages(names, schemas.ImageCache{Images: len(names)})
	bytes := 0
	for _, n := range i.Names {
		bytes += len(n)
	}
	if len(i.Names) > schemas.MaxBeatImages || bytes > schemas.MaxBeatImageText || i.Names[0] != names[0] || !i.Has(names[4999]) {
		t.Errorf("%d names of %d bytes, %s first", len(i.Names), bytes, i.Names[0])
	}
}

// A tag that moved between two attempts changes nothing: the second has the image of the
// first, by its digest.
func TestPinnedImages(t *testing.T) {
	s, rt := openStore(t, false), puller(t, nil)
	first := s.push(t, "web", "1", runtime.GOARCH, 100)
	image := s.host + "/web:1"
	img, _, err := obtain(t, rt, image, schemas.PullMissing)
	if err != nil || !first.is(img) {
		t.Fatalf("%+v, %v", img, err)
	}
	second := s.push(t, "web", "1", runtime.GOARCH, 100)
	pinned := &schemas.Resolved{ID: img.ID, Digest: img.Digest}
	for _, policy := range []schemas.ImagePolicy{schemas.PullMissing, schemas.PullAlways} {
		forget(t, img.ID) // as on another worker
		spec := schemas.DefaultSpec()
		spec.Image, spec.Pull = image, policy
		if got, err := rt.Image(t.Context(), spec, pinned, nil); err != nil || !first.is(got) || got.Ref != image {
			t.Errorf("%s: %+v, %v", policy, got, err)
		}
	}
	if img, _, err := obtain(t, rt, image, schemas.PullAlways); err != nil || !second.is(img) {
		t.Errorf("a new task: %+v, %v", img, err)
	}

	// One that no registry knows is used where it is, and nowhere else.
	spec := schemas.DefaultSpec()
	spec.Image = image
	if got, err := rt.Image(t.Context(), spec, &schemas.Resolved{ID: first.id}, nil); err != nil || got.ID != first.id {
		t.Errorf("by its id: %+v, %v", got, err)
	}
	_, err = rt.Image(t.Context(), spec, &schemas.Resolved{ID: "sha256:" + strings.Repeat("ab", 32)}, nil)
	if err == nil || !strings.Contains(err.Error(), "does not have the image abababababab that the task began with") {
		t.Errorf("an image that is not here: %v", err)
	}
	if fault, ok := err.(*agent.StartError); ok {
		t.Errorf("it is the task's fault: %v", fault)
	}
}

// Above the high mark the images that were not used for longest go, down to the low one: of
// those that the agent pulled, and none that is wanted, in a container, or has another name.
func TestTrim(t *testing.T) {
	s := openStore(t, false)
	const mib = 1 << 20
	image := func(name string) string { return s.host + "/" + name + ":1" }
	for _, name := range []string{"other", "a", "b", "c", "d", "e", "kept", "used", "tagged"} {
		s.push(t, name, "1", runtime.GOARCH, 2*mib)
	}
	dir, worker := t.TempDir(), schemas.WorkerID("w-"+randomID())
	open := func(high, low schemas.Size) *docker.Runtime {
		cfg := config(t, dir, worker)
		cfg.CacheHigh, cfg.CacheLow, cfg.CacheRest = docker.Mark{Bytes: high}, docker.Mark{Bytes: low}, time.Nanosecond
		rt, err := docker.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { rt.Close() })
		return rt
	}
	pullOutside(t, image("other"))
	rt := open(100*mib, 90*mib)
	for _, name := range []string{"other", "kept", "used", "tagged", "a", "b", "c"} {
		if _, _, err := obtain(t, rt, image(name), schemas.PullMissing); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := obtain(t, rt, image("a"), schemas.PullMissing); err != nil { // b is older now
		t.Fatal(err)
	}
	if _, err := site.docker.ImageTag(t.Context(), client.ImageTagOptions{Source: image("tagged"), Target: s.host + "/mine:1"}); err != nil {
		t.Fatal(err)
	}
	made, err := site.docker.ContainerCreate(t.Context(), client.ContainerCreateOptions{Config: &container.Config{Image: image("used")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = site.docker.ContainerRemove(context.Background(), made.ID, client.ContainerRemoveOptions{Force: true})
	})
	waitFor(t, "it has counted", func() bool { return rt.Images().Cache.Own == 6 })
	if own := rt.Images().Cache.OwnAll; own < 12*mib || own > 14*mib {
		t.Errorf("its own are %d bytes", own)
	}
	if err := rt.Close(); err != nil {
		t.Fatal(err)
	}

	// It remembers over a restart. Six own of 2 MiB: three of them may go, and two must.
	rt = open(11*mib, 9*mib)
	rt.Keep([]string{s.host + "/kept:1"})
	pullOutside(t, image("d")) // an event
	waitFor(t, "b and c have gone", func() bool { return !present(t, image("b")) && !present(t, image("c")) })
	waitFor(t, "it has counted", func() bool { return rt.Images().Cache.Own == 4 })
	for _, name := range []string{"other", "kept", "used", "tagged", "a", "d"} {
		if !present(t, image(name)) {
			t.Errorf("%s has gone", name)
		}
	}
	// A task that wants it again pulls it again; the other that nobody wants goes.
	if _, said, err := obtain(t, rt, image("b"), schemas.PullMissing); err != nil || len(said) == 0 {
		t.Errorf("%q, %v", said, err)
	}
	rt.Keep([]string{s.host + "/kept:1", image("b")})
	if _, _, err := obtain(t, rt, image("e"), schemas.PullMissing); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a has gone", func() bool { return !present(t, image("a")) })
	if !present(t, image("b")) {
		t.Error("b has gone, and is wanted")
	}
	forget(t, s.host+"/mine:1")
}

func TestMarks(t *testing.T) {
	for _, good := range [][2]string{{"", ""}, {"40GiB", "30GiB"}, {"85%", "70%"}, {"85%", ""}, {"1GiB", "1GiB"}} {
		if high, low, err := docker.ParseMarks(good[0], good[1]); err != nil || low.Bytes > high.Bytes || low.Percent > high.Percent || good[0] != "" && low == (docker.Mark{}) {
			t.Errorf("%q: %v %v %v", good, high, low, err)
		}
	}
	for _, bad := range [][2]string{{"", "70%"}, {"85%", "30GiB"}, {"70%", "85%"}, {"1GiB", "2GiB"}, {"x", ""}, {"100%", ""}, {"0", ""}, {"-1GiB", ""}, {"NaN%", ""}, {"85%", "0%"}} {
		if _, _, err := docker.ParseMarks(bad[0], bad[1]); err == nil {
			t.Errorf("%q are taken", bad)
		}
	}
}

// A share of the disk counts whatever fills it.
func TestTrimByDisk(t *testing.T) {
	s := openStore(t, false)
	s.push(t, "web", "1", runtime.GOARCH, 100)
	s.push(t, "other", "1", runtime.GOARCH, 100)
	image := s.host + "/web:1"
	rt := puller(t, func(c *docker.Config) {
		c.CacheHigh, c.CacheLow, c.CacheRest = docker.Mark{Percent: 0.0001}, docker.Mark{Percent: 0.00009}, time.Nanosecond
	})
	if _, _, err := obtain(t, rt, image, schemas.PullMissing); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "it has counted", func() bool { return rt.Images().Cache.Own == 1 })
	pullOutside(t, s.host+"/other:1") // so that it looks again, which it does when it is done with the first look
	waitFor(t, "it has looked again", func() bool { return slices.Contains(rt.Images().Names, s.host+"/other:1") })
	if !present(t, image) {
		t.Error("it has gone before anybody said what shall stay")
	}
	rt.Keep(nil)
	waitFor(t, "the image has gone", func() bool { return !present(t, image) })
}

// Twenty tasks that want one image cost one pull of it, and each is told how far it is.
func TestOnePullForTwentyTasks(t *testing.T) {
	s := openStore(t, false)
	p := s.push(t, "web", "1", runtime.GOARCH, 4<<20)
	var layers, manifests atomic.Int32
	host := s.door(t, func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, p.layer) {
			layers.Add(1)
		}
		if r.Method == http.MethodGet && of(r, "manifests") {
			manifests.Add(1)
		}
		return false
	})
	rt := puller(t, nil)
	spec := schemas.DefaultSpec()
	spec.Image = host + "/web:1"
	begun, all := make(chan struct{}), sync.WaitGroup{}
	var bytes atomic.Int64
	for range 20 {
		all.Go(func() {
			<-begun
			img, err := rt.Image(t.Context(), spec, nil, func(p agent.Progress) {
				if p.Pull != nil {
					bytes.Store(max(bytes.Load(), p.Pull.Done))
				}
			})
			if err != nil || !p.is(img) {
				t.Errorf("%+v, %v", img, err)
			}
		})
	}
	close(begun)
	all.Wait()
	if layers.Load() != 1 || manifests.Load() != 1 {
		t.Errorf("the layer was fetched %d times and the manifest %d times", layers.Load(), manifests.Load())
	}
	if bytes.Load() < 4<<20 {
		t.Errorf("progress came to %d bytes", bytes.Load())
	}
}

// Credentials by name open their own registry and are sent to no other. The file is read
// again when it changes, and must be its owner's alone.
func TestNamedCredentials(t *testing.T) {
	s, open := openStore(t, true), openStore(t, false)
	p := s.push(t, "own", "1", runtime.GOARCH, 100)
	open.push(t, "web", "1", runtime.GOARCH, 100)
	image := s.host + "/own:1"
	file := filepath.Join(t.TempDir(), "credentials.yaml")
	write := func(t *testing.T, body string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	right := fmt.Sprintf("credentials:\n  team-a:\n    registry: %q\n    username: %s\n    password: %s\n", s.host, loginUser, loginPassword)
	wrong := strings.ReplaceAll(right, loginPassword, "hunter2 and more")
	write(t, right)
	rt := puller(t, func(c *docker.Config) { c.CredentialsFile = file })
	ask := func(image, name string) (agent.Image, error) {
		spec := schemas.DefaultSpec()
		spec.Image, spec.Pull, spec.Credentials = image, schemas.PullAlways, name
		img, err := rt.Image(t.Context(), spec, nil, nil)
		for _, secret := range []string{loginPassword, "hunter2"} {
			if strings.Contains(fmt.Sprint(err), secret) {
				t.Errorf("a secret is in %v", err)
			}
		}
		return img, err
	}
	if names := rt.Credentials(); !slices.Equal(names, []string{"team-a"}) {
		t.Errorf("it has %q", names)
	}
	if img, err := ask(image, "team-a"); err != nil || !p.is(img) {
		t.Errorf("%+v, %v", img, err)
	}
	_, err := ask(image, "")
	mustRefuse(t, err, schemas.ReasonImageAuth, "without a login")
	_, err = ask(open.host+"/web:1", "team-a")
	mustRefuse(t, err, schemas.ReasonImageAuth, `"team-a" are for `+s.host)
	if _, err = ask(image, "team-b"); err == nil || !strings.Contains(err.Error(), `no registry credentials "team-b"`) {
		t.Errorf("a name that is not there: %v", err)
	}

	write(t, wrong+"  team-b: {registry: r.lan, username: u, password: p}\n")
	_, err = ask(image, "team-a")
	mustRefuse(t, err, schemas.ReasonImageAuth, "password and rights")
	if names := rt.Credentials(); !slices.Equal(names, []string{"team-a", "team-b"}) {
		t.Errorf("it has %q", names)
	}
	write(t, "credentials: {team-a: hunter2 and more}") // damaged: what was known goes on
	if names := rt.Credentials(); !slices.Equal(names, []string{"team-a", "team-b"}) {
		t.Errorf("it has %q after a damaged file", names)
	}
	write(t, fmt.Sprintf(`{"auths": {"https://%s/v2/": {"username": %q, "password": %q}}}`, s.host, loginUser, loginPassword))
	if img, err := ask(image, ""); err != nil || !p.is(img) {
		t.Errorf("by the registry's host: %+v, %v", img, err)
	}
	if img, err := ask(image, s.host); err != nil || !p.is(img) {
		t.Errorf("by the registry's host as a name: %+v, %v", img, err)
	}

	for name, c := range map[string]struct {
		body string
		mode os.FileMode
	}{
		"others may read it":   {right, 0o640},
		"not YAML":             {"credentials: [", 0o600},
		"a field of no sense":  {"credentials: {a: {registry: [hunter2]}}", 0o600},
		"no registry":          {"credentials: {a: {username: u, password: hunter2}}", 0o600},
		"no password":          {"credentials: {a: {registry: r.lan, username: hunter2}}", 0o600},
		"a name with a space":  {"credentials: {a b: {registry: r.lan, username: u, password: hunter2}}", 0o600},
		"twice the same field": {"credentials: {a: {registry: r.lan, password: p, password: hunter2}}", 0o600},
		"too many": {"auths: {" + strings.Repeat("x: {},", 1) + func() (s string) {
			for i := range 99 {
				s += fmt.Sprintf("r%d: {},", i)
			}
			return
		}() + "}", 0o600},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config(t, t.TempDir(), schemas.WorkerID("w-"+randomID()))
			cfg.CredentialsFile = filepath.Join(t.TempDir(), "credentials.yaml")
			if err := os.WriteFile(cfg.CredentialsFile, []byte(c.body), c.mode); err != nil {
				t.Fatal(err)
			}
			rt, err := docker.New(cfg)
			if err == nil {
				rt.Close()
				t.Fatal("it is taken")
			}
			if !strings.Contains(err.Error(), cfg.CredentialsFile) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%v", err)
			}
		})
	}
}
