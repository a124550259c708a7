package client_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/coder/websocket"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

// The word of a worker reaches the client as it is, and a worker may be anybody's.
func TestAConsoleEndsWithWhatNoAgentSays(t *testing.T) {
	t.Parallel()
	const started = `{"started":{"id":"e1","stdin":10,"has":10,"stdout":0,"stderr":0}}`
	for name, said := range map[string][]string{
		"two beginnings":           {started, started},
		"a negative place of in":   {`{"started":{"stdin":-1,"has":-1,"stdout":0,"stderr":0}}`},
		"a negative place of out":  {`{"started":{"stdin":0,"has":0,"stdout":-1,"stderr":0}}`},
		"a negative place of err":  {`{"started":{"stdin":0,"has":0,"stdout":0,"stderr":-1}}`},
		"a place beyond counting":  {`{"started":{"stdin":9223372036854775807,"has":0,"stdout":0,"stderr":0}}`},
		"more than was taken over": {`{"started":{"stdin":1,"has":2,"stdout":0,"stderr":0}}`},
		"stdin before its start":   {started, `{"stdin":9}`},
		"stdin that falls":         {started, `{"stdin":20}`, `{"stdin":19}`},
		"negative stdin":           {started, `{"stdin":-5}`},
		"stdin beyond counting":    {started, `{"stdin":9223372036854775807}`},
		"no message":               {`{"started":7}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				ws, err := websocket.Accept(w, r, nil)
				if err != nil {
					t.Error(err)
					return
				}
				defer ws.CloseNow()
				for _, m := range said {
					if err := ws.Write(r.Context(), websocket.MessageText, []byte(m)); err != nil {
						return // the client may have left by now
					}
				}
				for err == nil {
					_, _, err = ws.Read(r.Context())
				}
			}))
			t.Cleanup(srv.Close)
			c, err := client.New(srv.URL)
			if err != nil {
				t.Fatal(err)
			}
			s, err := c.Console(t.Context(), "t-01jd0000000000000000000000", client.ConsoleOptions{ExecRequest: schemas.ExecRequest{Command: []string{"sh"}}})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if _, err := s.Wait(); err == nil || !strings.Contains(err.Error(), "does not answer like dayfly") {
				t.Errorf("ended with %v", err)
			}
		})
	}
}
