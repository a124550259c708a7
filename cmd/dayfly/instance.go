package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) instanceCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "instance",
		Aliases: []string{"instances"},
		Short:   "Start, renew and stop the one instance of a template that an owner has",
		Long: `An instance is the one task that an owner has of a template: the operator's preset of a
challenge or a server. An owner is any text: a team, a student.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.instanceStartCommand(), c.instanceShowCommand(), c.instanceRenewCommand(), c.instanceStopCommand(), c.instanceListCommand())
	return cmd
}

func (c *cli) instanceStartCommand() *cobra.Command {
	var values, valueFiles []string
	var ttl, timeout time.Duration
	var until string
	cmd := &cobra.Command{
		Use:   "start TEMPLATE OWNER",
		Short: "Give an owner the instance of a template",
		Long: `start prints how the owner's instance is reached; it makes one if there is none. It may be
called again and again: there is one at a time. Values, such as a flag, go where the
template says, and nobody is shown them again. They and --ttl are those of a new
instance, and change nothing where there is one.`,
		Example: `  dayfly instance start web-1 litmus --wait ready
  dayfly instance start pwn-1 litmus --value-file flag=flag.txt`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: c.completeTemplates,
	}
	f := cmd.Flags()
	f.StringArrayVar(&values, "value", nil, "a value that the template takes: NAME=VALUE; others on this machine may see it meanwhile")
	f.StringArrayVar(&valueFiles, "value-file", nil, "the same from a file: NAME=PATH, - is standard input; a newline at its end is left out")
	f.DurationVar(&ttl, "ttl", 0, "how long it may live once it runs (default: the template's)")
	f.StringVar(&until, "wait", string(client.UntilRunning), "wait until it is running, or ready (has passed its health check), or for nothing: none")
	f.DurationVar(&timeout, "timeout", time.Minute, "stop waiting after so long")
	_ = cmd.RegisterFlagCompletionFunc("wait", cobra.FixedCompletions([]string{"running", "ready", "none"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o := client.StartOptions{TTL: ttl}
		switch until {
		case string(client.UntilRunning), string(client.UntilReady):
			o.Wait, o.Timeout = client.Until(until), timeout
		case "none":
		default:
			return &usageError{errors.New("--wait must be running, ready or none"), cmd.CommandPath()}
		}
		var err error
		if o.Values, err = readValues(c.in, values, valueFiles); err != nil {
			return &usageError{err, cmd.CommandPath()}
		}
		return c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			i, created, err := cl.StartInstance(ctx, args[0], args[1], o)
			if err != nil {
				return instanceError(err)
			}
			if !created {
				c.say("there was one already")
			}
			if err := c.printInstance(i); err != nil {
				return err
			}
			switch {
			case i.State.Final():
				return &hintError{fmt.Errorf("it ended at once: %s (%s)", i.State, i.Reason), "dayfly inspect " + string(i.Task)}
			case o.Wait == client.UntilReady && !i.Ready, o.Wait != "" && i.State != schemas.Running:
				return &exitError{exitTimeout, &hintError{fmt.Errorf("it is %s and not %s after %s", i.State, o.Wait, schemas.Duration(timeout)), "dayfly inspect " + string(i.Task)}}
			}
			return nil
		})(cmd, args)
	}
	return cmd
}

// readValues reads what --value and --value-file say.
func readValues(stdin io.Reader, values, files []string) (map[string]string, error) {
	all := map[string]string{}
	add := func(flag, name, value string) error {
		if _, twice := all[name]; twice || name == "" {
			return fmt.Errorf("%s: each value has a name, and stands there once", flag)
		}
		all[name] = value
		return nil
	}
	for _, pair := range values {
		name, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, errors.New("--value must be NAME=VALUE")
		}
		if err := add("--value", name, value); err != nil {
			return nil, err
		}
	}
	for _, pair := range files {
		name, path, ok := strings.Cut(pair, "=")
		if !ok || path == "" {
			return nil, errors.New("--value-file must be NAME=PATH")
		}
		text, err := readSecret("--value-file", stdin, path)
		if err == nil {
			err = add("--value-file", name, strings.TrimSuffix(strings.TrimSuffix(text, "\n"), "\r"))
		}
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// readSecret reads a text from a file; "-" is standard input, if that is given.
func readSecret(flag string, stdin io.Reader, path string) (string, error) {
	in := stdin
	if path != "-" || stdin == nil {
		f, err := os.Open(path)
		if err != nil {
			return "", fmt.Errorf("%s: %w", flag, err)
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, schemas.MaxSpecBytes+1))
	if err != nil {
		return "", fmt.Errorf("%s: %w", flag, err)
	}
	if len(b) > schemas.MaxSpecBytes || !utf8.Valid(b) {
		return "", fmt.Errorf("%s: must be text in UTF-8 of at most %s", flag, schemas.Size(schemas.MaxSpecBytes))
	}
	return string(b), nil
}

// instanceError gives an error about an instance its next step.
func instanceError(err error) error {
	var e *schemas.Error
	if !errors.As(err, &e) {
		return err
	}
	switch {
	case e.Code == schemas.CodeNotFound && e.Field == "template":
		return &hintError{err, "dayfly templates lists them"}
	case e.Code == schemas.CodeNotFound:
		return &hintError{err, "dayfly instance ls lists them; dayfly instance start makes one"}
	case e.Code == schemas.CodeShared:
		return &hintError{err, "dayfly cancel " + string(e.Task)}
	case e.Code == schemas.CodeEnding:
		return &hintError{err, "again in a moment"}
	case e.Code == schemas.CodeOwnerLimit:
		return &hintError{err, "dayfly instance ls --owner OWNER, then dayfly instance stop"}
	case e.Code == schemas.CodeInvalidValue, e.Code == schemas.CodeUnknownField:
		return &hintError{err, "dayfly templates NAME shows what it takes"}
	}
	return err
}

// printInstance prints one for people or programs.
func (c *cli) printInstance(i schemas.Instance) error {
	if c.data() {
		return c.printData(i)
	}
	if c.names() {
		_, err := fmt.Fprintln(c.out, i.Task)
		return err
	}
	rows := [][]string{{"template:", i.Template}, {"owner:", ownerOf(i)}, {"task:", string(i.Task)}, {"state:", instanceState(i)}}
	if i.Message != "" {
		rows = append(rows, []string{"message:", i.Message})
	}
	if i.Connection != "" {
		rows = append(rows, []string{"connection:", i.Connection})
	}
	for _, e := range i.Endpoints {
		if e.URL != i.Connection {
			rows = append(rows, []string{"endpoint " + e.Name + ":", e.URL})
		}
	}
	if i.SecondsLeft > 0 {
		rows = append(rows, []string{"expires:", fmt.Sprintf("%s (in %s)", when(i.ExpiresAt), brief(time.Duration(i.SecondsLeft)*time.Second))})
	}
	if i.RenewalsLeft != nil {
		rows = append(rows, []string{"renewals left:", strconv.Itoa(*i.RenewalsLeft)})
	}
	return c.table(rows)
}

func ownerOf(i schemas.Instance) string {
	if i.Shared {
		return strings.TrimSpace(i.Owner + " (shared by all)")
	}
	return i.Owner
}

func instanceState(i schemas.Instance) string {
	switch {
	case i.Canceling:
		return string(i.State) + ", ending"
	case i.State == schemas.Running && !i.Ready:
		return "running, not ready"
	}
	return string(i.State)
}

func (c *cli) instanceShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "show TEMPLATE OWNER",
		Short:             "Show an owner's instance",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: c.completeTemplates,
		RunE: c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			i, err := cl.Instance(ctx, args[0], args[1], client.GetOptions{})
			if err != nil {
				return instanceError(err)
			}
			return c.printInstance(i)
		}),
	}
}

func (c *cli) instanceRenewCommand() *cobra.Command {
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "renew TEMPLATE OWNER",
		Short: "Let an owner's instance live longer: its ttl from now",
		Long: `renew moves the deadline of an instance to its ttl from now, as often and as far as the
template allows. A renewal that moves nothing costs none.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: c.completeTemplates,
	}
	cmd.Flags().DurationVar(&ttl, "ttl", 0, "so long from now instead")
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		i, err := cl.RenewInstance(ctx, args[0], args[1], ttl)
		if err != nil {
			return instanceError(err)
		}
		return c.printInstance(i)
	})
	return cmd
}

func (c *cli) instanceStopCommand() *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "stop TEMPLATE OWNER",
		Short: "End an owner's instance",
		Long: `stop ends an instance: TERM to its processes, KILL after the grace. It does not wait for
the end; start does, if the owner wants another.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: c.completeTemplates,
	}
	cmd.Flags().DurationVar(&grace, "grace", 0, "between TERM and KILL (default: the template's)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			var g *time.Duration
			if cmd.Flags().Changed("grace") {
				g = &grace
			}
			i, err := cl.EndInstance(ctx, args[0], args[1], g)
			if err != nil {
				return instanceError(err)
			}
			return c.printInstance(i)
		})(cmd, args)
	}
	return cmd
}

func (c *cli) instanceListCommand() *cobra.Command {
	var o client.InstanceListOptions
	var all bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the instances that have not ended",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().StringVar(&o.Template, "template", "", "only of this template")
	cmd.Flags().StringVar(&o.Owner, "owner", "", "only of this owner")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "those that have ended too")
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, _ []string) error {
		list := []schemas.Instance{}
		for i, err := range cl.AllInstances(ctx, o) {
			if err != nil {
				return err
			}
			if all || !i.State.Final() {
				list = append(list, i)
			}
		}
		slices.SortStableFunc(list, func(a, b schemas.Instance) int {
			return strings.Compare(a.Template+"\x00"+a.Owner, b.Template+"\x00"+b.Owner)
		})
		if c.data() {
			return c.printData(list)
		}
		if c.names() {
			for _, i := range list {
				fmt.Fprintln(c.out, i.Task)
			}
			return nil
		}
		rows := [][]string{{"TEMPLATE", "OWNER", "STATE", "CONNECTION", "LEFT", "RENEWALS", "TASK"}}
		for _, i := range list {
			left, renewals := "", ""
			if i.SecondsLeft > 0 {
				left = brief(time.Duration(i.SecondsLeft) * time.Second)
			}
			if i.RenewalsLeft != nil {
				renewals = strconv.Itoa(*i.RenewalsLeft)
			}
			rows = append(rows, []string{i.Template, ownerOf(i), instanceState(i), i.Connection, left, renewals, string(i.Task)})
		}
		return c.table(rows)
	})
	return cmd
}
