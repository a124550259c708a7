package gateway_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

func (a api) images(path string) (l schemas.ImageList) {
	a.Helper()
	a.ok(a.get(path), &l)
	return l
}

// ok wants a 200 and reads it.
func (a api) ok(r reply, v any) {
	a.Helper()
	if r.status != 200 {
		a.Fatalf("%d: %s", r.status, r.body)
	}
	if err := schemas.Decode(r.body, v); err != nil {
		a.Fatal(err)
	}
}

// An image that is wanted is listed with how each worker stands to it, until it is released.
func TestWantedImages(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	for _, name := range []schemas.WorkerID{"w1", "w2", "w3", "w4"} {
		w.beat(beat(name, 4, 8<<30))
	}
	until(t, "the workers are seen", func() bool {
		l := w.images("/v1/images")
		return len(l.Items) == 0 && len(l.Workers) == 4
	})
	const image = "registry.lan/web:1"
	r := w.do("POST", "/v1/images", `{"image":"registry.lan/web:1","workers":["w1","w2","w3","away"]}`)
	var i schemas.Image
	w.ok(r, &i)
	if i.By != schemas.ByOperator || len(i.Status) != 3 || i.Status[0].State != schemas.ImageUnheard {
		t.Errorf("it was asked for as %+v", i)
	}
	const all = uint64(1) << 40 // of a list that is surely not older
	for name, change := range map[schemas.WorkerID]func(*schemas.Beat){
		"w1": func(b *schemas.Beat) { b.Images = []string{image} },
		"w2": func(b *schemas.Beat) {
			b.Missing = []schemas.MissingImage{{Image: image, State: schemas.MissingFailed, Message: "no such image"}}
		},
		"w3": func(b *schemas.Beat) {
			b.Missing = []schemas.MissingImage{{Image: image, State: schemas.MissingPulling, Pull: &schemas.Pull{Done: 1, Total: 2, Layers: 1}}}
		},
	} {
		b := beat(name, 4, 8<<30)
		b.Wanted = all
		change(&b)
		w.beat(b)
	}
	until(t, "the beats are seen", func() bool {
		l := w.images("/v1/images")
		var said []string
		for _, s := range l.Items[0].Status {
			said = append(said, fmt.Sprint(s.Worker, " ", s.State, " ", s.Message, s.Pull != nil))
		}
		return strings.Join(said, ", ") == "w1 present false, w2 failed no such imagefalse, w3 pulling true"
	})
	if l := w.images("/v1/images?worker=w1"); len(l.Workers) != 1 || l.Workers[0].Names[0] != image || len(l.Items[0].Status) != 1 {
		t.Errorf("of one worker: %+v", l)
	}
	w.get("/v1/images?worker=none").want(t, 404, schemas.CodeNotFound)
	w.get("/v1/images?worker=W%201").want(t, 400, schemas.CodeInvalidQuery)

	w.do("DELETE", "/v1/images?image=other", "").want(t, 404, schemas.CodeNotFound)
	w.do("DELETE", "/v1/images", "").want(t, 400, schemas.CodeInvalidQuery)
	w.ok(w.do("DELETE", "/v1/images?image="+image, ""), &schemas.Image{})
	if l := w.images("/v1/images"); len(l.Items) != 0 {
		t.Errorf("after the release: %+v", l.Items)
	}
	for _, name := range []string{"first", "second", "third"} {
		w.ok(w.do("POST", "/v1/images", `{"image":"`+name+`"}`), &schemas.Image{})
	}
	for _, name := range []string{"first", "third", "second"} { // with others behind it, and alone
		var released schemas.Image
		w.ok(w.do("DELETE", "/v1/images?image="+name, ""), &released)
		if released.Image != name || released.By != schemas.ByOperator || len(released.Status) != 0 {
			t.Errorf("the release of %s is answered with %+v", name, released)
		}
	}
	for body, field := range map[string]string{
		`{}`:                                         "image",
		`{"image":"https://x"}`:                      "image",
		`{"image":"a","workers":["W 1"]}`:            "workers.0",
		`{"image":"a","constraints":{"":"b"}}`:       "",
		`{"image":"a","registry_credentials":"a b"}`: "registry_credentials",
		`{"image":"a","password":"x"}`:               "password",
	} {
		if e := w.do("POST", "/v1/images", body).problem(t); e.Status != 422 || field != "" && e.Field != field {
			t.Errorf("%s: %+v", body, e)
		}
	}
}

// A worker that lacks more than it can name may lack this too, unless it says that it has it.
func TestImageThatAWorkerDoesNotName(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	for _, image := range []string{"registry.lan/held:1", "registry.lan/web:1"} {
		w.ok(w.do("POST", "/v1/images", `{"image":"`+image+`"}`), &schemas.Image{})
	}
	b := beat("w1", 4, 8<<30)
	b.Wanted, b.Unnamed, b.Images = 1<<40, 1, []string{"registry.lan/held:1"}
	w.beat(b)
	until(t, "the beat is seen", func() bool {
		l := w.images("/v1/images")
		return len(l.Items[0].Status) == 1 && l.Items[0].Status[0].State == schemas.ImagePresent && l.Items[1].Status[0].State == schemas.ImageUnknown
	})
}

// What many ask for at once through two gateways is all there, and there is a limit.
func TestManyWantImages(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	other := newAPI(t, w.conn, gateway.Config{})
	w.beat(beat("w1", 4, 8<<30))
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			a := []api{w.api, other}[i%2]
			if r := a.do("POST", "/v1/images", fmt.Sprintf(`{"image":"registry.lan/web:%d"}`, i)); r.status != 200 {
				t.Errorf("%d: %d %s", i, r.status, r.body)
			}
		})
	}
	all.Wait()
	if l := w.images("/v1/images"); len(l.Items) != 16 {
		t.Errorf("%d are wanted", len(l.Items))
	}
	for i := 16; i < schemas.MaxWanted; i++ {
		w.ok(w.do("POST", "/v1/images", fmt.Sprintf(`{"image":"registry.lan/web:%d"}`, i)), &schemas.Image{})
	}
	w.do("POST", "/v1/images", `{"image":"one-more"}`).want(t, 409, schemas.CodeStateConflict)
	w.ok(w.do("POST", "/v1/images", `{"image":"registry.lan/web:0","workers":["w1"]}`), &schemas.Image{}) // it takes its own place
}
