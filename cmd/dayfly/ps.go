package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) psCommand() *cobra.Command {
	var all bool
	var states, labels []string
	var limit int
	cmd := &cobra.Command{
		Use:     "ps",
		Aliases: []string{"ls", "list"},
		Short:   "List the tasks that have not ended",
		Example: `  dayfly ps -a --state failed,expired
  dayfly cancel $(dayfly ps -q -l owner=litmus)`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "those that have ended too")
	cmd.Flags().StringSliceVar(&states, "state", nil, "only in these states")
	cmd.Flags().StringArrayVarP(&labels, "label", "l", nil, "only with the label K=V")
	cmd.Flags().IntVarP(&limit, "limit", "n", 0, "at most so many, the newest (0: all)")
	_ = cmd.RegisterFlagCompletionFunc("state", completeStates)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o := client.ListOptions{}
		var err error
		if o.States, err = parseStates(states); err != nil {
			return &usageError{err, cmd.CommandPath()}
		}
		if len(states) == 0 && !all {
			o.States = liveStates()
		}
		m, err := pairs("label", labels)
		if err != nil {
			return &usageError{err, cmd.CommandPath()}
		}
		o.Labels = map[string]string{}
		for k, v := range m {
			o.Labels[k] = v.(string)
		}
		return c.command(func(ctx context.Context, cl *client.Client, _ []string) error {
			return c.ps(ctx, cl, o, limit)
		})(cmd, args)
	}
	return cmd
}

func stateNames() (names []string) {
	for _, s := range schemas.States() {
		names = append(names, string(s))
	}
	return names
}

func completeStates(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return stateNames(), cobra.ShellCompDirectiveNoFileComp
}

func parseStates(names []string) (states []schemas.State, err error) {
	for _, s := range names {
		if !slices.Contains(schemas.States(), schemas.State(s)) {
			return nil, fmt.Errorf("--state must be one of %s", strings.Join(stateNames(), ", "))
		}
		states = append(states, schemas.State(s))
	}
	return states, nil
}

func (c *cli) ps(ctx context.Context, cl *client.Client, o client.ListOptions, limit int) error {
	tasks := []schemas.Task{}
	for t, err := range cl.All(ctx, o) {
		if err != nil {
			return err
		}
		tasks = append(tasks, t)
		if limit > 0 && len(tasks) == limit {
			break
		}
	}
	if c.data() {
		return c.printData(tasks)
	}
	if c.names() {
		for _, t := range tasks {
			fmt.Fprintln(c.out, t.ID)
		}
		return nil
	}
	c.askWhy(ctx, cl, tasks)
	return c.table(taskRows(tasks))
}

// taskRows is the table of tasks.
func taskRows(tasks []schemas.Task) [][]string {
	now := time.Now()
	ids := make([]schemas.TaskID, len(tasks))
	for i, t := range tasks {
		ids[i] = t.ID
	}
	short := shortIDs(ids)
	rows := [][]string{{"ID", "IMAGE", "STATE", "WORKER", "AGE", "LEFT", "NOTE"}}
	for _, t := range tasks {
		left := ""
		if !t.State.Final() && !t.ExpiresAt.IsZero() {
			left = ago(time.Duration(t.SecondsLeft) * time.Second)
		}
		rows = append(rows, []string{
			short[t.ID], clip(t.Spec.Image, 40), string(t.State), string(t.Worker), ago(now.Sub(t.Timings.Accepted)), left, clip(note(t), 80),
		})
	}
	return rows
}

// askWhy fills in why the first few queued tasks wait; lists do not carry it.
func (c *cli) askWhy(ctx context.Context, cl *client.Client, tasks []schemas.Task) {
	const most = 5
	asked := 0
	for i, t := range tasks {
		if t.State != schemas.Queued || t.Why != nil {
			continue
		}
		if asked++; asked > most {
			return
		}
		if full, err := cl.With(client.WithRetryFor(0)).Get(ctx, t.ID, client.GetOptions{}); err == nil {
			tasks[i].Why = full.Why
		}
	}
}

// note is the one thing about a task that a person would ask next.
func note(t schemas.Task) string {
	switch {
	case t.State == schemas.Queued || t.State == schemas.Starting && t.Progress != "":
		return waits(t)
	case t.Cancel != nil && !t.State.Final():
		return "is being canceled"
	case !t.WorkerLostAt.IsZero() && !t.State.Final():
		return "its worker is away"
	case t.State == schemas.Running && t.Spec.Health != nil && !t.Ready:
		return "is not ready yet" + restarts(t)
	case t.State == schemas.Running && t.Restarts > 0:
		return strings.TrimPrefix(restarts(t), ", ")
	case t.State == schemas.Failed && t.Reason == schemas.ReasonExit && t.Exit != nil:
		return fmt.Sprintf("exit code %d", t.Exit.Code)
	case t.State == schemas.Failed && t.Reason == schemas.ReasonOOM:
		return "needed more memory than " + t.Spec.Resources.Memory.String()
	case t.State == schemas.Failed:
		return sentence(t)
	}
	return ""
}

func restarts(t schemas.Task) string {
	switch t.Restarts {
	case 0:
		return ""
	case 1:
		return ", was restarted once"
	}
	return fmt.Sprintf(", was restarted %d times", t.Restarts)
}
