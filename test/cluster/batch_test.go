//go:build cluster

package cluster

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// receiver takes callbacks as a backend should: it checks the signature, knows by the
// delivery's name what came before, and counts each once.
type receiver struct {
	*httptest.Server
	callback schemas.Callback

	mu    sync.Mutex
	seen  map[string]int // under mu: requests by delivery
	last  schemas.BatchStatus
	wrong []string // under mu

	asked, answer chan struct{} // the first request is held back
}

func newReceiver(t *testing.T) *receiver {
	r := &receiver{seen: map[string]int{}, asked: make(chan struct{}), answer: make(chan struct{})}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		stamp, _, _ := strings.Cut(strings.TrimPrefix(req.Header.Get(schemas.CallbackSignature), "t="), ",")
		at, _ := strconv.ParseInt(stamp, 10, 64)
		r.mu.Lock()
		r.seen[req.Header.Get(schemas.CallbackDelivery)]++
		first := len(r.seen) == 1 && r.seen[req.Header.Get(schemas.CallbackDelivery)] == 1
		r.last = schemas.BatchStatus{}
		if err = errors.Join(err, schemas.Decode(body, &r.last)); err != nil {
			r.wrong = append(r.wrong, err.Error())
		}
		if r.callback.Signature(time.Unix(at, 0), body) != req.Header.Get(schemas.CallbackSignature) {
			r.wrong = append(r.wrong, "it is not signed with the secret")
		}
		r.mu.Unlock()
		if first {
			close(r.asked)
			<-r.answer
		}
	}))
	r.callback = schemas.Callback{URL: r.URL + "/done", Secret: rand.Text()}
	t.Cleanup(r.Close)
	return r
}

// The largest batch: its gateways are killed while it is made, its reapers while it ends
// and while its end is announced. Every item is one task, tried once; the counts are
// exact; and it is announced once.
func TestALargeBatchOutlivesItsGatewaysAndReapers(t *testing.T) {
	const n = schemas.MaxBatchItems
	r := newReceiver(t)
	s := start(t, harness.SiteOptions{Gateways: 2, Reapers: 2, Agents: 4, Fake: true, Scale: 0.2,
		ReaperArgs: []string{"--callback-allow", "127.0.0.1/32"}})
	var body strings.Builder
	fmt.Fprintf(&body, `{"template":{"image":"any","ttl":"10m"},"labels":{"run":"large"},"callback":{"url":%q,"secret":%q},"items":[`, r.callback.URL, r.callback.Secret)
	want := map[schemas.State]int{}
	state := func(i int) schemas.State { // each ninth fails
		if i%9 == 4 {
			return schemas.Failed
		}
		return schemas.Completed
	}
	for i := range n {
		code := 0
		if state(i) == schemas.Failed {
			code = 3
		}
		if want[state(i)]++; i > 0 {
			body.WriteByte(',')
		}
		fmt.Fprintf(&body, `{"name":"item-%d","command":["exit","%d"]}`, i, code)
	}
	body.WriteString("]}")
	began := time.Now()
	var b schemas.BatchStatus
	if err := call(within(t, patience), s, "POST", "/v1/batches", rand.Text(), body.String(), &b); err != nil {
		t.Fatal(err)
	}
	t.Logf("accepted after %s", time.Since(began).Round(time.Millisecond))
	path := "/v1/batches/" + string(b.ID)
	look := func() error {
		var now schemas.BatchStatus // decoding into b would keep states that no item is in any more
		err := call(within(t, patience), s, "GET", path, "", nil, &now)
		if err == nil {
			b = now
		}
		return err
	}
	// reach waits until so many items are over.
	reach := func(least int) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d items are over", least), func() error {
			err := look()
			if over := b.Counts[schemas.Completed] + b.Counts[schemas.Failed]; err == nil && over < least {
				err = fmt.Errorf("%d are: %s %v", over, b.State, b.Counts)
			}
			return err
		})
	}
	kill := func(list ...*harness.Process) {
		t.Helper()
		for _, p := range list {
			p.Kill()
		}
		for _, p := range list {
			if err := p.Start(within(t, patience)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i, least := range []int{500, 2000, 3500, 5000} { // one of the two makes the tasks
		reach(least)
		if b.Counts[schemas.ItemPending] == 0 {
			t.Fatalf("too late to kill a gateway while tasks are made: %v", b.Counts)
		}
		if i < 3 {
			kill(s.Gateway[i%2])
		} else {
			kill(s.Gateway...)
		}
	}
	for i, least := range []int{n - 1500, n - 700} {
		reach(least)
		kill(s.Reaper[i])
	}
	select {
	case <-r.asked:
	case <-within(t, 2*patience).Done():
		t.Fatal("it was never announced")
	}
	t.Logf("over after %s", time.Since(began).Round(time.Millisecond))
	kill(s.Reaper...) // one of them waits for the answer
	close(r.answer)

	eventually(t, "the callback is delivered", func() error {
		err := look()
		if err == nil && (b.Callback == nil || b.Callback.State != schemas.DeliveryDelivered) {
			err = fmt.Errorf("%+v", b.Callback)
		}
		return err
	})
	if b.State != schemas.BatchDone || !maps.Equal(b.Counts, want) {
		t.Errorf("%s %v, want %v", b.State, b.Counts, want)
	}
	r.mu.Lock()
	if len(r.seen) != 1 || len(r.wrong) > 0 || r.last.ID != b.ID || r.last.State != schemas.BatchDone || !maps.Equal(r.last.Counts, want) {
		t.Errorf("announced %v, wrong %v, with %+v", r.seen, r.wrong, r.last)
	}
	t.Logf("announced %v", r.seen)
	r.mu.Unlock()

	items := 0
	for cursor := "0"; cursor != ""; {
		var page schemas.BatchItemList
		if err := call(within(t, patience), s, "GET", path+"/items?limit=1000&cursor="+cursor, "", nil, &page); err != nil {
			t.Fatal(err)
		}
		for _, item := range page.Items {
			if item.Index != items || item.Task != b.ID.Task(items) || item.State != state(items) || item.Name != fmt.Sprintf("item-%d", items) {
				t.Errorf("item %d: %+v", items, item)
			}
			items++
		}
		cursor = page.NextCursor
	}
	tasks := map[schemas.TaskID]bool{}
	for cursor := ""; ; {
		var page schemas.TaskList
		if err := call(within(t, patience), s, "GET", "/v1/tasks?limit=1000&label=run=large"+cursor, "", nil, &page); err != nil {
			t.Fatal(err)
		}
		for _, task := range page.Items {
			tasks[task.ID] = true
			if task.Attempt != 1 || task.Batch != b.ID {
				t.Errorf("%s of %s was tried %d times", task.ID, task.Batch, task.Attempt)
			}
		}
		if page.NextCursor == "" {
			break
		}
		cursor = "&cursor=" + page.NextCursor
	}
	if items != n || len(tasks) != n {
		t.Errorf("%d items, %d tasks", items, len(tasks))
	}
}
