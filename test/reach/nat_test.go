package reach

import (
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// Everything works with a worker that nobody can connect to.
func TestAWorkerWithoutInboundConnections(t *testing.T) {
	b := built1(t)
	network, err := harness.NewNetwork(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := network.Remove(); err != nil {
			t.Error(err)
		}
	})
	ns := network.NS[0]
	inside := func(args ...string) {
		t.Helper()
		argv := append(ns.Enter(), args...)
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	inside("iptables", "-w", "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
	inside("iptables", "-w", "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
	inside("iptables", "-w", "-A", "INPUT", "-j", "REJECT")
	s, err := harness.NewSite(deadline(t), harness.SiteOptions{Bin: b.bin, Agents: -1, Host: network.Host})
	if err != nil {
		t.Fatal(err)
	}
	var worker *harness.Process
	t.Cleanup(func() {
		if err := s.Remove(deadline(t), worker); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if worker, err = s.NewAgent(deadline(t), "away"); err != nil {
		t.Fatal(err)
	}
	worker.Under = ns.Enter()
	if err := worker.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	admin := strings.TrimPrefix(worker.Addrs.Admin, "http://127.0.0.1")
	if c, err := net.Dial("tcp", ns.Addr+admin); err == nil {
		c.Close()
		t.Fatal("the worker can be connected to")
	}
	c, err := client.New(s.Gateway[0].Addrs.HTTP)
	if err != nil {
		t.Fatal(err)
	}
	task := create(t, c, b.shell, nil)
	if task.State != schemas.Running {
		t.Fatalf("%s %s", task.State, task.Message)
	}
	if _, err := c.PutFile(deadline(t), task.ID, "/tmp/x", strings.NewReader("through"), 7, 0); err != nil {
		t.Fatal(err)
	}
	if res, err := c.Exec(deadline(t), task.ID, schemas.ExecRequest{Command: []string{"cat", "/tmp/x"}}); err != nil || res.Stdout != "through" {
		t.Errorf("%+v, %v", res, err)
	}
	con := console(t, c, task.ID, client.ConsoleOptions{Terminal: &schemas.Window{Rows: 24, Cols: 80}}, "sh")
	shown := watch(con)
	fmt.Fprintln(con, "echo $((6*7000)); exit 3")
	shown.shows(t, "42000")
	if exit, err := con.Wait(); err != nil || exit.Code != 3 {
		t.Errorf("%+v, %v", exit, err)
	}
}
