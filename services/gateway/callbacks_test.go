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
