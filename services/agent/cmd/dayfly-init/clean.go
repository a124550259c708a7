package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// clean is the program that empties the places to write: what one program of a held run
// has left there, the next shall not find. It has the rights of the task, and so can
// remove all that the task could make.
func clean() int {
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(50)
	places, err := writable()
	for _, dir := range places {
		err = errors.Join(err, empty(dir))
	}
	if err := errors.Join(err, removeIPC()); err != nil {
		fmt.Fprintln(os.Stderr, "clean:", err)
		return 1
	}
	return 0
}

// writable lists the mounts in memory that the task may write to.
func writable() (dirs []string, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		// 36 35 98:0 /root /mount/point rw,noatime master:1 - tmpfs source rw
		fields := strings.Fields(s.Text())
		dash := slices.Index(fields, "-")
		if dash < 6 || dash+1 >= len(fields) || !slices.Contains([]string{"tmpfs", "mqueue"}, fields[dash+1]) {
			continue
		}
		dir := octal(fields[4])
		if dir == "/dev" || strings.HasPrefix(dir, "/proc") || strings.HasPrefix(dir, "/sys") || !slices.Contains(strings.Split(fields[5], ","), "rw") {
			continue
		}
		dirs = append(dirs, dir)
	}
	return dirs, s.Err()
}

// octal undoes the kernel's way to write white space in paths.
func octal(s string) string {
	for _, c := range []string{" ", "\t", "\n", `\`} {
		s = strings.ReplaceAll(s, fmt.Sprintf(`\%03o`, c[0]), c)
	}
	return s
}

// tidy says whether the places to write are as clean leaves them: empty, and without System V
// objects. What the owner may have changed of the places themselves it sets back. No process of
// the task is there, so none changes what it looks at.
func tidy(places []string) bool {
	for _, dir := range places {
		whose, err := settle(dir)
		if err != nil {
			return false
		}
		if whose == nobodys {
			continue
		}
		renew(dir, whose)
		if names, err := list(dir, 1); err != io.EOF || len(names) > 0 {
			return false
		}
		renew(dir, whose) // reading it has a time too
	}
	for file := range ipcRemove {
		if b, err := readSome(ipcFolder + file); err != nil && !errors.Is(err, os.ErrNotExist) || bytes.Count(b, []byte("\n")) > 1 {
			return false // there is more than the headings
		}
	}
	return true
}

// readSome reads the beginning of a file: there may be more than PID 1 should hold.
func readSome(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 1<<10))
}

// empty removes all in a folder. Its owner may have closed it, and what is in it.
func empty(dir string) error {
	whose, err := settle(dir)
	if err != nil || whose == nobodys {
		return err
	}
	names, err := list(dir, -1)
	if err != nil {
		return err
	}
	for _, name := range names {
		p := filepath.Join(dir, name)
		if os.RemoveAll(p) == nil {
			continue
		}
		open(p)
		err = errors.Join(err, os.RemoveAll(p))
	}
	renew(dir, whose)
	return err
}

// ownFlags are those that the owner of a folder may set (FS_NODUMP_FL, FS_NOATIME_FL).
const ownFlags = 0x40 | 0x80

// owner says who owns a place.
type owner int

const (
	nobodys owner = iota // of the task: it may not write there
	roots                // anybody may write there
	tasks
)

// settle sets back what the owner of a place may have changed of it: mode, attributes, flags.
func settle(dir string) (owner, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nobodys, err
	}
	if int(st.Uid) != os.Getuid() {
		if unix.Access(dir, unix.W_OK) != nil {
			return nobodys, nil
		}
		return roots, nil
	}
	if st.Mode&0o7777 != 0o755 {
		if err := unix.Chmod(dir, 0o755); err != nil {
			return tasks, err
		}
	}
	if err := dropAttributes(dir); err != nil {
		return tasks, err
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return tasks, err
	}
	defer unix.Close(fd)
	if flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS); err == nil && flags&ownFlags != 0 { // no error: a kernel that has them
		return tasks, unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags&^ownFlags))
	}
	return tasks, nil
}

// dropAttributes removes extended attributes: the owner's own, and access lists.
func dropAttributes(dir string) error {
	n, err := unix.Listxattr(dir, nil)
	if err != nil || n == 0 {
		return nil // none, or a kernel without
	}
	names := make([]byte, n)
	if n, err = unix.Listxattr(dir, names); err != nil {
		return err
	}
	for name := range strings.SplitSeq(string(names[:n]), "\x00") {
		if strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "system.posix_acl_") {
			if err := unix.Removexattr(dir, name); err != nil && err != unix.ENODATA {
				return err
			}
		}
	}
	return nil
}

// renew takes the times of a folder, which would tell of what was there, away. Those of one that
// is root's cannot be set, and become those of now.
func renew(dir string, whose owner) {
	if whose == tasks {
		_ = unix.UtimesNanoAt(unix.AT_FDCWD, dir, make([]unix.Timespec, 2), 0)
		return
	}
	p := filepath.Join(dir, ".dayfly")
	if fd, err := unix.Open(p, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o600); err == nil {
		_ = unix.Close(fd)
		_ = unix.Unlink(p)
	}
}

// list gives n names of a folder, or all if n is -1.
func list(dir string, n int) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(n)
}

// open gives the owner his rights to the folders below p back, so that they can be emptied.
func open(p string) {
	root, err := os.OpenRoot(filepath.Dir(p))
	if err != nil {
		return
	}
	defer root.Close()
	openIn(root, filepath.Base(p))
}

// openIn opens a folder, and then those in it: each by a descriptor of its own, since its
// path may be longer than a path can be.
func openIn(parent *os.Root, name string) {
	st, err := parent.Lstat(name)
	if err != nil || !st.IsDir() || parent.Chmod(name, 0o700) != nil {
		return
	}
	root, err := parent.OpenRoot(name)
	if err != nil {
		return
	}
	defer root.Close()
	f, err := root.Open(".")
	if err != nil {
		return
	}
	names, _ := f.Readdirnames(-1)
	f.Close()
	for _, n := range names {
		openIn(root, n)
	}
}

// ipcFolder has a file for each sort of System V objects: headings, and a line for each.
const ipcFolder = "/proc/sysvipc/"

// ipcRemove are the calls that remove System V objects, by the file that lists them.
var ipcRemove = map[string]uintptr{"shm": unix.SYS_SHMCTL, "sem": unix.SYS_SEMCTL, "msg": unix.SYS_MSGCTL}

// removeIPC removes System V objects, which outlive processes.
func removeIPC() (err error) {
	for file, call := range ipcRemove {
		ids, failed := ipcObjects(file)
		err = errors.Join(err, failed)
		for _, id := range ids {
			arg := [3]uintptr{uintptr(id), unix.IPC_RMID}
			if file == "sem" {
				arg[1], arg[2] = 0, unix.IPC_RMID
			}
			if _, _, e := unix.Syscall(call, arg[0], arg[1], arg[2]); e != 0 && e != unix.EINVAL && e != unix.EIDRM {
				err = errors.Join(err, fmt.Errorf("remove %s %d: %w", file, id, e))
			}
		}
	}
	return err
}

// ipcObjects lists the System V objects of one sort.
func ipcObjects(file string) (ids []int, err error) {
	b, err := os.ReadFile(ipcFolder + file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // a kernel without
	}
	for i, line := range bytes.Split(b, []byte("\n")) {
		fields := bytes.Fields(line)
		if i == 0 || len(fields) < 2 {
			continue
		}
		if id, bad := strconv.Atoi(string(fields[1])); bad == nil {
			ids = append(ids, id)
		}
	}
	return ids, err
}
