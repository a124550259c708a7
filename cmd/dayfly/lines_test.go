package main

import (
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const sigTERM = syscall.SIGTERM

// lines is a buffer that tests can wait on.
type lines struct {
	mu      sync.Mutex
	b       strings.Builder // under mu
	changed chan struct{}   // under mu; closed and replaced at each write
}

func newLines() *lines { return &lines{changed: make(chan struct{})} }

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
	return l.b.Write(p)
}

func (l *lines) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lines) await(t *testing.T, part string) {
	t.Helper()
	late := time.After(20 * time.Second)
	for {
		l.mu.Lock()
		text, changed := l.b.String(), l.changed
		l.mu.Unlock()
		if strings.Contains(text, part) {
			return
		}
		select {
		case <-changed:
		case <-late:
			t.Fatalf("%q did not come; there is %q", part, text)
		}
	}
}
