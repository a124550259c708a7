//go:build docs

package docs

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"dayfly.dev/test/harness"
)

// The programs of deploy/examples, which are no Go, lead tasks through their lives.
func TestExamples(t *testing.T) {
	image := makeImage(t)
	cluster := strings.TrimPrefix(image, "dayfly-docs:")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := errors.Join(harness.RemoveContainers(ctx, cluster), harness.RemoveImage(ctx, image)); err != nil {
			t.Error(err)
		}
	})
	http := freeAddress(t)
	env := append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "DAYFLY_URL=http://"+http, "RECEIVER="+freeAddress(t))
	start(t, t.TempDir(), "dayfly up --data data --callback-allow 127.0.0.1/32", append(env, serving(http, cluster)...))
	for _, command := range [][]string{{"sh", "life.sh"}, {"python3", "life.py"}} {
		t.Run(command[1], func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, command[0], command[1], image)
			cmd.Dir, cmd.Env, cmd.WaitDelay = "../../deploy/examples", env, time.Second
			out, err := cmd.CombinedOutput()
			t.Logf("%s", out)
			if err != nil || strings.Count(string(out), "\n") < 6 {
				t.Error("it did not come to its end:", err)
			}
		})
	}
}
