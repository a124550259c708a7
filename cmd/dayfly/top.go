package main

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) topCommand() *cobra.Command {
	var every time.Duration
	var tasks int
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Watch the workers and the newest tasks",
		Long: `top shows how full the workers are and the newest tasks that have not ended, again
and again until Ctrl-C. Where its output is no terminal it shows them once.`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().DurationVar(&every, "every", 2*time.Second, "time between two looks")
	cmd.Flags().IntVarP(&tasks, "limit", "n", 15, "so many tasks, at most 100")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if every < 100*time.Millisecond || tasks < 1 || tasks > 100 {
			return &usageError{fmt.Errorf("--every must be at least 100ms, --limit 1 to 100"), cmd.CommandPath()}
		}
		return c.command(func(ctx context.Context, cl *client.Client, _ []string) error {
			return c.top(ctx, cl, every, tasks)
		})(cmd, args)
	}
	return cmd
}

// top redraws in one write, so that nothing flickers.
func (c *cli) top(ctx context.Context, cl *client.Client, every time.Duration, limit int) error {
	live := isTerminal(c.out) && !c.data()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		workers, err := cl.Workers(ctx)
		if err != nil {
			return err
		}
		tasks, err := cl.List(ctx, client.ListOptions{Limit: limit, States: liveStates()})
		if err != nil {
			return err
		}
		if c.data() {
			return c.printData(map[string]any{"workers": workers.Items, "tasks": tasks.Items})
		}
		c.askWhy(ctx, cl, tasks.Items)
		var b bytes.Buffer
		page := &cli{out: &b}
		if live {
			b.WriteString("\x1b[H\x1b[J") // home, and clear what is below
		}
		fmt.Fprintln(&b, fullness(workers.Items))
		fmt.Fprintln(&b)
		if err := page.table(workerRows(workers.Items)); err != nil {
			return err
		}
		fmt.Fprintln(&b)
		if err := page.table(taskRows(tasks.Items)); err != nil {
			return err
		}
		if tasks.NextCursor != "" {
			fmt.Fprintln(&b, "… and older ones")
		}
		if _, err := b.WriteTo(c.out); err != nil || !live {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// fullness sums up the fleet in a line.
func fullness(list []schemas.Worker) string {
	ready := 0
	var have, used schemas.Allocation
	for _, w := range list {
		if w.State == "ready" {
			ready++
			have.Tasks += w.Host.Slots
			have.CPUs += w.Host.CPUs
			have.Memory += w.Host.Memory
		}
		used.Tasks += w.Assigned.Tasks
		used.CPUs += w.Assigned.CPUs
		used.Memory += w.Assigned.Memory
	}
	return fmt.Sprintf("%d of %d workers ready; assigned: %d of %d tasks, %s of %s CPUs, %s of %s memory",
		ready, len(list), used.Tasks, have.Tasks, used.CPUs, have.CPUs, used.Memory, have.Memory)
}
