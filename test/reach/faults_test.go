package reach

import (
	"errors"
	"fmt"
	"testing"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// A gateway and the NATS server are killed under a console, which goes on; an agent that
// is killed ends it with a word.
func TestKillsUnderAConsole(t *testing.T) {
	b := built1(t)
	s, err := harness.NewSite(deadline(t), harness.SiteOptions{Bin: b.bin})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
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
	task := create(t, c, b.shell, nil)
	if task.State != schemas.Running {
		t.Fatalf("%s %s", task.State, task.Message)
	}
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
