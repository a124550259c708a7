package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) attachCommand() *cobra.Command {
	var noStdin bool
	var keys string
	cmd := &cobra.Command{
		Use:   "attach [flags] ID",
		Short: "Join the process of a task that was run with -i or -t",
		Long: `attach joins this terminal to the task's own process, shows what it wrote since the last
client left (at most the newest 256 KiB), and exits as the task does. The keys ctrl-p
ctrl-q leave the task running. After a broken connection, or a restart of the worker's
agent, it goes on by itself where it was. Whoever attaches takes the terminal from who
had it.

The process of a task that was run with neither -i nor -t reads nothing from here: attach
follows its output then.`,
		Example: `  id=$(dayfly run -it -d debian bash)
  dayfly attach $id`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeTasks(true),
	}
	f := cmd.Flags()
	f.BoolVar(&noStdin, "no-stdin", false, "send it nothing")
	f.StringVar(&keys, "detach-keys", defaultKeys, "the keys that leave a terminal")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		detach, err := readKeys(keys)
		if err != nil {
			return &usageError{err, cmd.CommandPath()}
		}
		cl, err := c.client()
		if err != nil {
			return err
		}
		ctx, stop := c.interruptible(cmd.Context())
		id, err := c.resolve(ctx, cl, args[0])
		var t schemas.Task
		if err == nil {
			t, err = c.awaited(ctx, patient(cl), id, patient(cl).WaitRunning)
		}
		if err == nil && t.State == schemas.Running && !t.Spec.Interactive() {
			c.tell("%s was run with neither -i nor -t: this is its output; Ctrl-C leaves it running", id)
			err = c.copyLogs(ctx, patient(cl), id)
			if err == nil {
				t, err = patient(cl).Wait(ctx, id)
			}
			stop()
			if err != nil {
				return err
			}
			return verdict(t)
		}
		stop()
		switch {
		case err != nil:
			return err
		case t.State.Final():
			return &hintError{fmt.Errorf("%s has ended (%s)", id, t.State), "dayfly logs " + string(id)}
		}
		j := joint{client: patient(cl), id: id, terminal: t.Spec.TTY, input: t.Spec.StdinOpen && !noStdin, keys: detach}
		if j.terminal && j.input && !isTerminal(c.in) {
			return &usageError{errors.New("the task is on a terminal, and stdin here is none; give --no-stdin to see what it shows"), cmd.CommandPath()}
		}
		return c.attach(cmd.Context(), j)
	}
	return cmd
}

// attach joins a running task to its end, or until the detach keys.
func (c *cli) attach(ctx context.Context, j joint) error {
	end, err := c.joinMain(ctx, j)
	switch {
	case err != nil:
		return err
	case end.left != nil:
		return &exitError{signalCode(end.left), &hintError{errors.New("left before the end"), "dayfly attach " + string(j.id)}}
	case end.detached:
		c.detached(j)
		return nil
	}
	t, err := j.client.Wait(ctx, j.id)
	if err != nil {
		return err
	}
	return verdict(t)
}

func (c *cli) detached(j joint) {
	if !c.quiet {
		c.tell("detached from %s, which runs on; dayfly attach %s", j.id, j.id)
	}
}

// joint is how this process is joined to that of a task.
type joint struct {
	client   *client.Client
	id       schemas.TaskID
	from     *schemas.ExecOffsets // nil: from where the last client left
	terminal bool                 // it is on a terminal
	input    bool                 // it gets what comes here
	keys     []byte               // that detach; of a terminal
	quiet    bool                 // its output is not wanted

	// signal is called with the first signal, and with the others until it returns true,
	// which leaves. nil passes them on to the process, up to the third.
	signal func(os.Signal) (leave bool)
}

// parting is how a joint ended where that is no error: the process ended, or
type parting struct {
	detached bool
	left     os.Signal // with that signal
}

// joinMain joins the task's own process to these streams until one of them is over. What is
// missing of its output once it has ended is taken from the log.
func (c *cli) joinMain(ctx context.Context, j joint) (parting, error) {
	out, errs := c.outputs(j)
	raw := j.terminal && j.input
	o := client.ConsoleOptions{Stderr: errs, Broken: c.sayBroken(raw)}
	con, err := j.client.AttachMain(ctx, j.id, j.from, o)
	if err != nil {
		if j.from == nil {
			return parting{}, err
		}
		return parting{}, c.restOf(ctx, j, *j.from, out, errs, err) // it may have been quick
	}
	defer con.Close()
	if j.terminal && isTerminal(c.in) {
		restore, err := c.terminal(con, raw)
		if err != nil {
			return parting{}, err
		}
		defer restore()
	}
	detached := make(chan struct{})
	if j.input {
		var keys []byte
		if j.terminal {
			keys = j.keys
		}
		go func() { // a read of the terminal ends with the process
			if copyKeys(con, c.in, keys) {
				close(detached)
				_ = con.Close()
			} else if !j.terminal {
				_ = con.CloseWrite()
			}
		}()
	}
	signaled := j.signal
	if signaled == nil {
		n := 0
		signaled = func(s os.Signal) bool {
			passSignal(con, s)
			n++
			return n > 2
		}
	}
	failed, left, err := c.copyConsole(con, out, raw, signaled)
	select {
	case <-detached:
		return parting{detached: true}, nil
	default:
	}
	switch {
	case left != nil:
		return parting{left: left}, nil
	case err != nil:
		return parting{}, fmt.Errorf("write output: %w", err)
	case failed != nil:
		return parting{}, c.restOf(ctx, j, con.Came(), out, errs, failed)
	}
	return parting{}, nil
}

// outputs are where the output of a joint goes.
func (c *cli) outputs(j joint) (out, errs io.Writer) {
	switch {
	case j.quiet:
		return io.Discard, io.Discard
	case j.terminal && !j.input && isTerminal(c.out):
		return &newlines{w: c.out}, c.err
	}
	return c.out, c.err
}

// newlines makes CR LF, which a terminal there ends its lines with, LF again: the terminal
// here, which is not raw, puts a CR before each itself.
type newlines struct {
	w  io.Writer
	cr bool // the last byte was a CR, which is not written yet
}

func (n *newlines) Write(p []byte) (int, error) {
	b := make([]byte, 0, len(p)+1)
	for _, c := range p {
		if n.cr && c != '\n' {
			b = append(b, '\r')
		}
		if n.cr = c == '\r'; !n.cr {
			b = append(b, c)
		}
	}
	if _, err := n.w.Write(b); err != nil {
		return 0, err
	}
	return len(p), nil
}

// restOf writes what a task that has ended wrote beyond what has come. Of one that still
// runs it gives the reason why it cannot be joined.
func (c *cli) restOf(ctx context.Context, j joint, came schemas.ExecOffsets, out, errs io.Writer, why error) error {
	t, err := j.client.Get(ctx, j.id, client.GetOptions{Wait: client.UntilDone, Timeout: logSlack / 6})
	if err != nil || !t.State.Final() {
		return &hintError{why, "dayfly attach " + string(j.id) + "; the task goes on"}
	}
	for l, err := range j.client.Logs(ctx, j.id, client.LogOptions{Follow: true}) {
		if err != nil {
			return err
		}
		b, err := client.LineBytes(l)
		if err != nil {
			return err
		}
		w, have := out, came.Stdout
		if l.Stream == schemas.Stderr {
			w, have = errs, came.Stderr
		}
		if _, err := w.Write(b[min(max(have-l.Offset, 0), int64(len(b))):]); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	return nil
}

// sayBroken tells of connections that break.
func (c *cli) sayBroken(raw bool) func(error) {
	line := lineEnd(raw)
	return func(err error) {
		switch {
		case c.quiet:
		case err != nil:
			fmt.Fprintf(c.err, "the connection broke; trying to come back%s", line)
		default:
			fmt.Fprintf(c.err, "the connection is back%s", line)
		}
	}
}

// lineEnd ends a line of ours: on a raw terminal the cursor stays where it is.
func lineEnd(raw bool) string {
	if raw {
		return "\r\n"
	}
	return "\n"
}

// terminal makes this terminal that of a console: its size, and raw if it is read.
func (c *cli) terminal(con *client.Console, raw bool) (restore func(), err error) {
	in := int(c.in.(*os.File).Fd())
	back := func() {}
	if raw {
		old, err := term.MakeRaw(in)
		if err != nil {
			return nil, fmt.Errorf("prepare the terminal: %w", err)
		}
		back = func() { _ = term.Restore(in, old) }
	}
	sizes := make(chan os.Signal, 1)
	signal.Notify(sizes, syscall.SIGWINCH)
	con.Resize(c.window()) // it may have changed meanwhile
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range sizes {
			con.Resize(c.window())
		}
	}()
	return func() {
		signal.Stop(sizes)
		close(sizes)
		<-done
		back()
	}, nil
}

// copyConsole writes a console's output to its end. signaled hears each signal, and
// leaves by true. left is the signal that did; err is of out.
func (c *cli) copyConsole(con *client.Console, out io.Writer, raw bool, signaled func(os.Signal) bool) (failed error, left os.Signal, err error) {
	over := make(chan struct{})
	stopped := make(chan os.Signal, 1)
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		for {
			select {
			case s := <-c.signals:
				if signaled(s) {
					stopped <- s
					_ = con.Close()
					return
				}
			case <-over:
				return
			}
		}
	}()
	for {
		_, err = io.Copy(out, con)
		if !errors.Is(err, client.ErrLostOutput) {
			break
		}
		fmt.Fprintf(c.err, "warning: %s%s", err, lineEnd(raw))
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		_ = con.Close() // nobody reads what it would write
	}
	_, failed = con.Wait()
	close(over)
	<-heard
	if failed != nil || errors.Is(err, context.Canceled) {
		err = nil // the same, by way of Read
	}
	select {
	case left = <-stopped:
	default:
	}
	return failed, left, err
}

func passSignal(con *client.Console, s os.Signal) {
	if s == os.Interrupt {
		con.Signal("INT")
	} else {
		con.Signal("TERM")
	}
}

const defaultKeys = "ctrl-p,ctrl-q"

// readKeys reads keys as Docker writes them: characters, or ctrl- and one of a-z@[\]^_,
// with commas between.
func readKeys(text string) (keys []byte, err error) {
	for key := range strings.SplitSeq(text, ",") {
		c, ctrl := strings.CutPrefix(key, "ctrl-")
		switch {
		case !ctrl && len(key) == 1 && key[0] < 0x80:
			keys = append(keys, key[0])
		case ctrl && len(c) == 1 && strings.Contains("abcdefghijklmnopqrstuvwxyz@[\\]^_", strings.ToLower(c)):
			keys = append(keys, strings.ToUpper(c)[0]&0x1f)
		default:
			return nil, errors.New(`--detach-keys must be characters or ctrl- and one of a-z@[\]^_, with commas between, such as ctrl-p,ctrl-q`)
		}
	}
	return keys, nil
}

// copyKeys copies what is typed, and ends early with true at the keys.
func copyKeys(to io.Writer, from io.Reader, keys []byte) bool {
	b := make([]byte, 32<<10)
	held := 0 // so many of the keys were typed last
	for {
		n, err := from.Read(b)
		send := b[:n]
		if len(keys) > 0 {
			send = make([]byte, 0, n+len(keys))
			for _, k := range b[:n] {
				if k != keys[held] {
					send = append(send, keys[:held]...)
					held = 0
				}
				if k != keys[held] {
					send = append(send, k)
				} else if held++; held == len(keys) {
					_, _ = to.Write(send)
					return true
				}
			}
		}
		if len(send) > 0 {
			if _, err := to.Write(send); err != nil {
				return false
			}
		}
		if err != nil {
			return false
		}
	}
}

// runJoined joins a task that was just asked for, once it runs. A signal cancels the
// task, another leaves.
func (r *runner) runJoined(ctx context.Context, cl *client.Client, id schemas.TaskID, sig os.Signal) error {
	j := *r.joint
	j.client, j.id, j.from, j.quiet = cl, id, &schemas.ExecOffsets{}, !r.stream
	var canceling sync.WaitGroup
	defer canceling.Wait()
	cancel := func() {
		r.tell("canceling %s; again to leave at once", id)
		canceling.Go(func() {
			if _, err := cl.Cancel(ctx, id, nil); err != nil {
				message, _ := explain(err)
				r.tell("could not cancel: %s", message)
			}
		})
	}
	if sig != nil {
		cancel()
	}
	j.signal = func(s os.Signal) bool {
		leave := sig != nil
		if sig = s; !leave {
			cancel()
		}
		return leave
	}
	leave := func() error { return r.leave(sig, fmt.Sprintf("dayfly attach %s; it may still be ending", id)) }

	running, left, err := r.await(ctx, cl, j, client.UntilRunning)
	switch {
	case left:
		return leave()
	case err != nil:
		return err
	}
	var failed error
	if running.State.Final() {
		out, errs := r.outputs(j)
		failed = r.restOf(ctx, j, schemas.ExecOffsets{}, out, errs, nil)
	} else {
		var end parting
		end, failed = r.joinMain(ctx, j)
		switch {
		case end.left != nil:
			return leave()
		case end.detached:
			r.detached(j)
			return nil
		}
	}
	if failed != nil {
		if t, err := cl.Get(ctx, id, client.GetOptions{}); err == nil && !t.State.Final() {
			return failed
		}
	}
	final, left, err := r.await(ctx, cl, j, client.UntilDone)
	switch {
	case left:
		return leave()
	case err != nil:
		return err
	}
	return r.finish(final, sig, failed)
}

// await waits until the task runs, or is done, telling meanwhile why it does not run yet.
func (r *runner) await(ctx context.Context, cl *client.Client, j joint, until client.Until) (t schemas.Task, left bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var both sync.WaitGroup
	defer both.Wait()
	defer cancel()
	progress, there := make(chan string), make(chan struct{})
	if until == client.UntilRunning {
		both.Go(func() { r.watch(ctx, cl, j.id, progress) })
	}
	both.Go(func() {
		defer close(there)
		if until == client.UntilRunning {
			t, err = cl.WaitRunning(ctx, j.id)
		} else {
			t, err = cl.Wait(ctx, j.id)
		}
	})
	for {
		select {
		case s := <-r.signals:
			if j.signal(s) {
				cancel()
				<-there
				return t, true, nil
			}
		case line := <-progress:
			r.tell("  %s", line)
		case <-there:
			if err != nil {
				err = &hintError{fmt.Errorf("lost sight of %s: %w", j.id, err), "dayfly attach " + string(j.id) + " once dayfly is back; the task goes on"}
			}
			return t, false, err
		}
	}
}
