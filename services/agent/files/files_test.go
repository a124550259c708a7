package files_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent/files"
)

func frame(t testing.TB, b []byte) io.Reader {
	t.Helper()
	var out closer
	w := files.NewFrames(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &out.Buffer
}

type closer struct{ bytes.Buffer }

func (*closer) Close() error { return nil }

func open(t testing.TB, dir string) int {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// Whatever an archive says, nothing is made or changed outside of the folder that it is
// unpacked into, and a refused one changes nothing in it either.
func TestHostileArchives(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	names := []string{"a", "b", "a/b", "b/a", "a/b/c", "old", "old/x", "dir", "dir/x", "dir/in/x", "./a", "a/../b", "..", "../out", "/a", "a/", "b/../../out", "", "."}
	targets := append(names, "..", "../..", "../../root", "b/..", "/", "../at/a")
	kinds := []byte{tar.TypeReg, tar.TypeReg, tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeFifo, tar.TypeChar}
	taken := 0
	top := folder(t)
	for n := range 3000 {
		var archive bytes.Buffer
		w := tar.NewWriter(&archive)
		for range 1 + rnd.IntN(4) {
			h := tar.Header{Typeflag: kinds[rnd.IntN(len(kinds))], Name: names[rnd.IntN(len(names))], Mode: rnd.Int64N(0o10000)}
			switch h.Typeflag {
			case tar.TypeReg:
				h.Size = 3
			case tar.TypeSymlink, tar.TypeLink:
				h.Linkname = targets[rnd.IntN(len(targets))]
			}
			if w.WriteHeader(&h) == nil && h.Size > 0 {
				_, _ = w.Write([]byte("new"))
			}
		}
		_ = w.Close()
		if rnd.IntN(8) == 0 {
			archive.Truncate(rnd.IntN(archive.Len()))
		}
		home := filepath.Join(top, fmt.Sprint(n))
		root := filepath.Join(home, "root")
		if err := os.MkdirAll(filepath.Join(root, "at", "dir", "in"), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"out", "at/old", "at/dir/x"} {
			if err := os.WriteFile(filepath.Join(root, f), []byte("old"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		before := tree(t, home)
		res := files.Serve(open(t, root), "/", files.Request{Op: files.Put, Path: "/at"}, frame(t, archive.Bytes()), io.Discard)
		after := tree(t, home)
		if res.Code == "" {
			taken++
			inside := func(s string) bool { return strings.HasPrefix(s, "root/at/") }
			before, after = slices.DeleteFunc(before, inside), slices.DeleteFunc(after, inside)
		}
		if !slices.Equal(before, after) {
			t.Fatalf("%+v\nbefore %q\nafter  %q", res, before, after)
		}
	}
	if taken < 100 {
		t.Errorf("only %d archives were taken", taken)
	}
}

// tree lists what is in a folder, with types, modes and contents.
func tree(t testing.TB, dir string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, p)
		entry := name + " " + info.Mode().String()
		if info.Mode().IsRegular() {
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			entry += " " + string(b)
		}
		list = append(list, entry)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestFramesTellTheEnd(t *testing.T) {
	var out closer
	w := files.NewFrames(&out)
	sent := bytes.Repeat([]byte("0123456789"), 20_000)
	if n, err := w.Write(sent); err != nil || n != len(sent) {
		t.Fatal(n, err)
	}
	cut := slices.Clone(out.Bytes())
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(b []byte) files.Result {
		return files.Serve(open(t, dir), "/", files.Request{Op: files.Write, Path: "/f"}, bytes.NewReader(b), io.Discard)
	}
	for _, n := range []int{0, 1, 4, 1000, len(cut)} {
		if res := write(cut[:n]); res.Code != files.CutOff {
			t.Errorf("%d bytes: %+v", n, res)
		}
	}
	if res := write([]byte{0xff, 0xff, 0xff, 0xff}); res.Code != files.CutOff {
		t.Errorf("a frame that is too long: %+v", res)
	}
	if list, _ := os.ReadDir(dir); len(list) > 0 {
		t.Errorf("left %v", list)
	}
	if res := write(out.Bytes()); res.Code != "" || res.Bytes != int64(len(sent)) {
		t.Errorf("%+v", res)
	}
	if got, _ := os.ReadFile(filepath.Join(dir, "f")); !bytes.Equal(got, sent) {
		t.Errorf("%d bytes of %d", len(got), len(sent))
	}
}

// folder is one in memory, where there is such a place: a disk takes long for many files.
func folder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "files")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// 100,000 entries are taken, and one more is not.
func TestManyEntries(t *testing.T) {
	for n, code := range map[int]files.Code{files.MaxEntries: "", files.MaxEntries + 1: files.TooMany} {
		dir := folder(t)
		r, w := io.Pipe()
		go func() {
			out := files.NewFrames(w)
			archive := tar.NewWriter(out)
			for i := range n {
				name := fmt.Sprintf("%d/%d", i/1000, i)
				if archive.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}) != nil {
					break
				}
			}
			_ = archive.Close()
			_ = out.Close()
		}()
		res := files.Serve(open(t, dir), "/", files.Request{Op: files.Put, Path: "/set"}, r, io.Discard)
		_ = r.Close()
		if res.Code != code {
			t.Errorf("%d entries: %+v", n, res)
		}
	}
}

// A folder with more than may go is refused before anything of it was sent; a file is not
// written in the place of a folder, and the answer says so, wherever the folder is.
func TestWhatIsRefusedIsRefusedAtOnce(t *testing.T) {
	dir := folder(t)
	for _, name := range []string{"set/a/1", "set/a/2", "set/b/3"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for entries, code := range map[int]files.Code{5: files.TooMany, 6: ""} {
		var out bytes.Buffer
		res := files.Serve(open(t, dir), "/", files.Request{Op: files.Get, Path: "/set", Entries: entries}, nil, &out)
		if res.Code != code || (out.Len() == 0) != (code != "") {
			t.Errorf("%d may go: %+v, %d bytes came", entries, res, out.Len())
		}
	}
	res := files.Serve(open(t, dir), "/", files.Request{Op: files.Write, Path: "/set/a"}, strings.NewReader(""), io.Discard)
	if res.Code != files.IsADirectory || !strings.Contains(res.Message, "name the file in it") {
		t.Errorf("%+v", res)
	}
}

// A result is one frame of a session, whatever the paths are that it names.
func TestAResultIsShort(t *testing.T) {
	long := strings.Repeat("\x01/ü", 4096)
	r := files.Result{Code: files.Failed, Message: long + "!"}
	for range 20 {
		r.Skipped = append(r.Skipped, files.Skipped{Path: long + "end", Why: "it cannot be read"})
	}
	var out bytes.Buffer
	if err := r.Write(&out); err != nil {
		t.Fatal(err)
	}
	var got files.Result
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if out.Len() > 32<<10 || !strings.HasSuffix(got.Skipped[0].Path, "üend") || !strings.HasPrefix(got.Skipped[0].Path, "…") || !strings.HasSuffix(got.Message, "!") {
		t.Errorf("%d bytes, %q", out.Len(), got.Skipped[0].Path)
	}
}
