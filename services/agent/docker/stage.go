package docker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

const (
	cleanWithin = 20 * time.Second
	cleanMemory = 24 << 20 // what the program that cleans may take
	limitSlack  = 1 << 20  // a limit that is as near as this is not moved
	buildFiles  = 4096     // that a compile stage may leave
	selfMost    = 100 * time.Millisecond
	// A program that needs its last page for data loses its own code to the kernel's search for one,
	// and reads it again and again: some ten major faults a millisecond of its processor time were
	// seen, beside some hundred in all for one that is loaded once.
	thrashFaults = 256
)

// stage implements agent.Stage.
type stage struct {
	*foreground
	before use
	cgroup cgroup
	peak   *peak
	memory schemas.Size

	once sync.Once
	used agent.StageUse // once the program has ended and once was done
}

// Close implements agent.Foreground.
func (s *stage) Close() error {
	return errors.Join(s.foreground.Close(), s.peak.close())
}

// use is what the cgroup has counted.
type use struct {
	cpu    time.Duration
	memory int64 // all of it
	fixed  int64 // of it, what cannot be reclaimed
	faults int64 // major ones: a page had to be read again
	oom    int64
}

// Stage implements agent.Attempt.
func (a *attempt) Stage(ctx context.Context, c agent.Command, memory schemas.Size) (agent.Stage, error) {
	if err := a.clean(ctx); err != nil {
		return nil, err
	}
	a.mu.Lock()
	g := a.cgroup
	a.mu.Unlock()
	before := g.use()
	// What the kernel keeps for earlier programs can be taken back: it adds nothing to the bound.
	if err := a.limit(ctx, min(before.fixed, 2*initMemory)+int64(memory), limitSlack); err != nil {
		return nil, err
	}
	peak := g.newPeak()
	a.setTidy(false)
	p, err := a.exec(ctx, initproto.Request{Op: initproto.OpExec, Argv: c.Argv, Env: c.Env, Dir: c.Dir, Alone: true}, agent.StdioPipes, agent.Window{})
	if err != nil {
		_ = peak.close()
		return nil, err
	}
	return &stage{foreground: p, before: before, cgroup: g, peak: peak, memory: memory}, nil
}

// setTidy keeps init's word on the places to write. It holds until the next program is started.
func (a *attempt) setTidy(tidy bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tidy = tidy
}

// clean empties the places to write, with room for the program that does it. It has nothing
// to do if init, which looks after each program, has just found them empty.
func (a *attempt) clean(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, cleanWithin)
	defer cancel()
	a.mu.Lock()
	g, tidy := a.cgroup, a.tidy
	a.mu.Unlock()
	if tidy {
		return nil
	}
	if now := g.use(); now.fixed > 0 {
		if limit := a.memoryLimit(); limit > 0 && limit < now.fixed+cleanMemory {
			if err := a.limit(ctx, now.fixed+cleanMemory, 0); err != nil {
				return err
			}
		}
	}
	p, err := a.exec(ctx, initproto.Request{Op: initproto.OpExec, Argv: []string{initproto.InitPath, initproto.CleanMode}, Bare: true, Alone: true}, agent.StdioNone, agent.Window{})
	if err != nil {
		return err
	}
	defer p.Close()
	select {
	case <-p.Done():
	case <-ctx.Done():
		p.Stop(0)
		<-p.Done()
	}
	exit, err := p.Exit()
	switch {
	case err != nil:
		return err
	case exit.Code != 0:
		return fmt.Errorf("%w (exit code %d)", agent.ErrUnclean, exit.Code)
	}
	return nil
}

// limit bounds the container's memory, if the bound there is is not as near as slack: in its
// cgroup, or where that cannot be written by way of Docker, which starts a process for it.
func (a *attempt) limit(ctx context.Context, memory, slack int64) error {
	memory = max(memory, schemas.MinMemory)
	if now := a.memoryLimit(); now >= memory-slack && now <= memory+slack {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, dockerWithin)
	defer cancel()
	a.mu.Lock()
	g, id := a.cgroup, a.container
	a.mu.Unlock()
	if g.bound(id, memory) == nil {
		return nil
	}
	began := time.Now()
	_, err := a.rt.docker.ContainerUpdate(ctx, id, client.ContainerUpdateOptions{Resources: &container.Resources{Memory: memory, MemorySwap: memory}})
	a.rt.metrics.done(ctx, "update", began, err)
	if err != nil {
		return fmt.Errorf("bound its memory: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.limited = memory
	return nil
}

// memoryLimit is the present bound, 0 if it is not known.
func (a *attempt) memoryLimit() int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n, ok := a.cgroup.limit(); ok {
		return n
	}
	return a.limited
}

// Used implements agent.Stage.
func (s *stage) Used() agent.StageUse {
	select {
	case <-s.done:
	default:
		return s.measure(initproto.Exit{})
	}
	s.once.Do(func() { s.used = s.measure(s.said) })
	return s.used
}

// measure takes the cgroup's word, and that of init where it says more: what it says of itself is
// believed as far as that can be.
func (s *stage) measure(said initproto.Exit) agent.StageUse {
	now := s.cgroup.use()
	u := agent.StageUse{CPU: max(said.CPU, 0), Memory: schemas.Size(max(said.MaxRSS, 0))}
	if now.cpu > 0 {
		u.CPU = max(u.CPU, now.cpu-s.before.cpu-min(max(said.Self, 0), selfMost))
	}
	u.Memory = max(u.Memory, schemas.Size(s.peak.most(now.memory)-s.before.memory))
	faults := now.faults - s.before.faults
	u.Thrashing = now.fixed-s.before.fixed >= int64(s.memory)*7/8 && faults >= thrashFaults && faults >= u.CPU.Milliseconds()
	u.Memory = min(u.Memory, s.memory)
	if u.OutOfMemory = now.oom > s.before.oom; u.OutOfMemory {
		u.Memory = s.memory
	}
	return u
}

// use reads what the cgroup has counted so far.
func (g cgroup) use() (u use) {
	if g.cpu != "" {
		if g.v2 {
			n, _ := keyed(filepath.Join(g.cpu, "cpu.stat"), "usage_usec")
			u.cpu = time.Duration(n) * time.Microsecond
		} else {
			n, _ := number(filepath.Join(g.cpu, "cpuacct.usage"))
			u.cpu = time.Duration(n)
		}
	}
	if g.memory == "" {
		return u
	}
	u.oom, _ = g.oomKills()
	name := "memory.usage_in_bytes"
	if g.v2 {
		name = "memory.current"
	}
	u.memory, _ = number(filepath.Join(g.memory, name))
	u.fixed = u.memory
	stat, _ := os.ReadFile(filepath.Join(g.memory, "memory.stat"))
	for line := range strings.Lines(string(stat)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), " ")
		n, _ := strconv.ParseInt(v, 10, 64)
		switch k {
		case "inactive_file", "active_file":
			u.fixed -= n
		case "pgmajfault":
			u.faults = n
		}
	}
	u.fixed = max(u.fixed, 0)
	return u
}

func (g cgroup) limit() (int64, bool) {
	if g.memory == "" {
		return 0, false
	}
	if g.v2 {
		return number(filepath.Join(g.memory, "memory.max"))
	}
	return number(filepath.Join(g.memory, "memory.limit_in_bytes"))
}

// bound sets the limit of memory, and of memory and swap together, of a cgroup that dockerd has
// made itself: systemd would undo that in one of its own (docker-ID.scope).
func (g cgroup) bound(container string, memory int64) error {
	if container == "" || filepath.Base(g.memory) != container {
		return errors.New("not a cgroup of dockerd's own")
	}
	set := func(name string) error {
		f, err := os.OpenFile(filepath.Join(g.memory, name), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString(strconv.FormatInt(memory, 10))
		return errors.Join(err, f.Close())
	}
	if g.v2 { // swap is bounded by itself, to none
		return set("memory.max")
	}
	// Both together are never less than memory alone; a kernel that does not count swap has no such file.
	order := []string{"memory.limit_in_bytes", "memory.memsw.limit_in_bytes"}
	if now, _ := g.limit(); now < memory {
		slices.Reverse(order)
	}
	for _, name := range order {
		if err := set(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Build implements agent.Attempt. No process of the task is there, and so nobody changes what is
// copied; what it is made of is hostile all the same: only files and folders are taken,
// none through a link, and no more than the output folder could hold.
func (a *attempt) Build(context.Context) error {
	a.mu.Lock()
	output := a.output
	a.mu.Unlock()
	if output == nil {
		return errors.New("the output folder is out of reach")
	}
	raw, err := output.SyscallConn()
	if err != nil {
		return err
	}
	var from *os.Root
	var room unix.Statfs_t
	if e := raw.Control(func(fd uintptr) {
		if err = unix.Fstatfs(int(fd), &room); err == nil {
			from, err = os.OpenRoot("/proc/self/fd/" + strconv.Itoa(int(fd)))
		}
	}); e != nil || err != nil {
		return errors.Join(e, err)
	}
	defer from.Close()
	place := filepath.Join(a.dir, "input", schemas.BuildFolder)
	if err := os.RemoveAll(place); err != nil { // of an agent that was killed in the midst of it
		return err
	}
	if err := os.Mkdir(place, 0o755); err != nil {
		return err
	}
	to, err := os.OpenRoot(place)
	if err != nil {
		return err
	}
	defer to.Close()
	c := buildCopy{from: from, to: to, bytes: int64(room.Blocks) * room.Bsize, files: buildFiles}
	if err := errors.Join(os.Chmod(place, 0o755), fs.WalkDir(from.FS(), ".", c.one)); err != nil {
		return err
	}
	return nil
}

// buildCopy is what may still be copied.
type buildCopy struct {
	from, to *os.Root
	bytes    int64
	files    int
}

func (c *buildCopy) one(path string, d fs.DirEntry, err error) error {
	if err != nil || path == "." {
		return err
	}
	if !fs.ValidPath(path) {
		return &agent.BuildError{Message: fmt.Sprintf("it leaves %q, whose name is no UTF-8", path)}
	}
	if c.files--; c.files < 0 {
		return &agent.BuildError{Message: fmt.Sprintf("it leaves more than %d files", buildFiles)}
	}
	if d.IsDir() {
		return errors.Join(c.to.Mkdir(path, 0o755), c.to.Chmod(path, 0o755))
	}
	if !d.Type().IsRegular() {
		return nil
	}
	f, err := c.from.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return err
	}
	if c.bytes -= st.Size(); c.bytes < 0 {
		return &agent.BuildError{Message: "it leaves more than its output folder holds"}
	}
	out, err := c.to.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	_, err = out.ReadFrom(f)
	mode := fs.FileMode(0o444)
	if st.Mode()&0o111 != 0 { // for its owner at least, whose the copy is not
		mode = 0o555
	}
	return errors.Join(err, out.Chmod(mode), out.Close())
}
