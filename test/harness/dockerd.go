package harness

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/client"
)

// Dockerd is a Docker Engine beside the machine's own: with its own containerd, folders
// and socket, without a bridge, and with nothing of it left after Remove. It needs root.
type Dockerd struct {
	Process
	Host        string // of its socket, as in DOCKER_HOST
	LiveRestore bool   // of the next Start: containers go on without it
	cgroup      string
}

// NewDockerd prepares one in a temporary folder. Remove it.
func NewDockerd() (*Dockerd, error) {
	dir, err := os.MkdirTemp("", "dayfly-dockerd-")
	if err != nil {
		return nil, err
	}
	d := &Dockerd{Host: "unix://" + filepath.Join(dir, "docker.sock"), cgroup: "dayfly-" + strings.ToLower(rand.Text()[:10])}
	d.Process = Process{Name: "dockerd", Bin: "dockerd", Dir: dir}
	// Without a configuration of its own it would read the machine's.
	return d, os.WriteFile(filepath.Join(dir, "daemon.json"), []byte("{}"), 0o600)
}

// Start starts it and returns once it answers.
func (d *Dockerd) Start(ctx context.Context) error {
	// Its containerd dies with it. The pid files that a kill has left may name somebody
	// else by now, or a process that nobody has waited for, and either would be believed.
	containerd := filepath.Join(d.Dir, "exec", "containerd", "containerd")
	err := Poll(ctx, func() error {
		if list := processesNaming(containerd + ".toml"); len(list) > 0 {
			return fmt.Errorf("the former containerd is there: %v", list)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("start dockerd: %w", err)
	}
	_ = os.Remove(filepath.Join(d.Dir, "pid"))
	_ = os.Remove(containerd + ".pid")
	args := []string{
		"--config-file", filepath.Join(d.Dir, "daemon.json"), "--host", d.Host, "--data-root", filepath.Join(d.Dir, "data"),
		"--exec-root", filepath.Join(d.Dir, "exec"), "--pidfile", filepath.Join(d.Dir, "pid"), "--cgroup-parent", "/" + d.cgroup,
		"--storage-driver", "vfs", "--bridge", "none", "--iptables=false", "--ip-forward=false", "--ip-masq=false",
		"--exec-opt", "native.cgroupdriver=cgroupfs", "--live-restore=" + strconv.FormatBool(d.LiveRestore),
	}
	if err := d.run(args); err != nil {
		return err
	}
	engine, err := engineAt(d.Host)
	if err != nil {
		return err
	}
	defer engine.Close()
	err = Poll(ctx, func() error {
		if !d.Running() {
			return Fatal(fmt.Errorf("it ended: %v", d.err))
		}
		_, err := engine.Ping(ctx, client.PingOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("start dockerd: %w\n%s", err, d.Tail())
	}
	return nil
}

// Remove ends it and all that it has started, and takes its mounts, cgroups and
// folder away.
func (d *Dockerd) Remove() error {
	var err error
	if d.Running() {
		err = d.removeContainers()
		if e := d.Stop(); e != nil {
			d.Kill()
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	// What has outlived it: containers, and the shims between.
	err = errors.Join(err, Poll(ctx, func() error {
		list := processesNaming(d.Dir)
		for _, dir := range cgroups(d.cgroup) {
			list = append(list, processesIn(dir)...)
		}
		for _, pid := range list {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if len(list) > 0 {
			return fmt.Errorf("processes of dockerd are left: %v", list)
		}
		return nil
	}))
	for _, m := range mountsBelow(d.Dir) {
		err = errors.Join(err, syscall.Unmount(m, syscall.MNT_DETACH))
	}
	for _, dir := range cgroups(d.cgroup) {
		err = errors.Join(err, Poll(ctx, func() error { return removeTree(dir) }))
	}
	return errors.Join(err, os.RemoveAll(d.Dir))
}

func (d *Dockerd) removeContainers() error {
	engine, err := engineAt(d.Host)
	if err != nil {
		return err
	}
	defer engine.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	list, err := engine.ContainerList(ctx, client.ContainerListOptions{All: true})
	for _, c := range list.Items {
		_, e := engine.ContainerRemove(ctx, c.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		err = errors.Join(err, e)
	}
	return err
}

// processesIn lists the processes of a cgroup and those below it.
func processesIn(dir string) (list []int) {
	_ = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Name() == "cgroup.procs" {
			b, _ := os.ReadFile(path)
			for pid := range strings.FieldsSeq(string(b)) {
				n, _ := strconv.Atoi(pid)
				list = append(list, n)
			}
		}
		return nil
	})
	return list
}

// processesNaming lists processes whose command line names a folder.
func processesNaming(dir string) (list []int) {
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range found {
		b, _ := os.ReadFile(path)
		if pid, _ := strconv.Atoi(strings.Split(path, "/")[2]); pid != os.Getpid() && strings.Contains(string(b), dir) {
			list = append(list, pid)
		}
	}
	return list
}

// mountsBelow lists mount points in a folder, the innermost first.
func mountsBelow(dir string) (list []string) {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			list = append(list, f[4])
		}
	}
	slices.Reverse(list)
	return list
}

// cgroups finds a cgroup in each hierarchy.
func cgroups(name string) (list []string) {
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		found, _ := filepath.Glob(pattern + name)
		list = append(list, found...)
	}
	return list
}

// removeTree removes a cgroup, whose files go with it.
func removeTree(dir string) error {
	inner, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range inner {
		if e.IsDir() {
			err = errors.Join(err, removeTree(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(err, os.Remove(dir))
}
