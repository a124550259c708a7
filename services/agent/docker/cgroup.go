package docker

import (
	"bufio"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// cgroup is where the kernel counts what a container uses. Reading it costs some
// tens of microseconds and needs no dockerd. It is gone once init is.
type cgroup struct {
	memory, cpu string // folders, "" if they are out of sight
	v2          bool
}

// findCgroup reads the cgroup of a process. An agent that does not see the host's
// cgroup file system gets an empty one, and Docker and init tell instead.
func findCgroup(pid int) cgroup {
	paths, err := processCgroups(pid)
	if err != nil {
		return cgroup{}
	}
	var g cgroup
	if p, ok := paths["memory"]; ok { // v1, also beside an empty v2
		g.memory = existing("/sys/fs/cgroup/memory" + p)
		g.cpu = existing("/sys/fs/cgroup/cpuacct" + paths["cpuacct"])
		if g.cpu == "" {
			g.cpu = existing("/sys/fs/cgroup/cpu,cpuacct" + paths["cpuacct"])
		}
		return g
	}
	if p, ok := paths[""]; ok {
		g.v2 = true
		g.memory = existing("/sys/fs/cgroup" + p)
		g.cpu = g.memory
	}
	return g
}

func existing(dir string) string {
	if dir != filepath.Clean(dir) {
		return "" // "/../…": it lies outside our own cgroup namespace
	}
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return ""
	}
	return dir
}

// processCgroups gives the path by controller; "" is the unified hierarchy.
func processCgroups(pid int) (map[string]string, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return nil, err
	}
	paths := map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		for name := range strings.SplitSeq(f[1], ",") {
			paths[name] = f[2]
		}
	}
	return paths, nil
}

// oomKills is how many processes the kernel killed for want of memory.
func (g cgroup) oomKills() (int64, bool) {
	if g.memory == "" {
		return 0, false
	}
	if g.v2 {
		return keyed(filepath.Join(g.memory, "memory.events"), "oom_kill")
	}
	return keyed(filepath.Join(g.memory, "memory.oom_control"), "oom_kill")
}

// usage lays over u what the cgroup knows better: the processor time of processes
// that were never reaped by init, and the highest memory. Init itself is counted in.
func (g cgroup) usage(u *schemas.Usage) {
	if g.memory != "" {
		name := "memory.max_usage_in_bytes"
		if g.v2 {
			name = "memory.peak" // kernel 5.19
		}
		if n, ok := number(filepath.Join(g.memory, name)); ok {
			u.MemoryPeak = schemas.Size(n)
		}
	}
	if g.cpu == "" {
		return
	}
	if g.v2 {
		if n, ok := keyed(filepath.Join(g.cpu, "cpu.stat"), "usage_usec"); ok {
			u.CPUMillis = n / 1000
		}
	} else if n, ok := number(filepath.Join(g.cpu, "cpuacct.usage")); ok {
		u.CPUMillis = time.Duration(n).Milliseconds()
	}
}

func number(path string) (int64, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n, err == nil
}

func keyed(path, key string) (int64, bool) {
	f, err := os.Open(path)
	if err != nil {
		return 0, false
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if k, v, ok := strings.Cut(s.Text(), " "); ok && k == key {
			n, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}

// isInitOf says whether the process is PID 1 of the container: of a pid namespace
// below ours, and in a cgroup that bears the container's id.
func isInitOf(pid int, container string) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "NSpid:"); ok { // from our namespace to its own
			f := strings.Fields(v)
			if len(f) < 2 || f[len(f)-1] != "1" {
				return false
			}
		}
	}
	paths, err := processCgroups(pid)
	if err != nil {
		return false
	}
	for _, p := range paths {
		if slices.ContainsFunc(strings.Split(p, "/"), func(s string) bool { return strings.Contains(s, container) }) {
			return true
		}
	}
	return false
}
