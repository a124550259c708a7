package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) drainCommand() *cobra.Command {
	return c.workerCommand("drain", "Let workers take nothing new", `drain lets workers take nothing new. What runs there goes on to its end, and gets no
more time. A worker stays drained until undrain, also when its agent is restarted;
dayfly workers shows when nothing is left on it.

It exits with 125 where a drain is noted, but the placer that leads has not confirmed it
within 2 s: until then one more task may be given to the worker.`, (*client.Client).Drain)
}

func (c *cli) undrainCommand() *cobra.Command {
	return c.workerCommand("undrain", "Let drained workers take tasks again", "undrain ends a drain.",
		func(cl *client.Client, ctx context.Context, id schemas.WorkerID) (schemas.Worker, bool, error) {
			w, err := cl.Undrain(ctx, id)
			return w, true, err
		})
}

func (c *cli) workerCommand(verb, short, long string, do func(*client.Client, context.Context, schemas.WorkerID) (schemas.Worker, bool, error)) *cobra.Command {
	return &cobra.Command{
		Use: verb + " WORKER…", Short: short, Long: long,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: c.completeWorkers,
		RunE: c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			var failed error
			for _, name := range args {
				w, confirmed, err := do(cl, ctx, schemas.WorkerID(name))
				var e *schemas.Error
				switch {
				case errors.As(err, &e) && e.Code == schemas.CodeNotFound:
					failed = errors.Join(failed, &hintError{fmt.Errorf("%s: %w", name, err), "dayfly workers lists them"})
				case err != nil:
					failed = errors.Join(failed, fmt.Errorf("%s: %w", name, err))
				case c.data():
					failed = errors.Join(failed, c.printData(w))
				case c.names():
					fmt.Fprintln(c.out, w.ID)
				default:
					fmt.Fprintf(c.out, "%s\t%s\t%d tasks left\n", w.ID, w.State, w.Assigned.Tasks)
				}
				if err == nil && !confirmed {
					failed = errors.Join(failed, &hintError{fmt.Errorf("%s: it is noted, but no placer has confirmed it yet; one more task may be given to it", name), "dayfly " + verb + " " + name + " again"})
				}
			}
			return failed
		}),
	}
}
