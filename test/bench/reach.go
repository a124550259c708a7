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

// reach measures programs, consoles and files in a running task, among so many others: a
// program that does nothing and one that lists a folder, over HTTP and by docker exec in
// turns; a console's first byte; and files in and out. Then what copies do to the rest.
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
	if err := errors.Join(harness.MakeImage(ctx, image), up.Start(ctx)); err != nil {
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

func reachOne(ctx context.Context, c *client.Client, id schemas.TaskID, n, live int) error {
	var over, docker, first, lists, listed sample
	for i := range n + 20 {
		began := time.Now()
		res, err := c.Exec(ctx, id, schemas.ExecRequest{Command: []string{"/bin/exit", "0"}})
		if err != nil || res.ExitCode != 0 {
			return fmt.Errorf("exec: %+v, %w", res, err)
		}
		http := time.Since(began)
		began = time.Now()
		if out, err := exec.CommandContext(ctx, "docker", "exec", "dayfly-"+string(id)+"-1", "/bin/exit", "0").CombinedOutput(); err != nil {
			return fmt.Errorf("docker exec: %w: %s", err, out)
		}
		beside := time.Since(began)
		began = time.Now()
		con, err := c.Console(ctx, id, client.ConsoleOptions{ExecRequest: schemas.ExecRequest{Command: []string{"/bin/echo", "x"}}, Terminal: &schemas.Window{Rows: 24, Cols: 80}})
		if err != nil {
			return err
		}
		_, err = con.Read(make([]byte, 1))
		byte1 := time.Since(began)
		if err = errors.Join(err, con.Close()); err != nil {
			return err
		}
		began = time.Now()
		res, err = c.Exec(ctx, id, schemas.ExecRequest{Command: []string{"/bin/ls", "/"}})
		if err != nil || res.ExitCode != 0 {
			return fmt.Errorf("ls: %+v, %w", res, err)
		}
		list := time.Since(began)
		began = time.Now()
		if out, err := exec.CommandContext(ctx, "docker", "exec", "dayfly-"+string(id)+"-1", "/bin/ls", "/").CombinedOutput(); err != nil {
			return fmt.Errorf("docker exec: %w: %s", err, out)
		}
		if i >= 20 { // warm
			lists, listed = append(lists, list), append(listed, time.Since(began))
			over, docker, first = append(over, http), append(docker, beside), append(first, byte1)
		}
	}
	fmt.Printf("among %d containers\n  exec over HTTP       %s\n  docker exec          %s: x%.1f\n", live, over, docker, docker.at(.5)/over.at(.5))
	fmt.Printf("  ls / over HTTP       %s\n  docker exec ls /     %s: x%.1f\n  console, first byte  %s\n", lists, listed, listed.at(.5)/lists.at(.5), first)
	return nil
}
