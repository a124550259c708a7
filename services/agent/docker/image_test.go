package docker_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/client"
	"github.com/rs/zerolog"

	"dayfly.dev/bus/port"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/docker"
	"dayfly.dev/services/agent/guest"
)

// The login of registries that want one, and its line for htpasswd (cost 4: a test
// should not pay for guessing).
const (
	loginUser     = "ali"
	loginPassword = "open sesame"
	loginLine     = loginUser + ":$2a$04$HdDti9Vqrmy.UdQ8o.XiF.uB6RBodBumHGiehcq4brg2lZ7EamPqa\n"
)

var login = docker.Credential{Username: loginUser, Password: loginPassword}

// store is a registry of its own process. Docker talks plain HTTP with it, as it is
// at 127.0.0.1.
type store struct {
	host   string // "127.0.0.1:41235"
	locked bool   // it wants loginUser and loginPassword
}

// openStore starts Debian's docker-registry on a port that is free. The images that
// Docker has from it are removed when the test ends.
func openStore(t testing.TB, locked bool) *store {
	t.Helper()
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		if program = "/usr/bin/docker-registry"; !exists(program) {
			t.Fatal("docker-registry is not installed: run scripts/setup")
		}
	}
	dir := t.TempDir()
	config := fmt.Sprintf("version: 0.1\nlog: {level: info, formatter: json, accesslog: {disabled: true}}\nhttp: {addr: \"127.0.0.1:0\"}\n"+
		"storage: {filesystem: {rootdirectory: %q}}\n", filepath.Join(dir, "data"))
	if locked {
		config += fmt.Sprintf("auth: {htpasswd: {realm: test, path: %q}}\n", filepath.Join(dir, "htpasswd"))
	}
	for name, body := range map[string]string{"config.yml": config, "htpasswd": loginLine} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(program, "serve", filepath.Join(dir, "config.yml"))
	cmd.Env = []string{"OTEL_TRACES_EXPORTER=none"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // also where the tests are killed
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s, drained := &store{locked: locked}, make(chan struct{})
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-drained
		_ = cmd.Wait()
	})
	lines := bufio.NewScanner(said)
	var all []string
	for s.host == "" && lines.Scan() {
		var line struct{ Msg string }
		all = append(all, lines.Text())
		_ = json.Unmarshal(lines.Bytes(), &line)
		if at, ok := strings.CutPrefix(line.Msg, "listening on "); ok {
			s.host = at
		}
	}
	go func() {
		defer close(drained)
		_, _ = io.Copy(io.Discard, said)
	}()
	if s.host == "" {
		t.Fatalf("docker-registry does not start:\n%s", strings.Join(all, "\n"))
	}
	forgetAfter(t, s.host)
	return s
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// forgetAfter removes at the test's end what Docker has from a registry.
func forgetAfter(t testing.TB, host string) {
	t.Cleanup(func() {
		for _, ref := range imagesFrom(t, host) {
			if _, err := site.docker.ImageRemove(context.Background(), ref, client.ImageRemoveOptions{}); err != nil && !cerrdefs.IsNotFound(err) {
				t.Error(err)
			}
		}
		if left := imagesFrom(t, host); len(left) > 0 {
			t.Errorf("left: %s", left)
		}
	})
}

func imagesFrom(t testing.TB, host string) (refs []string) {
	t.Helper()
	list, err := site.docker.ImageList(context.Background(), client.ImageListOptions{})
	if err != nil {
		t.Error(err)
	}
	for _, i := range list.Items {
		for _, ref := range append(i.RepoTags, i.RepoDigests...) {
			if strings.HasPrefix(ref, host+"/") && !strings.HasSuffix(ref, "<none>") {
				refs = append(refs, ref)
			}
		}
	}
	return refs
}

// door is a second address of a registry, at which answer may answer instead; where
// it says false the registry does.
func (s *store) door(t testing.TB, answer func(http.ResponseWriter, *http.Request) bool) (host string) {
	t.Helper()
	transport := &http.Transport{}
	through := &httputil.ReverseProxy{
		Transport: transport, ErrorLog: log.New(io.Discard, "", 0), // Docker may leave
		Rewrite: func(p *httputil.ProxyRequest) { p.SetURL(&url.URL{Scheme: "http", Host: s.host}) },
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !answer(w, r) {
			through.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
		transport.CloseIdleConnections()
	})
	host = server.Listener.Addr().String()
	forgetAfter(t, host)
	return host
}

// send makes one request of the registry's own API.
func (s *store) send(t testing.TB, method, at, kind string, body []byte, want int) *http.Response {
	t.Helper()
	if strings.HasPrefix(at, "/") {
		at = "http://" + s.host + at
	}
	req, err := http.NewRequestWithContext(t.Context(), method, at, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", kind)
	req.Close = true
	if s.locked {
		req.SetBasicAuth(loginUser, loginPassword)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if said, _ := io.ReadAll(resp.Body); resp.StatusCode != want {
		t.Fatalf("%s %s: %s\n%s", method, at, resp.Status, said)
	}
	return resp
}

func digestOf(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

type described struct {
	MediaType string            `json:"mediaType"`
	Size      int               `json:"size"`
	Digest    string            `json:"digest"`
	Platform  map[string]string `json:"platform,omitempty"`
}

func (s *store) blob(t testing.TB, repo, kind string, b []byte) described {
	t.Helper()
	upload := s.send(t, "POST", "/v2/"+repo+"/blobs/uploads/", "", nil, http.StatusAccepted).Header.Get("Location")
	s.send(t, "PUT", upload+"&digest="+url.QueryEscape(digestOf(b)), "application/octet-stream", b, http.StatusCreated)
	return described{MediaType: kind, Size: len(b), Digest: digestOf(b)}
}

const (
	kindManifest = "application/vnd.docker.distribution.manifest.v2+json"
	kindList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	kindConfig   = "application/vnd.docker.container.image.v1+json"
	kindLayer    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// pushed is an image that was put into a registry.
type pushed struct {
	id     string // of the image
	layer  string // digest
	digest string // of the manifest
	size   int
}

// is tells whether img is that image. An Engine with containerd's store goes by the manifest.
func (p pushed) is(img agent.Image) bool {
	return (img.ID == p.id || img.ID == p.digest) && img.Digest == p.digest
}

// push puts an image for a kind of machine there: one layer that nobody else has, of
// about that many bytes. It goes without Docker, which only pushes what it can run.
func (s *store) push(t testing.TB, repo, tag, arch string, size int) pushed {
	t.Helper()
	layer, diff := randomLayer(t, size)
	config := must(json.Marshal(map[string]any{
		"architecture": arch, "os": "linux", "config": map[string]any{"Cmd": []string{"/random"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{diff}},
	}))
	manifest := must(json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": kindManifest,
		"config": s.blob(t, repo, kindConfig, config), "layers": []described{s.blob(t, repo, kindLayer, layer)},
	}))
	s.send(t, "PUT", "/v2/"+repo+"/manifests/"+tag, kindManifest, manifest, http.StatusCreated)
	return pushed{id: digestOf(config), layer: digestOf(layer), digest: digestOf(manifest), size: len(manifest)}
}

// pushList puts one image for each kind of machine there, under one tag.
func (s *store) pushList(t testing.TB, repo, tag string, archs ...string) (digest string) {
	t.Helper()
	var all []described
	for _, arch := range archs {
		p := s.push(t, repo, "only-"+arch, arch, 100)
		all = append(all, described{kindManifest, p.size, p.digest, map[string]string{"architecture": arch, "os": "linux"}})
	}
	list := must(json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": kindList, "manifests": all}))
	s.send(t, "PUT", "/v2/"+repo+"/manifests/"+tag, kindList, list, http.StatusCreated)
	return digestOf(list)
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

// randomLayer gives a layer of random bytes, and its digest before it was packed.
func randomLayer(t testing.TB, size int) (packed []byte, diff string) {
	t.Helper()
	body := make([]byte, size)
	_, _ = rand.Read(body)
	var plain, gz bytes.Buffer
	w := tar.NewWriter(&plain)
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "random", Mode: 0o755, Size: int64(size)})
	if err == nil {
		_, err = w.Write(body)
	}
	if err == nil {
		err = w.Close()
	}
	z := gzip.NewWriter(&gz)
	if err == nil {
		_, err = z.Write(plain.Bytes())
	}
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return gz.Bytes(), digestOf(plain.Bytes())
}

// otherArch is a kind of machine that this one cannot run.
func otherArch() string {
	if runtime.GOARCH == "amd64" {
		return "arm64"
	}
	return "amd64"
}

// puller opens a runtime that knows these logins.
func puller(t testing.TB, change func(*docker.Config)) *docker.Runtime {
	t.Helper()
	cfg := config(t, t.TempDir(), schemas.WorkerID("w-"+randomID()))
	if change != nil {
		change(&cfg)
	}
	rt, err := docker.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rt.Close() })
	return rt
}

// heard collects what progress was told.
type heard struct {
	mu   sync.Mutex
	said []string // guarded
}

func (h *heard) tell(p agent.Progress) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.said = append(h.said, p.Sentence)
}

func (h *heard) all() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.said)
}

func obtain(t testing.TB, rt agent.Runtime, image string, policy schemas.ImagePolicy) (agent.Image, []string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	spec, h := schemas.DefaultSpec(), &heard{}
	spec.Image, spec.Pull = image, policy
	img, err := rt.Image(ctx, spec, nil, h.tell)
	return img, h.all(), err
}

// mustRefuse wants a StartError for a reason, with these words in its message.
func mustRefuse(t testing.TB, err error, reason schemas.Reason, words ...string) {
	t.Helper()
	fault, ok := errors.AsType[*agent.StartError](err)
	if !ok || fault.Reason != reason {
		t.Fatalf("%v, want %s", err, reason)
	}
	for _, w := range words {
		if !strings.Contains(fault.Message, w) {
			t.Errorf("%q does not say %q", fault.Message, w)
		}
	}
	t.Log(fault.Message)
}

// What is missing is pulled and told of; what is present is used without a word to
// the registry, unless the task wants the newest.
func TestPullPolicies(t *testing.T) {
	s := openStore(t, false)
	var asked atomic.Int32
	host := s.door(t, func(http.ResponseWriter, *http.Request) bool { asked.Add(1); return false })
	rt, image := puller(t, nil), host+"/web:1"

	_, said, err := obtain(t, rt, image, schemas.PullNever)
	mustRefuse(t, err, schemas.ReasonImage, image, `set pull to "missing"`)
	if asked.Load() > 0 || len(said) > 0 {
		t.Errorf("never asked %d times and said %q", asked.Load(), said)
	}

	first := s.push(t, "web", "1", runtime.GOARCH, 3<<20)
	img, said, err := obtain(t, rt, image, schemas.PullMissing)
	if err != nil || !first.is(img) || img.Ref != image || img.Bytes < 3<<20 {
		t.Fatalf("%+v, %v", img, err)
	}
	if len(said) == 0 || said[0] != "pulling "+image {
		t.Errorf("%q", said)
	}
	for _, sentence := range said[1:] {
		var now, all float64
		rest, _ := strings.CutPrefix(sentence, "pulling "+image+": ")
		if _, err := fmt.Sscanf(rest, "%f of %f MiB", &now, &all); (err != nil || all != 3 || now > all) && rest != "unpacking" {
			t.Errorf("%q", sentence)
		}
	}

	second := s.push(t, "web", "1", runtime.GOARCH, 100)
	before := asked.Load()
	for _, policy := range []schemas.ImagePolicy{schemas.PullMissing, schemas.PullNever, ""} {
		if img, said, err = obtain(t, rt, image, policy); err != nil || !first.is(img) || len(said) > 0 {
			t.Errorf("%q: %+v, %v, %q", policy, img, err, said)
		}
	}
	if n := asked.Load() - before; n > 0 {
		t.Errorf("the registry was asked %d times for what is here", n)
	}
	if img, said, err = obtain(t, rt, image, schemas.PullAlways); err != nil || !second.is(img) || len(said) == 0 {
		t.Errorf("always: %+v, %v, %q", img, err, said)
	}
}

// A task whose image comes from a registry, from the pull to its output.
func TestPullAndRun(t *testing.T) {
	s := openStore(t, true)
	image := s.host + "/team/guest:1"
	if _, err := guest.ImportImage(t.Context(), site.docker, archiveWith(t, "data/mark", "from the registry\n"), image); err != nil {
		t.Fatal(err)
	}
	auth, err := authconfig.Encode(registry.AuthConfig{Username: loginUser, Password: loginPassword})
	if err != nil {
		t.Fatal(err)
	}
	pushing, err := site.docker.ImagePush(t.Context(), image, client.ImagePushOptions{RegistryAuth: auth})
	if err != nil {
		t.Fatal(err)
	}
	if err := pushing.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := site.docker.ImageRemove(t.Context(), image, client.ImageRemoveOptions{}); err != nil {
		t.Fatal(err)
	}

	rt := puller(t, func(c *docker.Config) { c.Worker, c.Credentials = "w-run", map[string]docker.Credential{s.host: login} })
	if err := rt.Permit(rt.Now() + time.Minute); err != nil {
		t.Fatal(err)
	}
	req := request(t, rt, "w-run", "cat", "/data/mark")
	req.Spec.Image = image
	if req.Image, _, err = obtain(t, rt, image, schemas.PullMissing); err != nil {
		t.Fatal(err)
	}
	a := start(t, rt, req)
	if o := wait(t, a); o.By != schemas.EndedItself || o.Exit.Code != 0 {
		t.Fatalf("%+v %+v: %s", o, o.Exit, output(t, a, schemas.Stderr))
	}
	if got := output(t, a, schemas.Stdout); got != "from the registry\n" {
		t.Errorf("%q", got)
	}
	if err := a.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// archiveWith gives the guest's files and one more.
func archiveWith(t testing.TB, name, body string) []byte {
	t.Helper()
	var out bytes.Buffer
	w, r := tar.NewWriter(&out), tar.NewReader(bytes.NewReader(site.archive))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err == nil {
			err = w.WriteHeader(h)
		}
		if err == nil {
			_, err = io.Copy(w, r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body))})
	if err == nil {
		_, err = w.Write([]byte(body))
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// A registry with a login gives its images to who knows it, and nobody learns it
// from what we say when it does not.
func TestPullLogin(t *testing.T) {
	s := openStore(t, true)
	p := s.push(t, "own", "1", runtime.GOARCH, 100)
	image, wrong := s.host+"/own:1", "hunter2 and more"
	secrets := []string{loginPassword, wrong, base64.StdEncoding.EncodeToString([]byte(loginUser + ":" + loginPassword)), base64.StdEncoding.EncodeToString([]byte(loginUser + ":" + wrong))}
	known := func(user, password string) func(*docker.Config, string) {
		return func(c *docker.Config, _ string) {
			c.Credentials = map[string]docker.Credential{s.host: {Username: user, Password: password}}
		}
	}
	written := func(format string, args ...any) func(*docker.Config, string) {
		return func(c *docker.Config, dir string) {
			c.AuthFile = filepath.Join(dir, "config.json")
			if err := os.WriteFile(c.AuthFile, fmt.Appendf(nil, format, args...), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	basic := base64.StdEncoding.EncodeToString([]byte(loginUser + ":" + loginPassword))
	const entry = `{"auths": {"other.test": {"auth": "eDp5"}, %q: {"auth": %q}}}`
	for name, tt := range map[string]struct {
		config func(*docker.Config, string)
		reason schemas.Reason // "" is none
		says   []string
	}{
		"no login":                     {nil, schemas.ReasonImageAuth, []string{image, "give the worker a login for " + s.host}},
		"a login for another registry": {written(entry, "elsewhere.test", basic), schemas.ReasonImageAuth, []string{"give the worker a login for " + s.host}},
		"a credential helper's entry":  {written(`{"auths": {%q: {}}, "credsStore": "pass"}`, s.host), schemas.ReasonImageAuth, []string{"give the worker a login for " + s.host}},
		"a wrong password":             {known(loginUser, wrong), schemas.ReasonImageAuth, []string{image, "registry " + s.host, "password and rights"}},
		"an unknown user":              {known("eve", wrong), schemas.ReasonImageAuth, []string{image, "registry " + s.host, "password and rights"}},
		"the right one":                {known(loginUser, loginPassword), "", nil},
		"from a file":                  {written(entry, s.host, basic), "", nil},
		"from a file, with a scheme":   {written(entry, "https://"+s.host, basic), "", nil},
		"from a file, with a path":     {written(entry, "http://"+s.host+"/v2/", basic), "", nil},
		"from a file, in two fields":   {written(`{"auths": {%q: {"username": %q, "password": %q}}}`, s.host, loginUser, loginPassword), "", nil},
		"the config's goes first": {func(c *docker.Config, dir string) {
			written(entry, s.host, "eDp5")(c, dir)
			known(loginUser, loginPassword)(c, dir)
		}, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			var logged bytes.Buffer
			rt := puller(t, func(c *docker.Config) {
				c.Logger = zerolog.New(zerolog.SyncWriter(&logged))
				if tt.config != nil {
					tt.config(c, t.TempDir())
				}
			})
			img, said, err := obtain(t, rt, image, schemas.PullAlways)
			if tt.reason != "" {
				mustRefuse(t, err, tt.reason, tt.says...)
			} else if err != nil || !p.is(img) {
				t.Errorf("%+v, %v", img, err)
			}
			rt.Close()
			for _, secret := range secrets {
				if all := fmt.Sprint(err, said, logged.String()); strings.Contains(all, secret) {
					t.Errorf("%q is in %s", secret, all)
				}
			}
		})
	}

	// A file that cannot be used is this worker's fault: another may have a better one.
	for name, config := range map[string]func(*docker.Config, string){
		"no such file":       func(c *docker.Config, dir string) { c.AuthFile = filepath.Join(dir, "none") },
		"not JSON":           written(`{"auths": {%q: {"password": %q`, s.host, loginPassword),
		"not base64":         written(entry, s.host, loginPassword),
		"base64 of one word": written(entry, s.host, base64.StdEncoding.EncodeToString([]byte("sesame"))),
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := obtain(t, puller(t, func(c *docker.Config) { config(c, t.TempDir()) }), image, schemas.PullAlways)
			if _, fault := errors.AsType[*agent.StartError](err); fault || err == nil || !strings.Contains(err.Error(), "registry credentials") {
				t.Errorf("%v", err)
			}
			if strings.Contains(fmt.Sprint(err), "sesame") {
				t.Errorf("a secret is in %v", err)
			}
		})
	}
}

func of(r *http.Request, kind string) bool { return strings.Contains(r.URL.Path, "/"+kind+"/") }

// Whatever a registry does, the task ends with the right reason and with a sentence
// that names the image, the registry and the next step.
func TestPullRefused(t *testing.T) {
	s := openStore(t, false)
	p := s.push(t, "web", "1", runtime.GOARCH, 1000)
	s.push(t, "foreign", "1", otherArch(), 100)
	s.pushList(t, "foreign", "list", otherArch())
	kept, err := port.Keep("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	down := kept.String()
	absent := "sha256:" + strings.Repeat("0", 64)
	always := func(code int, body string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			w.WriteHeader(code)
			fmt.Fprint(w, body)
			return true
		}
	}
	layer := func(answer http.HandlerFunc) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			mine := strings.HasSuffix(r.URL.Path, p.layer)
			if mine {
				answer(w, r)
			}
			return mine
		}
	}
	for name, tt := range map[string]struct {
		host   string // "" is the store, or its door if there is an answer
		image  string
		answer func(http.ResponseWriter, *http.Request) bool
		reason schemas.Reason
		says   []string
	}{
		"no such tag":        {"", "web:2", nil, schemas.ReasonImage, []string{"has no image", "check its name and tag"}},
		"no such repository": {"", "wob:1", nil, schemas.ReasonImage, []string{"has no image", "check its name and tag"}},
		"no such digest":     {"", "web@" + absent, nil, schemas.ReasonImage, []string{"has no image"}},
		"a name made of the words for other faults": {"", "denied/unauthorized/access-denied:no-space-left", nil, schemas.ReasonImage, []string{"has no image"}},
		"the same of a registry that is down":       {down, "denied/unauthorized/not-found:manifest-unknown", nil, schemas.ReasonImagePull, []string{"cannot be reached"}},
		"it is down":                                {down, "web:1", nil, schemas.ReasonImagePull, []string{"cannot be reached", "check its name, and that it runs", "connection refused"}},
		"another machine's image":                   {"", "foreign:1", nil, schemas.ReasonImageArch, []string{"linux/" + otherArch(), "linux/" + runtime.GOARCH, "build the image"}},
		"no image for this machine":                 {"", "foreign:list", nil, schemas.ReasonImageArch, []string{"linux/" + runtime.GOARCH, "build the image"}},
		"it answers 500":                            {"", "web:1", always(500, ""), schemas.ReasonImagePull, []string{"500", "try again later"}},
		"it answers 500 to the manifest":            {"", "web:1", func(w http.ResponseWriter, r *http.Request) bool { return of(r, "manifests") && always(500, "")(w, r) }, schemas.ReasonImagePull, []string{"500", "try again later"}},
		"it has enough of us":                       {"", "web:1", always(429, `{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}]}`), schemas.ReasonImagePull, []string{"slow down", "try again later"}},
		"it is no registry":                         {"", "web:1", always(200, "<html>hello"), schemas.ReasonImagePull, []string{"did not give", "try again later"}},
		"it forbids":                                {"", "web:1", always(403, `{"errors": [{"code": "DENIED", "message": "requested access to the resource is denied"}]}`), schemas.ReasonImageAuth, []string{"without a login"}},
		"its layer is lost":                         {"", "web:1", layer(http.NotFound), schemas.ReasonImagePull, []string{"did not give"}},
		"its layer is another": {"", "web:1", layer(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "rubbish") }), schemas.ReasonImagePull,
			[]string{"did not give", "verification failed"}},
	} {
		t.Run(name, func(t *testing.T) {
			host := tt.host
			if host == "" {
				host = s.host
			}
			if tt.answer != nil {
				host = s.door(t, tt.answer)
			}
			_, _, err := obtain(t, puller(t, nil), host+"/"+tt.image, schemas.PullMissing)
			mustRefuse(t, err, tt.reason, append(tt.says, host+"/"+tt.image)...)
		})
	}
}

// A registry that repeats what it was sent does not make us repeat it.
func TestPullRepeatsNoSecret(t *testing.T) {
	s := openStore(t, false)
	host := s.door(t, func(w http.ResponseWriter, r *http.Request) bool {
		user, password, ok := r.BasicAuth()
		if !ok {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if r.URL.Path == "/v2/" {
			return false
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusTooManyRequests)
		fmt.Fprintf(w, `{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down, %s with %s, %s"}]}`, user, password, r.Header.Get("Authorization"))
		return true
	})
	rt := puller(t, func(c *docker.Config) { c.Credentials = map[string]docker.Credential{host: login} })
	_, _, err := obtain(t, rt, host+"/web:1", schemas.PullMissing)
	mustRefuse(t, err, schemas.ReasonImagePull, "slow down, "+loginUser+" with …, Basic …")
}

// The image that was for another machine is asked for again: its tag may have been
// built anew, as the first error said.
func TestPullAfterWrongArch(t *testing.T) {
	s, rt := openStore(t, false), puller(t, nil)
	image := s.host + "/web:1"
	s.push(t, "web", "1", otherArch(), 100)
	for _, policy := range []schemas.ImagePolicy{schemas.PullMissing, schemas.PullMissing, schemas.PullNever} {
		_, _, err := obtain(t, rt, image, policy)
		mustRefuse(t, err, schemas.ReasonImageArch)
	}
	s.pushList(t, "web", "1", otherArch(), runtime.GOARCH)
	if _, _, err := obtain(t, rt, image, schemas.PullMissing); err != nil {
		t.Error(err)
	}
}

func TestPullByDigest(t *testing.T) {
	s, rt := openStore(t, false), puller(t, nil)
	first := s.push(t, "web", "1", runtime.GOARCH, 100)
	second := s.push(t, "web", "1", runtime.GOARCH, 100)
	for ref, want := range map[string]pushed{"web@": first, "web:1@": first, "web:nowhere@": second} {
		image := s.host + "/" + ref + want.digest
		for range 2 {
			if img, _, err := obtain(t, rt, image, schemas.PullMissing); err != nil || !want.is(img) || img.Ref != image {
				t.Errorf("%s: %+v, %v", ref, img, err)
			}
		}
		if _, said, _ := obtain(t, rt, image, schemas.PullMissing); len(said) > 0 {
			t.Errorf("%s is pulled again: %q", ref, said)
		}
	}
}

// One image may be in several repositories; its digest is that of the one asked for.
func TestDigestOfRepository(t *testing.T) {
	s, rt := openStore(t, false), puller(t, nil)
	p := s.push(t, "web", "1", runtime.GOARCH, 100)
	manifest := s.fetch(t, "/v2/web/manifests/1", kindManifest)
	want := map[string]string{"web": p.digest}
	for _, repo := range []string{"we", "webs", "a/web"} { // the same image with another manifest
		manifest = append(manifest, '\n')
		for _, blob := range []string{p.id, p.layer} {
			s.blob(t, repo, "", s.fetch(t, "/v2/web/blobs/"+blob, ""))
		}
		s.send(t, "PUT", "/v2/"+repo+"/manifests/1", kindManifest, manifest, http.StatusCreated)
		want[repo] = digestOf(manifest)
	}
	for range 2 {
		for repo, digest := range want {
			if img, _, err := obtain(t, rt, s.host+"/"+repo+":1", schemas.PullMissing); err != nil || img.Digest != digest {
				t.Errorf("%s: %+v, %v; want %s", repo, img, err, digest)
			}
		}
	}
}

func (s *store) fetch(t testing.TB, path, accept string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+s.host+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", accept)
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	return must(io.ReadAll(resp.Body))
}

func TestPullCorruptName(t *testing.T) {
	rt, id := puller(t, nil), strings.Repeat("ab", 32)
	for image, says := range map[string]string{
		"":                              "such as",
		"Busybox":                       "such as",
		"busybox:":                      "such as",
		"bus ybox":                      "such as",
		"busybox@sha256:ab":             "such as",
		"../../etc/passwd":              "such as",
		"https://x.test/y:1":            "such as",
		"busybox\x00:1":                 "such as",
		"busybox\n":                     "such as",
		strings.Repeat("a/", 200) + "x": "such as",
		id:                              "is the id of an image",
		"sha256:" + id:                  "is the id of an image",
	} {
		for _, policy := range []schemas.ImagePolicy{schemas.PullMissing, schemas.PullAlways, schemas.PullNever} {
			_, said, err := obtain(t, rt, image, policy)
			mustRefuse(t, err, schemas.ReasonImage, says, fmt.Sprintf("%q", image))
			if len(said) > 0 {
				t.Errorf("%q: %q", image, said)
			}
		}
	}
}

// held is a door that keeps the answer with a layer back until it is told to go on.
func (s *store) held(t *testing.T, layer string) (host string, asked <-chan struct{}, manifests *atomic.Int32, goOn func()) {
	t.Helper()
	began, gate := make(chan struct{}, 100), make(chan struct{})
	manifests, goOn = &atomic.Int32{}, sync.OnceFunc(func() { close(gate) })
	host = s.door(t, func(w http.ResponseWriter, r *http.Request) bool {
		if of(r, "manifests") && r.Method == http.MethodHead {
			manifests.Add(1)
		}
		if strings.HasSuffix(r.URL.Path, layer) {
			began <- struct{}{}
			select {
			case <-gate:
			case <-r.Context().Done():
			}
		}
		return false
	})
	t.Cleanup(goOn) // before the door is closed
	return host, began, manifests, goOn
}

// Two tasks that wait for one image share its pull. One that leaves is let go at once
// and takes nothing from the other; nor does one that is slow to hear.
func TestPullShared(t *testing.T) {
	s, rt := openStore(t, false), puller(t, nil)
	p := s.push(t, "web", "1", runtime.GOARCH, 1000)
	host, asked, pulls, goOn := s.held(t, p.layer)
	spec := schemas.DefaultSpec()
	spec.Image = host + "/web:1"

	type answer struct {
		img agent.Image
		err error
	}
	join := func(ctx context.Context, progress func(string)) <-chan answer {
		c := make(chan answer, 1)
		joined, once := make(chan struct{}), sync.Once{}
		go func() {
			img, err := rt.Image(ctx, spec, nil, func(p agent.Progress) {
				once.Do(func() { close(joined) })
				progress(p.Sentence)
			})
			c <- answer{img, err}
		}()
		<-joined
		return c
	}
	ignore := func(string) {}
	hears := make(chan struct{})
	deaf := join(t.Context(), func(string) { <-hears })
	gone := errors.New("gone")
	ctx, leave := context.WithCancelCause(t.Context())
	leaves, stays := join(ctx, ignore), join(t.Context(), ignore)
	<-asked
	leave(gone)
	if a := <-leaves; !errors.Is(a.err, gone) {
		t.Errorf("%v", a.err)
	}
	late := join(t.Context(), ignore)
	goOn()
	for _, c := range []<-chan answer{stays, late} {
		if a := <-c; a.err != nil || !p.is(a.img) {
			t.Errorf("%+v", a)
		}
	}
	close(hears)
	if a := <-deaf; a.err != nil || !p.is(a.img) {
		t.Errorf("%+v", a)
	}
	if n := pulls.Load(); n != 1 {
		t.Errorf("%d pulls", n)
	}
}

// When the last has left the pull is broken off, and who comes then begins anew. The
// cause of the leaving comes back as it is: it says how the task ends.
func TestPullLeft(t *testing.T) {
	s, rt := openStore(t, false), puller(t, nil)
	p := s.push(t, "web", "1", runtime.GOARCH, 1000)
	host, asked, pulls, goOn := s.held(t, p.layer)
	spec := schemas.DefaultSpec()
	spec.Image = host + "/web:1"
	ctx, leave := context.WithCancelCause(t.Context())
	go func() {
		<-asked
		leave(&agent.StartError{Reason: schemas.ReasonPullTimeout, Message: "too slow"})
	}()
	_, err := rt.Image(ctx, spec, nil, nil)
	if fault, ok := errors.AsType[*agent.StartError](err); !ok || fault.Reason != schemas.ReasonPullTimeout {
		t.Errorf("%v", err)
	}
	goOn()
	if img, _, err := obtain(t, rt, spec.Image, schemas.PullMissing); err != nil || !p.is(img) || pulls.Load() != 2 {
		t.Errorf("%+v, %v, %d pulls", img, err, pulls.Load())
	}
}

// A runtime that is closed leaves no pull behind, and says that it was not the image.
func TestPullClosed(t *testing.T) {
	s, rt := openStore(t, false), puller(t, nil)
	p := s.push(t, "web", "1", runtime.GOARCH, 1000)
	host, asked, _, _ := s.held(t, p.layer)
	spec := schemas.DefaultSpec()
	spec.Image = host + "/web:1"
	c := make(chan error, 1)
	go func() {
		_, err := rt.Image(t.Context(), spec, nil, nil)
		c <- err
	}()
	<-asked
	rt.Close()
	err := <-c
	if _, fault := errors.AsType[*agent.StartError](err); fault || err == nil {
		t.Errorf("%v", err)
	}
	if _, _, err := obtain(t, rt, spec.Image, schemas.PullAlways); err == nil {
		t.Error("a closed runtime pulls")
	}
}

// A registry that breaks off in the middle of a layer is asked again, by Docker. Where
// that goes on the task hears of it, and may leave.
func TestPullBrokenOff(t *testing.T) {
	s, rt := openStore(t, false), puller(t, nil)
	p := s.push(t, "web", "1", runtime.GOARCH, 1<<20)
	var breaks atomic.Int32
	host := s.door(t, func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, p.layer) || breaks.Add(-1) < 0 {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(1<<20))
		_, _ = w.Write(make([]byte, 1000))
		panic(http.ErrAbortHandler)
	})
	spec := schemas.DefaultSpec()
	spec.Image = host + "/web:1"
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	breaks.Store(1000)
	_, err := rt.Image(ctx, spec, nil, func(p agent.Progress) {
		if p.Sentence == "pulling "+spec.Image+": the registry broke off, trying again" {
			leave()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("%v", err)
	}
	breaks.Store(0)
	if img, _, err := obtain(t, rt, spec.Image, schemas.PullMissing); err != nil || !p.is(img) {
		t.Fatalf("%+v, %v", img, err)
	}
}

// engine is a runtime on the real Docker, but for its pulls.
func engine(t *testing.T, pull http.HandlerFunc) *docker.Runtime {
	t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return site.docker.Dialer()(ctx) }}
	through := &httputil.ReverseProxy{Transport: transport, Rewrite: func(p *httputil.ProxyRequest) { p.SetURL(&url.URL{Scheme: "http", Host: "docker"}) }}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/images/create") {
			pull(w, r)
		} else {
			through.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(func() { // after the runtime is closed
		server.Close()
		transport.CloseIdleConnections()
	})
	return puller(t, func(c *docker.Config) { c.Host = "tcp://" + server.Listener.Addr().String() })
}

// A Docker that is killed while it pulls is not the image's fault.
func TestDockerDiesInPull(t *testing.T) {
	for name, answer := range map[string]string{
		"before a word": "",
		"in a word":     `{"status": "Pulling from web", "id": "1"}` + "\n" + `{"stat`,
		"between words": `{"status": "Pulling from web", "id": "1"}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			rt := engine(t, func(w http.ResponseWriter, _ *http.Request) {
				if answer != "" {
					fmt.Fprint(w, answer)
					_ = http.NewResponseController(w).Flush()
				}
				panic(http.ErrAbortHandler)
			})
			_, _, err := obtain(t, rt, "nowhere.test/web:1", schemas.PullMissing)
			if _, fault := errors.AsType[*agent.StartError](err); fault || err == nil {
				t.Errorf("%v", err)
			}
		})
	}
}

// Engines have no codes for what went wrong, only words, and each version its own. An
// error may come as the answer or later, within it.
func TestPullWords(t *testing.T) {
	const image = "nowhere.test/web:1"
	for text, tt := range map[string]struct {
		reason schemas.Reason // "" is the worker's fault
		says   string
	}{
		`manifest for nowhere.test/web:1 not found: manifest unknown: manifest unknown`:                                                                                          {schemas.ReasonImage, "check its name and tag"},
		`failed to resolve reference "nowhere.test/web:1": nowhere.test/web:1: not found`:                                                                                        {schemas.ReasonImage, "check its name and tag"},
		`pull access denied for nowhere.test/web, repository does not exist or may require 'docker login': denied: requested access to the resource is denied`:                   {schemas.ReasonImage, "without a login"},
		`failed to resolve reference "nowhere.test/web:1": pull access denied, repository does not exist or may require authorization: insufficient_scope: authorization failed`: {schemas.ReasonImage, "without a login"},
		`Head "https://nowhere.test/v2/web/manifests/1": no basic auth credentials`:                                                                                              {schemas.ReasonImageAuth, "without a login"},
		`Get "https://nowhere.test/v2/": unauthorized: incorrect username or password`:                                                                                           {schemas.ReasonImageAuth, "without a login"},
		`failed to authorize: failed to fetch anonymous token: unexpected status from GET request to https://nowhere.test/token: 401 Unauthorized`:                               {schemas.ReasonImageAuth, "without a login"},
		`unexpected status from HEAD request to https://nowhere.test/v2/web/manifests/1: 403 Forbidden`:                                                                          {schemas.ReasonImageAuth, "without a login"},
		`no matching manifest for linux/amd64 in the manifest list entries: no match for platform in manifest: not found`:                                                        {schemas.ReasonImageArch, "build the image"},
		`image with reference nowhere.test/web:1 was found but does not match the specified platform: wanted linux/amd64, actual: linux/arm64`:                                   {schemas.ReasonImageArch, "build the image"},
		`failed to do request: Head "https://nowhere.test/v2/web/manifests/1": dial tcp: lookup nowhere.test on 127.0.0.53:53: no such host`:                                     {schemas.ReasonImagePull, "cannot be reached"},
		`Get "https://nowhere.test/v2/": net/http: request canceled while waiting for connection (Client.Timeout exceeded while awaiting headers)`:                               {schemas.ReasonImagePull, "cannot be reached"},
		`Get "https://nowhere.test/v2/": http: server gave HTTP response to HTTPS client`:                                                                                        {schemas.ReasonImagePull, "insecure-registries"},
		`Get "https://nowhere.test/v2/": x509: certificate signed by unknown authority`:                                                                                          {schemas.ReasonImagePull, "x509"},
		`toomanyrequests: You have reached your unauthenticated pull rate limit. https://www.docker.com/increase-rate-limit`:                                                     {schemas.ReasonImagePull, "try again later"},
		`error pulling image configuration: download failed after attempts=6: EOF`:                                                                                               {schemas.ReasonImagePull, "try again later"},
		`unexpected EOF`: {schemas.ReasonImagePull, "try again later"},
		`failed to register layer: write /usr/lib/big: no space left on device`: {"", "no space left"},
		`open /var/lib/docker/tmp/GetImageBlob123: read-only file system`:       {"", "read-only file system"},
		`Get "https://nowhere.test/v2/web/manifests/1": context canceled`:       {"", "context canceled"},
	} {
		for _, later := range []bool{false, true} {
			rt := engine(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				if later {
					_ = json.NewEncoder(w).Encode(map[string]any{"error": text, "errorDetail": map[string]string{"message": text}})
				} else {
					w.WriteHeader(http.StatusInternalServerError)
					_ = json.NewEncoder(w).Encode(map[string]string{"message": text})
				}
			})
			_, _, err := obtain(t, rt, image, schemas.PullMissing)
			if tt.reason != "" {
				mustRefuse(t, err, tt.reason, tt.says, image)
			} else if _, fault := errors.AsType[*agent.StartError](err); fault || err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%s: %v", text, err)
			}
			rt.Close()
		}
	}
}
