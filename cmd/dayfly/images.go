package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) imagesCommand() *cobra.Command {
	var worker string
	cmd := &cobra.Command{
		Use:   "images",
		Short: "List the images of the workers, and let workers hold images",
		Long: `images lists the images that workers have, those used last first, and those that they
shall hold before a task asks for them.

  dayfly images pull registry.lan/web:1 --wait`,
		Args: cobra.NoArgs,
		RunE: c.command(func(ctx context.Context, cl *client.Client, _ []string) error {
			l, err := cl.Images(ctx, schemas.WorkerID(worker))
			if err != nil {
				return workerHint(worker, err)
			}
			return c.printImages(l)
		}),
	}
	cmd.Flags().StringVar(&worker, "worker", "", "of this worker alone")
	_ = cmd.RegisterFlagCompletionFunc("worker", c.completeWorkers)
	cmd.AddCommand(c.imagesPullCommand(), c.imagesReleaseCommand())
	return cmd
}

func workerHint(worker string, err error) error {
	if e, ok := errors.AsType[*schemas.Error](err); ok && e.Code == schemas.CodeNotFound {
		return &hintError{fmt.Errorf("%s: %w", worker, err), "dayfly workers lists them"}
	}
	return err
}

func (c *cli) printImages(l schemas.ImageList) error {
	if c.data() {
		return c.printData(l)
	}
	rows := imageRows(l)
	if c.names() {
		seen := map[string]bool{}
		for _, row := range rows[1:] {
			if !seen[row[0]] {
				fmt.Fprintln(c.out, row[0])
			}
			seen[row[0]] = true
		}
		return nil
	}
	if len(rows) == 1 {
		c.say("no worker has an image yet")
	}
	return c.table(rows)
}

// imageRows is the table of images: those that are wanted first. Digests are left out, which
// are second names.
func imageRows(l schemas.ImageList) [][]string {
	rows := [][]string{{"IMAGE", "WORKER", "STATE", "WANTED BY", "NOTE"}}
	wanted := map[[2]string]bool{}
	for _, i := range l.Items {
		for _, s := range i.Status {
			wanted[[2]string{schemas.ImageName(i.Image), string(s.Worker)}] = true
			rows = append(rows, []string{printable(i.Image), string(s.Worker), string(s.State), printable(i.By), printable(aboutImage(s))})
		}
		if len(i.Status) == 0 {
			rows = append(rows, []string{printable(i.Image), "", "", printable(i.By), "no worker is one of those that shall hold it"})
		}
	}
	for _, w := range l.Workers {
		for _, name := range w.Names {
			if !strings.Contains(name, "@") && !wanted[[2]string{name, string(w.Worker)}] {
				rows = append(rows, []string{printable(name), string(w.Worker), string(schemas.ImagePresent), "", ""})
			}
		}
	}
	return rows
}

// aboutImage says more of how a worker stands to an image.
func aboutImage(s schemas.ImageStatus) string {
	if p := s.Pull; p != nil && p.Total > 0 {
		return fmt.Sprintf("%s of %s, %d of %d layers", schemas.Size(p.Done), schemas.Size(p.Total), p.Ready, p.Layers)
	}
	return s.Message
}

func (c *cli) imagesPullCommand() *cobra.Command {
	var workers, constraints []string
	var credentials string
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "pull IMAGE",
		Short: "Let workers hold an image before a task asks for it",
		Long: `pull lets workers hold an image: those that lack it pull it, one image at a time and
after what tasks wait for, and none removes it to make room. It holds until release, also
for workers that come later. What was asked for the image before is replaced.`,
		Args: cobra.ExactArgs(1),
	}
	f := cmd.Flags()
	f.StringArrayVar(&workers, "worker", nil, "only this worker (again for more)")
	f.StringArrayVar(&constraints, "constraint", nil, "only workers with the label K=V, or arch=… or os=…")
	f.StringVar(&credentials, "registry-credentials", "", "name of the login to pull with, as the workers know it")
	f.BoolVar(&wait, "wait", false, "wait until all these workers have it; exit with 125 if one cannot")
	f.DurationVar(&timeout, "timeout", 15*time.Minute, "how long to wait at most")
	_ = cmd.RegisterFlagCompletionFunc("worker", c.completeWorkers)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		given, err := pairs("constraint", constraints)
		if err != nil {
			return &usageError{err, cmd.CommandPath()}
		}
		ask := schemas.WantImage{Image: args[0], Credentials: credentials}
		for k, v := range given {
			if ask.Constraints == nil {
				ask.Constraints = map[string]string{}
			}
			ask.Constraints[k] = v.(string)
		}
		for _, w := range workers {
			ask.Workers = append(ask.Workers, schemas.WorkerID(w))
		}
		return c.command(func(ctx context.Context, cl *client.Client, _ []string) error {
			i, err := cl.WantImage(ctx, ask)
			if err != nil {
				return err
			}
			if wait {
				ctx, cancel := context.WithTimeoutCause(ctx, timeout,
					&exitError{exitTimeout, &hintError{errors.New("not all workers have the image yet"), "dayfly images shows how far they are"}})
				defer cancel()
				if i, err = c.awaitImage(ctx, cl, i); err != nil {
					return err
				}
			}
			return c.printImages(schemas.ImageList{Items: []schemas.Image{i}, Workers: []schemas.WorkerImages{}})
		})(cmd, args)
	}
	return cmd
}

// awaitImage waits until no worker lacks the image, or one has failed.
func (c *cli) awaitImage(ctx context.Context, cl *client.Client, i schemas.Image) (schemas.Image, error) {
	for said := ""; ; {
		missing, now := 0, ""
		for _, s := range i.Status {
			switch s.State {
			case schemas.ImagePresent, schemas.ImageAway:
				continue
			case schemas.ImageState(schemas.MissingFailed):
				return i, &hintError{fmt.Errorf("worker %s: %s", s.Worker, printable(s.Message)), "dayfly images shows all workers; they try again later"}
			}
			missing++
			now = fmt.Sprintf("%s: %s %s", s.Worker, s.State, aboutImage(s))
		}
		if missing == 0 {
			return i, nil
		}
		if now != said {
			c.say("%s", printable(strings.TrimSpace(now)))
			said = now
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return i, context.Cause(ctx)
		}
		l, err := cl.Images(ctx, "")
		if err != nil {
			return i, err
		}
		there := false
		for _, one := range l.Items {
			if one.Image == i.Image && one.By == i.By {
				i, there = one, true
			}
		}
		if !there {
			return i, errors.New("the image was released meanwhile")
		}
	}
}

func (c *cli) imagesReleaseCommand() *cobra.Command {
	return &cobra.Command{
		Use: "release IMAGE…", Short: "End what pull asked for",
		Long: `release ends what pull asked for. Workers keep the image until they need the room.`,
		Args: cobra.MinimumNArgs(1),
		RunE: c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			var failed error
			for _, image := range args {
				i, err := cl.ReleaseImage(ctx, image)
				switch {
				case err != nil:
					err = fmt.Errorf("%s: %w", printable(image), err)
					if errors.Is(err, schemas.CodeNotFound) {
						err = &hintError{err, "dayfly images lists what is wanted, and by whom"}
					}
					failed = errors.Join(failed, err)
				case c.data():
					failed = errors.Join(failed, c.printData(i))
				default:
					fmt.Fprintln(c.out, printable(i.Image))
				}
			}
			return failed
		}),
	}
}
