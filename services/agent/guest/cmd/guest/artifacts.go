package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const output = "/task/output"

// leaveFiles leaves plain files. OUTPUT says where the folder is, if elsewhere.
func leaveFiles(a []string) int {
	dir := output
	if at := os.Getenv("OUTPUT"); at != "" {
		dir = at
	}
	for i := range num(a, 0, 1) {
		body := bytes.Repeat([]byte{byte('a' + i%26)}, num(a, 1, 1))
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file-%05d", i)), body, 0o644); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	fmt.Println("ready")
	time.Sleep(dur(a, 2, 0))
	return 0
}

// litter leaves what nobody should take, or with care: links that lead out, pipes,
// sockets, holes, depth, odd names, twins, and a folder that may not be entered; and two
// honest files.
func litter([]string) int {
	in := func(name string) string { return filepath.Join(output, name) }
	sparse := func(name string, size int64) error {
		f, err := os.Create(in(name))
		if err != nil {
			return err
		}
		defer f.Close()
		return f.Truncate(size)
	}
	deep := in("deep")
	for range 100 {
		deep += "/d"
	}
	steps := map[string]error{
		"honest":  os.WriteFile(in("a-honest.txt"), []byte("honest\n"), 0o644),
		"folder":  os.MkdirAll(in("z/y"), 0o755),
		"below":   os.WriteFile(in("z/y/below"), []byte("below\n"), 0o600),
		"passwd":  os.Symlink("/etc/passwd", in("passwd")),
		"shadow":  os.Symlink("../../../../../../etc/shadow", in("shadow")),
		"root":    os.Symlink("/", in("root")),
		"self":    os.Symlink("self", in("self")),
		"fifo":    unix.Mkfifo(in("fifo"), 0o644),
		"twin":    os.Link(in("a-honest.txt"), in("twin")),
		"sparse":  sparse("sparse", 60<<20),
		"sparse2": sparse("sparse2", 60<<20),
		"deep":    os.MkdirAll(deep, 0o755),
		"bottom":  os.WriteFile(deep+"/bottom", nil, 0o644),
		"control": os.WriteFile(in("bell\a\nname"), []byte("x"), 0o644),
		"latin":   os.WriteFile(in("caf\xe9"), []byte("x"), 0o644),
		"long":    os.WriteFile(in(strings.Repeat("l", 255)), []byte("x"), 0o644),
		"closed":  os.Mkdir(in("closed"), 0o700),
		"inside":  os.WriteFile(in("closed/inside"), []byte("inside\n"), 0o400),
		"locked":  os.Chmod(in("closed"), 0),
	}
	l, err := net.Listen("unix", in("socket"))
	steps["socket"] = err
	if l != nil {
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		defer l.Close()
	}
	code := 0
	for name, err := range steps {
		if err != nil {
			fmt.Println(name, err)
			code = 1
		}
	}
	return code
}
