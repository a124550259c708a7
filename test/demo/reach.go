package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// web starts a web server without any network, and asks it by its URL.
func (d *demo) web(ctx context.Context) (string, error) {
	var t schemas.Task
	err := d.up.Call(ctx, "POST", "/v1/tasks?wait=running&timeout=30s", map[string]any{
		"image": d.image, "command": []string{"http", "8080"}, "ttl": "5m", "network": "none",
		"ports": []map[string]any{{"name": "web", "port": 8080}},
	}, &t)
	if err != nil {
		return "", err
	}
	d.site = t.ID
	if len(t.Endpoints) != 1 {
		return "", fmt.Errorf("it has %d endpoints", len(t.Endpoints))
	}
	// A browser finds *.localhost by itself; not every resolver does.
	var dialer net.Dialer
	over := &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return dialer.DialContext(ctx, network, d.up.Ingress)
	}}
	defer over.CloseIdleConnections()
	page := ""
	err = harness.Poll(ctx, func() error {
		req, err := http.NewRequestWithContext(ctx, "GET", t.Endpoints[0].URL, nil)
		if err != nil {
			return harness.Fatal(err)
		}
		res, err := over.RoundTrip(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if page = strings.TrimSpace(string(b)); err == nil && res.StatusCode != http.StatusOK {
			err = errors.New(res.Status)
		}
		return err
	})
	return fmt.Sprintf("%s says %q", t.Endpoints[0].URL, page), err
}

// reach puts a file into the web server's container, and reads it there.
func (d *demo) reach(ctx context.Context) (string, error) {
	c, err := client.New(d.up.URL)
	if err != nil {
		return "", err
	}
	const text = "put there while it runs"
	if _, err := c.PutFile(ctx, d.site, "/tmp/note", strings.NewReader(text), int64(len(text)), 0o644); err != nil {
		return "", err
	}
	began := time.Now()
	res, err := c.Exec(ctx, d.site, schemas.ExecRequest{Command: []string{"/bin/cat", "/tmp/note"}})
	if err != nil {
		return "", err
	}
	if res.ExitCode != 0 || strings.TrimSpace(res.Stdout) != text {
		return "", fmt.Errorf("exit code %d, %q", res.ExitCode, res.Stdout)
	}
	took := time.Since(began)
	return fmt.Sprintf("the command took %.1f ms", float64(took.Microseconds())/1000), d.up.Call(ctx, "DELETE", "/v1/tasks/"+string(d.site)+"?grace=0s", nil, nil)
}

// terminal runs `dayfly run -it` as a person at a terminal does.
func (d *demo) terminal(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, d.up.Bin, "--url", d.up.URL, "run", "-it", "--ttl", "5m", d.image, "terminal")
	person, err := harness.OnTerminal(30, 100, cmd)
	if err != nil {
		return "", err
	}
	defer person.Close()
	var mu sync.Mutex
	var screen strings.Builder
	go func() { // ends with the terminal
		b := make([]byte, 4096)
		for {
			n, err := person.Read(b)
			mu.Lock()
			screen.Write(b[:n])
			mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	shows := func(text string) error {
		return harness.Poll(ctx, func() error {
			mu.Lock()
			defer mu.Unlock()
			if !strings.Contains(screen.String(), text) {
				return fmt.Errorf("the terminal does not show %q but %q", text, screen.String())
			}
			return nil
		})
	}
	for _, step := range []func() error{
		func() error { return shows("on /dev/pts/0 30x100") },
		func() error { _, err := person.WriteString("hello\r"); return err },
		func() error { return shows("got hello") },
		func() error {
			return unix.IoctlSetWinsize(int(person.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: 132})
		},
		func() error { return shows("now 50x132") },
		func() error { _, err := person.WriteString("\x03"); return err },
		func() error { return shows("interrupted") },
	} {
		if err := step(); err != nil {
			return "", err
		}
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		return "", fmt.Errorf("exit code %d, not 130", code)
	}
	return "30x100, then 50x132; Ctrl-C ended it with 130", nil
}
