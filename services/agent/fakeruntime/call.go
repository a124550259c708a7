package fakeruntime

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// up says whether a run is there that can be asked. It runs under r.mu.
func (a *attempt) up() error {
	a.catchUp(a.r.Now())
	if !a.run.Up {
		return agent.ErrAway
	}
	return nil
}

// Dial implements agent.Attempt, for the commands http and tcp. The other side ends
// with the connection, and the connection at the latest with the run.
func (a *attempt) Dial(_ context.Context, port int) (net.Conn, error) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	if err := a.up(); err != nil {
		return nil, err
	}
	serve := a.echo
	if is(a.req.Spec, "http", fmt.Sprint(port)) {
		began := a.began
		serve = func(c net.Conn) { a.serveHTTP(c, began) }
	} else if !is(a.req.Spec, "tcp", fmt.Sprint(port)) {
		return nil, fmt.Errorf("dial port %d: connection refused", port)
	}
	ours, theirs := net.Pipe()
	a.conns = append(a.conns, theirs)
	go func() { // ends when either side closes; the caller waits for that by reading
		defer theirs.Close()
		serve(theirs)
	}()
	return ours, nil
}

func (a *attempt) echo(c net.Conn) { _, _ = io.Copy(c, c) }

func (a *attempt) serveHTTP(c net.Conn, began time.Duration) {
	req, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil {
		return
	}
	code := 200
	if n, ok := strings.CutPrefix(req.URL.Path, "/status/"); ok {
		code = number(n)
	}
	if d, ok := strings.CutPrefix(req.URL.Path, "/until/"); ok {
		if d, err := time.ParseDuration(d); err == nil && a.r.Now()-began > d {
			code = 500
		}
	}
	fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n", code, http.StatusText(code))
}

// Exec implements agent.Attempt, for echo, exit and sleep.
func (a *attempt) Exec(ctx context.Context, c agent.Command) (schemas.Exit, error) {
	a.r.mu.Lock()
	err := a.up()
	done, runs := a.done, a.runs
	a.r.mu.Unlock()
	size := 0
	for _, w := range c.Argv {
		size += len(w)
	}
	switch {
	case err != nil:
		return schemas.Exit{}, err
	case len(c.Argv) == 0 || size > 16<<10:
		return schemas.Exit{}, errors.New("no command, or one that is too long")
	}
	argv := append(append([]string(nil), c.Argv...), "", "")
	switch filepath.Base(argv[0]) {
	case "echo":
		if c.Stdout != nil {
			fmt.Fprintln(c.Stdout, strings.Join(c.Argv[1:], " "))
		}
		return schemas.Exit{}, nil
	case "exit":
		return schemas.Exit{Code: number(argv[1])}, nil
	case "sleep":
		d, _ := time.ParseDuration(argv[1])
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
			return schemas.Exit{}, nil
		case <-ctx.Done():
			return schemas.Exit{}, context.Cause(ctx)
		case <-done:
		case <-runs:
		}
		return schemas.Exit{Code: 137, Signal: 9}, nil
	}
	return schemas.Exit{Code: 127}, nil
}
