package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

// portRange finds n ports that nobody listens on.
func portRange(t testing.TB, n int) gateway.PortRange {
	t.Helper()
	for from := 23000; from < 32000; from += n {
		free := 0
		for i := range n {
			if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", from+i)); err == nil {
				l.Close()
				free++
			}
		}
		if free == n {
			return gateway.PortRange{Host: "127.0.0.1", From: from, To: from + n - 1}
		}
	}
	t.Fatal("no free ports")
	return gateway.PortRange{}
}

func (w *world) leases() *bus.Table[schemas.PortLease] {
	return bus.NewTable(w.conn, schemas.BucketPorts, bus.JSON[schemas.PortLease](nil))
}

func listens(n int) bool {
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", n))
	if err == nil {
		c.Close()
	}
	return err == nil
}

const withPort = `{"image":"a","ports":[{"name":"p","port":7000,"protocol":"tcp"}]}`

// Two gateways on one machine cannot both listen on a port, so of two the second takes
// over what the first leaves.
func TestPortsOutliveTheirGateway(t *testing.T) {
	w := newWorld(t, gateway.Config{TCP: portRange(t, 4), PortSweep: 20 * time.Millisecond, PortGrace: 20 * time.Millisecond})
	task := w.create(withPort)
	n := task.Endpoints[0].Port
	until(t, "it listens", func() bool { return listens(n) })
	w.stop()
	if listens(n) {
		t.Fatal("a gateway that has ended listens")
	}
	again := newAPI(t, natstest.Connect(t, w.nats), gateway.Config{TCP: gateway.PortRange{Host: "127.0.0.1", From: n, To: n}, PortSweep: 20 * time.Millisecond})
	until(t, "the next one listens", func() bool { return listens(n) })
	if got := again.task(task.ID).Endpoints; !slices.Equal(got, task.Endpoints) {
		t.Errorf("%v, before %v", got, task.Endpoints)
	}
	again.do("POST", "/v1/tasks", withPort).want(t, 503, schemas.CodeNoPorts)

	again.do("DELETE", "/v1/tasks/"+string(task.ID), "")
	until(t, "it is freed", func() bool { return !listens(n) })
	if _, err := w.leases().Get(deadline(t), strconv.Itoa(n)); !errors.Is(err, bus.ErrNotFound) {
		t.Errorf("the lease: %v", err)
	}
	if got := again.create(withPort).Endpoints[0].Port; got != n {
		t.Errorf("%d, there is only %d", got, n)
	}
}

// A gateway that dies between the lease and the record leaves a lease of no task.
func TestPortsOfNoTaskAreSwept(t *testing.T) {
	w := newWorld(t, gateway.Config{TCP: portRange(t, 4), PortSweep: 20 * time.Millisecond, PortGrace: 100 * time.Millisecond})
	task := w.create(withPort)
	mine := task.Endpoints[0].Port
	ctx := deadline(t)
	nobody, other := "60001", "60002"
	for key, lease := range map[string]schemas.PortLease{nobody: {Task: "t-01jd0000000000000000000000", Name: "p"}, other: {Task: task.ID, Name: "p"}} {
		if _, err := w.leases().Create(ctx, key, lease, ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{nobody, other} {
		until(t, key+" is freed", func() bool {
			_, err := w.leases().Get(ctx, key)
			return errors.Is(err, bus.ErrNotFound)
		})
	}
	if e, err := w.leases().Get(ctx, strconv.Itoa(mine)); err != nil || e.Value.Task != task.ID || !listens(mine) {
		t.Errorf("%+v, %v", e, err)
	}
}

// Two gateways make the task of one key, and want the same port for it: one has it, and the
// other does not give it back.
func TestAPortIsOfOneGatewaysTask(t *testing.T) {
	within := portRange(t, 1)
	w := newWorld(t, gateway.Config{TCP: within})
	p := newProxy(t, strings.TrimPrefix(w.nats.URL(), "nats://"))
	conn, err := bus.Connect(deadline(t), bus.Config{Name: "proxied", URL: "nats://" + p.addr, User: natsd.CoreUser, Password: natstest.Password})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	slow := newAPI(t, conn, gateway.Config{OpTimeout: 20 * time.Second, TCP: gateway.PortRange{Host: "127.0.0.2", From: within.From, To: within.To}})
	until(t, "it is ready", func() bool { return slow.get("/v1/tasks").status == 200 })
	lease := "PUB $KV." + schemas.BucketPorts + "."
	p.hold.Store(&lease)
	late := make(chan reply)
	go func() {
		r, err := slow.try("POST", "/v1/tasks", withPort, "Idempotency-Key", "k")
		if err != nil {
			t.Error(err)
		}
		late <- r
	}()
	<-p.held
	task := w.create(withPort, "Idempotency-Key", "k")
	close(p.release)
	(<-late).want(t, 503, schemas.CodeNoPorts)
	if e, err := w.leases().Get(deadline(t), strconv.Itoa(within.From)); err != nil || e.Value.Task != task.ID {
		t.Errorf("the port of %s: %+v (%v)", task.ID, e.Value, err)
	}
	if again := slow.create(withPort, "Idempotency-Key", "k"); again.ID != task.ID {
		t.Errorf("%s, and %s", task.ID, again.ID)
	}
}

// A port that something else has is not given.
func TestPortsOfOthersAreNotGiven(t *testing.T) {
	within := portRange(t, 3)
	for _, n := range []int{within.From, within.To} {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", n))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	w := newWorld(t, gateway.Config{TCP: within})
	if got := w.create(withPort).Endpoints[0].Port; got != within.From+1 {
		t.Errorf("%d was given", got)
	}
	w.do("POST", "/v1/tasks", withPort).want(t, 503, schemas.CodeNoPorts)
}

func TestTraefik(t *testing.T) {
	w := newWorld(t, gateway.Config{Endpoints: gateway.EndpointAddress{Scheme: "https", Domain: "tasks.example", Port: 443}, IngressBackends: []string{"http://10.0.0.1:8081", "http://10.0.0.2:8081"}})
	const services = `"services":{"dayfly":{"loadBalancer":{"servers":[{"url":"http://10.0.0.1:8081"},{"url":"http://10.0.0.2:8081"}],"passHostHeader":true}}}`
	if got := string(w.get("/v1/ingress/traefik").body); got != `{"http":{`+services+`}}` {
		t.Errorf("without tasks: %s", got)
	}
	w.create(spec)
	over := w.create(`{"image":"a","ports":[{"port":80}]}`)
	w.do("DELETE", "/v1/tasks/"+string(over.ID), "")
	task := w.create(`{"image":"a","ports":[{"name":"web","port":80}]}`)
	if url := task.Endpoints[0].URL; url != "https://"+task.Endpoints[0].Host {
		t.Errorf("%s", url)
	}
	want := fmt.Sprintf("{\"http\":{\"routers\":{\"%s-web\":{\"rule\":\"Host(`%s`)\",\"service\":\"dayfly\"}},"+
		services+"}}", task.ID, task.Endpoints[0].Host)
	if got := string(w.get("/v1/ingress/traefik").body); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}

// Every gateway of a site gives a task the same hostname, and a list shows it too.
func TestHostnamesAreTheSameEverywhere(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	second := newAPI(t, natstest.Connect(t, w.nats), gateway.Config{})
	ask := second.ingressOf(t)
	ask("any") // it has begun
	for range 20 {
		early := w.create(`{"image":"a","ports":[{"port":80}]}`)
		if res := ask(early.Endpoints[0].Host); res.Header.Get("Dayfly-Code") != string(schemas.CodeStarting) {
			t.Errorf("just made at another gateway: %s %s", res.Status, res.Header.Get("Dayfly-Code"))
		}
		w.do("DELETE", "/v1/tasks/"+string(early.ID), "")
	}
	task := w.create(`{"image":"a","ports":[{"name":"web","port":80}]}`)
	key, err := bus.NewTable(natstest.Connect(t, w.nats), schemas.BucketKeys, bus.JSON[schemas.HostnameKey](nil)).Get(t.Context(), schemas.KeyHostnames)
	if err != nil {
		t.Fatal(err)
	}
	for port, want := range map[string]schemas.Code{"web": schemas.CodeStarting, "80": schemas.CodeNotFound, "81": schemas.CodeNotFound, "": schemas.CodeNotFound} {
		if res := ask(key.Value.Label(task.ID, port) + ".localhost"); res.Header.Get("Dayfly-Code") != string(want) {
			t.Errorf("port %q of the task: %s %s", port, res.Status, res.Header.Get("Dayfly-Code"))
		}
	}
	alone := second.task(task.ID).Endpoints // which brings it into that gateway's view
	var list schemas.TaskList
	if err := schemas.Decode(second.get("/v1/tasks").body, &list); err != nil || len(list.Items) == 0 {
		t.Fatal(err, list)
	}
	for name, got := range map[string][]schemas.Endpoint{"alone": alone, "in a list": list.Items[0].Endpoints} {
		if len(task.Endpoints) != 1 || !slices.Equal(got, task.Endpoints) {
			t.Errorf("%s: %v, want %v", name, got, task.Endpoints)
		}
	}
}

// ingressOf serves tasks' hostnames, and gives what answers a request for a host.
func (a api) ingressOf(t testing.TB) func(host string) *http.Response {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- a.g.ServeIngress(ctx, l, nil) }()
	t.Cleanup(func() {
		a.client.CloseIdleConnections()
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return func(host string) *http.Response {
		t.Helper()
		req, err := http.NewRequest("GET", "http://"+l.Addr().String()+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		res, err := a.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res
	}
}

// What stands before a task that runs is the same for every state that it may be in.
func TestThePagesOfATasksLife(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	ask := w.ingressOf(t)
	task := w.create(`{"image":"a","ports":[{"name":"web","port":80}]}`)
	host := task.Endpoints[0].Host
	want := func(status int, code schemas.Code) {
		t.Helper()
		if res := ask(host); res.StatusCode != status || res.Header.Get("Dayfly-Code") != string(code) {
			t.Errorf("%s %s, want %d %s", res.Status, res.Header.Get("Dayfly-Code"), status, code)
		}
	}
	want(503, schemas.CodeStarting)
	w.choose(task.ID, "w1")
	want(503, schemas.CodeStarting)
	w.report(task.ID, schemas.PhaseRunning, nil)
	want(503, schemas.CodeWorkerAway) // nobody plays its agent
	w.report(task.ID, schemas.PhaseEnded, ended(0, 0, 0))
	until(t, "it is over", func() bool { return ask(host).StatusCode == 410 })
	want(410, schemas.CodeEnded)
	e, err := w.records.Get(deadline(t), string(task.ID))
	if err == nil {
		err = w.records.Delete(deadline(t), string(task.ID), e.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
	until(t, "nobody knows it any more", func() bool { return ask(host).StatusCode == 404 })
}
