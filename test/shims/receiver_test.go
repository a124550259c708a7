package shims

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
)

// receive starts a server for what is sent to a caller's own address, $receiver, with the check
//
//	received METHOD PATH JSON   a request came there, with JSON in its body
func (s *script) receive() {
	var mu sync.Mutex
	got := map[string][]byte{} // under mu: body by method and path
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			s.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		got[r.Method+" "+r.URL.RequestURI()] = body
	}))
	s.Cleanup(server.Close)
	s.vars["receiver"] = server.URL
	s.checks["received"] = func(args []string) error {
		mu.Lock()
		defer mu.Unlock()
		body, ok := got[args[0]+" "+args[1]]
		if !ok {
			return fmt.Errorf("%d other requests came", len(got))
		}
		var want, have any
		if err := json.Unmarshal([]byte(strings.Join(args[2:], " ")), &want); err != nil {
			return err
		}
		if err := json.Unmarshal(body, &have); err != nil {
			return err
		}
		return s.match("", want, have, map[string]string{})
	}
}
