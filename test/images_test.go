package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/moby/moby/client"

	"dayfly.dev/bus/port"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

const registryLine = "ali:$2a$04$HdDti9Vqrmy.UdQ8o.XiF.uB6RBodBumHGiehcq4brg2lZ7EamPqa\n" // "open sesame"

// aRegistry is Debian's docker-registry with its data in a folder, which wants a login.
type aRegistry struct {
	t      *testing.T
	addr   string
	config string
	cmd    *exec.Cmd
}

func registry(t *testing.T) *aRegistry {
	t.Helper()
	kept, err := port.Keep("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(kept.Close)
	dir := t.TempDir()
	r := &aRegistry{t: t, addr: kept.String(), config: filepath.Join(dir, "config.yml")}
	config := fmt.Sprintf("version: 0.1\nhttp: {addr: %q}\nstorage: {filesystem: {rootdirectory: %q}, delete: {enabled: true}}\nauth: {htpasswd: {realm: test, path: %q}}\n",
		r.addr, filepath.Join(dir, "data"), filepath.Join(dir, "htpasswd"))
	for name, body := range map[string]string{r.config: config, filepath.Join(dir, "htpasswd"): registryLine} {
		if err := os.WriteFile(name, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.start()
	t.Cleanup(r.kill)
	return r
}

// start starts it and waits until it answers.
func (r *aRegistry) start() {
	r.t.Helper()
	r.cmd = exec.Command("docker-registry", "serve", r.config)
	r.cmd.Env = []string{"OTEL_TRACES_EXPORTER=none"}
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	err := harness.Poll(r.t.Context(), func() error {
		resp, err := http.Get("http://" + r.addr + "/v2/")
		if err == nil {
			resp.Body.Close()
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// kill is kill -9.
func (r *aRegistry) kill() {
	_ = r.cmd.Process.Kill()
	_ = r.cmd.Wait()
}

// forgetImages takes away all images of a registry.
func forgetImages(ctx context.Context, t *testing.T, engine *client.Client, host string) {
	list, err := engine.ImageList(ctx, client.ImageListOptions{})
	if err != nil {
		t.Error(err)
	}
	for _, i := range list.Items {
		if names := strings.Join(append(i.RepoTags, i.RepoDigests...), " "); strings.Contains(names, host) {
			if _, err := engine.ImageRemove(ctx, i.ID, client.ImageRemoveOptions{Force: true}); err != nil {
				t.Error(err)
			}
		}
	}
}

// pusher gives what pushes an image to a registry, with the right login.
func pusher(t *testing.T, host string) func(image string) {
	dir := t.TempDir()
	auths, err := json.Marshal(map[string]any{"auths": map[string]any{host: map[string]string{"auth": "YWxpOm9wZW4gc2VzYW1l"}}})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "config.json"), auths, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func(image string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "docker", "--config", dir, "push", image).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
}

// Workers pull what is wanted before a task asks for it, with a login that they know by its
// name. A task runs the same image in all its attempts, though the tag has moved.
func TestImagesOfARegistry(t *testing.T) {
	host := registry(t).addr
	image := host + "/guest:1"
	engine, err := client.New(client.FromEnv)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = engine.Close() })
	t.Cleanup(func() { forgetImages(context.Background(), t, engine, host) })
	pushed := pusher(t, host)
	push := func() {
		t.Helper()
		if err := harness.MakeImage(t.Context(), image); err != nil {
			t.Fatal(err)
		}
		pushed(image)
	}
	push()
	forgetImages(t.Context(), t, engine, host)

	credentials := filepath.Join(t.TempDir(), "credentials.yaml")
	if err := os.WriteFile(credentials, fmt.Appendf(nil, "credentials:\n  team-a: {registry: %q, username: ali, password: open sesame}\n  team-b: {registry: %q, username: ali, password: wrong}\n", host, host), 0o600); err != nil {
		t.Fatal(err)
	}
	up := newUp(t, "--registry-credentials", credentials, "--scale", "0.2", "--worker", "one")
	up.Env = []string{"DOCKER_CONFIG=" + t.TempDir()}
	s := newSite(t, image, up)

	refused := s.post(map[string]any{"registry_credentials": "team-b"}, "exit", "0")
	if task := s.ends(refused.ID, schemas.Failed, schemas.ReasonImageAuth); strings.Contains(fmt.Sprintf("%+v", task), "wrong") {
		t.Errorf("the password is in %+v", task)
	}
	unknown := s.post(map[string]any{"registry_credentials": "team-z"}, "exit", "0")
	task := s.until(unknown.ID, func(t schemas.Task) bool { return t.Why != nil && len(t.Why.Workers) == 1 })
	if why := task.Why.Workers[0]; why.Filter != "credentials" {
		t.Errorf("it waits for %+v", why)
	}
	if err := s.Call(s.ctx, "DELETE", "/v1/tasks/"+string(unknown.ID), nil, nil); err != nil {
		t.Fatal(err)
	}

	out, err := exec.CommandContext(s.ctx, up.Bin, "--url", up.URL, "images", "pull", image, "--registry-credentials", "team-a", "--wait").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "present") {
		t.Fatalf("%v: %s", err, out)
	}
	var listed schemas.ImageList
	if err := s.Call(s.ctx, "GET", "/v1/images?worker=one", nil, &listed); err != nil || !strings.Contains(strings.Join(listed.Workers[0].Names, " "), image) {
		t.Errorf("%+v, %v", listed, err)
	}

	first := s.post(map[string]any{"on_lost": "requeue", "pull": "always", "registry_credentials": "team-a"}, "sleep", "5m")
	task = s.until(first.ID, func(t schemas.Task) bool { return t.State == schemas.Running })
	digest, id := task.ImageDigest, task.ImageID
	if !strings.HasPrefix(digest, "sha256:") || !strings.HasPrefix(id, "sha256:") {
		t.Fatalf("its image is %q, %q", id, digest)
	}
	push() // the tag moves
	containers, err := s.Containers(s.ctx)
	if err != nil || len(containers) != 1 {
		t.Fatal(containers, err)
	}
	if _, err := engine.ContainerRemove(s.ctx, containers[0], client.ContainerRemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	task = s.until(first.ID, func(t schemas.Task) bool { return t.State == schemas.Running && t.Attempt == 2 })
	if task.ImageDigest != digest || task.ImageID != id {
		t.Errorf("the second attempt is of %s, the first was of %s", task.ImageDigest, digest)
	}
	err = harness.Poll(s.ctx, func() error {
		ids, err := s.Containers(s.ctx)
		if err != nil || len(ids) != 1 {
			return errors.Join(err, fmt.Errorf("%d containers", len(ids)))
		}
		c, err := engine.ContainerInspect(s.ctx, ids[0], client.ContainerInspectOptions{})
		if err == nil && c.Container.Image != id {
			err = harness.Fatal(fmt.Errorf("the container is of %s, not of %s", c.Container.Image, id))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	second := s.post(map[string]any{"pull": "always", "registry_credentials": "team-a"}, "exit", "0")
	if task := s.ends(second.ID, schemas.Completed, schemas.ReasonExit); task.ImageDigest == digest || task.ImageDigest == "" {
		t.Errorf("a new task has the image %q of before", task.ImageDigest)
	}
	if err := s.Call(s.ctx, "DELETE", "/v1/images?image="+url.QueryEscape(image), nil, nil); err != nil {
		t.Error(err)
	}
	if err := s.Call(s.ctx, "DELETE", "/v1/tasks/"+string(first.ID)+"?grace=0s", nil, nil); err != nil {
		t.Error(err)
	}
	s.ends(first.ID, schemas.Canceled, schemas.ReasonCanceled)
}

// A registry that is killed while two workers pull from it: those tasks wait and run once it is
// back, others that need it fail with the reason, and all the rest goes on.
func TestRegistryDiesAmidAPull(t *testing.T) {
	r := registry(t)
	slow := newValve(t, r.addr)
	image := slow.addr + "/large:1"
	engine, err := client.New(client.FromEnv)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = engine.Close() })
	t.Cleanup(func() { forgetImages(context.Background(), t, engine, slow.addr) })
	local := testImage(t)
	filling := make([]byte, 24<<20) // that cannot be made smaller
	_, _ = rand.NewChaCha8([32]byte{1}).Read(filling)
	dir := t.TempDir()
	for name, body := range map[string][]byte{"filling": filling, "Dockerfile": []byte("FROM " + local + "\nCOPY filling /filling\n")} {
		if err := os.WriteFile(filepath.Join(dir, name), body, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.CommandContext(t.Context(), "docker", "build", "-q", "-t", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	pusher(t, slow.addr)(image)
	forgetImages(t.Context(), t, engine, slow.addr)

	logins := filepath.Join(t.TempDir(), "credentials.yaml")
	if err := os.WriteFile(logins, fmt.Appendf(nil, "credentials:\n  ali: {registry: %q, username: ali, password: open sesame}\n", slow.addr), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newSite(t, image, newUp(t, "--registry-credentials", logins, "--nats", "127.0.0.1:0", "--worker-label", "on=one"))
	token, err := exec.CommandContext(s.ctx, s.Bin, "credentials", "worker", filepath.Join(s.Dir, "data", "credentials.json"), "two").Output()
	if err == nil {
		err = os.WriteFile(filepath.Join(s.Dir, "two.credentials"), token, 0o600)
	}
	var addrs harness.Addrs
	var b []byte
	if err == nil {
		b, err = os.ReadFile(filepath.Join(s.Dir, "addrs.json"))
	}
	if err == nil {
		err = json.Unmarshal(b, &addrs)
	}
	if err != nil {
		t.Fatal(err)
	}
	second := &harness.Process{Name: "two", Bin: s.Bin, Dir: s.Dir, Listen: map[string]string{"--admin": "127.0.0.1:0"},
		Args: []string{"agent", "--nats", addrs.NATS, "--credentials", filepath.Join(s.Dir, "two.credentials"), "--data", filepath.Join(s.Dir, "two"),
			"--cluster", s.Cluster, "--registry-credentials", logins, "--worker-label", "on=two"}}
	t.Cleanup(second.Kill)
	if err := second.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	workers := []string{"one", "two"}
	ready := func() {
		t.Helper()
		if err := harness.Poll(s.ctx, func() error {
			var list schemas.WorkerList
			err := s.Call(s.ctx, "GET", "/v1/workers", nil, &list)
			for _, w := range list.Items {
				if w.State != "ready" || w.Assigned.Tasks != 0 {
					err = errors.Join(err, fmt.Errorf("worker %s is %s with %d tasks", w.ID, w.State, w.Assigned.Tasks))
				}
			}
			if len(list.Items) != len(workers) {
				err = errors.Join(err, fmt.Errorf("%d workers", len(list.Items)))
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	ready()
	on := func(image, worker string) schemas.Task {
		t.Helper()
		return s.post(map[string]any{"image": image, "registry_credentials": "ali", "constraints": map[string]string{"on": worker}}, "exit", "0")
	}

	slow.shut(6 << 20)
	var pulling []schemas.TaskID
	for _, w := range workers {
		pulling = append(pulling, on(image, w).ID)
	}
	for _, id := range pulling {
		s.until(id, func(t schemas.Task) bool { return t.ImagePull != nil && t.ImagePull.Done > 0 })
	}
	slow.stuck()
	for _, w := range workers {
		s.ends(on(local, w).ID, schemas.Completed, schemas.ReasonExit)
	}
	r.kill()
	slow.cut()
	for _, w := range workers { // who asks now hears it at once
		task := s.ends(on(slow.addr+"/other:1", w).ID, schemas.Failed, schemas.ReasonImagePull)
		if !strings.Contains(task.Message, slow.addr) || task.Attempt != 1 {
			t.Errorf("attempt %d: %s", task.Attempt, task.Message)
		}
		s.ends(on(local, w).ID, schemas.Completed, schemas.ReasonExit)
	}
	r.start()
	slow.open()
	for _, id := range pulling { // Docker goes on by itself
		if task := s.ends(id, schemas.Completed, schemas.ReasonExit); task.Attempt != 1 || task.ImagePull != nil {
			t.Errorf("attempt %d, %+v", task.Attempt, task.ImagePull)
		}
	}
	ready()
	if err := harness.Poll(s.ctx, func() error {
		ids, err := s.Containers(s.ctx)
		if err == nil && len(ids) > 0 {
			err = fmt.Errorf("%d containers are left", len(ids))
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// valve passes TCP connections on, and can hold back what comes of them.
type valve struct {
	t    *testing.T
	addr string

	mu    sync.Mutex
	free  *sync.Cond
	left  int64 // under mu: bytes that may still come; less than 0: any number
	held  int   // under mu: connections that wait
	conns map[net.Conn]struct{}
}

func newValve(t *testing.T, to string) *valve {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	v := &valve{t: t, addr: l.Addr().String(), left: -1, conns: map[net.Conn]struct{}{}}
	v.free = sync.NewCond(&v.mu)
	t.Cleanup(func() {
		_ = l.Close()
		v.cut()
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go v.pass(c, to)
		}
	}()
	return v
}

func (v *valve) pass(near net.Conn, to string) {
	defer near.Close()
	far, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer far.Close()
	v.mu.Lock()
	v.conns[near], v.conns[far] = struct{}{}, struct{}{}
	v.mu.Unlock()
	go func() {
		_, _ = io.Copy(far, near)
		_ = far.(*net.TCPConn).CloseWrite()
	}()
	b := make([]byte, 32<<10)
	for {
		n, err := far.Read(b)
		v.mu.Lock()
		v.held++
		v.free.Broadcast()
		for v.left == 0 {
			if _, live := v.conns[near]; !live {
				break
			}
			v.free.Wait()
		}
		v.held--
		if v.left > 0 {
			v.left = max(0, v.left-int64(n))
		}
		v.mu.Unlock()
		if _, failed := near.Write(b[:n]); failed != nil || err != nil {
			break
		}
	}
	v.mu.Lock()
	delete(v.conns, near)
	delete(v.conns, far)
	v.mu.Unlock()
}

// shut lets so many bytes through, and no more.
func (v *valve) shut(after int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.left = after
}

// stuck waits until nothing comes any more that was asked for.
func (v *valve) stuck() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for v.left != 0 || v.held == 0 {
		v.free.Wait()
	}
}

func (v *valve) open() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.left = -1
	v.free.Broadcast()
}

// cut breaks all connections.
func (v *valve) cut() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for c := range v.conns {
		_ = c.Close()
	}
	clear(v.conns)
	v.free.Broadcast()
}
