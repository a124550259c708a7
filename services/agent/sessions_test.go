package agent_test

import (
	"crypto/rand"
	"io"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
	"dayfly.dev/bus/session"
	"dayfly.dev/schemas"
)

// visitor plays a gateway that opens sessions.
type visitor struct {
	*bench
	mux    *session.Mux
	key    schemas.SigningKey
	number uint64
}

func (b *bench) visitor() *visitor {
	b.t.Helper()
	v := &visitor{bench: b, key: schemas.SigningKey{Seed: make([]byte, 32)}}
	_, _ = rand.Read(v.key.Seed)
	public, err := v.key.Verifying()
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := bus.NewTable(b.core, schemas.BucketKeys, bus.JSON[schemas.VerifyingKey](nil)).Create(b.context(), schemas.KeyVerifying, public, ""); err != nil {
		b.t.Fatal(err)
	}
	v.mux, err = session.NewMux(b.core, session.Options{Receive: schemas.SessionsUp, Filter: schemas.SessionAddress("*", "g1", "*"), Send: schemas.SessionsDown})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(v.mux.Close)
	return v
}

// dialTo is a request for a port of the task.
func (v *visitor) dialTo(a schemas.Assignment, port int) schemas.Open {
	v.number++
	beat, _, _ := v.beats.Get(string(worker))
	return schemas.Open{Worker: worker, Instance: beat.Instance, Gateway: "g1", Number: v.number, Kind: schemas.SessionDial, Task: a.Task, Epoch: a.Epoch, Port: port}
}

// ask sends a request, signed by key.
func (v *visitor) ask(o schemas.Open, key schemas.SigningKey) schemas.Opened {
	v.t.Helper()
	body, err := schemas.Encode(o)
	if err != nil {
		v.t.Fatal(err)
	}
	signature, err := key.Sign(schemas.VerbOpen, body)
	if err != nil {
		v.t.Fatal(err)
	}
	var answer schemas.Opened
	v.until("the agent answers", func() bool { // it may listen a moment after its first beat
		m, err := v.core.NC.RequestMsgWithContext(v.context(), &nats.Msg{Subject: schemas.AgentSubject(worker, schemas.VerbOpen),
			Header: nats.Header{schemas.HeaderSignature: {signature}}, Data: body})
		return err == nil && schemas.Decode(m.Data, &answer) == nil
	})
	return answer
}

func TestSessionsReachThePortsOfATask(t *testing.T) {
	b := newBench(t)
	b.start()
	beat := b.registered("")
	a := schemas.Assignment{Task: "t-1", Attempt: 1, Worker: worker, Epoch: beat.Epoch}
	b.run(a, "tcp", "7000")
	b.report(a, func(r schemas.Report) bool { return r.Phase == schemas.PhaseRunning })
	v := b.visitor()

	o := v.dialTo(a, 7000)
	stream, err := v.mux.Open(o.Address())
	if err != nil {
		t.Fatal(err)
	}
	if answer := v.ask(o, v.key); answer.Code != "" {
		t.Fatal(answer)
	}
	c := stream.Conn()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
		t.Fatalf("%q, %v", got, err)
	}

	other := schemas.SigningKey{Seed: make([]byte, 32)}
	next := v.dialTo(a, 7000)
	again := v.dialTo(a, 7000)
	again.Number = o.Number
	old := v.dialTo(a, 7000)
	old.Instance = "former"
	gone := v.dialTo(schemas.Assignment{Task: "t-2", Epoch: beat.Epoch}, 7000)
	former := v.dialTo(schemas.Assignment{Task: "t-1", Epoch: "e-former"}, 7000)
	far := v.dialTo(a, 70000)
	unknown := v.dialTo(a, 7000)
	unknown.Kind = "dance"
	for name, c := range map[string]struct {
		open schemas.Open
		key  schemas.SigningKey
		want schemas.Code
	}{
		"a signature of somebody else":  {next, other, schemas.CodeNotAllowed},
		"a request that came before":    {again, v.key, schemas.CodeNotAllowed},
		"a request to a former process": {old, v.key, ""},
		"a task that is not here":       {gone, v.key, schemas.CodeStateConflict},
		"a former registration":         {former, v.key, schemas.CodeStateConflict},
		"a port where nobody listens":   {v.dialTo(a, 7001), v.key, schemas.CodeNoListener},
		"a port that there is not":      {far, v.key, schemas.CodeInvalidValue},
		"a kind of a newer gateway":     {unknown, v.key, schemas.CodeNotAvailable},
	} {
		answer := v.ask(c.open, c.key)
		if answer.Code != c.want {
			t.Errorf("%s: %v", name, answer)
		}
		if told := answer.Instance == beat.Instance; told != (c.want == "") {
			t.Errorf("%s: instance %q", name, answer.Instance)
		}
	}

	b.rt.Kill(a.Task)
	if rest, _ := io.ReadAll(c); len(rest) != 0 {
		t.Errorf("after the end of the task: %q", rest)
	}
	_ = c.Close()
	<-stream.Done()
	if answer := v.ask(v.dialTo(a, 7000), v.key); answer.Code != schemas.CodeStateConflict {
		t.Errorf("after the end of the task: %v", answer)
	}
}

// The first requests may come at once, before the agent has read the key of the gateways.
func TestManySessionsAtOnce(t *testing.T) {
	b := newBench(t)
	b.start()
	beat := b.registered("")
	a := schemas.Assignment{Task: "t-1", Attempt: 1, Worker: worker, Epoch: beat.Epoch}
	b.run(a, "tcp", "7000")
	b.report(a, func(r schemas.Report) bool { return r.Phase == schemas.PhaseRunning })
	v := b.visitor()
	if answer := v.ask(schemas.Open{Worker: worker}, v.key); answer.Instance == "" { // it listens, and knows the key
		t.Fatal(answer)
	}
	if err := b.halt(); err != nil {
		t.Fatal(err)
	}
	b.start()
	err := b.beats.Wait(b.context(), string(worker), func(now schemas.Beat, _ uint64, _ bool) bool { return now.Instance != beat.Instance })
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 16 {
		o := v.dialTo(a, 7000)
		all.Go(func() {
			if answer := v.ask(o, v.key); answer.Code != "" {
				t.Errorf("%+v", answer)
			}
		})
	}
	all.Wait()
}

func TestSessionsEndWithTheAgent(t *testing.T) {
	b := newBench(t)
	b.start()
	beat := b.registered("")
	a := schemas.Assignment{Task: "t-1", Attempt: 1, Worker: worker, Epoch: beat.Epoch}
	b.run(a, "tcp", "7000")
	b.report(a, func(r schemas.Report) bool { return r.Phase == schemas.PhaseRunning })
	v := b.visitor()
	o := v.dialTo(a, 7000)
	stream, err := v.mux.Open(o.Address())
	if err != nil {
		t.Fatal(err)
	}
	if answer := v.ask(o, v.key); answer.Code != "" {
		t.Fatal(answer)
	}
	if err := b.halt(); err != nil {
		t.Fatal(err)
	}
	<-stream.Done()

	b.start()
	err = b.beats.Wait(b.context(), string(worker), func(now schemas.Beat, _ uint64, _ bool) bool { return now.Instance != beat.Instance })
	if err != nil {
		t.Fatal(err)
	}
	if answer := v.ask(v.dialTo(a, 7000), v.key); answer.Code != "" {
		t.Errorf("the next agent: %v", answer)
	}
}
