package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

// batchBody is a batch of n items whose commands differ.
func batchBody(n int, more string) string {
	var b strings.Builder
	b.WriteString(`{"template":{"image":"busybox","env":{"ALL":"1"}},"items":[`)
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"command":["echo","%d"],"name":"item-%d"}`, i, i)
	}
	return b.String() + `]` + more + `}`
}

func (r reply) batch(t testing.TB) schemas.BatchStatus {
	t.Helper()
	var v schemas.BatchStatus
	if err := schemas.Decode(r.body, &v); err != nil || v.ID == "" {
		t.Fatalf("%d is no batch (%v): %s", r.status, err, r.body)
	}
	return v
}

func (a api) createBatch(body string, extra ...string) schemas.BatchStatus {
	a.Helper()
	r := a.do("POST", "/v1/batches", body, extra...)
	if r.status != 201 {
		a.Fatalf("create: %d %s", r.status, r.body)
	}
	v := r.batch(a)
	if r.header.Get("Location") != "/v1/batches/"+string(v.ID) {
		a.Error(r.header)
	}
	return v
}

func (a api) batch(id schemas.BatchID) schemas.BatchStatus {
	a.Helper()
	r := a.get("/v1/batches/" + string(id))
	if r.status != 200 {
		a.Fatalf("get: %d %s", r.status, r.body)
	}
	return r.batch(a)
}

func (a api) batchDone(id schemas.BatchID) schemas.BatchStatus {
	a.Helper()
	var v schemas.BatchStatus
	until(a, "the batch is done", func() bool { v = a.batch(id); return v.State == "done" })
	return v
}

// items reads all pages.
func (a api) items(id schemas.BatchID) (list []schemas.BatchItem) {
	a.Helper()
	for cursor := "0"; cursor != ""; {
		r := a.get("/v1/batches/" + string(id) + "/items?limit=1000&cursor=" + cursor)
		var page schemas.BatchItemList
		if err := schemas.Decode(r.body, &page); err != nil || r.status != 200 {
			a.Fatalf("%d %v: %s", r.status, err, r.body)
		}
		list, cursor = append(list, page.Items...), page.NextCursor
	}
	return list
}

// another starts another gateway and gives a function that stops it.
func (w *world) another(cfg gateway.Config) (api, func()) {
	w.Helper()
	t := &scope{TB: w.TB}
	a := newAPI(t, natstest.Connect(t, w.nats), cfg)
	var once sync.Once
	stop := func() { once.Do(t.end) }
	w.Cleanup(stop)
	return a, stop
}

// scope is a test whose end comes earlier.
type scope struct {
	testing.TB
	ends []func()
}

func (s *scope) Cleanup(f func()) { s.ends = append(s.ends, f) }

func (s *scope) end() {
	for i := len(s.ends) - 1; i >= 0; i-- {
		s.ends[i]()
	}
}

// stored counts the messages under which items of batches are stored.
func (w *world) stored() (n int) {
	w.Helper()
	s, err := w.conn.JS.Stream(deadline(w), bus.StreamOf(schemas.BucketBatchItems))
	if err != nil {
		w.Fatal(err)
	}
	info, err := s.Info(deadline(w), jetstream.WithSubjectFilter(">"))
	if err != nil {
		w.Fatal(err)
	}
	for subject := range info.State.Subjects {
		if m, err := s.GetLastMsgForSubject(deadline(w), subject); err == nil && len(m.Data) > 0 {
			n++
		}
	}
	return n
}

func TestABatch(t *testing.T) {
	w := newWorld(t, gateway.Config{BatchAhead: 7})
	w.play()
	const n = 100
	made := w.createBatch(batchBody(n, `,"labels":{"run":"r1"}`))
	if made.Items != n || made.State != "running" || made.Labels["run"] != "r1" {
		t.Errorf("%+v", made)
	}
	done := w.batchDone(made.ID)
	if done.Counts[schemas.Completed] != n || len(done.Counts) != 1 || done.DoneAt.IsZero() || done.Callback != nil {
		t.Errorf("%+v", done)
	}
	items := w.items(made.ID)
	if len(items) != n {
		t.Fatalf("%d items", len(items))
	}
	for i, item := range items {
		if item.Index != i || item.State != schemas.Completed || item.Exit == nil || item.Name != fmt.Sprint("item-", i) {
			t.Errorf("%d: %+v", i, item)
		}
		task := w.task(item.Task)
		if task.Batch != made.ID || task.Spec.Command[1] != fmt.Sprint(i) || task.Spec.Env["ALL"] != "1" || task.Spec.Labels["run"] != "r1" {
			t.Errorf("%d: %+v", i, task)
		}
	}
	until(t, "the items are no longer stored", func() bool { return w.stored() == 0 })
	w.get("/v1/batches/"+string(made.ID)+"/items?cursor=x").want(t, 400, schemas.CodeInvalidQuery)
	w.get("/v1/batches/b-x").want(t, 404, schemas.CodeNotFound)
	w.get("/v1/batches/b-01arz3ndektsv4rrffq69g5000").want(t, 404, schemas.CodeNotFound)
}

// No more tasks of a batch wait for a worker than may.
func TestABatchDoesNotFloodTheQueue(t *testing.T) {
	w := newWorld(t, gateway.Config{BatchAhead: 5})
	b := w.createBatch(batchBody(20, ""))
	until(t, "5 wait", func() bool { return w.batch(b.ID).Counts[schemas.Queued] == 5 })
	for i := range 20 {
		if v := w.batch(b.ID); v.Counts[schemas.Queued] > 5 {
			t.Fatalf("%+v", v)
		}
		until(t, "the task is there", func() bool { return w.get("/v1/tasks/"+string(b.ID.Task(i))).status == 200 })
		w.run(b.ID.Task(i))
	}
	until(t, "all run", func() bool { return w.batch(b.ID).Counts[schemas.Running] == 20 })
}

func TestABatchIsRefusedWhole(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	items := strings.Replace(batchBody(50, ""), `"echo","17"`, `"echo",17`, 1)
	items = strings.Replace(items, `"item-33"`, `"item\u000033"`, 1)
	items = strings.Replace(items, `{"command":["echo","40"]`, `{"imagee":"secret-word","command":["echo","40"]`, 1)
	r := w.do("POST", "/v1/batches", items)
	e := r.want(t, 422, schemas.CodeInvalidType)
	var fields []string
	for _, f := range e.Errors {
		fields = append(fields, f.Field)
	}
	if got := strings.Join(fields, " "); got != "items.17.command.1 items.33.labels.name items.40.imagee" || strings.Contains(string(r.body), "secret-word") {
		t.Errorf("%s: %s", got, r.body)
	}
	if e := w.do("POST", "/v1/batches", strings.Replace(batchBody(200, ""), "busybox", "No such", 1)).want(t, 422, schemas.CodeInvalidValue); len(e.Errors) != schemas.MaxFaults {
		t.Errorf("%d errors", len(e.Errors))
	}
	w.do("POST", "/v1/batches", strings.Replace(batchBody(3, ""), `"image"`, `"imagee"`, 1)).want(t, 422, schemas.CodeUnknownField)
	w.do("POST", "/v1/batches", batchBody(3, `,"labels":7`)).want(t, 422, schemas.CodeInvalidType)
	w.do("POST", "/v1/batches", batchBody(3, "")[:60]).want(t, 400, schemas.CodeInvalidJSON)
	w.do("POST", "/v1/batches", strings.Repeat(" ", schemas.MaxBatchBytes+1)).want(t, 413, schemas.CodeTooLarge)
	w.do("POST", "/v1/batches", batchBody(3, ""), "Content-Type", "text/plain").want(t, 415, schemas.CodeContentType)
	if n := w.stored(); n != 0 {
		t.Errorf("%d messages of refused batches stay", n)
	}
	if list := w.get("/v1/tasks"); strings.Contains(string(list.body), `"id"`) {
		t.Errorf("tasks were made: %s", list.body)
	}
}

func TestTheSameKeyIsTheSameBatch(t *testing.T) {
	w := newWorld(t, gateway.Config{MaxBatches: 2})
	ids := make([]schemas.BatchID, 5)
	var all sync.WaitGroup
	for i := range ids {
		all.Go(func() {
			r, err := w.try("POST", "/v1/batches", batchBody(10, ""), "Idempotency-Key", "k1")
			if err != nil || r.status != 201 {
				t.Errorf("%d %v %s", r.status, err, r.body)
				return
			}
			ids[i] = r.batch(t).ID
		})
	}
	all.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Fatalf("%v", ids)
		}
	}
	w.do("POST", "/v1/batches", batchBody(11, ""), "Idempotency-Key", "k1").want(t, 422, schemas.CodeKeyReused)
	if w.createBatch(batchBody(11, ""), "Idempotency-Key", "k2").ID == ids[0] {
		t.Error("another key gave the same batch")
	}
	until(t, "the gateway has heard of both", func() bool {
		r := w.do("POST", "/v1/batches", batchBody(1, ""))
		return r.status == 429 && r.want(t, 429, schemas.CodeTooManyRequests).RetryAfter > 0
	})
}

func TestABatchIsCanceled(t *testing.T) {
	w := newWorld(t, gateway.Config{BatchAhead: 5})
	b := w.createBatch(batchBody(1000, ""))
	until(t, "tasks wait", func() bool { return w.batch(b.ID).Counts[schemas.Queued] == 5 })
	running := b.ID.Task(2)
	w.run(running)
	for range 2 {
		if r := w.do("DELETE", "/v1/batches/"+string(b.ID), ""); r.status != 200 || r.batch(t).State != "canceling" {
			t.Fatalf("%d %s", r.status, r.body)
		}
	}
	until(t, "the worker is told", func() bool { return w.task(running).Cancel != nil })
	if v := w.batch(b.ID); v.State != "canceling" {
		t.Errorf("done although one runs: %+v", v)
	}
	w.report(running, schemas.PhaseEnded, &schemas.End{By: schemas.EndedStop})
	v := w.batchDone(b.ID)
	if v.Counts[schemas.Canceled] != 1000 || v.CanceledAt.IsZero() {
		t.Errorf("%+v", v)
	}
	if r := w.do("DELETE", "/v1/batches/"+string(b.ID), ""); r.status != 200 || r.batch(t).State != "done" {
		t.Errorf("%d %s", r.status, r.body)
	}
	until(t, "the items are no longer stored", func() bool { return w.stored() == 0 })
	w.do("DELETE", "/v1/batches/b-01arz3ndektsv4rrffq69g5000", "").want(t, 404, schemas.CodeNotFound)
}

// All ports are taken by the batch's own first item, so the others cannot be made.
func TestABatchIsCanceledWhoseItemsCannotBeMade(t *testing.T) {
	w := newWorld(t, gateway.Config{TCP: portRange(t, 1), BatchAhead: 5, PortSweep: 20 * time.Millisecond})
	b := w.createBatch(`{"template":` + withPort + `,"items":[{},{},{}]}`)
	var made schemas.TaskID
	until(t, "one has the port", func() bool {
		for i := range 3 {
			if id := b.ID.Task(i); w.get("/v1/tasks/"+string(id)).status == 200 {
				made = id
			}
		}
		return made != ""
	})
	until(t, "the others cannot be made", func() bool { return strings.Contains(w.logs.String(), "work on a batch, trying again") })
	w.run(made)
	if r := w.do("DELETE", "/v1/batches/"+string(b.ID), ""); r.status != 200 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	until(t, "the worker is told", func() bool { return w.task(made).Cancel != nil })
	w.report(made, schemas.PhaseEnded, &schemas.End{By: schemas.EndedStop})
	if v := w.batchDone(b.ID); v.Counts[schemas.Canceled] != 3 {
		t.Errorf("%+v", v)
	}
	for i := range 3 {
		id := b.ID.Task(i)
		task := w.task(id)
		if task.State != schemas.Canceled || task.Batch != b.ID {
			t.Errorf("%d: %+v", i, task)
		}
		if id != made && len(task.Endpoints) > 0 && task.Endpoints[0].Port != 0 {
			t.Errorf("%d was given a port after the cancel: %+v", i, task.Endpoints)
		}
	}
}

// An item that differs from the one before only in its ports, or its GPUs, is looked at too.
func TestABatchIsRefusedForPortsAndGPUs(t *testing.T) {
	const tcp = `{"ports":[{"name":"p","port":7000,"protocol":"tcp"}]}`
	w := newWorld(t, gateway.Config{})
	w.beat(beat("w1", 4, 8<<30))
	until(t, "the worker is seen", func() bool { return len(w.images("/v1/images").Workers) == 1 })
	e := w.do("POST", "/v1/batches", `{"template":{"image":"a"},"items":[{},`+tcp+`,{},{"resources":{"gpus":1}}]}`).want(t, 422, schemas.CodeNotAllowed)
	var fields []string
	for _, f := range e.Errors {
		fields = append(fields, f.Field+" "+string(f.Code))
	}
	if got := strings.Join(fields, ", "); got != "items.1.ports.0.protocol not_allowed, items.3.resources.gpus no_capacity" {
		t.Error(got)
	}
	one := newAPI(t, natstest.Connect(t, w.nats), gateway.Config{TCP: portRange(t, 1)})
	const two = `{"image":"a","ports":[{"name":"p","port":7000,"protocol":"tcp"},{"name":"q","port":7001,"protocol":"tcp"}]}`
	if e := one.do("POST", "/v1/batches", `{"template":`+two+`,"items":[{}]}`).want(t, 422, schemas.CodeNotAllowed); e.Field != "items.0.ports" {
		t.Errorf("%+v", e)
	}
}

// The operator takes the ports away while items wait for theirs: they fail, and the others go on.
func TestItemsThatAreNoLongerAllowedFail(t *testing.T) {
	cfg := gateway.Config{TCP: portRange(t, 1), BatchAhead: 5, BatchLease: 500 * time.Millisecond}
	w := newStore(t)
	a, stop := w.another(cfg)
	b := a.createBatch(`{"template":` + withPort + `,"items":[{},{},{"ports":[]}]}`)
	until(t, "one cannot be made", func() bool { return strings.Contains(a.logs.String(), "work on a batch, trying again") })
	stop()
	cfg.TCP = gateway.PortRange{}
	a, _ = w.another(cfg)
	w.play()
	if v := a.batchDone(b.ID); v.Counts[schemas.Failed] != 1 || v.Counts[schemas.Completed] != 2 {
		t.Errorf("%+v", v)
	}
}

// countedKind is a kind of a site that is told of each item.
type countedKind func()

func (countedKind) Names() []string { return []string{"counted"} }

func (k countedKind) Make(asked schemas.Spec, _ []string) (schemas.Spec, error) {
	k()
	asked.Kind, asked.Payload, asked.Image = "", nil, "a"
	return asked, nil
}

// Nobody waits for the answer of a check whose client has left.
func TestAClientThatLeavesEndsTheCheckOfItsItems(t *testing.T) {
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	checked := 0
	policy := schemas.DefaultPolicy()
	policy.Kinds = countedKind(func() { checked++; leave() })
	w := newWorld(t, gateway.Config{Policy: policy})
	until(t, "it is ready", func() bool { return w.get("/v1/batches").status == 200 })
	body := `{"template":{"kind":"counted"},"items":[{}` + strings.Repeat(",{}", 999) + `]}`
	req := httptest.NewRequestWithContext(ctx, "POST", "http://localhost/v1/batches", strings.NewReader(body))
	req.Header.Set("Content-Type", "application/json")
	rec := httptest.NewRecorder()
	w.g.Handler().ServeHTTP(rec, req)
	if checked != 1 || rec.Code != 503 {
		t.Errorf("%d items were checked; %d %s", checked, rec.Code, rec.Body)
	}
	if n := w.stored(); n != 0 {
		t.Errorf("%d messages of its items stay", n)
	}
}

func TestBatchesAreListed(t *testing.T) {
	cfg := gateway.Config{BatchAhead: 5}
	w := newWorld(t, cfg)
	page := func(a api, query string) (l schemas.BatchList) {
		t.Helper()
		r := a.get("/v1/batches" + query)
		if err := schemas.Decode(r.body, &l); err != nil || r.status != 200 {
			t.Fatalf("%d %v: %s", r.status, err, r.body)
		}
		return l
	}
	if l := page(w.api, ""); l.Items == nil || len(l.Items) > 0 || l.NextCursor != "" {
		t.Errorf("%+v", l)
	}
	open := w.createBatch(batchBody(3, ""))
	until(t, "all of it waits", func() bool {
		l := page(w.api, "").Items
		return len(l) == 1 && l[0].ID == open.ID && l[0].State == "running" && l[0].Counts[schemas.Queued] == 3
	})
	w.play()
	w.batchDone(open.ID)
	var ids []schemas.BatchID
	for i := range 5 {
		b := w.createBatch(batchBody(i+1, `,"labels":{"n":"x"},"callback":{"url":"http://a.example"}`))
		w.batchDone(b.ID)
		ids = append(ids, b.ID)
	}
	slices.Sort(ids)
	slices.Reverse(ids)
	other, _ := w.another(cfg)
	until(t, "the other gateway knows all", func() bool { return len(page(other, "").Items) == 6 })
	for _, a := range []api{w.api, other} {
		var got []schemas.BatchID
		for query := "?limit=2"; query != ""; {
			l := page(a, query)
			for _, b := range l.Items {
				if one := a.batch(b.ID); b.State != one.State || !maps.Equal(b.Counts, one.Counts) || b.Labels["n"] != one.Labels["n"] || b.Callback != nil || b.Revision != one.Revision {
					t.Errorf("%+v, but alone %+v", b, one)
				}
				got = append(got, b.ID)
			}
			if query = ""; l.NextCursor != "" {
				query = "?limit=2&cursor=" + l.NextCursor
			}
		}
		if !slices.Contains(got, open.ID) || len(got) != 6 || !slices.IsSortedFunc(got, func(a, b schemas.BatchID) int { return strings.Compare(string(b), string(a)) }) {
			t.Errorf("%v", got)
		}
	}
	// One whose time is over is no longer there, and the cursor that names it goes on.
	table := bus.NewTable(w.conn, schemas.BucketBatches, bus.JSON[schemas.Batch](nil))
	e, err := table.Get(deadline(t), string(ids[1]))
	if err == nil {
		err = table.Delete(deadline(t), e.Key, e.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
	until(t, "it is gone", func() bool { return len(page(other, "").Items) == 5 })
	if l := page(other, "?cursor="+string(ids[1])); len(l.Items) == 0 || l.Items[0].ID >= ids[1] {
		t.Errorf("%+v", l)
	}
	for _, query := range []string{"?cursor=x", "?cursor=t-01arz3ndektsv4rrffq69g5fav", "?limit=0", "?limit=1001", "?state=done"} {
		w.get("/v1/batches"+query).want(t, 400, schemas.CodeInvalidQuery)
	}

	count := map[string]float64{}
	families, err := w.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			switch f.GetName() {
			case "dayfly_batches_accepted_total":
				count["accepted"] = m.GetCounter().GetValue()
			case "dayfly_batches_open":
				count["open"] = m.GetGauge().GetValue()
			case "dayfly_batch_items_total":
				count[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
			case "dayfly_batch_item_make_seconds":
				count["made"] = float64(m.GetHistogram().GetSampleCount())
			case "dayfly_batch_seconds":
				count["done"] = float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	want := map[string]float64{"accepted": 6, "open": 0, "completed": 18, "failed": 0, "canceled": 0, "expired": 0, "gone": 0, "made": 18, "done": 6}
	if !maps.Equal(count, want) {
		t.Errorf("%v, want %v", count, want)
	}
}

// Gateways come and go while a batch is made, and the server is restarted: each item
// becomes one task, and the batch is done when all are.
func TestGatewaysDieWhileABatchIsMade(t *testing.T) {
	cfg := gateway.Config{BatchAhead: 10, BatchLease: 500 * time.Millisecond}
	w := newStore(t)
	var mu sync.Mutex
	born := map[string]int{}
	ctx, stopWatch := context.WithCancel(context.Background())
	var watch sync.WaitGroup
	watch.Go(func() {
		_ = w.conn.Read(ctx, bus.ReadOptions{Stream: bus.StreamOf(schemas.BucketTasks), Follow: true}, func(m bus.Msg) error {
			var r schemas.Record
			if err := schemas.Decode(m.Data, &r); err == nil && r.State == schemas.Queued {
				mu.Lock()
				born[m.Subject]++
				mu.Unlock()
			}
			return nil
		})
	})
	t.Cleanup(func() { stopWatch(); watch.Wait() })
	w.play()
	const n = 400
	second, stopSecond := w.another(cfg)
	first, stop := w.another(cfg)
	b := first.createBatch(batchBody(n, `,"callback":{"url":"http://a.example"}`))
	for round := range 4 {
		until(t, "some are done", func() bool { return second.batch(b.ID).Counts[schemas.Completed] > round*60 })
		stop()
		if round == 2 { // now the only one dies
			stopSecond()
		}
		if round == 1 {
			natstest.Restart(t, w.nats)
		}
		first, stop = w.another(cfg)
		if round == 2 {
			second = first
		}
	}
	v := first.batchDone(b.ID)
	if v.Counts[schemas.Completed] != n {
		t.Errorf("%+v", v)
	}
	mu.Lock()
	defer mu.Unlock()
	for subject, times := range born {
		if times != 1 {
			t.Errorf("%s was made %d times", subject, times)
		}
	}
	table := bus.NewTable(w.conn, schemas.BucketBatches, bus.JSON[schemas.Batch](nil))
	e, err := table.Get(deadline(t), string(b.ID))
	if err != nil || !e.Value.Done() {
		t.Fatal(err)
	}
	if v.Callback == nil || v.Callback.State != schemas.DeliveryPending || v.Callback.URL != "http://a.example" {
		t.Errorf("%+v", v.Callback)
	}
}

// What a batch knows outlives the records of its tasks, and an item whose record went
// unseen is said to be gone.
func TestABatchOutlivesItsTasks(t *testing.T) {
	cfg := gateway.Config{BatchLease: 500 * time.Millisecond}
	w := newStore(t)
	a, stop := w.another(cfg)
	b := a.createBatch(batchBody(3, ""))
	until(t, "all wait", func() bool { return a.batch(b.ID).Counts[schemas.Queued] == 3 })
	w.run(b.ID.Task(0))
	w.report(b.ID.Task(0), schemas.PhaseEnded, ended(1, 0, 0))
	table := bus.NewTable(w.conn, schemas.BucketBatches, bus.JSON[schemas.Batch](nil))
	until(t, "the result is saved", func() bool {
		e, err := table.Get(deadline(t), string(b.ID))
		return err == nil && strings.HasPrefix(e.Value.Results, "f")
	})
	stop()
	for i := range 2 {
		e, err := w.records.Get(deadline(t), string(b.ID.Task(i)))
		if err == nil {
			err = w.records.Delete(deadline(t), e.Key, e.Revision)
		}
		if err != nil && !errors.Is(err, bus.ErrNotFound) {
			t.Fatal(err)
		}
	}
	w.run(b.ID.Task(2))
	w.report(b.ID.Task(2), schemas.PhaseEnded, ended(0, 0, 0))
	a, _ = w.another(cfg)
	v := a.batchDone(b.ID)
	if v.Counts[schemas.Failed] != 1 || v.Counts[schemas.ItemGone] != 1 || v.Counts[schemas.Completed] != 1 {
		t.Errorf("%+v", v)
	}
}

func BenchmarkBatch(b *testing.B) {
	for b.Loop() {
		func() {
			t := &scope{TB: b}
			defer t.end()
			w := newWorld(t, gateway.Config{})
			w.play()
			body := batchBody(schemas.MaxBatchItems, "")
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			start := time.Now()
			v := w.createBatch(body)
			accepted := time.Since(start)
			done := make(chan struct{})
			go func() { defer close(done); w.waitDone(v.ID) }()
			peak := uint64(0)
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for waiting := true; waiting; {
				select {
				case <-done:
					waiting = false
				case <-tick.C:
					runtime.ReadMemStats(&after)
					peak = max(peak, after.HeapAlloc)
				}
			}
			b.ReportMetric(accepted.Seconds()*1000, "ms-to-accept")
			b.ReportMetric(float64(schemas.MaxBatchItems)/time.Since(start).Seconds(), "items/s")
			b.ReportMetric(float64(peak-before.HeapAlloc)/(1<<20), "MiB-peak-more")
		}()
	}
}

// The largest body that is taken: how much more memory than before is in use while it
// is accepted, beside what the embedded NATS server keeps of it.
func BenchmarkLargestBatch(b *testing.B) {
	w := newStore(b)
	a, _ := w.another(gateway.Config{BatchAhead: 1})
	item := `{"stdin":"` + strings.Repeat("x", 3100) + `"}`
	size := 0
	for b.Loop() {
		var before, now runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		body, out := io.Pipe()
		var writer sync.WaitGroup
		writer.Go(func() {
			fmt.Fprint(out, `{"template":{"image":"busybox"},"items":[`+item)
			for range schemas.MaxBatchItems - 1 {
				fmt.Fprint(out, ","+item)
			}
			fmt.Fprint(out, "]}")
			out.Close()
		})
		peak := before.HeapAlloc
		done := make(chan struct{})
		writer.Go(func() {
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-done:
					return
				case <-tick.C:
					runtime.ReadMemStats(&now)
					peak = max(peak, now.HeapAlloc)
				}
			}
		})
		res, err := http.Post(a.url+"/v1/batches", "application/json", body)
		if err != nil || res.StatusCode != 201 {
			b.Fatal(err, res)
		}
		res.Body.Close()
		close(done)
		writer.Wait()
		b.ReportMetric(float64(peak-before.HeapAlloc)/(1<<20), "MiB-peak-more")
		size = schemas.MaxBatchItems * (len(item) + 1)
	}
	b.SetBytes(int64(size))
}

func (a api) waitDone(id schemas.BatchID) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		if r, err := a.try("GET", "/v1/batches/"+string(id), ""); err != nil || strings.Contains(string(r.body), `"done"`) {
			return
		}
	}
}
