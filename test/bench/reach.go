package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// reach measures programs, consoles and files in a running task, among so many others:
// busybox's `true` and `ls /`, over HTTP and by docker exec in turns; a console's first byte;
// and files in and out. Then what copies do to the rest.
func reach(ctx context.Context, bin string, n int, containers []int) (err error) {
	if n == 0 {
		n = 200
	}
	up, err := harness.New(bin, "--slots", "1000", "--cpus", "1000", "--allow", "image-user,writable-root")
	if err != nil {
		return err
	}
	image := "dayfly-bench:" + strings.ToLower(rand.Text()[:10])
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
		defer cancel()
		err = errors.Join(err, up.Remove(clean), harness.RemoveImage(clean, image))
	}()
	if err := errors.Join(harness.MakeShell(ctx, image, nil), up.Start(ctx)); err != nil {
		return err
	}
	c, err := client.New(up.URL)
	if err != nil {
		return err
	}
	no := false
	big := schemas.Spec{Image: image, Command: []string{"sleep", "1h"}, TTL: schemas.Duration(time.Hour), User: "image", ReadOnly: &no,
		Resources: schemas.Resources{Memory: 800 << 20, CPUs: 1, Disk: 600 << 20}}
	task, err := runs(ctx, c, big)
	if err != nil {
		return err
	}
	id, live := task.ID, 1
	for _, want := range containers {
		var g errgroup.Group
		g.SetLimit(4)
		for ; live < want; live++ {
			g.Go(func() error {
				_, err := runs(ctx, c, schemas.Spec{Image: image, Command: []string{"sleep", "1h"}, TTL: schemas.Duration(time.Hour), Resources: schemas.Resources{Memory: 16 << 20, Disk: 1 << 20}})
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		if err := reachOne(ctx, c, id, n, live); err != nil {
			return err
		}
	}
	if err := copies(ctx, c, task, n); err != nil {
		return err
	}
	const size = 500 << 20
	began := time.Now()
	if _, err := c.PutFile(ctx, id, "/task/output/x", io.LimitReader(endless{}, size), size, 0); err != nil {
		return err
	}
	in := time.Since(began)
	began = time.Now()
	d, err := c.GetFiles(ctx, id, "/task/output/x")
	if err != nil {
		return err
	}
	defer d.Close()
	if _, err := io.Copy(io.Discard, d); err != nil {
		return err
	}
	fmt.Printf("a file of 500 MiB to and from memory: in %.0f MB/s, out %.0f MB/s\n", size/1e6/in.Seconds(), size/1e6/time.Since(began).Seconds())
	return nil
}

// runs starts a task.
func runs(ctx context.Context, c *client.Client, spec schemas.Spec) (schemas.Task, error) {
	t, err := c.Create(ctx, spec, client.CreateOptions{})
	if err != nil {
		return t, err
	}
	err = harness.Poll(ctx, func() (err error) { // on a busy machine longer than one request may wait
		if t, err = c.Get(ctx, t.ID, client.GetOptions{Wait: client.UntilRunning}); err != nil {
			return err
		}
		if t.State.Final() {
			return harness.Fatal(fmt.Errorf("%s is %s: %s", t.ID, t.State, t.Message))
		}
		if t.State != schemas.Running {
			return fmt.Errorf("%s is %s", t.ID, t.State)
		}
		return nil
	})
	return t, err
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// inTurns is how many of one kind are measured before it is another's turn: the program that
// follows a docker exec meets what that leaves to be tidied up, and only the first shall.
const inTurns = 10

func reachOne(ctx context.Context, c *client.Client, id schemas.TaskID, n, live int) error {
	over := func(command ...string) func() (time.Duration, error) {
		return func() (time.Duration, error) {
			began := time.Now()
			res, err := c.Exec(ctx, id, schemas.ExecRequest{Command: command})
			if err == nil && res.ExitCode != 0 {
				err = fmt.Errorf("it exits with %d: %s", res.ExitCode, res.Stderr)
			}
			return time.Since(began), err
		}
	}
	docker := func(command ...string) func() (time.Duration, error) {
		return func() (time.Duration, error) {
			began := time.Now()
			out, err := exec.CommandContext(ctx, "docker", append([]string{"exec", "dayfly-" + string(id) + "-1"}, command...)...).CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			return time.Since(began), err
		}
	}
	console := func() (time.Duration, error) {
		began := time.Now()
		con, err := c.Console(ctx, id, client.ConsoleOptions{ExecRequest: schemas.ExecRequest{Command: []string{"echo", "x"}}, Terminal: &schemas.Window{Rows: 24, Cols: 80}})
		if err != nil {
			return 0, err
		}
		_, err = con.Read(make([]byte, 1))
		took := time.Since(began)
		return took, errors.Join(err, con.Close())
	}
	kinds := []struct {
		name string
		do   func() (time.Duration, error)
		took sample
	}{
		{name: "true over HTTP", do: over("true")}, {name: "docker exec true", do: docker("true")},
		{name: "ls / over HTTP", do: over("ls", "/")}, {name: "docker exec ls /", do: docker("ls", "/")},
		{name: "console, first byte", do: console},
	}
	for round := range max(1, n/inTurns) + 1 {
		for k := range kinds {
			for range inTurns {
				took, err := kinds[k].do()
				if err != nil {
					return fmt.Errorf("%s: %w", kinds[k].name, err)
				}
				if round > 0 { // warm
					kinds[k].took = append(kinds[k].took, took)
				}
			}
		}
	}
	fmt.Printf("among %d containers, in turns of %d\n", live, inTurns)
	for k, kind := range kinds {
		ratio := ""
		if k%2 == 1 {
			ratio = fmt.Sprintf(": x%.1f", kind.took.at(.5)/kinds[k-1].took.at(.5))
		}
		fmt.Printf("  %-20s %s%s\n", kind.name, kind.took, ratio)
	}
	return nil
}
