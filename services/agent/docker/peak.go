package docker

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// peak is the most memory that a container has taken since a moment. Version 1 of cgroups has
// one mark for all, which is set back. In version 2 the mark is set back for one open file alone, and
// before Linux 6.12 not at all: then it tells only if it has moved since, and the
// most that was seen in passing has to do.
type peak struct {
	mu   sync.Mutex
	file *os.File // under mu; nil: there is none
	was  int64    // the mark at that moment; 0 if it was set back
	seen int64    // under mu
}

// newPeak begins at this moment. Close it.
func (g cgroup) newPeak() *peak {
	p := &peak{}
	if g.memory == "" {
		return p
	}
	name := "memory.max_usage_in_bytes"
	if g.v2 {
		name = "memory.peak"
	}
	path := filepath.Join(g.memory, name)
	if f, err := os.OpenFile(path, os.O_RDWR, 0); err == nil {
		if _, err = f.WriteAt([]byte("0"), 0); err == nil {
			p.file = f
			return p
		}
		_ = f.Close()
	}
	if f, err := os.Open(path); err == nil {
		p.file = f
		p.was = p.mark()
	}
	return p
}

// most is the most until now, when it takes so much.
func (p *peak) most(now int64) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = max(p.seen, now)
	if m := p.mark(); m > p.was {
		return max(m, p.seen)
	}
	return p.seen
}

// mark reads the kernel's, 0 if there is none.
func (p *peak) mark() int64 {
	if p.file == nil {
		return 0
	}
	var buf [32]byte
	n, err := p.file.ReadAt(buf[:], 0)
	if err != nil && err != io.EOF {
		return 0
	}
	m, _ := strconv.ParseInt(strings.TrimSpace(string(buf[:n])), 10, 64)
	return m
}

func (p *peak) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.file == nil {
		return nil
	}
	err := p.file.Close()
	p.file = nil
	return err
}
