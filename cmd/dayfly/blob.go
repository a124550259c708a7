package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) blobCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "blob",
		Short: "Store files that many tasks need, fetch, list and remove them",
		Long: `A blob is bytes that are named by their SHA-256. It is sent once, and each worker fetches
it once for all of its tasks that name it: in "files" or "stdin_blob" of a spec. It stays
while such tasks are not over, and for a day after, or until it is removed.`,
	}
	put := &cobra.Command{
		Use:   "put FILE|-",
		Short: "Store a file, and print its name",
		Example: `  dayfly blob put dataset.tar
  tar c data | dayfly blob put -`,
		Args: cobra.ExactArgs(1),
		RunE: c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			f, err := c.blobSource(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			info, made, err := putFile(ctx, cl, f)
			if err != nil {
				return err
			}
			if !made {
				c.say("it was there")
			}
			if c.data() {
				return c.printData(info)
			}
			fmt.Fprintln(c.out, info.Blob)
			return nil
		}),
	}
	get := &cobra.Command{
		Use:               "get SHA256 [FILE|-]",
		Short:             "Fetch a blob, and verify it",
		Example:           `  dayfly blob get sha256:98ea6e4f216f2fb4b69fff9b3a44842c38686ca685f3f55dc48c5d3fb1107be4 out.txt`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: c.completeBlobs(1),
		RunE: c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			id, err := resolveBlob(ctx, cl, args[0])
			switch {
			case err != nil:
			case len(args) == 1 || args[1] == "-":
				_, err = cl.GetBlob(ctx, id, c.out)
			default:
				err = fetchTo(ctx, cl, id, args[1])
			}
			return noBlob(id, err)
		}),
	}
	ls := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the blobs, those first that were used last",
		Args:    cobra.NoArgs,
		RunE:    c.command(func(ctx context.Context, cl *client.Client, _ []string) error { return c.listBlobs(ctx, cl) }),
	}
	rm := &cobra.Command{
		Use:     "rm SHA256…",
		Aliases: []string{"remove"},
		Short:   "Remove blobs that no task needs any more",
		Long: `rm removes blobs at once: nobody finds them, and their room is free some ten minutes
later. A blob that a task needs which is not over, or a batch that is not done, stays, and
the error names them. To put it again makes it be there again.`,
		Example:           `  dayfly blob rm sha256:98ea6e4f`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: c.completeBlobs(-1),
		RunE: c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			ids, err := resolveEach(ctx, cl, args, resolveBlob)
			if err != nil {
				return err
			}
			return changeEach(c, ids, func(id schemas.BlobID) (schemas.BlobInfo, error) {
				info, err := cl.RemoveBlob(ctx, id)
				return info, noBlob(id, err)
			}, func(info schemas.BlobInfo) error {
				if c.data() {
					return c.printData(info)
				}
				_, err := fmt.Fprintln(c.out, info.Blob)
				return err
			})
		}),
	}
	cmd.AddCommand(put, get, ls, rm)
	return cmd
}

// noBlob says where to find those that there are.
func noBlob(id schemas.BlobID, err error) error {
	if errors.Is(err, schemas.CodeNotFound) {
		return &hintError{fmt.Errorf("no blob %s is stored", id), "dayfly blob ls shows those that are; dayfly blob put FILE stores one"}
	}
	return err
}

// resolveBlob finds the blob that a person means: by its name, or by the beginning of it.
func resolveBlob(ctx context.Context, cl *client.Client, arg string) (schemas.BlobID, error) {
	if id, err := schemas.ParseBlobID(arg); err == nil {
		return id, nil
	}
	id, err := byPrefix("sha256:", "blob", "dayfly blob ls", arg, func(yield func(candidate, error) bool) {
		all, err := allBlobs(ctx, cl)
		if err != nil {
			yield(candidate{}, err)
			return
		}
		slices.SortFunc(all, func(a, b schemas.BlobInfo) int { return strings.Compare(string(b.Blob), string(a.Blob)) })
		for _, b := range all {
			if !yield(candidate{string(b.Blob), b.Size.String()}, nil) {
				return
			}
		}
	})
	return schemas.BlobID(id), err
}

func allBlobs(ctx context.Context, cl *client.Client) (all []schemas.BlobInfo, err error) {
	all = []schemas.BlobInfo{}
	for b, err := range cl.AllBlobs(ctx) {
		if err != nil {
			return nil, err
		}
		all = append(all, b)
	}
	slices.Reverse(all)
	return all, nil
}

func (c *cli) listBlobs(ctx context.Context, cl *client.Client) error {
	all, err := allBlobs(ctx, cl)
	switch {
	case err != nil:
		return err
	case c.data():
		return c.printData(all)
	case c.names():
		for _, b := range all {
			fmt.Fprintln(c.out, b.Blob)
		}
		return nil
	}
	rows := [][]string{{"BLOB", "SIZE", "AGE", "USED", "NOTE"}}
	for _, b := range all {
		note := ""
		if b.InUse {
			note = "is needed"
		}
		rows = append(rows, []string{string(b.Blob), b.Size.String(), ago(time.Since(b.StoredAt)), ago(time.Since(b.UsedAt)), note})
	}
	return c.table(rows)
}

// completeBlobs completes names of blobs, up to most of them, or any number if it is -1.
func (c *cli) completeBlobs(most int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
		const no = cobra.ShellCompDirectiveNoFileComp
		if most >= 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveDefault
		}
		cl, err := c.client()
		if err != nil {
			return nil, no
		}
		l, err := cl.With(client.WithRetryFor(0)).Blobs(cmd.Context(), client.BlobListOptions{Limit: 1000})
		if err != nil {
			return nil, no
		}
		var names []string
		for _, b := range l.Items {
			if strings.HasPrefix(string(b.Blob), begun) {
				names = append(names, fmt.Sprintf("%s\t%s", b.Blob, b.Size))
			}
		}
		return names, no
	}
}

func putFile(ctx context.Context, cl *client.Client, f *os.File) (info schemas.BlobInfo, made bool, err error) {
	stat, err := f.Stat()
	if err != nil {
		return info, false, err
	}
	return cl.PutBlob(ctx, f, stat.Size())
}

// blobSource opens what is to be stored: it is read twice.
func (c *cli) blobSource(name string) (*os.File, error) {
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, &hintError{err, "a file of this machine, or - for stdin"}
		}
		if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
			return nil, errors.Join(fmt.Errorf("%s is no plain file; tar c %s | dayfly blob put - stores a folder", name, name), err, f.Close())
		}
		return f, nil
	}
	return spooled(c.in)
}

// spooled keeps what r gives in a file without a name.
func spooled(r io.Reader) (*os.File, error) {
	f, err := os.CreateTemp("", "dayfly-blob-")
	if err != nil {
		return nil, err
	}
	err = os.Remove(f.Name())
	if err == nil {
		_, err = io.Copy(f, r)
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// fetchTo writes a blob to a file, which is there whole or not at all.
func fetchTo(ctx context.Context, cl *client.Client, id schemas.BlobID, name string) error {
	if st, err := os.Stat(name); err == nil && st.IsDir() {
		return &hintError{fmt.Errorf("%s is a folder", name), filepath.Join(name, "FILE") + ", the file to write"}
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".dayfly-blob-")
	if err != nil {
		return err
	}
	_, err = cl.GetBlob(ctx, id, f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
