package ingress

import (
	"bufio"
	"bytes"
	"crypto/md5"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"mime/multipart"
	"net/http"
	"net/http/cookiejar"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/coder/websocket"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// serve starts a server, with more in its spec, and waits until it takes connections.
func (s *site) serve(image string, more map[string]any, port schemas.Port, command ...string) (schemas.Task, schemas.Endpoint) {
	s.Helper()
	of := *s
	of.image = image
	spec := map[string]any{"command": command, "ports": []schemas.Port{port}, "health": map[string]any{"tcp": map[string]any{"port": port.Port}, "interval": "100ms", "start_period": "30s"}}
	maps.Copy(spec, more)
	task := of.create(spec, "?wait=running")
	s.Cleanup(func() { // before its image goes
		if err := s.up.Call(deadline(s), "DELETE", "/v1/tasks/"+string(task.ID)+"?grace=0s", nil, nil); err != nil {
			s.Error(err)
		}
	})
	err := harness.Poll(deadline(s), func() error {
		var now schemas.Task
		if err := s.up.Call(deadline(s), "GET", "/v1/tasks/"+string(task.ID), nil, &now); err != nil {
			return err
		}
		if now.State.Final() {
			return harness.Fatal(fmt.Errorf("it ended: %s %s", now.Message, now.Stderr))
		}
		if !now.Ready {
			return fmt.Errorf("%s, not ready", now.State)
		}
		return nil
	})
	if err != nil {
		s.Fatalf("%s: %v", command[0], err)
	}
	return task, task.Endpoints[0]
}

// get reads an answer that must be 200.
func (s *site) get(c *http.Client, url string) (string, http.Header) {
	s.Helper()
	res, err := c.Do(s.request("GET", url, nil))
	if err != nil {
		s.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 {
		s.Fatalf("%s: %s %q %v", url, res.Status, b, err)
	}
	return string(b), res.Header
}

// Programs that nobody here wrote, each the way its own users reach it.
func TestRealPrograms(t *testing.T) {
	s := start(t, "--allow", "entrypoint,tmpfs,image-user,writable-root,cap:SETUID,cap:SETGID,cap:CHOWN,cap:DAC_OVERRIDE,cap:NET_BIND_SERVICE")
	for name, test := range map[string]func(*site){
		"nginx": nginx, "nginx as Debian sets it up": nginxOfDebian, "redis": redis, "socat": socat, "flask and websockets": python, "node": node, "sshd": sshd,
	} {
		t.Run(name, func(t *testing.T) {
			of := *s
			of.TB = t
			test(&of)
		})
	}
}

// As the task's own user, with places of its own.
func nginx(s *site) {
	r := newRootfs(s)
	r.programs("nginx")
	r.text("www/index.html", "from nginx")
	r.text("etc/nginx.conf", "daemon off; pid /tmp/pid; error_log stderr; events {} http { access_log off; client_body_temp_path /tmp/a; proxy_temp_path /tmp/b;"+
		" fastcgi_temp_path /tmp/c; uwsgi_temp_path /tmp/d; scgi_temp_path /tmp/e; server { listen 127.0.0.1:8080; root /www; } }")
	_, web := s.serve(r.image(), nil, schemas.Port{Name: "web", Port: 8080}, "nginx", "-p", "/tmp", "-c", "/etc/nginx.conf")
	if text, h := s.get(s.client(), web.URL+"/"); text != "from nginx" || !strings.HasPrefix(h.Get("Server"), "nginx") {
		s.Errorf("%q %v", text, h)
	}
}

// With Debian's own configuration: root, who binds port 80, writes into /var and starts
// workers of another user.
func nginxOfDebian(s *site) {
	r := newRootfs(s)
	r.programs("nginx")
	r.packages("nginx-common")
	r.folder("run")
	r.text("var/www/html/index.html", "as Debian sets it up")
	r.add(linkTo("etc/nginx/sites-enabled/default", "../sites-available/default"), nil)
	_, web := s.serve(r.image(), map[string]any{"user": "image", "read_only": false, "cap_add": []string{"SETUID", "SETGID", "CHOWN", "DAC_OVERRIDE", "NET_BIND_SERVICE"}},
		schemas.Port{Name: "web", Port: 80}, "nginx", "-g", "daemon off;")
	if text, _ := s.get(s.client(), web.URL+"/"); text != "as Debian sets it up" {
		s.Errorf("%q", text)
	}
}

func redis(s *site) {
	r := newRootfs(s)
	r.programs("redis-server")
	_, db := s.serve(r.image(), nil, tcp("db", 6379), "redis-server", "--bind", "127.0.0.1", "--save", "", "--dir", "/tmp")
	out, err := exec.CommandContext(deadline(s), "redis-cli", "-h", "127.0.0.1", "-p", fmt.Sprint(db.Port), "SET", "k", "v").CombinedOutput()
	if err != nil || string(out) != "OK\n" {
		s.Errorf("%q, %v (make setup installs redis-cli)", out, err)
	}
	bench := exec.CommandContext(deadline(s), "redis-benchmark", "-h", "127.0.0.1", "-p", fmt.Sprint(db.Port), "-n", "2000", "-c", "20", "-t", "get", "-q")
	if out, err := bench.CombinedOutput(); err != nil || !strings.Contains(string(out), "requests per second") {
		s.Errorf("%q, %v", out, err)
	}
}

// A program for each connection, as challenges for nc have it.
func socat(s *site) {
	r := newRootfs(s)
	r.programs("socat", "cat")
	_, pwn := s.serve(r.image(), nil, tcp("pwn", 1337), "socat", "TCP-LISTEN:1337,bind=127.0.0.1,reuseaddr,fork", "EXEC:/bin/cat")
	c, err := dialEndpoint(pwn)
	if err != nil {
		s.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "litmus\n"); err != nil {
		s.Fatal(err)
	}
	if line, err := bufio.NewReader(c).ReadString('\n'); line != "litmus\n" {
		s.Errorf("%q, %v", line, err)
	}
}

const flaskApp = `
import flask
app = flask.Flask(__name__)
app.secret_key = "litmus"

@app.get("/")
def index():
    flask.session["n"] = flask.session.get("n", 0) + 1
    return f"visit {flask.session['n']} to {flask.request.host_url}"

@app.post("/upload")
def upload():
    return str(len(flask.request.files["f"].read()))

@app.get("/old")
def old():
    return flask.redirect(flask.url_for("index", _external=True))
`

const websocketsApp = `
import asyncio, websockets

async def echo(ws):
    async for m in ws:
        await ws.send(m)

async def main():
    async with websockets.serve(echo, "127.0.0.1", 8001, max_size=1 << 22):
        await asyncio.Future()

asyncio.run(main())
`

// A web application of Flask with a session and a form, and a WebSocket server.
func python(s *site) {
	interpreter, err := filepath.EvalSymlinks("/usr/bin/python3")
	if err != nil {
		s.Fatalf("%v (make setup installs it)", err)
	}
	version := filepath.Base(interpreter) // python3.11
	r := newRootfs(s)
	r.packages(version+"-minimal", "lib"+version+"-minimal", "lib"+version+"-stdlib", "python3-flask", "python3-jinja2", "python3-werkzeug",
		"python3-click", "python3-itsdangerous", "python3-markupsafe", "python3-websockets")
	r.text("srv/app.py", flaskApp)
	r.text("srv/ws.py", websocketsApp)
	image := r.image()
	full := map[string]any{"resources": map[string]any{"memory": "128MiB", "cpus": 1}}
	_, web := s.serve(image, full, schemas.Port{Name: "web", Port: 8000}, version, "-m", "flask", "--app", "/srv/app.py", "run", "--port", "8000")
	c := s.client()
	c.Jar, _ = cookiejar.New(nil)
	for _, path := range []string{"/", "/", "/old"} {
		text, _ := s.get(c, web.URL+path)
		if path == "/old" && text != "visit 3 to "+web.URL+"/" {
			s.Errorf("%q", text)
		}
	}
	var form bytes.Buffer
	w := multipart.NewWriter(&form)
	f, err := w.CreateFormFile("f", "big.bin")
	if err != nil {
		s.Fatal(err)
	}
	if _, err := f.Write(make([]byte, 5<<20)); err != nil {
		s.Fatal(err)
	}
	if err := w.Close(); err != nil {
		s.Fatal(err)
	}
	req := s.request("POST", web.URL+"/upload", &form)
	req.Header.Set("Content-Type", w.FormDataContentType())
	res, err := c.Do(req)
	if err != nil {
		s.Fatal(err)
	}
	b, _ := io.ReadAll(res.Body)
	res.Body.Close()
	if string(b) != fmt.Sprint(5<<20) {
		s.Errorf("a form: %s %s", res.Status, b)
	}

	_, live := s.serve(image, full, schemas.Port{Name: "ws", Port: 8001}, version, "/srv/ws.py")
	ws, _, err := websocket.Dial(deadline(s), live.URL, &websocket.DialOptions{HTTPClient: s.client()})
	if err != nil {
		s.Fatal(err)
	}
	defer ws.CloseNow()
	ws.SetReadLimit(1 << 22)
	for _, text := range []string{"", "hello", strings.Repeat("ü", 1<<20)} {
		if err := ws.Write(deadline(s), websocket.MessageText, []byte(text)); err != nil {
			s.Fatal(err)
		}
		if kind, got, err := ws.Read(deadline(s)); err != nil || kind != websocket.MessageText || string(got) != text {
			s.Fatalf("%v, %d bytes, %v", kind, len(got), err)
		}
	}
	if err := ws.Close(websocket.StatusNormalClosure, ""); err != nil {
		s.Error(err)
	}
}

const nodeApp = `
require("http").createServer((req, res) => {
  if (req.url == "/events") {
    res.writeHead(200, {"content-type": "text/event-stream"});
    let n = 0;
    const timer = setInterval(() => res.write("data: " + n++ + "\n\n"), 20);
    res.on("close", () => clearInterval(timer));
    return;
  }
  let bytes = 0;
  req.on("data", (part) => bytes += part.length);
  req.on("end", () => { res.setHeader("content-type", "application/json"); res.end(JSON.stringify({bytes, host: req.headers.host, node: process.version})); });
}).listen(3000, "127.0.0.1");
`

func node(s *site) {
	r := newRootfs(s)
	r.programs("node")
	if _, err := os.Stat("/usr/share/nodejs/undici"); err == nil { // Debian's own has parts of it there
		r.packages("node-acorn", "node-cjs-module-lexer", "node-undici")
	}
	r.text("srv/app.js", nodeApp)
	_, web := s.serve(r.image(), map[string]any{"resources": map[string]any{"memory": "256MiB", "cpus": 1}}, schemas.Port{Name: "web", Port: 3000}, "node", "/srv/app.js")
	c := s.client()
	res, err := c.Do(s.request("POST", web.URL+"/", io.LimitReader(neverending{}, 20<<20)))
	if err != nil {
		s.Fatal(err)
	}
	var said struct {
		Bytes      int
		Host, Node string
	}
	err = json.NewDecoder(res.Body).Decode(&said)
	res.Body.Close()
	if err != nil || said.Bytes != 20<<20 || "http://"+said.Host != web.URL || !strings.HasPrefix(said.Node, "v") {
		s.Errorf("%+v, %v", said, err)
	}
	if res, err = c.Do(s.request("GET", web.URL+"/events", nil)); err != nil {
		s.Fatal(err)
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	for n := 0; n < 3; {
		if !lines.Scan() {
			s.Fatalf("the events end: %v", lines.Err())
		}
		if lines.Text() == fmt.Sprintf("data: %d", n) {
			n++
		}
	}
}

// An SSH server that is not root, by tunnel, and a client that knows nothing of dayfly.
func sshd(s *site) {
	dir := s.TempDir()
	for _, name := range []string{"host", "own"} {
		if out, err := exec.CommandContext(deadline(s), "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, name)).CombinedOutput(); err != nil {
			s.Fatalf("%v: %s (make setup installs it)", err, out)
		}
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			s.Fatal(err)
		}
		return string(b)
	}
	r := newRootfs(s)
	r.programs("sshd", "busybox")
	r.add(linkTo("bin/sh", "busybox"), nil)
	r.add(linkTo("bin/md5sum", "busybox"), nil)
	r.text("etc/ssh/host", read("host"))
	r.text("etc/ssh/keys", read("own.pub"))
	task, _ := s.serve(r.image(), nil, tcp("ssh", 2222), "/bin/sshd", "-D", "-e", "-f", "/dev/null", "-o", "ListenAddress=127.0.0.1:2222", "-o", "HostKey=/etc/ssh/host",
		"-o", "AuthorizedKeysFile=/etc/ssh/keys", "-o", "StrictModes=no", "-o", "PidFile=none", "-o", "Subsystem=sftp internal-sftp")
	_, port, _ := strings.Cut(s.forward(task.ID, "0:2222")[0], ":")
	known := filepath.Join(dir, "known")
	if err := os.WriteFile(known, []byte("[127.0.0.1]:"+port+" "+read("host.pub")), 0o600); err != nil {
		s.Fatal(err)
	}
	options := []string{"-F", "none", "-i", filepath.Join(dir, "own"), "-o", "UserKnownHostsFile=" + known, "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes"}
	sent := bytes.Repeat([]byte("dayfly"), 1<<20)
	ssh := exec.CommandContext(deadline(s), "ssh", append(slices.Clone(options), "-p", port, "task@127.0.0.1", "md5sum; echo over >&2; exit 7")...)
	ssh.Stdin = bytes.NewReader(sent)
	var errs bytes.Buffer
	ssh.Stderr = &errs
	out, _ := ssh.Output()
	if want := fmt.Sprintf("%x  -\n", md5.Sum(sent)); string(out) != want || ssh.ProcessState.ExitCode() != 7 || errs.String() != "over\n" {
		s.Errorf("ssh: %q, %q, %s", out, errs.String(), ssh.ProcessState)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, sent, 0o600); err != nil {
		s.Fatal(err)
	}
	for _, way := range [][]string{{file, "task@127.0.0.1:/tmp/file"}, {"task@127.0.0.1:/tmp/file", file + ".back"}} {
		scp := exec.CommandContext(deadline(s), "scp", append(append(slices.Clone(options), "-q", "-P", port), way...)...)
		if out, err := scp.CombinedOutput(); err != nil {
			s.Errorf("scp %v: %v: %s", way, err, out)
		}
	}
	if back, err := os.ReadFile(file + ".back"); err != nil || !bytes.Equal(back, sent) {
		s.Errorf("%d bytes came back, %v", len(back), err)
	}
}

// forward runs dayfly port-forward until the test is over, and says where it listens.
func (s *site) forward(id schemas.TaskID, ports ...string) (at []string) {
	s.Helper()
	b, err := binaries()
	if err != nil {
		s.Fatal(err)
	}
	cmd := exec.Command(b.bin, append([]string{"--url", s.up.URL, "port-forward", string(id)}, ports...)...)
	said, err := cmd.StderrPipe()
	if err != nil {
		s.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait()
	})
	lines := bufio.NewScanner(said)
	for range ports {
		lines.Scan()
		addr, rest, _ := strings.Cut(lines.Text(), " is port ")
		if rest == "" {
			s.Fatal(lines.Text(), lines.Err())
		}
		at = append(at, addr)
	}
	return at
}
