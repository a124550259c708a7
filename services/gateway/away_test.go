package gateway_test

import (
	"context"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

func TestAGatewayThatStillWaitsForTheBusSaysSo(t *testing.T) {
	s := natstest.Server(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	connected := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() {
		err := gateway.Run(ctx, gateway.Deps{Listener: ln, Logger: zerolog.Nop(), Connect: func(ctx context.Context) (*bus.Conn, error) {
			select {
			case <-connected:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			c, err := bus.Connect(ctx, bus.Config{InProcess: s.InProcess(), User: natsd.CoreUser, Password: natstest.Password, Logger: zerolog.Nop()})
			if err == nil {
				err = bus.Provision(ctx, c, schemas.Assets(time.Hour), 1)
			}
			return c, err
		}}, gateway.Config{})
		if err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); done.Wait() })
	a := api{TB: t, url: "http://" + ln.Addr().String(), client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	a.do("GET", "/v1/tasks", "").want(t, 503, schemas.CodeUnavailable)
	a.do("POST", "/v1/tasks", `{"image":"x"}`).want(t, 503, schemas.CodeUnavailable)
	shows := func(page, what string) {
		t.Helper()
		if !strings.Contains(page, what) {
			t.Errorf("no %s:\n%s", what, page)
		}
	}
	for _, path := range []string{"/", "/ui/", "/ui/workers", "/ui/tasks/t-01jd0000000000000000000000"} {
		shows(a.page(503, path), `<meta http-equiv="refresh" content="1">`)
	}
	if r := a.get("/ui/assets/style.css"); r.status != 200 {
		t.Errorf("style: %d", r.status)
	}
	close(connected)
	until(t, "it answers", func() bool { return a.do("GET", "/v1/tasks", "").status == 200 })
}
