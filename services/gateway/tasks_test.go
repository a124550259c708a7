package gateway_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

func TestCreateAnswersWithTheTaskAndShowsItAtOnce(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	r := w.do("POST", "/v1/tasks", spec)
	task := r.task(t)
	if r.status != 201 || r.header.Get("Location") != "/v1/tasks/"+string(task.ID) ||
		r.header.Get("ETag") != fmt.Sprintf(`"%d"`, task.Revision) || task.State != schemas.Queued || task.Spec.Image != "busybox" {
		t.Fatalf("%d %v %s", r.status, r.header, r.body)
	}
	got := w.get("/v1/tasks/" + string(task.ID))
	if got.status != 200 || got.header.Get("ETag") != r.header.Get("ETag") || got.task(t).ID != task.ID {
		t.Fatalf("%d %s", got.status, got.body)
	}
	if list := w.list(""); len(list.Items) != 1 || list.Items[0].ID != task.ID || list.Items[0].History != nil {
		t.Fatalf("list %+v", list)
	}
	if got := w.get("/v1/tasks/"+string(task.ID), "If-None-Match", `"1", `+r.header.Get("ETag")); got.status != 304 || len(got.body) > 0 {
		t.Fatalf("%d %s", got.status, got.body)
	}
}

func (a api) list(query string) schemas.TaskList {
	a.Helper()
	r := a.get("/v1/tasks" + query)
	var l schemas.TaskList
	if err := schemas.Decode(r.body, &l); err != nil || r.status != 200 {
		a.Fatalf("%d %v %s", r.status, err, r.body)
	}
	return l
}

func TestWaiting(t *testing.T) {
	w := newWorld(t, gateway.Config{WaitMax: 5 * time.Second})
	t.Run("a timeout gives the present state", func(t *testing.T) {
		w := w.in(t)
		r := w.do("POST", "/v1/tasks?wait=done&timeout=1ms", spec)
		if task := r.task(t); r.status != 201 || task.State != schemas.Queued {
			t.Errorf("%d %s", r.status, task.State)
		}
		if r := w.get("/v1/tasks/" + string(r.task(t).ID) + "?wait=running&timeout=1ms"); r.status != 200 || r.task(t).State != schemas.Queued {
			t.Errorf("%d %s", r.status, r.body)
		}
	})
	t.Run("running is reached", func(t *testing.T) {
		w := w.in(t)
		id := w.create(spec).ID
		got := make(chan reply, 1)
		go func() {
			r, _ := w.try("GET", "/v1/tasks/"+string(id)+"?wait=running&timeout=60s", "")
			got <- r
		}()
		w.run(id)
		if task := (<-got).task(t); task.State != schemas.Running {
			t.Error(task.State)
		}
	})
	t.Run("a final task satisfies running", func(t *testing.T) {
		w := w.in(t)
		id := w.create(spec).ID
		got := make(chan reply, 1)
		go func() {
			r, _ := w.try("GET", "/v1/tasks/"+string(id)+"?wait=running", "")
			got <- r
		}()
		w.choose(id, "w1")
		w.report(id, schemas.PhaseEnded, ended(7, 0, 0))
		if task := (<-got).task(t); task.State != schemas.Failed || task.Exit.Code != 7 {
			t.Error(task.State)
		}
	})
	t.Run("ready is more than running where there is a health check", func(t *testing.T) {
		w := w.in(t)
		id := w.create(`{"image":"busybox","health":{"tcp":{"port":80}}}`).ID
		w.run(id)
		if r := w.get("/v1/tasks/" + string(id) + "?wait=ready&timeout=1ms"); r.task(t).State != schemas.Running || r.task(t).Ready {
			t.Errorf("%s", r.body)
		}
		got := make(chan reply, 1)
		go func() {
			r, _ := w.try("GET", "/v1/tasks/"+string(id)+"?wait=ready", "")
			got <- r
		}()
		w.next(id, func(e bus.Entry[schemas.Record]) schemas.Event {
			return schemas.Settle{Meta: on(e, "reaper"), Report: schemas.Report{Assignment: e.Value.Assignment(), Phase: schemas.PhaseRunning, Ran: true, Ready: true}}
		})
		if task := (<-got).task(t); task.State != schemas.Running || !task.Ready {
			t.Errorf("%s, ready %v", task.State, task.Ready)
		}
	})
	t.Run("ready is running where there is none", func(t *testing.T) {
		w := w.in(t)
		id := w.create(spec).ID
		w.run(id)
		if task := w.get("/v1/tasks/" + string(id) + "?wait=ready").task(t); !task.Ready {
			t.Errorf("%s, not ready", task.State)
		}
	})
	t.Run("POST waits for the end", func(t *testing.T) {
		w := w.in(t)
		w.play()
		r := w.do("POST", "/v1/tasks?wait=done", spec)
		task := r.task(t)
		if r.status != 201 || task.State != schemas.Completed || r.header.Get("ETag") != fmt.Sprintf(`"%d"`, task.Revision) {
			t.Errorf("%d %s %s", r.status, task.State, r.header.Get("ETag"))
		}
	})
}

func TestListPagesAndFilters(t *testing.T) {
	for name, cfg := range map[string]gateway.Config{"whole records": {}, "short records": {CacheBytes: 1}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, cfg)
			var ids []schemas.TaskID
			for i := range 25 {
				ids = append(ids, w.create(fmt.Sprintf(`{"image":"busybox","stdin":"secret input","env":{"n":"v"},"labels":{"n":"%d","even":"%v"}}`, i, i%2 == 0)).ID)
			}
			for _, id := range ids[:5] {
				w.run(id)
			}
			w.report(ids[0], schemas.PhaseEnded, ended(0, 0, 0))
			until(t, "the view has the end", func() bool { return len(w.list("?state=completed").Items) == 1 })

			var got []schemas.TaskID
			for query := "?limit=10"; ; {
				l := w.list(query)
				for _, task := range l.Items {
					if task.Spec.Stdin != "" || task.Spec.Env != nil || task.Spec.Labels["n"] == "" || task.Revision == 0 {
						t.Fatalf("item %+v", task)
					}
					got = append(got, task.ID)
				}
				if l.NextCursor == "" {
					break
				}
				query = "?limit=10&cursor=" + l.NextCursor
			}
			seen := map[schemas.TaskID]bool{}
			for i, id := range got {
				seen[id] = true
				if i > 0 && id >= got[i-1] {
					t.Error("not newest first")
				}
			}
			if len(seen) != 25 || len(got) != 25 {
				t.Errorf("%d tasks, %d different", len(got), len(seen))
			}
			for query, want := range map[string]int{
				"?state=queued": 20, "?state=running,completed": 5, "?state=running&state=queued": 24,
				"?label=even=true": 13, "?label=even=true&label=n=4": 1, "?label=even=tru": 0, "?label=none=": 0,
				"?label=n": 25, "?label=n&label=even=true": 13, "?label=none": 0, "?label=nn": 0, "?created_after=1h": 25,
				"?created_after=" + time.Now().Add(time.Hour).UTC().Format(time.RFC3339): 0,
				"?worker=w1": 5, "?worker=w2": 0, "?worker=w1&state=completed&label=n=0": 1,
			} {
				if n := len(w.list(query).Items); n != want {
					t.Errorf("%s: %d, want %d", query, n, want)
				}
			}
			if w.task(ids[0]).Spec.Stdin != "secret input" || len(w.task(ids[0]).History) == 0 {
				t.Error("a single task is not whole")
			}
			cursor := w.list("?limit=1").NextCursor
			w.get("/v1/tasks?limit=1&state=queued&cursor="+cursor).want(t, 400, schemas.CodeInvalidQuery)
		})
	}
}

// However few tasks a filter takes, one request does bounded work, and all pages together
// have them all; tasks that come meanwhile change nothing of that.
func TestAListLooksAtSoManyAndGoesOn(t *testing.T) {
	w := newWorld(t, gateway.Config{ListLook: 7})
	var want []schemas.TaskID
	middle := time.Time{}
	for i := range 40 {
		rare := i%13 == 0
		id := w.create(fmt.Sprintf(`{"image":"busybox","labels":{"rare":"%v"}}`, rare)).ID
		if rare {
			want = append([]schemas.TaskID{id}, want...)
		}
		if i == 20 {
			middle = w.task(id).Timings.Accepted
		}
	}
	pages := func(query string) (got []schemas.TaskID, n int) {
		next := query
		for {
			l := w.list(next)
			n++
			for _, task := range l.Items {
				got = append(got, task.ID)
			}
			if l.NextCursor == "" {
				return got, n
			}
			w.create(`{"image":"busybox","labels":{"rare":"true"}}`)
			next = query + "&cursor=" + l.NextCursor
		}
	}
	if got, n := pages("?label=rare=true&limit=2"); fmt.Sprint(got) != fmt.Sprint(want) || n < 40/7 {
		t.Errorf("got %v over %d pages, want %v", got, n, want)
	}
	got, _ := pages("?label=rare=false&created_after=" + middle.Format(time.RFC3339Nano))
	for _, id := range got {
		if w.task(id).Timings.Accepted.Before(middle.Truncate(time.Millisecond)) {
			t.Errorf("%s is older than asked for", id)
		}
	}
	if len(got) < 18 { // ids know milliseconds, so a few of the same one may come too
		t.Errorf("%d tasks since %s", len(got), middle)
	}
}

func TestCancel(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	t.Run("a queued task ends at once", func(t *testing.T) {
		w := w.in(t)
		id := w.create(spec).ID
		r := w.do("DELETE", "/v1/tasks/"+string(id), "")
		if task := r.task(t); r.status != 200 || task.State != schemas.Canceled {
			t.Errorf("%d %s", r.status, task.State)
		}
		again := w.do("DELETE", "/v1/tasks/"+string(id)+"?grace=1s", "")
		if again.status != 200 || again.header.Get("ETag") != r.header.Get("ETag") {
			t.Errorf("%d: canceling a final task changed it", again.status)
		}
	})
	t.Run("a running task is told to stop", func(t *testing.T) {
		w := w.in(t)
		id := w.create(spec).ID
		w.run(id)
		r := w.do("DELETE", "/v1/tasks/"+string(id)+"?grace=5s", "")
		if task := r.task(t); r.status != 200 || task.Cancel == nil || task.Cancel.Grace.Std() != 5*time.Second {
			t.Fatalf("%d %s", r.status, r.body)
		}
		var order schemas.Order
		until(t, "the order is there", func() bool {
			b := w.newest(schemas.WorkStream("w1"), schemas.OrderSubject("w1", id))
			return b != nil && schemas.Decode(b, &order) == nil
		})
		if order.Want != schemas.WantStop || order.Grace.Std() != 5*time.Second || order.Attempt != 1 || order.Revision != r.task(t).Revision {
			t.Errorf("order %+v", order)
		}
		if again := w.do("DELETE", "/v1/tasks/"+string(id)+"?grace=1s", ""); again.status != 200 || again.task(t).Cancel.Grace.Std() != 5*time.Second {
			t.Errorf("%d %s", again.status, again.body)
		}
		if task := w.do("DELETE", "/v1/tasks/"+string(w.create(spec).ID), "").task(t); task.State != schemas.Canceled {
			t.Error(task.State)
		}
	})
	t.Run("the stop timeout of the spec is the grace", func(t *testing.T) {
		w := w.in(t)
		id := w.create(`{"image":"busybox","timeouts":{"stop":"3s"}}`).ID
		w.run(id)
		if task := w.do("DELETE", "/v1/tasks/"+string(id), "").task(t); task.Cancel.Grace.Std() != 3*time.Second {
			t.Error(task.Cancel.Grace)
		}
	})
	w.do("DELETE", "/v1/tasks/t-01jd0000000000000000000000", "").want(t, 404, schemas.CodeNotFound)
}

func TestExtend(t *testing.T) {
	w := newWorld(t, gateway.Config{ExtendWait: 20 * time.Millisecond})
	slow := newAPI(t, w.conn, gateway.Config{ExtendWait: 15 * time.Second})
	extend := func(a api, id schemas.TaskID, ttl string) reply {
		return a.do("POST", "/v1/tasks/"+string(id)+"/extend", `{"ttl":"`+ttl+`"}`)
	}
	running := func(ttl string) schemas.TaskID {
		id := w.create(`{"image":"busybox","ttl":"` + ttl + `"}`).ID
		w.run(id)
		return id
	}
	t.Run("a queued task needs no worker", func(t *testing.T) {
		w := w.in(t)
		id := w.create(spec).ID
		if r := extend(w.api, id, "2h"); r.status != 200 {
			t.Errorf("%d %s", r.status, r.body)
		}
	})
	t.Run("202 while the worker has not said so", func(t *testing.T) {
		w := w.in(t)
		id := running("1m")
		r := extend(w.api, id, "10m")
		if r.status != 202 || r.task(t).SecondsLeft < 590 {
			t.Errorf("%d %s", r.status, r.body)
		}
		var order schemas.Order
		until(t, "the order is there", func() bool {
			b := w.newest(schemas.WorkStream("w1"), schemas.OrderSubject("w1", id))
			return b != nil && schemas.Decode(b, &order) == nil
		})
		if order.Want != schemas.WantRun || order.Extensions != 1 || order.TimeLeft.Std() < 9*time.Minute {
			t.Errorf("order %+v", order)
		}
		if r := extend(w.api, id, "1m"); r.status != 202 { // less than it has
			t.Errorf("%d %s", r.status, r.body)
		}
	})
	t.Run("200 once it has", func(t *testing.T) {
		w := w.in(t)
		id := running("1m")
		got := make(chan reply, 1)
		go func() {
			r, _ := slow.try("POST", "/v1/tasks/"+string(id)+"/extend", `{"ttl":"10m"}`)
			got <- r
		}()
		until(t, "the record has it", func() bool { return w.task(id).SecondsLeft > 500 })
		w.next(id, func(e bus.Entry[schemas.Record]) schemas.Event {
			return schemas.Settle{Meta: meta("reaper"), Report: schemas.Report{Assignment: e.Value.Assignment(), Phase: schemas.PhaseRunning, Ran: true, Applied: 1}}
		})
		if r := <-got; r.status != 200 || r.task(t).SecondsLeft < 590 {
			t.Errorf("%d %s", r.status, r.body)
		}
		if r := extend(w.api, id, "1m"); r.status != 202 || r.task(t).SecondsLeft < 590 { // said again, not yet heard
			t.Errorf("less than it has: %d %s", r.status, r.body)
		}
	})
	t.Run("200 once it has what another client asked for meanwhile", func(t *testing.T) {
		w := w.in(t)
		id := running("1m")
		got := make(chan reply, 1)
		go func() {
			r, _ := slow.try("POST", "/v1/tasks/"+string(id)+"/extend", `{"ttl":"10m"}`)
			got <- r
		}()
		until(t, "the record has it", func() bool { return w.task(id).SecondsLeft > 500 })
		if r := extend(w.api, id, "20m"); r.status != 202 {
			t.Errorf("%d %s", r.status, r.body)
		}
		applied := func(n int) {
			w.next(id, func(e bus.Entry[schemas.Record]) schemas.Event {
				return schemas.Settle{Meta: meta("reaper"), Report: schemas.Report{Assignment: e.Value.Assignment(), Phase: schemas.PhaseRunning, Ran: true, Applied: n}}
			})
		}
		applied(1)
		applied(2)
		e, err := w.records.Get(t.Context(), string(id))
		if err != nil {
			t.Fatal(err)
		}
		if r := <-got; r.status != 200 || r.header.Get("ETag") != fmt.Sprintf(`"%d"`, e.Revision) {
			t.Errorf("%d %s, not revision %d: %s", r.status, r.header, e.Revision, r.body)
		}
	})
	t.Run("409 when it ends meanwhile", func(t *testing.T) {
		w := w.in(t)
		id := running("1m")
		got := make(chan reply, 1)
		go func() {
			r, _ := slow.try("POST", "/v1/tasks/"+string(id)+"/extend", `{"ttl":"10m"}`)
			got <- r
		}()
		until(t, "the record has it", func() bool { return w.task(id).SecondsLeft > 500 })
		w.report(id, schemas.PhaseEnded, ended(0, 0, 0))
		if e := (<-got).want(t, 409, schemas.CodeStateConflict); e.State != schemas.Completed {
			t.Error(e.State)
		}
	})
	t.Run("refused", func(t *testing.T) {
		w := w.in(t)
		canceled, final, late, limit := running("1h"), running("1h"), running("1s"), running("24h")
		w.do("DELETE", "/v1/tasks/"+string(canceled), "")
		w.report(final, schemas.PhaseEnded, ended(0, 0, 0))
		if e := extend(w.api, canceled, "2h").want(t, 409, schemas.CodeStateConflict); e.State != schemas.Running || e.Task != canceled {
			t.Errorf("%+v", e)
		}
		if e := extend(w.api, final, "2h").want(t, 409, schemas.CodeStateConflict); e.State != schemas.Completed {
			t.Errorf("%+v", e)
		}
		extend(w.api, late, "2h").want(t, 409, schemas.CodeTooLate)
		if e := extend(w.api, limit, "24h").want(t, 422, schemas.CodeNotAllowed); e.Field != "ttl" {
			t.Errorf("%+v", e)
		}
		for ttl, field := range map[string]string{"25h": "ttl", "0s": "ttl", "-1m": "ttl"} {
			if e := extend(w.api, canceled, ttl).want(t, 422, schemas.CodeInvalidValue); e.Field != field {
				t.Errorf("%+v", e)
			}
		}
		if e := extend(w.api, canceled, "soon").want(t, 422, schemas.CodeInvalidType); e.Field != "ttl" {
			t.Errorf("%+v", e)
		}
		extend(w.api, "t-01jd0000000000000000000000", "1h").want(t, 404, schemas.CodeNotFound)
	})
}

func TestRestart(t *testing.T) {
	w := newWorld(t, gateway.Config{ExtendWait: 20 * time.Millisecond})
	slow := newAPI(t, w.conn, gateway.Config{ExtendWait: 15 * time.Second})
	path := func(id schemas.TaskID) string { return "/v1/tasks/" + string(id) + "/restart" }
	running := func(w *world) schemas.TaskID {
		id := w.create(spec).ID
		w.run(id)
		return id
	}
	t.Run("202 while the worker has not said so", func(t *testing.T) {
		w := w.in(t)
		id := running(w)
		for range 2 { // the second is the same restart
			if r := w.do("POST", path(id), "{}"); r.status != 202 || r.task(t).Restarts != 0 {
				t.Errorf("%d %s", r.status, r.body)
			}
		}
		var order schemas.Order
		until(t, "the order is there", func() bool {
			b := w.newest(schemas.WorkStream("w1"), schemas.OrderSubject("w1", id))
			return b != nil && schemas.Decode(b, &order) == nil
		})
		if order.Want != schemas.WantRun || order.RestartTo != 1 {
			t.Errorf("order %+v", order)
		}
	})
	t.Run("200 once it has", func(t *testing.T) {
		w := w.in(t)
		id := running(w)
		before := w.task(id).ExpiresAt
		got := make(chan reply, 1)
		go func() {
			r, _ := slow.try("POST", path(id), "{}")
			got <- r
		}()
		until(t, "the record has it", func() bool { return len(w.task(id).History) > 3 })
		w.next(id, func(e bus.Entry[schemas.Record]) schemas.Event {
			return schemas.Settle{Meta: meta("reaper"), Report: schemas.Report{Assignment: e.Value.Assignment(), Phase: schemas.PhaseRunning, Ran: true, Restarts: 1}}
		})
		if r := <-got; r.status != 200 || r.task(t).Restarts != 1 || !r.task(t).ExpiresAt.Equal(before) {
			t.Errorf("%d %s", r.status, r.body)
		}
	})
	t.Run("202 when its worker is lost meanwhile", func(t *testing.T) {
		w := w.in(t)
		id := running(w)
		got := make(chan reply, 1)
		go func() {
			r, _ := slow.try("POST", path(id), "{}")
			got <- r
		}()
		until(t, "the record has it", func() bool { return len(w.task(id).History) > 3 })
		w.next(id, func(e bus.Entry[schemas.Record]) schemas.Event {
			return schemas.Lose{Meta: meta("reaper"), Worker: e.Value.Worker, Epoch: e.Value.Epoch}
		})
		if r := <-got; r.status != 202 || r.task(t).State != schemas.Queued {
			t.Errorf("%d %s", r.status, r.body)
		}
	})
	t.Run("409 when it ends meanwhile", func(t *testing.T) {
		w := w.in(t)
		id := running(w)
		got := make(chan reply, 1)
		go func() {
			r, _ := slow.try("POST", path(id), "{}")
			got <- r
		}()
		until(t, "the record has it", func() bool { return len(w.task(id).History) > 3 })
		w.report(id, schemas.PhaseEnded, ended(0, 0, 0))
		if e := (<-got).want(t, 409, schemas.CodeStateConflict); e.State != schemas.Completed {
			t.Error(e.State)
		}
	})
	t.Run("refused", func(t *testing.T) {
		w := w.in(t)
		queued, canceled, final := w.create(spec).ID, running(w), running(w)
		w.do("DELETE", "/v1/tasks/"+string(canceled), "")
		w.report(final, schemas.PhaseEnded, ended(0, 0, 0))
		late := w.create(`{"image":"busybox","ttl":"1s"}`).ID
		w.run(late)
		for id, state := range map[schemas.TaskID]schemas.State{queued: schemas.Queued, canceled: schemas.Running, final: schemas.Completed} {
			if e := w.do("POST", path(id), "{}").want(t, 409, schemas.CodeStateConflict); e.State != state || e.Task != id {
				t.Errorf("%+v", e)
			}
		}
		until(t, "its time is over", func() bool { return !time.Now().Before(w.task(late).ExpiresAt) })
		w.do("POST", path(late), "{}").want(t, 409, schemas.CodeTooLate)
		w.do("POST", path(late), `{"now":true}`).want(t, 422, schemas.CodeUnknownField)
		w.do("POST", path(late), "{}", "If-Match", `"1"`).want(t, 412, schemas.CodePrecondition)
		w.do("POST", path("t-01jd0000000000000000000000"), "{}").want(t, 404, schemas.CodeNotFound)
	})
}

func TestWhyIsAskedOfThePlacer(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := w.create(spec).ID
	if w.task(id).Why != nil {
		t.Error("a reason without a placer")
	}
	sub, err := w.conn.NC.Subscribe(schemas.PlacerWhySubject, func(m *nats.Msg) {
		b, _ := schemas.Encode(schemas.Why{Task: schemas.TaskID(m.Data), Position: 3, Summary: "waits for memory"})
		_ = m.Respond(b)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Unsubscribe()
	if err := w.conn.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	if why := w.task(id).Why; why == nil || why.Position != 3 {
		t.Errorf("why %+v", why)
	}
	w.run(id)
	if w.task(id).Why != nil {
		t.Error("a running task waits for nothing")
	}
}

func TestNoCapacity(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	big := `{"image":"busybox","resources":{"memory":"64GiB"}}`
	w.create(big) // nobody is known yet
	w.beat(beat("w1", 4, 16<<30))
	w.beat(beat("w2", 16, 8<<30))
	until(t, "the workers are known", func() bool { return len(w.workers()) == 2 })
	e := w.do("POST", "/v1/tasks", big).want(t, 422, schemas.CodeNoCapacity)
	if e.Field != "resources.memory" || !strings.Contains(e.Detail, "16GiB") || strings.Contains(e.Detail, "64") {
		t.Errorf("%+v", e)
	}
	if e := w.do("POST", "/v1/tasks", `{"image":"busybox","resources":{"cpus":17}}`).want(t, 422, schemas.CodeNoCapacity); e.Field != "resources.cpus" || !strings.Contains(e.Detail, "16") {
		t.Errorf("%+v", e)
	}
	if e := w.do("POST", "/v1/tasks", `{"image":"busybox","resources":{"cpus":8,"memory":"12GiB"}}`).want(t, 422, schemas.CodeNoCapacity); e.Field != "resources" {
		t.Errorf("%+v", e)
	}
	w.create(`{"image":"busybox","resources":{"cpus":16,"memory":"8GiB"}}`)
	if e := w.do("POST", "/v1/tasks", `{"image":"busybox","constraints":{"arch":"arm64"}}`).want(t, 422, schemas.CodeNoCapacity); e.Field != "constraints.arch" || !strings.HasSuffix(e.Detail, "there are: amd64") {
		t.Errorf("%+v", e)
	}
	w.create(`{"image":"busybox","constraints":{"arch":"amd64","os":"linux","zone":"nowhere yet"}}`)
	devices := func(n int) string { return fmt.Sprintf(`{"image":"busybox","resources":{"gpus":%d}}`, n) }
	if e := w.do("POST", "/v1/tasks", devices(1)).want(t, 422, schemas.CodeNoCapacity); e.Field != "resources.gpus" || e.Detail != "no worker has a GPU" {
		t.Errorf("%+v", e)
	}
	gpus := beat("w2", 16, 8<<30)
	gpus.Host.GPUs = 2
	w.beat(gpus)
	until(t, "w2 has GPUs", func() bool { return w.workers()[1].Host.GPUs == 2 })
	w.create(devices(2))
	if e := w.do("POST", "/v1/tasks", devices(3)).want(t, 422, schemas.CodeNoCapacity); e.Field != "resources.gpus" || !strings.HasSuffix(e.Detail, "is 2") {
		t.Errorf("%+v", e)
	}
	if e := w.do("POST", "/v1/tasks", `{"image":"busybox","resources":{"gpus":2,"memory":"12GiB"}}`).want(t, 422, schemas.CodeNoCapacity); e.Field != "resources" {
		t.Errorf("%+v", e)
	}
	lost := beat("w1", 4, 16<<30)
	lost.LostAt = time.Now()
	w.beat(lost)
	until(t, "w1 is lost", func() bool { return w.workers()[0].State == "lost" })
	w.do("POST", "/v1/tasks", `{"image":"busybox","resources":{"memory":"12GiB"}}`).want(t, 422, schemas.CodeNoCapacity)
}

func (a api) workers() []schemas.Worker {
	a.Helper()
	var l schemas.WorkerList
	if r := a.get("/v1/workers"); r.status != 200 || schemas.Decode(r.body, &l) != nil {
		a.Fatalf("%d %s", r.status, r.body)
	}
	return l.Items
}

func TestWorkersShowWhatIsAssigned(t *testing.T) {
	w := newWorld(t, gateway.Config{Lease: time.Hour})
	impatient := newAPI(t, w.conn, gateway.Config{Lease: time.Nanosecond})
	if len(w.workers()) != 0 {
		t.Error("workers out of nowhere")
	}
	w.beat(beat("w2", 4, 8<<30))
	w.beat(beat("w1", 4, 8<<30))
	drains := bus.NewTable(w.conn, schemas.BucketDrains, bus.Codec[schemas.Drain]{
		Encode: func(d schemas.Drain) ([]byte, nats.Header, error) { b, err := schemas.Encode(d); return b, nil, err },
		Decode: func(b []byte) (d schemas.Drain, err error) { return d, schemas.Decode(b, &d) },
	})
	if _, err := drains.Create(deadline(t), "w2", schemas.Drain{By: "me"}, ""); err != nil {
		t.Fatal(err)
	}
	until(t, "w2 drains", func() bool { ws := w.workers(); return len(ws) == 2 && ws[1].State == "draining" })
	until(t, "w1 is silent elsewhere", func() bool { ws := impatient.workers(); return len(ws) == 2 && ws[0].State == "silent" })

	a, b := w.create(`{"image":"busybox","resources":{"cpus":0.1,"memory":"100MiB"}}`).ID, w.create(spec).ID
	w.run(a)
	w.choose(b, "w1")
	for _, api := range []api{w.api, impatient} { // one of them has never seen the specs
		until(t, "both tasks count", func() bool { return api.workers()[0].Assigned.Tasks == 2 })
		if got := api.workers()[0].Assigned; got.CPUs != 0.6 || got.Memory != 356<<20 {
			t.Errorf("assigned %+v", got)
		}
	}
	w.report(a, schemas.PhaseEnded, ended(0, 0, 0))
	until(t, "one has gone", func() bool {
		return w.workers()[0].Assigned == schemas.Allocation{Tasks: 1, CPUs: 0.5, Memory: 256 << 20}
	})
	w.report(b, schemas.PhaseEnded, ended(0, 0, 0))
	until(t, "both have gone", func() bool { return w.workers()[0].Assigned == schemas.Allocation{} })

	device := beat("w1", 4, 8<<30)
	device.Host.GPUs = 3
	w.beat(device)
	until(t, "w1 has GPUs", func() bool { return w.workers()[0].Free.GPUs == 3 })
	w.choose(w.create(`{"image":"busybox","resources":{"gpus":2,"cpus":0.6}}`).ID, "w1")
	for _, api := range []api{w.api, impatient} {
		until(t, "its GPUs are taken", func() bool { return api.workers()[0].Assigned.GPUs == 2 })
		if got, want := api.workers()[0].Free, (schemas.Allocation{Tasks: 7, CPUs: 3.4, Memory: 8<<30 - 256<<20, GPUs: 1}); got != want {
			t.Errorf("free %+v, want %+v", got, want)
		}
	}

	r := w.get("/v1/workers/w1")
	var one schemas.Worker
	if err := schemas.Decode(r.body, &one); err != nil || one.ID != "w1" || one.State != "ready" || one.BeatAgo <= 0 {
		t.Errorf("%d %s", r.status, r.body)
	}
	w.get("/v1/workers/w9").want(t, 404, schemas.CodeNotFound)
	w.get("/v1/workers/W%2e%2e").want(t, 404, schemas.CodeNotFound)
}

func TestHeadAndOptions(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := string(w.create(spec).ID)
	for path, allow := range map[string]string{
		"/v1/tasks": "GET, HEAD, OPTIONS, POST", "/v1/tasks/" + id: "DELETE, GET, HEAD, OPTIONS",
		"/v1/tasks/" + id + "/extend": "OPTIONS, POST", "/v1/workers": "GET, HEAD, OPTIONS",
	} {
		if r := w.do("OPTIONS", path, ""); r.status != 204 || r.header.Get("Allow") != allow {
			t.Errorf("OPTIONS %s: %d %q", path, r.status, r.header.Get("Allow"))
		}
		r := w.do("PATCH", path, "{}")
		r.want(t, 405, schemas.CodeMethod)
		if r.header.Get("Allow") != allow {
			t.Errorf("PATCH %s: Allow %q", path, r.header.Get("Allow"))
		}
	}
	for _, path := range []string{"/v1/tasks", "/v1/tasks/" + id, "/v1/tasks/" + id + "/logs", "/v1/workers"} {
		if r := w.do("HEAD", path, ""); r.status != 200 || len(r.body) > 0 || r.header.Get("Content-Type") == "" {
			t.Errorf("HEAD %s: %d %v", path, r.status, r.header)
		}
	}
	if r := w.get("/v1/tasks", "X-Request-Id", "mine-1.2_3"); r.header.Get("X-Request-Id") != "mine-1.2_3" {
		t.Error("a good request id was not taken")
	}
	for _, bad := range []string{"a b", "a\x7f", strings.Repeat("x", 65), "<script>"} {
		req, _ := http.NewRequest("GET", w.url+"/v1/tasks", nil)
		req.Header["X-Request-Id"] = []string{bad}
		res, err := w.client.Do(req)
		if err != nil {
			continue // the client refuses to send it
		}
		res.Body.Close()
		if got := res.Header.Get("X-Request-Id"); got == bad || got == "" {
			t.Errorf("request id %q", got)
		}
	}
}

// A drain is written once, seen through every gateway, and refuses more time to what
// runs on the worker.
func TestDrain(t *testing.T) {
	w := newWorld(t, gateway.Config{ExtendWait: 20 * time.Millisecond})
	other := newAPI(t, w.conn, gateway.Config{ExtendWait: 20 * time.Millisecond})
	drain := func(a api, worker, verb string) reply { return a.do("POST", "/v1/workers/"+worker+"/"+verb, "{}") }
	state := func(r reply) string {
		t.Helper()
		if r.status != 200 {
			t.Fatalf("%d %s", r.status, r.body)
		}
		var worker schemas.Worker
		if err := schemas.Decode(r.body, &worker); err != nil {
			t.Fatal(err)
		}
		return worker.State
	}
	drain(w.api, "w1", "drain").want(t, 404, schemas.CodeNotFound)
	drain(w.api, "W.1", "undrain").want(t, 404, schemas.CodeNotFound)
	id := w.create(`{"image":"busybox","ttl":"1m"}`).ID
	w.run(id)
	if _, err := w.beats.Create(t.Context(), "w1", schemas.Beat{Worker: "w1", Epoch: "e1", Host: schemas.Host{CPUs: 4, Memory: 1 << 33}}, ""); err != nil {
		t.Fatal(err)
	}
	until(t, "both gateways know the worker", func() bool {
		return w.get("/v1/workers/w1").status == 200 && other.get("/v1/workers/w1").status == 200
	})
	// While no placer says that it knows, the worker may still be given a task.
	if r := drain(w.api, "w1", "drain"); r.status != 202 {
		t.Errorf("drained without a placer: %d %s", r.status, r.body)
	}
	sub, err := w.conn.NC.Subscribe(schemas.PlacerDrainedSubject, func(m *nats.Msg) { _ = m.Respond(m.Data) })
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Unsubscribe()
	for range 2 { // twice is as once
		if s := state(drain(w.api, "w1", "drain")); s != "draining" {
			t.Errorf("drained, it is %s", s)
		}
	}
	extend := func() reply { return other.do("POST", "/v1/tasks/"+string(id)+"/extend", `{"ttl":"10m"}`) }
	if p := extend().want(t, 409, schemas.CodeDraining); p.Task != id {
		t.Errorf("the problem is about %q", p.Task)
	}
	until(t, "the other gateway shows it", func() bool { return state(other.get("/v1/workers/w1")) == "draining" })
	for range 2 {
		if s := state(drain(other, "w1", "undrain")); s != "ready" {
			t.Errorf("undrained, it is %s", s)
		}
	}
	if r := extend(); r.status != 202 {
		t.Errorf("extended after undrain: %d %s", r.status, r.body)
	}
	w.do("POST", "/v1/workers/w1/drain", `{"now": true}`).want(t, 422, schemas.CodeUnknownField)
}
