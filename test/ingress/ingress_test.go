// Package ingress reaches real containers without a network from outside: by hostname,
// by tunnel and by a TCP port of their own.
package ingress

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/guest"
	"dayfly.dev/test/harness"
)

// patience bounds each wait for a fact.
const patience = time.Minute

// binaries builds dayfly, and the web server into an image, once for all tests.
var binaries = sync.OnceValues(func() (built, error) {
	dir, err := os.MkdirTemp("", "dayfly-ingress-")
	if err != nil {
		return built{}, err
	}
	b := built{dir: dir, image: "dayfly-web:" + strings.ToLower(rand.Text()[:10])}
	if b.bin, err = harness.Binaries(context.Background(), dir); err != nil {
		return b, err
	}
	return b, makeImage(b.image, dir)
})

type built struct{ dir, bin, image string }

// makeImage makes an image of the web server and nothing else.
func makeImage(name, dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	path := filepath.Join(dir, "web")
	if err := guest.BuildBinary(ctx, "dayfly.dev/test/ingress/web", path); err != nil {
		return err
	}
	program, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "web", Mode: 0o755, Size: int64(len(program))}); err != nil {
		return err
	}
	if _, err := w.Write(program); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	engine, err := client.New(client.FromEnv)
	if err != nil {
		return err
	}
	defer engine.Close()
	_, err = guest.ImportImage(ctx, engine, archive.Bytes(), name, `ENTRYPOINT ["/web"]`, "EXPOSE 53/udp", "EXPOSE 9090/tcp", "EXPOSE 8080/tcp")
	return err
}

func TestMain(m *testing.M) {
	code := m.Run()
	b, _ := binaries()
	if b.image != "" {
		_ = harness.RemoveImage(context.Background(), b.image)
	}
	if b.dir != "" {
		os.RemoveAll(b.dir)
	}
	os.Exit(code)
}

// site is a dayfly with real containers.
type site struct {
	testing.TB
	up    *harness.Up
	image string
}

func start(t testing.TB, args ...string) *site {
	t.Helper()
	b, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	up := harness.NewFor(t, b.bin, args...)
	if err := up.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	return &site{t, up, b.image}
}

func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// health looks often, and lets a server begin slowly.
func health(port int) map[string]any {
	return map[string]any{"tcp": map[string]any{"port": port}, "interval": "100ms", "start_period": "30s"}
}

// run starts a web server on the ports and waits until it answers.
func (s *site) run(ports ...schemas.Port) schemas.Task {
	s.Helper()
	command := []string{}
	for _, p := range ports {
		if p.Protocol == schemas.ProtocolTCP {
			command = append(command, fmt.Sprintf("echo:%d", p.Port))
		} else {
			command = append(command, fmt.Sprint(p.Port))
		}
	}
	t := s.create(map[string]any{"command": command, "ports": ports, "health": health(ports[0].Port)}, "?wait=running")
	err := harness.Poll(deadline(s), func() error {
		var now schemas.Task
		if err := s.up.Call(deadline(s), "GET", "/v1/tasks/"+string(t.ID), nil, &now); err != nil {
			return err
		}
		if now.State.Final() {
			return harness.Fatal(fmt.Errorf("it ended: %s %s", now.State, now.Message))
		}
		if !now.Ready {
			return fmt.Errorf("not ready: %s", now.State)
		}
		return nil
	})
	if err != nil {
		s.Fatal(err)
	}
	return t
}

func (s *site) create(spec map[string]any, query string) (t schemas.Task) {
	s.Helper()
	spec["image"] = s.image
	spec["ttl"] = "5m"
	if spec["resources"] == nil {
		spec["resources"] = map[string]any{"memory": "64MiB", "cpus": 0.4}
	}
	if err := s.up.Call(deadline(s), "POST", "/v1/tasks"+query, spec, &t); err != nil {
		s.Fatal(err)
	}
	return t
}

// client reaches any hostname at the ingress.
func (s *site) client() *http.Client {
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", s.up.Ingress)
	}, DisableCompression: true}
	s.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}

// asked is what the web server says of a request.
type asked struct {
	Host, URI, Proto, Method string
	Header                   http.Header
}

func (s *site) ask(c *http.Client, req *http.Request) (a asked) {
	s.Helper()
	res, err := c.Do(req)
	if err != nil {
		s.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil {
		err = json.Unmarshal(b, &a)
	}
	if err != nil || res.StatusCode != 200 {
		s.Fatalf("%s: %v: %s", res.Status, err, b)
	}
	return a
}

func (s *site) request(method, url string, body io.Reader) *http.Request {
	s.Helper()
	req, err := http.NewRequestWithContext(deadline(s), method, url, body)
	if err != nil {
		s.Fatal(err)
	}
	return req
}

func web(port int) schemas.Port { return schemas.Port{Name: "web", Port: port} }

// Who names no port gets the one that the image exposes; who names one gets that alone.
func TestTheImagesPort(t *testing.T) {
	s := start(t)
	task := s.create(map[string]any{"command": []string{"8080"}, "health": health(8080)}, "?wait=ready")
	if len(task.Endpoints) != 1 || task.Endpoints[0].Name != schemas.DefaultPort || task.Endpoints[0].Protocol != schemas.ProtocolHTTP {
		t.Fatalf("%s, %+v", task.State, task.Endpoints)
	}
	if a := s.ask(s.client(), s.request("GET", task.Endpoints[0].URL+"/headers", nil)); a.Host != task.Endpoints[0].Host+fmt.Sprintf(":%d", task.Endpoints[0].Port) {
		t.Errorf("%+v", a)
	}
	if named := s.run(web(9090)); len(named.Endpoints) != 1 || named.Endpoints[0].Name != "web" {
		t.Errorf("%+v", named.Endpoints)
	}
}

func TestAWebServerWithoutANetwork(t *testing.T) {
	s := start(t, "--private-cookie", "session")
	task := s.run(web(8080), schemas.Port{Name: "grpc", Port: 9090, Protocol: schemas.ProtocolH2C})
	if len(task.Endpoints) != 2 {
		t.Fatalf("%+v", task.Endpoints)
	}
	url, h2c := task.Endpoints[0].URL, task.Endpoints[1].URL
	c := s.client()

	req := s.request("GET", url+"/headers?a=1;b=%zz", nil)
	for name, value := range map[string]string{"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Host": "evil", "X-Forwarded-Proto": "https", "X-Real-Ip": "6.6.6.6",
		"Forwarded": "for=6.6.6.6", "Authorization": "Bearer platform", "Cookie": "dayfly_key=1; a=b; session=2; __Host-dayfly_x=3; c=d=e", "Connection": "X-Hop", "X-Hop": "1"} {
		req.Header.Set(name, value)
	}
	a := s.ask(c, req)
	host := strings.TrimPrefix(url, "http://")
	if a.Host != host || a.URI != "/headers?a=1;b=%zz" || a.Proto != "HTTP/1.1" {
		t.Errorf("%+v", a)
	}
	for name, want := range map[string]string{"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Host": host, "X-Forwarded-Proto": "http", "X-Real-Ip": "",
		"Forwarded": "", "Authorization": "", "Cookie": "a=b; c=d=e", "X-Hop": "", "Connection": ""} {
		if got := strings.Join(a.Header[name], "|"); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if a := s.ask(c, s.request("GET", h2c+"/headers", nil)); a.Proto != "HTTP/2.0" {
		t.Errorf("h2c: %+v", a)
	}

	res, err := c.Do(s.request("GET", url+"/cookies", nil))
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if got := strings.Join(res.Header["Set-Cookie"], "|"); got != "a=1; Path=/; HttpOnly|b=2" || res.Header.Get("Clear-Site-Data") != "" {
		t.Errorf("cookies %q, %q", got, res.Header.Get("Clear-Site-Data"))
	}

	for name, endpoint := range map[string]string{"HTTP/1.1": url, "HTTP/2": h2c} {
		res, err := c.Do(s.request("GET", endpoint+"/trailer", nil))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, res.Body)
		res.Body.Close()
		if res.Trailer.Get("X-Sum") != "42" {
			t.Errorf("%s: trailer %v", name, res.Trailer)
		}
		res, err = c.Do(s.request("GET", endpoint+"/cut", nil))
		if err == nil {
			if _, err = io.Copy(io.Discard, res.Body); err == nil {
				t.Errorf("%s: a cut answer looks whole", name)
			}
			res.Body.Close()
		}
	}

	t.Run("a visitor speaks HTTP/2 without TLS", func(t *testing.T) {
		p := new(http.Protocols)
		p.SetUnencryptedHTTP2(true)
		over := c.Transport.(*http.Transport).Clone()
		over.Protocols = p
		defer over.CloseIdleConnections()
		if a := s.ask(&http.Client{Transport: over}, s.request("GET", url+"/headers", nil)); a.Host != host || a.Proto != "HTTP/1.1" {
			t.Errorf("%+v", a)
		}
	})
	t.Run("big bodies pass", func(t *testing.T) {
		const size = 64 << 20
		res, err := c.Do(s.request("GET", fmt.Sprintf("%s/bytes/%d", url, size), nil))
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, res.Body)
		res.Body.Close()
		if n != size || err != nil {
			t.Errorf("down: %d, %v", n, err)
		}
		res, err = c.Do(s.request("POST", url+"/count", io.LimitReader(neverending{}, size)))
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if string(b) != fmt.Sprintf("%d <nil>\n", size) {
			t.Errorf("up: %s", b)
		}
	})
	t.Run("an answer begins before the request ends", func(t *testing.T) {
		for _, endpoint := range []string{url, h2c} {
			body, write := io.Pipe()
			res, err := c.Do(s.request("POST", endpoint+"/echo", io.MultiReader(strings.NewReader("first"), body)))
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 5)
			if _, err := io.ReadFull(res.Body, got); err != nil || string(got) != "first" {
				t.Errorf("%q, %v", got, err)
			}
			go func() {
				_, _ = io.WriteString(write, "second")
				write.Close()
			}()
			if rest, err := io.ReadAll(res.Body); err != nil || string(rest) != "second" {
				t.Errorf("%q, %v", rest, err)
			}
			res.Body.Close()
		}
	})
	t.Run("events come at once", func(t *testing.T) {
		res, err := c.Do(s.request("GET", url+"/sse/3", nil))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		lines := bufio.NewScanner(res.Body)
		for i := range 3 {
			for lines.Scan() && lines.Text() == "" {
			}
			if lines.Text() != fmt.Sprintf("data: %d", i) {
				t.Fatalf("%q, %v", lines.Text(), lines.Err())
			}
			next, err := c.Do(s.request("GET", url+"/next", nil)) // only now there is another
			if err != nil {
				t.Fatal(err)
			}
			next.Body.Close()
		}
	})
	t.Run("a WebSocket", func(t *testing.T) {
		ws, _, err := websocket.Dial(deadline(t), url+"/ws", &websocket.DialOptions{HTTPClient: c})
		if err != nil {
			t.Fatal(err)
		}
		defer ws.CloseNow()
		ws.SetReadLimit(1 << 20)
		for _, size := range []int{0, 1, 100_000} {
			want := bytes.Repeat([]byte("x"), size)
			if err := ws.Write(deadline(t), websocket.MessageBinary, want); err != nil {
				t.Fatal(err)
			}
			kind, got, err := ws.Read(deadline(t))
			if err != nil || kind != websocket.MessageBinary || !bytes.Equal(got, want) {
				t.Fatalf("%v %d bytes, %v", kind, len(got), err)
			}
		}
		_ = ws.Close(websocket.StatusNormalClosure, "")
	})
	t.Run("pages", func(t *testing.T) { s.pages(c, task) })
}

type neverending struct{}

func (neverending) Read(p []byte) (int, error) { return len(p), nil }

// page asks for an address that dayfly answers itself.
func (s *site) page(c *http.Client, url string, status int, code schemas.Code) string {
	s.Helper()
	var text string
	for _, accept := range []string{"text/html,*/*", "application/json", ""} {
		req := s.request("GET", url, nil)
		req.Header.Set("Accept", accept)
		res, err := c.Do(req)
		if err != nil {
			s.Fatal(err)
		}
		b, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if res.StatusCode != status || res.Header.Get("Dayfly-Code") != string(code) {
			s.Fatalf("%s (%s): %s %s: %s", url, accept, res.Status, res.Header.Get("Dayfly-Code"), b)
		}
		if !strings.Contains(res.Header.Get("Content-Security-Policy"), "default-src 'none'") {
			s.Errorf("%v", res.Header)
		}
		text = string(b)
	}
	return text
}

func (s *site) pages(c *http.Client, task schemas.Task) {
	s.page(c, strings.Replace(task.Endpoints[0].URL, "//", "//aaaaaaaaaaaaaaaaaaaaaaaaaa.x", 1), 404, schemas.CodeNotFound)
	s.page(c, "http://aaaaaaaaaaaaaaaaaaaaaaaaaa.localhost/", 404, schemas.CodeNotFound)
	silent := s.create(map[string]any{"command": []string{"7777"}, "ports": []schemas.Port{web(8080)}}, "?wait=running")
	s.page(c, silent.Endpoints[0].URL, 502, schemas.CodeNoListener)
	waiting := s.create(map[string]any{"command": []string{"7777"}, "ports": []schemas.Port{web(8080)}, "constraints": map[string]string{"nowhere": "1"}}, "")
	s.page(c, waiting.Endpoints[0].URL, 503, schemas.CodeStarting)
	for _, id := range []schemas.TaskID{silent.ID, waiting.ID} {
		var ended schemas.Task
		if err := s.up.Call(deadline(s), "DELETE", "/v1/tasks/"+string(id)+"?grace=0s", nil, nil); err != nil {
			s.Fatal(err)
		}
		if err := s.up.Call(deadline(s), "GET", "/v1/tasks/"+string(id)+"?wait=done", nil, &ended); err != nil {
			s.Fatal(err)
		}
		if len(ended.Endpoints) != 0 {
			s.Errorf("endpoints of a task that is over: %v", ended.Endpoints)
		}
	}
	if text := s.page(c, silent.Endpoints[0].URL, 410, schemas.CodeEnded); !strings.Contains(text, "ago (canceled)") {
		s.Error(text)
	}
	s.page(c, waiting.Endpoints[0].URL, 410, schemas.CodeEnded)
}
