package gateway_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

// eventStream is an open answer of events.
type eventStream struct {
	status int
	header http.Header
	close  func()
	in     *bufio.Reader
	last   string // Last-Event-ID
	ended  bool   // in good order
}

func (a api) follow(path, last, accept string) (*eventStream, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	req, err := http.NewRequestWithContext(ctx, "GET", a.url+path, nil)
	if err != nil {
		cancel()
		return nil, err
	}
	req.Header.Set("Accept", accept)
	if last != "" {
		req.Header.Set("Last-Event-ID", last)
	}
	res, err := a.client.Do(req)
	if err != nil {
		cancel()
		return nil, err
	}
	return &eventStream{status: res.StatusCode, header: res.Header, in: bufio.NewReader(res.Body), last: last,
		close: func() { cancel(); res.Body.Close() }}, nil
}

// next reads the next event of SSE as an EventSource does; io.EOF after the end.
func (s *eventStream) next() (e schemas.TaskEvent, err error) {
	id, kind, data := s.last, "", ""
	for {
		line, err := s.in.ReadString('\n')
		if err != nil {
			return e, err
		}
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		switch name {
		case "id":
			id = value
		case "event":
			kind = value
		case "data":
			data = value
		case "":
			if line != "\n" {
				continue // a comment
			}
			s.last = id
			if kind == "end" {
				s.ended = true
			} else if data != "" {
				return e, schemas.Decode([]byte(data), &e)
			}
			kind, data = "", ""
		}
	}
}

// history is what events must tell, from the records themselves.
func (w *world) history() (all []schemas.TaskEvent) {
	w.Helper()
	for _, task := range w.list("?limit=1000").Items {
		whole := w.task(task.ID)
		for _, c := range whole.History {
			all = append(all, schemas.TaskEvent{ID: c.Revision, Task: whole.ID, At: c.At, State: c.State, Reason: c.Reason, By: c.By, Note: c.Note,
				Attempt: c.Attempt, Worker: c.Worker, Labels: whole.Spec.Labels})
		}
	}
	slices.SortFunc(all, func(a, b schemas.TaskEvent) int { return int(a.ID) - int(b.ID) })
	return all
}

func same(t *testing.T, got, want []schemas.TaskEvent) {
	t.Helper()
	if !slices.EqualFunc(got, want, func(a, b schemas.TaskEvent) bool { return fmt.Sprintf("%+v", a) == fmt.Sprintf("%+v", b) }) {
		t.Errorf("got %d events, want %d", len(got), len(want))
		for i := range min(len(got), len(want)) {
			if fmt.Sprintf("%+v", got[i]) != fmt.Sprintf("%+v", want[i]) {
				t.Fatalf("event %d is\n%+v, want\n%+v", i, got[i], want[i])
			}
		}
	}
}

// lines reads a whole answer of NDJSON.
func (a api) told(path string) (all []schemas.TaskEvent) {
	a.Helper()
	r := a.get(path, "Accept", "application/x-ndjson")
	if r.status != 200 || r.header.Get("Content-Type") != "application/x-ndjson" {
		a.Fatalf("%d %v %s", r.status, r.header, r.body)
	}
	for line := range strings.Lines(string(r.body)) {
		var e schemas.TaskEvent
		if err := schemas.Decode([]byte(line), &e); err != nil {
			a.Fatalf("%v: %s", err, line)
		}
		all = append(all, e)
	}
	return all
}

// Tasks live their lives over two gateways while a client follows; every few events its
// gateway is killed, and the client goes on at another one. It gets every change of every
// record once, in the order of the writes, however little a gateway may hold.
func TestEventsOutliveTheirGateway(t *testing.T) {
	for name, window := range map[string]int{"in one go": 0, "in small pieces": 3} {
		t.Run(name, func(t *testing.T) {
			cfg := gateway.Config{EventWindow: window, KeepAlive: 20 * time.Millisecond}
			w := newWorld(t, cfg)
			const tasks = 60
			for range tasks / 2 { // some lives are over before anybody asks
				w.end(deadline(t), string(w.create(spec).ID))
			}
			var all sync.WaitGroup
			for range 3 {
				all.Go(func() {
					for range tasks / 6 {
						r, err := w.try("POST", "/v1/tasks", spec)
						if err != nil || r.status != 201 {
							t.Errorf("create: %v %d", err, r.status)
							return
						}
						w.end(context.Background(), string(r.task(t).ID))
					}
				})
			}
			const want = tasks * 3 // accepted, assigned, completed
			var got []schemas.TaskEvent
			last, kills := "", 0
			for len(got) < want {
				a := newAPI(t, w.conn, cfg)
				s, err := a.follow("/v1/events", last, "text/event-stream")
				if err != nil || s.status != 200 {
					t.Fatal(err, s.status)
				}
				for range 25 {
					e, err := s.next()
					if err != nil {
						t.Fatal(err)
					}
					got = append(got, e)
					if len(got) == want {
						break
					}
				}
				last = s.last
				a.stop()
				s.close()
				kills++
			}
			all.Wait()
			same(t, got, w.history())
			if kills < 5 {
				t.Errorf("only %d gateways were killed", kills)
			}
			same(t, w.told("/v1/events?follow=false"), got)
			half := got[len(got)/2]
			same(t, w.told(fmt.Sprintf("/v1/events?follow=false&after=%d", half.ID)), got[len(got)/2+1:])
		})
	}
}

func TestEventsOfOneTask(t *testing.T) {
	w := newWorld(t, gateway.Config{KeepAlive: 5 * time.Millisecond})
	id := w.create(`{"image":"busybox","labels":{"owner":"litmus"}}`).ID
	w.create(spec) // another one
	path := "/v1/tasks/" + string(id) + "/events"
	s, err := w.follow(path, "", "text/event-stream")
	if err != nil || s.status != 200 || s.header.Get("Content-Type") != "text/event-stream" {
		t.Fatal(err, s)
	}
	defer s.close()
	next := func(want schemas.State) schemas.TaskEvent {
		t.Helper()
		e, err := s.next()
		if err != nil || e.State != want || e.Task != id || e.Labels["owner"] != "litmus" || s.last != strconv.FormatUint(e.ID, 10) {
			t.Fatalf("%+v, last id %s: %v", e, s.last, err)
		}
		return e
	}
	next(schemas.Queued)
	w.choose(id, "w1")
	if e := next(schemas.Assigned); e.Worker != "w1" || e.Attempt != 1 || e.By != "placer" {
		t.Errorf("%+v", e)
	}
	w.report(id, schemas.PhaseRunning, nil)
	running := next(schemas.Running)
	w.do("DELETE", "/v1/tasks/"+string(id), "")
	if e := next(schemas.Running); e.Note != "cancel asked" || e.By != "client" {
		t.Errorf("%+v", e)
	}
	w.report(id, schemas.PhaseEnded, &schemas.End{By: schemas.EndedStop, Exit: &schemas.Exit{Code: 143, Signal: 15}})
	end := next(schemas.Canceled)
	if _, err := s.next(); err != io.EOF || !s.ended {
		t.Errorf("the stream of a final task: %v, ended %v", err, s.ended)
	}
	if r := w.get(path, "Accept", "text/event-stream", "Last-Event-ID", s.last); r.status != 204 {
		t.Errorf("an EventSource would ask again: %d %s", r.status, r.body)
	}
	if e := w.task(id); e.Revision != end.ID || e.History[2].Revision != running.ID {
		t.Errorf("revision %d, history %+v", e.Revision, e.History)
	}
	if got := w.told(path + "?after=" + strconv.FormatUint(running.ID, 10)); len(got) != 2 {
		t.Errorf("%+v", got)
	}
	if got := w.told(path + "?state=running,canceled"); len(got) != 3 {
		t.Errorf("%+v", got)
	}
	if r := w.do("HEAD", path, ""); r.status != 200 || len(r.body) > 0 {
		t.Errorf("%d", r.status)
	}
}

func TestEventsFilterAndStart(t *testing.T) {
	w := newWorld(t, gateway.Config{KeepAlive: 5 * time.Millisecond, MaxFollowers: 1})
	a := w.create(`{"image":"busybox","labels":{"owner":"a","n":"1"}}`).ID
	b := w.create(`{"image":"busybox","labels":{"owner":"b"}}`).ID
	w.choose(a, "w1")
	w.choose(b, "w2")
	w.report(b, schemas.PhaseRunning, nil)
	for query, want := range map[string]int{
		"": 5, "&label=owner": 5, "&label=n": 2, "&label=owner=b": 3, "&label=owner=b&label=n": 0,
		"&state=assigned": 2, "&state=queued,running": 3, "&worker=w2": 2, "&state=assigned&label=owner=a": 1, "&after=now": 0,
	} {
		if got := w.told("/v1/events?follow=false" + query); len(got) != want {
			t.Errorf("%s: %d events, want %d", query, len(got), want)
		}
	}
	s, err := w.follow("/v1/events?after=now&label=owner=a", "", "*/*")
	if err != nil || s.status != 200 {
		t.Fatal(err)
	}
	defer s.close()
	w.get("/v1/events").want(t, 429, schemas.CodeTooManyRequests)
	w.report(b, schemas.PhaseEnded, ended(0, 0, 0))
	w.report(a, schemas.PhaseRunning, nil)
	if e, err := s.next(); err != nil || e.Task != a || e.State != schemas.Running {
		t.Errorf("%+v %v", e, err)
	}
	s.close()
	until(t, "there is room for a follower", func() bool { return w.get("/v1/events?follow=false").status == 200 })
	for path, field := range map[string]string{
		"/v1/events?after=soon": "after", "/v1/events?after=-1": "after", "/v1/events?after=999999": "after", "/v1/events?follow=maybe": "follow",
		"/v1/events?state=ready": "state", "/v1/events?label=": "label", "/v1/events?colour=red": "colour",
		"/v1/tasks/" + string(a) + "/events?label=owner": "label",
	} {
		if e := w.get(path).want(t, 400, schemas.CodeInvalidQuery); e.Field != field || e.Detail == "" {
			t.Errorf("%s: %+v", path, e)
		}
	}
	for _, id := range []string{"x", "99999999"} {
		w.get("/v1/events", "Last-Event-ID", id).want(t, 400, schemas.CodeInvalidHeader)
	}
	w.get("/v1/tasks/t-01jd0000000000000000000000/events").want(t, 404, schemas.CodeNotFound)
}

// A filter that nothing passes still moves the place from which a client goes on.
func TestAQuietStreamSaysWhereItIs(t *testing.T) {
	w := newWorld(t, gateway.Config{KeepAlive: 5 * time.Millisecond})
	s, err := w.follow("/v1/events?label=none", "", "text/event-stream")
	if err != nil || s.status != 200 {
		t.Fatal(err)
	}
	defer s.close()
	task := w.create(spec)
	want := fmt.Sprintf("id: %d\n", task.Revision)
	for {
		line, err := s.in.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if line == want {
			return
		}
	}
}

func TestEventsSayWhatIsMissing(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := w.create(spec).ID
	for range schemas.MaxHistory {
		w.choose(id, "w1")
		w.next(id, func(e bus.Entry[schemas.Record]) schemas.Event {
			return schemas.Settle{Meta: on(e, "reaper"), Report: schemas.Report{Assignment: e.Value.Assignment(), Phase: schemas.PhaseEnded,
				End: &schemas.End{By: schemas.EndedGaveBack}}}
		})
	}
	got := w.told("/v1/events?follow=false")
	if len(got) != schemas.MaxHistory || got[0].Note != "accepted" || got[0].Truncated || !got[1].Truncated || got[2].Truncated {
		t.Errorf("%d events: %+v", len(got), got[:3])
	}
	if got := w.told(fmt.Sprintf("/v1/events?follow=false&after=%d", got[1].ID)); len(got) != schemas.MaxHistory-2 || got[0].Truncated {
		t.Errorf("%d events: %+v", len(got), got[0])
	}
	if got := w.told(fmt.Sprintf("/v1/events?follow=false&after=%d&state=assigned", got[0].ID)); !got[0].Truncated {
		t.Errorf("%+v", got[0])
	}
}

func TestEventsGoOnAfterTheServer(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	s, err := w.follow("/v1/events", "", "text/event-stream")
	if err != nil || s.status != 200 {
		t.Fatal(err)
	}
	defer s.close()
	first := w.create(spec).ID
	if e, err := s.next(); err != nil || e.Task != first {
		t.Fatal(e, err)
	}
	natstest.Restart(t, w.nats)
	var second schemas.TaskID
	until(t, "a task is accepted again", func() bool {
		r, err := w.try("POST", "/v1/tasks", spec)
		if err == nil && r.status == 201 {
			second = r.task(t).ID
		}
		return second != ""
	})
	for {
		e, err := s.next()
		if errors.Is(err, io.EOF) || err != nil {
			t.Fatal(err)
		}
		if e.Task == second {
			return
		}
	}
}
