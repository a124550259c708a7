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

const secret = "hunter2-correct-horse"

func TestBadInput(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := string(w.create(spec).ID)
	manyEnv := `{"image":"busybox","env":{`
	for i := range 10_000 {
		manyEnv += fmt.Sprintf(`"E%d":"%s",`, i, secret)
	}
	manyEnv = strings.TrimSuffix(manyEnv, ",") + `}}`
	type call struct {
		method, path, body string
		header             []string
		status             int
		code               schemas.Code
		field              string
	}
	post := func(body string, status int, code schemas.Code, field string) call {
		return call{method: "POST", path: "/v1/tasks", body: body, status: status, code: code, field: field}
	}
	query := func(path, field string) call {
		return call{method: "GET", path: path, status: 400, code: schemas.CodeInvalidQuery, field: field}
	}
	none := func(method, path string) call {
		return call{method: method, path: path, status: 404, code: schemas.CodeNotFound}
	}
	for name, c := range map[string]call{
		"empty body":          {method: "POST", path: "/v1/tasks", body: " ", status: 400, code: schemas.CodeInvalidJSON},
		"truncated":           post(`{"image":"`+secret, 400, schemas.CodeInvalidJSON, ""),
		"trailing":            post(spec+`{"image":"`+secret+`"}`, 400, schemas.CodeInvalidJSON, ""),
		"too deep":            post(strings.Repeat(`{"a":`, 100)+`1`+strings.Repeat(`}`, 100), 400, schemas.CodeInvalidJSON, ""),
		"bad UTF-8":           post("{\"image\":\"\xff"+secret+"\"}", 400, schemas.CodeInvalidJSON, ""),
		"duplicate field":     post(`{"image":"a","image":"`+secret+`"}`, 400, schemas.CodeDuplicateField, "image"),
		"unknown field":       post(`{"image":"a","imgae":"`+secret+`"}`, 422, schemas.CodeUnknownField, "imgae"),
		"case variant":        post(`{"Image":"`+secret+`"}`, 422, schemas.CodeUnknownField, "Image"),
		"null":                post(`null`, 422, schemas.CodeInvalidType, ""),
		"a list":              post(`["`+secret+`"]`, 422, schemas.CodeInvalidType, ""),
		"wrong type":          post(`{"image":{"x":"`+secret+`"}}`, 422, schemas.CodeInvalidType, "image"),
		"huge number":         post(`{"image":"a","resources":{"cpus":1e400}}`, 422, schemas.CodeInvalidType, "resources.cpus"),
		"2^63":                post(`{"image":"a","priority":9223372036854775808}`, 422, schemas.CodeInvalidType, "priority"),
		"image":               post(`{"image":"UPPER CASE `+secret+`"}`, 422, schemas.CodeInvalidValue, "image"),
		"no image":            post(`{}`, 422, schemas.CodeInvalidValue, "image"),
		"cpus 0":              post(`{"image":"a","resources":{"cpus":0}}`, 422, schemas.CodeInvalidValue, "resources.cpus"),
		"memory negative":     post(`{"image":"a","resources":{"memory":-1}}`, 422, schemas.CodeInvalidValue, "resources.memory"),
		"ttl 0":               post(`{"image":"a","ttl":"0s"}`, 422, schemas.CodeInvalidValue, "ttl"),
		"ttl above the limit": post(`{"image":"a","ttl":"25h"}`, 422, schemas.CodeInvalidValue, "ttl"),
		"bad duration":        post(`{"image":"a","ttl":"`+secret+`"}`, 422, schemas.CodeInvalidType, "ttl"),
		"bad size":            post(`{"image":"a","resources":{"memory":"`+secret+`"}}`, 422, schemas.CodeInvalidType, "resources.memory"),
		"10,000 env entries":  post(manyEnv, 422, schemas.CodeInvalidValue, "env"),
		"NUL in env":          post(`{"image":"a","env":{"A":"`+secret+`\u0000"}}`, 422, schemas.CodeInvalidValue, "env.A"),
		"newline in env":      post(`{"image":"a","env":{"A":"`+secret+`\n"}}`, 422, schemas.CodeInvalidValue, "env.A"),
		"not available":       post(`{"image":"a","network":"egress"}`, 422, schemas.CodeNotAvailable, "network"),
		"over 1 MiB":          post(`{"image":"a","stdin":"`+strings.Repeat("x", 1<<20)+`"}`, 413, schemas.CodeTooLarge, ""),
		"spec too large":      post(`{"image":"a","command":["`+strings.Repeat("x", 100<<10)+`"]}`, 413, schemas.CodeTooLarge, "command"),
		"form":                {method: "POST", path: "/v1/tasks", body: spec, header: []string{"Content-Type", "application/x-www-form-urlencoded"}, status: 415, code: schemas.CodeContentType},
		"text":                {method: "POST", path: "/v1/tasks", body: spec, header: []string{"Content-Type", "text/plain"}, status: 415, code: schemas.CodeContentType},
		"latin-1":             {method: "POST", path: "/v1/tasks", body: spec, header: []string{"Content-Type", "application/json; charset=latin-1"}, status: 415, code: schemas.CodeContentType},
		"bad content type":    {method: "POST", path: "/v1/tasks", body: spec, header: []string{"Content-Type", "application/json; " + secret}, status: 415, code: schemas.CodeContentType},
		"gzip":                {method: "POST", path: "/v1/tasks", body: spec, header: []string{"Content-Encoding", "gzip"}, status: 415, code: schemas.CodeContentType},
		"long key":            {method: "POST", path: "/v1/tasks", body: spec, header: []string{"Idempotency-Key", strings.Repeat("k", 256)}, status: 400, code: schemas.CodeInvalidHeader, field: "Idempotency-Key"},
		"key with a space":    {method: "POST", path: "/v1/tasks", body: spec, header: []string{"Idempotency-Key", "a " + secret}, status: 400, code: schemas.CodeInvalidHeader, field: "Idempotency-Key"},
		"key beyond ASCII":    {method: "POST", path: "/v1/tasks", body: spec, header: []string{"Idempotency-Key", "ä"}, status: 400, code: schemas.CodeInvalidHeader, field: "Idempotency-Key"},
		"wait for nothing":    {method: "POST", path: "/v1/tasks?wait=" + secret, body: spec, status: 400, code: schemas.CodeInvalidQuery, field: "wait"},
		"bad timeout":         {method: "POST", path: "/v1/tasks?wait=done&timeout=" + secret, body: spec, status: 400, code: schemas.CodeInvalidQuery, field: "timeout"},
		"negative timeout":    {method: "POST", path: "/v1/tasks?wait=done&timeout=-1s", body: spec, status: 400, code: schemas.CodeInvalidQuery, field: "timeout"},
		"timeout alone":       {method: "POST", path: "/v1/tasks?timeout=1s", body: spec, status: 400, code: schemas.CodeInvalidQuery, field: "timeout"},
		"wait twice":          {method: "POST", path: "/v1/tasks?wait=done&wait=done", body: spec, status: 400, code: schemas.CodeInvalidQuery, field: "wait"},

		"limit 0":             query("/v1/tasks?limit=0", "limit"),
		"limit 10^9":          query("/v1/tasks?limit=1000000000", "limit"),
		"limit 10^30":         query("/v1/tasks?limit=1000000000000000000000000000000", "limit"),
		"limit a word":        query("/v1/tasks?limit="+secret, "limit"),
		"state":               query("/v1/tasks?state=queued,"+secret, "state"),
		"empty state":         query("/v1/tasks?state=", "state"),
		"label":               query("/v1/tasks?label=%20"+secret, "label"),
		"label without name":  query("/v1/tasks?label=="+secret, "label"),
		"label bad UTF-8":     query("/v1/tasks?label=a=%ff", "label"),
		"worker":              query("/v1/tasks?worker=../"+secret, "worker"),
		"cursor":              query("/v1/tasks?cursor="+secret, "cursor"),
		"cursor of an id":     query("/v1/tasks?cursor="+id, "cursor"),
		"empty cursor":        query("/v1/tasks?cursor=", "cursor"),
		"long cursor":         query("/v1/tasks?cursor="+strings.Repeat("A", 4000), "cursor"),
		"unknown parameter":   query("/v1/tasks?colour="+secret, "colour"),
		"a value as a name":   query("/v1/tasks?"+secret+"=1", ""),
		"semicolon":           query("/v1/tasks?a=1;b="+secret, ""),
		"bad escape in query": query("/v1/tasks?limit=%zz", ""),
		"get with a filter":   query("/v1/tasks/"+id+"?state=queued", "state"),
		"grace":               {method: "DELETE", path: "/v1/tasks/" + id + "?grace=" + secret, status: 400, code: schemas.CodeInvalidQuery, field: "grace"},
		"grace negative":      {method: "DELETE", path: "/v1/tasks/" + id + "?grace=-1s", status: 400, code: schemas.CodeInvalidQuery, field: "grace"},
		"follow":              query("/v1/tasks/"+id+"/logs?follow="+secret, "follow"),
		"tail":                query("/v1/tasks/"+id+"/logs?tail=-1", "tail"),
		"tail too much":       query("/v1/tasks/"+id+"/logs?tail=999999", "tail"),
		"since":               query("/v1/tasks/"+id+"/logs?since="+secret, "since"),
		"stream":              query("/v1/tasks/"+id+"/logs?stream="+secret, "stream"),
		"attempt 0":           query("/v1/tasks/"+id+"/logs?attempt=0", "attempt"),
		"attempt to come":     {method: "GET", path: "/v1/tasks/" + id + "/logs?attempt=7", status: 404, code: schemas.CodeNotFound, field: "attempt"},
		"event id": {method: "GET", path: "/v1/tasks/" + id + "/logs", header: []string{"Accept", "text/event-stream", "Last-Event-ID", secret},
			status: 400, code: schemas.CodeInvalidHeader, field: "Last-Event-ID"},

		"root":                  none("GET", "/"),
		"unknown path":          none("GET", "/v2/tasks"),
		"slash at the end":      none("GET", "/v1/tasks/"),
		"no such task":          none("GET", "/v1/tasks/t-01jd0000000000000000000000"),
		"upper case":            none("GET", "/v1/tasks/T-01JD0000000000000000000000"),
		"id with dots":          none("GET", "/v1/tasks/%2e%2e%2f"),
		"id with NUL":           none("GET", "/v1/tasks/%00"),
		"id with wildcards":     none("GET", "/v1/tasks/%3e"),
		"logs of nothing":       none("GET", "/v1/tasks/*/logs"),
		"cancel of nothing":     none("DELETE", "/v1/tasks/%2e%2e%2fx"),
		"long id":               none("GET", "/v1/tasks/"+strings.Repeat("a", 4000)),
		"worker with dots":      none("GET", "/v1/workers/%2e%2e"),
		"extend body":           {method: "POST", path: "/v1/tasks/" + id + "/extend", body: `{"ttl":5}`, status: 422, code: schemas.CodeInvalidType, field: "ttl"},
		"extend by nothing":     {method: "POST", path: "/v1/tasks/" + id + "/extend", body: `{}`, status: 422, code: schemas.CodeInvalidValue, field: "ttl"},
		"extend unknown":        {method: "POST", path: "/v1/tasks/" + id + "/extend", body: `{"until":"` + secret + `"}`, status: 422, code: schemas.CodeUnknownField, field: "until"},
		"extend with a query":   {method: "POST", path: "/v1/tasks/" + id + "/extend?ttl=5m", body: `{"ttl":"5m"}`, status: 400, code: schemas.CodeInvalidQuery, field: "ttl"},
		"PUT":                   {method: "PUT", path: "/v1/tasks", body: spec, status: 405, code: schemas.CodeMethod},
		"a method of their own": {method: "FROB", path: "/v1/tasks/" + id, status: 405, code: schemas.CodeMethod},
	} {
		t.Run(name, func(t *testing.T) {
			a := w.in(t).api
			r := a.do(c.method, c.path, c.body, c.header...)
			e := r.want(t, c.status, c.code)
			if e.Field != c.field {
				t.Errorf("field %q, want %q: %s", e.Field, c.field, r.body)
			}
			if strings.Contains(string(r.body), secret) || strings.Contains(fmt.Sprint(r.header), secret) {
				t.Errorf("the value comes back: %s", r.body)
			}
			if len(r.body) > 16<<10 {
				t.Errorf("an answer of %d bytes", len(r.body))
			}
		})
	}
	if strings.Contains(w.logs.String(), secret) || strings.Contains(w.logs.String(), "hunter2") {
		t.Errorf("a value is in the log: %s", w.logs)
	}
	if n := len(w.list("").Items); n != 1 {
		t.Errorf("%d tasks came of bad input", n-1)
	}
}

func TestNoContentType(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	for _, given := range [][]string{nil, {""}, {"application/json", "text/plain"}} {
		req, _ := http.NewRequest("POST", w.url+"/v1/tasks", strings.NewReader(spec))
		req.Header["Content-Type"] = given
		res, err := w.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != 415 {
			t.Errorf("%q: %d", given, res.StatusCode)
		}
	}
	for _, good := range []string{"application/json", "application/json; charset=utf-8", "Application/JSON;charset=UTF-8"} {
		w.create(spec, "Content-Type", good)
	}
}

// TestRawRequests sends what net/http's client would not.
func TestRawRequests(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	host := strings.TrimPrefix(w.url, "http://")
	json := "Host: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
	for name, c := range map[string]struct {
		send   string
		status int
		body   string // that the answer holds
	}{
		"double slash":           {"GET //v1/tasks HTTP/1.1\r\n" + json + "\r\n", 404, `"not_found"`},
		"double slash inside":    {"GET /v1//tasks HTTP/1.1\r\n" + json + "\r\n", 404, `"not_found"`},
		"dots":                   {"GET /v1/../v1/tasks HTTP/1.1\r\n" + json + "\r\n", 404, `"not_found"`},
		"dots at the root":       {"GET /../ HTTP/1.1\r\n" + json + "\r\n", 404, `"not_found"`},
		"a dot":                  {"GET /v1/./tasks HTTP/1.1\r\n" + json + "\r\n", 404, `"not_found"`},
		"encoded dots":           {"GET /v1/tasks/%2e%2e%2fx HTTP/1.1\r\n" + json + "\r\n", 404, `"not_found"`},
		"encoded NUL":            {"GET /v1/tasks/%00 HTTP/1.1\r\n" + json + "\r\n", 404, `"not_found"`},
		"bad escape":             {"GET /v1/tasks/%zz HTTP/1.1\r\n" + json + "\r\n", 400, ""},
		"absolute form":          {"GET http://127.0.0.1/v1/tasks HTTP/1.1\r\n" + json + "\r\n", 200, `"items"`},
		"absolute form, a name":  {"GET http://other/v1/tasks HTTP/1.1\r\n" + json + "\r\n", 421, `"unknown_host"`},
		"CONNECT":                {"CONNECT localhost:443 HTTP/1.1\r\n" + json + "\r\n", 404, `"not_found"`},
		"OPTIONS *":              {"OPTIONS * HTTP/1.1\r\n" + json + "\r\n", 204, ""},
		"no host":                {"GET /v1/tasks HTTP/1.1\r\nConnection: close\r\n\r\n", 400, ""},
		"bad length":             {"POST /v1/tasks HTTP/1.1\r\n" + json + "Content-Length: -1\r\n\r\n", 400, ""},
		"two lengths":            {"POST /v1/tasks HTTP/1.1\r\n" + json + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, ""},
		"bad chunk":              {"POST /v1/tasks HTTP/1.1\r\n" + json + "Transfer-Encoding: chunked\r\n\r\nzz\r\n" + secret, 400, `"invalid_json"`},
		"announced over 1 MiB":   {"POST /v1/tasks HTTP/1.1\r\n" + json + "Content-Length: 99999999999\r\n\r\n{", 413, `"too_large"`},
		"chunked over 1 MiB":     {"POST /v1/tasks HTTP/1.1\r\n" + json + "Transfer-Encoding: chunked\r\n\r\n200000\r\n" + strings.Repeat("x", 0x200000) + "\r\n0\r\n\r\n", 413, `"too_large"`},
		"chunked":                {"POST /v1/tasks HTTP/1.1\r\n" + json + "Transfer-Encoding: chunked\r\n\r\n13\r\n{\"image\":\"busybox\"}\r\n0\r\n\r\n", 201, `"queued"`},
		"large header":           {"GET /v1/tasks HTTP/1.1\r\n" + json + "X: " + strings.Repeat("x", 2<<20) + "\r\n\r\n", 431, ""},
		"request id with spaces": {"GET /v1/tasks HTTP/1.1\r\n" + json + "X-Request-Id: " + secret + " b\r\n\r\n", 200, `"items"`},
		"key twice":              {"POST /v1/tasks HTTP/1.1\r\n" + json + "Idempotency-Key: a\r\nIdempotency-Key: b\r\nContent-Length: 2\r\n\r\n{}", 400, `"invalid_header"`},
		"empty key":              {"POST /v1/tasks HTTP/1.1\r\n" + json + "Idempotency-Key:\r\nContent-Length: 2\r\n\r\n{}", 400, `"invalid_header"`},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", host)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			go func() { _, _ = io.WriteString(conn, c.send) }()
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(res.Body)
			if res.StatusCode != c.status || !strings.Contains(string(body), c.body) || strings.Contains(string(body), secret) {
				t.Errorf("%d %s", res.StatusCode, body)
			}
			if c.body != "" && res.StatusCode >= 400 && res.Header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("content type %q", res.Header.Get("Content-Type"))
			}
		})
	}
	if strings.Contains(w.logs.String(), secret) {
		t.Errorf("a value is in the log: %s", w.logs)
	}
}

func TestBodyThatStopsHalfway(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	conn, err := net.Dial("tcp", strings.TrimPrefix(w.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n%s", spec)
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 400 {
		t.Error(res.StatusCode)
	}
}
