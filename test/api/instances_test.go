package api

import "net/http"

// instances asks for what concerns templates and instances.
func (s *site) instances() {
	s.Helper()
	for _, c := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/v1/templates", "", http.StatusOK},
		{"GET", "/v1/templates?a=b", "", http.StatusBadRequest},
		{"GET", "/v1/templates/web", "", http.StatusOK},
		{"GET", "/v1/templates/none", "", http.StatusNotFound},
		{"PUT", "/v1/instances/web/ada?wait=running&timeout=10s", `{"values": {"flag": "x"}, "ttl": "5m"}`, http.StatusCreated},
		{"PUT", "/v1/instances/web/bob", "", http.StatusUnprocessableEntity},
		{"PUT", "/v1/instances/web/ada", "", http.StatusOK},
		{"PUT", "/v1/instances/web/ada", `{"values": {"flag": "y"}}`, http.StatusOK},
		{"PUT", "/v1/instances/none/ada", "", http.StatusNotFound},
		{"GET", "/v1/instances/web/ada", "", http.StatusOK},
		{"GET", "/v1/instances/web/bob", "", http.StatusNotFound},
		{"PATCH", "/v1/instances/web/ada", `{"ttl": "10m"}`, http.StatusOK},
		{"PATCH", "/v1/instances/web/ada", `{"ttl": "20m"}`, http.StatusConflict},
		{"GET", "/v1/instances?template=web&owner=ada&limit=1", "", http.StatusOK},
		{"GET", "/v1/instances?cursor=!", "", http.StatusBadRequest},
		{"DELETE", "/v1/instances/web/ada?grace=0s", "", http.StatusOK},
		{"DELETE", "/v1/instances/web/bob", "", http.StatusNotFound},
	} {
		if res, body := s.ask(c.method, c.path, c.body); res.StatusCode != c.status {
			s.Errorf("%s %s: %d, want %d: %s", c.method, c.path, res.StatusCode, c.status, body)
		}
	}
}
