// Package guest makes the image that tests and demos run: one static Go program,
// guest/cmd/guest, and next to nothing else. No registry is needed.
//
//	/bin/guest              the image's entrypoint; its first argument is a subcommand
//	/bin/echo, /bin/sleep…  hard links to it: the subcommand is argv[0]
//	/bin/suid               a copy owned by root with the setuid bit
//	/bin/noexec             a text file without an executable bit
//	/etc/passwd, /etc/group root and task (1000:1000)
//	/tmp, /data             folders of root's, mode 0755
package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/moby/moby/client"
)

// Links are the subcommands that have a hard link in /bin.
var Links = []string{"echo", "sleep", "cat", "env", "exit", "id", "ls", "count", "spam"}

// BuildBinary compiles a main package of this module as a static binary, such as
// "dayfly.dev/services/agent/cmd/dayfly-init". It needs the go tool and must be
// called from a test of this workspace.
func BuildBinary(ctx context.Context, pkg, to string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", to, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return nil
}

// Build gives the image's files as a tar archive.
func Build(ctx context.Context) ([]byte, error) {
	dir, err := os.MkdirTemp("", "guest")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "guest")
	if err := BuildBinary(ctx, "dayfly.dev/services/agent/guest/cmd/guest", path); err != nil {
		return nil, err
	}
	program, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	add := func(h tar.Header, body []byte) {
		if err == nil {
			h.Size = int64(len(body))
			err = w.WriteHeader(&h)
		}
		if err == nil {
			_, err = w.Write(body)
		}
	}
	for _, d := range []string{"bin", "etc", "tmp", "data", "home", "home/task"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/guest", Mode: 0o755}, program)
	for _, l := range Links {
		add(tar.Header{Typeflag: tar.TypeLink, Name: "bin/" + l, Linkname: "bin/guest", Mode: 0o755}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/suid", Mode: 0o4755}, program)
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/noexec", Mode: 0o644}, []byte("not a program\n"))
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0:root:/:/bin/guest\ntask:x:1000:1000:task:/home/task:/bin/guest\n"))
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644}, []byte("root:x:0:\ntask:x:1000:\n"))
	if err == nil {
		err = w.Close()
	}
	return buf.Bytes(), err
}

// Entrypoint is the change that makes /bin/guest the image's entrypoint.
const Entrypoint = `ENTRYPOINT ["/bin/guest"]`

// ImportImage makes an image of the archive under a name and returns its id.
// changes are lines of a Dockerfile: ENTRYPOINT, CMD, ENV, USER, VOLUME, WORKDIR…
func ImportImage(ctx context.Context, docker *client.Client, archive []byte, name string, changes ...string) (string, error) {
	if len(changes) == 0 {
		changes = []string{Entrypoint}
	}
	resp, err := docker.ImageImport(ctx, client.ImageImportSource{Source: bytes.NewReader(archive), SourceName: "-"}, name, client.ImageImportOptions{Changes: changes})
	if err != nil {
		return "", fmt.Errorf("import image %s: %w", name, err)
	}
	defer resp.Close()
	out, err := io.ReadAll(io.LimitReader(resp, 64<<10))
	if err != nil {
		return "", fmt.Errorf("import image %s: %w", name, err)
	}
	if strings.Contains(string(out), "errorDetail") {
		return "", fmt.Errorf("import image %s: %s", name, out)
	}
	got, err := docker.ImageInspect(ctx, name)
	if err != nil {
		return "", fmt.Errorf("import image %s: %w", name, err)
	}
	return got.ID, nil
}
