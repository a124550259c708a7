package gateway_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

func TestOnlyKnownHostsAreAnswered(t *testing.T) {
	w := newWorld(t, gateway.Config{Hosts: []string{"dayfly.example.org", "192.0.2.7", "2001:db8::1"}})
	address := strings.TrimPrefix(w.url, "http://")
	ask := func(t *testing.T, method, path, version, host string) *http.Response {
		t.Helper()
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		if host != "" {
			host = "Host: " + host + "\r\n"
		}
		fmt.Fprintf(conn, "%s %s HTTP/%s\r\n%sConnection: close\r\n\r\n", method, path, version, host)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	for _, host := range []string{"localhost", "localhost:8080", "LocalHost.", "127.0.0.1", "127.0.0.1:1", "127.9.9.9", "[::1]", "[::1]:8080",
		"dayfly.example.org", "Dayfly.Example.ORG:443", "dayfly.example.org.", "192.0.2.7:8080", "[2001:db8:0::1]:80"} {
		if res := ask(t, "GET", "/v1/tasks", "1.1", host); res.StatusCode != 200 {
			t.Errorf("%s: %d", host, res.StatusCode)
		}
	}
	if res := ask(t, "GET", "/v1/tasks", "1.0", ""); res.StatusCode != 200 {
		t.Errorf("HTTP/1.0 without a host: %d", res.StatusCode)
	}
	for _, host := range []string{"evil.example", "evil.example:8080", "a.localhost", "localhost.evil.example", "localhost..", "127.0.0.1.evil.example", "0.0.0.0",
		"192.0.2.8", "2130706433", "[::]", "example.org", "x.dayfly.example.org", "127.0.0.1:80:80"} {
		for _, path := range []string{"/v1/tasks", "/ui/", "/docs/", "/none", "*"} {
			method := "GET"
			if path == "*" {
				method = "OPTIONS"
			}
			res := ask(t, method, path, "1.1", host)
			body, err := io.ReadAll(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			r := reply{res.StatusCode, res.Header, body}
			if e := r.want(t, 421, schemas.CodeUnknownHost); strings.Contains(string(body), "evil") || !strings.Contains(e.Detail, "--host") {
				t.Errorf("%s", body)
			}
		}
	}
}
