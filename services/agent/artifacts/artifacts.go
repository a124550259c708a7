// Package artifacts reads what a task left in its output folder. Whoever wrote that may
// wish us ill, and is gone: no process of the task is left while Collect reads.
//
// Only regular files count. Each part of a path is opened from the folder before it and
// never through a link, so nothing leads out of the folder, and what is another file
// system's is left alone; that is what openat2 with BENEATH, NO_SYMLINKS and NO_XDEV would
// see to, on any kernel. Whatever is left out is named, with why.
package artifacts

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
)

// Limits bound what is taken.
type Limits struct {
	Bytes int64
	Files int
	// Enough says that it has taken too long: no further file is begun.
	Enough func() bool
}

// Found is what there was.
type Found struct {
	Artifacts []schemas.Artifact // the first that a record may have
	Sum       schemas.ArtifactSum
}

// Why something is no artifact, beside the reasons of schemas.ArtifactSum.
const (
	whyLink   = "a link"
	whyTwin   = "another name of a file that is taken"
	whyMount  = "on another file system"
	whyPipe   = "a pipe"
	whySocket = "a socket"
	whyDevice = "a device"
)

// sentences are what the list says for a reason of the sum.
var sentences = map[string]string{
	schemas.ArtifactsLimit:      "too large: with those before it it is longer than all may be together",
	schemas.ArtifactsCount:      "too many files",
	schemas.ArtifactsDepth:      "below too many folders",
	schemas.ArtifactsName:       "its name is too long, no UTF-8, or has control characters",
	schemas.ArtifactsUnreadable: "it could not be read",
	schemas.ArtifactsTimeout:    "there was no time left to store it",
}

// maxNames bounds how many names of one folder are looked at, and so the memory that
// sorting them takes.
const maxNames = 100_000

// listSpare is room in the list for what was skipped, and for one more file.
const listSpare = 4 << 20

// Empty says whether nothing is in a folder.
func Empty(dir *os.File) (bool, error) {
	f, err := open(int(dir.Fd()), ".", unix.O_DIRECTORY)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if err == io.EOF {
		return true, nil
	}
	return false, err
}

// Collect writes every regular file below dir to w, in the order of their paths, and
// behind them the list. An error is of w alone.
func Collect(dir *os.File, l Limits, w io.Writer) (Found, error) {
	c := &collector{Limits: l, w: w, buf: make([]byte, 128<<10), sum: sha256.New()}
	root, err := open(int(dir.Fd()), ".", unix.O_DIRECTORY)
	if err != nil {
		c.leave("", schemas.ArtifactsUnreadable)
		return c.found, nil
	}
	defer root.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &st); err != nil {
		c.leave("", schemas.ArtifactsUnreadable)
		return c.found, nil
	}
	c.dev = st.Dev
	if err := c.folder(root, "", 0); err != nil && !errors.Is(err, errEnough) {
		return Found{}, err
	}
	if c.list.Len() == 0 {
		return c.found, nil
	}
	list := sha256.Sum256(c.list.Bytes())
	c.found.Sum.ListBytes, c.found.Sum.ListSHA256 = int64(c.list.Len()), hex.EncodeToString(list[:])
	if _, err := w.Write(c.list.Bytes()); err != nil {
		return Found{}, err
	}
	return c.found, nil
}

// errEnough ends the walk without a fault.
var errEnough = errors.New("enough")

type collector struct {
	Limits
	w     io.Writer
	buf   []byte
	sum   hash.Hash
	dev   uint64
	twins map[uint64]bool // inodes of files with several names that are taken

	found  Found
	list   bytes.Buffer
	listed int // skipped things that the list names
}

// open opens a name in a folder for reading. It follows no link, and waits for nobody.
func open(dir int, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// skip names what is no artifact.
func (c *collector) skip(path, why string) {
	c.found.Sum.Skipped++
	if c.listed == schemas.MaxArtifactSkipped {
		return
	}
	c.listed++
	c.line(schemas.ArtifactLine{Name: shown(path), Skipped: why})
}

// shown is a path as one may print it: quoted if it is no plain text.
func shown(path string) string {
	if len(path) <= schemas.MaxArtifactName && schemas.ArtifactName(path) {
		return path
	}
	if len(path) > schemas.MaxArtifactName/4 {
		path = path[:schemas.MaxArtifactName/4]
	}
	return strconv.QuoteToASCII(path)
}

// leave names a file, or a folder, that should have been taken and was not.
func (c *collector) leave(path, why string) {
	if s := &c.found.Sum; !s.Truncated {
		s.Truncated, s.Why = true, why
	}
	c.skip(path, sentences[why])
}

func (c *collector) line(l schemas.ArtifactLine) {
	text, err := schemas.Encode(l)
	if err != nil { // its name is checked
		return
	}
	c.list.Write(text)
	c.list.WriteByte('\n')
}

func (c *collector) folder(f *os.File, path string, depth int) error {
	list, more := names(f)
	for _, e := range list {
		if err := c.entry(int(f.Fd()), e, path, depth); err != nil {
			return err
		}
	}
	if more {
		c.leave(path+"…", schemas.ArtifactsCount)
	}
	return nil
}

// names gives what is in a folder, sorted, and says whether there is more than is
// looked at.
func names(f *os.File) (list []string, more bool) {
	for len(list) < maxNames {
		got, err := f.Readdirnames(min(4096, maxNames-len(list)))
		list = append(list, got...)
		if err != nil || len(got) == 0 {
			slices.Sort(list)
			return list, err != nil && err != io.EOF
		}
	}
	rest, _ := f.Readdirnames(1)
	slices.Sort(list)
	return list, len(rest) > 0
}

func (c *collector) entry(dir int, name, above string, depth int) error {
	path := above + name
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		c.leave(path, schemas.ArtifactsUnreadable)
		return nil
	}
	switch kind := st.Mode & unix.S_IFMT; {
	case kind == unix.S_IFLNK:
		c.skip(path, whyLink)
	case kind == unix.S_IFIFO:
		c.skip(path, whyPipe)
	case kind == unix.S_IFSOCK:
		c.skip(path, whySocket)
	case kind != unix.S_IFREG && kind != unix.S_IFDIR:
		c.skip(path, whyDevice)
	case st.Dev != c.dev:
		c.skip(path, whyMount)
	case kind == unix.S_IFREG:
		return c.file(dir, name, path, st)
	case depth == schemas.MaxArtifactDepth:
		c.leave(path, schemas.ArtifactsDepth)
	default:
		f, err := open(dir, name, unix.O_DIRECTORY)
		if err != nil {
			c.leave(path, schemas.ArtifactsUnreadable)
			return nil
		}
		defer f.Close()
		return c.folder(f, path+"/", depth+1)
	}
	return nil
}

// file takes one file, if it may be taken.
func (c *collector) file(dir int, name, path string, st unix.Stat_t) error {
	s := &c.found.Sum
	switch {
	case c.Enough != nil && c.Enough():
		c.leave(path, schemas.ArtifactsTimeout)
		return errEnough
	case st.Nlink > 1 && c.twins[st.Ino]:
		c.skip(path, whyTwin)
		return nil
	case !schemas.ArtifactName(path):
		c.leave(path, schemas.ArtifactsName)
		return nil
	case s.Count >= c.Files || c.list.Len() > schemas.MaxArtifactList-listSpare:
		c.leave(path, schemas.ArtifactsCount)
		return nil
	case st.Size > c.Bytes-s.Bytes: // its holes count, as in every copy of it
		c.leave(path, schemas.ArtifactsLimit)
		return nil
	}
	f, err := open(dir, name, 0)
	if err != nil {
		c.leave(path, schemas.ArtifactsUnreadable)
		return nil
	}
	defer f.Close()
	var now unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &now); err != nil || now.Ino != st.Ino || now.Dev != st.Dev || now.Mode&unix.S_IFMT != unix.S_IFREG {
		c.leave(path, schemas.ArtifactsUnreadable)
		return nil
	}
	n, failed, err := c.copy(f, st.Size)
	if err != nil {
		return err
	}
	offset := s.Stored
	s.Stored += n
	if failed != nil {
		c.leave(path, schemas.ArtifactsUnreadable)
		if s.Stored > 2*c.Bytes { // never: what cannot be read is no longer than what can
			return fmt.Errorf("too much that cannot be read: %w", failed)
		}
		return nil
	}
	if st.Nlink > 1 {
		if c.twins == nil {
			c.twins = map[uint64]bool{}
		}
		c.twins[st.Ino] = true
	}
	a := schemas.Artifact{Name: path, Size: n, SHA256: hex.EncodeToString(c.sum.Sum(nil))}
	s.Count++
	s.Bytes += n
	if len(c.found.Artifacts) < schemas.MaxInlineArtifacts {
		c.found.Artifacts = append(c.found.Artifacts, a)
	}
	c.line(schemas.ArtifactLine{Name: a.Name, Offset: offset, Size: n, SHA256: a.SHA256})
	return nil
}

// copy writes the first size bytes of f to w and hashes them. failed is of f, err of w.
func (c *collector) copy(f *os.File, size int64) (n int64, failed, err error) {
	c.sum.Reset()
	for n < size {
		got, err := f.Read(c.buf[:min(int64(len(c.buf)), size-n)])
		if got > 0 {
			c.sum.Write(c.buf[:got])
			n += int64(got)
			if _, err := c.w.Write(c.buf[:got]); err != nil {
				return n, nil, err
			}
		}
		if err == io.EOF {
			return n, nil, nil // shorter than it said
		}
		if err != nil {
			return n, err, nil
		}
	}
	return n, nil, nil
}
