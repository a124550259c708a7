package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) logsCommand() *cobra.Command {
	var o client.LogOptions
	var since, stream string
	var stamps bool
	cmd := &cobra.Command{
		Use:   "logs ID",
		Short: "Show what a task has written",
		Long: `logs shows what a task has written: its stdout on stdout, its stderr on stderr, also
long after it has ended. With -o json each piece is a line of JSON.`,
		Example: `  dayfly logs -f t-01jd6q0t
  dayfly logs --since 5m --stream stderr t-01jd6q0t`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeTasks(false),
	}
	f := cmd.Flags()
	f.BoolVarP(&o.Follow, "follow", "f", false, "go on until the task has ended")
	f.IntVarP(&o.Tail, "tail", "n", 0, "only the last so many lines (0: all)")
	f.StringVar(&since, "since", "", "only since then: 10m ago, or 2026-01-02T15:04:05Z")
	f.StringVar(&stream, "stream", "", "only stdout or stderr")
	f.IntVar(&o.Attempt, "attempt", 0, "only one attempt")
	f.BoolVarP(&stamps, "timestamps", "t", false, "put the time before each line")
	_ = cmd.RegisterFlagCompletionFunc("stream", cobra.FixedCompletions([]string{"stdout", "stderr"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if o.Since, err = parseSince(since, time.Now()); err != nil {
			return &usageError{err, cmd.CommandPath()}
		}
		switch o.Stream = schemas.Stream(stream); o.Stream {
		case "", schemas.Stdout, schemas.Stderr:
		default:
			return &usageError{errors.New("--stream must be stdout or stderr"), cmd.CommandPath()}
		}
		if o.Tail < 0 || o.Attempt < 0 {
			return &usageError{errors.New("--tail and --attempt must not be negative"), cmd.CommandPath()}
		}
		return c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			id, err := c.resolve(ctx, cl, args[0])
			if err != nil {
				return err
			}
			if o.Follow {
				cl = patient(cl)
			}
			return c.logs(ctx, cl, id, o, stamps)
		})(cmd, args)
	}
	return cmd
}

// parseSince reads an instant, or how long ago it was.
func parseSince(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, errors.New("--since must be a duration such as 10m, or a time such as 2026-01-02T15:04:05Z")
}

func (c *cli) logs(ctx context.Context, cl *client.Client, id schemas.TaskID, o client.LogOptions, stamps bool) error {
	out := map[schemas.Stream]io.Writer{schemas.Stdout: c.out, schemas.Stderr: c.err}
	begun := map[schemas.Stream]bool{} // in the middle of a line
	attempt := 0
	for l, err := range cl.Logs(ctx, id, o) {
		if errors.Is(err, client.ErrLogsIncomplete) {
			c.tell("warning: %v", err)
			return nil
		}
		if err != nil {
			return err
		}
		if c.data() {
			if err := c.printLine(l); err != nil {
				return err
			}
			continue
		}
		if attempt != 0 && l.Attempt != attempt {
			c.say("attempt %d", l.Attempt)
		}
		attempt = l.Attempt
		b, err := client.LineBytes(l)
		if err != nil {
			return err
		}
		if stamps {
			b = stamp(b, l.At, begun[l.Stream])
			begun[l.Stream] = b[len(b)-1] != '\n'
		}
		if _, err := out[l.Stream].Write(b); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	return nil
}

// stamp puts the time before each line that begins in b.
func stamp(b []byte, at time.Time, begun bool) []byte {
	prefix := at.UTC().Format("2006-01-02T15:04:05.000000Z ")
	var out []byte
	for line := range bytes.Lines(b) {
		if !begun {
			out = append(out, prefix...)
		}
		begun = false
		out = append(out, line...)
	}
	return out
}
