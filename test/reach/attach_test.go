package reach

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

// dayfly runs the command line with text on its stdin.
func (s *site) dayfly(stdin string, args ...string) (out, errs string, code int) {
	s.Helper()
	cmd := exec.CommandContext(deadline(s), s.bin, append([]string{"--url", s.up.URL}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	var ee *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &ee) {
		s.Fatal(err)
	}
	return stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
}

// idOn finds a task's id in what is shown.
func idOn(t testing.TB, shown *screen) schemas.TaskID {
	t.Helper()
	shown.shows(t, "t-")
	re := regexp.MustCompile(`t-[0-9a-z]{26}`)
	until(t, "an id is shown", func() error { return want(re.MatchString(shown.String()), "%q", shown.String()) })
	return schemas.TaskID(re.FindString(shown.String()))
}

func TestRunOnATerminal(t *testing.T) {
	s := start(t)
	p := newProxy(t, strings.TrimPrefix(s.up.URL, "http://"))
	through := "http://" + p.Addr().String()
	tty := onTerminal(t, 33, 111, s.bin, "--url", through, "run", "-it", "--ttl", "10m", s.shell, "sh")
	id := idOn(t, tty.screen)
	fmt.Fprint(tty.File, "stty size; tty; echo term=$TERM fo''o\r")
	tty.shows(t, "33 111\r\n/dev/pts/")
	tty.shows(t, "foo")
	s.isATerminal(t, id, tty, p)

	// The detach keys leave it running; a Ctrl-P that begins nothing reaches it.
	fmt.Fprint(tty.File, "echo be''fore\r")
	tty.shows(t, "before")
	fmt.Fprint(tty.File, "\x10\x11")
	tty.shows(t, "dayfly attach "+string(id))
	if code := tty.code(); code != 0 {
		t.Errorf("detach: %d, %q", code, tty)
	}
	tty = onTerminal(t, 20, 70, s.bin, "--url", through, "attach", string(id))
	fmt.Fprint(tty.File, "stty size; echo ba''ck\r")
	tty.shows(t, "20 70")
	tty.shows(t, "back")
	if strings.Contains(tty.String(), "still") {
		t.Errorf("what the first client had was shown again: %q", tty)
	}

	// All of dayfly is killed: the terminal comes back, and the shell is the same one.
	fmt.Fprint(tty.File, "A=same; echo no''ted\r")
	tty.shows(t, "noted")
	if err := s.up.Kill(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(tty.File, "echo the $A shell\r")
	if err := s.up.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	tty.shows(t, "the same shell")
	fmt.Fprint(tty.File, "exit 9\r")
	if code := tty.code(); code != 9 {
		t.Errorf("exit code %d\n%s", code, tty)
	}
	task, err := s.Wait(deadline(t), id)
	if err != nil || task.Exit == nil || task.Exit.Code != 9 || task.Attempt != 1 {
		t.Errorf("%+v, %v", task.Exit, err)
	}
	log, _, _ := s.dayfly("", "logs", string(id))
	for _, text := range []string{"33 111", "code=130", "still", "20 70", "the same shell"} {
		if !strings.Contains(log, text) {
			t.Errorf("the log lacks %q: %q", text, log)
		}
	}
}

func TestRunWithStdin(t *testing.T) {
	s := start(t)
	big := strings.Repeat("0123456789abcde\n", 256<<10) // 4 MiB
	for what, c := range map[string]struct {
		stdin string
		args  []string
		out   string
		code  int
	}{
		"a pipe":             {"hi\n", []string{"run", "-i", s.shell, "cat"}, "hi\n", 0},
		"nothing":            {"", []string{"run", "-i", s.shell, "cat"}, "", 0},
		"its code":           {"3\n", []string{"run", "-i", s.shell, "sh", "-c", "read n; exit $n"}, "", 3},
		"more than a record": {big, []string{"run", "-i", s.shell, "wc", "-c"}, fmt.Sprintln(len(big)), 0},
		"there and back":     {big, []string{"run", "-i", "-m", "64MiB", s.shell, "cat"}, big, 0},
		"nobody reads":       {big, []string{"run", "-i", s.shell, "echo", "done"}, "done\n", 0},
		"a terminal alone":   {"", []string{"run", "-t", s.shell, "sh", "-c", "tty >/dev/null && echo yes $TERM; exit 4"}, "yes xterm\r\n", 4},
		"no command":         {"", []string{"run", "-i", s.shell, "nothing"}, "", 127},
		"-it on a pipe":      {"", []string{"run", "-it", s.shell, "sh"}, "", 2},
		"both":               {"", []string{"run", "-i", "--stdin", "x", s.shell, "cat"}, "", 2},
		"bad keys":           {"", []string{"run", "-i", "--detach-keys", "ctrl-1", s.shell, "cat"}, "", 2},
	} {
		if out, errs, code := s.dayfly(c.stdin, c.args...); out != c.out || code != c.code {
			t.Errorf("%s: %d bytes %.100q, %d, %s", what, len(out), out, code, errs)
		}
	}

	// Beyond the log's limit the process waits for who reads along, and nothing is lost.
	out, _, code := s.dayfly("", "run", "-t", s.shell, "sh", "-c", "stty -opost; yes 0123456789abcde | head -n 1500000")
	if len(out) != 1500000*16 || code != 0 {
		t.Errorf("%d bytes of %d came, %d", len(out), 1500000*16, code)
	}

	// One that was left runs on, and gets its stdin later.
	out, errs, code := s.dayfly("", "run", "-i", "-d", "--wait", "running", s.shell, "cat")
	if code != 0 {
		t.Fatal(errs)
	}
	id := strings.TrimSpace(out)
	if out, errs, code := s.dayfly("later\n", "attach", id); out != "later\n" || code != 0 {
		t.Errorf("%q, %d, %s", out, code, errs)
	}
	if _, errs, code := s.dayfly("", "attach", id); code != 125 || !strings.Contains(errs, "dayfly logs "+id) {
		t.Errorf("%d, %s", code, errs)
	}

	// One that has no stdin is followed.
	out, _, _ = s.dayfly("", "run", "-d", "--wait", "running", s.shell, "sh", "-c", "echo hello; until test -e /tmp/go; do sleep 0.1; done; exit 5")
	id = strings.TrimSpace(out)
	follow := exec.CommandContext(deadline(t), s.bin, "--url", s.up.URL, "attach", id)
	var said strings.Builder
	follow.Stderr = &said
	shown, err := follow.StdoutPipe()
	if err == nil {
		err = follow.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(shown)
	if line, err := lines.ReadString('\n'); line != "hello\n" {
		t.Errorf("%q, %v", line, err)
	}
	s.sh(schemas.TaskID(id), "touch /tmp/go")
	if rest, err := io.ReadAll(lines); len(rest) > 0 || err != nil {
		t.Errorf("%q, %v", rest, err)
	}
	if err := follow.Wait(); follow.ProcessState.ExitCode() != 5 || !strings.Contains(said.String(), "neither -i nor -t") {
		t.Errorf("%v, %s", err, said.String())
	}
	_, err = s.AttachMain(deadline(t), s.run(s.shell, nil), nil, client.ConsoleOptions{})
	refusedAs(t, "a task without", err, 422, schemas.CodeInvalidValue)
	_, err = s.AttachMain(deadline(t), schemas.TaskID(id), nil, client.ConsoleOptions{})
	refusedAs(t, "a task that is over", err, 409, schemas.CodeStateConflict)
}

// A pipe of stdin comes through kills of all of dayfly whole, or the end is clear.
func TestStdinOutlivesDayfly(t *testing.T) {
	s := start(t)
	task := create(t, s.Client, s.shell, func(spec *schemas.Spec) {
		spec.Command, spec.StdinOpen = []string{"md5sum"}, true
	})
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	con, err := s.AttachMain(ctx, task.ID, &schemas.ExecOffsets{}, client.ConsoleOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer con.Close()
	const rounds, piece = 3, 2 << 20
	sent := bytes.Repeat([]byte("dayfly\n "), rounds*piece/8)
	wrote := make(chan error, 1)
	half := make(chan struct{}, rounds)
	go func() {
		for i := range rounds {
			if _, err := con.Write(sent[i*piece : (i+1)*piece]); err != nil {
				wrote <- err
				return
			}
			half <- struct{}{}
		}
		wrote <- con.CloseWrite()
	}()
	for range rounds - 1 {
		<-half
		if err := s.up.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := s.up.Start(deadline(t)); err != nil {
			t.Fatal(err)
		}
	}
	got, _ := io.ReadAll(con) // how it ended Wait says
	exit, failed := con.Wait()
	if failed != nil {
		if !strings.Contains(failed.Error(), "not known") {
			t.Fatal(failed)
		}
		t.Skip("a kill hit between a write and its note, and was told: ", failed)
	}
	sum := exec.Command("md5sum")
	sum.Stdin = bytes.NewReader(sent)
	expect, _ := sum.Output()
	if err := <-wrote; err != nil || string(got) != string(expect) || exit.Code != 0 {
		t.Errorf("%q, want %q, %+v, %v", got, expect, exit, err)
	}
}
