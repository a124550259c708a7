package main

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	docker "github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

// finding is one line of the doctor's report.
type finding struct {
	Check  string `json:"check"`
	Status string `json:"status"` // ok, warn or fail
	Detail string `json:"detail"`
	Fix    string `json:"fix,omitzero"`
}

const (
	ok   = "ok"
	warn = "warn"
	bad  = "fail"
)

// diagnosis collects findings.
type diagnosis struct{ findings []finding }

func (d *diagnosis) add(status, check, fix, format string, args ...any) {
	f := finding{Check: check, Status: status, Detail: fmt.Sprintf(format, args...)}
	if status != ok {
		f.Fix = fix
	}
	d.findings = append(d.findings, f)
}

// level is ok if it holds, else what it is worth.
func level(holds bool, otherwise string) string {
	if holds {
		return ok
	}
	return otherwise
}

func (c *cli) doctorCommand() *cobra.Command {
	var data, initPath string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check whether this machine can run dayfly",
		Long: `doctor looks at what dayfly needs on this machine and says what to do about what is
missing. Its exit code is 1 if anything fails; a warning is none.`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().StringVar(&data, "data", envOr("DAYFLY_DATA", defaultData()), "the data folder of dayfly up (DAYFLY_DATA)")
	cmd.Flags().StringVar(&initPath, "init", envOr("DAYFLY_INIT", ""), "the dayfly-init binary, if it is not beside dayfly (DAYFLY_INIT)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, stop := c.interruptible(cmd.Context())
		defer stop()
		d := &diagnosis{}
		root := d.docker(ctx)
		d.kernel()
		d.init(initPath)
		d.folder(data)
		d.disk("disk space for data", data)
		if root != "" {
			d.disk("disk space for images", root)
		}
		d.clock()
		if url, err := c.address(); err != nil {
			d.add(bad, "api", "dayfly context lists the sites that you have named", "%v", err)
		} else {
			d.gateway(ctx, url)
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		return c.report(d)
	}
	return cmd
}

func (c *cli) report(d *diagnosis) error {
	failed := slices.ContainsFunc(d.findings, func(f finding) bool { return f.Status == bad })
	if c.data() {
		if err := c.printData(map[string]any{"ok": !failed, "checks": d.findings}); err != nil {
			return err
		}
	} else {
		paint := palette(c.out)
		width := 0
		for _, f := range d.findings {
			width = max(width, len(f.Check))
		}
		for _, f := range d.findings {
			if c.quiet && f.Status == ok {
				continue
			}
			fmt.Fprintf(c.out, "%s  %-*s  %s\n", paint(f.Status), width, f.Check, printable(f.Detail))
			if f.Fix != "" {
				fmt.Fprintf(c.out, "      %-*s  → %s\n", width, "", f.Fix)
			}
		}
	}
	if failed {
		return &exitError{code: exitAmiss}
	}
	return nil
}

// palette pads a status and, on a terminal that shows colours, colours it.
func palette(w any) func(string) string {
	colours := map[string]string{ok: "\x1b[32m", warn: "\x1b[33m", bad: "\x1b[31m"}
	plain := os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" || !isTerminal(w)
	return func(s string) string {
		if plain {
			return fmt.Sprintf("%-4s", s)
		}
		return fmt.Sprintf("%s%-4s\x1b[0m", colours[s], s)
	}
}

// The least versions that dayfly works with, and those below which the sandbox has
// known holes. Distributions mend older versions under their old number, so these
// are only warned about.
var (
	leastAPI    = []int{1, 40}
	safeRunc    = []int{1, 1, 12} // CVE-2024-21626
	soundEngine = []int{20, 10}
)

// docker checks the Engine and gives its root folder, "" if it is not of this machine.
func (d *diagnosis) docker(ctx context.Context) string {
	const start = "install and start Docker (on Debian: apt install docker.io), and let this user use it (usermod -aG docker NAME)"
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	engine, err := docker.New(docker.FromEnv)
	if err != nil {
		d.add(bad, "docker", "unset DOCKER_HOST, or set it right", "%v", err)
		return ""
	}
	defer engine.Close()
	ping, err := engine.Ping(ctx, docker.PingOptions{NegotiateAPIVersion: true})
	if err != nil {
		d.add(bad, "docker", start, "not reachable: %v", err)
		return ""
	}
	v, err := engine.ServerVersion(ctx, docker.ServerVersionOptions{})
	if err != nil {
		d.add(bad, "docker", start, "does not say its version: %v", err)
		return ""
	}
	d.add(level(atLeast(v.Version, soundEngine), warn), "docker", "a newer Docker Engine", "Engine %s at %s", v.Version, engine.DaemonHost())
	d.add(level(atLeast(ping.APIVersion, leastAPI), bad), "docker api", "Docker Engine 19.03 or newer", "%s", ping.APIVersion)
	res, err := engine.Info(ctx, docker.InfoOptions{})
	if err != nil {
		d.add(bad, "docker info", "look at the Engine's own log", "%v", err)
		return ""
	}
	info := res.Info
	d.add(level(info.OSType == "linux", bad), "docker platform", "a Docker Engine on Linux", "%s/%s, %d cpus, %s memory",
		info.OSType, info.Architecture, info.NCPU, schemas.Size(info.MemTotal))
	for _, component := range v.Components {
		if component.Name == "runc" {
			d.add(level(atLeast(component.Version, safeRunc), warn), "runc",
				"runc 1.1.12 or newer, unless your distribution has mended this one (CVE-2024-21626)", "%s", component.Version)
		}
	}
	d.add(level(info.CgroupVersion == "2", warn), "cgroups",
		"works, but version 2 is the better sandbox: boot with systemd.unified_cgroup_hierarchy=1", "version %s", orElse(info.CgroupVersion, "1"))
	d.add(level(info.MemoryLimit && info.PidsLimit && info.CPUCfsQuota, bad), "limits",
		"boot with cgroup_enable=memory, and a kernel with the pids and cpu controllers",
		"memory %s, pids %s, cpu %s", yes(info.MemoryLimit), yes(info.PidsLimit), yes(info.CPUCfsQuota))
	d.add(level(info.SwapLimit, warn), "swap limit", "boot with swapaccount=1, or turn swap off, so that tasks cannot swap", "%s", yes(info.SwapLimit))
	d.add(level(info.Driver == "overlay2" || info.Driver == "overlayfs", warn), "storage", `"storage-driver": "overlay2" in /etc/docker/daemon.json: faster starts`, "%s", info.Driver)
	seccomp := slices.ContainsFunc(info.SecurityOptions, func(s string) bool { return strings.Contains(s, "name=seccomp") })
	d.add(level(seccomp, bad), "seccomp", "a kernel and an Engine with seccomp: without it the sandbox is open", "%s", yes(seccomp))
	for _, s := range info.SecurityOptions {
		if strings.Contains(s, "name=rootless") {
			d.add(warn, "rootless", "", "the Engine runs without root: limits work only where they are delegated to it")
		}
	}
	if u, err := url.Parse(engine.DaemonHost()); err != nil || u.Scheme != "unix" {
		d.add(warn, "docker host", "run dayfly on the Docker host itself", "not on this machine; dayfly needs files and sockets in common with it")
		return ""
	}
	return info.DockerRootDir
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func orElse(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// atLeast compares the numbers at the beginning of a version. What is no version
// passes: a development build, say.
func atLeast(have string, least []int) bool {
	parts := strings.FieldsFunc(strings.TrimPrefix(have, "v"), func(r rune) bool { return r < '0' || r > '9' })
	for i, want := range least {
		if i >= len(parts) {
			return true
		}
		n, err := strconv.Atoi(parts[i])
		if err != nil || n > want {
			return true
		}
		if n < want {
			return false
		}
	}
	return true
}

func (d *diagnosis) kernel() {
	var u unix.Utsname
	release := "?"
	if unix.Uname(&u) == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err == nil {
		unix.Close(fd)
	}
	d.add(level(err == nil, bad), "kernel", "Linux 5.4 or newer", "Linux %s, pidfd %s", release, yes(err == nil))
	have := controllers()
	missing := slices.DeleteFunc([]string{"memory", "pids", "cpu"}, func(c string) bool { return slices.Contains(have, c) })
	d.add(level(len(missing) == 0, bad), "controllers", "boot with cgroup_enable=memory, and a kernel with: "+strings.Join(missing, ", "),
		"%s", orElse(strings.Join(have, " "), "none"))
}

// controllers lists the cgroup controllers of this kernel that are on.
func controllers() []string {
	if b, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return strings.Fields(string(b))
	}
	b, err := os.ReadFile("/proc/cgroups")
	if err != nil {
		return nil
	}
	var on []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 4 && f[3] == "1" {
			on = append(on, f[0])
		}
	}
	return on
}

func (d *diagnosis) init(path string) {
	const check = "dayfly-init"
	found, err := findInit(path)
	if err != nil {
		d.add(bad, check, "make build, or --init PATH", "%v", err)
		return
	}
	if err := checkInit(found); err != nil {
		d.add(bad, check, "build it with CGO_ENABLED=0 on this machine: make build", "%s %v", found, err)
		return
	}
	d.add(ok, check, "", "%s, static", found)
}

// findInit finds dayfly-init: at path, or beside our own executable.
func findInit(path string) (string, error) {
	if path == "" {
		self, err := os.Executable()
		if err != nil {
			return "", err
		}
		if self, err = filepath.EvalSymlinks(self); err != nil {
			return "", err
		}
		path = filepath.Join(filepath.Dir(self), "dayfly-init")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("dayfly-init is not there: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return "", fmt.Errorf("%s is not an executable file", path)
	}
	return path, nil
}

// checkInit says what keeps a dayfly-init from running in any container.
func checkInit(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return errors.New("is not a Linux program")
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("is not static: it would not run in images without its libraries")
		}
	}
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64, "riscv64": elf.EM_RISCV}
	if m, known := machines[runtime.GOARCH]; known && f.Machine != m {
		return fmt.Errorf("is for another kind of machine (%s)", f.Machine)
	}
	return nil
}

func (d *diagnosis) folder(path string) {
	const check = "data folder"
	fix := "--data with a folder that this user may write to"
	dir := nearest(path)
	probe, err := os.CreateTemp(dir, ".dayfly-doctor-")
	if err != nil {
		d.add(bad, check, fix, "%s: %v", path, err)
		return
	}
	probe.Close()
	os.Remove(probe.Name())
	if dir != path {
		d.add(ok, check, "", "%s can be made", path)
		return
	}
	d.add(ok, check, "", "%s is writable", path)
}

// nearest gives the folder itself or the first above it that exists.
func nearest(path string) string {
	for {
		if info, err := os.Stat(path); err == nil && info.IsDir() || path == filepath.Dir(path) {
			return path
		}
		path = filepath.Dir(path)
	}
}

func (d *diagnosis) disk(check, path string) {
	const least, comfort = 1 << 30, 5 << 30
	var s unix.Statfs_t
	where := nearest(path)
	if err := unix.Statfs(where, &s); err != nil {
		d.add(warn, check, "", "%s: %v", where, err)
		return
	}
	free := int64(s.Bavail) * s.Bsize
	status := ok
	switch {
	case free < least:
		status = bad
	case free < comfort:
		status = warn
	}
	d.add(status, check, "free some space; docker image prune helps often", "%s free in %s", schemas.Size(free), where)
	if s.Files > 0 && s.Ffree < 20_000 {
		d.add(warn, check, "delete files", "only %d inodes are left in %s", s.Ffree, where)
	}
}

func (d *diagnosis) clock() {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	switch {
	case time.Now().Year() < 2025:
		d.add(bad, "clock", "set the clock", "%s", time.Now().UTC().Format(time.RFC3339))
	case err != nil:
		d.add(ok, "clock", "", "%s", time.Now().UTC().Format(time.RFC3339))
	default:
		const unsynchronised = 5 // TIME_ERROR
		d.add(level(state != unsynchronised, warn), "clock", "systemd-timesyncd, chrony or ntpd; dayfly compares no two clocks, but people do",
			"%s, synchronised: %s", time.Now().UTC().Format(time.RFC3339), yes(state != unsynchronised))
	}
}

// gateway looks at a dayfly that runs already, or at the ports that one would need.
func (d *diagnosis) gateway(ctx context.Context, base string) {
	cl, err := client.New(base, client.WithRetryFor(0))
	if err != nil {
		d.add(bad, "api", "--url http://HOST:PORT, or set DAYFLY_URL", "%v", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	l, err := cl.Workers(ctx)
	if err == nil {
		ready := 0
		for _, w := range l.Items {
			if w.State == "ready" {
				ready++
			}
		}
		d.add(level(ready > 0, warn), "api", "start one on a Docker host; dayfly workers shows them", "%s answers, %d of %d workers ready", base, ready, len(l.Items))
		d.skew(ctx, base)
		return
	}
	var e *schemas.Error
	if errors.As(err, &e) {
		message, _ := explain(err)
		d.add(bad, "api", "look at the log of the gateway; is NATS there?", "%s answers: %s", base, message)
		return
	}
	u, _ := url.Parse(base)
	if host := u.Hostname(); host != "localhost" && !net.ParseIP(host).IsLoopback() {
		d.add(bad, "api", "start dayfly there, or name another with --url", "%v", err)
		return
	}
	d.add(ok, "api", "", "none runs at %s yet", base)
	for _, addr := range []string{defaultHTTP, defaultIngress, defaultAdmin} {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			d.add(bad, "port", "dayfly up with another --http, --ingress or --admin, or end what listens there", "%v", err)
			continue
		}
		ln.Close()
		d.add(ok, "port", "", "%s is free", addr)
	}
}

// skew compares our clock with the gateway's, for people who read times.
func (d *diagnosis) skew(ctx context.Context, base string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/v1/workers", nil)
	if err != nil {
		return
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return
	}
	resp.Body.Close()
	at, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return
	}
	off := time.Since(at).Abs().Truncate(time.Second)
	d.add(level(off < 5*time.Second, warn), "clocks", "synchronise both", "the gateway's differs by %s", off)
}
