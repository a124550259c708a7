package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Overlay has, by path, what stands in a source file instead of what is there.
type Overlay map[string]string

// Replace makes old, which must stand there exactly once, new in a file.
func (o Overlay) Replace(file, old, new string) error {
	text, ok := o[file]
	if !ok {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		text = string(b)
	}
	if n := strings.Count(text, old); n != 1 {
		return fmt.Errorf("%s has this %d times, not once:\n%s", file, n, old)
	}
	o[file] = strings.Replace(text, old, new, 1)
	return nil
}

// Build builds dayfly from the sources as o alters them; the files stay as they are.
func (o Overlay) Build(ctx context.Context, out string) error {
	return o.Go(ctx, "build", "-trimpath", "-o", out, "dayfly.dev/cmd/dayfly")
}

// Go runs the go command on the sources as o alters them: "build" and its flags, or "test".
func (o Overlay) Go(ctx context.Context, command string, args ...string) error {
	dir, err := os.MkdirTemp("", "dayfly-overlay-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var list struct{ Replace map[string]string }
	list.Replace = map[string]string{}
	for file, text := range o {
		list.Replace[file] = filepath.Join(dir, fmt.Sprintf("%d.go", len(list.Replace)))
		if err := os.WriteFile(list.Replace[file], []byte(text), 0o600); err != nil {
			return err
		}
	}
	b, err := json.Marshal(list)
	if err != nil {
		return err
	}
	overlay := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlay, b, 0o600); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", append([]string{command, "-overlay", overlay}, args...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.WaitDelay = time.Second
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s with altered sources: %w\n%s", command, err, b)
	}
	return nil
}

// ClockEnv is by how much the clock of a process is off, as a duration, in a dayfly
// that was built with Clock.
const ClockEnv = "DAYFLY_TEST_CLOCK"

// Clock makes the wall clock of a process be off by what ClockEnv says. Its monotonic
// clock, and so every timer and every measured length, is right.
func (o Overlay) Clock(ctx context.Context) error {
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("ask for GOROOT: %w", err)
	}
	file := filepath.Join(strings.TrimSpace(string(root)), "src", "time", "time.go")
	const now = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
	if err := o.Replace(file, now, now+"\tsec += clockOff\n"); err != nil {
		return err
	}
	o[file] += `
var clockOff = func() int64 {
	text, _ := syscall.Getenv("` + ClockEnv + `")
	off, _ := ParseDuration(text)
	return int64(off / Second)
}()
`
	return o.Replace(file, "\t_ \"unsafe\" // for go:linkname\n", "\t\"syscall\"\n\t_ \"unsafe\" // for go:linkname\n")
}
