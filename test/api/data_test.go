package api

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"github.com/coder/websocket"

	"dayfly.dev/schemas"
)

// data is what goes to tasks beforehand and stays behind: blobs, artifacts, images, kinds.
func (s *site) data(running, done, none string) {
	s.Helper()
	bytes := []string{"Content-Type", "application/octet-stream"}
	text := strings.Repeat("blob ", 100)
	sum := sha256.Sum256([]byte(text))
	blob := "/v1/blobs/sha256:" + hex.EncodeToString(sum[:])
	other := "/v1/blobs/sha256:" + strings.Repeat("0", 64)
	s.want(422, "PUT", blob, "something else", bytes...)
	s.want(422, "PUT", "/v1/blobs/x", text, bytes...)
	s.want(415, "PUT", blob, text, append(bytes, "Content-Encoding", "gzip")...)
	s.want(404, "GET", blob, "")
	s.want(201, "PUT", blob, text, bytes...)
	s.want(200, "PUT", blob, text, bytes...)
	res, answer := s.want(200, "GET", blob, "")
	if string(answer) != text {
		s.Errorf("the blob is %q", answer)
	}
	s.want(304, "GET", blob, "", "If-None-Match", res.Header.Get("ETag"))
	if _, answer := s.want(206, "GET", blob, "", "Range", "bytes=5-8"); string(answer) != "blob" {
		s.Errorf("its part is %q", answer)
	}
	s.want(404, "GET", other, "")
	s.want(422, "GET", "/v1/blobs/sha256:x", "")
	s.want(200, "GET", "/v1/blobs", "")
	s.want(400, "GET", "/v1/blobs?x=1", "")
	s.want(404, "DELETE", other, "")
	named := s.create("?wait=done", `{"image":"a","files":[{"path":"x","blob":"`+strings.TrimPrefix(blob, "/v1/blobs/")+`"}]}`)
	if named.State != schemas.Completed {
		s.Errorf("%+v", named)
	}
	s.want(422, "POST", "/v1/tasks", `{"image":"a","files":[{"path":"x","blob":"`+strings.TrimPrefix(other, "/v1/blobs/")+`"}]}`)

	s.want(200, "DELETE", blob, "")

	left := s.create("?wait=done", `{"image":"a","command":["leave","2","10"]}`)
	of := "/v1/tasks/" + string(left.ID) + "/artifacts"
	if len(left.Artifacts) != 2 {
		s.Fatalf("it left %+v", left.Artifacts)
	}
	s.want(200, "GET", of, "")
	s.want(200, "GET", of+"?archive=1", "")
	res, _ = s.want(200, "GET", of+"/"+left.Artifacts[0].Name, "")
	s.want(304, "GET", of+"/"+left.Artifacts[0].Name, "", "If-None-Match", res.Header.Get("ETag"))
	s.want(404, "GET", of+"/nothing", "")
	s.want(409, "GET", running+"/artifacts", "")
	s.want(404, "GET", none+"/artifacts", "")
	s.want(200, "GET", done+"/artifacts", "")

	s.want(200, "GET", "/v1/images", "")
	s.want(404, "GET", "/v1/images?worker=w9", "")
	s.want(200, "POST", "/v1/images", `{"image":"a"}`)
	s.want(422, "POST", "/v1/images", `{"image":"A"}`)
	s.want(200, "DELETE", "/v1/images?image=a", "")
	s.want(404, "DELETE", "/v1/images?image=a", "")
	s.want(200, "GET", "/v1/kinds", "")
	s.want(400, "GET", "/v1/kinds?x=1", "")

	read := s.create("?wait=running", `{"image":"a","command":["cat"],"stdin_open":true}`)
	attach := "/v1/tasks/" + string(read.ID) + "/attach"
	ws, _, err := websocket.Dial(s.Context(), s.url+attach, nil)
	if err != nil {
		s.Fatal(err)
	}
	_ = ws.CloseNow()
	s.good["attachTask"] = true // there is nothing to hold against the document
	upgrade := []string{"Connection", "Upgrade", "Upgrade", "websocket", "Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="}
	s.want(400, "GET", attach, "")
	s.want(400, "GET", attach+"?stdout=-1", "", upgrade...)
	s.want(422, "GET", running+"/attach", "", upgrade...)
	s.want(409, "GET", done+"/attach", "", upgrade...)
	s.want(404, "GET", none+"/attach", "", upgrade...)
}
