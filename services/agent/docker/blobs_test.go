package docker_test

import (
	"context"
	"crypto/sha256"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"dayfly.dev/schemas"
)

// A task reads its blobs as files and as its standard input, and cannot change them even
// as root: they are the very files of the cache.
func TestBlobsAreTheFilesOfTheCache(t *testing.T) {
	dir := t.TempDir()
	rt := openIn(t, dir, "w-blobs")
	text := strings.Repeat("0123456789abcdef", 1<<20)
	id := schemas.BlobIDOf(sha256.Sum256([]byte(text)))
	path := filepath.Join(dir, id.Hex())
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o555); err != nil { // as the cache leaves it
		t.Fatal(err)
	}
	same := func() {
		t.Helper()
		info, err := os.Stat(path)
		if err != nil || info.Mode() != 0o555 {
			t.Fatal(info.Mode(), err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != text {
			t.Fatal("the blob was changed")
		}
	}
	for _, c := range []struct {
		command []string
		user    string
		out     func(out string) bool
	}{
		{[]string{"cat"}, "", func(out string) bool { return out == text }},
		{[]string{"cat", "/task/input/a/data"}, "", func(out string) bool { return out == text }},
		{[]string{"write", "/task/input/a/data"}, "image", func(out string) bool { return strings.Contains(out, "read-only file system") }},
		{[]string{"write", "/.dayfly/c/stdin"}, "image", func(out string) bool { return strings.Contains(out, "read-only file system") }},
		{[]string{"write", "/proc/self/fd/0"}, "image", func(out string) bool { return strings.Contains(out, "read-only file system") }},
		{[]string{"chmod", "/proc/self/fd/0"}, "image", func(out string) bool { return strings.Contains(out, "read-only file system") }},
		{[]string{"chmod", "/task/input/a/data"}, "image", func(out string) bool { return strings.Contains(out, "read-only file system") }},
	} {
		req := request(t, rt, "w-blobs", c.command...)
		if c.user != "" {
			req.Spec.User = c.user
		}
		req.LogLimit = 64 << 20
		req.Spec.Resources.Memory = 16 << 20 // less than the blob
		req.Spec.StdinBlob = id
		req.Spec.Files = []schemas.File{{Path: "a/data", Blob: id}, {Path: "a/b/c", Blob: id}, {Path: "a/text", Content: "x"}}
		req.Blobs = map[schemas.BlobID]string{id: path}
		a := start(t, rt, req)
		o := wait(t, a)
		out := output(t, a, schemas.Stdout) + output(t, a, schemas.Stderr)
		if !c.out(out) || o.Exit == nil || o.Exit.OOMKilled {
			t.Errorf("%v: %.300q %+v", c.command, out, o)
		}
		if info, err := os.Stat(path); err != nil || info.Sys().(*syscall.Stat_t).Nlink != 4 {
			t.Errorf("it has not its links while the task is there: %v", err)
		}
		same()
		if err := a.Remove(context.Background()); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Sys().(*syscall.Stat_t).Nlink != 1 {
			t.Errorf("it has links after the task: %v", err)
		}
	}
	// Restarted, it reads its standard input from the beginning.
	req := request(t, rt, "w-blobs", "cat")
	req.LogLimit = 64 << 20
	req.Spec.Restart = &schemas.Restart{Policy: schemas.RestartAlways, Max: 1, Backoff: 100_000_000}
	req.Spec.StdinBlob, req.Blobs = id, map[schemas.BlobID]string{id: path}
	a := start(t, rt, req)
	wait(t, a)
	if out := output(t, a, schemas.Stdout); out != text+text {
		t.Errorf("%d bytes came of two runs", len(out))
	}
}
