package docker_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/docker"
)

const (
	sigStop = syscall.SIGSTOP
	sigCont = syscall.SIGCONT
)

func inspect(t testing.TB, name string) container.InspectResponse {
	t.Helper()
	got, err := site.docker.ContainerInspect(t.Context(), name, client.ContainerInspectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return got.Container
}

// Every field of the container that the sandbox is made of, as Docker has it.
func TestSandboxFieldByField(t *testing.T) {
	dir, worker := t.TempDir(), schemas.WorkerID("w-"+randomID())
	rt := openIn(t, dir, worker)
	req := request(t, rt, worker, "sleep", "1h")
	req.Spec.Resources = schemas.Resources{CPUs: 0.25, Memory: 64 << 20, Pids: 30, Disk: 8 << 20}
	req.Spec.Tmpfs = map[string]schemas.Size{"/var/cache": 1 << 20}
	a := start(t, rt, req)
	c := inspect(t, docker.ContainerName(a.Assignment()))

	var seccomp string
	c.HostConfig.SecurityOpt = slices.DeleteFunc(c.HostConfig.SecurityOpt, func(s string) bool {
		v, ok := strings.CutPrefix(s, "seccomp=")
		if ok {
			seccomp = v
		}
		return ok
	})
	var profile struct {
		DefaultAction string
		Syscalls      []struct {
			Names  []string
			Action string
			Args   []struct{ Value uint64 }
		}
	}
	if err := json.Unmarshal([]byte(seccomp), &profile); err != nil || profile.DefaultAction != "SCMP_ACT_ERRNO" {
		t.Errorf("seccomp profile: %v, default %q", err, profile.DefaultAction)
	}
	var families []uint64
	for _, s := range profile.Syscalls {
		for _, n := range []string{"io_uring_setup", "keyctl", "ptrace", "userfaultfd", "process_vm_readv", "pidfd_getfd", "memfd_secret", "socketcall", "unshare", "mount", "bpf"} {
			if s.Action == "SCMP_ACT_ALLOW" && slices.Contains(s.Names, n) {
				t.Errorf("seccomp allows %s", n)
			}
		}
		if slices.Contains(s.Names, "socket") {
			if len(s.Args) != 1 {
				t.Error("seccomp allows every socket")
				continue
			}
			families = append(families, s.Args[0].Value)
		}
	}
	if diff := cmp.Diff([]uint64{1, 2, 10, 16}, families); diff != "" {
		t.Error("families of sockets:", diff)
	}

	type fields map[string]any
	h, f := c.HostConfig, c.Config
	limits := map[string][2]int64{}
	for _, u := range h.Ulimits {
		limits[u.Name] = [2]int64{u.Soft, u.Hard}
	}
	mounts := map[string]string{}
	for _, m := range c.Mounts {
		mounts[m.Destination] = fmt.Sprintf("%s rw=%v %s", m.Type, m.RW, m.Propagation)
	}
	got := fields{
		"name": c.Name, "image": c.Image, "user": f.User, "entrypoint": f.Entrypoint, "cmd": len(f.Cmd), "env": len(f.Env),
		"labels": f.Labels, "network disabled": f.NetworkDisabled, "tty": f.Tty, "stdin": f.OpenStdin, "healthcheck": f.Healthcheck.Test,
		"stop signal": f.StopSignal, "volumes": len(f.Volumes), "hostname": f.Hostname,
		"network": string(h.NetworkMode), "privileged": h.Privileged, "cap add": len(h.CapAdd), "cap drop": h.CapDrop,
		"security": h.SecurityOpt, "read-only root": h.ReadonlyRootfs, "ipc": string(h.IpcMode), "shm": h.ShmSize, "pid": string(h.PidMode),
		"uts": string(h.UTSMode), "userns": string(h.UsernsMode), "binds": len(h.Binds), "volumes from": len(h.VolumesFrom),
		"devices": len(h.Devices) + len(h.DeviceRequests) + len(h.DeviceCgroupRules), "groups": len(h.GroupAdd),
		"extra hosts": len(h.ExtraHosts), "links": len(h.Links), "ports": len(h.PortBindings), "publish all": h.PublishAllPorts,
		"auto remove": h.AutoRemove, "restart": string(h.RestartPolicy.Name), "log": h.LogConfig.Type, "init": h.Init == nil,
		"memory": h.Memory, "memory and swap": h.MemorySwap, "oom kill": h.OomKillDisable == nil || !*h.OomKillDisable, "oom score": h.OomScoreAdj,
		"nano cpus": h.NanoCPUs, "pids": *h.PidsLimit, "ulimits": limits, "sysctls": len(h.Sysctls), "tmpfs": h.Tmpfs, "mounts": mounts,
		"masked": slices.Contains(h.MaskedPaths, "/proc/kcore"), "read-only paths": slices.Contains(h.ReadonlyPaths, "/proc/sys"),
		"networks": func() int {
			if c.NetworkSettings == nil {
				return 0
			}
			return len(c.NetworkSettings.Ports)
		}(),
	}
	as := req.Assignment
	own := "mode=0755,uid=1000,gid=1000"
	want := fields{
		"name": "/dayfly-" + string(as.Task) + "-1", "image": site.imageID, "user": "1000:1000", "entrypoint": []string{"/.dayfly/init"}, "cmd": 0,
		"env":    0,
		"labels": map[string]string{"dayfly.cluster": site.cluster, "dayfly.worker": string(worker), "dayfly.epoch": "e1", "dayfly.task": string(as.Task), "dayfly.attempt": "1"},

		"network disabled": true, "tty": false, "stdin": false, "healthcheck": []string{"NONE"}, "stop signal": "SIGTERM", "volumes": 0, "hostname": "task",
		"network": "none", "privileged": false, "cap add": 0, "cap drop": []string{"ALL"},
		"security": []string{"no-new-privileges:true"}, "read-only root": true, "ipc": "private", "shm": int64(64 << 20), "pid": "",
		"uts": "", "userns": "", "binds": 0, "volumes from": 0, "devices": 0, "groups": 0, "extra hosts": 0, "links": 0, "ports": 0, "publish all": false,
		"auto remove": false, "restart": "no", "log": "none", "init": true,
		"memory": int64(72 << 20), "memory and swap": int64(72 << 20), "oom kill": true, "oom score": 500,
		"nano cpus": int64(250_000_000), "pids": int64(46), "sysctls": 0,
		"ulimits": map[string][2]int64{"core": {0, 0}, "fsize": {64 << 20, 64 << 20}, "memlock": {64 << 10, 64 << 10}, "msgqueue": {0, 0}, "nofile": {1024, 16 << 10}},
		"tmpfs": map[string]string{
			"/tmp":         "rw,exec,nosuid,nodev,size=67108864,nr_inodes=16384," + own,
			"/task/output": "rw,exec,nosuid,nodev,size=8388608,nr_inodes=2048," + own,
			"/var/cache":   "rw,exec,nosuid,nodev,size=1048576,nr_inodes=256," + own,
		},
		"mounts": map[string]string{
			"/.dayfly/init": "bind rw=false rprivate", "/.dayfly/c": "bind rw=false rprivate", "/.dayfly/permit": "bind rw=false rprivate", "/task/input": "bind rw=false rprivate",
		},
		"masked": true, "read-only paths": true, "networks": 0,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// What a hostile program meets in a real container.
func TestHostile(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-hostile")
	run := func(t *testing.T, change func(*schemas.Spec), command ...string) (string, schemas.Exit) {
		t.Helper()
		req := request(t, rt, "w-hostile", command...)
		req.Spec.Resources = schemas.Resources{CPUs: 1, Memory: 64 << 20, Pids: 40, Disk: 2 << 20}
		if change != nil {
			change(&req.Spec)
		}
		a := start(t, rt, req)
		o := wait(t, a)
		if o.Exit == nil {
			t.Fatalf("%+v", o)
		}
		out := output(t, a, schemas.Stdout)
		if err := a.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		return out, *o.Exit
	}
	t.Run("calls", func(t *testing.T) {
		for _, call := range []string{
			"vsock", "packet", "alg", "raw", "io_uring", "keyctl", "userfaultfd", "memfd_secret", "bpf", "perf", "unshare", "unshare-ns", "setns", "mount", "remount",
			"umount", "chroot", "mknod", "ptrace", "process-vm", "kill-init", "setuid", "settime", "sethostname", "reboot", "write-root", "write-hosts",
			"core-pattern", "oom-score", "docker",
		} {
			t.Run(call, func(t *testing.T) {
				out, exit := run(t, nil, "try", call)
				if exit.Code != 0 {
					t.Errorf("%s (%+v)", out, exit)
				}
			})
		}
	})
	t.Run("what is ours", func(t *testing.T) {
		if out, exit := run(t, nil, "read-dayfly"); exit.Code != 0 || strings.Contains(out, "ALLOWED") {
			t.Errorf("%s", out)
		}
	})
	t.Run("status", func(t *testing.T) {
		out, _ := run(t, nil, "status")
		for _, line := range []string{"CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "CapAmb:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "Uid:\t1000\t1000", "SigIgn:\t0000000000000000"} {
			if !strings.Contains(out, line) {
				t.Errorf("no %q in\n%s", line, out)
			}
		}
	})
	t.Run("descriptors", func(t *testing.T) {
		if out, _ := run(t, nil, "fds"); out != "0 1 2\n" {
			t.Errorf("%q", out)
		}
	})
	t.Run("setuid", func(t *testing.T) {
		if out, _ := run(t, func(s *schemas.Spec) { s.Entrypoint, s.Command = []string{"/bin/suid", "suid"}, nil }); out != "euid=1000\n" {
			t.Errorf("%q", out)
		}
	})
	t.Run("a writable root", func(t *testing.T) {
		no := false
		writable := func(s *schemas.Spec) { s.ReadOnly, s.User = &no, "image" }
		for _, p := range []string{"/x", "/etc/passwd", "/tmp/x"} {
			if out, exit := run(t, writable, "write", p); exit.Code != 0 {
				t.Errorf("%s: %s", p, out)
			}
		}
		for _, p := range []string{"/.dayfly/init", "/.dayfly/permit/permit", "/task/input/x", "/proc/sys/kernel/core_pattern"} {
			if out, exit := run(t, writable, "write", p); exit.Code == 0 {
				t.Errorf("%s was written: %s", p, out)
			}
		}
		if out, exit := run(t, func(s *schemas.Spec) { s.ReadOnly = &no }, "write", "/x"); exit.Code == 0 {
			t.Errorf("the default user wrote to root's folder: %s", out)
		}
		// One file has no more bytes than the largest place to write.
		if out, _ := run(t, writable, "fill", "/x"); !strings.Contains(out, "wrote 67108864, then") {
			t.Errorf("%q", out)
		}
	})
	t.Run("capabilities", func(t *testing.T) {
		with := func(names ...string) func(*schemas.Spec) {
			return func(s *schemas.Spec) { s.User, s.CapAdd = "image", names }
		}
		out, _ := run(t, with("SETUID", "CHOWN"), "status") // bits 7 and 0, and KILL, 5
		for _, line := range []string{"CapEff:\t00000000000000a1", "CapPrm:\t00000000000000a1", "CapBnd:\t00000000000000a1", "CapAmb:\t0000000000000000", "NoNewPrivs:\t1", "Uid:\t0\t0"} {
			if !strings.Contains(out, line) {
				t.Errorf("no %q in\n%s", line, out)
			}
		}
		if out, exit := run(t, with("SYS_CHROOT"), "try", "chroot"); exit.Code != 1 {
			t.Errorf("SYS_CHROOT is of no use: %s", out)
		}
		// All that a site can allow opens nothing else.
		for _, call := range []string{
			"vsock", "packet", "alg", "io_uring", "keyctl", "userfaultfd", "memfd_secret", "bpf", "perf", "unshare", "unshare-ns", "setns", "mount", "remount",
			"umount", "mknod", "ptrace", "process-vm", "kill-init", "settime", "sethostname", "reboot", "write-root", "core-pattern", "docker",
		} {
			if out, exit := run(t, with(schemas.Capabilities...), "try", call); exit.Code != 0 {
				t.Errorf("%s: %s (%+v)", call, out, exit)
			}
		}
		if out, exit := run(t, with(schemas.Capabilities...), "read-dayfly"); exit.Code != 0 || strings.Contains(out, "ALLOWED") {
			t.Errorf("%s", out)
		}
		// Who has become another user is ended as anybody, with and without an agent's word.
		for _, program := range [][]string{{"term-exit"}, {"ignore-term", "1h"}} {
			req := request(t, rt, "w-hostile", append([]string{"as", "33"}, program...)...)
			with("SETUID")(&req.Spec)
			a := start(t, rt, req)
			waitFor(t, "ready", func() bool { return output(t, a, schemas.Stdout) == "ready\n" })
			a.Stop(300 * time.Millisecond)
			if o := wait(t, a); o.By != schemas.EndedStop || o.Exit == nil {
				t.Errorf("%v: %+v", program, o)
			}
		}
		req := request(t, rt, "w-hostile", "echo", "x")
		req.Spec.CapAdd = []string{"CHOWN"}
		var refused *agent.StartError
		if _, err := rt.Start(t.Context(), req); !errors.As(err, &refused) || refused.Reason != schemas.ReasonStart {
			t.Errorf("capabilities for a user who is not root: %v", err)
		}
	})
	t.Run("places to write", func(t *testing.T) {
		for _, p := range []string{"/tmp/x", "/task/output/x", "/dev/shm/x"} {
			if out, exit := run(t, nil, "write", p); exit.Code != 0 {
				t.Errorf("%s: %s", p, out)
			}
		}
	})
	t.Run("reopened output", func(t *testing.T) {
		if out, exit := run(t, nil, "reopen"); exit.Code != 0 || out != "again 1\n" {
			t.Errorf("%q", out)
		}
	})
	t.Run("fork bomb", func(t *testing.T) {
		out, exit := run(t, nil, "fork-bomb")
		if exit.Code != 0 || !strings.HasPrefix(out, "forked ") {
			t.Errorf("%q %+v", out, exit)
		}
	})
	t.Run("full output", func(t *testing.T) {
		if out, _ := run(t, nil, "fill", "/task/output/x"); !strings.Contains(out, "wrote 2097152, then") {
			t.Errorf("%q", out)
		}
	})
	t.Run("inodes", func(t *testing.T) {
		if out, _ := run(t, nil, "inodes", "/task/output"); !strings.Contains(out, "then: ") {
			t.Errorf("%q", out)
		}
	})
	t.Run("tmp beyond the memory", func(t *testing.T) {
		_, exit := run(t, func(s *schemas.Spec) { s.Resources.Memory = 24 << 20 }, "fill", "/tmp/x")
		if !exit.OOMKilled {
			t.Errorf("%+v", exit)
		}
	})
	t.Run("only a child runs out of memory", func(t *testing.T) {
		out, exit := run(t, nil, "child-oom", fmt.Sprint(512<<20))
		if exit.Code != 0 || !exit.OOMKilled {
			t.Errorf("%q %+v", out, exit)
		}
	})
	t.Run("the kernel takes the task, not init", func(t *testing.T) {
		for range 3 {
			if _, exit := run(t, nil, "eat", fmt.Sprint(512<<20)); exit.Code != 137 || !exit.OOMKilled {
				t.Errorf("%+v", exit)
			}
		}
	})
	t.Run("stderr and stdout share the limit", func(t *testing.T) {
		req := request(t, rt, "w-hostile", "spam", "--err", "300000")
		req.LogLimit = 1000
		a := start(t, rt, req)
		wait(t, a)
		if kept, dropped := a.Output().Size(schemas.Stderr); kept != 1000 || dropped != 299_000 {
			t.Errorf("kept %d, dropped %d", kept, dropped)
		}
	})
}

// Idle tasks cost the agent nothing.
func TestIdleCostsNothing(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-idle")
	for range 5 {
		start(t, rt, request(t, rt, "w-idle", "sleep", "1h"))
	}
	used := func() time.Duration {
		var ru syscall.Rusage
		_ = syscall.Getrusage(syscall.RUSAGE_SELF, &ru)
		return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	}
	var cpu time.Duration
	for range 5 { // others who use Docker make work here too
		before := used()
		<-time.After(2 * time.Second) // what is measured is this time
		if cpu = used() - before; cpu <= 100*time.Millisecond {
			return
		}
	}
	t.Errorf("five idle tasks took %s of processor time in 2 s, again and again", cpu)
}
