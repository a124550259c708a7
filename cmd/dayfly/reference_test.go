package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var update = flag.Bool("update", false, "write docs/cli.md anew")

// docs/cli.md is made from the commands themselves:
//
//	go test ./cmd/dayfly -run Reference -update
func TestReference(t *testing.T) {
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "DAYFLY_") {
			t.Setenv(name, "")
		}
	}
	path := filepath.Join("..", "..", "docs", "cli.md")
	root, _ := (&cli{}).root()
	want := reference(root)
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != want {
		t.Error("docs/cli.md is not what the commands say; go test ./cmd/dayfly -run Reference -update")
	}
}

// onEachHost are defaults that differ from host to host.
var onEachHost = map[string]string{
	"data":   "/var/lib/dayfly for root, else ~/.local/share/dayfly",
	"worker": "the host's name",
	"name":   "the host's name",
}

func reference(root *cobra.Command) string {
	var b strings.Builder
	fmt.Fprint(&b, `# The command line

Made from the commands themselves. stdout is data, stderr is progress and advice.

## Exit codes

| code | means |
|---|---|
| the container's | of `+"`run`, `wait`, `exec` and `attach`"+`: what the process ended with |
| 0 | it was done; `+"`run` and `wait`"+`: the task completed |
| 1 | `+"`doctor` or `templates check`"+` found something amiss; an item of a batch did not complete |
`)
	for _, row := range []struct {
		code  string
		means string
	}{
		{fmt.Sprint(exitUsage), "a wrong command line; nothing was done"},
		{fmt.Sprint(exitTimeout), "the task's time, or a `--timeout`, was over"},
		{fmt.Sprint(exitDayfly), "dayfly could not do it, or the task ended without an exit code"},
		{fmt.Sprintf("%d, %d", exitSignal+2, exitSignal+15), "Ctrl-C, SIGTERM"},
	} {
		fmt.Fprintf(&b, "| %s | %s |\n", row.code, row.means)
	}
	fmt.Fprintf(&b, "\n## Flags of every command\n\n")
	table(&b, root.PersistentFlags())
	for _, g := range root.Groups() {
		fmt.Fprintf(&b, "\n## %s\n", strings.TrimSuffix(g.Title, ":"))
		for _, cmd := range root.Commands() {
			if cmd.GroupID == g.ID {
				describe(&b, cmd)
			}
		}
	}
	return b.String()
}

func describe(b *strings.Builder, cmd *cobra.Command) {
	fmt.Fprintf(b, "\n### %s\n\n```\n%s\n```\n\n", strings.TrimPrefix(cmd.CommandPath(), "dayfly "), cmd.UseLine())
	long := cmd.Long
	if long == "" {
		long = cmd.Short + "."
	}
	fmt.Fprintf(b, "%s\n", long)
	if len(cmd.Aliases) > 0 {
		fmt.Fprintf(b, "\nAlso: `%s`.\n", strings.Join(cmd.Aliases, "`, `"))
	}
	if cmd.Example != "" {
		fmt.Fprintf(b, "\n```\n%s\n```\n", cmd.Example)
	}
	if cmd.LocalNonPersistentFlags().HasAvailableFlags() {
		fmt.Fprintln(b)
		table(b, cmd.LocalNonPersistentFlags())
	}
	for _, sub := range cmd.Commands() {
		describe(b, sub)
	}
}

func table(b *strings.Builder, flags *pflag.FlagSet) {
	fmt.Fprint(b, "| flag | default | |\n|---|---|---|\n")
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		value := f.DefValue
		if other, ok := onEachHost[f.Name]; ok && value != "" {
			value = other
		}
		switch value {
		case "[]", "false", "0", "0s":
			value = ""
		}
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", name, value, strings.ReplaceAll(f.Usage, "|", "\\|"))
	})
}
