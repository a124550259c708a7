package gateway_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

func TestIfMatch(t *testing.T) {
	w := newWorld(t, gateway.Config{ExtendWait: time.Millisecond})
	other := newAPI(t, w.conn, gateway.Config{ExtendWait: time.Millisecond})
	id := w.create(`{"image":"busybox","ttl":"1m"}`).ID
	path := "/v1/tasks/" + string(id)
	old := w.get(path).header.Get("ETag")
	w.run(id)
	tag := w.get(path).header.Get("ETag")

	for _, r := range []reply{w.do("DELETE", path, "", "If-Match", old), other.do("POST", path+"/extend", `{"ttl":"5m"}`, "If-Match", old)} {
		if e := r.want(t, 412, schemas.CodePrecondition); e.State != schemas.Running || e.Task != id || e.Field != "If-Match" {
			t.Errorf("%+v", e)
		}
	}
	for _, bad := range []string{"12", "W/" + tag, `""`, `"x"`, "hunter2", strings.Repeat(`"1",`, 3)} {
		if e := w.do("DELETE", path, "", "If-Match", bad).want(t, 400, schemas.CodeInvalidHeader); e.Field != "If-Match" || strings.Contains(e.Detail, "hunter2") {
			t.Errorf("%+v", e)
		}
	}
	if got := w.get(path).header.Get("ETag"); got != tag {
		t.Fatalf("a refused request changed the task: %s, was %s", got, tag)
	}

	// Of many that saw the same revision, over two gateways, one moves the deadline.
	var done, refused int
	var mu sync.Mutex
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			a := w.api
			if i%2 == 1 {
				a = other
			}
			r, err := a.try("POST", path+"/extend", fmt.Sprintf(`{"ttl":"%dm"}`, 5+i), "If-Match", `"1", `+tag)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil && r.status == 202:
				done++
			case err == nil && r.status == 412:
				refused++
			default:
				t.Errorf("%d %v %s", r.status, err, r.body)
			}
		})
	}
	all.Wait()
	if done != 1 || refused != 19 {
		t.Errorf("%d done, %d refused", done, refused)
	}
	if r := w.do("DELETE", path, "", "If-Match", "*"); r.status != 200 {
		t.Errorf("%d %s", r.status, r.body)
	}
	r := w.get(path)
	if again := w.get(path, "If-None-Match", r.header.Get("ETag")); again.status != 304 || len(again.body) > 0 || again.header.Get("ETag") != r.header.Get("ETag") {
		t.Errorf("%d %v", again.status, again.header)
	}
}
