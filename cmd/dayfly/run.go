package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) runCommand() *cobra.Command {
	var flags taskFlags
	var detach bool
	var key, until, artifacts, keys string
	cmd := &cobra.Command{
		Use:   "run [flags] IMAGE [COMMAND [ARG…]] | run [flags] --kind KIND",
		Short: "Run a task, show its output, and end as it ends",
		Long: `run asks for a task, shows what it writes while it runs, and exits with its exit
code. Ctrl-C cancels the task and waits for its end; a second Ctrl-C leaves at once.
A task whose output nobody reads any more, as in a pipe to head, is canceled too.

With -i the task reads what comes on stdin here, to its end. With -t it is on a terminal;
with -it that is this one, where Ctrl-C is the program's, and the keys ctrl-p ctrl-q leave
it running: dayfly attach comes back. After a broken connection, or a restart of the
worker's agent, it goes on by itself where it was.

With -d it only prints the task's id; with --wait it then waits until the task runs, or
is ready (has passed its health check), and exits as the task does if it ends before.

Flags for dayfly stand before IMAGE; all after it belongs to the task. With --kind the
site makes the task of a payload, and there is no IMAGE; dayfly kinds lists the kinds.`,
		Example: `  dayfly run busybox echo hi
  dayfly run --ttl 5m -m 128MiB -e LANG=C --file sol.py python:3 python /task/input/sol.py
  echo 1 2 3 | dayfly run -i busybox wc -w
  echo '{"script": "print(42)"}' | dayfly run --kind python --payload -
  dayfly run -it --ttl 2h debian bash
  id=$(dayfly run -d --ttl 2h -p web=8080 registry.lan/challenge:1)
  id=$(dayfly run -d --wait ready --health-http 8080/ --ttl 2h nginx)`,
		Args:              flags.args,
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var window *schemas.Window
		if isTerminal(c.in) {
			w := c.window()
			window = &w
		}
		spec, err := flags.specOf(cmd.Flags(), c.in, window, args)
		if err != nil {
			return &usageError{err, cmd.CommandPath()}
		}
		detachKeys, err := readKeys(keys)
		switch {
		case err != nil:
			return &usageError{err, cmd.CommandPath()}
		case flags.interactive && flags.terminal && !detach && window == nil:
			return &usageError{errors.New("-it needs a terminal here; leave -t out for a pipe or a file"), cmd.CommandPath()}
		case !slices.Contains([]string{"", string(client.UntilRunning), string(client.UntilReady)}, until):
			return &usageError{errors.New("--wait must be running or ready"), cmd.CommandPath()}
		case until != "" && !detach:
			return &usageError{errors.New("--wait goes with -d; without it run waits for the end"), cmd.CommandPath()}
		}
		if artifacts != "" {
			if detach {
				return &usageError{errors.New("--artifacts does not go with -d; dayfly artifacts get has them once the task is over"), cmd.CommandPath()}
			}
			if err := mayFill(artifacts); err != nil {
				return err
			}
		}
		body, err := json.Marshal(spec)
		if err != nil {
			return err
		}
		cl, err := c.client()
		if err != nil {
			return err
		}
		if err := flags.send(cmd.Context(), cl); err != nil {
			return err
		}
		if detach {
			return c.runDetached(cmd.Context(), cl, body, key, client.Until(until))
		}
		r := &runner{cli: c, client: cl, body: body, key: key, stream: c.format == "table", artifacts: artifacts}
		if flags.interactive || flags.terminal {
			r.joint = &joint{terminal: flags.terminal, input: flags.interactive, keys: detachKeys}
		}
		return r.run(cmd.Context())
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	flags.register(f)
	f.BoolVarP(&detach, "detach", "d", false, "print the task's id and leave it running")
	f.StringVar(&keys, "detach-keys", defaultKeys, "with -it: the keys that leave the task running")
	f.StringVar(&until, "wait", "", "with -d: wait until the task is running, or ready")
	f.StringVar(&artifacts, "artifacts", "", "put what the task left in its output folder into this folder, which must be empty or not there")
	f.StringVar(&key, "idempotency-key", "", "give the same task again when the same is asked for with the same key, for 24 h")
	for flag, values := range map[string][]string{
		"on-lost": {"requeue", "fail", "wait"}, "pull": {"missing", "always", "never"}, "priority": {"1", "5", "9"},
		"wait": {"running", "ready"},
	} {
		_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	return cmd
}

func (c *cli) runDetached(ctx context.Context, cl *client.Client, body []byte, key string, until client.Until) error {
	ctx, stop := c.interruptible(ctx)
	defer stop()
	t, err := cl.CreateRaw(ctx, body, client.CreateOptions{IdempotencyKey: key})
	if err != nil {
		return err
	}
	if !c.data() { // at once: it shall be known however the waiting ends
		fmt.Fprintln(c.out, t.ID)
	}
	switch until {
	case client.UntilRunning:
		t, err = c.awaited(ctx, patient(cl), t.ID, patient(cl).WaitRunning)
	case client.UntilReady:
		t, err = c.awaited(ctx, patient(cl), t.ID, patient(cl).WaitReady)
	}
	if err == nil && c.data() {
		err = c.printData(t)
	}
	if err == nil && until != "" && t.State.Final() {
		err = verdict(t)
	}
	for _, e := range t.Endpoints {
		if err == nil && !c.quiet {
			c.tell("  %s: %s", e.Name, e.URL)
		}
	}
	return err
}

// runner is one `dayfly run` in the foreground. Several goroutines ask the server;
// one loop, in run, hears what they found and the signals.
type runner struct {
	*cli
	client *client.Client
	body   []byte
	key    string
	stream bool   // show the output; else the final task is printed as JSON or id
	joint  *joint // with -i or -t

	artifacts string // the folder for them, if any
}

// queuedWhy is how long a task may wait for a worker before run says why.
const queuedWhy = 2 * time.Second

// logSlack is how long the rest of the output may take once the task has ended.
const logSlack = 30 * time.Second

func (r *runner) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	task, sig, err := r.create(ctx)
	if err != nil {
		return err
	}
	r.say("%s %s", task.ID, task.State)
	id := task.ID
	for _, e := range task.Endpoints {
		if !r.quiet {
			r.tell("  %s: %s", e.Name, e.URL)
		}
	}
	cl := patient(r.client)

	if r.joint != nil {
		return r.runJoined(ctx, cl, id, sig)
	}
	signal.Ignore(syscall.SIGPIPE) // a write says so, and the task is not left behind
	output := make(chan error, 1)
	if r.stream {
		go func() { output <- r.copyLogs(ctx, cl, id) }()
	} else {
		output <- nil
	}
	type end struct {
		task schemas.Task
		err  error
	}
	ended := make(chan end, 1)
	go func() {
		t, err := cl.Wait(ctx, id)
		ended <- end{t, err}
	}()
	progress := make(chan string)
	go r.watch(ctx, cl, id, progress)
	canceled := make(chan error, 1)
	stop := func() {
		r.tell("canceling %s; again to leave at once", id)
		go func() {
			_, err := cl.Cancel(ctx, id, nil)
			canceled <- err
		}()
	}
	if sig != nil {
		stop()
	}

	var final *schemas.Task
	var outputErr error
	outputDone := false
	var late <-chan time.Time
	for final == nil || !outputDone {
		select {
		case s := <-r.signals:
			if sig != nil || final != nil {
				return r.leave(s, fmt.Sprintf("dayfly logs -f %s; it may still be ending", id))
			}
			sig = s
			stop()
		case err := <-canceled:
			if err != nil {
				message, _ := explain(err)
				r.tell("could not cancel: %s", message)
			}
		case line := <-progress:
			r.tell("  %s", line)
		case e := <-ended:
			if e.err != nil {
				return &hintError{fmt.Errorf("lost sight of %s: %w", id, e.err), "dayfly wait " + string(id) + " once dayfly is back; the task goes on"}
			}
			final = &e.task
			late = time.After(logSlack)
		case outputErr = <-output:
			outputDone = true
			output = nil
			if errors.Is(outputErr, syscall.EPIPE) && sig == nil && final == nil { // nobody reads it any more
				sig = syscall.SIGPIPE
				stop()
			}
		case <-late:
			outputErr, outputDone = errors.New("it did not come in time"), true
		}
	}
	if r.artifacts != "" && final.ArtifactSum != nil {
		if err := r.saveArtifacts(ctx, cl, *final, r.artifacts); err != nil {
			message, _ := explain(err)
			outputErr = errors.Join(outputErr, fmt.Errorf("not all of the artifacts are here: %s", message))
		}
	}
	return r.finish(*final, sig, outputErr)
}

// create asks for the task. A signal meanwhile does not break the request off: it may
// have been heard already, and then nobody would know the task. sig is that signal.
func (r *runner) create(ctx context.Context) (task schemas.Task, sig os.Signal, err error) {
	type answer struct {
		task schemas.Task
		err  error
	}
	made := make(chan answer, 1)
	go func() {
		t, err := r.client.CreateRaw(ctx, r.body, client.CreateOptions{IdempotencyKey: r.key})
		made <- answer{t, err}
	}()
	for {
		select {
		case s := <-r.signals:
			if sig != nil {
				return task, sig, r.leave(s, "dayfly ps; the task may have been accepted")
			}
			sig = s
		case a := <-made:
			return a.task, sig, a.err
		}
	}
}

func (r *runner) leave(s os.Signal, next string) error {
	return &exitError{signalCode(s), &hintError{errors.New("left before the end"), next}}
}

// finish turns the final task into the exit code.
func (r *runner) finish(t schemas.Task, sig os.Signal, outputErr error) error {
	if !r.stream {
		if r.data() {
			if err := r.printData(t); err != nil {
				return err
			}
		} else {
			fmt.Fprintln(r.out, t.ID)
		}
	}
	if t.Logs != nil && t.Logs.Truncated && r.stream {
		r.tell("warning: %s", truncation(t.Logs))
	}
	if sig != nil {
		return &exitError{code: signalCode(sig)}
	}
	err := verdict(t)
	if outputErr == nil {
		return err
	}
	message, _ := explain(outputErr)
	broken := &hintError{fmt.Errorf("not all of the output is here: %s", message), "dayfly logs " + string(t.ID)}
	var ee *exitError
	if errors.As(err, &ee) {
		return &exitError{ee.code, broken}
	}
	return broken
}

func truncation(l *schemas.LogSum) string {
	switch l.Why {
	case schemas.LogsLimit:
		return fmt.Sprintf("the output is cut off at the limit for logs; %s more were dropped", schemas.Size(l.Dropped))
	case schemas.LogsDiskFull:
		return fmt.Sprintf("the output is cut off because the disk of its worker was full; %s more were dropped", schemas.Size(l.Dropped))
	case schemas.LogsWorkerLost:
		return "the end of the output was lost with its worker"
	}
	return "the output is not complete"
}

// watch tells how the task gets to run: on a terminal each step, and in any case why
// it waits once that takes long. It ends when the task runs or has ended.
func (c *cli) watch(ctx context.Context, cl *client.Client, id schemas.TaskID, progress chan<- string) {
	began := time.Now()
	send := func(format string, args ...any) {
		select {
		case progress <- fmt.Sprintf(format, args...):
		case <-ctx.Done():
		}
	}
	look := func(wait time.Duration) (schemas.Task, bool) {
		t, err := cl.Get(ctx, id, client.GetOptions{Wait: client.UntilRunning, Timeout: wait})
		return t, err == nil
	}
	chatty := !c.quiet && isTerminal(c.err)
	t, ok := look(queuedWhy)
	said := ""
	for ok {
		switch {
		case t.State.Final():
			return
		case t.State == schemas.Running:
			if chatty {
				send("running on %s after %s", t.Worker, brief(t.Timings.Running.Sub(t.Timings.Accepted)))
			}
			return
		}
		if line := waits(t); line != said && (chatty || t.State == schemas.Queued) && !c.quiet {
			send("%s", line)
			said = line
		}
		// The server holds the answer back until the task runs; in between look at how
		// things stand, more seldom as time goes by.
		asked := time.Now()
		pause := min(max(time.Second, time.Since(began)/4), 15*time.Second)
		t, ok = look(pause)
		if rest := pause - time.Since(asked); ok && rest > 0 && t.State != schemas.Running && !t.State.Final() {
			select {
			case <-time.After(rest):
			case <-ctx.Done():
				return
			}
		}
	}
}

// tellWaits tells on stderr what watch finds, until the task runs, has ended, or ctx does.
func (c *cli) tellWaits(ctx context.Context, cl *client.Client, id schemas.TaskID) {
	progress := make(chan string)
	go func() {
		defer close(progress)
		c.watch(ctx, cl, id, progress)
	}()
	for line := range progress {
		c.tell("  %s", line)
	}
}

// awaited is what wait gives, which waits for a task to run. Meanwhile it tells what the task
// waits for.
func (c *cli) awaited(ctx context.Context, cl *client.Client, id schemas.TaskID, wait func(context.Context, schemas.TaskID) (schemas.Task, error)) (schemas.Task, error) {
	told := make(chan struct{})
	watching, stop := context.WithCancel(ctx)
	go func() {
		defer close(told)
		c.tellWaits(watching, cl, id)
	}()
	t, err := wait(ctx, id)
	stop()
	<-told
	return t, err
}

// waits says in a line what a task that does not run yet is waiting for.
func waits(t schemas.Task) string {
	switch {
	case t.State == schemas.Queued && t.Why != nil:
		return "waits: " + printable(t.Why.Summary)
	case t.State == schemas.Queued:
		return "waits for a worker"
	case t.Progress != "":
		return printable(t.Progress)
	}
	return fmt.Sprintf("%s on %s", t.State, t.Worker)
}

// copyLogs writes the task's output to ours, stream by stream, until it is complete.
func (c *cli) copyLogs(ctx context.Context, cl *client.Client, id schemas.TaskID) error {
	for l, err := range cl.Logs(ctx, id, client.LogOptions{Follow: true}) {
		if err != nil {
			return err
		}
		b, err := client.LineBytes(l)
		if err != nil {
			return err
		}
		w := c.out
		if l.Stream == schemas.Stderr {
			w = c.err
		}
		if _, err := w.Write(b); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	return nil
}
