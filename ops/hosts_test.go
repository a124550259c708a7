package ops_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"

	"dayfly.dev/ops"
)

func TestCheckHost(t *testing.T) {
	for name, good := range map[string]bool{"dayfly.example.org": true, "gateway1": true, "10.0.0.5": true, "2001:db8::1": true, "[2001:db8::1]": false,
		"": false, "a:80": false, "http://a": false, "A": false, "*": false, "a.": false, "a/b": false, "a,b": false} {
		if err := ops.CheckHost(name); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// A site that lets its name lead to an admin port (DNS rebinding) reads nothing of it.
func TestAdminAnswersUnderKnownNamesOnly(t *testing.T) {
	srv := httptest.NewServer(ops.Admin(ops.NewRegistry("1", "c"), ops.NewHealth(), ops.NewHosts([]string{"gateway1", "192.0.2.7"})))
	defer srv.Close()
	for host, want := range map[string]int{"": 200, "localhost:8082": 200, "127.9.9.9": 200, "gateway1:8082": 200, "192.0.2.7": 200,
		"evil.example": 421, "evil.example:8082": 421, "localhost.evil.example": 421, "a.localhost": 421, "192.0.2.8": 421, "gateway2": 421} {
		for _, path := range []string{"/metrics", "/healthz", "/readyz", "/debug/pprof/", "/debug/pprof/cmdline"} {
			req, err := http.NewRequestWithContext(context.Background(), "GET", srv.URL+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = host
			res, err := srv.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != want {
				t.Errorf("%s of %q: %d", path, host, res.StatusCode)
			}
		}
	}
}
