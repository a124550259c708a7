package files

import (
	"archive/tar"
	"bufio"
	"encoding/json"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// made is of file systems whose files the kernel makes up while they are read.
var made = map[int64]string{
	unix.PROC_SUPER_MAGIC: "proc", unix.SYSFS_MAGIC: "sysfs", unix.DEVPTS_SUPER_MAGIC: "devpts",
	unix.CGROUP_SUPER_MAGIC: "cgroup", unix.CGROUP2_SUPER_MAGIC: "cgroup",
}

// archiver writes a tar archive of what it walks over.
type archiver struct {
	*job
	tar *tar.Writer
}

func (j *job) get(parts []string) error {
	dir, name, err := j.parent(parts)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, noLink); err != nil {
		return about(j.Path, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR:
	case unix.S_IFLNK:
		return notFolder(dir, name, j.Path)
	default:
		return faultf(Failed, "%s: is no file and no folder", j.Path)
	}
	if left := j.Entries; !fits(dir, name, 0, &left) {
		return j.tooMany()
	}
	out := bufio.NewWriterSize(j.out, 64<<10)
	a := &archiver{j, tar.NewWriter(out)}
	if err := a.entry(dir, name, []string{name}, 0); err != nil {
		return err
	}
	if len(j.res.Skipped) == 1 && j.res.Entries == 0 { // what was asked for itself
		return faultf(Permission, "%s: %s", j.Path, j.res.Skipped[0].Why)
	}
	if err := a.tar.Close(); err != nil {
		return about("write", err)
	}
	return about("write", out.Flush())
}

func (j *job) tooMany() error {
	return faultf(TooMany, "%s has more than %d files and folders; ask for the folders in it one by one", j.Path, j.Entries)
}

// fits says whether name in dir has no more files and folders than left, so that one with
// more is refused before anything of it was sent. What comes meanwhile is met on the way.
func fits(dir int, name string, depth int, left *int) bool {
	*left--
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return *left >= 0 // no folder, or one that cannot be read
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var fs unix.Statfs_t
	if depth > MaxDepth || unix.Fstatfs(fd, &fs) == nil && made[int64(fs.Type)] != "" {
		return *left >= 0
	}
	for *left >= 0 {
		list, err := f.ReadDir(1024)
		for _, e := range list {
			switch {
			case strings.HasPrefix(e.Name(), stagePrefix):
			case e.IsDir():
				if !fits(fd, e.Name(), depth+1, left) {
					return false
				}
			case e.Type().IsRegular():
				*left--
			}
		}
		if len(list) == 0 || err != nil {
			break
		}
	}
	return *left >= 0
}

func (a *archiver) skip(at []string, why string) {
	if len(a.res.Skipped) < maxSkipped {
		a.res.Skipped = append(a.res.Skipped, Skipped{join(at), why})
	} else {
		a.res.More++
	}
}

// entry writes what is in dir under a name, and below it. What it looks at may change
// under its eyes: what counts is what was opened.
func (a *archiver) entry(dir int, name string, at []string, dev uint64) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, noLink); err != nil {
		a.skip(at, err.Error())
		return nil
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR:
	case unix.S_IFLNK:
		target, ok := readLink(dir, name)
		if !ok || !staysIn(at[1:], target) {
			a.skip(at, "a link that leads out of the folder")
			return nil
		}
		return a.header(&tar.Header{Typeflag: tar.TypeSymlink, Linkname: target}, at, st)
	case unix.S_IFSOCK:
		a.skip(at, "a socket")
		return nil
	case unix.S_IFIFO:
		a.skip(at, "a fifo")
		return nil
	default:
		a.skip(at, "a device")
		return nil
	}
	// Whatever stands there by now is opened without waiting for it.
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		a.skip(at, err.Error())
		return nil
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if err := unix.Fstat(fd, &st); err != nil {
		return about(join(at), err)
	}
	if uint64(st.Dev) != dev {
		var fs unix.Statfs_t
		if err := unix.Fstatfs(fd, &fs); err == nil && made[int64(fs.Type)] != "" {
			a.skip(at, "of the file system "+made[int64(fs.Type)])
			return nil
		}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return a.file(f, at, st)
	case unix.S_IFDIR:
		return a.folder(f, at, st)
	}
	a.skip(at, "it changed")
	return nil
}

func join(at []string) string { return strings.Join(at, "/") }

func (a *archiver) header(h *tar.Header, at []string, st unix.Stat_t) error {
	if a.res.Entries++; a.res.Entries > a.Entries {
		return a.tooMany()
	}
	h.Name, h.Mode, h.ModTime = join(at), int64(st.Mode&0o777), time.Unix(st.Mtim.Unix())
	if h.Typeflag == tar.TypeDir {
		h.Name += "/"
	}
	return about("write", a.tar.WriteHeader(h))
}

func (a *archiver) file(f *os.File, at []string, st unix.Stat_t) error {
	if a.Bytes > 0 && st.Size > a.Bytes-a.res.Bytes {
		return faultf(TooLarge, "%s has more than the %d bytes that may go at a time", a.Path, a.Bytes)
	}
	if err := a.header(&tar.Header{Typeflag: tar.TypeReg, Size: st.Size}, at, st); err != nil {
		return err
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{a.tar}, io.LimitReader(f, st.Size), a.buf)
	a.res.Bytes += st.Size
	if err != nil {
		return about(join(at), err)
	}
	if n < st.Size { // its header is out already
		a.skip(at, "it became shorter while it was read; the rest is zeros")
		_, err = io.CopyBuffer(struct{ io.Writer }{a.tar}, io.LimitReader(zeros{}, st.Size-n), a.buf)
	}
	return about(join(at), err)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func (a *archiver) folder(f *os.File, at []string, st unix.Stat_t) error {
	if err := a.header(&tar.Header{Typeflag: tar.TypeDir}, at, st); err != nil {
		return err
	}
	if len(at) > MaxDepth {
		a.skip(at, "too deep")
		return nil
	}
	for {
		list, err := f.Readdirnames(1024)
		for _, name := range list {
			if strings.HasPrefix(name, stagePrefix) {
				continue // of a put that is under way
			}
			if err := a.entry(int(f.Fd()), name, append(at[:len(at):len(at)], name), uint64(st.Dev)); err != nil {
				return err
			}
		}
		if len(list) == 0 || err != nil {
			return nil
		}
	}
}

func (j *job) list(parts []string) error {
	dir, name, err := j.parent(parts)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	out := bufio.NewWriterSize(j.out, 64<<10)
	lines := json.NewEncoder(out)
	lines.SetEscapeHTML(false)
	e, err := entryOf(dir, name)
	switch {
	case err != nil:
		return about(j.Path, err)
	case e.Type == "link":
		return notFolder(dir, name, j.Path)
	case e.Type != "folder":
		e.Name = path.Base(j.Path)
		j.res.Entries = 1
		if err := lines.Encode(e); err != nil {
			return about("write", err)
		}
		return about("write", out.Flush())
	}
	in, err := step(dir, name, j.Path)
	if err != nil {
		return err
	}
	defer unix.Close(in)
	all, err := names(in, j.Entries+1)
	if err != nil {
		return about(j.Path, err)
	}
	for _, name := range all {
		if j.res.Entries >= j.Entries {
			j.res.More = 1 // at least
			break
		}
		if e, err := entryOf(in, name); err == nil && !strings.HasPrefix(name, stagePrefix) {
			j.res.Entries++
			if err := lines.Encode(e); err != nil {
				return about("write", err)
			}
		}
	}
	return about("write", out.Flush())
}

func entryOf(dir int, name string) (Entry, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, noLink); err != nil {
		return Entry{}, err
	}
	e := Entry{Name: name, Type: "other", Size: st.Size, Mode: st.Mode & 0o7777}
	e.Modified, _ = st.Mtim.Unix()
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Type = "file"
	case unix.S_IFDIR:
		e.Type = "folder"
	case unix.S_IFLNK:
		e.Type = "link"
		e.Target, _ = readLink(dir, name)
	}
	return e, nil
}
