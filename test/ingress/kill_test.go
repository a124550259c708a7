package ingress

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/coder/websocket"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// cluster is a site of processes, with one agent on the real Docker.
func cluster(t *testing.T) (*harness.Site, string) {
	t.Helper()
	b, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	from, to := freePorts(t, 4)
	s, err := harness.NewSite(deadline(t), harness.SiteOptions{Bin: b.bin, GatewayArgs: []string{"--tcp-ports", fmt.Sprintf("%d-%d", from, to)}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if t.Failed() {
			for _, p := range s.All() {
				t.Log(p.Name, p.Tail())
			}
		}
		if err := s.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	return s, b.image
}

// Gateway and agent are killed in the middle of each kind of connection. Each ends
// clearly, and afterwards all works again, at the same addresses. NATS is killed, and they
// go on.
func TestKilledInTheMiddle(t *testing.T) {
	cl, image := cluster(t)
	s := &site{t, &harness.Up{}, image}
	at := func() {
		s.up.URL, s.up.Admin = cl.Gateway[0].Addrs.HTTP, cl.Gateway[0].Addrs.Admin
		_, s.up.Ingress, _ = strings.Cut(cl.Gateway[0].Addrs.Ingress, "://")
	}
	at()
	task := s.run(web(8080), tcp("shell", 7000))
	url, shell := task.Endpoints[0].URL, task.Endpoints[1]
	c := s.client()
	api := s.api()
	for _, victim := range []*harness.Process{cl.Gateway[0], cl.Agent[0]} {
		var ends sync.WaitGroup
		ended := func(kind string, wait func() error) {
			ends.Go(func() {
				if err := wait(); err == nil {
					t.Errorf("%s: a broken %s ends as if it were whole", victim.Name, kind)
				}
			})
		}
		res, err := c.Do(s.request("GET", url+"/sse/2", nil))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		ws, _, err := websocket.Dial(deadline(t), url+"/ws", &websocket.DialOptions{HTTPClient: c})
		if err != nil {
			t.Fatal(err)
		}
		defer ws.CloseNow()
		tunnel, err := api.Tunnel(deadline(t), task.ID, 7000)
		if err != nil {
			t.Fatal(err)
		}
		defer tunnel.Close()
		raw, err := dialEndpoint(shell)
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		for _, conn := range []io.ReadWriter{tunnel, raw} {
			if _, err := io.WriteString(conn, "x"); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		in := bufio.NewReader(res.Body)
		if _, err := in.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		victim.Kill()
		if err := victim.Start(deadline(t)); err != nil {
			t.Fatal(err)
		}
		at()
		if err := victim.Ready(deadline(t)); err != nil {
			t.Fatal(err)
		}
		ended("stream of events", func() error { _, err := io.Copy(io.Discard, in); return err })
		ended("WebSocket", func() error { _, _, err := ws.Read(deadline(t)); return err })
		ended("tunnel", func() error { _, err := io.ReadAll(tunnel); return err })
		ends.Go(func() { _, _ = io.ReadAll(raw) }) // TCP may not tell a crash from an end
		ends.Wait()

		err = harness.Poll(deadline(t), func() error {
			res, err := c.Do(s.request("GET", url+"/", nil))
			if err != nil {
				return err
			}
			defer res.Body.Close()
			if b, err := io.ReadAll(res.Body); err != nil || string(b) != "hello\n" {
				return fmt.Errorf("%s %q, %v", res.Status, b, err)
			}
			for _, dial := range []func() (io.ReadWriteCloser, error){
				func() (io.ReadWriteCloser, error) { return dialEndpoint(shell) },
				func() (io.ReadWriteCloser, error) { return s.api().Tunnel(deadline(t), task.ID, 7000) },
			} {
				conn, err := dial()
				if err != nil {
					return err
				}
				_, err = io.WriteString(conn, "y")
				if err == nil {
					_, err = io.ReadFull(conn, make([]byte, 1))
				}
				conn.Close()
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Errorf("after %s was killed: %v", victim.Name, err)
		}
	}

	// NATS is killed: everything stands still, and goes on.
	ws, _, err := websocket.Dial(deadline(t), url+"/ws", &websocket.DialOptions{HTTPClient: c})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	tunnel, err := s.api().Tunnel(deadline(t), task.ID, 7000)
	if err != nil {
		t.Fatal(err)
	}
	defer tunnel.Close()
	raw, err := dialEndpoint(shell)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	body, write := io.Pipe()
	res, err := c.Do(s.request("POST", url+"/echo", io.MultiReader(strings.NewReader("x"), body)))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	request := struct {
		io.Reader
		io.Writer
	}{res.Body, write}
	echo := func(conn io.ReadWriter, text string) {
		t.Helper()
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(text))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
			t.Fatalf("%q, %v", got, err)
		}
	}
	if _, err := io.ReadFull(res.Body, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"before", "after"} {
		for _, conn := range []io.ReadWriter{tunnel, raw, request} {
			echo(conn, text)
		}
		if err := ws.Write(deadline(t), websocket.MessageText, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if _, got, err := ws.Read(deadline(t)); err != nil || string(got) != text {
			t.Fatalf("WebSocket: %q, %v", got, err)
		}
		if text == "before" {
			cl.NATS[0].Kill()
			if err := cl.NATS[0].Start(deadline(t)); err != nil {
				t.Fatal(err)
			}
		}
	}
	write.Close()
	if err := cl.Call(deadline(t), 0, "DELETE", "/v1/tasks/"+string(task.ID)+"?grace=0s", nil, nil); err != nil {
		t.Error(err)
	}
}

// counts are what may leak in a process.
func counts(p *harness.Process) (goroutines, files int, err error) {
	res, err := http.Get(p.Addrs.Admin + "/debug/pprof/goroutine?debug=1")
	if err != nil {
		return 0, 0, err
	}
	defer res.Body.Close()
	if _, err = fmt.Fscanf(res.Body, "goroutine profile: total %d", &goroutines); err != nil {
		return 0, 0, err
	}
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID()))
	return goroutines, len(list), err
}

// A thousand requests, tunnels and connections, many of them broken off, leave nothing
// behind in the gateway, in the agent or in the task.
func TestNothingIsLeftOfAThousandVisits(t *testing.T) {
	cl, image := cluster(t)
	s := &site{t, &harness.Up{URL: cl.Gateway[0].Addrs.HTTP, Admin: cl.Gateway[0].Addrs.Admin}, image}
	_, s.up.Ingress, _ = strings.Cut(cl.Gateway[0].Addrs.Ingress, "://")
	task := s.run(web(8080), tcp("shell", 7000))
	url, shell := task.Endpoints[0].URL, task.Endpoints[1]
	api := s.api()
	visit := func(i int) error {
		switch i % 5 {
		case 0, 1: // each over a connection of its own
			c := s.client()
			defer c.CloseIdleConnections()
			res, err := c.Do(s.request("GET", url+"/headers", nil))
			if err != nil {
				return err
			}
			defer res.Body.Close()
			b, err := io.ReadAll(res.Body)
			if err == nil && res.StatusCode != 200 {
				err = fmt.Errorf("%s %s", res.Status, b)
			}
			return err
		case 2: // broken off
			c := s.client()
			defer c.CloseIdleConnections()
			ctx, cancel := context.WithCancel(deadline(t))
			res, err := c.Do(s.request("GET", url+"/sse/3", nil).WithContext(ctx))
			cancel()
			if err == nil {
				res.Body.Close()
			}
			return nil
		case 3:
			conn, err := api.Tunnel(deadline(t), task.ID, 7000)
			if err != nil {
				return err
			}
			_, err = io.WriteString(conn, "x")
			return errors.Join(err, conn.Close())
		}
		conn, err := dialEndpoint(shell)
		if err != nil {
			return err
		}
		_, err = io.WriteString(conn, "x")
		return errors.Join(err, conn.Close())
	}
	visits := func(n int) {
		var all sync.WaitGroup
		next := make(chan int)
		for range 8 {
			all.Go(func() {
				for i := range next {
					if err := visit(i); err != nil {
						t.Errorf("visit %d: %v", i, err)
					}
				}
			})
		}
		for i := range n {
			next <- i
		}
		close(next)
		all.Wait()
	}
	type count struct{ goroutines, files int }
	processes := []*harness.Process{cl.Gateway[0], cl.Agent[0]}
	before := make([]count, len(processes))
	visits(20) // what is made once and kept
	for i, p := range processes {
		var err error
		if before[i].goroutines, before[i].files, err = counts(p); err != nil {
			t.Fatal(err)
		}
	}
	visits(1000)
	err := harness.Poll(deadline(t), func() error { // connections that are kept go after a while
		for i, p := range processes {
			goroutines, files, err := counts(p)
			if err != nil {
				return err
			}
			if goroutines > before[i].goroutines+5 || files > before[i].files+5 {
				return fmt.Errorf("%s has %d goroutines and %d descriptors, before %+v", p.Name, goroutines, files, before[i])
			}
		}
		if open := s.metric("dayfly_ingress_connections_open", `kind="http"`); open != "0" {
			return fmt.Errorf("%s connections of visitors are open", open)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	var now schemas.Task
	if err := cl.Call(deadline(t), 0, "DELETE", "/v1/tasks/"+string(task.ID)+"?grace=0s", nil, &now); err != nil {
		t.Error(err)
	}
}
