package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

func (c *cli) templatesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "templates [NAME…]",
		Aliases: []string{"template"},
		Short:   "List the operator's templates, or show some",
		Long: `templates lists the presets of which instances are made, and what is wrong with their
files: what such a file said before holds. The values of secrets are never shown.`,
		ValidArgsFunction: c.completeTemplates,
	}
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		l, err := cl.Templates(ctx)
		if err != nil {
			return err
		}
		if len(args) > 0 {
			return c.showTemplates(l, args)
		}
		if c.data() {
			return c.printData(l)
		}
		if c.names() {
			for _, t := range l.Items {
				fmt.Fprintln(c.out, t.Name)
			}
			return nil
		}
		rows := [][]string{{"NAME", "IMAGE", "TTL", "MAX", "RENEWALS", "VALUES", "FOR", "DIGEST"}}
		for _, t := range l.Items {
			renewals, who := "any", "each owner"
			if t.Extensions != nil {
				renewals = strconv.Itoa(*t.Extensions)
			}
			if t.Shared {
				who = "all"
			}
			rows = append(rows, []string{t.Name, t.Spec.Image, t.Spec.TTL.String(), t.MaxTTL.String(), renewals,
				strings.Join(slices.Sorted(maps.Keys(t.Values)), ","), who, t.Digest})
		}
		if err := c.table(rows); err != nil {
			return err
		}
		for _, f := range l.Faults {
			c.tell("%s", printable(faultText(f)))
		}
		return nil
	})
	cmd.AddCommand(c.templatesCheckCommand())
	return cmd
}

func (c *cli) showTemplates(l schemas.TemplateList, names []string) error {
	if !c.data() && !c.names() {
		c.format = "yaml" // as it was written, about
	}
	for _, name := range names {
		i := slices.IndexFunc(l.Items, func(t schemas.TemplateView) bool { return t.Name == name })
		if i < 0 {
			return &hintError{fmt.Errorf("there is no template %s", strconv.Quote(name)), "dayfly templates lists them"}
		}
		if c.names() {
			fmt.Fprintln(c.out, name)
		} else if err := c.printData(l.Items[i]); err != nil {
			return err
		}
	}
	return nil
}

// faultText is a fault as compilers give it.
func faultText(f schemas.TemplateFault) string { return gateway.TemplateFault(f).String() }

func (c *cli) templatesCheckCommand() *cobra.Command {
	var maxTTL time.Duration
	cmd := &cobra.Command{
		Use:   "check DIR",
		Short: "Say what is wrong with a folder of templates",
		Long: `check reads a folder as a gateway with --templates would, without one, and prints what is
wrong, by file, line and column. It exits with 1 if anything is.`,
		Example: `  dayfly templates check templates && rsync -a templates/ gateway:/etc/dayfly/templates/`,
		Args:    cobra.ExactArgs(1),
	}
	cmd.Flags().DurationVar(&maxTTL, "max-ttl", schemas.DefaultPolicy().MaxTTL.Std(), "the gateway's --max-ttl")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		p := schemas.DefaultPolicy()
		p.MaxTTL = schemas.Duration(maxTTL)
		templates, err := gateway.OpenTemplates(args[0], p)
		if err != nil {
			return err
		}
		s := templates.Set()
		for _, f := range s.Faults {
			fmt.Fprintln(c.out, printable(f.String()))
		}
		if len(s.Faults) > 0 {
			return &exitError{exitAmiss, nil}
		}
		c.say("%d templates, nothing is wrong", len(s.Presets))
		return nil
	}
	return cmd
}

// completeTemplates gives the names of templates for the first argument.
func (c *cli) completeTemplates(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	cl, err := c.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), time.Second)
	defer cancel()
	l, err := cl.Templates(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, t := range l.Items {
		names = append(names, t.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// openTemplates reads the folder of --templates; none is nil.
func (g *gatewayConfig) openTemplates(policy schemas.Policy) (*gateway.Templates, error) {
	if g.templates == "" {
		return nil, nil
	}
	t, err := gateway.OpenTemplates(g.templates, policy)
	if err != nil {
		return nil, &hintError{fmt.Errorf("--templates: %w", err), "--templates with a folder of YAML files that this user may read; dayfly templates check DIR looks into one"}
	}
	return t, nil
}

// rereadOn lets SIGHUP read again what an operator may have changed.
func (p *process) rereadOn(poke func()) {
	p.parts = append(p.parts, part{"hangup", "", func(ctx context.Context) error {
		hangup := make(chan os.Signal, 1)
		signal.Notify(hangup, syscall.SIGHUP)
		defer signal.Stop(hangup)
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-hangup:
				poke()
			}
		}
	}})
}
