package harness

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/moby/moby/client"

	"dayfly.dev/services/agent/guest"
)

// busybox is the static one of Debian's busybox-static.
const busybox = "/bin/busybox"

// MakeShell makes an image of this machine's busybox under a name, with all its commands
// in /bin, and with the scripts besides, by their paths without the first slash. Changes
// are instructions of a Dockerfile.
func MakeShell(ctx context.Context, name string, scripts map[string]string, changes ...string) error {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return fmt.Errorf("a static busybox is needed (apt install busybox-static): %w", err)
	}
	commands, err := exec.CommandContext(ctx, busybox, "--list").Output()
	if err != nil {
		return fmt.Errorf("%s --list: %w", busybox, err)
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	add := func(h tar.Header, body []byte) {
		if err == nil {
			h.Mode, h.Size = 0o755, int64(len(body))
			err = w.WriteHeader(&h)
		}
		if err == nil {
			_, err = w.Write(body)
		}
	}
	for _, folder := range []string{"bin/", "etc/", "tmp/"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: folder}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox"}, program)
	for _, path := range slices.Sorted(maps.Keys(scripts)) {
		add(tar.Header{Typeflag: tar.TypeReg, Name: path}, []byte(scripts[path]))
	}
	for command := range strings.FieldsSeq(string(commands)) {
		if command != "busybox" {
			add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + command, Linkname: "busybox"}, nil)
		}
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return fmt.Errorf("make an image of %s: %w", busybox, err)
	}
	engine, err := client.New(client.FromEnv)
	if err != nil {
		return err
	}
	defer engine.Close()
	_, err = guest.ImportImage(ctx, engine, archive.Bytes(), name, append([]string{"ENV PATH=/bin", `CMD ["/bin/sh"]`}, changes...)...)
	return err
}
