package reaper_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/reaper"
)

const secret = "sixteen bytes of secret"

// receiver is somebody's server: it answers the n-th request for a path by what the
// test says, and remembers what came.
type receiver struct {
	*httptest.Server
	mu   sync.Mutex
	got  []delivery    // under mu
	news chan struct{} // under mu
}

type delivery struct {
	method string
	path   string
	header http.Header
	body   []byte
}

func newReceiver(t *testing.T, answer func(w http.ResponseWriter, r *http.Request, nth int)) *receiver {
	r := &receiver{news: make(chan struct{})}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			t.Error(err)
		}
		r.mu.Lock()
		r.got = append(r.got, delivery{req.Method, req.URL.Path, req.Header, body})
		nth := 0
		for _, d := range r.got {
			if d.path == req.URL.Path {
				nth++
			}
		}
		close(r.news)
		r.news = make(chan struct{})
		r.mu.Unlock()
		answer(w, req, nth)
	}))
	t.Cleanup(func() { r.CloseClientConnections(); r.Close() })
	return r
}

// to gives what came for a path.
func (r *receiver) to(path string) (list []delivery) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range r.got {
		if d.path == path {
			list = append(list, d)
		}
	}
	return list
}

// wait waits until n requests came for a path.
func (r *receiver) wait(ctx context.Context, t *testing.T, path string, n int) []delivery {
	t.Helper()
	for {
		r.mu.Lock()
		news := r.news
		r.mu.Unlock()
		if got := r.to(path); len(got) >= n {
			return got
		}
		select {
		case <-news:
		case <-ctx.Done():
			t.Fatalf("%d of %d requests for %s", len(r.to(path)), n, path)
		}
	}
}

func newCallbackBench(t *testing.T) (*bench, *bus.Table[schemas.Delivery]) {
	b := newBench(t)
	b.cfg.Callbacks = reaper.Callbacks{
		Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, Timeout: 2 * time.Second,
		First: 20 * time.Millisecond, Most: 200 * time.Millisecond,
	}
	return b, bus.NewTable(b.core, schemas.BucketCallbacks, bus.JSON[schemas.Delivery](nil))
}

// finish makes a final record that is to be announced at url.
func (b *bench) finish(url string) schemas.TaskID {
	b.t.Helper()
	id := b.accept(func(s *schemas.Spec) {
		s.Callback = &schemas.Callback{URL: url, Secret: secret}
		s.Env = map[string]string{"TOKEN": "of the task"}
	})
	b.next(id, func(m schemas.Meta) schemas.Event { return schemas.AskCancel{Meta: m} })
	return id
}

// delivered waits for the end of a delivery.
func (b *bench) delivered(table *bus.Table[schemas.Delivery], id schemas.TaskID, want schemas.DeliveryState) schemas.Delivery {
	b.t.Helper()
	ctx := b.ctx()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		e, err := table.Get(ctx, string(id))
		switch {
		case err == nil && e.Value.Done():
			if e.Value.State != want {
				b.t.Fatalf("%+v, want %s", e.Value, want)
			}
			return e.Value
		case err != nil && !errors.Is(err, bus.ErrNotFound):
			b.t.Fatal(err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			b.t.Fatalf("never %s: %+v", want, e.Value)
		}
	}
}

func TestAFinalTaskIsAnnounced(t *testing.T) {
	b, marks := newCallbackBench(t)
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, nth int) {
		if nth <= 2 {
			w.WriteHeader(500)
		}
		fmt.Fprint(w, strings.Repeat("x", 1<<20)) // nobody reads all of it
	})
	b.start()
	id := b.finish(r.URL + "/done")
	d := b.delivered(marks, id, schemas.DeliveryDelivered)
	if d.Tries != 3 || d.LastStatus != 200 || d.LastError != "" || d.DeliveredAt.IsZero() {
		t.Errorf("%+v", d)
	}
	got := r.to("/done")
	if len(got) != 3 {
		t.Fatalf("%d requests", len(got))
	}
	rec, err := b.table.Get(b.ctx(), string(id))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range got {
		var task schemas.Task
		if err := schemas.Decode(m.body, &task); err != nil {
			t.Fatal(err)
		}
		if task.ID != id || task.State != schemas.Canceled || task.Revision != rec.Revision {
			t.Errorf("%s", m.body)
		}
		if s := string(m.body); strings.Contains(s, secret) || strings.Contains(s, "of the task") {
			t.Errorf("a secret went out: %s", s)
		}
		var at int64
		if _, err := fmt.Sscanf(m.header.Get(schemas.CallbackSignature), "t=%d,", &at); err != nil {
			t.Fatal(err)
		}
		if want := rec.Value.Spec.Callback.Signature(time.Unix(at, 0), m.body); m.header.Get(schemas.CallbackSignature) != want {
			t.Errorf("signed %s, want %s", m.header.Get(schemas.CallbackSignature), want)
		}
		if m.header.Get(schemas.CallbackTask) != string(id) || m.header.Get(schemas.CallbackAttempt) != "0" ||
			m.header.Get(schemas.CallbackDelivery) != got[0].header.Get(schemas.CallbackDelivery) || m.header.Get("Content-Type") != "application/json" {
			t.Errorf("%v", m.header)
		}
	}
}

// A task of another system's protocol is announced as that does it, and all others as ever.
func TestAnotherForm(t *testing.T) {
	b, marks := newCallbackBench(t)
	of := ""
	b.cfg.Callbacks.Form = func(task schemas.Task) (string, []byte, error) {
		if task.Spec.Env != nil || task.Spec.Callback != nil {
			t.Errorf("it is given %+v", task.Spec)
		}
		if string(task.ID) != of {
			return "", nil, nil
		}
		return http.MethodPut, []byte("in another form"), nil
	}
	r := newReceiver(t, func(http.ResponseWriter, *http.Request, int) {})
	of = string(b.finish(r.URL + "/form"))
	other := b.finish(r.URL + "/usual")
	b.start()
	b.delivered(marks, schemas.TaskID(of), schemas.DeliveryDelivered)
	b.delivered(marks, other, schemas.DeliveryDelivered)
	if got := r.to("/form")[0]; got.method != http.MethodPut || string(got.body) != "in another form" {
		t.Errorf("%s %s", got.method, got.body)
	}
	if got := r.to("/usual")[0]; got.method != http.MethodPost || !strings.Contains(string(got.body), string(other)) {
		t.Errorf("%s %s", got.method, got.body)
	}
}

func TestWhatReceiversAnswer(t *testing.T) {
	b, marks := newCallbackBench(t)
	b.cfg.Retention, b.cfg.Callbacks.Timeout = 5*time.Second, time.Second
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	r := newReceiver(t, func(w http.ResponseWriter, r *http.Request, nth int) {
		switch r.URL.Path {
		case "/gone":
			w.WriteHeader(410)
		case "/busy":
			if nth <= 5 {
				w.WriteHeader(429)
			}
		case "/moved":
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		case "/hangs":
			if nth == 1 {
				select {
				case <-over:
				case <-r.Context().Done():
				}
			}
		case "/drops":
			if nth == 1 {
				panic(http.ErrAbortHandler)
			}
		case "/fails":
			w.WriteHeader(503)
		}
	})
	b.start()
	for path, want := range map[string]schemas.Delivery{
		"/gone":  {State: schemas.DeliveryRefused, Tries: 3, LastError: "status 410"},
		"/busy":  {State: schemas.DeliveryDelivered, Tries: 6},
		"/moved": {State: schemas.DeliveryRefused, Tries: 3, LastError: "redirect"},
		"/hangs": {State: schemas.DeliveryDelivered, Tries: 2},
		"/drops": {State: schemas.DeliveryDelivered, Tries: 2},
		"/fails": {State: schemas.DeliveryGaveUp, LastError: "status 503"},
	} {
		d := b.delivered(marks, b.finish(r.URL+path), want.State)
		if want.Tries != 0 && d.Tries != want.Tries || d.LastError != want.LastError {
			t.Errorf("%s: %+v, want %+v", path, d, want)
		}
	}
	if got := r.to("/elsewhere"); len(got) > 0 {
		t.Error("a redirect was followed")
	}
}

func TestCallbacksReachNoAddressOfTheInside(t *testing.T) {
	b, marks := newCallbackBench(t)
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	b.cfg.Callbacks.Allow = nil
	r := newReceiver(t, func(http.ResponseWriter, *http.Request, int) {})
	b.start()
	port := r.URL[strings.LastIndex(r.URL, ":"):]
	for _, host := range []string{"127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254", "10.0.0.1", "[fe80::1]", "224.0.0.1"} {
		d := b.delivered(marks, b.finish("http://"+host+port+"/x"), schemas.DeliveryRefused)
		if d.LastError != "address not allowed" || d.Tries != 3 {
			t.Errorf("%s: %+v", host, d)
		}
	}
	if len(r.to("/x")) > 0 {
		t.Error("it was reached")
	}
}

func TestAReceiverIsLeftAloneForAsLongAsItAsks(t *testing.T) {
	b, marks := newCallbackBench(t)
	b.cfg.Callbacks.Most = time.Hour
	r := newReceiver(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		w.Header().Set("Retry-After", "1800")
		w.WriteHeader(503)
	})
	b.start()
	id := b.finish(r.URL + "/x")
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		e, err := marks.Get(b.ctx(), string(id))
		if err == nil && e.Value.LastStatus == 503 {
			if d := e.Value; d.State != schemas.DeliveryPending || d.Tries != 1 || d.NextAt.Before(time.Now().Add(20*time.Minute)) {
				t.Errorf("%+v", d)
			}
			return
		}
		select {
		case <-tick.C:
		case <-b.ctx().Done():
			t.Fatal(err)
		}
	}
}

// A reaper that is stopped in the middle of a try is followed by the next, and a
// delivery is made although nobody was there when the task ended.
func TestAnotherReaperGoesOn(t *testing.T) {
	b, marks := newCallbackBench(t)
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	r := newReceiver(t, func(_ http.ResponseWriter, r *http.Request, nth int) {
		if nth == 1 {
			select {
			case <-over:
			case <-r.Context().Done():
			}
		}
	})
	id := b.finish(r.URL + "/x")
	ctx, stop := context.WithCancel(b.ctx())
	stopped := make(chan error, 1)
	conn := natstest.Connect(t, b.server)
	go func() { stopped <- reaper.Run(ctx, reaper.Deps{Conn: conn, Logger: zerolog.Nop()}, b.cfg) }()
	r.wait(b.ctx(), t, "/x", 1)
	stop()
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	natstest.Restart(t, b.server)
	b.start()
	if d := b.delivered(marks, id, schemas.DeliveryDelivered); d.Tries != 2 {
		t.Errorf("%+v", d)
	}
}

// A reaper that died in the middle of a try left its claim, which ends by itself.
func TestAClaimEnds(t *testing.T) {
	b, marks := newCallbackBench(t)
	b.cfg.Callbacks.Most = 50 * time.Millisecond
	r := newReceiver(t, func(http.ResponseWriter, *http.Request, int) {})
	id := b.finish(r.URL + "/x")
	left := schemas.Delivery{State: schemas.DeliveryPending, Tries: 7, NextAt: time.Now().Add(300 * time.Millisecond)}
	if _, err := marks.Create(b.ctx(), string(id), left, ""); err != nil {
		t.Fatal(err)
	}
	b.start()
	if d := b.delivered(marks, id, schemas.DeliveryDelivered); d.Tries != 8 || d.DeliveredAt.Before(left.NextAt) {
		t.Errorf("%+v", d)
	}
}

func TestTwoReapersDeliverEachOnce(t *testing.T) {
	b, marks := newCallbackBench(t)
	const tasks = 200
	r := newReceiver(t, func(http.ResponseWriter, *http.Request, int) {})
	b.start()
	b.start()
	ids := make([]schemas.TaskID, tasks)
	for i := range ids {
		ids[i] = b.finish(fmt.Sprintf("%s/%d", r.URL, i))
	}
	for i, id := range ids {
		b.delivered(marks, id, schemas.DeliveryDelivered)
		if n := len(r.to(fmt.Sprintf("/%d", i))); n != 1 {
			t.Errorf("%s was announced %d times", id, n)
		}
	}
}

func TestASlowReceiverKeepsNoOtherWaiting(t *testing.T) {
	b, marks := newCallbackBench(t)
	b.cfg.Callbacks.Timeout = 20 * time.Second
	over := make(chan struct{})
	slow := newReceiver(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		select {
		case <-over:
		case <-r.Context().Done():
		}
	})
	quick := newReceiver(t, func(http.ResponseWriter, *http.Request, int) {})
	b.start()
	var waiting []schemas.TaskID
	for range 30 {
		waiting = append(waiting, b.finish(slow.URL+"/x"))
	}
	slow.wait(b.ctx(), t, "/x", 8)
	b.delivered(marks, b.finish(quick.URL+"/x"), schemas.DeliveryDelivered)
	if n := len(slow.to("/x")); n != 8 {
		t.Errorf("%d tries at a time", n)
	}
	close(over)
	for _, id := range waiting {
		b.delivered(marks, id, schemas.DeliveryDelivered)
	}
}

func TestCallbacksAreCounted(t *testing.T) {
	b, marks := newCallbackBench(t)
	r := newReceiver(t, func(w http.ResponseWriter, _ *http.Request, nth int) {
		if nth == 1 {
			w.WriteHeader(500)
		}
	})
	reg := prometheus.NewRegistry()
	conn := natstest.Connect(t, b.server)
	b.background(func(ctx context.Context) error {
		return reaper.Run(ctx, reaper.Deps{Conn: conn, Logger: zerolog.Nop(), Metrics: reg}, b.cfg)
	})
	b.delivered(marks, b.finish(r.URL), schemas.DeliveryDelivered)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		if f.GetName() == "dayfly_callbacks_total" {
			for _, m := range f.GetMetric() {
				got[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	if got["retry"] != 1 || got["delivered"] != 1 || got["refused"] != 0 {
		t.Error(got)
	}
}

func TestABatchIsAnnouncedOnceItIsDone(t *testing.T) {
	b, marks := newCallbackBench(t)
	r := newReceiver(t, func(http.ResponseWriter, *http.Request, int) {})
	b.start()
	b.start()
	batches := bus.NewTable(b.core, schemas.BucketBatches, bus.Codec[schemas.Batch]{
		Encode: func(v schemas.Batch) ([]byte, nats.Header, error) {
			data, err := schemas.Encode(v)
			return data, v.Headers(), err
		},
		Decode: func(data []byte) (v schemas.Batch, err error) { return v, schemas.Decode(data, &v) },
	})
	const id = "b-01arz3ndektsv4rrffq69g5000"
	req := schemas.BatchRequest{Items: 3, Callback: &schemas.Callback{URL: r.URL + "/x", Secret: secret}}
	e, err := batches.Create(b.ctx(), id, schemas.NewBatch(id, req, "u", []int{0}, meta()), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, results := range []string{"c..", "cf.", "cfx"} {
		if n := len(r.to("/x")); n > 0 {
			t.Fatal("announced before its end")
		}
		next, err := e.Value.Next(schemas.BatchStep{Meta: meta(), Begun: 3, Made: 3, Results: []byte(results)})
		if err != nil {
			t.Fatal(err)
		}
		if e, err = batches.Replace(b.ctx(), e, next, ""); err != nil {
			t.Fatal(err)
		}
	}
	b.delivered(marks, id, schemas.DeliveryDelivered)
	got := r.to("/x")
	if len(got) != 1 || got[0].header.Get(schemas.CallbackBatch) != id || got[0].header.Get(schemas.CallbackSignature) == "" {
		t.Fatalf("%+v", got)
	}
	var v schemas.BatchStatus
	if err := schemas.Decode(got[0].body, &v); err != nil || v.ID != id || v.State != "done" || fmt.Sprint(v.Counts) != "map[canceled:1 completed:1 failed:1]" {
		t.Errorf("%v %s", err, got[0].body)
	}
	if strings.Contains(string(got[0].body), secret) {
		t.Error("the secret went out")
	}
}
