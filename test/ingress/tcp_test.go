package ingress

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

func tcp(name string, port int) schemas.Port {
	return schemas.Port{Name: name, Port: port, Protocol: schemas.ProtocolTCP}
}

// freePorts finds a range of n ports that nobody listens on.
func freePorts(t testing.TB, n int) (from, to int) {
	t.Helper()
	for from = 21000; from < 32000; from += n {
		var all []net.Listener
		for i := range n {
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", from+i))
			if err != nil {
				break
			}
			all = append(all, l)
		}
		for _, l := range all {
			l.Close()
		}
		if len(all) == n {
			return from, from + n - 1
		}
	}
	t.Fatal("no free ports")
	return 0, 0
}

// dialEndpoint connects to a tcp endpoint; its domain is this machine.
func dialEndpoint(e schemas.Endpoint) (net.Conn, error) {
	return net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", e.Port))
}

func TestTCPPorts(t *testing.T) {
	from, to := freePorts(t, 3)
	s := start(t, "--tcp-ports", fmt.Sprintf("%d-%d", from, to))
	task := s.run(tcp("a", 7000), tcp("b", 7001))
	if len(task.Endpoints) != 2 || task.Endpoints[0].Port == task.Endpoints[1].Port {
		t.Fatalf("%+v", task.Endpoints)
	}
	for _, e := range task.Endpoints {
		if e.Port < from || e.Port > to || e.URL != fmt.Sprintf("tcp://localhost:%d", e.Port) || e.Host != "localhost" {
			t.Errorf("%+v", e)
		}
		var several sync.WaitGroup
		for range 3 {
			several.Go(func() {
				c, err := dialEndpoint(e)
				if err == nil {
					err = twoWay(c)
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		several.Wait()
	}

	// The range has one left: a task that asks for two gets none, and says why.
	var e *schemas.Error
	err := s.up.Call(deadline(t), "POST", "/v1/tasks", map[string]any{"image": s.image, "ports": []schemas.Port{tcp("a", 1), tcp("b", 2)}}, nil)
	if !errors.As(err, &e) || e.Status != 503 || e.Code != schemas.CodeNoPorts || e.RetryAfter == 0 {
		t.Errorf("a range that is used up: %v", err)
	}
	third := s.run(tcp("c", 7002))

	// They stay the same over the restart of the gateway, and work again.
	if err := s.up.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.up.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	for i, of := range []schemas.Task{task, third} {
		var again schemas.Task
		if err := s.up.Call(deadline(t), "GET", "/v1/tasks/"+string(of.ID), nil, &again); err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(again.Endpoints) != fmt.Sprint(of.Endpoints) {
			t.Errorf("%d: %v, before %v", i, again.Endpoints, of.Endpoints)
		}
		err := harness.Poll(deadline(t), func() error { // its agent is back first
			c, err := dialEndpoint(again.Endpoints[0])
			if err != nil {
				return err
			}
			return twoWay(c)
		})
		if err != nil {
			t.Error(err)
		}
	}

	// The end of a task ends its connections and frees its ports.
	c, err := dialEndpoint(task.Endpoints[0])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := s.up.Call(deadline(t), "DELETE", "/v1/tasks/"+string(task.ID)+"?grace=0s", nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c); err != nil && !strings.Contains(err.Error(), "reset") {
		t.Error(err)
	}
	err = harness.Poll(deadline(t), func() error {
		for _, e := range task.Endpoints {
			if c, err := dialEndpoint(e); err == nil {
				c.Close()
				return fmt.Errorf("port %d is still open", e.Port)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	s.run(tcp("a", 7000), tcp("b", 7001)) // there is room again
	if open := s.metric("dayfly_ingress_ports_open", ""); open != "3" {
		t.Errorf("%s ports are open", open)
	}
}

func TestTCPPortsMayBeOff(t *testing.T) {
	s := start(t, "--tcp-ports", "")
	var e *schemas.Error
	err := s.up.Call(deadline(t), "POST", "/v1/tasks", map[string]any{"image": s.image, "ports": []schemas.Port{web(80), tcp("a", 1)}}, nil)
	if !errors.As(err, &e) || e.Status != 422 || e.Code != schemas.CodeNotAllowed || e.Field != "ports.1.protocol" {
		t.Errorf("%v", err)
	}
}
