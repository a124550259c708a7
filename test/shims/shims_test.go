package shims

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	engine "github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/guest"
	"dayfly.dev/test/harness"
)

// patience bounds one script.
const patience = 3 * time.Minute

// images are those that the documents name, of a static busybox. They are made once, and
// by one process at a time, since everybody gives them these names.
var images = map[string][]string{
	"localhost:5000/orca-challenges/our-first-challenge:latest": {"EXPOSE 8080", `CMD ["sh","-c","mkdir /tmp/www && echo our first challenge > /tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www"]`},
	"localhost:5000/orca-challenges/no-port:latest":             {`CMD ["sleep","600"]`},
	"timboring/echo-server:latest":                              {"EXPOSE 7777", `CMD ["sh","-c","mkdir /tmp/www && echo ok > /tmp/www/health && exec httpd -f -p 7777 -h /tmp/www"]`},
	"strm/helloworld-http:latest":                               {"EXPOSE 8080", `CMD ["sh","-c","exec sleep 600"]`},
	"ghcr.io/example/web-demo:latest":                           {"EXPOSE 8080", `CMD ["sh","-c","mkdir /tmp/www && echo \"$FLAGS $FLAG $PRICE\" > /tmp/www/index.html && exec httpd -f -p 127.0.0.1:8080 -h /tmp/www"]`},
	"dayfly-shims/sandbox:latest":                               {"EXPOSE 8000", `CMD ["sleep","600"]`},
}

type built struct {
	dir, bin string
	lock     *os.File
}

var build = sync.OnceValues(func() (b built, err error) {
	if b.lock, err = os.Open("/bin/busybox"); err != nil { // any file will do that is always there
		return b, fmt.Errorf("a static busybox is needed: %w", err)
	}
	if err = syscall.Flock(int(b.lock.Fd()), syscall.LOCK_EX); err != nil {
		return b, err
	}
	if b.dir, err = os.MkdirTemp("", "dayfly-shims-"); err != nil {
		return b, err
	}
	if b.bin, err = harness.Binaries(context.Background(), b.dir); err != nil {
		return b, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for name, changes := range images {
		if err := harness.MakeShell(ctx, name, nil, changes...); err != nil {
			return b, err
		}
	}
	archive, err := python()
	if err != nil {
		return b, err
	}
	docker, err := engine.New(engine.FromEnv)
	if err != nil {
		return b, err
	}
	defer docker.Close()
	_, err = guest.ImportImage(ctx, docker, archive, jobImage, `ENTRYPOINT ["/usr/bin/python3","-I","/runner.py"]`)
	return b, err
})

func TestMain(m *testing.M) {
	code := m.Run()
	b, _ := build()
	for name := range allImages() {
		if err := harness.RemoveImage(context.Background(), name); err != nil {
			fmt.Fprintln(os.Stderr, err) // it stays
		}
	}
	os.RemoveAll(b.dir)
	if b.lock != nil {
		b.lock.Close()
	}
	os.Exit(code)
}

// up starts a dayfly with a shim and gives the shim's address.
func up(t *testing.T, ctx context.Context, name string, args ...string) (*harness.Up, string) {
	t.Helper()
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	u := harness.NewFor(t, b.bin, append([]string{"--shim", name + "=127.0.0.1:0"}, args...)...)
	if err := u.Start(ctx); err != nil {
		t.Fatal(err)
	}
	var addrs harness.Addrs
	file, err := os.ReadFile(filepath.Join(u.Dir, "addrs.json"))
	if err == nil {
		err = json.Unmarshal(file, &addrs)
	}
	if err != nil || addrs.Shims[name] == "" {
		t.Fatalf("no address of the shim %s in %s (%v)", name, file, err)
	}
	return u, addrs.Shims[name]
}

// flags are what a shim needs beside --shim.
var flags = map[string][]string{
	"gridx":  {"--allow", "entrypoint,tmpfs,mounts"},
	"judge0": {"--callback-allow", "127.0.0.1/32"},
	"rctf":   {"--cpus", "64"}, // one of 64 waits beside any other
}

// Each script runs against a dayfly of its own.
func TestConformance(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".txt")
		t.Run(name, func(t *testing.T) {
			token := filepath.Join(t.TempDir(), "token")
			if err := os.WriteFile(token, []byte("a-token-that-nobody-guesses\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			args := append([]string{"--shim-token-file", token}, flags[name]...)
			if name == "judge0" {
				args = append(args, "--kinds", kindsFolder(t))
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			u, url := up(t, ctx, name, args...)
			s := &script{TB: t, file: file, url: url, vars: map[string]string{
				"token": "a-token-that-nobody-guesses",
				"large": strings.Repeat(`\"`, 450<<10), // in JSON
			}}
			s.checks = map[string]func([]string) error{
				"says": func(args []string) error { return says(ctx, u, args[0], strings.Join(args[1:], " ")) },
				"connect": func(args []string) error {
					return says(ctx, u, "http://"+args[0]+":"+args[1], strings.Join(args[2:], " "))
				},
			}
			s.checks["exec"] = func(args []string) error {
				var done schemas.ExecResult
				err := u.Call(ctx, "POST", "/v1/tasks/"+args[0]+"/exec", schemas.ExecRequest{Command: append([]string{"/usr/bin/python3", "-c", "import sys; open(sys.argv[2], 'w')"}, args[1:]...)}, &done)
				if err == nil && done.ExitCode != 0 {
					err = fmt.Errorf("%v ended with %d: %s", args, done.ExitCode, done.Stderr)
				}
				return err
			}
			s.receive()
			for name, check := range engineChecks(t, ctx) {
				s.checks[name] = check
			}
			s.run(ctx)
		})
	}
}

// says asks a task by its URL.
func says(ctx context.Context, u *harness.Up, address, want string) error {
	at, err := url.Parse(address)
	if err != nil {
		return harness.Fatal(err)
	}
	host := at.Host
	if strings.HasSuffix(at.Hostname(), ".localhost") { // not every resolver knows them
		at.Host = u.Ingress
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return harness.Fatal(err)
	}
	req.Host = host
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && (res.StatusCode != http.StatusOK || strings.TrimSpace(string(body)) != want) {
		err = fmt.Errorf("%s says %s %q, not %q", address, res.Status, body, want)
	}
	return err
}
