package reach

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

// After a thousand sessions of each kind of end there is as much as before.
func TestAThousandSessionsLeaveNothing(t *testing.T) {
	s := start(t)
	id := s.run(s.shell, func(spec *schemas.Spec) { spec.Resources.Pids = 512 })
	round := func(n int) {
		var all sync.WaitGroup
		work := make(chan int)
		for range 8 {
			all.Go(func() {
				for i := range work {
					if err := s.session(id, i); err != nil {
						t.Errorf("session %d: %v", i, err)
					}
				}
			})
		}
		for i := range n {
			work <- i
		}
		close(work)
		all.Wait()
	}
	counts := func() string {
		t.Helper()
		n := func(name string) float64 { return metric(t, s.up.Admin, name, "") }
		containers, err := s.up.Containers(deadline(t))
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("sessions %v %v, execs %v, containers %d", n("dayfly_sessions_open"), n("dayfly_agent_sessions_open"), n("dayfly_agent_execs"), len(containers))
	}
	grown := func() (goroutines, files float64) {
		return metric(t, s.up.Admin, "go_goroutines", ""), metric(t, s.up.Admin, "process_open_fds", "")
	}
	round(40) // what is made once and stays
	before := counts()
	goroutines, files := grown()
	round(1000)
	until(t, "nothing more than before", func() error {
		now := counts()
		g, f := grown()
		return want(now == before && g <= goroutines+20 && f <= files+20, "%s, %v goroutines, %v descriptors; before %s, %v, %v", now, g, f, before, goroutines, files)
	})
	if out := s.sh(id, "ps").Stdout; strings.Count(out, "\n") > 6 {
		t.Errorf("programs are left:\n%s", out)
	}
	g, f := grown()
	t.Logf("goroutines %v, then %v; descriptors %v, then %v; %s", goroutines, g, files, f, before)
}

// session is one of several kinds, some of them broken off.
func (s *site) session(id schemas.TaskID, i int) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	path := fmt.Sprintf("/tmp/f%d", i%100)
	switch i % 5 {
	case 0:
		_, err := s.Exec(ctx, id, schemas.ExecRequest{Command: []string{"true"}})
		return err
	case 1:
		_, err := s.PutFile(ctx, id, path, strings.NewReader("x"), 1, 0)
		return err
	case 2:
		_, err := s.ListFiles(ctx, id, "/tmp")
		return err
	case 3: // left in the middle
		con, err := s.Console(ctx, id, client.ConsoleOptions{ExecRequest: schemas.ExecRequest{Command: []string{"yes"}}, Terminal: &schemas.Window{Rows: 1, Cols: 1}})
		if err != nil {
			return err
		}
		_, err = con.Read(make([]byte, 1))
		_ = con.Close()
		return err
	}
	con, err := s.Console(ctx, id, client.ConsoleOptions{ExecRequest: schemas.ExecRequest{Command: []string{"echo", "hi"}}})
	if err != nil {
		return err
	}
	_, err = io.ReadAll(con)
	_ = con.Close()
	return err
}
