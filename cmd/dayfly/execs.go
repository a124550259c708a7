package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) execsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "execs ID",
		Short: "List, show or stop the programs that run beside a task's process",
		Long: `execs lists the programs that exec began in a running task: those in the background,
also when they have ended, and those that somebody waits for.`,
		Example: `  dayfly execs t-01jd6q0t
  dayfly execs show t-01jd6q0t 837d00304a5c70b8
  dayfly execs stop t-01jd6q0t 837d00304a5c70b8`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeTasks(true),
	}
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		id, err := c.resolve(ctx, cl, args[0])
		if err != nil {
			return err
		}
		list, err := cl.Execs(ctx, id)
		if err != nil {
			return err
		}
		return c.listExecs(list)
	})
	cmd.AddCommand(c.execsShowCommand(), c.execsStopCommand())
	return cmd
}

func (c *cli) listExecs(list schemas.ExecList) error {
	switch {
	case c.data():
		return c.printData(list)
	case c.names():
		for _, x := range list.Items {
			fmt.Fprintln(c.out, x.ID)
		}
		return nil
	}
	rows := [][]string{{"EXEC", "STATE", "BACKGROUND", "AGE", "COMMAND"}}
	for _, x := range list.Items {
		background := "no"
		if x.Background {
			background = "yes"
		}
		age := time.Duration(x.Age).Truncate(time.Second).String()
		rows = append(rows, []string{string(x.ID), execState(x), background, age, printable(strings.Join(x.Command, " "))})
	}
	return c.table(rows)
}

// execState says in a word or two whether a program runs, and how it ended.
func execState(x schemas.Exec) string {
	switch {
	case x.Running:
		return "running"
	case x.Exit == nil:
		return "ended"
	}
	return fmt.Sprintf("exit %d", x.Exit.Code)
}

func (c *cli) execsShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show ID EXEC",
		Short: "Show the newest of what a program in the background wrote",
		Long: `show writes the newest 128 KiB of a background program's stdout to stdout, and of its
stderr to stderr. With -o json it shows the rest that is known of it too.`,
		Example:           `  dayfly execs show t-01jd6q0t 837d00304a5c70b8`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: c.completeTasks(true),
	}
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		id, err := c.resolve(ctx, cl, args[0])
		if err != nil {
			return err
		}
		exec, err := schemas.ParseExecID(args[1])
		if err != nil {
			return noExec(err, id)
		}
		x, err := cl.GetExec(ctx, id, exec)
		switch {
		case errors.Is(err, schemas.CodeNotFound):
			return noExec(err, id)
		case err != nil:
			return err
		case c.data():
			return c.printData(x)
		case c.names():
			fmt.Fprintln(c.out, x.ID)
			return nil
		}
		if err := writeText(c.out, x.Stdout, x.StdoutBase64); err != nil {
			return err
		}
		return writeText(c.err, x.Stderr, x.StderrBase64)
	})
	return cmd
}

// writeText writes what the API gives as text, or in base64 if it is no UTF-8.
func writeText(to io.Writer, text, coded string) error {
	b := []byte(text)
	if coded != "" {
		var err error
		if b, err = base64.StdEncoding.DecodeString(coded); err != nil {
			return fmt.Errorf("what the program wrote: %w", err)
		}
	}
	if _, err := to.Write(b); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

func (c *cli) execsStopCommand() *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "stop ID EXEC…",
		Short: "End programs: TERM, and KILL after a grace",
		Long: `stop ends programs beside a task's process, and prints the id of each as soon as it has
its TERM. The task goes on.`,
		Example:           `  dayfly execs stop --grace 1s t-01jd6q0t 837d00304a5c70b8`,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: c.completeTasks(true),
	}
	cmd.Flags().DurationVar(&grace, "grace", 5*time.Second, "time between TERM and KILL")
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		id, err := c.resolve(ctx, cl, args[0])
		if err != nil {
			return err
		}
		var execs []schemas.ExecID
		for _, arg := range args[1:] {
			exec, err := schemas.ParseExecID(arg)
			if err != nil {
				return noExec(err, id)
			}
			execs = append(execs, exec)
		}
		for _, exec := range execs {
			err := cl.EndExec(ctx, id, exec, grace)
			if errors.Is(err, schemas.CodeNotFound) {
				return noExec(err, id)
			}
			if err != nil {
				return err
			}
			fmt.Fprintln(c.out, exec)
		}
		return nil
	})
	return cmd
}

// noExec names the way to the programs that there are.
func noExec(err error, id schemas.TaskID) error {
	return &hintError{err, fmt.Sprintf("dayfly execs %s, which lists them", id)}
}
