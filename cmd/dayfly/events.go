package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) eventsCommand() *cobra.Command {
	var o client.EventOptions
	var states, labels []string
	var worker string
	cmd := &cobra.Command{
		Use:   "events [ID]",
		Short: "Show what happened to tasks, as it happens",
		Long: `events shows the changes of all tasks, or of one, in the order in which they were
written. Each has an id: --after goes on behind it, with any gateway.`,
		Example: `  dayfly events -f --now
  dayfly events -f --state failed,expired -l owner=litmus -o json`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.completeTasks(false),
	}
	f := cmd.Flags()
	f.BoolVarP(&o.Follow, "follow", "f", false, "go on with what comes, until Ctrl-C or the task's end")
	f.BoolVar(&o.Now, "now", false, "begin with what is still to come")
	f.Uint64Var(&o.After, "after", 0, "begin behind the event with this id")
	f.StringSliceVar(&states, "state", nil, "only changes to these states")
	f.StringArrayVarP(&labels, "label", "l", nil, "only of tasks with the label K=V, or K with any value")
	f.StringVar(&worker, "worker", "", "only on this worker")
	_ = cmd.RegisterFlagCompletionFunc("state", completeStates)
	_ = cmd.RegisterFlagCompletionFunc("worker", c.completeWorkers)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		usage := func(format string, a ...any) error { return &usageError{fmt.Errorf(format, a...), cmd.CommandPath()} }
		var err error
		if o.States, err = parseStates(states); err != nil {
			return usage("%w", err)
		}
		if len(args) > 0 && (len(labels) > 0 || worker != "") {
			return usage("--label and --worker choose among all tasks; leave out the id")
		}
		o.Worker, o.Labels = schemas.WorkerID(worker), map[string]string{}
		for _, l := range labels {
			if k, v, ok := strings.Cut(l, "="); ok {
				o.Labels[k] = v
			} else {
				o.HasLabels = append(o.HasLabels, k)
			}
		}
		return c.command(func(ctx context.Context, cl *client.Client, args []string) (err error) {
			if len(args) > 0 {
				if o.Task, err = c.resolve(ctx, cl, args[0]); err != nil {
					return err
				}
			}
			if o.Follow {
				cl = patient(cl)
			}
			return c.events(ctx, cl, o)
		})(cmd, args)
	}
	return cmd
}

func (c *cli) events(ctx context.Context, cl *client.Client, o client.EventOptions) error {
	for e, err := range cl.Events(ctx, o) {
		switch {
		case err != nil:
			return err
		case c.data():
			err = c.printLine(e)
		case c.names():
			_, err = fmt.Fprintln(c.out, e.ID)
		default:
			_, err = fmt.Fprintln(c.out, printable(eventLine(e)))
		}
		if err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	return nil
}

// eventLine is an event for people. It comes alone, so its columns have fixed widths.
func eventLine(e schemas.TaskEvent) string {
	line := fmt.Sprintf("%-8d  %s  %s  %-9s", e.ID, when(e.At), e.Task, e.State)
	if e.Worker != "" {
		line += fmt.Sprintf("  on %s, attempt %d", e.Worker, e.Attempt)
	}
	for _, s := range []string{string(e.Reason), e.Note} {
		if s != "" {
			line += "  " + s
		}
	}
	return line + "  by " + e.By
}
