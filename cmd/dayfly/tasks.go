package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) inspectCommand() *cobra.Command {
	var timeline bool
	cmd := &cobra.Command{
		Use:               "inspect ID…",
		Short:             "Show all about tasks",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: c.completeTasks(false),
	}
	cmd.Flags().BoolVar(&timeline, "timeline", false, "show what happened when")
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		ids, err := c.resolveAll(ctx, cl, args)
		if err != nil {
			return err
		}
		for i, id := range ids {
			t, err := cl.Get(ctx, id, client.GetOptions{})
			if err != nil {
				return err
			}
			if !c.data() && !c.names() && i > 0 {
				fmt.Fprintln(c.out)
			}
			switch {
			case c.data():
				err = c.printData(t)
			case c.names():
				_, err = fmt.Fprintln(c.out, t.ID)
			case timeline:
				err = c.timeline(t)
			default:
				err = c.describe(t)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	return cmd
}

// describe prints a task for people.
func (c *cli) describe(t schemas.Task) error {
	var rows [][]string
	add := func(k, format string, args ...any) {
		rows = append(rows, []string{k + ":", fmt.Sprintf(format, args...)})
	}
	add("id", "%s", t.ID)
	state := string(t.State)
	if t.Reason != "" {
		state += " (" + string(t.Reason) + ")"
	}
	add("state", "%s", state)
	if t.Message != "" {
		add("message", "%s", t.Message)
	}
	if t.State == schemas.Queued {
		add("waits", "%s", strings.TrimPrefix(waits(t), "waits: "))
		if t.Why != nil {
			for _, w := range t.Why.Workers {
				add("  "+string(w.Worker), "%s", w.Detail)
			}
		}
	}
	add("image", "%s", t.Spec.Image)
	switch {
	case t.ImageDigest != "":
		add("image digest", "%s", t.ImageDigest)
	case t.ImageID != "":
		add("image id", "%s (no registry has it)", t.ImageID)
	}
	if words := append(append([]string{}, t.Spec.Entrypoint...), t.Spec.Command...); len(words) > 0 {
		for i, w := range words {
			if w == "" || strings.ContainsAny(w, " \t\n\"'$;&|<>*?") {
				words[i] = strconv.Quote(w)
			}
		}
		add("command", "%s", clip(strings.Join(words, " "), 200))
	}
	r := t.Spec.Resources
	add("limits", "%s cpus, %s memory, %d pids, %s output", r.CPUs, r.Memory, r.Pids, r.Disk)
	for _, e := range t.Endpoints {
		add("endpoint "+e.Name, "%s", e.URL)
	}
	if t.Worker != "" {
		add("worker", "%s", t.Worker)
	}
	add("attempt", "%d of %d%s", t.Attempt, t.Spec.MaxAttempts, restarts(t))
	add("accepted", "%s", when(t.Timings.Accepted))
	if !t.Timings.Running.IsZero() {
		add("running", "%s (after %s)", when(t.Timings.Running), brief(t.Timings.Running.Sub(t.Timings.Accepted)))
	}
	if t.Spec.Health != nil && !t.Timings.Running.IsZero() {
		ready := "not yet"
		if at := t.Timings.Ready; !at.IsZero() {
			ready = fmt.Sprintf("%s (after %s)", when(at), brief(at.Sub(t.Timings.Accepted)))
		}
		add("ready", "%s", ready)
	}
	if !t.Timings.Ended.IsZero() {
		add("ended", "%s", when(t.Timings.Ended))
	} else if !t.ExpiresAt.IsZero() {
		add("expires", "%s (in %s)", when(t.ExpiresAt), brief(time.Duration(t.SecondsLeft)*time.Second))
	}
	if t.Cancel != nil {
		add("cancel", "%s%s", when(t.Cancel.At), by(t.Cancel))
	}
	if t.Exit != nil {
		exit := strconv.Itoa(t.Exit.Code)
		if t.Exit.Signal != 0 {
			exit += fmt.Sprintf(" (signal %d)", t.Exit.Signal)
		}
		if t.Exit.OOMKilled {
			exit += " (killed for want of memory)"
		}
		add("exit code", "%s", exit)
	}
	if u := t.Usage; u != nil {
		add("used", "%s cpu, %s, %s memory at most", brief(time.Duration(u.CPUMillis)*time.Millisecond),
			brief(time.Duration(u.WallMillis)*time.Millisecond), u.MemoryPeak)
	}
	if l := t.Logs; l != nil {
		add("output", "%s stdout, %s stderr", schemas.Size(l.StdoutBytes), schemas.Size(l.StderrBytes))
		if l.Truncated {
			add("", "%s", truncation(l))
		}
	}
	if s := t.ArtifactSum; s != nil {
		add("artifacts", "%d files, %s", s.Count, schemas.Size(s.Bytes))
		if s.Truncated {
			add("", "%s", incomplete(s.Why))
		}
	}
	for _, kv := range pairList(t.Spec.Labels) {
		add("label", "%s", kv)
	}
	return c.table(rows)
}

func when(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05.000 -0700") }

func (c *cli) timeline(t schemas.Task) error {
	rows := [][]string{{"TIME", "STATE", "BY", "ATTEMPT", "WORKER", "WHAT"}}
	for _, h := range t.History {
		attempt := ""
		if h.Attempt > 0 {
			attempt = strconv.Itoa(h.Attempt)
		}
		what := h.Note
		if what == "" {
			what = string(h.Reason)
		}
		rows = append(rows, []string{"+" + brief(h.At.Sub(t.Timings.Accepted)), string(h.State), h.By, attempt, string(h.Worker), what})
	}
	return c.table(rows)
}

func (c *cli) cancelCommand() *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use:     "cancel ID…",
		Aliases: []string{"stop"},
		Short:   "End tasks: TERM, and KILL after a grace",
		Long: `cancel asks for the end of tasks and does not wait for it; "dayfly wait" does. A task
that has ended already stays as it is, which is no error.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: c.completeTasks(true),
	}
	cmd.Flags().DurationVar(&grace, "grace", 0, "time between TERM and KILL (default: the task's own)")
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		ids, err := c.resolveAll(ctx, cl, args)
		if err != nil {
			return err
		}
		var g *time.Duration
		if cmd.Flags().Changed("grace") {
			g = &grace
		}
		return c.changeAll(ids, func(id schemas.TaskID) (schemas.Task, error) { return cl.Cancel(ctx, id, g) })
	})
	return cmd
}

// changeAll changes tasks one after another, and prints them.
func (c *cli) changeAll(ids []schemas.TaskID, change func(schemas.TaskID) (schemas.Task, error)) error {
	return changeEach(c, ids, change, c.printTask)
}

// changeEach changes things one after another, and prints them. What fails does not keep
// the rest from being done.
func changeEach[ID, Thing any](c *cli, ids []ID, change func(ID) (Thing, error), show func(Thing) error) error {
	var failed error
	for _, id := range ids {
		t, err := change(id)
		if err != nil {
			if failed != nil { // the last one is said at the end
				message, _ := explain(failed)
				c.tell("error: %s", message)
			}
			failed = fmt.Errorf("%v: %w", id, err)
			continue
		}
		if err := show(t); err != nil {
			return err
		}
	}
	return failed
}

// printTask prints a task that a command has changed.
func (c *cli) printTask(t schemas.Task) error {
	if c.data() {
		return c.printData(t)
	}
	_, err := fmt.Fprintln(c.out, t.ID)
	return err
}

func (c *cli) extendCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "extend ID TTL",
		Short: "Let a task live longer: TTL from now",
		Long: `extend moves a task's deadline to TTL from now. It never moves it back, nor beyond
the longest lifetime that the site allows.`,
		Example:           "  dayfly extend t-01jd6q0t 30m",
		ValidArgsFunction: c.completeTasks(true),
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(2)(cmd, args); err != nil {
				return err
			}
			if d, err := time.ParseDuration(args[1]); err != nil || d <= 0 {
				return errors.New("TTL must be a duration such as 15m or 2h")
			}
			return nil
		},
		RunE: c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			ttl, _ := time.ParseDuration(args[1]) // checked above
			id, err := c.resolve(ctx, cl, args[0])
			if err != nil {
				return err
			}
			t, err := cl.Extend(ctx, id, ttl)
			if e, ok := errors.AsType[*schemas.Error](err); ok && (e.Code == schemas.CodeInvalidValue || e.Code == schemas.CodeNotAllowed) {
				return &hintError{err, "a shorter TTL"}
			}
			if err != nil {
				return err
			}
			if c.data() || c.names() {
				return c.printTask(t)
			}
			if t.ExpiresAt.IsZero() {
				_, err = fmt.Fprintf(c.out, "%s will live %s once it runs\n", t.ID, schemas.Duration(ttl))
				return err
			}
			_, err = fmt.Fprintf(c.out, "%s expires at %s, in %s\n", t.ID, when(t.ExpiresAt), brief(time.Duration(t.SecondsLeft)*time.Second))
			return err
		}),
	}
}

func (c *cli) restartCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "restart ID…",
		Short: "Run the commands of running tasks again, in their containers",
		Long: `restart ends the processes of tasks, TERM and after the task's own grace KILL, and runs
their commands again in the same containers: files and deadlines stay as they are, and
the logs go on.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: c.completeTasks(true),
		RunE: c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			ids, err := c.resolveAll(ctx, cl, args)
			if err != nil {
				return err
			}
			return c.changeAll(ids, func(id schemas.TaskID) (schemas.Task, error) { return cl.Restart(ctx, id) })
		}),
	}
}

func (c *cli) waitCommand() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "wait ID…",
		Short: "Wait until tasks have ended, and exit as they did",
		Long: `wait prints a line for each task when it has ended, in the order in which they are
named: its id, its state and its exit code. The exit code is that of the first task
that did not complete; 124 if --timeout is over first.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: c.completeTasks(true),
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "stop waiting after so long (0: never)")
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		ids, err := c.resolveAll(ctx, cl, args)
		if err != nil {
			return err
		}
		if timeout > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeoutCause(ctx, timeout, errTimeout)
			defer cancel()
		}
		if _, err := cl.Get(ctx, ids[0], client.GetOptions{}); err != nil && ctx.Err() == nil {
			return err // before the patience that a task deserves which was seen alive
		}
		var first error
		for _, id := range ids {
			t, err := patient(cl).Wait(ctx, id)
			if errors.Is(err, errTimeout) {
				return &exitError{exitTimeout, &hintError{
					fmt.Errorf("%s has not ended within %s", id, schemas.Duration(timeout)), "dayfly inspect " + string(id)}}
			}
			if err != nil {
				return err
			}
			if first == nil {
				first = verdict(t)
			}
			switch {
			case c.data():
				err = c.printData(t)
			case c.names():
				_, err = fmt.Fprintln(c.out, t.ID)
			default:
				code := "-"
				if t.Exit != nil {
					code = strconv.Itoa(t.Exit.Code)
				}
				_, err = fmt.Fprintf(c.out, "%s\t%s\t%s\n", t.ID, t.State, code)
			}
			if err != nil {
				return err
			}
		}
		return first
	})
	return cmd
}

var errTimeout = errors.New("the time to wait is over")

func (c *cli) workersCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "workers",
		Short: "List the workers and what they hold",
		Args:  cobra.NoArgs,
		RunE: c.command(func(ctx context.Context, cl *client.Client, _ []string) error {
			l, err := cl.Workers(ctx)
			if err != nil {
				return err
			}
			if c.data() {
				if l.Items == nil {
					l.Items = []schemas.Worker{}
				}
				return c.printData(l.Items)
			}
			if c.names() {
				for _, w := range l.Items {
					fmt.Fprintln(c.out, w.ID)
				}
				return nil
			}
			if len(l.Items) == 0 {
				c.say("no worker has announced itself yet")
			}
			return c.table(workerRows(l.Items))
		}),
	}
}

// workerRows is the table of workers.
func workerRows(list []schemas.Worker) [][]string {
	rows := [][]string{{"NAME", "STATE", "TASKS", "CPU", "MEMORY", "GPU", "BEAT", "VERSION"}}
	for _, w := range list {
		gpu := ""
		if w.Host.GPUs > 0 {
			gpu = fmt.Sprintf("%d/%d", w.Assigned.GPUs, w.Host.GPUs)
		}
		rows = append(rows, []string{
			string(w.ID), w.State, fmt.Sprintf("%d/%d", w.Assigned.Tasks, w.Host.Slots),
			fmt.Sprintf("%s/%s", w.Assigned.CPUs, w.Host.CPUs), fmt.Sprintf("%s/%s", w.Assigned.Memory, w.Host.Memory),
			gpu, ago(w.BeatAgo.Std()), w.Version,
		})
	}
	return rows
}
