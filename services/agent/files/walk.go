package files

import (
	"errors"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	folder = unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	noLink = unix.AT_SYMLINK_NOFOLLOW
)

// step opens the folder name in dir. It follows no link.
func step(dir int, name, shown string) (int, error) {
	fd, err := unix.Openat(dir, name, folder, 0)
	if err == unix.ENOTDIR || err == unix.ELOOP {
		return -1, notFolder(dir, name, shown)
	}
	return fd, about(shown, err)
}

// notFolder says what stands where a folder should be.
func notFolder(dir int, name, shown string) error {
	if target, ok := readLink(dir, name); ok {
		return faultf(IsALink, "%s is a link to %s; links are not followed, ask for what it points to", shown, target)
	}
	return faultf(NotADirectory, "%s: is not a folder", shown)
}

func readLink(dir int, name string) (string, bool) {
	buf := make([]byte, 4096)
	n, err := unix.Readlinkat(dir, name, buf)
	if err != nil || n == len(buf) {
		return "", false
	}
	return string(buf[:n]), true
}

// descend goes as far down as there are folders. rest is what is not there. The
// descriptor is the caller's.
func (j *job) descend(parts []string) (dir int, rest []string, err error) {
	dir, err = unix.Openat(j.root, ".", folder, 0)
	if err != nil {
		return -1, nil, about("/", err)
	}
	shown := ""
	for i, name := range parts {
		shown += "/" + name
		next, err := step(dir, name, shown)
		var f *fault
		if errors.As(err, &f) && f.code == NotFound {
			return dir, parts[i:], nil
		}
		_ = unix.Close(dir)
		if err != nil {
			return -1, nil, err
		}
		dir = next
	}
	return dir, nil, nil
}

// parent opens the folder that has the last part, which is "." for the root itself.
func (j *job) parent(parts []string) (dir int, name string, err error) {
	if len(parts) == 0 {
		dir, _, err = j.descend(nil)
		return dir, ".", err
	}
	dir, rest, err := j.descend(parts[:len(parts)-1])
	if err == nil && len(rest) > 0 {
		_ = unix.Close(dir)
		return -1, "", faultf(NotFound, "%s: there is no such file or folder", j.Path)
	}
	return dir, parts[max(0, len(parts)-1)], err
}

// names reads the names in a folder, but no more than most.
func names(dir, most int) ([]string, error) {
	fd, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "folder")
	defer f.Close()
	list, err := f.Readdirnames(most)
	if err == io.EOF {
		err = nil
	}
	slices.Sort(list)
	return list, err
}

// maxRemove bounds how deep a folder is removed: a descriptor is held for each level.
const maxRemove = 500

// removeAll takes away name in dir with all in it. own says that the folders are ours,
// so that their modes do not matter.
func removeAll(dir int, name string, own bool, depth int) (n int, err error) {
	switch err := unix.Unlinkat(dir, name, 0); err {
	case nil:
		return 1, nil
	case unix.EISDIR, unix.EPERM: // POSIX has EPERM for a folder
	default:
		return 0, err
	}
	if depth > maxRemove {
		return 0, faultf(TooDeep, "the folder is more than %d deep", maxRemove)
	}
	if own {
		_ = unix.Fchmodat(dir, name, 0o700, 0)
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	for {
		list, err := f.Readdirnames(1024)
		if len(list) == 0 {
			break
		}
		for _, inner := range list {
			k, err := removeAll(fd, inner, own, depth+1)
			n += k
			if err != nil && err != unix.ENOENT {
				return n, err
			}
		}
		if err != nil {
			break
		}
	}
	if err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR); err != nil {
		return n, err
	}
	return n + 1, nil
}

func (j *job) remove(parts []string) error {
	if len(parts) == 0 {
		return faultf(Permission, "/: the root cannot be deleted")
	}
	dir, name, err := j.parent(parts)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	var above, st unix.Stat_t
	if err := unix.Fstat(dir, &above); err != nil {
		return about(j.Path, err)
	}
	if err := unix.Fstatat(dir, name, &st, noLink); err != nil {
		return about(j.Path, err)
	}
	if st.Dev != above.Dev {
		return faultf(Permission, "%s: is a mount; delete what is in it", j.Path)
	}
	if j.Bare && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		switch err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR); err {
		case nil:
			j.res.Entries = 1
			return nil
		case unix.ENOTEMPTY, unix.EEXIST:
			return faultf(IsADirectory, "%s: is a folder with something in it; ask for that to be deleted too", j.Path)
		default:
			return about(j.Path, err)
		}
	}
	j.res.Entries, err = removeAll(dir, name, false, 0)
	return about(j.Path, err)
}
