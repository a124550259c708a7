//go:build docs

// Package docs runs what the guides and the README tell their readers to type, against
// a dayfly of its own on this machine's Docker, so that no example rots.
//
// In a page, a block fenced as
//
//	```sh serve   is one command that stays in the foreground; it is started in turn
//	```sh         is run by bash, all blocks of a page in one shell
//	```text       is what the block before it prints on stdout, line by line and in this
//	              order; other lines may stand between
//	```go program is the program of test/docs/service, which is there as `service`
//
// Any other block is only shown. Names of images become that of a small local image,
// addresses become free ports.
package docs

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"dayfly.dev/services/agent/guest"
	"dayfly.dev/test/harness"
)

var bin string // a folder with dayfly, dayfly-init and service

func TestMain(m *testing.M) {
	harness.Main(m, func(dir, _ string) error {
		bin = dir
		return guest.BuildBinary(context.Background(), "dayfly.dev/test/docs/service", filepath.Join(dir, "service"))
	})
}

func TestReadme(t *testing.T) { run(t, "../../README.md", "dayfly up --data data") }

func TestGuides(t *testing.T) {
	pages, err := filepath.Glob("../../docs/guides/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatal("no guides", err)
	}
	for _, page := range pages {
		t.Run(strings.TrimSuffix(filepath.Base(page), ".md"), func(t *testing.T) { run(t, page) })
	}
}

// block is one fenced block of a page.
type block struct {
	kind string
	line int
	text string
}

func blocks(t *testing.T, page string) (list []block) {
	t.Helper()
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	in := false
	for i, line := range strings.SplitAfter(string(b), "\n") {
		switch fence, ok := strings.CutPrefix(strings.TrimSpace(line), "```"); {
		case ok && !in:
			list = append(list, block{kind: fence, line: i + 1})
			in = true
		case ok:
			in = false
		case in:
			list[len(list)-1].text += line
		}
	}
	return list
}

// images are the names that the pages use.
var images = regexp.MustCompile(`\b(registry\.lan/[a-z]+/[a-z]+:1|busybox|python:3)\b`)

// run does what a page says. serve are commands that it takes for granted.
func run(t *testing.T, page string, serve ...string) {
	image := makeImage(t)
	cluster := strings.TrimPrefix(image, "dayfly-docs:")
	dir := t.TempDir()
	http, nats := freeAddress(t), freeAddress(t)
	translate := func(text string) string {
		text = images.ReplaceAllString(text, image)
		return strings.NewReplacer("127.0.0.1:8080", http, "10.0.0.1:4222", nats, "bin/dayfly", "dayfly").Replace(text)
	}
	env := append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "HOME="+dir, "DAYFLY_URL=http://"+http)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := errors.Join(harness.RemoveContainers(ctx, cluster), harness.RemoveImage(ctx, image)); err != nil {
			t.Error(err)
		}
	})
	for _, command := range serve {
		start(t, dir, translate(command), append(env, serving(http, cluster)...))
	}
	if err := os.WriteFile(filepath.Join(dir, "sol.py"), []byte("print(42)\n"), 0o600); err != nil {
		t.Fatal(err)
	}

	sh := newShell(t, dir, env)
	var said string
	for _, b := range blocks(t, page) {
		switch b.kind {
		case "sh serve":
			start(t, dir, translate(b.text), append(env, serving(http, cluster)...))
		case "sh":
			said = sh.do(t, fmt.Sprintf("%s:%d", page, b.line), translate(b.text))
		case "text":
			rest := said
			for line := range strings.Lines(b.text) {
				line = strings.TrimSpace(line)
				if line == "…" {
					continue
				}
				_, after, ok := strings.Cut(rest, line)
				if !ok {
					t.Errorf("%s:%d: %q is not in what was printed:\n%s", page, b.line, line, said)
					break
				}
				rest = after
			}
		case "go program":
			if want, err := os.ReadFile("service/main.go"); err != nil || !strings.HasSuffix(string(want), b.text) || !strings.HasPrefix(b.text, "package main\n") {
				t.Errorf("%s:%d: the program is not that of test/docs/service (%v)", page, b.line, err)
			}
		}
	}
}

// serving is how a process that serves is kept from those of others on this machine.
func serving(http, cluster string) []string {
	return []string{"DAYFLY_HTTP=" + http, "DAYFLY_INGRESS=127.0.0.1:0", "DAYFLY_ADMIN=127.0.0.1:0", "DAYFLY_CLUSTER=" + cluster}
}

// start starts a command and waits until it says that it is up.
func start(t *testing.T, dir, command string, env []string) {
	t.Helper()
	log, err := os.CreateTemp(dir, "log-")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("bash", "-c", "exec "+command)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, env, log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	err = harness.Poll(ctx, func() error {
		b, err := os.ReadFile(log.Name())
		if err != nil || strings.Contains(string(b), " is up: ") {
			return err
		}
		select {
		case err := <-ended:
			ended <- err
			return harness.Fatal(fmt.Errorf("%s ended: %v\n%s", command, err, b))
		default:
			return fmt.Errorf("%s is not up:\n%s", command, b)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// shell is one bash to which blocks are given one after the other.
type shell struct {
	in, out *os.File
}

func newShell(t *testing.T, dir string, env []string) *shell {
	t.Helper()
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	// It reads its script from another descriptor than the commands' standard input.
	cmd := exec.Command("bash", "-euo", "pipefail", "/dev/fd/3")
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = dir, env, outW, outW, []*os.File{inR}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	inR.Close()
	outW.Close()
	t.Cleanup(func() {
		inW.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		outR.Close()
	})
	return &shell{in: inW, out: outR}
}

// do runs a block and gives what it printed. One that fails ends the page.
func (s *shell) do(t *testing.T, where, text string) string {
	t.Helper()
	end := "end-of-" + rand.Text()
	if _, err := fmt.Fprintf(s.in, "%s\necho %s\n", text, end); err != nil {
		t.Fatalf("%s: %v", where, err)
	}
	if err := s.out.SetReadDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	for {
		b := make([]byte, 64<<10)
		n, err := s.out.Read(b)
		said.Write(b[:n])
		if before, _, ok := strings.Cut(said.String(), end); ok {
			return before
		}
		if err != nil {
			t.Fatalf("%s failed (%v):\n%s\nprinted\n%s", where, err, text, said.String())
		}
	}
}

// makeImage makes an image with a shell, which is its python too: the programs of the pages
// only print.
func makeImage(t *testing.T) string {
	t.Helper()
	name := "dayfly-docs:t" + strings.ToLower(rand.Text()[:10])
	if err := harness.MakeShell(t.Context(), name, map[string]string{"bin/python": "#!/bin/sh\nsed 's/^print(\\(.*\\))$/echo \\1/' \"$1\" >/tmp/program && shift && exec sh /tmp/program \"$@\"\n"}); err != nil {
		t.Fatal(err)
	}
	return name
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
