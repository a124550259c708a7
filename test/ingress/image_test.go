package ingress

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"debug/elf"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/moby/moby/client"

	"dayfly.dev/services/agent/guest"
	"dayfly.dev/test/harness"
)

// rootfs gathers the files of an image: programs and packages of this machine, with the
// shared libraries that they need, and texts.
type rootfs struct {
	testing.TB
	archive bytes.Buffer
	w       *tar.Writer
	has     map[string]bool // paths without a leading slash
}

func newRootfs(t testing.TB) *rootfs {
	r := &rootfs{TB: t, has: map[string]bool{".": true}}
	r.w = tar.NewWriter(&r.archive)
	r.text("etc/passwd", "root:x:0:0::/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\ntask:x:1000:1000::/tmp:/bin/sh\n")
	r.text("etc/group", "root:x:0:\nwww-data:x:33:\ntask:x:1000:\n")
	return r
}

func (r *rootfs) add(h tar.Header, body []byte) {
	r.Helper()
	if r.has[h.Name] {
		return
	}
	r.has[h.Name] = true
	r.folder(filepath.Dir(h.Name))
	if h.Size = int64(len(body)); h.Typeflag == tar.TypeDir {
		h.Name += "/"
	}
	if err := r.w.WriteHeader(&h); err != nil {
		r.Fatal(err)
	}
	if _, err := r.w.Write(body); err != nil {
		r.Fatal(err)
	}
}

func (r *rootfs) folder(path string) {
	r.Helper()
	r.add(tar.Header{Typeflag: tar.TypeDir, Name: path, Mode: 0o755}, nil)
}

func (r *rootfs) text(path, text string) {
	r.Helper()
	r.add(tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: 0o644}, []byte(text))
}

// linkTo is a symbolic link.
func linkTo(path, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: path, Linkname: target}
}

// programs adds programs of this machine as /bin/NAME.
func (r *rootfs) programs(names ...string) {
	r.Helper()
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err != nil {
			path, err = exec.LookPath("/usr/sbin/" + name)
		}
		if err != nil {
			r.Fatalf("%v (make setup installs it)", err)
		}
		r.file("bin/"+name, path)
		r.libraries(path)
	}
}

func (r *rootfs) file(to, from string) {
	r.Helper()
	body, err := os.ReadFile(from)
	if err != nil {
		r.Fatal(err)
	}
	info, err := os.Stat(from)
	if err != nil {
		r.Fatal(err)
	}
	r.add(tar.Header{Typeflag: tar.TypeReg, Name: to, Mode: int64(info.Mode().Perm())}, body)
}

var library = regexp.MustCompile(`(/\S+) \(0x`)

// libraries adds the shared libraries that files need.
func (r *rootfs) libraries(paths ...string) {
	r.Helper()
	if len(paths) == 0 {
		return
	}
	out, err := exec.Command("ldd", paths...).Output()
	var static *exec.ExitError // ldd's word for a program without any
	if err != nil && !errors.As(err, &static) {
		r.Fatal(err)
	}
	for _, m := range library.FindAllSubmatch(out, -1) {
		r.file(strings.TrimPrefix(string(m[1]), "/"), string(m[1]))
	}
}

// packages adds the files of installed Debian packages, less documentation, and what
// their programs and modules need of other packages' libraries.
func (r *rootfs) packages(names ...string) {
	r.Helper()
	out, err := exec.Command("dpkg-query", append([]string{"-L"}, names...)...).Output()
	if err != nil {
		r.Fatalf("%v of %v (make setup installs them)", err, names)
	}
	var binaries []string
	for path := range strings.Lines(string(out)) {
		path = strings.TrimSpace(path)
		info, err := os.Lstat(path)
		if err != nil || strings.HasPrefix(path, "/usr/share/doc/") || strings.HasPrefix(path, "/usr/share/man/") {
			continue
		}
		to := strings.TrimPrefix(path, "/")
		switch info.Mode().Type() {
		case fs.ModeDir:
			if path != "/." {
				r.folder(to)
			}
		case fs.ModeSymlink:
			link, err := os.Readlink(path)
			if err != nil {
				r.Fatal(err)
			}
			r.add(tar.Header{Typeflag: tar.TypeSymlink, Name: to, Linkname: link}, nil)
		case 0:
			r.file(to, path)
			if f, err := elf.Open(path); err == nil {
				f.Close()
				binaries = append(binaries, path)
			}
		}
	}
	r.libraries(binaries...)
}

// image makes an image of it all, which goes with the test.
func (r *rootfs) image() string {
	r.Helper()
	if err := r.w.Close(); err != nil {
		r.Fatal(err)
	}
	engine, err := client.New(client.FromEnv)
	if err != nil {
		r.Fatal(err)
	}
	defer engine.Close()
	name := "dayfly-real:" + strings.ToLower(rand.Text()[:10])
	if _, err := guest.ImportImage(deadline(r), engine, r.archive.Bytes(), name, "ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin"); err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() {
		if err := harness.RemoveImage(context.Background(), name); err != nil {
			r.Error(err)
		}
	})
	return name
}
