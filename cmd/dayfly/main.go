// Command dayfly is all of dayfly in one binary: `dayfly up` runs the services and
// an embedded NATS server in one process, and every other command is a client of
// the HTTP API.
//
// What a command prints on stdout is data; progress and advice go to stderr. Every
// error ends with the next step. The exit codes are listed in exit.go.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"text/template"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"dayfly.dev/client"
)

func main() {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	c := &cli{in: os.Stdin, out: os.Stdout, err: os.Stderr, signals: signals}
	os.Exit(c.main(context.Background(), os.Args[1:]))
}

// cli is what all commands share.
type cli struct {
	in       io.Reader
	out, err io.Writer
	signals  chan os.Signal // Ctrl-C and SIGTERM; each command takes them in its own way

	// Global flags.
	url      string
	context  string
	format   string
	template *template.Template // of the format, if it is one
	quiet    bool
}

const defaultURL = "http://127.0.0.1:8080"

// main runs one command line and gives the exit code.
func (c *cli) main(ctx context.Context, args []string) int {
	root, understood := c.root()
	root.SetArgs(args)
	root.SetIn(c.in)
	root.SetOut(c.out)
	root.SetErr(c.err)
	cmd, err := root.ExecuteContextC(ctx)
	if err != nil && !*understood {
		if cmd.Runnable() {
			err = fmt.Errorf("%w\n  usage: %s", err, cmd.UseLine())
		}
		err = &usageError{err, cmd.CommandPath()}
	}
	return c.fail(err)
}

// root builds the tree of commands. understood becomes true once a command line was
// found to be well formed.
func (c *cli) root() (root *cobra.Command, understood *bool) {
	understood = new(bool)
	root = &cobra.Command{
		Use:   "dayfly",
		Short: "Run short-lived containers",
		Long: `dayfly runs containers that live for a while.

Start everything on this machine with "dayfly up", then try
  dayfly run busybox echo hi

The exit code of run and wait is the container's own; 125 means that dayfly itself
could not do it, 124 that the time was over, 130 Ctrl-C, 2 a wrong command line.`,
		SilenceErrors: true, SilenceUsage: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.parseFormat(); err != nil {
				return err
			}
			*understood = true
			return nil
		},
	}
	f := root.PersistentFlags()
	f.StringVar(&c.url, "url", envOr("DAYFLY_URL", ""), "address of the API (DAYFLY_URL; default "+defaultURL+")")
	f.StringVar(&c.context, "context", envOr("DAYFLY_CONTEXT", ""), "name of the site, as dayfly context knows it (DAYFLY_CONTEXT)")
	_ = root.RegisterFlagCompletionFunc("context", completeContexts)
	f.StringVarP(&c.format, "output", "o", "table", "what to print: "+formats)
	f.BoolVarP(&c.quiet, "quiet", "q", false, "print only ids, and no progress")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "yaml", "name", templateFormat}, cobra.ShellCompDirectiveNoFileComp))
	root.AddGroup(&cobra.Group{ID: "tasks", Title: "Tasks:"}, &cobra.Group{ID: "site", Title: "The site:"},
		&cobra.Group{ID: "single", Title: "The services, each as a process of its own, and their records:"})
	for _, cmd := range []*cobra.Command{
		c.runCommand(), c.psCommand(), c.inspectCommand(), c.logsCommand(), c.eventsCommand(), c.cancelCommand(), c.extendCommand(), c.restartCommand(), c.waitCommand(),
		c.batchCommand(), c.instanceCommand(), c.attachCommand(), c.execCommand(), c.execsCommand(), c.cpCommand(), c.artifactsCommand(), c.blobCommand(), c.forwardCommand(),
	} {
		cmd.GroupID = "tasks"
		root.AddCommand(cmd)
	}
	for _, cmd := range []*cobra.Command{c.upCommand(), c.kindsCommand(), c.workersCommand(), c.drainCommand(), c.undrainCommand(), c.imagesCommand(), c.templatesCommand(), c.topCommand(), c.contextCommand(), c.doctorCommand(), c.versionCommand()} {
		cmd.GroupID = "site"
		root.AddCommand(cmd)
	}
	for _, cmd := range []*cobra.Command{
		c.gatewayCommand(), c.placerCommand(), c.agentCommand(), c.reaperCommand(), c.natsCommand(), c.shimCommand(), c.credentialsCommand(),
		c.backupCommand(), c.restoreCommand(),
	} {
		cmd.GroupID = "single"
		root.AddCommand(cmd)
	}
	return root, understood
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// How long a command goes on asking a server that does not answer.
const (
	shortPatience = 10 * time.Second // for one question
	longPatience  = 2 * time.Minute  // while a task is watched: a gateway may be restarted meanwhile
)

// client makes the client of the API.
func (c *cli) client() (*client.Client, error) {
	url, err := c.address()
	if err != nil {
		return nil, err
	}
	cl, err := client.New(url, client.WithUserAgent("dayfly-cli/"+version), client.WithRetryFor(shortPatience),
		client.WithConnectFor(time.Second))
	if err != nil {
		return nil, &hintError{err: err, hint: "--url http://HOST:PORT, or set DAYFLY_URL"}
	}
	return cl, nil
}

// patient is for calls about a task that this command has seen alive.
func patient(cl *client.Client) *client.Client {
	return cl.With(client.WithRetryFor(longPatience), client.WithConnectFor(longPatience))
}

// interrupted is the cause of a context that a signal has ended.
type interrupted struct{ signal os.Signal }

func (i interrupted) Error() string { return "interrupted by " + i.signal.String() }

// interruptible gives a context that the first signal ends. stop must be called.
func (c *cli) interruptible(ctx context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		select {
		case s := <-c.signals:
			cancel(interrupted{s})
		case <-done:
		}
	}()
	return ctx, func() {
		close(done)
		<-finished
		cancel(nil)
	}
}

// command makes the RunE of a command that the first signal ends.
func (c *cli) command(run func(ctx context.Context, cl *client.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		ctx, stop := c.interruptible(cmd.Context())
		defer stop()
		return run(ctx, cl, args)
	}
}

// say tells a person how things go: only on a terminal.
func (c *cli) say(format string, args ...any) {
	if !c.quiet && isTerminal(c.err) {
		c.tell("  "+format, args...)
	}
}

// tell writes a line to stderr.
func (c *cli) tell(format string, args ...any) { fmt.Fprintf(c.err, format+"\n", args...) }

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
