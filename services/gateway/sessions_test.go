package gateway_test

import (
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

// opens plays a worker's agent: each request for a session gets what answer says.
func (w *world) opens(worker schemas.WorkerID, answer func(schemas.Open) schemas.Opened) {
	w.Helper()
	conn := natstest.ConnectAgent(w, w.nats, worker)
	_, err := conn.NC.Subscribe(schemas.AgentSubject(worker, schemas.VerbOpen), func(m *nats.Msg) {
		var o schemas.Open
		if err := schemas.Decode(m.Data, &o); err != nil {
			w.Error(err)
		}
		body, err := schemas.Encode(answer(o))
		if err == nil {
			err = m.Respond(body)
		}
		if err != nil {
			w.Error(err)
		}
	})
	if err == nil {
		err = conn.NC.Flush()
	}
	if err != nil {
		w.Fatal(err)
	}
}

var notHere = schemas.Opened{Code: schemas.CodeStateConflict, Message: "the task's process does not run"}

// The view says where to ask; where the agent knows better, the record does.
func TestAnAgentKnowsBetterThanTheView(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	for _, worker := range []schemas.WorkerID{"w1", "w2"} {
		w.beat(beat(worker, 4, 1<<33))
	}
	create := func() schemas.TaskID {
		t.Helper()
		id := w.create(`{"image":"a","on_lost":"requeue"}`).ID
		w.run(id)
		return id
	}
	const program = schemas.ExecID("aaaaaaaaaaaaaaaaaaaaaaaaaa")
	const launch = `{"command":["true"],"background":true}`
	over, moved, gone, holds := create(), create(), create(), create()
	var mu sync.Mutex
	asked := map[schemas.TaskID][]schemas.WorkerID{} // under mu
	again := false                                   // under mu: w1 has said that it was started anew
	ask := func(o schemas.Open) {
		mu.Lock()
		defer mu.Unlock()
		asked[o.Task] = append(asked[o.Task], o.Worker)
	}
	w.opens("w2", func(o schemas.Open) schemas.Opened {
		ask(o)
		return schemas.Opened{Exec: program}
	})
	w.opens("w1", func(o schemas.Open) schemas.Opened {
		ask(o)
		mu.Lock()
		if o.Task == moved && !again {
			again = true
			mu.Unlock()
			return schemas.Opened{Instance: "another"}
		}
		mu.Unlock()
		switch o.Task {
		case over: // as the gateway asks
			w.report(over, schemas.PhaseEnded, ended(0, 0, 0))
		case moved:
			w.next(moved, func(e bus.Entry[schemas.Record]) schemas.Event {
				return schemas.Lose{Meta: on(e, "reaper"), Worker: e.Value.Worker, Epoch: e.Value.Epoch}
			})
			w.choose(moved, "w2")
			w.report(moved, schemas.PhaseRunning, nil)
		case gone:
			e, err := w.records.Get(deadline(t), string(gone))
			if err == nil {
				err = w.records.Delete(deadline(t), string(gone), e.Revision)
			}
			if err != nil {
				t.Error(err)
			}
		}
		return notHere
	})
	exec := func(id schemas.TaskID) reply { return w.do("POST", "/v1/tasks/"+string(id)+"/exec", launch) }
	for _, id := range []schemas.TaskID{over, moved, gone, holds} {
		until(t, "the view shows it", func() bool { return w.task(id).State == schemas.Running })
	}
	if e := exec(over).want(t, 409, schemas.CodeStateConflict); e.State != schemas.Completed {
		t.Errorf("it ended as it was asked: %+v", e)
	}
	if r := exec(moved); r.status != 201 {
		t.Errorf("it runs elsewhere: %d %s", r.status, r.body)
	}
	exec(gone).want(t, 404, schemas.CodeNotFound)
	if e := exec(holds).want(t, 409, schemas.CodeStateConflict); e.Detail != notHere.Message {
		t.Errorf("the agent's word stands: %+v", e)
	}
	mu.Lock()
	defer mu.Unlock()
	for id, want := range map[schemas.TaskID]int{over: 1, moved: 3, gone: 1, holds: 1} {
		if len(asked[id]) != want {
			t.Errorf("%s: asked %v", id, asked[id])
		}
	}
}
