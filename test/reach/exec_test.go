package reach

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func TestExec(t *testing.T) {
	s := start(t)
	id := s.run(s.shell, func(spec *schemas.Spec) {
		spec.Env = map[string]string{"A": "task", "B": "task"}
		spec.Workdir = "/tmp"
	})
	exec := func(req schemas.ExecRequest) schemas.ExecResult {
		t.Helper()
		res, err := s.Exec(deadline(t), id, req)
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	big := strings.Repeat("0123456789abcdef", 60<<10)
	binary := string([]byte{0xff, 0xfe, 0, 1})
	for name, c := range map[string]struct {
		req  schemas.ExecRequest
		want schemas.ExecResult
	}{
		"both streams and a code": {schemas.ExecRequest{Command: []string{"sh", "-c", "echo out; echo err >&2; exit 3"}},
			schemas.ExecResult{ExitCode: 3, Stdout: "out\n", Stderr: "err\n"}},
		"environment and folder": {schemas.ExecRequest{Command: []string{"sh", "-c", "echo $A $B $(pwd)"}, Env: map[string]string{"B": "exec"}, Workdir: "/bin"},
			schemas.ExecResult{Stdout: "task exec /bin\n"}},
		"the task's folder":  {schemas.ExecRequest{Command: []string{"sh", "-c", "pwd; id -u"}}, schemas.ExecResult{Stdout: "/tmp\n1000\n"}},
		"stdin to its end":   {schemas.ExecRequest{Command: []string{"wc", "-c"}, Stdin: big}, schemas.ExecResult{Stdout: fmt.Sprintln(len(big))}},
		"no stdin":           {schemas.ExecRequest{Command: []string{"cat"}}, schemas.ExecResult{}},
		"stdin nobody reads": {schemas.ExecRequest{Command: []string{"true"}, Stdin: big}, schemas.ExecResult{}},
		"bytes that are no text": {schemas.ExecRequest{Command: []string{"printf", `\377\376\000\001`}},
			schemas.ExecResult{StdoutBase64: base64.StdEncoding.EncodeToString([]byte(binary))}},
		"killed by a signal": {schemas.ExecRequest{Command: []string{"sh", "-c", "kill -TERM $$"}}, schemas.ExecResult{ExitCode: 143, Signal: 15}},
		"its timeout": {schemas.ExecRequest{Command: []string{"sh", "-c", "echo begun; sleep 1h"}, Timeout: schemas.Duration(3 * time.Second)},
			schemas.ExecResult{ExitCode: 137, Signal: 9, TimedOut: true, Stdout: "begun\n"}},
	} {
		if got := exec(c.req); got != c.want {
			t.Errorf("%s: %+v", name, got)
		}
	}
	// What it leaves behind may write on: the answer does not wait for that.
	if got := exec(schemas.ExecRequest{Command: []string{"sh", "-c", "yes & exit 3"}}); got.ExitCode != 3 || strings.Trim(got.Stdout, "y\n") != "" {
		t.Errorf("a program that leaves one behind: %d %.100q", got.ExitCode, got.Stdout)
	}
	s.sh(id, "kill $(pidof yes)")
	// Nor is a program kept for a client that has left, though it does not read its stdin.
	execs := func(n float64) func() error {
		return func() error {
			now := metric(t, s.up.Admin, "dayfly_agent_execs", "")
			return want(now == n, "%v", now)
		}
	}
	until(t, "those before are gone", execs(0))
	left, leave := context.WithCancel(deadline(t))
	answered := make(chan error, 1)
	go func() {
		_, err := s.Exec(left, id, schemas.ExecRequest{Command: []string{"sleep", "1h"}, Stdin: big})
		answered <- err
	}()
	until(t, "it runs", execs(1))
	leave()
	if err := <-answered; err == nil {
		t.Error("it has ended")
	}
	until(t, "it is gone", execs(0))
	if got := exec(schemas.ExecRequest{Command: []string{"nothing"}}); got.ExitCode != 127 || !strings.Contains(got.Message, "nothing") {
		t.Errorf("command not found: %+v", got)
	}
	if got := exec(schemas.ExecRequest{Command: []string{"/etc"}}); got.ExitCode != 126 || got.Message == "" {
		t.Errorf("no program: %+v", got)
	}
	// More than an answer holds is read to its end, and said to be missing. Characters
	// stay whole.
	got := exec(schemas.ExecRequest{Command: []string{"sh", "-c", "yes 'ü1' | head -c 3000000; echo over >&2"}})
	if !got.Truncated || got.ExitCode != 0 || got.Stderr != "over\n" || len(got.Stdout) < schemas.MaxExecOutput-3 || strings.Trim(got.Stdout, "ü1\n") != "" {
		t.Errorf("a flood: %d bytes, %v, %d, %q", len(got.Stdout), got.Truncated, got.ExitCode, got.Stderr)
	}

	// A client that leaves ends the program.
	ctx, leave := context.WithCancel(context.Background())
	gone := make(chan error, 1)
	go func() {
		_, err := s.Exec(ctx, id, schemas.ExecRequest{Command: []string{"sh", "-c", "touch /tmp/here; sleep 4242"}})
		gone <- err
	}()
	until(t, "it runs", func() error { return want(s.sh(id, "ls /tmp/here").ExitCode == 0, "not yet") })
	leave()
	<-gone
	until(t, "it is gone", func() error {
		out := s.sh(id, "ps").Stdout
		return want(!strings.Contains(out, "sleep 4242"), "%s", out)
	})
	until(t, "nothing is open", func() error {
		n := metric(t, s.up.Admin, "dayfly_sessions_open", "") + metric(t, s.up.Admin, "dayfly_agent_sessions_open", "") + metric(t, s.up.Admin, "dayfly_agent_execs", "")
		return want(n == 0, "%v are", n)
	})
}

func TestExecInAnImageWithoutAShell(t *testing.T) {
	s := start(t)
	id := s.run(s.scratch, nil)
	res, err := s.Exec(deadline(t), id, schemas.ExecRequest{Command: []string{"/bin/echo", "hi"}})
	if err != nil || res != (schemas.ExecResult{Stdout: "hi\n"}) {
		t.Errorf("%+v, %v", res, err)
	}
	res, err = s.Exec(deadline(t), id, schemas.ExecRequest{Command: []string{"sh", "-c", "true"}})
	if err != nil || res.ExitCode != 127 {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestExecThatIsRefused(t *testing.T) {
	s := start(t)
	id := s.run(s.shell, nil)
	over := create(t, s.Client, s.shell, func(spec *schemas.Spec) { spec.Command = []string{"true"} }).ID
	if _, err := s.Wait(deadline(t), over); err != nil {
		t.Fatal(err)
	}
	queued, err := s.Create(deadline(t), schemas.Spec{Image: s.shell, Constraints: map[string]string{"nowhere": "1"}}, client.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	hello := schemas.ExecRequest{Command: []string{"true"}}
	for name, c := range map[string]struct {
		id     schemas.TaskID
		req    schemas.ExecRequest
		status int
		code   schemas.Code
	}{
		"queued":          {queued.ID, hello, 409, schemas.CodeStateConflict},
		"final":           {over, hello, 409, schemas.CodeStateConflict},
		"unknown":         {"t-01jd0000000000000000000000", hello, 404, schemas.CodeNotFound},
		"nothing to run":  {id, schemas.ExecRequest{}, 422, schemas.CodeInvalidValue},
		"an empty name":   {id, schemas.ExecRequest{Command: []string{""}}, 422, schemas.CodeInvalidValue},
		"too long":        {id, schemas.ExecRequest{Command: []string{"echo", strings.Repeat("x", 17<<10)}}, 422, schemas.CodeInvalidValue},
		"too much stdin":  {id, schemas.ExecRequest{Command: []string{"cat"}, Stdin: strings.Repeat("x", 2<<20)}, 413, schemas.CodeTooLarge},
		"a bad name":      {id, schemas.ExecRequest{Command: []string{"true"}, Env: map[string]string{"A=B": ""}}, 422, schemas.CodeInvalidValue},
		"a long timeout":  {id, schemas.ExecRequest{Command: []string{"true"}, Timeout: schemas.Duration(25 * time.Hour)}, 422, schemas.CodeInvalidValue},
		"a short timeout": {id, schemas.ExecRequest{Command: []string{"true"}, Timeout: -1}, 422, schemas.CodeInvalidValue},
	} {
		_, err := s.Exec(deadline(t), c.id, c.req)
		refusedAs(t, name, err, c.status, c.code)
	}
	starting := s.starting()
	_, err = s.Exec(deadline(t), starting, hello)
	refusedAs(t, "starting", err, 409, schemas.CodeStateConflict)
	_, conErr := s.Console(deadline(t), starting, client.ConsoleOptions{ExecRequest: hello})
	_, filesErr := s.ListFiles(deadline(t), starting, "/tmp")
	_, tunnelErr := s.Tunnel(deadline(t), starting, 80)
	for what, err := range map[string]error{"exec": err, "console": conErr, "files": filesErr, "tunnel": tunnelErr} {
		var e *schemas.Error
		if !errors.As(err, &e) || e.Status != 409 || e.State != schemas.Starting {
			t.Errorf("%s in a task that starts: %v", what, err)
		}
	}
	_, err = s.Launch(deadline(t), id, schemas.ExecRequest{Command: []string{"nothing"}})
	refusedAs(t, "not found, in the background", err, 422, schemas.CodeInvalidValue)
	_, err = s.Launch(deadline(t), id, schemas.ExecRequest{Command: []string{"cat"}, Stdin: "x"})
	refusedAs(t, "stdin in the background", err, 422, schemas.CodeInvalidValue)
	_, err = s.GetExec(deadline(t), id, "nothing")
	refusedAs(t, "no such program", err, 404, schemas.CodeNotFound)
	refusedAs(t, "no such program to end", s.EndExec(deadline(t), id, "nothing", 0), 404, schemas.CodeNotFound)

	// 1 GiB of stdin is refused before it is sent, or while it comes.
	url := s.up.URL + "/v1/tasks/" + string(id) + "/exec"
	for name, length := range map[string]int64{"announced": 1 << 30, "not announced": -1} {
		req, err := http.NewRequestWithContext(deadline(t), "POST", url, io.LimitReader(endless{}, 1<<30))
		if err != nil {
			t.Fatal(err)
		}
		req.ContentLength = length
		req.Header.Set("Content-Type", "application/json")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Errorf("1 GiB, %s: %v", name, err)
			continue
		}
		b, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if res.StatusCode != 413 || !bytes.Contains(b, []byte(schemas.CodeTooLarge)) {
			t.Errorf("1 GiB, %s: %d %s", name, res.StatusCode, b)
		}
	}
}

// starting is a task whose image is being pulled, until the test is over.
func (s *site) starting() schemas.TaskID {
	s.Helper()
	registry, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and never answers
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { registry.Close() })
	task, err := s.Create(deadline(s), schemas.Spec{Image: registry.Addr().String() + "/dayfly/slow:1"}, client.CreateOptions{})
	if err != nil {
		s.Fatal(err)
	}
	until(s, "it starts", func() error {
		now, err := s.Get(deadline(s), task.ID, client.GetOptions{})
		return want(err == nil && now.State == schemas.Starting, "%s, %v", now.State, err)
	})
	return task.ID
}

// endless is the beginning of JSON without an end.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

func TestBackground(t *testing.T) {
	s := start(t)
	id := s.run(s.shell, nil)
	b, err := s.Launch(deadline(t), id, schemas.ExecRequest{Command: []string{"sh", "-c", "echo begun; echo amiss >&2; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo more; sleep 1h"}})
	if err != nil {
		t.Fatal(err)
	}
	see := func(stdout string) {
		t.Helper()
		until(t, "what it writes", func() error {
			x, err := s.GetExec(deadline(t), id, b.ID)
			return want(err == nil && x.Running && x.Background && strings.HasSuffix(x.Stdout, stdout), "%+v, %v", x, err)
		})
	}
	see("begun\n")
	if err := s.up.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.up.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	until(t, "the next agent has it", func() error {
		_, err := s.GetExec(deadline(t), id, b.ID)
		return err
	})
	s.sh(id, "touch /tmp/go")
	see("more\n")
	list, err := s.Execs(deadline(t), id)
	if err != nil || len(list.Items) != 1 || list.Items[0].ID != b.ID || list.Items[0].Stdout != "" || list.Items[0].Command[0] != "sh" {
		t.Errorf("%+v, %v", list, err)
	}
	if err := s.EndExec(deadline(t), id, b.ID, time.Second); err != nil {
		t.Fatal(err)
	}
	until(t, "it is ended", func() error {
		x, err := s.GetExec(deadline(t), id, b.ID)
		return want(err == nil && !x.Running && x.Exit != nil && x.Exit.Signal == 15, "%+v, %v", x, err)
	})
}

func TestBackgroundByTheCommandLine(t *testing.T) {
	s := start(t)
	id := string(s.run(s.shell, nil))
	b, errs, code := s.dayfly("", "exec", "-d", id, "sh", "-c", "echo begun; echo amiss >&2; printf '\\377'; sleep 1h")
	b = strings.TrimSpace(b)
	if code != 0 || b == "" {
		t.Fatalf("%q, %q, exit code %d", b, errs, code)
	}
	until(t, "what it writes", func() error {
		out, errs, code := s.dayfly("", "execs", "show", id, b)
		return want(out == "begun\n\xff" && errs == "amiss\n" && code == 0, "%q, %q, exit code %d", out, errs, code)
	})
	if out, errs, code := s.dayfly("", "execs", id); code != 0 || !strings.Contains(out, b+"  running  yes") {
		t.Errorf("%q, %q, exit code %d", out, errs, code)
	}
	if out, errs, code := s.dayfly("", "execs", "-q", id); out != b+"\n" || code != 0 {
		t.Errorf("%q, %q, exit code %d", out, errs, code)
	}
	for _, wrong := range []string{"nothing", "..", ".", ""} {
		for _, verb := range []string{"show", "stop"} {
			if out, errs, code := s.dayfly("", "execs", verb, id, wrong); code != 125 || out != "" || !strings.Contains(errs, "try: dayfly execs "+id) {
				t.Errorf("%s %q: %q, %q, exit code %d", verb, wrong, out, errs, code)
			}
		}
	}
	if out, errs, code := s.dayfly("", "execs", "stop", id, b); out != b+"\n" || code != 0 {
		t.Errorf("%q, %q, exit code %d", out, errs, code)
	}
	until(t, "it is ended", func() error {
		out, errs, code := s.dayfly("", "execs", id)
		return want(strings.Contains(out, b+"  exit 143  yes"), "%q, %q, exit code %d", out, errs, code)
	})
	if task, err := s.Get(deadline(t), schemas.TaskID(id), client.GetOptions{}); err != nil || task.State != schemas.Running {
		t.Errorf("%+v, %v", task, err)
	}
}
