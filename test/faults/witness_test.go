//go:build faults

package faults

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/initproto"
)

// witness sees in /proc which real containers live: it asks no Docker, no init and no
// agent, so it also knows while those are dead. It looks each 20 ms. The life of an
// attempt is then what was certainly seen, and never longer than the truth: from the
// first sight of its init until the last sight of another process beside it, or of init
// having had one. An init that is alone has nothing of the task left, and waits for an
// agent that takes its word; or it never had any, and is of a start that was broken off.
type witness struct {
	homes []home

	mu     sync.Mutex
	spaces map[string]*sight // under mu: by PID namespace, whose names are used again
	pids   map[int]*sight    // under mu
	past   []*sight          // under mu: containers that are gone
}

// home is the state folder of one worker: where its bind mounts come from.
type home struct {
	worker       schemas.WorkerID
	device, root string
}

// sight is one container.
type sight struct {
	schemas.Assignment
	init        int
	looks       int // for whose it is
	ours        bool
	first, last time.Duration
	ran         bool // another process than init was seen, or init has waited for one
}

// mounts gives the fields of each line of a mountinfo: device 2, root 3, mount point 4.
func mounts(pid string) (list [][]string) {
	b, _ := os.ReadFile("/proc/" + pid + "/mountinfo")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 {
			list = append(list, f)
		}
	}
	return list
}

func homeOf(worker, dir string) (h home, err error) {
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return h, err
	}
	longest := 0
	for _, f := range mounts("self") {
		rel, err := filepath.Rel(f[4], dir)
		if err == nil && rel != ".." && !strings.HasPrefix(rel, "../") && len(f[4]) >= longest {
			longest = len(f[4])
			h = home{schemas.WorkerID(worker), f[2], filepath.Join(f[3], rel)}
		}
	}
	if longest == 0 {
		return h, fmt.Errorf("%s is on no mount", dir)
	}
	return h, nil
}

func (w *witness) watch(ctx context.Context) {
	w.spaces, w.pids = map[string]*sight{}, map[int]*sight{}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		w.look()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (w *witness) look() {
	began := Now()
	proc, err := os.Open("/proc")
	if err != nil {
		return
	}
	names, _ := proc.Readdirnames(-1)
	proc.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	there := make(map[int]bool, len(names))
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			there[pid] = true
		}
	}
	// A namespace is gone with its init; its name may be another's in the same moment.
	maps.DeleteFunc(w.spaces, func(_ string, s *sight) bool {
		if s.ours && !there[s.init] {
			w.past = append(w.past, s)
		}
		return !there[s.init]
	})
	maps.DeleteFunc(w.pids, func(pid int, s *sight) bool { return !there[pid] || !there[s.init] })
	for _, pid := range slices.Sorted(maps.Keys(there)) { // an init before its children
		name := strconv.Itoa(pid)
		s, known := w.pids[pid]
		if !known {
			space, err := os.Readlink("/proc/" + name + "/ns/pid")
			if err != nil {
				continue
			}
			if s = w.spaces[space]; s == nil {
				s = &sight{init: pid}
				w.spaces[space] = s
			}
			w.pids[pid] = s
		}
		if !s.ours && s.looks < 250 {
			s.looks++
			w.identify(s)
		}
		switch {
		case !s.ours:
		case pid != s.init:
			s.ran, s.last = true, began
		case !s.ran:
			s.ran = hadChild(pid)
		}
	}
}

// hadChild says whether a process has waited for a child: its page faults are counted.
func hadChild(pid int) bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	return len(f) > 8 && f[8] != "0"
}

var attemptFolder = regexp.MustCompile(`/run/dayfly-(t-[0-9a-z]+)-([0-9]+)/c$`)

// identify finds out whose container a namespace is, by where its control folder comes
// from. While runc prepares it that is not to be seen yet.
func (w *witness) identify(s *sight) {
	for _, f := range mounts(strconv.Itoa(s.init)) {
		found := attemptFolder.FindStringSubmatch(f[3])
		if found == nil || f[4] != initproto.Folder+"/c" {
			continue
		}
		for _, h := range w.homes {
			if f[2] == h.device && strings.HasPrefix(f[3], strings.TrimSuffix(h.root, "/")+"/") {
				attempt, _ := strconv.Atoi(found[2])
				s.Assignment = schemas.Assignment{Task: schemas.TaskID(found[1]), Attempt: attempt, Worker: h.worker}
				s.ours, s.first, s.last = true, Now(), 0
			}
		}
	}
}

// lives gives what was seen. Of two containers of one attempt that in which nothing was
// run is left out: a start that was broken off may be begun again.
func (w *witness) lives() (list []Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	ran := map[schemas.Assignment]bool{}
	all := append(slices.Collect(maps.Values(w.spaces)), w.past...)
	slices.SortFunc(all, func(a, b *sight) int { // those that ran first
		return cmp.Or(strings.Compare(fmt.Sprint(b.ran), fmt.Sprint(a.ran)), cmp.Compare(a.first, b.first))
	})
	for _, s := range all {
		if !s.ours || !s.ran && ran[s.Assignment] {
			continue
		}
		ran[s.Assignment] = true
		list = append(list, Event{T: s.first, Life: &Life{Do: "start", Assignment: s.Assignment, Idle: !s.ran}})
		if slices.Contains(w.past, s) {
			list = append(list, Event{T: max(s.first, s.last), Life: &Life{Do: "end", Assignment: s.Assignment}})
		}
	}
	slices.SortStableFunc(list, func(a, b Event) int { return int(a.T - b.T) })
	return list
}
