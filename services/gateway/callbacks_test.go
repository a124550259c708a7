package gateway_test

import (
	"strings"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

func TestATaskShowsWhatBecameOfItsCallback(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	const secret = "0123456789abcdef"
	task := w.create(`{"image":"busybox","callback":{"url":"https://a.example/x","secret":"` + secret + `"}}`)
	if task.Callback != nil {
		t.Errorf("%+v", task.Callback)
	}
	path := "/v1/tasks/" + string(task.ID)
	w.do("DELETE", path, "")
	r := w.get(path)
	if c := r.task(t).Callback; c == nil || c.State != schemas.DeliveryPending || c.Tries != 0 {
		t.Errorf("%+v", c)
	}
	before := r.header.Get("ETag")

	marks := bus.NewTable(w.conn, schemas.BucketCallbacks, bus.JSON[schemas.Delivery](nil))
	at := time.Now().UTC().Truncate(time.Second)
	if _, err := marks.Create(deadline(t), string(task.ID), schemas.Delivery{State: schemas.DeliveryDelivered, Tries: 2, LastStatus: 204, DeliveredAt: at}, ""); err != nil {
		t.Fatal(err)
	}
	r = w.get(path, "If-None-Match", before)
	if r.status != 200 {
		t.Fatalf("%d: the delivery is news", r.status)
	}
	if c := r.task(t).Callback; c == nil || c.State != schemas.DeliveryDelivered || c.Tries != 2 || c.LastStatus != 204 || !c.DeliveredAt.Equal(at) {
		t.Errorf("%+v", c)
	}
	if s := string(r.body) + string(w.get("/v1/tasks").body) + w.logs.String(); strings.Contains(s, secret) {
		t.Error("the secret is shown")
	}
}

// A wait may be longer than one operation on the bus may take: what became of the callback
// is told all the same.
func TestTheCallbackIsToldAfterALongWait(t *testing.T) {
	const operation = time.Second
	w := newWorld(t, gateway.Config{OpTimeout: operation})
	id := w.create(`{"image":"a","callback":{"url":"http://a.example"}}`).ID
	began, got := time.Now(), make(chan reply, 1)
	go func() {
		r, err := w.try("GET", "/v1/tasks/"+string(id)+"?wait=done&timeout=60s", "")
		if err != nil {
			t.Error(err)
		}
		got <- r
	}()
	until(t, "it waits", func() bool { return w.waiting() == 1 })
	until(t, "an operation that began before the wait is over", func() bool { return time.Since(began) > 2*operation })
	w.run(id)
	w.report(id, schemas.PhaseEnded, ended(0, 0, 0))
	r := <-got
	if c := r.task(t).Callback; c == nil || c.State != schemas.DeliveryPending {
		t.Errorf("%d: %s", r.status, r.body)
	}
}

// waiting counts the requests that wait for a task.
func (a api) waiting() (n float64) {
	a.Helper()
	families, err := a.reg.Gather()
	if err != nil {
		a.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "dayfly_streams_open" && m.GetLabel()[0].GetValue() == "wait" {
				n += m.GetGauge().GetValue()
			}
		}
	}
	return n
}
