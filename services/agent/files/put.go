package files

import (
	"archive/tar"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// stagePrefix begins the name of the hidden folder in which a put is gathered. Its lock
// is held for as long as somebody gathers in it.
const stagePrefix = ".dayfly-put-"

// place lets fill make files in a hidden folder on the same mount, and moves them into
// the folder that parts name once all are there. Folders on the way are made.
func (j *job) place(parts []string, fill func(dir int) error) (err error) {
	dir, rest, err := j.descend(parts)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	sweep(dir)
	if j.Tidy {
		return nil
	}
	var name [8]byte
	_, _ = rand.Read(name[:]) // never fails
	hidden := stagePrefix + hex.EncodeToString(name[:])
	if err := unix.Mkdirat(dir, hidden, 0o700); err != nil {
		return about(j.Path, err)
	}
	defer func() { _, _ = removeAll(dir, hidden, true, 0) }()
	stage, err := unix.Openat(dir, hidden, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return about(j.Path, err)
	}
	defer unix.Close(stage)
	_ = unix.Flock(stage, unix.LOCK_EX|unix.LOCK_NB)

	// new is what is renamed: the set itself, or the first folder that is not there yet.
	into := unixFolder(stage, "new", &err)
	for _, name := range rest[min(1, len(rest)):] {
		next := unixFolder(into, name, &err)
		_ = unix.Close(into)
		into = next
	}
	if err != nil {
		return about(j.Path, err)
	}
	defer unix.Close(into)
	j.in = &unframe{r: j.in}
	if err := fill(into); err != nil {
		return err
	}
	if _, err := io.CopyBuffer(io.Discard, j.in, j.buf); err != nil { // what follows an archive, to its end
		return err
	}
	if len(rest) > 0 {
		return about(j.Path, unix.Renameat2(stage, "new", dir, rest[0], unix.RENAME_NOREPLACE))
	}
	m := merge{from: into, to: dir}
	if err := m.folder(into, dir, ""); err != nil {
		m.undo()
		return err
	}
	return nil
}

func unixFolder(dir int, name string, err *error) int {
	if *err == nil {
		*err = unix.Mkdirat(dir, name, 0o755)
	}
	if *err != nil {
		return -1
	}
	var fd int
	fd, *err = unix.Openat(dir, name, folder, 0)
	return fd
}

// sweep takes away what a put has left that was killed.
func sweep(dir int) {
	list, err := names(dir, 16<<10)
	if err != nil {
		return
	}
	for _, name := range list {
		if !strings.HasPrefix(name, stagePrefix) {
			continue
		}
		fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil {
			_, _ = removeAll(dir, name, true, 0)
		}
		_ = unix.Close(fd)
	}
}

// merge moves a set into a folder that has something already. What it replaces changes
// places with the new, so that all can be undone.
type merge struct {
	from, to int
	moved    []move
}

type move struct {
	path     string
	exchange bool
}

func (m *merge) folder(from, to int, at string) error {
	list, err := names(from, -1)
	if err != nil {
		return about(at, err)
	}
	for _, name := range list {
		shown := path.Join(at, name)
		var ours, theirs unix.Stat_t
		if err := unix.Fstatat(from, name, &ours, noLink); err != nil {
			return about(shown, err)
		}
		err := unix.Fstatat(to, name, &theirs, noLink)
		isFolder, wasFolder := ours.Mode&unix.S_IFMT == unix.S_IFDIR, theirs.Mode&unix.S_IFMT == unix.S_IFDIR
		flags := uint(unix.RENAME_EXCHANGE)
		switch {
		case err == unix.ENOENT:
			flags = unix.RENAME_NOREPLACE
		case err != nil:
			return about(shown, err)
		case isFolder && wasFolder:
			if err := m.down(from, to, name, shown); err != nil {
				return err
			}
			continue
		case wasFolder:
			return faultf(Exists, "%s: there is a folder of that name", shown)
		case isFolder:
			return faultf(Exists, "%s: there is something of that name that is no folder", shown)
		}
		if err := unix.Renameat2(from, name, to, name, flags); err != nil {
			return about(shown, err)
		}
		m.moved = append(m.moved, move{shown, flags == unix.RENAME_EXCHANGE})
	}
	return nil
}

func (m *merge) down(from, to int, name, shown string) error {
	f, err := step(from, name, shown)
	if err != nil {
		return err
	}
	defer unix.Close(f)
	t, err := step(to, name, shown)
	if err != nil {
		return err
	}
	defer unix.Close(t)
	return m.folder(f, t, shown)
}

func (m *merge) undo() {
	for i := len(m.moved) - 1; i >= 0; i-- {
		mv := m.moved[i]
		from, to := reach(m.from, path.Dir(mv.path)), reach(m.to, path.Dir(mv.path))
		if name := path.Base(mv.path); from >= 0 && to >= 0 {
			if mv.exchange {
				_ = unix.Renameat2(to, name, from, name, unix.RENAME_EXCHANGE)
			} else {
				_ = unix.Renameat2(to, name, from, name, unix.RENAME_NOREPLACE)
			}
		}
		_, _ = unix.Close(from), unix.Close(to)
	}
}

func reach(dir int, at string) int {
	fd, err := unix.Openat(dir, ".", folder, 0)
	for _, name := range split(at) {
		if err != nil {
			return -1
		}
		var next int
		next, err = unix.Openat(fd, name, folder, 0)
		_ = unix.Close(fd)
		fd = next
	}
	if err != nil {
		return -1
	}
	return fd
}

// copyFile writes what r gives into a new file.
func (j *job) copyFile(dir int, name, shown string, mode uint32, r io.Reader) error {
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode&0o777)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	for {
		n, err := r.Read(j.buf)
		if j.res.Bytes += int64(n); j.Bytes > 0 && j.res.Bytes > j.Bytes {
			return faultf(TooLarge, "%s: more than the %d bytes that may come at a time", shown, j.Bytes)
		}
		if _, err := f.Write(j.buf[:n]); err != nil {
			return about(shown, err)
		}
		switch {
		case err == io.EOF:
			return about(shown, f.Close())
		case err != nil:
			return inArchive(err)
		}
	}
}

func (j *job) writeFile(dir int, name string) error {
	mode := j.Mode
	if mode == 0 {
		mode = 0o644
	}
	j.res.Entries = 1
	return about(j.Path, j.copyFile(dir, name, j.Path, mode, j.in))
}

// unpack makes the files of the archive in dir.
func (j *job) unpack(dir int) error {
	u := &unpacker{job: j, dir: dir, at: -1}
	defer u.close()
	archive := tar.NewReader(j.in)
	for {
		h, err := archive.Next()
		if err == io.EOF {
			return u.seal()
		}
		if err != nil {
			return inArchive(err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if j.res.Entries++; j.res.Entries > j.Entries {
			return faultf(TooMany, "the archive has more than %d entries", j.Entries)
		}
		if err := u.entry(h, archive); err != nil {
			return inArchive(err)
		}
	}
}

// inArchive is what an error of the archive's reader means.
func inArchive(err error) error {
	var f *fault
	if errors.As(err, &f) {
		return f
	}
	return faultf(BadArchive, "the archive cannot be read: %s", err)
}

// unpacker keeps the folder of the last entry open, since the next is often beside it.
type unpacker struct {
	*job
	dir    int
	folder string
	at     int // -1: none
	closed []closed
}

// closed is a folder that its owner may not enter in the end.
type closed struct {
	path string
	mode uint32
}

func (u *unpacker) close() {
	if u.at >= 0 {
		_ = unix.Close(u.at)
		u.at = -1
	}
}

// clean checks a name of the archive.
func clean(name string) ([]string, error) {
	bad := func(why string) ([]string, error) {
		return nil, faultf(BadArchive, "the archive has an entry %s: %.200q", why, name)
	}
	switch {
	case name == "" || strings.ContainsRune(name, 0) || len(name) > 4096:
		return bad("without a name that can be used")
	case strings.HasPrefix(name, "/"):
		return bad("with an absolute name")
	}
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "..":
			return bad("whose name leads out of it")
		case len(part) > 255:
			return bad("whose name is too long")
		case part != "" && part != ".":
			parts = append(parts, part)
		}
	}
	if len(parts) > MaxDepth {
		return nil, faultf(TooDeep, "the archive has folders more than %d deep", MaxDepth)
	}
	return parts, nil
}

// enter opens a folder of the set, and makes it if it is not there. The descriptor is
// the unpacker's.
func (u *unpacker) enter(parts []string) (int, error) {
	want := strings.Join(parts, "/")
	if u.at >= 0 && u.folder == want {
		return u.at, nil
	}
	u.close()
	fd, err := unix.Openat(u.dir, ".", folder, 0)
	for i := 0; i < len(parts) && err == nil; i++ {
		if e := unix.Mkdirat(fd, parts[i], 0o755); e != nil && e != unix.EEXIST {
			err = about(want, e)
		}
		var next int
		if err == nil {
			if next, err = unix.Openat(fd, parts[i], folder, 0); err == unix.ENOTDIR || err == unix.ELOOP {
				err = faultf(BadArchive, "the archive has an entry below %.200q, which is no folder in it", strings.Join(parts[:i+1], "/"))
			}
		}
		_ = unix.Close(fd)
		fd = next
	}
	if err != nil {
		return -1, about(want, err)
	}
	u.at, u.folder = fd, want
	return fd, nil
}

func (u *unpacker) entry(h *tar.Header, body io.Reader) error {
	parts, err := clean(h.Name)
	if err != nil {
		return err
	}
	mode := uint32(h.Mode) & 0o777
	if len(parts) == 0 {
		if h.Typeflag != tar.TypeDir {
			return faultf(BadArchive, "the archive has an entry without a name that can be used: %.200q", h.Name)
		}
		return nil // the folder that it is unpacked into stays as it is
	}
	if h.Typeflag == tar.TypeDir {
		return u.makeFolder(parts, mode)
	}
	name := parts[len(parts)-1]
	dir, err := u.enter(parts[:len(parts)-1])
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		if u.Bytes > 0 && h.Size > u.Bytes-u.res.Bytes {
			return faultf(TooLarge, "the archive has more than the %d bytes that may come at a time", u.Bytes)
		}
		if err = u.copyFile(dir, name, h.Name, mode, body); err == nil && !h.ModTime.IsZero() {
			at := unix.NsecToTimespec(h.ModTime.UnixNano())
			_ = unix.UtimesNanoAt(dir, name, []unix.Timespec{at, at}, noLink)
		}
	case tar.TypeSymlink:
		if !staysIn(parts, h.Linkname) {
			return faultf(BadArchive, "the archive has a link that leads out of it: %.200q", h.Name)
		}
		err = unix.Symlinkat(h.Linkname, dir, name)
	case tar.TypeLink:
		err = u.hardLink(h, dir, name)
	default:
		return faultf(BadArchive, "the archive has an entry that is no file, folder or link: %.200q", h.Name)
	}
	if err == unix.EEXIST {
		return faultf(BadArchive, "the archive has an entry twice: %.200q", h.Name)
	}
	return about(h.Name, err)
}

func (u *unpacker) makeFolder(parts []string, mode uint32) error {
	dir, err := u.enter(parts)
	if err != nil {
		return err
	}
	if mode&0o700 != 0o700 {
		if len(u.closed) >= MaxEntries {
			return faultf(TooMany, "the archive has too many folders that their owner may not enter")
		}
		u.closed = append(u.closed, closed{strings.Join(parts, "/"), mode})
		return nil
	}
	return chmod(dir, mode)
}

// chmod changes the mode of an open folder.
func chmod(dir int, mode uint32) error {
	fd, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fchmod(fd, mode)
}

// seal gives the folders their modes that nothing could have been put into with them,
// the inner ones first.
func (u *unpacker) seal() error {
	for i := len(u.closed) - 1; i >= 0; i-- {
		c := u.closed[i]
		fd := reach(u.dir, c.path)
		if fd < 0 {
			continue // it came twice
		}
		err := chmod(fd, c.mode)
		_ = unix.Close(fd)
		if err != nil {
			return about(c.path, err)
		}
	}
	return nil
}

// staysIn says whether a link at parts, read by its letters, leads to a place of the set.
func staysIn(parts []string, target string) bool {
	if target == "" || path.IsAbs(target) || strings.ContainsRune(target, 0) {
		return false
	}
	to := path.Join(strings.Join(parts[:len(parts)-1], "/"), target)
	return to != ".." && !strings.HasPrefix(to, "../")
}

// hardLink makes another name of a file of the set.
func (u *unpacker) hardLink(h *tar.Header, dir int, name string) error {
	parts, err := clean(h.Linkname)
	if err != nil {
		return err
	}
	missing := faultf(BadArchive, "the archive has a link to what is no file in it: %.200q", h.Name)
	if len(parts) == 0 {
		return missing
	}
	from := reach(u.dir, strings.Join(parts[:len(parts)-1], "/"))
	if from < 0 {
		return missing
	}
	defer unix.Close(from)
	var st unix.Stat_t
	of := parts[len(parts)-1]
	if unix.Fstatat(from, of, &st, noLink) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return missing
	}
	return unix.Linkat(from, of, dir, name, 0)
}
