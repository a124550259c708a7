package fakeruntime

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

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
func (a *attempt) Dial(_ context.Context, port int) (agent.Conn, error) {
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
		return nil, fmt.Errorf("%w: port %d", agent.ErrRefused, port)
	}
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	a.conns = append(a.conns, theirs)
	go func() { // ends when either side closes; the caller waits for that by reading
		defer theirs.Close()
		serve(theirs)
	}()
	return ours, nil
}

// pair makes a connection whose directions end each by itself.
func pair() (ours, theirs *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "dialed")
		c, e := net.FileConn(f) // a duplicate
		_ = f.Close()
		if e != nil {
			err = e
			continue
		}
		ends[i] = c.(*net.UnixConn)
	}
	if err != nil {
		for _, c := range ends {
			if c != nil {
				_ = c.Close()
			}
		}
		return nil, nil, err
	}
	return ends[0], ends[1], nil
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
