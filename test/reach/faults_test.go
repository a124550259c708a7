package reach

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// apart is a site of processes, with one agent on the real Docker and a task.
func apart(t *testing.T) (*harness.Site, *client.Client, schemas.Task) {
	t.Helper()
	b := built1(t)
	s, err := harness.NewSite(deadline(t), harness.SiteOptions{Bin: b.bin})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, p := range s.All() {
				t.Log(p.Name, p.Tail())
			}
		}
		if err := s.Remove(deadline(t)); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(s.Gateway[0].Addrs.HTTP)
	if err != nil {
		t.Fatal(err)
	}
	task := create(t, c, b.shell, func(spec *schemas.Spec) {
		spec.Resources.Memory = 256 << 20
		spec.Resources.Disk = 128 << 20
	})
	if task.State != schemas.Running {
		t.Fatalf("%s %s", task.State, task.Message)
	}
	return s, c, task
}

// Gateway, agent and NATS are killed in the middle of a program that is waited for, of a
// file that goes in and of one that comes out. The first two end each with an error, and
// nothing is left of it; the streams outlive NATS.
func TestKillsInTheMiddle(t *testing.T) {
	s, c, task := apart(t)
	sh := func(script string) string {
		t.Helper()
		var res schemas.ExecResult
		until(t, "a program runs", func() (err error) { // all may have to find each other again
			res, err = c.Exec(deadline(t), task.ID, schemas.ExecRequest{Command: []string{"sh", "-c", script}})
			return err
		})
		return res.Stdout
	}
	const size = 100 << 20
	sh(fmt.Sprintf("echo old > /task/output/in; head -c %d /dev/zero > /task/output/out", size))
	for _, victim := range []struct {
		*harness.Process
		resumes bool
	}{{s.Gateway[0], false}, {s.Agent[0], false}, {s.NATS[0], true}} {
		others := map[*harness.Process][2]float64{}
		for _, p := range []*harness.Process{s.Gateway[0], s.Agent[0]} {
			if p != victim.Process {
				others[p] = [2]float64{metric(t, p.Addrs.Admin, "go_goroutines", ""), metric(t, p.Addrs.Admin, "process_open_fds", "")}
			}
		}
		type end struct {
			what string
			err  error
		}
		ends := make(chan end, 3)
		go func() {
			res, err := c.Exec(deadline(t), task.ID, schemas.ExecRequest{Command: []string{"sh", "-c", "touch /tmp/runs; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo whole"}})
			if err == nil && res.Stdout != "whole\n" {
				t.Errorf("%s: %+v", victim.Name, res)
			}
			ends <- end{"exec", err}
		}()
		body, write := io.Pipe()
		go func() {
			_, err := c.PutFile(deadline(t), task.ID, "/task/output/in", body, -1, 0)
			body.CloseWithError(errors.New("the request is over"))
			ends <- end{"copy in", err}
		}()
		if _, err := write.Write(make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		d, err := c.GetFiles(deadline(t), task.ID, "/task/output/out")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(d, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		until(t, "all are under way", func() error {
			out := sh("ls -A /tmp /task/output")
			return want(strings.Contains(out, "runs") && strings.Contains(out, ".dayfly-put"), "%s", out)
		})
		victim.Kill()
		if err := victim.Start(deadline(t)); err != nil {
			t.Fatal(err)
		}
		go func() {
			n, err := io.Copy(io.Discard, d)
			d.Close()
			if err == nil && n != size-1<<20 {
				t.Errorf("%s: %d bytes came out, and no error", victim.Name, n)
			}
			ends <- end{"copy out", err}
		}()
		go func() {
			_, _ = write.Write([]byte("new"))
			write.Close()
		}()
		sh("touch /tmp/go")
		for range 3 {
			select {
			case e := <-ends:
				if (e.err == nil) != victim.resumes {
					t.Errorf("%s was killed under %s: %v", victim.Name, e.what, e.err)
				}
			case <-deadline(t).Done():
				t.Fatalf("%s was killed, and something has no end", victim.Name)
			}
		}
		content := map[bool]string{false: "4\n", true: fmt.Sprintf("%d\n", 1<<20+3)}[victim.resumes]
		until(t, "nothing is left", func() error {
			out := sh("wc -c < /task/output/in; ls -A /task/output; ps")
			if !strings.HasPrefix(out, content) || strings.Contains(out, ".dayfly-put") || strings.Contains(out, "/tmp/runs") {
				return fmt.Errorf("in the task: %s", out)
			}
			for _, p := range []*harness.Process{s.Gateway[0], s.Agent[0]} {
				if n := metric(t, p.Addrs.Admin, "dayfly_sessions_open", "") + metric(t, p.Addrs.Admin, "dayfly_agent_sessions_open", "") + metric(t, p.Addrs.Admin, "dayfly_agent_execs", ""); n != 0 {
					return fmt.Errorf("%s: %v sessions are open", p.Name, n)
				}
			}
			for p, before := range others {
				g, f := metric(t, p.Addrs.Admin, "go_goroutines", ""), metric(t, p.Addrs.Admin, "process_open_fds", "")
				if g > before[0]+10 || f > before[1]+10 {
					return fmt.Errorf("%s: %v goroutines and %v descriptors, before %v", p.Name, g, f, before)
				}
			}
			return nil
		})
		sh("rm -f /tmp/runs /tmp/go; echo old > /task/output/in")
	}
}

// A gateway and the NATS server are killed under a console, which goes on; an agent that
// is killed ends it with a word.
func TestKillsUnderAConsole(t *testing.T) {
	s, c, task := apart(t)
	con := console(t, c, task.ID, client.ConsoleOptions{Terminal: &schemas.Window{Rows: 24, Cols: 80}}, "sh")
	shown := watch(con)
	says := func(n int) {
		t.Helper()
		fmt.Fprintf(con, "echo $((%d*1000))\n", n)
		shown.shows(t, fmt.Sprint(n*1000))
	}
	says(1)
	for i, p := range []*harness.Process{s.Gateway[0], s.NATS[0], s.Gateway[0]} {
		p.Kill()
		fmt.Fprintf(con, "echo $((%d*1000+7))\n", i+2) // said while nobody hears
		if err := p.Start(deadline(t)); err != nil {
			t.Fatal(err)
		}
		shown.shows(t, fmt.Sprint((i+2)*1000+7))
		says(i + 5)
	}
	s.Agent[0].Kill()
	if err := s.Agent[0].Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if exit, err := con.Wait(); err == nil || !errors.Is(err, schemas.CodeNotFound) {
		t.Errorf("%+v, %v", exit, err)
	}
	until(t, "another console", func() error {
		res, err := c.Exec(deadline(t), task.ID, schemas.ExecRequest{Command: []string{"echo", "back"}})
		return want(err == nil && res.Stdout == "back\n", "%+v, %v", res, err)
	})
}
