//go:build cluster

package cluster

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// balancer is one address for several gateways: a connection goes to the one that took
// the last, and to the next once that is gone.
type balancer struct {
	net.Listener
	to []string
	at atomic.Int64
}

func balance(t testing.TB, gateways []*harness.Process) *balancer {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{Listener: ln}
	for _, g := range gateways {
		b.to = append(b.to, strings.TrimPrefix(g.Addrs.HTTP, "http://"))
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { b.pass(c) })
		}
	})
	t.Cleanup(func() { ln.Close(); serving.Wait() })
	return b
}

func (b *balancer) pass(c net.Conn) {
	defer c.Close()
	at := b.at.Load()
	up, err := net.Dial("tcp", b.to[at])
	if err != nil {
		b.at.CompareAndSwap(at, (at+1)%int64(len(b.to)))
		return // whoever asks again comes to the next
	}
	defer up.Close()
	var asking sync.WaitGroup
	defer asking.Wait()
	asking.Go(func() { _, _ = io.Copy(up, c); up.Close() })
	_, _ = io.Copy(c, up)
	c.Close()
}

// heard is what a follower was told.
type heard struct {
	mu  sync.Mutex
	all []schemas.TaskEvent // under mu
}

func (h *heard) add(data []byte) error {
	var e schemas.TaskEvent
	if err := schemas.Decode(data, &e); err != nil {
		return fmt.Errorf("%s is no event: %w", data, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all = append(h.all, e)
	return nil
}

func (h *heard) events() []schemas.TaskEvent {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.all)
}

// byEventSource reads as a browser does: what it goes on from is the id of the last
// event that came whole.
func (h *heard) byEventSource(ctx context.Context, url string) error {
	last := ""
	connection := func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/v1/events", nil)
		if err != nil {
			return err
		}
		req.Header.Set("Accept", "text/event-stream")
		if last != "" {
			req.Header.Set("Last-Event-ID", last)
		}
		res, err := http.DefaultTransport.RoundTrip(req)
		if err != nil || res.StatusCode >= 500 {
			return nil // it asks again
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return errors.New(res.Status)
		}
		id, data := "", []byte(nil)
		for in := bufio.NewReader(res.Body); ; {
			line, err := in.ReadBytes('\n')
			if err != nil {
				return nil
			}
			name, value, _ := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(": "))
			switch string(name) {
			case "id":
				id = string(value)
			case "data":
				data = value
			case "":
				if data != nil {
					if err := h.add(data); err != nil {
						return err
					}
				}
				if id != "" {
					last = id
				}
				id, data = "", nil
			}
		}
	}
	for ctx.Err() == nil {
		if err := connection(); err != nil {
			return err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return nil
}

// byCommand reads what `dayfly events -f` prints.
func (h *heard) byCommand(ctx context.Context, url string) error {
	cmd := exec.CommandContext(ctx, binary, "events", "-f", "-o", "json", "--url", url)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(out)
	for err == nil && lines.Scan() {
		err = h.add(lines.Bytes())
	}
	if e := cmd.Wait(); e != nil && ctx.Err() == nil {
		err = errors.Join(err, fmt.Errorf("%w: %s", e, &said))
	}
	return err
}

// Gateways are killed under those who follow all events through one address. Each goes
// on at the other one, and in the end has heard every event once, in order.
func TestFollowersOfEventsMissAndDoubleNothing(t *testing.T) {
	s := start(t, harness.SiteOptions{NATS: 3, Gateways: 2, Agents: 2, Fake: true, Scale: 0.2})
	b := balance(t, s.Gateway)
	url := "http://" + b.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	var following sync.WaitGroup
	defer following.Wait()
	defer cancel()
	followers := map[string]*heard{"an EventSource": {}, "dayfly events -f": {}}
	for name, read := range map[string]func(*heard, context.Context, string) error{"an EventSource": (*heard).byEventSource, "dayfly events -f": (*heard).byCommand} {
		following.Go(func() {
			if err := read(followers[name], ctx, url); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	hear := func(what string, of func(*heard) bool) {
		t.Helper()
		eventually(t, what, func() error {
			for name, h := range followers {
				if !of(h) {
					return fmt.Errorf("%s has not, after %d events", name, len(h.events()))
				}
			}
			return nil
		})
	}
	// ended says whether a follower has heard of the end of a task.
	ended := func(id schemas.TaskID) func(*heard) bool {
		return func(h *heard) bool {
			return slices.ContainsFunc(h.events(), func(e schemas.TaskEvent) bool { return e.Task == id && e.State == schemas.Completed })
		}
	}
	finish := traffick(t, s, 3)
	hear("all hear of a task", ended(create(t, s, spec("exit", "0")).ID))
	for range 4 {
		at := b.at.Load()
		g := s.Gateway[at]
		g.Kill()
		hear("all hear of a task again", ended(create(t, s, spec("exit", "0")).ID))
		if b.at.Load() == at {
			t.Fatal("nobody came to the other gateway")
		}
		if err := errors.Join(g.Start(within(t, patience)), g.Ready(within(t, patience))); err != nil {
			t.Fatal(err)
		}
	}
	finish()
	last := create(t, s, spec("exit", "0"))
	until(t, s, last.ID, schemas.Completed)
	hear("all hear of the last task", ended(last.ID))

	for i, g := range s.Gateway {
		c, err := client.New(g.Addrs.HTTP)
		if err != nil {
			t.Fatal(err)
		}
		var want []string
		for e, err := range c.Events(within(t, patience), client.EventOptions{}) {
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, line(e))
		}
		for name, h := range followers {
			var got []string
			for _, e := range h.events() {
				got = append(got, line(e))
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s heard %d events, %s has %d:%s", name, len(got), g.Name, len(want), differ(got, want))
			}
		}
		if i == 0 {
			t.Logf("%d events", len(want))
		}
	}
}

func line(e schemas.TaskEvent) string {
	return strconv.FormatUint(e.ID, 10) + " " + string(e.Task) + " " + string(e.State) + " " + e.Note
}

// differ lists the first differences.
func differ(got, want []string) (text string) {
	n := 0
	tell := func(what string, list, other []string) {
		has := map[string]int{}
		for _, l := range other {
			has[l]++
		}
		for _, l := range list {
			if has[l]--; has[l] < 0 && n < 20 {
				n++
				text += "\n  " + what + " " + l
			}
		}
	}
	tell("missed", want, got)
	tell("beyond", got, want)
	if text == "" {
		text = "\n  in another order"
	}
	return text
}
