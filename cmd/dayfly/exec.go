package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

// execFlags are those of exec.
type execFlags struct {
	input, terminal, detach bool
	env                     []string
	workdir                 string
	timeout                 time.Duration
}

func (c *cli) execCommand() *cobra.Command {
	var flags execFlags
	cmd := &cobra.Command{
		Use:   "exec [flags] ID [--] COMMAND [ARG…]",
		Short: "Run a program in a running task",
		Long: `exec runs a program beside the task's process, with its rights, and exits with its exit
code: 127 if it is not there, 126 if it cannot be run, 124 after --timeout, 125 if
dayfly could not do it. With -t it runs on a terminal of its own, and Ctrl-C is the
program's. After a broken connection it goes on by itself where it was.

With -d it goes on in the background, and exec prints its id: dayfly execs lists such
programs, shows what they wrote, and stops them.`,
		Example: `  dayfly exec t-01jd6q0t ls /task/output
  dayfly exec -it t-01jd6q0t sh
  dayfly exec -i t-01jd6q0t sh -c 'cat > /tmp/notes' < notes.txt`,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: c.completeTasks(true),
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&flags.input, "interactive", "i", false, "give it what comes on stdin")
	f.BoolVarP(&flags.terminal, "tty", "t", false, "run it on a terminal")
	f.BoolVarP(&flags.detach, "detach", "d", false, "leave it running in the background, and print its id")
	f.StringArrayVarP(&flags.env, "env", "e", nil, "NAME=value, or NAME for its value here, laid over the task's environment")
	f.StringVarP(&flags.workdir, "workdir", "w", "", "folder that it begins in")
	f.DurationVar(&flags.timeout, "timeout", 0, "kill it after so long")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if args[1] == "--" {
			args = append(args[:1:1], args[2:]...)
		}
		if len(args) == 1 {
			return &usageError{errors.New("there is no command after --"), cmd.CommandPath()}
		}
		req, err := flags.request(args[1:])
		if err == nil && flags.terminal && !isTerminal(c.in) {
			err = errors.New("-t needs a terminal here; leave it out for a pipe or a file")
		}
		if err != nil {
			return &usageError{err, cmd.CommandPath()}
		}
		cl, err := c.client()
		if err != nil {
			return err
		}
		ctx, stop := c.interruptible(cmd.Context())
		id, err := c.resolve(ctx, cl, args[0])
		if err == nil && flags.detach {
			var x schemas.Exec
			if x, err = cl.Launch(ctx, id, req); err == nil && c.data() {
				err = c.printData(x)
			} else if err == nil {
				fmt.Fprintln(c.out, x.ID)
			}
			stop()
			return err
		}
		stop()
		if err != nil {
			return err
		}
		return c.console(cmd.Context(), cl, id, req, flags)
	}
	return cmd
}

func (f *execFlags) request(command []string) (schemas.ExecRequest, error) {
	req := schemas.ExecRequest{Command: command, Workdir: f.workdir, Timeout: schemas.Duration(f.timeout), Env: map[string]string{}}
	for _, pair := range f.env {
		name, value, given := strings.Cut(pair, "=")
		if !given {
			value = os.Getenv(name)
		}
		req.Env[name] = value
	}
	switch {
	case f.detach && (f.input || f.terminal):
		return req, errors.New("-d goes with neither -i nor -t")
	case f.detach && f.timeout != 0:
		return req, errors.New("-d goes without --timeout")
	}
	return req, nil
}

// console joins this terminal, or these streams, to a program of a task.
func (c *cli) console(ctx context.Context, cl *client.Client, id schemas.TaskID, req schemas.ExecRequest, flags execFlags) error {
	o := client.ConsoleOptions{ExecRequest: req, Input: flags.input, Stderr: c.err}
	if flags.terminal {
		w := c.window()
		o.Terminal = &w
		if o.Env["TERM"] == "" && os.Getenv("TERM") != "" {
			o.Env["TERM"] = os.Getenv("TERM")
		}
	}
	o.Broken = c.sayBroken(flags.terminal)
	con, err := cl.Console(ctx, id, o)
	if err != nil {
		return err
	}
	defer con.Close()
	if flags.terminal {
		restore, err := c.terminal(con, true)
		if err != nil {
			return err
		}
		defer restore()
	}
	if flags.input || flags.terminal {
		go func() { // a read of the terminal ends with the process
			_, _ = io.Copy(con, c.in)
			_ = con.CloseWrite()
		}()
	}
	n := 0
	failed, left, err := c.copyConsole(con, c.out, flags.terminal, func(s os.Signal) bool { // the program's, but for the third
		if n++; n <= 2 {
			passSignal(con, s)
		}
		return n > 2
	})
	exit, _ := con.Wait()
	switch {
	case left != nil:
		return &exitError{code: signalCode(left)}
	case err != nil && failed == nil && exit.Code == 0:
		return fmt.Errorf("write output: %w", err)
	}
	switch {
	case failed != nil:
		return &hintError{failed, "dayfly inspect " + string(id)}
	case exit.TimedOut:
		return &exitError{exitTimeout, &hintError{fmt.Errorf("it was killed after its timeout of %s", req.Timeout), "a longer --timeout"}}
	case exit.Message != "":
		return &exitError{exit.Code, &hintError{errors.New(printable(exit.Message)), "another command; the image may have no shell"}}
	case exit.Code != 0:
		return &exitError{exit.Code, nil}
	}
	return nil
}

// window is the size of this terminal.
func (c *cli) window() schemas.Window {
	f, ok := c.in.(*os.File)
	if !ok {
		return schemas.Window{Rows: 24, Cols: 80}
	}
	cols, rows, err := term.GetSize(int(f.Fd()))
	if err != nil || cols <= 0 || rows <= 0 {
		return schemas.Window{Rows: 24, Cols: 80}
	}
	return schemas.Window{Rows: uint16(min(rows, 10_000)), Cols: uint16(min(cols, 10_000))}
}
