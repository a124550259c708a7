package docker

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

// Labels of every container.
const (
	LabelCluster = "dayfly.cluster"
	LabelWorker  = "dayfly.worker"
	LabelEpoch   = "dayfly.epoch"
	LabelTask    = "dayfly.task"
	LabelAttempt = "dayfly.attempt"
)

// What a container gets beyond the spec.
const (
	initMemory = 8 << 20 // measured: about 2 MiB, and the pages of a large run request
	initPids   = 16      // threads of init's Go runtime: 5 to 8

	tmpBytes    = 64 << 20
	tmpInodes   = 16 << 10
	coverBytes  = 16 << 20 // of a tmpfs over a VOLUME of the image
	shmBytes    = 64 << 20
	openFiles   = 1024
	openFileMax = 16 << 10
	lockedBytes = 64 << 10
	oomScore    = 500 // of init; the task's processes are 400 above
)

// ContainerName is the name of an attempt's container. It is deterministic: where
// the outcome of a request is unknown, the name tells.
func ContainerName(a schemas.Assignment) string {
	return fmt.Sprintf("dayfly-%s-%d", a.Task, a.Attempt)
}

// image is what a container needs to know of its image.
type image struct {
	agent.Image
	entrypoint, command, env, volumes []string
	user, workdir                     string
}

// box is everything that the container of one attempt is made from.
type box struct {
	cluster string
	a       schemas.Assignment
	spec    schemas.Spec
	image   image
	dir     string
	init    string // path of the init binary on the host
	permit  string // permit folder on the host
	seccomp string
	cpus    float64 // of the host
	v2      bool    // cgroup version 2
	gpus    []int   // numbers of its devices
	bounds  bool    // the storage driver can bound a writable root
}

// argv is the command as Docker composes it: an entrypoint of the task drops the
// image's own command.
func (b *box) argv() []string {
	entry, cmd := b.image.entrypoint, b.image.command
	if b.spec.Entrypoint != nil {
		entry, cmd = b.spec.Entrypoint, nil
	}
	if b.spec.Command != nil {
		cmd = b.spec.Command
	}
	return slices.Concat(entry, cmd)
}

// runtimeEnv are variables that the Go runtime of init would obey.
var runtimeEnv = []string{"GODEBUG", "GOGC", "GOMAXPROCS", "GOMEMLIMIT", "GOTRACEBACK"}

// nvidiaDevices is the variable by which an image names the GPUs that it wants. A task
// gets those of its device request, and no others.
const nvidiaDevices = "NVIDIA_VISIBLE_DEVICES"

// env is what init lays over its own environment: the spec's variables, and those
// of the image that init was not given.
func (b *box) env() []string {
	var out []string
	for _, e := range b.image.env {
		if k, _, _ := strings.Cut(e, "="); slices.Contains(runtimeEnv, k) {
			out = append(out, e)
		}
	}
	named := func(e string) bool { return strings.HasPrefix(e, "TERM=") }
	if b.spec.TTY && !slices.ContainsFunc(b.image.env, named) {
		out = append(out, "TERM=xterm") // as Docker does; the spec's own goes before it
	}
	for _, k := range slices.Sorted(maps.Keys(b.spec.Env)) {
		out = append(out, k+"="+b.spec.Env[k])
	}
	return out
}

// user is the container's user and, where it is known by number, the owner of the
// places to write.
func (b *box) user() (name string, uid, gid int, known bool) {
	name = b.spec.User
	if name == "" {
		name = schemas.DefaultUser
	}
	if name == "image" {
		name = b.image.user
		if name == "" {
			name = "0:0"
		}
	}
	u, g, ok := strings.Cut(name, ":")
	uid, err := strconv.Atoi(u)
	if err != nil {
		return name, 0, 0, false
	}
	if !ok {
		return name, uid, 0, true
	}
	gid, err = strconv.Atoi(g)
	return name, uid, gid, err == nil
}

// root says whether the user is root, as far as the name tells.
func (b *box) root() bool {
	name, _, _, _ := b.user()
	name, _, _ = strings.Cut(name, ":")
	return name == "0" || name == "root"
}

// capabilities are those of the task. What may become another user could not be ended by
// init, which is root then, without KILL.
func (b *box) capabilities() []string {
	names := b.spec.CapAdd
	if slices.Contains(names, "SETUID") && !slices.Contains(names, "KILL") {
		names = append(slices.Clone(names), "KILL")
	}
	return names
}

// tmpfs gives the options of a tmpfs that belongs to the task's user. Where the
// image has the folder already, runc 1.1 keeps the folder's mode and ignores ours;
// uid and gid are always obeyed, so the user may write whatever the mode is. The
// sizes count in the task's memory. exec: noexec would break compilers, and
// memfd_create gets around it.
func (b *box) tmpfs(size schemas.Size, inodes int64) string {
	o := fmt.Sprintf("rw,exec,nosuid,nodev,size=%d,nr_inodes=%d", int64(size), inodes)
	if _, uid, gid, ok := b.user(); ok {
		return o + fmt.Sprintf(",mode=0755,uid=%d,gid=%d", uid, gid)
	}
	return o + ",mode=1777"
}

// inodesFor bounds how many files a tmpfs of a size may hold.
func inodesFor(size schemas.Size) int64 { return min(max(int64(size)/4096, 256), 256<<10) }

// options is the whole sandbox: DESIGN.md section 7, field by field. The test of
// its inspect JSON lists every field that matters.
func (b *box) options() client.ContainerCreateOptions {
	user, _, _, _ := b.user()
	stopTimeout := 10
	workdir := b.spec.Workdir
	if workdir == "" {
		workdir = b.image.workdir
	}
	var hidden []string
	for _, e := range b.image.env {
		if k, _, _ := strings.Cut(e, "="); slices.Contains(runtimeEnv, k) {
			hidden = append(hidden, k) // a name without "=" takes the image's variable away
		}
		if strings.HasPrefix(e, nvidiaDevices+"=") { // NVIDIA's runtime, where it is the default, would obey
			hidden = append(hidden, nvidiaDevices+"=void")
		}
	}
	config := &container.Config{
		Hostname:        "task",
		User:            user,
		Env:             hidden,
		Entrypoint:      b.init1(),
		Healthcheck:     &container.HealthConfig{Test: []string{"NONE"}},
		Image:           b.image.ID,
		WorkingDir:      workdir,
		NetworkDisabled: true, // no libnetwork sandbox: half the start time up to Engine 27
		StopSignal:      "SIGTERM",
		StopTimeout:     &stopTimeout,
		Labels: map[string]string{
			LabelCluster: b.cluster,
			LabelWorker:  string(b.a.Worker),
			LabelEpoch:   string(b.a.Epoch),
			LabelTask:    string(b.a.Task),
			LabelAttempt: strconv.Itoa(b.a.Attempt),
		},
	}

	tmpfs := map[string]string{
		"/tmp":              b.tmpfs(tmpBytes, tmpInodes),
		b.spec.OutputPath(): b.tmpfs(b.spec.Resources.Disk, inodesFor(b.spec.Resources.Disk)),
	}
	largest := max(schemas.Size(tmpBytes), b.spec.Resources.Disk)
	for p, size := range b.spec.Tmpfs {
		tmpfs[path.Clean(p)] = b.tmpfs(size, inodesFor(size))
		largest = max(largest, size)
	}
	mounts := []mount.Mount{
		readOnly(b.init, initproto.InitPath),
		readOnly(b.dir+"/c", initproto.ControlPath),
		readOnly(b.dir+"/input", b.spec.InputPath()),
		readOnly(b.permit, initproto.PermitPath),
	}
	for _, v := range b.image.volumes {
		v = path.Clean("/" + v)
		taken := tmpfs[v] != "" || slices.ContainsFunc(mounts, func(m mount.Mount) bool { return m.Target == v })
		if v == "/" || taken {
			continue
		}
		// Otherwise Docker makes an anonymous volume, on the host's disk and without bound.
		mounts = append(mounts, mount.Mount{Type: mount.TypeTmpfs, Target: v, TmpfsOptions: &mount.TmpfsOptions{SizeBytes: coverBytes, Mode: 0o1777}})
	}

	memory := int64(b.spec.Resources.Memory) + initMemory
	pids := int64(b.spec.Resources.Pids) + initPids
	cpus := b.spec.Resources.CPUs
	if b.cpus > 0 {
		cpus = min(cpus, schemas.CPUs(b.cpus)) // Docker refuses more than there are
	}
	host := &container.HostConfig{
		NetworkMode:    "none",
		LogConfig:      container.LogConfig{Type: "none"},
		RestartPolicy:  container.RestartPolicy{Name: container.RestartPolicyDisabled},
		CapDrop:        []string{"ALL"},
		CapAdd:         b.capabilities(),
		SecurityOpt:    []string{"no-new-privileges:true", "seccomp=" + b.seccomp},
		ReadonlyRootfs: !b.spec.WritableRoot(),
		IpcMode:        container.IPCModePrivate,
		ShmSize:        min(shmBytes, int64(b.spec.Resources.Memory)),
		OomScoreAdj:    oomScore,
		Tmpfs:          tmpfs,
		Mounts:         mounts,
		Resources: container.Resources{
			Memory:     memory,
			MemorySwap: memory, // memory and swap together: no swap
			NanoCPUs:   cpus.Nano(),
			PidsLimit:  &pids,
			Ulimits: []*container.Ulimit{
				// Not nproc: it counts the user's processes in all containers. The pids limit does.
				{Name: "core", Soft: 0, Hard: 0},
				{Name: "fsize", Soft: int64(largest), Hard: int64(largest)},
				{Name: "memlock", Soft: lockedBytes, Hard: lockedBytes},
				{Name: "msgqueue", Soft: 0, Hard: 0},
				{Name: "nofile", Soft: openFiles, Hard: openFileMax},
			},
		},
	}
	if b.spec.WritableRoot() && b.bounds {
		host.StorageOpt = map[string]string{"size": strconv.FormatInt(int64(b.spec.Resources.Disk), 10)}
	}
	if len(b.gpus) > 0 {
		ids := make([]string, len(b.gpus))
		for i, n := range b.gpus {
			ids[i] = strconv.Itoa(n)
		}
		host.DeviceRequests = []container.DeviceRequest{{DeviceIDs: ids, Capabilities: [][]string{{"gpu", "compute", "utility"}}}}
	}
	if b.v2 {
		host.CgroupnsMode = container.CgroupnsModePrivate
	}
	return client.ContainerCreateOptions{Name: ContainerName(b.a), Config: config, HostConfig: host}
}

// init1 is the command of PID 1. It is told of an output folder that is elsewhere.
func (b *box) init1() []string {
	if at := b.spec.OutputPath(); at != initproto.OutputPath {
		return []string{initproto.InitPath, initproto.OutputMode, at}
	}
	return []string{initproto.InitPath}
}

func readOnly(source, target string) mount.Mount {
	return mount.Mount{
		Type: mount.TypeBind, Source: source, Target: target, ReadOnly: true,
		BindOptions: &mount.BindOptions{Propagation: mount.PropagationRPrivate},
	}
}
