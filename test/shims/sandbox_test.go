package shims

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
)

// sandbox holds a container against the "Recommended sandbox flags (MVP “final”)" of
// gridx's document, each in its words. limits are those of the job, in CPUs and bytes.
func sandbox(c container.InspectResponse, limits []string) error {
	h := c.HostConfig
	cpus, _ := strconv.ParseFloat(limits[0], 64)
	memory, _ := strconv.ParseInt(limits[1], 10, 64)
	mounted := map[string]bool{} // by place: writable
	for _, m := range c.Mounts {
		mounted[m.Destination] = m.RW
	}
	network := string(h.NetworkMode)
	var wrong []string
	check := func(flag string, ok bool, have any) {
		if !ok {
			wrong = append(wrong, fmt.Sprintf("%s: docker inspect has %v", flag, have))
		}
	}
	check("--read-only", h.ReadonlyRootfs, h.ReadonlyRootfs)
	check("--cap-drop=ALL", slices.Equal(h.CapDrop, []string{"ALL"}) && len(h.CapAdd) == 0, h.CapDrop)
	check("--security-opt=no-new-privileges:true", slices.ContainsFunc(h.SecurityOpt, func(o string) bool {
		return strings.HasPrefix(o, "no-new-privileges") && !strings.HasSuffix(o, "false")
	}), h.SecurityOpt)
	check("--pids-limit=256", h.PidsLimit != nil && *h.PidsLimit == 256+initPids, h.PidsLimit)
	nano := h.NanoCPUs
	if nano == 0 && h.CPUPeriod > 0 {
		nano = h.CPUQuota * 1e9 / h.CPUPeriod
	}
	check("--cpus=<job.limit.cpus>", nano == int64(cpus*1e9), nano)
	check("--memory=<job.limit.memory>", h.Memory == memory+initMemory && h.MemorySwap == h.Memory, h.Memory) // and no swap
	check("--network=none", network == "none" || c.Config.NetworkDisabled, network)                           //nolint:staticcheck // that is how it is said
	check("--user 1000:1000", c.Config.User == "1000:1000", c.Config.User)
	tmp := h.Tmpfs["/tmp"]
	check("--tmpfs /tmp:rw,size=256m", strings.Contains(tmp, "size=268435456") && !strings.Contains(tmp, "ro,"), tmp)
	rw, there := mounted["/work/input"]
	check("-v <jobdir>/input:/work/input:ro", there && !rw, c.Mounts)
	_, tmpfs := h.Tmpfs["/work/output"]
	check("-v <jobdir>/output:/work/output:rw", tmpfs || mounted["/work/output"], h.Tmpfs)
	// "No host file access except that job's temp dir": of what is mounted, only the output can be written.
	for at, rw := range mounted {
		check("no host file access", !rw || at == "/work/output", at)
	}
	// Stricter than the document: a seccomp profile of our own, no devices, an IPC namespace, no restart.
	check("seccomp", slices.ContainsFunc(h.SecurityOpt, func(o string) bool { return strings.HasPrefix(o, "seccomp=") && o != "seccomp=unconfined" }), len(h.SecurityOpt))
	check("no devices", len(h.Devices) == 0 && !h.Privileged, h.Devices)
	check("private IPC", h.IpcMode == "private" || h.IpcMode == "none", h.IpcMode)
	if len(wrong) > 0 {
		return fmt.Errorf("not in the sandbox:\n%s", strings.Join(wrong, "\n"))
	}
	return nil
}
