package reach

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/sys/unix"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// screen gathers what comes.
type screen struct {
	mu   sync.Mutex
	text bytes.Buffer
	end  error
}

func watch(r io.Reader) *screen {
	s := &screen{}
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := r.Read(b)
			s.mu.Lock()
			s.text.Write(b[:n])
			if err != nil {
				s.end = err
				s.mu.Unlock()
				return
			}
			s.mu.Unlock()
		}
	}()
	return s
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

func (s *screen) shows(t testing.TB, text string) {
	t.Helper()
	until(t, "the screen shows "+text, func() error {
		return want(strings.Contains(s.String(), text), "%q", s.String())
	})
}

func console(t testing.TB, c *client.Client, id schemas.TaskID, o client.ConsoleOptions, command ...string) *client.Console {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	t.Cleanup(cancel)
	o.Command = command
	con, err := c.Console(ctx, id, o)
	if err != nil {
		t.Fatal(err)
	}
	return con
}

func TestConsole(t *testing.T) {
	s := start(t)
	id := s.run(s.shell, nil)
	con := console(t, s.Client, id, client.ConsoleOptions{Terminal: &schemas.Window{Rows: 30, Cols: 100}}, "sh")
	shown := watch(con)
	fmt.Fprintln(con, "stty size; tty; echo fo''o")
	shown.shows(t, "30 100\r\n/dev/pts/")
	shown.shows(t, "foo")
	con.Resize(schemas.Window{Rows: 50, Cols: 132})
	until(t, "the new size", func() error {
		fmt.Fprintln(con, "stty size")
		return want(strings.Contains(shown.String(), "50 132"), "%q", shown.String())
	})
	fmt.Fprintln(con, "sleep 1000")
	s.runs(id, "sleep 1000")
	fmt.Fprint(con, "\x03")
	fmt.Fprintln(con, "echo code=$?")
	shown.shows(t, "code=130")
	list, err := s.Execs(deadline(t), id)
	if err != nil || len(list.Items) != 1 || !list.Items[0].Attached || !list.Items[0].Terminal || list.Items[0].ID != con.ID() {
		t.Errorf("%+v, %v", list, err)
	}
	fmt.Fprintln(con, "exit 7")
	if exit, err := con.Wait(); err != nil || exit.Code != 7 {
		t.Errorf("%+v, %v", exit, err)
	}

	// Without a terminal there are three streams, and a half-close.
	var errs bytes.Buffer
	con = console(t, s.Client, id, client.ConsoleOptions{Input: true, Stderr: &errs}, "sh", "-c", "cat; echo over >&2; exit 3")
	big := strings.Repeat("0123456789", 500_000)
	go func() {
		_, _ = io.WriteString(con, big)
		_ = con.CloseWrite()
	}()
	got, err := io.ReadAll(con)
	exit, failed := con.Wait()
	if err != nil || failed != nil || exit.Code != 3 || string(got) != big || errs.String() != "over\n" {
		t.Errorf("%d bytes, %q, %v, %v, %+v", len(got), errs.String(), err, failed, exit)
	}

	con = console(t, s.Client, id, client.ConsoleOptions{}, "sleep", "1000")
	con.Signal("TERM")
	if exit, err := con.Wait(); err != nil || exit.Signal != 15 {
		t.Errorf("%+v, %v", exit, err)
	}
	con = console(t, s.Client, id, client.ConsoleOptions{}, "nothing")
	if exit, err := con.Wait(); err != nil || exit.Code != 127 || exit.Message == "" {
		t.Errorf("%+v, %v", exit, err)
	}
	ws := strings.Replace(s.up.URL, "http", "ws", 1) + "/v1/tasks/" + string(id) + "/exec?command=sh"
	for origin, want := range map[string]int{"http://evil.example": 403, "null": 403, s.up.URL: 101} {
		c, res, err := websocket.Dial(deadline(t), ws, &websocket.DialOptions{HTTPHeader: http.Header{"Origin": {origin}}})
		if err == nil {
			_ = c.Close(websocket.StatusNormalClosure, "")
		}
		if res == nil || res.StatusCode != want {
			t.Errorf("origin %s: %v, %v", origin, res, err)
		}
	}

	// The end of the task is the end of the console, with a word.
	con = console(t, s.Client, id, client.ConsoleOptions{Terminal: &schemas.Window{Rows: 30, Cols: 100}}, "sh")
	watch(con)
	grace := time.Duration(0)
	if _, err := s.Cancel(deadline(t), id, &grace); err != nil {
		t.Fatal(err)
	}
	if exit, err := con.Wait(); err == nil && exit.Signal == 0 {
		t.Errorf("%+v, %v", exit, err)
	}
	_, err = s.Console(deadline(t), id, client.ConsoleOptions{ExecRequest: schemas.ExecRequest{Command: []string{"sh"}}})
	until(t, "it is refused in a task that is over", func() error {
		_, err = s.Console(deadline(t), id, client.ConsoleOptions{ExecRequest: schemas.ExecRequest{Command: []string{"sh"}}})
		return want(errors.Is(err, schemas.CodeStateConflict), "%v", err)
	})
}

// runs waits until a program runs in the task.
func (s *site) runs(id schemas.TaskID, program string) {
	s.Helper()
	until(s, program+" runs", func() error {
		out := s.sh(id, "ps").Stdout
		return want(strings.Contains(out, program), "%s", out)
	})
}

// proxy joins connections to an address, and breaks them when it is told to.
type proxy struct {
	net.Listener
	mu    sync.Mutex
	conns []net.Conn
}

func newProxy(t testing.TB, to string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Listener: l}
	t.Cleanup(func() { l.Close(); p.cut() })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				near.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, near, far)
			p.mu.Unlock()
			for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
				go func() {
					_, _ = io.Copy(way[0], way[1])
					way[0].Close()
				}()
			}
		}
	}()
	return p
}

func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	p.conns = nil
}

// Connections break again and again, and nothing is lost in either direction.
func TestAConsoleIsResumed(t *testing.T) {
	s := start(t)
	id := s.run(s.shell, nil)
	p := newProxy(t, strings.TrimPrefix(s.up.URL, "http://"))
	c, err := client.New("http://" + p.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	broken := 0
	con := console(t, c, id, client.ConsoleOptions{Input: true, Broken: func(err error) {
		if err != nil {
			broken++
		}
	}}, "cat")
	const size = 24 << 20
	sent := make([]byte, size)
	_, _ = io.ReadFull(newPattern(2), sent)
	go func() {
		_, _ = con.Write(sent)
		_ = con.CloseWrite()
	}()
	got := make([]byte, 0, size)
	b := make([]byte, 64<<10)
	cuts := 0
	for {
		n, err := con.Read(b)
		got = append(got, b[:n]...)
		if len(got) > (cuts+1)*size/8 && cuts < 6 {
			cuts++
			p.cut()
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if exit, err := con.Wait(); err != nil || exit.Code != 0 {
		t.Errorf("%+v, %v", exit, err)
	}
	if !bytes.Equal(got, sent) || broken == 0 {
		t.Errorf("%d of %d bytes came, or others; broken %d times", len(got), size, broken)
	}
	until(t, "nothing is left", func() error {
		n := metric(t, s.up.Admin, "dayfly_agent_execs", "") + metric(t, s.up.Admin, "dayfly_sessions_open", "")
		return want(n == 0, "%v are", n)
	})
}

// A client that never reads holds back its own program and nothing else.
func TestAClientThatNeverReads(t *testing.T) {
	s := start(t)
	id := s.run(s.shell, nil)
	con := console(t, s.Client, id, client.ConsoleOptions{Terminal: &schemas.Window{Rows: 24, Cols: 80}}, "yes", "flood")
	raw, _, err := websocket.Dial(deadline(t), s.up.URL+"/v1/tasks/"+string(id)+"/exec?command=yes&acks=1", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.CloseNow()
	before := -1.0
	until(t, "nothing moves any more", func() error {
		now := metric(t, s.up.Admin, "dayfly_session_bytes_total", `direction="out",kind="console"`)
		same := now == before && now > 0
		before = now
		return want(same, "%v bytes", now)
	})
	if before > 32<<20 {
		t.Errorf("%v bytes are under way", before)
	}
	for range 20 { // nor does it gain anything by saying that it has read what was never sent
		if err := raw.Write(deadline(t), websocket.MessageText, []byte(`{"ack":{"stdout":9007199254740991}}`)); err != nil {
			t.Fatal(err)
		}
	}
	raw.SetReadLimit(-1)
	for read := 0; read < 4<<20; {
		kind, b, err := raw.Read(deadline(t))
		if err != nil {
			t.Fatal(err)
		}
		if kind == websocket.MessageBinary {
			read += len(b)
			if i := len(b) - 1; i > 0 && strings.Trim(string(b[1:]), "y\n") != "" {
				t.Fatalf("%.40q", b)
			}
		}
		if err := raw.Write(deadline(t), websocket.MessageText, []byte(`{"ack":{"stdout":9007199254740991}}`)); err != nil {
			t.Fatal(err)
		}
	}
	if res := s.sh(id, "echo fine"); res.Stdout != "fine\n" {
		t.Errorf("%+v", res)
	}
	if err := con.Close(); err != nil {
		t.Error(err)
	}
	raw.CloseNow()
	until(t, "the first is hung up on", func() error {
		list, err := s.Execs(deadline(t), id)
		return want(err == nil && len(list.Items) == 1, "%+v, %v", list, err)
	})
}

// terminal is a pseudo-terminal with a program on it.
type terminal struct {
	*os.File
	*screen
	cmd *exec.Cmd
}

func onTerminal(t testing.TB, rows, cols uint16, name string, args ...string) *terminal {
	t.Helper()
	cmd := exec.Command(name, args...)
	master, err := harness.OnTerminal(rows, cols, cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return &terminal{master, watch(master), cmd}
}

func (t *terminal) code() int {
	_ = t.cmd.Wait()
	return t.cmd.ProcessState.ExitCode()
}

// isATerminal checks that a shell in the task follows the size of the terminal it is shown on,
// gets its Ctrl-C, and outlives the loss of its connection.
func (s *site) isATerminal(t *testing.T, id schemas.TaskID, tty *terminal, p *proxy) {
	t.Helper()
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 44, Col: 99}); err != nil {
		t.Fatal(err)
	}
	until(t, "the new size", func() error {
		fmt.Fprint(tty.File, "stty size\r")
		return want(strings.Contains(tty.String(), "44 99"), "%q", tty.String())
	})
	fmt.Fprint(tty.File, "sleep 1000\r")
	s.runs(id, "sleep 1000")
	fmt.Fprint(tty.File, "\x03")
	fmt.Fprint(tty.File, "echo code=$?\r")
	tty.shows(t, "code=130")
	p.cut()
	fmt.Fprint(tty.File, "echo st''ill\r")
	tty.shows(t, "still")
}

func TestTheCommandLineOnATerminal(t *testing.T) {
	s := start(t)
	id := s.run(s.shell, nil)
	p := newProxy(t, strings.TrimPrefix(s.up.URL, "http://"))
	tty := onTerminal(t, 33, 111, s.bin, "--url", "http://"+p.Addr().String(), "exec", "-it", string(id), "sh")
	fmt.Fprint(tty.File, "stty size\r")
	tty.shows(t, "33 111")
	s.isATerminal(t, id, tty, p)
	fmt.Fprint(tty.File, "exit 9\r")
	if code := tty.code(); code != 9 {
		t.Errorf("exit code %d\n%s", code, tty)
	}

	run := func(stdin string, args ...string) (string, int) {
		t.Helper()
		cmd := exec.CommandContext(deadline(t), s.bin, append([]string{"--url", s.up.URL}, args...)...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.Output()
		var ee *exec.ExitError
		if err != nil && !errors.As(err, &ee) {
			t.Fatal(err)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	for _, c := range []struct {
		stdin string
		args  []string
		out   string
		code  int
	}{
		{strings.Repeat("x", 3<<20), []string{"exec", "-i", string(id), "wc", "-c"}, fmt.Sprintln(3 << 20), 0},
		{"", []string{"exec", "-e", "A=b", "-w", "/tmp", string(id), "--", "sh", "-c", "echo $A $(pwd); exit 4"}, "b /tmp\n", 4},
		{"", []string{"exec", "--timeout", "100ms", string(id), "sleep", "100"}, "", 124},
		{"", []string{"exec", string(id), "nothing"}, "", 127},
		{"", []string{"exec", string(id), "/etc"}, "", 126},
		{"", []string{"exec", "t-01jd0000000000000000000000", "true"}, "", 125},
		{"", []string{"exec", "-t", string(id), "true"}, "", 2},
	} {
		if out, code := run(c.stdin, c.args...); out != c.out || code != c.code {
			t.Errorf("%v: %q, %d", c.args, out, code)
		}
	}

	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755), os.WriteFile(filepath.Join(dir, name), []byte(text), 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	write("src/a", "1")
	write("src/b/c", "2")
	if err := errors.Join(os.Symlink("a", filepath.Join(dir, "src/l")), os.Symlink("/etc", filepath.Join(dir, "src/out"))); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"cp", filepath.Join(dir, "src"), string(id) + ":/tmp/"},
		{"cp", filepath.Join(dir, "src/a"), string(id) + ":/tmp/one"},
		{"cp", string(id) + ":/tmp/src", filepath.Join(dir, "back")},
		{"cp", string(id) + ":/tmp/one", dir},
	} {
		if out, code := run("", args...); code != 0 || out != "" {
			t.Errorf("%v: %d, %s", args, code, out)
		}
	}
	for name, text := range map[string]string{"back/a": "1", "back/b/c": "2", "back/l": "1", "one": "1"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); string(b) != text {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, "back/out")); err == nil {
		t.Error("a link that leads out came back")
	}
	if out, code := run("", "cp", string(id)+":/tmp/one", "-"); out != "1" || code != 0 {
		t.Errorf("to stdout: %q, %d", out, code)
	}
	if _, code := run(tarOf(t, file("x/y", "3")).String(), "cp", "-", string(id)+":/tmp/in"); code != 0 || s.sh(id, "cat /tmp/in/x/y").Stdout != "3" {
		t.Errorf("from stdin: %d", code)
	}
}
