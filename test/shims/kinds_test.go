package shims

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"dayfly.dev/test/harness"
)

// kindsFolder builds the images of the kinds that are delivered, under names of their own,
// and gives a folder of the kinds with these names. It all goes with the test.
func kindsFolder(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	prefix, dir := "dayfly-"+strings.ToLower(rand.Text()[:10])+"/", t.TempDir()
	build := exec.CommandContext(ctx, "../../deploy/images/build")
	build.Env = append(os.Environ(), "TAG_PREFIX="+prefix)
	out, err := build.CombinedOutput()
	t.Cleanup(func() {
		for name := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(name, prefix) {
				_ = harness.RemoveImage(context.Background(), name)
			}
		}
	})
	if err != nil {
		t.Fatalf("build the images: %v\n%s", err, out)
	}
	files, err := filepath.Glob("../../deploy/kinds/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no kinds", err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(f)), []byte(strings.Replace(string(text), "image: dayfly/", "image: "+prefix, 1)), 0o644)
		}
		if err != nil {
			t.Fatal(fmt.Errorf("copy a kind: %w", err))
		}
	}
	own, err := os.ReadFile(filepath.Join(dir, "judge-sh.yaml"))
	if err == nil {
		text := strings.NewReplacer("kind: judge-sh", "kind: judge0-60", "about: a submission in shell (busybox)", "about: a language of the site's own").Replace(string(own))
		err = os.WriteFile(filepath.Join(dir, "judge0-60.yaml"), []byte(text), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}
