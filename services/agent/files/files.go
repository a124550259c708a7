// Package files reads and writes the files of a task. Serve runs inside the sandbox, as
// a program of its own with the rights of the task's user (dayfly-init files), so the
// kernel judges each path and nothing leads out. Beyond that it follows no link: each
// part of a path is opened from the folder before it, and a part that is a link is
// refused, with where it points.
//
//	put     stdin: a tar archive, framed      unpacked under Path, all of it or nothing
//	write   stdin: a file's bytes, framed     the file Path, all of it or nothing
//	get     stdout: a tar archive             of the file or folder Path
//	list    stdout: an Entry for each line    of the folder Path, or the file itself
//	delete                                    the file, or the folder with all in it
//
// Frames (NewFrames) tell the end of the input from a connection that broke off. On
// stderr comes one Result as JSON; the exit code is 0 if it has no Code.
package files

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Op is what a request asks.
type Op string

// The operations.
const (
	Put    Op = "put"
	Write  Op = "write"
	Get    Op = "get"
	List   Op = "list"
	Delete Op = "delete"
)

// Request is one thing to do. Path is slash-separated, and relative to the working
// directory of the task if it does not begin with a slash.
type Request struct {
	Op   Op     `json:"op"`
	Path string `json:"path"`
	Mode uint32 `json:"mode,omitempty"` // write; 0 is 0644. No setuid, setgid or sticky bits
	Bare bool   `json:"bare,omitempty"` // delete: a folder only if nothing is in it

	// Tidy, of put and write: only take away what one that was killed has left.
	Tidy bool `json:"tidy,omitempty"`

	// Bounds of put, write and get; 0 is MaxEntries, and no bound of bytes.
	Entries int   `json:"entries,omitempty"`
	Bytes   int64 `json:"bytes,omitempty"`
}

// Bounds.
const (
	MaxEntries = 100_000
	MaxDepth   = 64 // folders below Path
	// maxSkipped is how many of what was skipped a Result names, and maxPath how much of each
	// path: a Result is one frame of a session, also if each byte takes six in JSON.
	maxSkipped = 20
	maxPath    = 200
)

// Framed says whether the operation reads frames.
func (r Request) Framed() bool { return r.Op == Put || r.Op == Write }

// Code says what went wrong.
type Code string

// The codes.
const (
	BadPath       Code = "bad_path"
	NotFound      Code = "not_found"
	NotADirectory Code = "not_a_directory"
	IsADirectory  Code = "is_a_directory"
	IsALink       Code = "is_a_link"
	Exists        Code = "exists" // a folder where a file should be, or the other way round
	ReadOnly      Code = "read_only"
	NoSpace       Code = "no_space"
	Permission    Code = "permission"
	TooMany       Code = "too_many"
	TooLarge      Code = "too_large"
	TooDeep       Code = "too_deep"
	BadArchive    Code = "bad_archive"
	CutOff        Code = "cut_off" // the input broke off
	Failed        Code = "failed"
)

// Result is how a request ended. Nothing was changed by a put or a write with a Code.
type Result struct {
	Code    Code   `json:"code,omitempty"`
	Message string `json:"message,omitempty"` // a sentence for people

	Entries int       `json:"entries"`
	Bytes   int64     `json:"bytes"`
	Skipped []Skipped `json:"skipped,omitempty"` // by get; the first of them
	More    int       `json:"more,omitempty"`    // how many more were skipped; of a list, that there are more
}

// Write writes the result as the program does on stderr.
func (r Result) Write(w io.Writer) error {
	r.Message = clip(r.Message, 4*maxPath)
	for i := range r.Skipped {
		r.Skipped[i].Path = clip(r.Skipped[i].Path, maxPath)
	}
	return json.NewEncoder(w).Encode(r)
}

// clip gives the end of a text that is too long.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	s = s[len(s)-most:]
	for len(s) > 0 && !utf8.RuneStart(s[0]) {
		s = s[1:]
	}
	return "…" + s
}

// ExitCode is that of the program.
func (r Result) ExitCode() int {
	if r.Code != "" {
		return 1
	}
	return 0
}

// Skipped is what a get has left out.
type Skipped struct {
	Path string `json:"path"`
	Why  string `json:"why"`
}

// Entry is a line of a list.
type Entry struct {
	Name     string `json:"name"`
	Type     string `json:"type"` // file, folder, link, other
	Size     int64  `json:"size"`
	Mode     uint32 `json:"mode"`
	Modified int64  `json:"modified"`         // seconds since 1970
	Target   string `json:"target,omitempty"` // of a link
}

// fault is an error with a code.
type fault struct {
	code    Code
	message string
}

func (f *fault) Error() string { return f.message }

func faultf(code Code, format string, args ...any) *fault {
	return &fault{code, fmt.Sprintf(format, args...)}
}

// about gives an errno of the kernel the words of a fault.
func about(name string, err error) error {
	var f *fault
	var no unix.Errno
	if err == nil || errors.As(err, &f) {
		return err
	}
	if !errors.As(err, &no) {
		return faultf(Failed, "%s: %s", name, err)
	}
	code := Failed
	switch no {
	case unix.ENOENT:
		code = NotFound
	case unix.ENOTDIR:
		code = NotADirectory
	case unix.EISDIR:
		code = IsADirectory
	case unix.ELOOP:
		code = IsALink
	case unix.EEXIST, unix.ENOTEMPTY:
		code = Exists
	case unix.EROFS:
		return faultf(ReadOnly, "%s: this place is read-only; /tmp and /task/output are not", name)
	case unix.ENOSPC, unix.EDQUOT:
		return faultf(NoSpace, "%s: there is no space left", name)
	case unix.EACCES, unix.EPERM, unix.EBUSY:
		code = Permission
	case unix.EFBIG:
		code = TooLarge
	case unix.ENAMETOOLONG:
		code = BadPath
	}
	return faultf(code, "%s: %s", name, no)
}

// job is a request under way.
type job struct {
	Request
	root int // the folder that "/" is
	in   io.Reader
	out  io.Writer
	buf  []byte
	res  Result
}

// Serve does what the request asks. root is a descriptor of the folder that is "/", and
// dir what a relative path begins at. It expects an umask of 0.
func Serve(root int, dir string, r Request, in io.Reader, out io.Writer) Result {
	j := &job{Request: r, root: root, in: in, out: out, buf: make([]byte, 128<<10)}
	if j.Entries <= 0 || j.Entries > MaxEntries {
		j.Entries = MaxEntries
	}
	err := j.serve(dir)
	var f *fault
	switch {
	case err == nil:
	case errors.As(err, &f):
		j.res.Code, j.res.Message = f.code, f.message
	default:
		j.res.Code, j.res.Message = Failed, err.Error()
	}
	return j.res
}

func (j *job) serve(dir string) error {
	if j.Path == "" || len(j.Path) > 4096 || strings.ContainsRune(j.Path, 0) {
		return faultf(BadPath, "a path of 1 to 4096 bytes is needed")
	}
	for part := range strings.SplitSeq(j.Path, "/") {
		if part == ".." {
			return faultf(BadPath, "%s: .. leads to no place of its own; name the folder", j.Path)
		}
	}
	p := j.Path
	if !path.IsAbs(p) {
		p = path.Join(dir, p)
	}
	parts := split(p)
	switch j.Op {
	case Put:
		return j.place(parts, j.unpack)
	case Write:
		if len(parts) == 0 || strings.HasSuffix(j.Path, "/") {
			return faultf(IsADirectory, "%s: is a folder", j.Path)
		}
		if dir, rest, err := j.descend(parts); err == nil {
			_ = unix.Close(dir)
			if len(rest) == 0 {
				return faultf(IsADirectory, "%s: is a folder; name the file in it", j.Path)
			}
		}
		name := parts[len(parts)-1]
		return j.place(parts[:len(parts)-1], func(dir int) error { return j.writeFile(dir, name) })
	case Get:
		return j.get(parts)
	case List:
		return j.list(parts)
	case Delete:
		return j.remove(parts)
	}
	return faultf(Failed, "unknown operation %q", j.Op)
}

func split(p string) (parts []string) {
	for part := range strings.SplitSeq(path.Clean(p), "/") {
		if part != "" && part != "." {
			parts = append(parts, part)
		}
	}
	return parts
}
