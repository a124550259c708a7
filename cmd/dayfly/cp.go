package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) cpCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cp SRC ID:PATH | ID:PATH DST",
		Short: "Copy files into a running task, or out of it",
		Long: `cp copies a file or a folder with all that is in it. What is copied into a task is there
as a whole or not at all. A destination that ends with / is the folder to copy into; one
of this machine also if it is a folder that is there.

As SRC, - is a tar archive on stdin, which is unpacked into the folder PATH. As DST it is
stdout: a file's bytes, or a tar archive of a folder.

Nothing is ever written outside of DST. What a copy leaves out, such as sockets and links
that lead elsewhere, is said on stderr.

What a task left in its output folder is there after its end: dayfly artifacts get.`,
		Example: `  dayfly cp main.py t-01jd6q0t:/tmp/
  dayfly cp t-01jd6q0t:/task/output results
  tar c src | dayfly cp - t-01jd6q0t:/tmp/work`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: c.completeTasks(true),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		srcTask, src, out := remote(args[0])
		dstTask, dst, in := remote(args[1])
		if in == out {
			return &usageError{errors.New("one of the two must be ID:PATH, and the other of this machine"), cmd.CommandPath()}
		}
		return c.command(func(ctx context.Context, cl *client.Client, _ []string) error {
			id, err := c.resolve(ctx, cl, srcTask+dstTask)
			if err != nil {
				return err
			}
			if in {
				return copyError(c.copyIn(ctx, cl, id, src, dst), id, src, dst)
			}
			return copyError(c.copyOut(ctx, cl, id, src, dst), id, src, src)
		})(cmd, args)
	}
	return cmd
}

// copyError adds the next step to what a task's files are refused for. there is the path in
// the task.
func copyError(err error, id schemas.TaskID, src, there string) error {
	if local, ok := errors.AsType[*fs.PathError](err); ok && local.Path == src {
		return &hintError{err, "a file or folder of this machine, or - for a tar archive on stdin"}
	}
	e, ok := errors.AsType[*schemas.Error](err)
	if !ok || e.Code == schemas.CodeNotFound && e.Task == "" { // it is the task that is not there
		return err
	}
	hint := ""
	switch e.Code {
	case schemas.CodeStateConflict:
		if there != src || !e.State.Final() {
			return err
		}
		hint = fmt.Sprintf("dayfly artifacts %s: what it left in its output folder", id)
	case schemas.CodeNotFound:
		hint = fmt.Sprintf("dayfly exec %s ls -la %s, if the image has ls", id, path.Dir(path.Clean(there)))
	case schemas.CodePermission:
		hint = fmt.Sprintf("%s:/tmp/, which every task may write to; a task can be given more with --tmpfs", id)
		if there == src {
			hint = "dayfly cp copies as the task's own user, with no other rights"
		}
	case schemas.CodeInvalidValue, schemas.CodeInvalidQuery, schemas.CodeBadArchive:
		hint = "dayfly cp --help"
		if src != "-" && there != src && strings.Contains(e.Detail, "is a folder") {
			hint = fmt.Sprintf("dayfly cp %s %s:%s/ to copy into it", src, id, there)
		}
	case schemas.CodeNoSpace:
		hint = fmt.Sprintf("dayfly exec %s df -h; a task has more with --disk and --tmpfs", id)
	case schemas.CodeTooLarge:
		hint = "the folders in it one by one, or a tar of it as one file"
	default:
		return err
	}
	return &hintError{err, hint}
}

// remote takes ID:PATH apart. A path of this machine with a colon begins with . or /.
func remote(arg string) (id, file string, ok bool) {
	id, file, ok = strings.Cut(arg, ":")
	if !ok || strings.ContainsAny(id, "./") || id == "" {
		return "", arg, false
	}
	return id, file, true
}

func (c *cli) copyIn(ctx context.Context, cl *client.Client, id schemas.TaskID, src, dst string) error {
	if src == "-" {
		_, err := cl.PutArchive(ctx, id, dst, c.in)
		return err
	}
	if strings.HasSuffix(dst, "/") {
		abs, err := filepath.Abs(src)
		if err != nil {
			return err
		}
		dst += filepath.Base(abs)
	}
	f, err := os.Open(src)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return err
	case st.Mode().IsRegular():
		_, err = cl.PutFile(ctx, id, dst, io.LimitReader(f, st.Size()), st.Size(), st.Mode())
		return err
	case !st.IsDir():
		return fmt.Errorf("%s is no file and no folder", src)
	}
	r, w := io.Pipe()
	defer r.Close()
	go func() { _ = w.CloseWithError(c.archive(w, src)) }()
	_, err = cl.PutArchive(ctx, id, dst, r)
	return err
}

// archive writes what is in a folder, without what is no file, folder or link.
func (c *cli) archive(to io.Writer, folder string) error {
	w := tar.NewWriter(to)
	root, err := os.OpenRoot(folder)
	if err != nil {
		return err
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		target := ""
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			if target, err = root.Readlink(name); err != nil {
				return err
			}
			if out := path.Join(path.Dir(name), target); path.IsAbs(target) || out == ".." || strings.HasPrefix(out, "../") {
				c.tell("left out: %s: a link that leads out of the folder", name)
				return nil
			}
		case !info.Mode().IsRegular() && !info.IsDir():
			c.tell("left out: %s: no file, folder or link", name)
			return nil
		}
		h, err := tar.FileInfoHeader(info, target)
		if err != nil {
			return err
		}
		h.Name, h.Uid, h.Gid, h.Uname, h.Gname = name, 0, 0, "", ""
		if err := w.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
			return err
		}
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.CopyN(w, f, h.Size)
		return err
	})
	if err == nil {
		err = w.Close()
	}
	return err
}

func (c *cli) copyOut(ctx context.Context, cl *client.Client, id schemas.TaskID, src, dst string) error {
	d, err := cl.GetFiles(ctx, id, src)
	if err != nil {
		return err
	}
	defer d.Close()
	base := path.Base(path.Clean("/" + src))
	if st, err := os.Stat(dst); dst != "-" && (strings.HasSuffix(dst, "/") || err == nil && st.IsDir()) {
		if base == "/" {
			base = "root"
		}
		dst = filepath.Join(dst, base)
	}
	switch {
	case dst == "-":
		_, err = io.Copy(c.out, d)
	case d.Archive:
		if err = os.MkdirAll(dst, 0o755); err == nil {
			err = unpack(d, dst)
		}
		if err == nil {
			_, err = io.Copy(io.Discard, d)
		}
	default:
		err = saveFile(d, dst)
	}
	if err != nil {
		return fmt.Errorf("not all has come: %w", err)
	}
	skipped := d.Skipped()
	for _, k := range skipped.Skipped {
		c.tell("left out: %s: %s", printable(k.Path), printable(k.Why))
	}
	if skipped.More > 0 {
		c.tell("left out: %d more", skipped.More)
	}
	return nil
}

// saveFile writes a file beside its place, and puts it there once it is whole.
func saveFile(r io.Reader, dst string) error {
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(dst), ".dayfly-cp-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), dst)
}

// unpack writes an archive below a folder, without the name that all its entries begin
// with. Whatever its names and links say, nothing is written elsewhere: os.Root sees to it.
func unpack(r io.Reader, dst string) error {
	root, err := os.OpenRoot(dst)
	if err != nil {
		return err
	}
	defer root.Close()
	for archive := tar.NewReader(r); ; {
		h, err := archive.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		_, name, _ := strings.Cut(path.Clean(h.Name), "/")
		if name == "" {
			continue // the folder itself
		}
		if !filepath.IsLocal(name) {
			return fmt.Errorf("the archive has a name that leads out of it: %q", h.Name)
		}
		if err := unpackEntry(root, name, h, archive); err != nil {
			return err
		}
	}
}

func unpackEntry(root *os.Root, name string, h *tar.Header, body io.Reader) error {
	mode := fs.FileMode(h.Mode).Perm()
	if h.Typeflag == tar.TypeDir {
		return root.MkdirAll(name, mode|0o700)
	}
	if dir := path.Dir(name); dir != "." {
		if err := root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if st, err := root.Lstat(name); err == nil && !st.IsDir() {
		if err := root.Remove(name); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, body)
		return errors.Join(err, f.Close())
	case tar.TypeSymlink:
		if !filepath.IsLocal(path.Join(path.Dir(name), h.Linkname)) || path.IsAbs(h.Linkname) {
			return fmt.Errorf("the archive has a link that leads out of it: %q", h.Name)
		}
		return root.Symlink(h.Linkname, name)
	}
	return fmt.Errorf("the archive has something that is no file, folder or link: %q", h.Name)
}
