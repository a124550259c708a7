package ingress

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"dayfly.dev/test/harness"
)

// The agent is in a network namespace that takes no connection from outside: all that
// reaches its tasks goes over the one that it has made itself.
func TestAWorkerBehindNAT(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	b, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	network, err := harness.NewNetwork(deadline(t), 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := network.Remove(); err != nil {
			t.Error(err)
		}
	})
	inside := network.NS[0]
	if err := inside.OutboundOnly(); err != nil {
		t.Fatal(err)
	}
	from, to := freePorts(t, 2)
	cl, err := harness.NewSite(deadline(t), harness.SiteOptions{Bin: b.bin, Agents: -1, Host: network.Host, GatewayArgs: []string{"--tcp-ports", fmt.Sprintf("%d-%d", from, to)}})
	if err != nil {
		t.Fatal(err)
	}
	var agent *harness.Process
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if t.Failed() && agent != nil {
			t.Log(agent.Tail())
		}
		var more []*harness.Process
		if agent != nil {
			more = append(more, agent)
		}
		if err := cl.Remove(ctx, more...); err != nil {
			t.Error(err)
		}
	})
	if err := cl.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if agent, err = cl.NewAgent(deadline(t), "behind"); err != nil {
		t.Fatal(err)
	}
	agent.Under = inside.Enter()
	if err := agent.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	s := &site{t, &harness.Up{URL: cl.Gateway[0].Addrs.HTTP, Admin: cl.Gateway[0].Addrs.Admin}, b.image}
	_, s.up.Ingress, _ = strings.Cut(cl.Gateway[0].Addrs.Ingress, "://")
	task := s.run(web(8080), tcp("shell", 7000))
	if c, err := net.DialTimeout("tcp", net.JoinHostPort(inside.Addr, "22"), 200*time.Millisecond); err == nil {
		c.Close()
		t.Error("the namespace takes connections")
	}
	if a := s.ask(s.client(), s.request("GET", task.Endpoints[0].URL+"/headers", nil)); a.Proto != "HTTP/1.1" {
		t.Errorf("%+v", a)
	}
	conn, err := s.api().Tunnel(deadline(t), task.ID, 7000)
	if err == nil {
		err = twoWay(conn)
	}
	if err != nil {
		t.Error(err)
	}
	conn, err = dialEndpoint(task.Endpoints[1])
	if err == nil {
		err = twoWay(conn)
	}
	if err != nil {
		t.Error(err)
	}
}
