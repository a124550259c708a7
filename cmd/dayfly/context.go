package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
)

// contexts are the sites that this user knows by name, in a file of the user's
// configuration folder.
type contexts struct {
	Current string          `json:"current,omitempty"`
	Sites   map[string]site `json:"contexts"`
}

type site struct {
	URL string `json:"url"`
}

func contextFile() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("find the folder of contexts: %w", err)
	}
	return filepath.Join(dir, "dayfly", "contexts.json"), nil
}

func readContexts() (k contexts, err error) {
	k.Sites = map[string]site{}
	path, err := contextFile()
	if err != nil {
		return k, err
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return k, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &k)
	}
	if err != nil {
		return k, &hintError{fmt.Errorf("read contexts: %w", err), "mend or remove " + path}
	}
	return k, nil
}

// write replaces the file as a whole.
func (k contexts) write() error {
	path, err := contextFile()
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err = os.WriteFile(tmp, append(b, '\n'), 0o600); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write contexts: %w", err), os.Remove(tmp))
	}
	return nil
}

// address is where the API is: as --url or DAYFLY_URL says, else as the context of
// --context or DAYFLY_CONTEXT has it, else as the current context has it.
func (c *cli) address() (string, error) {
	if c.url != "" {
		return c.url, nil
	}
	k, err := readContexts()
	name := c.context
	if name == "" {
		name = k.Current
	}
	switch {
	case c.context == "" && (err != nil || name == ""): // who names no context needs none
		return defaultURL, nil
	case err != nil:
		return "", err
	}
	s, ok := k.Sites[name]
	if !ok {
		return "", unknownContext(name)
	}
	return s.URL, nil
}

func unknownContext(name string) error {
	return &hintError{fmt.Errorf("there is no context %q", name), "dayfly context lists them; dayfly context add NAME URL makes one"}
}

func completeContexts(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	k, _ := readContexts()
	return slices.Sorted(maps.Keys(k.Sites)), cobra.ShellCompDirectiveNoFileComp
}

func (c *cli) contextCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "context",
		Short: "Name the sites that you use, and choose one",
		Long: `context lists the sites that you have named; * marks the one that commands go to.
--url and DAYFLY_URL go before every context, --context and DAYFLY_CONTEXT before the
current one.`,
		Example: `  dayfly context add lab http://10.0.0.5:8080
  dayfly context use lab
  dayfly --context lab ps`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			k, err := readContexts()
			if err != nil {
				return err
			}
			return c.showContexts(k)
		},
	}
	change := func(use, short string, args int, do func(*contexts, []string) error) {
		sub := &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(args), ValidArgsFunction: completeContexts,
			RunE: func(_ *cobra.Command, args []string) error {
				k, err := readContexts()
				if err != nil {
					return err
				}
				if err := do(&k, args); err != nil {
					return err
				}
				return k.write()
			}}
		cmd.AddCommand(sub)
	}
	change("add NAME URL", "Name a site; the first becomes the current one", 2, func(k *contexts, args []string) error {
		if _, err := client.New(args[1]); err != nil {
			return &usageError{err, "dayfly context add"}
		}
		k.Sites[args[0]] = site{URL: args[1]}
		if k.Current == "" {
			k.Current = args[0]
		}
		return nil
	})
	change("use NAME", "Make a site the current one", 1, func(k *contexts, args []string) error {
		if _, ok := k.Sites[args[0]]; !ok {
			return unknownContext(args[0])
		}
		k.Current = args[0]
		return nil
	})
	change("remove NAME", "Forget a site", 1, func(k *contexts, args []string) error {
		if _, ok := k.Sites[args[0]]; !ok {
			return unknownContext(args[0])
		}
		delete(k.Sites, args[0])
		if k.Current == args[0] {
			k.Current = ""
		}
		return nil
	})
	return cmd
}

func (c *cli) showContexts(k contexts) error {
	names := slices.Sorted(maps.Keys(k.Sites))
	switch {
	case c.data():
		return c.printData(k)
	case c.names():
		for _, n := range names {
			fmt.Fprintln(c.out, n)
		}
		return nil
	}
	rows := [][]string{{"", "NAME", "URL"}}
	for _, n := range names {
		mark := " "
		if n == k.Current {
			mark = "*"
		}
		rows = append(rows, []string{mark, n, k.Sites[n].URL})
	}
	return c.table(rows)
}
