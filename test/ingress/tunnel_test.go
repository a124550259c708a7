package ingress

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

func (s *site) api() *client.Client {
	s.Helper()
	c, err := client.New(s.up.URL)
	if err != nil {
		s.Fatal(err)
	}
	return c
}

// twoWay sends much through a connection, half-closes it, and checks what comes back.
func twoWay(c net.Conn) error {
	defer c.Close()
	const size = 8<<20 + 7
	sent := make([]byte, size)
	for i := range sent {
		sent[i] = byte(rand.Uint32())
	}
	failed := make(chan error, 1)
	go func() {
		_, err := c.Write(sent)
		if err == nil {
			err = c.(interface{ CloseWrite() error }).CloseWrite()
		}
		failed <- err
	}()
	got, err := io.ReadAll(c)
	if err = errors.Join(err, <-failed); err != nil {
		return err
	}
	if want := fmt.Appendf(bytes.Clone(sent), "%d bytes", size); !bytes.Equal(got, want) {
		return fmt.Errorf("%d bytes came back, want %d, or others", len(got), len(want))
	}
	return nil
}

func TestTunnels(t *testing.T) {
	s := start(t)
	task := s.run(web(8080), schemas.Port{Name: "shell", Port: 7000, Protocol: schemas.ProtocolTCP})
	c := s.api()
	dial := func(port int) (net.Conn, error) { return c.Tunnel(deadline(t), task.ID, port) }

	var several sync.WaitGroup
	for range 4 {
		several.Go(func() {
			conn, err := dial(7000)
			if err == nil {
				err = twoWay(conn)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	several.Wait()

	// A tunnel may be left in the middle, and what was written before arrives.
	conn, err := dial(8080)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || res.StatusCode != 200 {
		t.Fatal(res, err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if _, err := conn.Write([]byte("x")); err == nil {
		t.Error("written to a closed tunnel")
	}

	conn, err = dial(7000)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("after the deadline: %v", err)
	}
	conn.Close()

	waiting := s.create(map[string]any{"constraints": map[string]string{"nowhere": "1"}}, "")
	for name, bad := range map[string]struct {
		id     schemas.TaskID
		port   int
		status int
		code   schemas.Code
		state  schemas.State
	}{
		"nobody listens":     {task.ID, 7001, 502, schemas.CodeNoListener, ""},
		"no port":            {task.ID, 70000, 422, schemas.CodeInvalidValue, ""},
		"no task":            {"t-01jd0000000000000000000000", 80, 404, schemas.CodeNotFound, ""},
		"one that is queued": {waiting.ID, 80, 409, schemas.CodeStateConflict, schemas.Queued},
		"port 0":             {task.ID, 0, 422, schemas.CodeInvalidValue, ""},
		"a port below all":   {task.ID, -1, 422, schemas.CodeInvalidValue, ""},
	} {
		_, err := c.Tunnel(deadline(t), bad.id, bad.port)
		var e *schemas.Error
		if !errors.As(err, &e) || e.Status != bad.status || e.Code != bad.code || e.State != bad.state {
			t.Errorf("%s: %v", name, err)
		}
	}
	tunnel := fmt.Sprintf("%s/v1/tasks/%s/tunnel/7000", s.up.URL, task.ID)
	for origin, want := range map[string]int{"http://evil.example": 403, "null": 403, s.up.URL: 101} {
		ws, res, err := websocket.Dial(deadline(t), tunnel, &websocket.DialOptions{HTTPHeader: http.Header{"Origin": {origin}}})
		if err == nil {
			ws.CloseNow()
		}
		if res == nil || res.StatusCode != want {
			t.Errorf("origin %s: %v, %v", origin, res, err)
		}
	}
	if res, err := http.Get(tunnel); err != nil || res.StatusCode != 400 {
		t.Errorf("no WebSocket: %v, %v", res, err)
	} else {
		res.Body.Close()
	}

	conn, err = dial(7000)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.up.Call(deadline(t), "DELETE", "/v1/tasks/"+string(task.ID)+"?grace=0s", nil, nil); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.ReadAll(conn); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("after the end of the task: %v", err)
	}
	conn.Close()
	if _, err := c.Wait(deadline(t), task.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Tunnel(deadline(t), task.ID, 7000); !errors.Is(err, schemas.CodeStateConflict) {
		t.Errorf("after the end of the task: %v", err)
	}
}

// A side that takes nothing holds the other one back, and nobody's memory grows.
func TestATunnelHoldsBack(t *testing.T) {
	s := start(t)
	task := s.run(web(8080))
	conn, err := s.api().Tunnel(deadline(t), task.ID, 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const size = 256 << 20
	fmt.Fprintf(conn, "GET /bytes/%d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", size)
	in := bufio.NewReader(conn)
	if _, err := in.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	read := func() string { return s.metric("dayfly_ingress_bytes_total", `direction="out",kind="tunnel"`) }
	before := ""
	err = harness.Poll(deadline(t), func() error { // until nothing moves any more
		now := read()
		if now == before {
			return nil
		}
		before = now
		return errors.New("it moves on")
	})
	if err != nil {
		t.Fatal(err)
	}
	var bytes float64
	if _, err := fmt.Sscan(before, &bytes); err != nil || bytes == 0 || bytes > 32<<20 {
		t.Errorf("%s bytes are under way (%v)", before, err)
	}
	rest, err := io.Copy(io.Discard, in)
	if err != nil || rest < size {
		t.Errorf("%d bytes in the end, %v", rest, err)
	}
}

// metric is the value of one series of the process.
func (s *site) metric(name, labels string) string {
	s.Helper()
	res, err := http.Get(s.up.Admin + "/metrics")
	if err != nil {
		s.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		s.Fatal(err)
	}
	series := name
	if labels != "" {
		series += "{" + labels + "}"
	}
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (.*)$`).FindSubmatch(b)
	if m == nil {
		return ""
	}
	return string(m[1])
}

func TestPortForward(t *testing.T) {
	s := start(t)
	task := s.run(web(8080), schemas.Port{Name: "shell", Port: 7000, Protocol: schemas.ProtocolTCP})
	b, _ := binaries()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.bin, "--url", s.up.URL, "port-forward", string(task.ID), "0:8080", "0:7000")
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Signal(syscall.SIGKILL)
	lines := bufio.NewScanner(said)
	var at []string
	for range 2 {
		lines.Scan()
		addr, rest, _ := strings.Cut(lines.Text(), " is port ")
		if rest == "" {
			t.Fatal(lines.Text())
		}
		at = append(at, addr)
	}
	res, err := http.Get("http://" + at[0] + "/")
	if err != nil {
		t.Fatal(err)
	}
	text, _ := io.ReadAll(res.Body)
	res.Body.Close()
	if string(text) != "hello\n" {
		t.Errorf("%q", text)
	}
	conn, err := net.Dial("tcp", at[1])
	if err == nil {
		err = twoWay(conn)
	}
	if err != nil {
		t.Error(err)
	}
	if err := s.up.Call(deadline(t), "DELETE", "/v1/tasks/"+string(task.ID)+"?grace=0s", nil, nil); err != nil {
		t.Fatal(err)
	}
	for lines.Scan() {
		text = lines.Bytes()
	}
	if !strings.HasSuffix(string(text), "is over (canceled)") {
		t.Errorf("%s", text)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ends with the task: %v", err)
	}
}
