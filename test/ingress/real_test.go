package ingress

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/guest"
	"dayfly.dev/test/harness"
)

var library = regexp.MustCompile(`(/\S+) \(0x`)

// programImage makes an image of programs of this machine, with the libraries that they
// need, and of files.
func programImage(t *testing.T, files map[string]string, programs ...string) string {
	t.Helper()
	paths := map[string]string{} // in the image, and here
	for _, name := range programs {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatalf("%v (make setup installs it)", err)
		}
		out, err := exec.Command("ldd", path).Output()
		if err != nil {
			t.Fatal(err)
		}
		paths["bin/"+name] = path
		for _, m := range library.FindAllSubmatch(out, -1) {
			paths[strings.TrimPrefix(string(m[1]), "/")] = string(m[1])
		}
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	made := map[string]bool{}
	var folder func(string)
	folder = func(dir string) {
		if dir == "." || made[dir] {
			return
		}
		folder(filepath.Dir(dir))
		made[dir] = true
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}); err != nil {
			t.Fatal(err)
		}
	}
	add := func(path string, mode int64, body []byte) {
		folder(filepath.Dir(path))
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: mode, Size: int64(len(body))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			t.Fatal(err)
		}
	}
	for path, from := range paths {
		body, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		add(path, 0o755, body)
	}
	for path, text := range files {
		add(path, 0o644, []byte(text))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	engine, err := client.New(client.FromEnv)
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	name := "dayfly-real:" + strings.ToLower(rand.Text()[:10])
	if _, err := guest.ImportImage(deadline(t), engine, archive.Bytes(), name, "ENV PATH=/bin"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := harness.RemoveImage(context.Background(), name); err != nil {
			t.Error(err)
		}
	})
	return name
}

// Programs that nobody here wrote, each the way its own users reach it.
func TestRealPrograms(t *testing.T) {
	nginx := programImage(t, map[string]string{"etc/passwd": "root:x:0:0::/:/\ntask:x:1000:1000::/:/\n", "www/index.html": "from nginx",
		"etc/nginx.conf": "daemon off; pid /tmp/pid; error_log stderr; events {} http { access_log off; client_body_temp_path /tmp/a; proxy_temp_path /tmp/b;" +
			" fastcgi_temp_path /tmp/c; uwsgi_temp_path /tmp/d; scgi_temp_path /tmp/e; server { listen 127.0.0.1:8080; root /www; } }"}, "nginx")
	redis := programImage(t, nil, "redis-server")
	socat := programImage(t, nil, "socat", "cat")
	s := start(t)
	run := func(image string, port schemas.Port, command ...string) schemas.Endpoint {
		t.Helper()
		s.image = image
		task := s.create(map[string]any{"command": command, "ports": []schemas.Port{port},
			"health": map[string]any{"tcp": map[string]any{"port": port.Port}, "interval": "100ms"}}, "?wait=running")
		err := harness.Poll(deadline(t), func() error {
			var now schemas.Task
			if err := s.up.Call(deadline(t), "GET", "/v1/tasks/"+string(task.ID), nil, &now); err != nil {
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
			t.Fatalf("%s: %v", command[0], err)
		}
		return task.Endpoints[0]
	}

	web := run(nginx, schemas.Port{Name: "web", Port: 8080}, "nginx", "-p", "/tmp", "-c", "/etc/nginx.conf")
	res, err := s.client().Do(s.request("GET", web.URL+"/", nil))
	if err != nil {
		t.Fatal(err)
	}
	text, _ := io.ReadAll(res.Body)
	res.Body.Close()
	if string(text) != "from nginx" || !strings.HasPrefix(res.Header.Get("Server"), "nginx") {
		t.Errorf("nginx: %s %q", res.Status, text)
	}

	db := run(redis, tcp("db", 6379), "redis-server", "--bind", "127.0.0.1", "--save", "", "--dir", "/tmp")
	out, err := exec.CommandContext(deadline(t), "redis-cli", "-h", "127.0.0.1", "-p", fmt.Sprint(db.Port), "SET", "k", "v").CombinedOutput()
	if err != nil || string(out) != "OK\n" {
		t.Errorf("redis: %q, %v (make setup installs redis-cli)", out, err)
	}
	bench := exec.CommandContext(deadline(t), "redis-benchmark", "-h", "127.0.0.1", "-p", fmt.Sprint(db.Port), "-n", "2000", "-c", "20", "-t", "get", "-q")
	if out, err := bench.CombinedOutput(); err != nil || !strings.Contains(string(out), "requests per second") {
		t.Errorf("redis: %q, %v", out, err)
	}

	pwn := run(socat, tcp("pwn", 1337), "socat", "TCP-LISTEN:1337,bind=127.0.0.1,reuseaddr,fork", "EXEC:/bin/cat")
	c, err := dialEndpoint(pwn)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "litmus\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(c).ReadString('\n'); line != "litmus\n" {
		t.Errorf("socat: %q, %v", line, err)
	}
}
