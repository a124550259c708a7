package client_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func TestBatches(t *testing.T) {
	const id = "b-01arz3ndektsv4rrffq69g5000"
	calls, gets, key := 0, 0, ""
	var asked []string // what the batch is like, each time it is asked for
	for _, s := range []string{`"running","counts":{"queued":3}`, `"running","counts":{"queued":3}`, `"canceling","counts":{"queued":3}`,
		`"canceling","counts":{"canceled":3}`, `"done","counts":{"canceled":3}`} {
		asked = append(asked, `{"id":"`+id+`","items":3,"state":`+s+`}`)
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		status := `{"id":"` + id + `","state":"running","items":3,"counts":{"queued":3}}`
		switch r.Method + " " + r.URL.String() {
		case "POST /v1/batches":
			if calls++; calls == 1 { // it is sent again under the same key
				key = r.Header.Get("Idempotency-Key")
				w.WriteHeader(http.StatusBadGateway)
				return
			}
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			var items []string
			req, err := schemas.ReadBatch(bytes.NewReader(body), func(_ int, raw []byte) error {
				items = append(items, string(raw))
				return nil
			})
			if err != nil || fmt.Sprint(items) != `[{"command":["a"]} {"name":"b"}]` || req.Labels["l"] != "v" || key == "" || r.Header.Get("Idempotency-Key") != key {
				t.Errorf("%v %s", err, body)
			}
			if s, err := req.ParseItem([]byte(items[0]), schemas.DefaultPolicy()); err != nil || s.Image != "i" || s.Command[0] != "a" {
				t.Error(s, err)
			}
			w.WriteHeader(http.StatusCreated)
		case "GET /v1/batches/" + id:
			status = asked[min(len(asked)-1, gets)]
			gets++
		case "DELETE /v1/batches/" + id:
		case "GET /v1/batches?limit=2":
			status = `{"items":[{"id":"b-3"},{"id":"b-2"}],"next_cursor":"b-2"}`
		case "GET /v1/batches?cursor=b-2&limit=2":
			status = `{"items":[{"id":"b-1"}]}`
		case "GET /v1/batches/" + id + "/items?limit=1000":
			status = `{"items":[{"index":0,"task":"t-a","state":"completed"},{"index":1,"task":"t-b","state":"pending"}],"next_cursor":"2"}`
		case "GET /v1/batches/" + id + "/items?cursor=2&limit=1000":
			status = `{"items":[{"index":2,"task":"t-c","state":"failed"}]}`
		default:
			t.Errorf("%s %s", r.Method, r.URL)
		}
		fmt.Fprint(w, status)
	}))
	defer srv.Close()
	c, err := client.New(srv.URL, client.WithBackoff(1, 1))
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.CreateBatch(t.Context(), client.Batch{
		Template: schemas.Spec{Image: "i"}, Items: []client.BatchItem{{Command: []string{"a"}}, {Name: "b"}}, Labels: map[string]string{"l": "v"},
	}, "")
	if err != nil || b.ID != id || b.Counts[schemas.Queued] != 3 {
		t.Fatal(b, err)
	}
	if b, err = c.Batch(t.Context(), id); err != nil || b.State != "running" {
		t.Error(b, err)
	}
	if _, err = c.CancelBatch(t.Context(), id); err != nil {
		t.Error(err)
	}
	var states []string
	for b, err := range c.WatchBatch(t.Context(), id) {
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, string(b.State)+strings.TrimPrefix(fmt.Sprint(b.Counts), "map"))
	}
	if got := strings.Join(states, " "); got != "running[queued:3] canceling[queued:3] canceling[canceled:3] done[canceled:3]" {
		t.Error(got)
	}
	var ids []string
	for b, err := range c.AllBatches(t.Context(), client.BatchListOptions{Limit: 2}) {
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, string(b.ID))
	}
	if got := strings.Join(ids, " "); got != "b-3 b-2 b-1" {
		t.Error(got)
	}
	n := 0
	for item, err := range c.BatchItems(t.Context(), id) {
		if err != nil || item.Index != n {
			t.Error(item, err)
		}
		n++
	}
	if n != 3 {
		t.Errorf("%d items", n)
	}
}
