package main

import (
	"bytes"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Which processes belong to a program? Those of its session and process group, their
// children, and for a daemon, which has left both and whose parents are gone, a variable
// in its environment. A process that has taken that away too, and is nobody's child any
// more, is known to nobody: it ends with the run, and is bounded by the task's limits.

// maxEnviron is how much is read of an environment, where the mark may be anywhere.
const maxEnviron = 256 << 10

// each sends a signal to all processes of the program, and says how many there were.
func (p *program) each(sig unix.Signal) int {
	pids := p.family()
	for _, pid := range pids {
		_ = unix.Kill(pid, sig)
	}
	return len(pids)
}

// kill kills until none is left: what is forked between a look and the signal is found by
// the next look. A program that forks faster than it is killed meets the limit of pids.
func (p *program) kill() {
	for range 64 {
		if p.each(unix.SIGKILL) == 0 {
			return
		}
	}
}

func (p *program) family() (pids []int) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	mark := append([]byte{0}, p.mark+"\x00"...)
	parents, in := map[int]int{}, map[int]bool{}
	self := os.Getpid()
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == self {
			continue
		}
		parent, group, session, ok := status(name)
		if !ok {
			continue
		}
		parents[pid] = parent
		in[pid] = p.alive && (group == p.pid || session == p.pid) || marked(name, mark)
	}
	for changed := true; changed; {
		changed = false
		for pid, parent := range parents {
			if !in[pid] && in[parent] {
				in[pid], changed = true, true
			}
		}
	}
	for pid, is := range in {
		if is {
			pids = append(pids, pid)
		}
	}
	return pids
}

// status reads what the kernel says of a process that is no zombie.
func status(pid string) (parent, group, session int, ok bool) {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return 0, 0, 0, false
	}
	// The name of the program, which is its own choice, is between parentheses.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 4 || bytes.ContainsAny(fields[0], "ZX") {
		return 0, 0, 0, false
	}
	parent, _ = strconv.Atoi(string(fields[1]))
	group, _ = strconv.Atoi(string(fields[2]))
	session, _ = strconv.Atoi(string(fields[3]))
	return parent, group, session, true
}

// marked says whether the environment of a process has the mark.
func marked(pid string, mark []byte) bool {
	f, err := os.Open("/proc/" + pid + "/environ")
	if err != nil {
		return false
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, maxEnviron))
	return bytes.Contains(append([]byte{0}, b...), mark)
}
