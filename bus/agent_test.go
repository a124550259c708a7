package bus_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

const worker = schemas.WorkerID("w1")

var orders = bus.ConsumeOptions{Stream: schemas.WorkStream(worker), Durable: schemas.WorkConsumer(worker)}

func ordersSpec(w schemas.WorkerID, ackWait time.Duration) bus.ConsumerSpec {
	return bus.ConsumerSpec{
		Stream: schemas.WorkStream(w), Durable: schemas.WorkConsumer(w), Filter: schemas.OrderSubject(w, "*"),
		AckWait: ackWait, MaxAckPending: -1,
	}
}

// agentSetup gives a core connection and that of the agent of w1, with its queue.
func agentSetup(t testing.TB, ackWait time.Duration) (s *natsd.Server, core, agent *bus.Conn) {
	t.Helper()
	s, core = setup(t)
	if err := core.EnsureConsumer(testContext(t), ordersSpec(worker, ackWait)); err != nil {
		t.Fatal(err)
	}
	return s, core, natstest.ConnectAgent(t, s, worker)
}

func TestAgentTakesItsOrders(t *testing.T) {
	_, core, agent := agentSetup(t, 3*time.Second)
	var got inbox
	var held atomic.Bool
	consume(t, agent, orders, func(ctx context.Context, m bus.Msg) {
		text := fmt.Sprintf("%s/%d", m.Data, m.Delivered)
		got.add(text)
		var err error
		switch text {
		case "nak/1":
			err = m.Nak(20 * time.Millisecond)
		case "hold/1": // longer than AckWait
			for range 40 {
				select {
				case <-ctx.Done():
					return
				case <-time.After(100 * time.Millisecond):
				}
				err = errors.Join(err, m.InProgress())
			}
			err = errors.Join(err, m.Ack())
			held.Store(true)
		case "term/1":
			err = m.Term()
		case "forget/1": // comes again by itself
		default:
			err = m.Ack()
		}
		if err != nil {
			t.Error(err)
		}
	})
	for _, text := range []string{"plain", "nak", "hold", "term", "forget"} {
		publish(t, core, schemas.OrderSubject(worker, schemas.TaskID("t-"+text)), text)
	}
	for _, want := range []string{"plain/1", "nak/2", "term/1", "forget/2"} {
		until(t, want, got.has(want))
	}
	until(t, "hold was acknowledged", held.Load)
	until(t, "only the kept message is in the queue", func() bool {
		s, err := core.JS.Stream(testContext(t), orders.Stream)
		return err == nil && s.CachedInfo().State.Msgs == 1
	})
	for _, bad := range []string{"hold/2", "term/2", "plain/2"} {
		if got.has(bad)() {
			t.Errorf("%s was delivered", bad)
		}
	}
}

func TestAgentSurvivesRestartReconnectAndANewQueue(t *testing.T) {
	s, core, agent := agentSetup(t, 30*time.Second)
	ctx := testContext(t)
	var got inbox
	consume(t, agent, orders, func(_ context.Context, m bus.Msg) {
		got.add(string(m.Data))
		m.Ack()
	})
	order := func(text string) {
		t.Helper()
		sent := time.Now()
		publish(t, core, schemas.OrderSubject(worker, "t-1"), text)
		until(t, text, got.has(text))
		t.Logf("%s: taken after %v", text, time.Since(sent))
	}
	order("first")
	natstest.Restart(t, s)
	order("after a restart")

	// Pulls of the connection before must not swallow what comes after.
	for range 3 {
		again := agent.Reconnected()
		id := must[uint64](t)(agent.NC.GetClientID())
		if err := s.NATS().DisconnectClientByID(id); err != nil {
			t.Fatal(err)
		}
		<-again
		order(fmt.Sprint("after the loss of connection ", id))
	}
	again := agent.Reconnected()
	id := must[uint64](t)(agent.NC.GetClientID())
	if err := s.NATS().DisconnectClientByID(id); err != nil {
		t.Fatal(err)
	}
	order("during the loss of the connection")
	<-again

	// Nor those of a process before, which had no time to say anything.
	subscriptions := s.NATS().NumSubscriptions()
	gone := natstest.ConnectAgent(t, s, worker)
	var theirs inbox
	stop := consume(t, gone, orders, func(_ context.Context, m bus.Msg) {
		theirs.add(string(m.Data))
		m.Ack()
	})
	n := 0
	until(t, "the other process pulls too", func() bool {
		n++
		publish(t, core, schemas.OrderSubject(worker, "t-2"), fmt.Sprint("shared ", n))
		return len(theirs.get()) > 0
	})
	gone.NC.Close()
	stop()
	until(t, "the server has noticed", func() bool { return s.NATS().NumSubscriptions() == subscriptions })
	order("after another process of the agent")

	if err := core.DeleteConsumer(ctx, orders.Stream, orders.Durable); err != nil {
		t.Fatal(err)
	}
	if err := core.EnsureConsumer(ctx, ordersSpec(worker, 30*time.Second)); err != nil {
		t.Fatal(err)
	}
	order("after a new queue")
}

func TestAgentBeatsReportsAndLogs(t *testing.T) {
	s, core, agent := agentSetup(t, time.Second)
	ctx := testContext(t)
	beats := bus.NewTable(agent, schemas.BucketWorkers, noteCodec)
	_, err := beats.Get(ctx, string(worker))
	wantErr(t, err, bus.ErrNotFound)
	e := must[bus.Entry[note]](t)(beats.Create(ctx, string(worker), note{"1", []string{"op1"}}, "op1"))
	e = must[bus.Entry[note]](t)(beats.Replace(ctx, e, note{"2", []string{"op2"}}, "op2"))

	// The reaper's verdict: the next beat must lose and see why.
	verdicts := bus.NewTable(core, schemas.BucketWorkers, noteCodec)
	must[bus.Entry[note]](t)(verdicts.Replace(ctx, e, note{"lost", []string{"op3"}}, "op3"))
	_, err = beats.Replace(ctx, e, note{"3", []string{"op4"}}, "op4")
	wantErr(t, err, bus.ErrConflict)
	now := must[bus.Entry[note]](t)(beats.Get(ctx, string(worker)))
	if now.Value.Text != "lost" || now.Created.IsZero() {
		t.Errorf("the agent sees %+v", now)
	}

	natstest.Restart(t, s)
	_, err = beats.Replace(ctx, now, note{"4", []string{"op5"}}, "op5")
	if err != nil {
		t.Errorf("a beat after a restart: %v", err)
	}

	publish(t, agent, schemas.ReportSubject(worker, "t-1"), "report")
	publish(t, agent, schemas.ArtifactSubject(worker, "t-1", 1, 0), "chunk")
	done := make(chan error, 1)
	agent.PublishAsync(schemas.LogSubject(worker, "t-1"), nil, []byte("line"), func(err error) { done <- err })
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, stream := range []string{schemas.StreamReports, schemas.StreamLogs} {
		n := 0
		if err := core.Read(ctx, bus.ReadOptions{Stream: stream}, func(bus.Msg) error { n++; return nil }); err != nil || n != 1 {
			t.Errorf("%s: %d messages, %v", stream, n, err)
		}
	}
}

func TestAgentIsDeniedTheRest(t *testing.T) {
	_, core, agent := agentSetup(t, time.Second)
	ctx := testContext(t)
	tasks := bus.NewTable(core, schemas.BucketTasks, noteCodec)
	record := must[bus.Entry[note]](t)(tasks.Create(ctx, "t1", note{Text: "record"}, "op"))
	for _, w := range []schemas.WorkerID{"w2", "w3"} {
		if err := core.EnsureConsumer(ctx, ordersSpec(w, time.Second)); err != nil {
			t.Fatal(err)
		}
		must[bus.Entry[note]](t)(bus.NewTable(core, schemas.BucketWorkers, noteCodec).Create(ctx, string(w), note{Text: "beat"}, "op"))
	}
	before := streams(t, core)
	for _, subject := range []string{
		"$KV.tasks.t1", "$KV.workers.w2", "$KV.drains.w1",
		schemas.OrderSubject("w1", "t1"), schemas.OrderSubject("w2", "t1"),
		schemas.ReportSubject("w2", "t1"), schemas.LogSubject("w2", "t1"), schemas.ArtifactSubject("w2", "t1", 1, 0), "$KV.idempotency.k",
		"$JS.API.STREAM.MSG.GET.KV_tasks", "$JS.API.STREAM.INFO.KV_tasks", "$JS.API.STREAM.DELETE.KV_tasks",
		"$JS.API.DIRECT.GET.KV_workers.$KV.workers.w1",
		schemas.AgentAPIPrefix + ".STREAM.MSG.GET.KV_tasks", schemas.AgentAPIPrefix + ".STREAM.INFO.WORK_0",
		schemas.AgentAPIPrefix + ".DIRECT.GET.KV_workers.$KV.workers.w2",
		schemas.AgentAPIPrefix + ".CONSUMER.CREATE.WORK_0.x", schemas.AgentAPIPrefix + ".CONSUMER.DELETE.WORK_0.x",
		schemas.AgentAPIPrefix + ".CONSUMER.MSG.NEXT." + schemas.WorkStream("w2") + "." + schemas.WorkConsumer("w2"),
		schemas.AgentAPIPrefix + ".CONSUMER.INFO." + schemas.WorkStream("w2") + "." + schemas.WorkConsumer("w2"),
		"$JS.ACK." + schemas.WorkStream("w2") + "." + schemas.WorkConsumer("w2") + ".1.1.1.1.1",
		"$SYS.REQ.SERVER.PING", "_INBOX.x.y", schemas.PlacerWhySubject, schemas.PlacerDrainedSubject,
	} {
		_, err := agent.Publish(ctx, subject, nil, []byte("x"))
		if !errors.Is(err, nats.ErrPermissionViolation) {
			t.Errorf("publish %s: %v", subject, err)
		}
	}
	denied := make(chan error, 100)
	agent.NC.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { denied <- err })
	for _, subject := range []string{
		">", "$KV.>", "_INBOX.>", schemas.AgentInbox("w2") + ".>", "dayfly.>", "$JS.>", "$JS.EVENT.ADVISORY.>", schemas.OrderSubject("w1", "*"), "$SYS.>",
	} {
		must[*nats.Subscription](t)(agent.NC.SubscribeSync(subject))
		select {
		case got := <-denied:
			if !errors.Is(got, nats.ErrPermissionViolation) || !strings.Contains(got.Error(), `"`+subject+`"`) {
				t.Errorf("subscribe %s: %v", subject, got)
			}
		case <-ctx.Done():
			t.Errorf("subscribe %s was not denied", subject)
		}
	}

	// A reply subject is not checked against permissions. It must lead nowhere.
	for _, reply := range []string{"$KV.tasks.t1", "$KV.workers.w2", schemas.OrderSubject("w2", "evil"),
		schemas.ReportSubject("w2", "evil"), schemas.LogSubject("w2", "evil"), schemas.ArtifactSubject("w2", "evil", 1, 0), "$JS.API.STREAM.DELETE.KV_tasks"} {
		for _, subject := range []string{
			"$KV.workers.w1", schemas.ReportSubject("w1", "t1"), schemas.LogSubject("w1", "t1"),
			schemas.AgentAPIPrefix + ".CONSUMER.INFO." + orders.Stream + "." + orders.Durable,
			schemas.AgentAPIPrefix + ".CONSUMER.MSG.NEXT." + orders.Stream + "." + orders.Durable,
			schemas.AgentAPIPrefix + ".DIRECT.GET.KV_workers.$KV.workers.w1",
		} {
			if err := agent.NC.PublishRequest(subject, reply, []byte("evil")); err != nil {
				t.Error(err)
			}
		}
	}
	// Nor does a header take away what others wrote.
	for _, rollup := range []string{jetstream.MsgRollupAll, jetstream.MsgRollupSubject} {
		for _, subject := range []string{"$KV.workers.w1", schemas.ReportSubject("w1", "t1"), schemas.LogSubject("w1", "t1"), schemas.ArtifactSubject("w1", "t1", 1, 0)} {
			if _, err := agent.Publish(ctx, subject, nats.Header{jetstream.MsgRollup: {rollup}}, []byte("evil")); err == nil {
				t.Errorf("publish %s with rollup %s was taken", subject, rollup)
			}
		}
	}
	// A pull of another worker's orders, answered into the own inbox by a reply subject.
	publish(t, core, schemas.OrderSubject("w2", "t2"), "secret")
	if err := agent.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	publish(t, core, schemas.OrderSubject("w1", "t9"), "an order for the pulls of before")
	publish(t, agent, schemas.ReportSubject("w1", "t1"), "after all of them")
	natsRoundTrip(t, core)

	e := must[bus.Entry[note]](t)(tasks.Get(ctx, "t1"))
	if e.Revision != record.Revision || e.Value.Text != "record" {
		t.Errorf("the record was overwritten: %+v", e)
	}
	after := streams(t, core)
	for _, name := range []string{"KV_tasks", "KV_drains", "KV_idempotency"} {
		if before[name] != after[name] {
			t.Errorf("%s took messages: last sequence %d, then %d", name, before[name], after[name])
		}
	}
	beat := must[bus.Entry[note]](t)(bus.NewTable(core, schemas.BucketWorkers, noteCodec).Get(ctx, "w2"))
	if beat.Value.Text != "beat" {
		t.Errorf("another worker's beat was overwritten: %+v", beat)
	}
	for _, stream := range []string{schemas.StreamReports, schemas.StreamLogs} {
		mine := 0
		err := core.Read(ctx, bus.ReadOptions{Stream: stream}, func(m bus.Msg) error {
			mine++
			if !strings.Contains(m.Subject, ".w1.") {
				t.Errorf("stored %s: %s", m.Subject, m.Data)
			}
			return nil
		})
		if err != nil || mine == 0 {
			t.Errorf("%s: %d messages, %v: the requests were not carried out at all", stream, mine, err)
		}
	}
	evil := 0
	for shard := range schemas.WorkShards {
		name := fmt.Sprintf("WORK_%d", shard)
		evil += int(after[name] - before[name])
	}
	if evil != 2 {
		t.Errorf("%d orders were stored, want the 2 of core", evil)
	}
}

// streams gives the last sequence of each.
func streams(t testing.TB, c *bus.Conn) map[string]uint64 {
	t.Helper()
	last := map[string]uint64{}
	list := c.JS.ListStreams(testContext(t))
	for info := range list.Info() {
		last[info.Config.Name] = info.State.LastSeq
	}
	if err := list.Err(); err != nil {
		t.Fatal(err)
	}
	return last
}

func natsRoundTrip(t testing.TB, c *bus.Conn) {
	t.Helper()
	if err := c.NC.Flush(); err != nil {
		t.Fatal(err)
	}
}
