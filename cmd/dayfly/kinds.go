package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) kindsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "kinds [KIND…]",
		Short: "List the kinds of tasks that the site has",
		Long: `kinds lists the job types that the operator has whitelisted. A task of one is posted
as {"kind": NAME, "payload": …}; -o json shows the JSON Schema of each payload.`,
		Example: `  dayfly kinds
  dayfly kinds python -o json
  echo '{"script": "print(1)"}' | dayfly run --kind python --payload -`,
		RunE: c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			l, err := cl.Kinds(ctx)
			if err != nil {
				return err
			}
			for _, name := range args {
				if !slices.ContainsFunc(l.Items, func(k schemas.Kind) bool { return k.Name == name }) {
					return &hintError{fmt.Errorf("%s is no kind of this site", name), "dayfly kinds lists them"}
				}
			}
			items := l.Items
			if len(args) > 0 {
				items = slices.DeleteFunc(items, func(k schemas.Kind) bool { return !slices.Contains(args, k.Name) })
			}
			switch {
			case c.data():
				return c.printData(items)
			case c.names():
				for _, k := range items {
					fmt.Fprintln(c.out, k.Name)
				}
				return nil
			case len(items) == 0:
				c.say("this site has no kinds; its operator sets them with --kinds DIR")
			}
			rows := [][]string{{"NAME", "IMAGE", "CPUS", "MEMORY", "TTL", "ABOUT"}}
			for _, k := range items {
				rows = append(rows, []string{k.Name, k.Image, k.Resources.CPUs.String(), k.Resources.Memory.String(), k.TTL.String(), k.About})
			}
			return c.table(rows)
		}),
	}
}
