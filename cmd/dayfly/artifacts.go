package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) artifactsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "artifacts ID",
		Short: "List or get what a task left in its output folder",
		Long: `artifacts lists the files that a task left in /task/output, once it is over. They are
kept as long as the task is.`,
		Example: `  dayfly artifacts t-01jd6q0t
  dayfly artifacts get t-01jd6q0t report.pdf
  dayfly artifacts get t-01jd6q0t --to results`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeTasks(false),
	}
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		id, err := c.resolve(ctx, cl, args[0])
		if err != nil {
			return err
		}
		list, err := cl.Artifacts(ctx, id)
		if err != nil {
			return c.notOver(err, id)
		}
		return c.listArtifacts(list)
	})
	cmd.AddCommand(c.artifactsGetCommand())
	return cmd
}

// notOver says what to do about artifacts that are not there yet.
func (c *cli) notOver(err error, id schemas.TaskID) error {
	if errors.Is(err, schemas.CodeStateConflict) {
		return &hintError{err, fmt.Sprintf("dayfly wait %s first, or dayfly cp %s:PATH DST of what is there now", id, id)}
	}
	return err
}

func (c *cli) listArtifacts(list schemas.ArtifactList) error {
	switch {
	case c.data():
		return c.printData(list)
	case c.names():
		for _, a := range list.Items {
			fmt.Fprintln(c.out, a.Name)
		}
		return nil
	}
	rows := [][]string{{"NAME", "BYTES", "SHA256"}}
	for _, a := range list.Items {
		rows = append(rows, []string{a.Name, strconv.FormatInt(a.Size, 10), a.SHA256})
	}
	if err := c.table(rows); err != nil {
		return err
	}
	c.tellSkipped(list)
	return nil
}

// tellSkipped says what the task left and dayfly did not keep.
func (c *cli) tellSkipped(list schemas.ArtifactList) {
	for i, s := range list.Skipped {
		if i == 20 {
			break
		}
		c.tell("left out: %s: %s", printable(s.Name), printable(s.Why))
	}
	if more := list.Sum.Skipped - min(20, len(list.Skipped)); more > 0 {
		c.tell("left out: %d more", more)
	}
	if list.Sum.Truncated {
		c.tell("warning: %s", incomplete(list.Sum.Why))
	}
}

// incomplete says why files are not there.
func incomplete(why string) string {
	reasons := map[string]string{
		schemas.ArtifactsLimit:      "the artifacts are not complete: together they were longer than this site keeps of one task",
		schemas.ArtifactsCount:      "the artifacts are not complete: there were too many files",
		schemas.ArtifactsDepth:      "the artifacts are not complete: some were below too many folders",
		schemas.ArtifactsName:       "the artifacts are not complete: some had names that cannot be kept",
		schemas.ArtifactsTimeout:    "the artifacts are not complete: they could not be stored in time",
		schemas.ArtifactsStoreFull:  "the artifacts are lost: this site has no room left for them",
		schemas.ArtifactsWorkerLost: "the artifacts were lost with their worker",
		schemas.ArtifactsGone:       "the artifacts were lost with their container",
	}
	if said := reasons[why]; said != "" {
		return said
	}
	return "the artifacts are not complete"
}

func (c *cli) artifactsGetCommand() *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use:   "get ID [NAME]",
		Short: "Get one artifact, or all",
		Long: `get writes the artifact NAME to a file of its name here, or all of a task's artifacts
into a folder that is named like the task. --to names another place; - is stdout, where
all come as a tar archive. A file is there as a whole or not at all; a folder for all must
be empty or not there.`,
		Example: `  dayfly artifacts get t-01jd6q0t report.pdf
  dayfly artifacts get t-01jd6q0t --to results
  dayfly artifacts get t-01jd6q0t --to - | tar t`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: c.completeTasks(false),
	}
	cmd.Flags().StringVar(&to, "to", "", "file, or folder for all, to write to; - is stdout")
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		id, err := c.resolve(ctx, cl, args[0])
		if err != nil {
			return err
		}
		if len(args) == 2 {
			return c.getArtifact(ctx, cl, id, args[1], to)
		}
		if to == "-" {
			return c.copyBody(cl.ArtifactArchive(ctx, id))
		}
		if to == "" {
			to = string(id)
		}
		if err := mayFill(to); err != nil {
			return err
		}
		t, err := cl.Get(ctx, id, client.GetOptions{})
		if err != nil {
			return err
		}
		if !t.State.Final() {
			return c.notOver(&schemas.Error{Code: schemas.CodeStateConflict, State: t.State, Detail: "the task is not over, so it has no artifacts yet"}, id)
		}
		return c.saveArtifacts(ctx, cl, t, to)
	})
	return cmd
}

func (c *cli) getArtifact(ctx context.Context, cl *client.Client, id schemas.TaskID, name, to string) error {
	name = path.Clean(name)
	body, err := cl.Artifact(ctx, id, name)
	if errors.Is(err, schemas.CodeNotFound) {
		return &hintError{err, fmt.Sprintf("dayfly artifacts %s, which lists them", id)}
	}
	if to == "-" || err != nil {
		return c.notOver(c.copyBody(body, err), id)
	}
	defer body.Close()
	base := path.Base(name)
	if st, err := os.Stat(to); to == "" || strings.HasSuffix(to, "/") || err == nil && st.IsDir() {
		to = filepath.Join(to, base)
	}
	if err := saveFile(body, to); err != nil {
		return fmt.Errorf("%s has not come whole: %w", printable(name), err)
	}
	return nil
}

// copyBody writes a download to stdout.
func (c *cli) copyBody(body io.ReadCloser, err error) error {
	if err != nil {
		return err
	}
	defer body.Close()
	if _, err := io.Copy(c.out, body); err != nil {
		return fmt.Errorf("not all has come: %w", err)
	}
	return nil
}

// mayFill says whether a folder may take the artifacts of a task: it is empty or not there.
func mayFill(dir string) error {
	list, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case len(list) > 0:
		return &hintError{fmt.Errorf("the folder %s is not empty", dir), "another folder; nothing was written"}
	}
	return nil
}

// saveArtifacts writes all artifacts of a final task into a folder.
func (c *cli) saveArtifacts(ctx context.Context, cl *client.Client, t schemas.Task, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	body, err := cl.ArtifactArchive(ctx, t.ID)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := unpack(body, dir); err != nil {
		return fmt.Errorf("not all has come: %w", err)
	}
	if s := t.ArtifactSum; s != nil && (s.Skipped > 0 || s.Truncated) {
		list, err := cl.Artifacts(ctx, t.ID)
		if err != nil {
			return err
		}
		c.tellSkipped(list)
	}
	return nil
}
