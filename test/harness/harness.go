// Package harness starts a real dayfly as a process of its own, for the demo and
// for the tests that kill it: `dayfly up` on free ports of the loopback interface,
// with its data in a temporary folder and a cluster name that nobody else has, by
// which everything it leaves on the Docker Engine is found and removed.
package harness

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"dayfly.dev/bus/port"
	"dayfly.dev/services/agent/guest"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/client"
)

// Up is one `dayfly up`.
type Up struct {
	Bin     string // the dayfly binary
	Dir     string // its data
	Cluster string // label of its containers
	URL     string // of its API
	Ingress string // address at which tasks are reached
	Admin   string // URL of its metrics
	Args    []string
	Env     []string
	Log     *os.File

	cmd    *exec.Cmd
	exited chan error

	http, ingress *port.Port
}

// New prepares a dayfly in a temporary folder.
func New(bin string, args ...string) (*Up, error) {
	dir, err := os.MkdirTemp("", "dayfly-")
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "up.log"))
	if err != nil {
		return nil, err
	}
	u := &Up{
		Bin: bin, Dir: dir, Log: log, Args: args,
		Cluster: "t" + strings.ToLower(rand.Text()[:10]),
	}
	for _, p := range []**port.Port{&u.http, &u.ingress} {
		if *p, err = port.Keep("127.0.0.1"); err != nil {
			return nil, err
		}
	}
	return u, nil
}

// Start starts the process and waits until its API answers. The ports stay the
// same over restarts.
func (u *Up) Start(ctx context.Context) error {
	file := filepath.Join(u.Dir, "addrs.json")
	_ = os.Remove(file)
	args := append([]string{"up", "--data", filepath.Join(u.Dir, "data"), "--http", u.http.String(), "--ingress", u.ingress.String(),
		"--admin", "127.0.0.1:0", "--nats", "", "--worker", "w-" + u.Cluster, "--cluster", u.Cluster,
		"--print-addrs", file}, u.Args...)
	u.cmd = exec.Command(u.Bin, args...)
	u.cmd.Stdout, u.cmd.Stderr = u.Log, u.Log
	u.cmd.Env = append(os.Environ(), u.Env...)
	if err := u.cmd.Start(); err != nil {
		return err
	}
	u.exited = make(chan error, 1)
	go func() { u.exited <- u.cmd.Wait() }()
	err := Poll(ctx, func() error {
		select {
		case err := <-u.exited:
			u.exited <- err
			return fatal{fmt.Errorf("dayfly up ended: %v\n%s", err, u.Tail())}
		default:
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		var a Addrs
		if err := json.Unmarshal(b, &a); err != nil {
			return err
		}
		u.URL, u.Admin = a.HTTP, a.Admin
		_, u.Ingress, _ = strings.Cut(a.Ingress, "://")
		return u.Call(ctx, "GET", "/v1/workers", nil, nil)
	})
	if err != nil {
		return fmt.Errorf("dayfly up did not get ready: %w\n%s", err, u.Tail())
	}
	return nil
}

// Tail is the end of the process's own log.
func (u *Up) Tail() string {
	b, _ := os.ReadFile(u.Log.Name())
	if len(b) > 4000 {
		b = b[len(b)-4000:]
	}
	return string(b)
}

// Kill ends the process by SIGKILL and waits for it.
func (u *Up) Kill() error { return u.end(syscall.SIGKILL) }

// Stop ends the process by SIGTERM and waits for it.
func (u *Up) Stop() error { return u.end(syscall.SIGTERM) }

// Pid is the process.
func (u *Up) Pid() int { return u.cmd.Process.Pid }

func (u *Up) end(sig syscall.Signal) error {
	if u.cmd == nil {
		return nil
	}
	_ = u.cmd.Process.Signal(sig)
	select {
	case err := <-u.exited:
		u.cmd = nil
		if sig == syscall.SIGTERM && err != nil {
			return fmt.Errorf("dayfly up: %w\n%s", err, u.Tail())
		}
		return nil
	case <-time.After(30 * time.Second):
		_ = u.cmd.Process.Kill()
		<-u.exited
		u.cmd = nil
		return errors.New("dayfly up did not end within 30 s")
	}
}

// Remove stops the process and takes away its containers and its folder.
func (u *Up) Remove(ctx context.Context) error {
	err := u.Kill()
	if log, e := os.ReadFile(u.Log.Name()); e == nil {
		err = errors.Join(err, raced("dayfly up", string(log)))
	}
	err = errors.Join(err, RemoveContainers(ctx, u.Cluster, filepath.Join(u.Dir, "data", "agent")))
	u.Log.Close()
	return errors.Join(err, os.RemoveAll(u.Dir))
}

// Containers lists what the cluster has on the Engine, running or not.
func (u *Up) Containers(ctx context.Context) ([]string, error) { return Containers(ctx, u.Cluster) }

// Call does one request with JSON in and out. A problem comes back as
// *schemas.Error.
func (u *Up) Call(ctx context.Context, method, path string, in, out any) error {
	return u.CallKey(ctx, method, path, "", in, out)
}

// CallKey is Call with an Idempotency-Key.
func (u *Up) CallKey(ctx context.Context, method, path, key string, in, out any) error {
	return Call(ctx, method, u.URL+path, key, in, out)
}

// fatal ends a Poll.
type fatal struct{ error }

func (f fatal) Unwrap() error { return f.error }

// Poll asks again and again, ever slower, until fn is content or ctx ends; it gives
// fn's last error then.
func Poll(ctx context.Context, fn func() error) error {
	for wait := 5 * time.Millisecond; ; wait = min(wait*3/2, 250*time.Millisecond) {
		err := fn()
		if err == nil {
			return nil
		}
		if f := (fatal{}); errors.As(err, &f) {
			return f.error
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(wait):
		}
	}
}

// Fatal makes Poll give up.
func Fatal(err error) error { return fatal{err} }

// MakeImage makes the guest image (services/agent/guest) under a name, on the
// Engines at some hosts; "" and none is this machine's.
func MakeImage(ctx context.Context, name string, hosts ...string) error {
	archive, err := guest.Build(ctx)
	if err != nil {
		return err
	}
	if len(hosts) == 0 {
		hosts = []string{""}
	}
	for _, host := range hosts {
		engine, err := engineAt(host)
		if err == nil {
			_, err = guest.ImportImage(ctx, engine, archive, name, guest.Entrypoint)
			err = errors.Join(err, engine.Close())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// RemoveImage takes an image away. One that is not there is no error.
func RemoveImage(ctx context.Context, name string) error {
	engine, err := client.New(client.FromEnv)
	if err != nil {
		return err
	}
	defer engine.Close()
	// Without force, which would leave the image without a name while a container of it
	// is still being removed.
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return Poll(ctx, func() error {
		_, err := engine.ImageRemove(ctx, name, client.ImageRemoveOptions{})
		if cerrdefs.IsNotFound(err) {
			return nil
		}
		return err
	})
}
