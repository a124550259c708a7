package api

import (
	"net/url"
	"strings"

	"github.com/coder/websocket"

	"dayfly.dev/schemas"
)

// reach asks all that is about programs and files of a task that runs, of one that is
// over, and of none.
func (s *site) reach(running, done, none string) {
	s.Helper()
	s.want(200, "POST", running+"/exec", `{"command":["echo","hi"],"env":{"A":"b"},"stdin":"","timeout":"10s"}`)
	s.want(200, "POST", running+"/exec", `{"command":["nothing"]}`)
	_, answer := s.want(201, "POST", running+"/exec", `{"command":["sleep","1h"],"background":true}`)
	var started schemas.ExecStarted
	if err := schemas.Decode(answer, &started); err != nil {
		s.Fatal(err)
	}
	program := running + "/execs/" + string(started.Exec.ID)
	s.want(200, "GET", running+"/execs", "")
	s.want(200, "GET", program, "")
	s.want(204, "DELETE", program+"?grace=1s", "")
	s.want(422, "POST", running+"/exec", `{"command":[]}`)
	s.want(422, "POST", running+"/exec", `{"command":["x"],"colour":"red"}`)
	s.want(413, "POST", running+"/exec", `{"command":["cat"],"stdin":"`+strings.Repeat("x", 1<<20)+`"}`)
	for _, c := range []struct{ method, path, body string }{
		{"POST", "/exec", `{"command":["true"]}`}, {"GET", "/execs", ""}, {"GET", "/execs/abc", ""}, {"DELETE", "/execs/abc", ""},
		{"GET", "/files?path=/tmp", ""}, {"DELETE", "/files?path=/tmp", ""},
	} {
		s.want(409, c.method, done+c.path, c.body)
		s.want(404, c.method, none+c.path, c.body)
	}
	s.want(404, "GET", running+"/execs/abc", "")

	console := "/exec?" + url.Values{"command": {"echo", "hi"}, "tty": {"1"}, "rows": {"24"}, "cols": {"80"}, "env": {"A=b"}}.Encode()
	ws, _, err := websocket.Dial(s.Context(), s.url+running+console, nil)
	if err != nil {
		s.Fatal(err)
	}
	_ = ws.Close(websocket.StatusNormalClosure, "")
	s.good["openConsole"] = true // there is nothing to hold against the document
	upgrade := []string{"Connection", "Upgrade", "Upgrade", "websocket", "Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="}
	s.want(409, "GET", done+console, "", upgrade...)
	s.want(404, "GET", none+console, "", upgrade...)
	s.want(422, "GET", running+"/exec", "", upgrade...)
	s.want(400, "GET", running+"/exec?command=true&rows=0", "", upgrade...)
	s.want(404, "GET", running+"/exec?exec=abc", "", upgrade...)
	s.want(400, "GET", running+console, "")
	s.want(403, "GET", running+console, "", append(upgrade, "Origin", "http://evil.example")...)

	bytes := []string{"Content-Type", "application/octet-stream"}
	s.want(200, "PUT", running+"/files?path=/tmp/a/x&mode=755", "hello", bytes...)
	res, answer := s.want(200, "GET", running+"/files?path=/tmp/a/x", "")
	if string(answer) != "hello" || res.Header.Get("Content-Type") != "application/octet-stream" {
		s.Errorf("%q %v", answer, res.Header)
	}
	s.want(200, "GET", running+"/files?path=/tmp/a", "")
	s.want(200, "GET", running+"/files?path=/tmp/a&list=1", "")
	s.want(400, "GET", running+"/files", "")
	s.want(404, "GET", running+"/files?path=/tmp/none", "")
	s.want(422, "GET", running+"/files?path=../x", "")
	s.want(415, "PUT", running+"/files?path=/tmp/x", "x", "Content-Type", "text/plain")
	s.want(422, "PUT", running+"/files?path=/tmp/a", "x", bytes...)
	s.want(422, "PUT", running+"/files?path=/tmp/t", "no archive", "Content-Type", "application/x-tar")
	s.want(422, "DELETE", running+"/files?path=/tmp/a", "")
	s.want(200, "DELETE", running+"/files?path=/tmp/a&recursive=1", "")
	s.want(409, "PUT", done+"/files?path=/tmp/x", "x", bytes...)
	s.want(404, "PUT", none+"/files?path=/tmp/x", "x", bytes...)
}
