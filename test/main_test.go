// Package test runs dayfly whole: the real binary, the real NATS in it, the real
// Docker Engine.
package test

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// binaries builds dayfly and dayfly-init once for all tests, into a folder of
// their own.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "dayfly-bin-")
	if err != nil {
		return "", err
	}
	for _, b := range []struct{ out, pkg, cgo string }{
		{"dayfly", "dayfly.dev/cmd/dayfly", "0"},
		{"dayfly-init", "dayfly.dev/services/agent/cmd/dayfly-init", "0"},
	} {
		cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(dir, b.out), b.pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+b.cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			return dir, fmt.Errorf("build %s: %w\n%s", b.pkg, err, out)
		}
	}
	return dir, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, _ := binaries(); dir != "" {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

func randomName() string { return strings.ToLower(rand.Text()[:12]) }

// newUp prepares a dayfly that is taken away with all it left when the test ends.
func newUp(t testing.TB, args ...string) *harness.Up {
	t.Helper()
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return harness.NewFor(t, filepath.Join(dir, "dayfly"), args...)
}

// testImage makes the guest image under a name of its own.
func testImage(t testing.TB) string {
	t.Helper()
	name := "dayfly-test:" + randomName()
	if err := harness.MakeImage(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := harness.RemoveImage(context.Background(), name); err != nil {
			t.Error(err)
		}
	})
	return name
}

// countLog is what `count n` writes, spamLog what `spam bytes` writes.
func countLog(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%d\n", i+1)
	}
	return b.String()
}

func spamLog(bytes int) string {
	var b strings.Builder
	for i := 0; b.Len() < bytes; i++ {
		fmt.Fprintf(&b, "o%062d\n", i)
	}
	return b.String()[:bytes]
}

func history(t schemas.Task) string {
	var b strings.Builder
	for _, c := range t.History {
		fmt.Fprintf(&b, "  %s %-9s %s %s attempt %d by %s %s\n", c.At.Format("15:04:05.000"), c.State, c.Reason, c.Worker, c.Attempt, c.By, c.Note)
	}
	return b.String()
}

// lives records when containers of a cluster lived, from Docker's own events,
// which it follows from before the first of them.
type lives struct {
	mu   sync.Mutex
	seen map[string]*life // by container
}

type life struct {
	task, attempt string
	start, die    int64 // ns; 0: not seen
}

func watchContainers(t *testing.T, cluster string) *lives {
	t.Helper()
	engine, err := client.New(client.FromEnv)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	events := engine.Events(ctx, client.EventsListOptions{
		Filters: make(client.Filters).Add("type", "container").Add("label", "dayfly.cluster="+cluster)})
	l := &lives{seen: map[string]*life{}}
	var done sync.WaitGroup
	done.Go(func() {
		for {
			select {
			case m := <-events.Messages:
				l.add(m.Actor.ID, string(m.Action), m.TimeNano, m.Actor.Attributes)
			case <-events.Err:
				return
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		done.Wait()
		engine.Close()
	})
	return l
}

func (l *lives) add(id, action string, at int64, labels map[string]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.seen[id]
	if c == nil {
		c = &life{task: labels["dayfly.task"], attempt: labels["dayfly.attempt"]}
		l.seen[id] = c
	}
	switch action {
	case "start":
		c.start = at
	case "die":
		c.die = at
	}
}

func (l *lives) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, c := range l.seen {
		if c.start > 0 {
			n++
		}
	}
	return n
}

// overlaps lists attempts of one task that lived at the same time, and attempts
// that were started twice.
func (l *lives) overlaps() (list []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	byTask := map[string][]*life{}
	for _, c := range l.seen {
		if c.start > 0 {
			byTask[c.task] = append(byTask[c.task], c)
		}
	}
	for task, all := range byTask {
		slices.SortFunc(all, func(a, b *life) int { return int(a.start - b.start) })
		for i := 1; i < len(all); i++ {
			before, c := all[i-1], all[i]
			if before.die == 0 || before.die > c.start {
				list = append(list, fmt.Sprintf("%s: attempts %s and %s by %d ms", task, before.attempt, c.attempt, (before.die-c.start)/1e6))
			}
			a, _ := strconv.Atoi(before.attempt)
			b, _ := strconv.Atoi(c.attempt)
			if b <= a {
				list = append(list, fmt.Sprintf("%s: attempt %d was started after attempt %d", task, b, a))
			}
		}
	}
	return list
}
