//go:build docs

package docs

import (
	"context"
	"crypto/rand"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dayfly.dev/test/harness"
)

// deploy/compose/try.sh proves the compose file, Prometheus and its rules included.
func TestCompose(t *testing.T) {
	task := makeImage(t)
	image := "dayfly-try:t" + strings.ToLower(rand.Text()[:10])
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, "docker", "rmi", image).CombinedOutput() // with what lies under it
		if err = errors.Join(err, harness.RemoveImage(ctx, task)); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	context := t.TempDir()
	for _, file := range []string{filepath.Join(bin, "dayfly"), filepath.Join(bin, "dayfly-init"), "../../deploy/image/Dockerfile", "/etc/ssl/certs/ca-certificates.crt"} {
		b, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(filepath.Join(context, filepath.Base(file)), b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.CommandContext(t.Context(), "docker", "build", "-q", "-t", image, context).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd := exec.Command("sh", "../../deploy/compose/try.sh", task)
	cmd.Env = append(os.Environ(), "DAYFLY_IMAGE="+image)
	for _, name := range []string{"DAYFLY_PORT", "DAYFLY_PORT2", "DAYFLY_INGRESS_PORT", "PROMETHEUS_PORT"} {
		_, port, _ := net.SplitHostPort(freeAddress(t))
		cmd.Env = append(cmd.Env, name+"="+port)
	}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
}
