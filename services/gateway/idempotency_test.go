package gateway_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

func TestAKeyMakesOneTask(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	first := w.do("POST", "/v1/tasks", spec, "Idempotency-Key", "k1")
	if first.status != 201 || first.header.Get("Idempotency-Replayed") != "" {
		t.Fatalf("%d %v", first.status, first.header)
	}
	id := first.task(t).ID
	w.run(id)
	// The same task in other words.
	again := w.do("POST", "/v1/tasks", ` {"command": ["true"], "ttl":"60m", "image":"busybox"}`, "Idempotency-Key", "k1")
	if again.status != 201 || again.header.Get("Idempotency-Replayed") != "true" || again.task(t).ID != id || again.task(t).State != schemas.Running {
		t.Fatalf("%d %v %s", again.status, again.header, again.body)
	}
	if e := w.do("POST", "/v1/tasks", `{"image":"alpine"}`, "Idempotency-Key", "k1").want(t, 422, schemas.CodeKeyReused); e.Field != "Idempotency-Key" || e.Task != id {
		t.Errorf("%+v", e)
	}
	if other := w.create(spec, "Idempotency-Key", "k2"); other.ID == id {
		t.Error("two keys, one task")
	}
	w.beat(beat("w1", 0.1, 8<<20)) // now it would be refused
	until(t, "the worker is known", func() bool { return len(w.workers()) == 1 })
	w.do("POST", "/v1/tasks", spec, "Idempotency-Key", "k3").want(t, 422, schemas.CodeNoCapacity)
	if r := w.do("POST", "/v1/tasks", spec, "Idempotency-Key", "k1"); r.status != 201 || r.task(t).ID != id {
		t.Errorf("%d %s", r.status, r.body)
	}
}

func TestParallelPostsWithOneKeyMakeOneTask(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	apis := []api{w.api, newAPI(t, natstest.Connect(t, w.nats), gateway.Config{})}
	var all sync.WaitGroup
	replies := make([]reply, 200)
	for i := range replies {
		all.Go(func() {
			var err error
			if replies[i], err = apis[i%2].try("POST", "/v1/tasks", spec, "Idempotency-Key", "one"); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	replayed := 0
	for _, r := range replies {
		if r.status != 201 || r.task(t).ID != replies[0].task(t).ID {
			t.Fatalf("%d %s", r.status, r.body)
		}
		if r.header.Get("Idempotency-Replayed") == "true" {
			replayed++
		}
	}
	if replayed != 199 {
		t.Errorf("%d of 200 were replayed", replayed)
	}
	if n := len(w.list("").Items); n != 1 {
		t.Errorf("%d tasks", n)
	}
}

func TestAKeyWithoutItsTask(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	late := newAPI(t, w.conn, gateway.Config{KeyGrace: time.Nanosecond})
	// The gateway that took the key died before it made the record: forge that by taking
	// the record away.
	orphan := func(key string) schemas.TaskID {
		id := w.create(spec, "Idempotency-Key", key).ID
		e, err := w.records.Get(deadline(t), string(id))
		if err != nil {
			t.Fatal(err)
		}
		if err := w.records.Delete(deadline(t), string(id), e.Revision); err != nil {
			t.Fatal(err)
		}
		return id
	}
	id := orphan("young")
	if e := w.do("POST", "/v1/tasks", `{"image":"other"}`, "Idempotency-Key", "young").want(t, 422, schemas.CodeKeyReused); e.Task != id {
		t.Errorf("whoever waits for the task is not told which: %+v", e)
	}
	r := w.do("POST", "/v1/tasks", spec, "Idempotency-Key", "young")
	if r.status != 201 || r.task(t).ID != id {
		t.Errorf("%d %s", r.status, r.body)
	}
	orphan("old")
	late.do("POST", "/v1/tasks", spec, "Idempotency-Key", "old").want(t, 410, schemas.CodeKeyExpired)
	late.do("POST", "/v1/tasks", `{"image":"other"}`, "Idempotency-Key", "old").want(t, 410, schemas.CodeKeyExpired)
	// A restore from a backup writes an old key anew.
	id = orphan("restored")
	keys := bus.NewTable(w.conn, schemas.BucketIdempotency, bus.JSON[schemas.IdempotencyEntry](nil))
	all, _, err := w.conn.Snapshot(deadline(t), schemas.BucketIdempotency)
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		if e, err := keys.Get(deadline(t), one.Key); err != nil {
			t.Fatal(err)
		} else if e.Value.Task == id {
			e.Value.At = e.Value.At.Add(-2 * time.Minute)
			if _, err := keys.Replace(deadline(t), e, e.Value, ""); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.do("POST", "/v1/tasks", spec, "Idempotency-Key", "restored").want(t, 410, schemas.CodeKeyExpired)
}

// What is stored of a request is no hash of its secrets alone, with which guesses could be
// tested; and what an older gateway stored still answers.
func TestAKeyKeepsNoHashOfTheRequest(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	const secret = `{"image":"busybox","command":["true"],"secrets":[{"env":"FLAG","value":"CTF{guess}"}]}`
	parsed, err := schemas.ParseSpec([]byte(secret), schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := schemas.Encode(parsed)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(encoded)
	batch := `{"template":` + secret + `,"items":[{}]}`
	req, err := schemas.ReadBatch(strings.NewReader(batch), func(int, []byte) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ path, body, other, plain string }{
		{"/v1/tasks", secret, spec, hex.EncodeToString(sum[:])},
		{"/v1/batches", batch, batchBody(1, ""), req.Fingerprint},
	} {
		key := func(name string) string { return strings.ReplaceAll(name+c.path, "/", "-") }
		first := w.do("POST", c.path, c.body, "Idempotency-Key", key("a"))
		if first.status != 201 {
			t.Fatalf("%d %s", first.status, first.body)
		}
		w.do("POST", c.path, c.body, "Idempotency-Key", key("b"))
		keys := bus.NewTable(w.conn, schemas.BucketIdempotency, bus.JSON[schemas.IdempotencyEntry](nil))
		all, _, err := w.conn.Snapshot(deadline(t), schemas.BucketIdempotency)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, one := range all {
			e, err := keys.Get(deadline(t), one.Key)
			if err != nil {
				t.Fatal(err)
			}
			print := e.Value.Fingerprint
			if strings.Contains(print, c.plain) {
				t.Errorf("%s: %s is the plain hash", c.path, print)
			}
			if seen[print] {
				t.Errorf("%s: two keys have the fingerprint %s", c.path, print)
			}
			seen[print] = true
			e.Value.Fingerprint = c.plain // as an older gateway stored it
			if _, err := keys.Replace(deadline(t), e, e.Value, ""); err != nil {
				t.Fatal(err)
			}
		}
		again := w.do("POST", c.path, c.body, "Idempotency-Key", key("a"))
		if again.status != 201 || again.header.Get("Location") != first.header.Get("Location") {
			t.Errorf("%s: %d %s", c.path, again.status, again.body)
		}
		w.do("POST", c.path, c.other, "Idempotency-Key", key("a")).want(t, 422, schemas.CodeKeyReused)
		for _, one := range all {
			if err := w.conn.Purge(deadline(t), bus.StreamOf(schemas.BucketIdempotency), "$KV."+schemas.BucketIdempotency+"."+one.Key); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestNatsAway(t *testing.T) {
	w := newWorld(t, gateway.Config{Unavailable: 20 * time.Millisecond, OpTimeout: 2 * time.Second})
	until(t, "ready", func() bool { ready, checks := w.health.Run(deadline(t)); return ready && len(checks) == 3 })
	id := string(w.create(spec).ID)
	for range 2 {
		w.nats.Shutdown()
		until(t, "the gateway sees it", func() bool { ready, _ := w.health.Run(deadline(t)); return !ready })
		for _, c := range [][3]string{
			{"POST", "/v1/tasks", spec}, {"POST", "/v1/tasks?wait=done", spec}, {"GET", "/v1/tasks", ""}, {"GET", "/v1/tasks/" + id, ""},
			{"DELETE", "/v1/tasks/" + id, ""}, {"POST", "/v1/tasks/" + id + "/extend", `{"ttl":"2h"}`},
			{"GET", "/v1/tasks/" + id + "/logs", ""}, {"GET", "/v1/workers", ""}, {"GET", "/v1/workers/w1", ""},
		} {
			r := w.do(c[0], c[1], c[2])
			if e := r.want(t, 503, schemas.CodeUnavailable); r.header.Get("Retry-After") != "1" || e.RetryAfter.Std() != time.Second {
				t.Errorf("%v: %v", c, r.header)
			}
		}
		w.do("POST", "/v1/tasks", spec, "Idempotency-Key", "k").want(t, 503, schemas.CodeUnavailable)
		w.do("POST", "/v1/tasks", `{"image":1}`).want(t, 422, schemas.CodeInvalidType) // that much it knows by itself
		natstest.Restart(t, w.nats)
		until(t, "it works again", func() bool {
			r := w.do("POST", "/v1/tasks", spec, "Idempotency-Key", "again")
			if r.status >= 500 && r.status != 503 {
				t.Fatalf("%d %s", r.status, r.body)
			}
			return r.status == 201
		})
		if task := w.task(schemas.TaskID(id)); task.State != schemas.Queued {
			t.Error(task.State)
		}
	}
	w.play()
	if r := w.do("POST", "/v1/tasks?wait=done", spec); r.task(t).State != schemas.Completed {
		t.Errorf("%s", r.body)
	}
	if n := len(w.list("?state=completed").Items); n == 0 {
		t.Error("the view does not follow")
	}
}

func TestWaitingOutlivesARestart(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := w.create(spec).ID
	got := make(chan reply, 1)
	go func() {
		r, _ := w.try("GET", "/v1/tasks/"+string(id)+"?wait=done&timeout=60s", "")
		got <- r
	}()
	natstest.Restart(t, w.nats)
	until(t, "the bus is back", func() bool {
		_, err := w.records.Get(deadline(t), string(id))
		return err == nil
	})
	w.run(id)
	w.report(id, schemas.PhaseEnded, ended(0, 0, 0))
	if task := (<-got).task(t); task.State != schemas.Completed {
		t.Error(task.State)
	}
}

func TestUnknownOutcome(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	p := newProxy(t, strings.TrimPrefix(w.nats.URL(), "nats://"))
	conn, err := bus.Connect(deadline(t), bus.Config{Name: "proxied", URL: "nats://" + p.addr, User: natsd.CoreUser, Password: natstest.Password})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	a := newAPI(t, conn, gateway.Config{OpTimeout: 1500 * time.Millisecond})
	a.create(spec)
	p.deaf.Store(true)
	r := a.do("POST", "/v1/tasks", spec)
	e := r.want(t, 503, schemas.CodeUnknownOutcome)
	if e.Task == "" || r.header.Get("Retry-After") == "" {
		t.Errorf("%s", r.body)
	}
	until(t, "it was done", func() bool {
		r, err := w.records.Get(deadline(t), string(e.Task))
		return err == nil && r.Value.State == schemas.Queued
	})
	a.do("DELETE", "/v1/tasks/"+string(e.Task), "").want(t, 503, schemas.CodeUnknownOutcome)
	a.do("POST", "/v1/tasks", spec, "Idempotency-Key", "k").want(t, 503, schemas.CodeUnavailable)
	p.deaf.Store(false)
	until(t, "it hears again", func() bool { return a.do("POST", "/v1/tasks", spec, "Idempotency-Key", "k").status == 201 })
}

// A drain whose answer does not come may have been noted: the client hears that, and what
// it sends again is answered as if it were the first.
func TestDrainOfUnknownOutcome(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	w.beat(beat("w1", 4, 8<<30))
	p := newProxy(t, strings.TrimPrefix(w.nats.URL(), "nats://"))
	conn, err := bus.Connect(deadline(t), bus.Config{Name: "proxied", URL: "nats://" + p.addr, User: natsd.CoreUser, Password: natstest.Password})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	a := newAPI(t, conn, gateway.Config{OpTimeout: 1500 * time.Millisecond})
	until(t, "the gateway knows the worker", func() bool { return a.get("/v1/workers/w1").status == 200 })
	p.deaf.Store(true)
	r := a.do("POST", "/v1/workers/w1/drain", "{}")
	if e := r.want(t, 503, schemas.CodeUnknownOutcome); e.RetryAfter.Std() != time.Second || !strings.Contains(e.Detail, "send it again") {
		t.Errorf("%s", r.body)
	}
	until(t, "it was noted", func() bool {
		var worker schemas.Worker
		w.ok(w.get("/v1/workers/w1"), &worker)
		return worker.State == "draining"
	})
	p.deaf.Store(false)
	until(t, "it hears again", func() bool { return a.do("POST", "/v1/workers/w1/drain", "{}").status == 202 }) // no placer says that it knows
}

// proxy stands between a client and NATS and can keep the answers to itself.
type proxy struct {
	addr string
	deaf atomic.Bool

	hold          atomic.Pointer[string] // what begins with a piece that has this in it waits for release
	held, release chan struct{}          // closed
}

func newProxy(t testing.TB, to string) *proxy {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: ln.Addr().String(), held: make(chan struct{}), release: make(chan struct{})}
	var all sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	all.Go(func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				client.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, client, server)
			mu.Unlock()
			all.Go(func() { _, _ = io.Copy(upstream{server, p}, client); server.Close() })
			all.Go(func() {
				defer client.Close()
				b := make([]byte, 64<<10)
				for lost := false; ; {
					n, err := server.Read(b)
					if err != nil {
						return
					}
					if p.deaf.Load() {
						lost = true
						continue
					}
					if lost {
						return // the client dials again
					}
					if _, err := client.Write(b[:n]); err != nil {
						return
					}
				}
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		all.Wait()
	})
	return p
}

// upstream is the way to the server through a proxy.
type upstream struct {
	io.Writer
	p *proxy
}

func (u upstream) Write(b []byte) (int, error) {
	if hold := u.p.hold.Load(); hold != nil && bytes.Contains(b, []byte(*hold)) && u.p.hold.CompareAndSwap(hold, nil) {
		close(u.p.held)
		<-u.p.release
	}
	return u.Writer.Write(b)
}
