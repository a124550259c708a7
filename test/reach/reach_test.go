// Package reach runs programs and consoles in real containers without a network, and
// puts and gets their files.
package reach

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// patience bounds each wait for a fact.
const patience = time.Minute

// binaries builds dayfly, an image with a shell, and one that is one static program.
var binaries = sync.OnceValues(func() (built, error) {
	dir, err := os.MkdirTemp("", "dayfly-reach-")
	if err != nil {
		return built{}, err
	}
	name := strings.ToLower(rand.Text()[:10])
	b := built{dir: dir, shell: "dayfly-shell:" + name, scratch: "dayfly-scratch:" + name}
	if b.bin, err = harness.Binaries(context.Background(), dir); err != nil {
		return b, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	if err := harness.MakeImage(ctx, b.scratch); err != nil {
		return b, err
	}
	return b, harness.MakeShell(ctx, b.shell, nil)
})

type built struct{ dir, bin, shell, scratch string }

func TestMain(m *testing.M) {
	code := m.Run()
	b, _ := binaries()
	for _, image := range []string{b.shell, b.scratch} {
		if image != "" {
			_ = harness.RemoveImage(context.Background(), image)
		}
	}
	if b.dir != "" {
		os.RemoveAll(b.dir)
	}
	os.Exit(code)
}

func built1(t testing.TB) built {
	t.Helper()
	b, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// site is a dayfly in one process, with real containers.
type site struct {
	testing.TB
	built
	up *harness.Up
	*client.Client
}

func start(t testing.TB, args ...string) *site {
	t.Helper()
	b := built1(t)
	up := harness.NewFor(t, b.bin, args...)
	if err := up.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(up.URL)
	if err != nil {
		t.Fatal(err)
	}
	return &site{t, b, up, c}
}

// create asks for a task that sleeps, and changes its spec as edit does.
func create(t testing.TB, c *client.Client, image string, edit func(*schemas.Spec)) schemas.Task {
	t.Helper()
	spec := schemas.Spec{Image: image, Command: []string{"sleep", "1h"}, TTL: schemas.Duration(10 * time.Minute),
		Resources: schemas.Resources{Memory: 128 << 20, CPUs: 1, Disk: 32 << 20}}
	if edit != nil {
		edit(&spec)
	}
	task, err := c.Create(deadline(t), spec, client.CreateOptions{Wait: client.UntilRunning})
	if err != nil {
		t.Fatal(err)
	}
	return task
}

// run is create for one that must run.
func (s *site) run(image string, edit func(*schemas.Spec)) schemas.TaskID {
	s.Helper()
	task := create(s, s.Client, image, edit)
	if task.State != schemas.Running {
		s.Fatalf("%s: %s %s", task.State, task.Reason, task.Message)
	}
	return task.ID
}

func (s *site) sh(id schemas.TaskID, script string) schemas.ExecResult {
	s.Helper()
	res, err := s.Exec(deadline(s), id, schemas.ExecRequest{Command: []string{"sh", "-c", script}})
	if err != nil {
		s.Fatal(err)
	}
	return res
}

// refusedAs holds an error against a status and a code.
func refusedAs(t testing.TB, what string, err error, status int, code schemas.Code) {
	t.Helper()
	var e *schemas.Error
	if !errors.As(err, &e) || e.Status != status || e.Code != code {
		t.Errorf("%s: %v, want %d %s", what, err, status, code)
	}
}

// metric adds up the series of a counter or gauge whose labels hold part.
func metric(t testing.TB, admin, name, part string) (sum float64) {
	t.Helper()
	res, err := http.Get(admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^`+regexp.QuoteMeta(name)+`(\{.*\})? (.*)$`).FindAllSubmatch(b, -1) {
		if strings.Contains(string(m[1]), part) {
			v, err := strconv.ParseFloat(string(m[2]), 64)
			if err != nil {
				t.Fatal(err)
			}
			sum += v
		}
	}
	return sum
}

// until waits for a fact.
func until(t testing.TB, what string, fact func() error) {
	t.Helper()
	if err := harness.Poll(deadline(t), fact); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func want(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}
