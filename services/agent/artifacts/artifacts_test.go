package artifacts_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/artifacts"
)

var plenty = artifacts.Limits{Bytes: 1 << 20, Files: 100}

// collect gives what was kept, by name, and what was skipped, after a look at whether the
// list and the bytes agree.
func collect(t *testing.T, dir string, l artifacts.Limits) (artifacts.Found, map[string]string, map[string]string) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out bytes.Buffer
	found, err := artifacts.Collect(f, l, &out)
	if err != nil {
		t.Fatal(err)
	}
	s := found.Sum
	if int64(out.Len()) != s.Stored+s.ListBytes {
		t.Fatalf("%d bytes for %+v", out.Len(), s)
	}
	list := out.Bytes()[s.Stored:]
	if sum := sha256.Sum256(list); s.ListBytes > 0 && hex.EncodeToString(sum[:]) != s.ListSHA256 {
		t.Error("the list has another hash")
	}
	kept, skipped := map[string]string{}, map[string]string{}
	var order []string
	for text := range bytes.Lines(list) {
		var line schemas.ArtifactLine
		if err := schemas.Decode(text, &line); err != nil || !line.Check(s) {
			t.Fatalf("%s: %v", text, err)
		}
		if line.Skipped != "" {
			skipped[line.Name] = line.Skipped
			continue
		}
		body := out.Bytes()[line.Offset:][:line.Size]
		if sum := sha256.Sum256(body); hex.EncodeToString(sum[:]) != line.SHA256 {
			t.Errorf("%s has another hash", line.Name)
		}
		kept[line.Name] = string(body)
		order = append(order, line.Name)
	}
	if s.Count != len(kept) || s.Skipped < len(skipped) {
		t.Errorf("%+v for %d and %d", s, len(kept), len(skipped))
	}
	for i, a := range found.Artifacts {
		if a.Name != order[i] {
			t.Errorf("the record's %d is %s, the list's %s", i, a.Name, order[i])
		}
	}
	return found, kept, skipped
}

func write(t *testing.T, dir, name, body string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(body), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestCollect(t *testing.T) {
	dir := t.TempDir()
	if f, err := os.Open(dir); err != nil {
		t.Fatal(err)
	} else if empty, err := artifacts.Empty(f); !empty || err != nil {
		t.Error("not empty: ", err)
	} else {
		f.Close()
	}
	if found, _, _ := collect(t, dir, plenty); found.Sum.Count != 0 || found.Sum.ListBytes != 0 {
		t.Errorf("of nothing there is %+v", found.Sum)
	}
	write(t, dir, "b/two", "2")
	write(t, dir, "a", "1")
	write(t, dir, "empty", "")
	write(t, dir, "ünï", "3")
	_, kept, skipped := collect(t, dir, plenty)
	if len(skipped) > 0 || len(kept) != 4 || kept["b/two"] != "2" || kept["a"] != "1" || kept["ünï"] != "3" {
		t.Errorf("%v %v", kept, skipped)
	}
}

// What is no regular file is named and left alone: nothing is opened that could wait, act,
// or lead out.
func TestCollectNothingElse(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes devices and mounts")
	}
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	write(t, dir, "honest", "x")
	for _, err := range []error{
		os.Symlink("/etc/passwd", in("link")), os.Symlink("..", in("up")),
		unix.Mkfifo(in("pipe"), 0o644), unix.Mknod(in("zero"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))),
		unix.Mknod(in("disk"), unix.S_IFBLK|0o666, int(unix.Mkdev(7, 99))), unix.Mknod(in("socket"), unix.S_IFSOCK|0o666, 0),
		os.Link(in("honest"), in("twin")), os.Mkdir(in("mount"), 0o755), unix.Mount("none", in("mount"), "tmpfs", 0, "size=1m"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(in("mount"), 0); err != nil {
			t.Error(err)
		}
	})
	write(t, dir, "mount/other", "y")
	found, kept, skipped := collect(t, dir, plenty)
	if len(kept) != 1 || found.Sum.Truncated {
		t.Errorf("kept %v, %+v", kept, found.Sum)
	}
	for name, why := range map[string]string{"link": "a link", "up": "a link", "pipe": "a pipe", "zero": "a device", "disk": "a device", "socket": "a socket",
		"twin": "another name", "mount": "another file system"} {
		if !strings.Contains(skipped[name], why) {
			t.Errorf("%s: %q", name, skipped[name])
		}
	}
	if len(skipped) != 8 {
		t.Errorf("skipped %v", skipped)
	}
}

func TestCollectLimits(t *testing.T) {
	deep := "deep" + strings.Repeat("/d", schemas.MaxArtifactDepth)
	for name, c := range map[string]struct {
		names  []string
		limits artifacts.Limits
		kept   []string
		why    string
		said   string // of the last skipped
	}{
		"bytes":             {[]string{"a", "b", "c"}, artifacts.Limits{Bytes: 2, Files: 9}, []string{"a", "b"}, schemas.ArtifactsLimit, "too large"},
		"files":             {[]string{"a", "b", "c"}, artifacts.Limits{Bytes: 9, Files: 1}, []string{"a"}, schemas.ArtifactsCount, "too many files"},
		"depth":             {[]string{"a", deep + "/x"}, plenty, []string{"a"}, schemas.ArtifactsDepth, "too many folders"},
		"control":           {[]string{"a", "b\x1b[2J"}, plenty, []string{"a"}, schemas.ArtifactsName, "control characters"},
		"not UTF-8":         {[]string{"a", "b\xff"}, plenty, []string{"a"}, schemas.ArtifactsName, "UTF-8"},
		"a quote is a name": {[]string{`"a"`, "b'<>&\\"}, plenty, []string{`"a"`, "b'<>&\\"}, "", ""},
		"a long path":       {[]string{"a", strings.Repeat(strings.Repeat("n", 200)+"/", 6) + "x"}, plenty, []string{"a"}, schemas.ArtifactsName, "too long"},
		"time":              {[]string{"a"}, artifacts.Limits{Bytes: 9, Files: 9, Enough: func() bool { return true }}, nil, schemas.ArtifactsTimeout, "no time"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for _, n := range c.names {
				write(t, dir, n, "x")
			}
			found, kept, skipped := collect(t, dir, c.limits)
			var names []string
			for n := range kept {
				names = append(names, n)
			}
			slices.Sort(names)
			if !slices.Equal(names, c.kept) || found.Sum.Truncated != (c.why != "") || found.Sum.Why != c.why {
				t.Errorf("kept %q, %+v", names, found.Sum)
			}
			for n, said := range skipped {
				if !strings.Contains(said, c.said) || !(len(n) <= schemas.MaxArtifactName) || strings.ContainsFunc(n, func(r rune) bool { return r < ' ' || r > '~' }) {
					t.Errorf("%q: %q", n, said)
				}
			}
		})
	}
}

// Holes cost nothing but their length: a file of terabytes is left out, and not read.
func TestCollectHoles(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a", "x")
	for name, size := range map[string]int64{"huge": 1 << 42, "small": 100 << 10} {
		write(t, dir, name, "")
		if err := os.Truncate(filepath.Join(dir, name), size); err != nil {
			t.Fatal(err)
		}
	}
	found, kept, skipped := collect(t, dir, plenty)
	if kept["small"] != string(make([]byte, 100<<10)) || skipped["huge"] == "" || !found.Sum.Truncated || found.Sum.Why != schemas.ArtifactsLimit {
		t.Errorf("%+v", found.Sum)
	}
}

func TestCollectManySkipped(t *testing.T) {
	dir := t.TempDir()
	for i := range schemas.MaxArtifactSkipped + 50 {
		if err := os.Symlink("x", filepath.Join(dir, fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	found, _, skipped := collect(t, dir, plenty)
	if len(skipped) != schemas.MaxArtifactSkipped || found.Sum.Skipped != schemas.MaxArtifactSkipped+50 || found.Sum.Truncated {
		t.Errorf("%d named, %+v", len(skipped), found.Sum)
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errFull }

var errFull = errors.New("full")

func TestCollectErrorOfTheWriter(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a", "x")
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := artifacts.Collect(f, plenty, full{}); !errors.Is(err, errFull) {
		t.Error(err)
	}
}
