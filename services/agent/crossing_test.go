package agent_test

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/fakeruntime"
)

// These tests are about meetings: an order, a verdict or a restart of the server that
// comes in the midst of something else.

// spy is a fake host whose steps a test can hold up.
type spy struct {
	*fakeruntime.Runtime
	image func(ctx context.Context, progress func(agent.Progress)) error
	start func(ctx context.Context, req agent.StartRequest, found agent.Attempt) agent.Attempt
}

func (s *spy) Image(ctx context.Context, spec schemas.Spec, pinned *schemas.Resolved, progress func(agent.Progress)) (agent.Image, error) {
	if s.image != nil {
		if err := s.image(ctx, progress); err != nil {
			return agent.Image{}, err
		}
	}
	return s.Runtime.Image(ctx, spec, pinned, progress)
}

func (s *spy) Start(ctx context.Context, req agent.StartRequest) (agent.Attempt, error) {
	found, err := s.Runtime.Start(ctx, req)
	if err == nil && s.start != nil {
		found = s.start(ctx, req, found)
	}
	return found, err
}

// stubborn is an attempt that lives on after it was stopped, until the test lets go.
type stubborn struct {
	agent.Attempt
	stopped chan struct{} // closed by the first Stop
	done    chan struct{} // closed by the test
}

func (s *stubborn) Stop(time.Duration) {
	select {
	case <-s.stopped:
	default:
		close(s.stopped)
	}
}

func (s *stubborn) Done() <-chan struct{} { return s.done }

// handled waits until the agent has acknowledged every order.
func (b *bench) handled() {
	b.t.Helper()
	b.until("all orders are acknowledged", func() bool {
		s, err := b.core.JS.Stream(b.context(), schemas.WorkStream(worker))
		return err == nil && s.CachedInfo().State.Msgs == 1 // the one that is kept
	})
}

func oneSlot() *fakeruntime.Runtime {
	return fakeruntime.New(fakeruntime.Config{Host: schemas.Host{CPUs: 8, Memory: 1 << 30, Slots: 1, Arch: "amd64", OS: "linux"}})
}

func TestAnAttemptThatWasReplacedGivesItsRoomBack(t *testing.T) {
	b := newBench(t)
	b.rt = oneSlot()
	b.start()
	first := b.registered("")
	a := assignment(first.Epoch, 1)
	b.run(a, "sleep", "1h")
	b.report(a, running)
	second := a
	second.Attempt = 2
	b.run(second, "sleep", "1h")
	b.report(second, func(r schemas.Report) bool {
		if r.End != nil {
			t.Fatalf("the second attempt ended: %+v", r.End)
		}
		return running(r)
	})
	b.declareLost()
	fresh := assignment(b.registered(first.Epoch).Epoch, 1)
	b.run(fresh, "exit", "3")
	if r := b.end(fresh); r.End.By != schemas.EndedItself {
		t.Errorf("after a new registration: %+v", r.End)
	}
}

func TestAStopOrCloseOfALaterAttemptEndsAnEarlierOne(t *testing.T) {
	for _, want := range []schemas.Want{schemas.WantStop, schemas.WantClose} {
		t.Run(string(want), func(t *testing.T) {
			b := newBench(t)
			b.start()
			a := assignment(b.registered("").Epoch, 1)
			b.run(a, "sleep", "1h")
			b.report(a, running)
			second := a
			second.Attempt = 2
			b.order(schemas.Order{Assignment: second, Want: want})
			b.until("the container of the first attempt is removed", func() bool { return b.rt.Live() == 0 })
			if want == schemas.WantStop {
				if r := b.end(second); r.End.By != schemas.EndedGaveBack {
					t.Errorf("report %+v", r.End)
				}
			}
		})
	}
}

func TestACloseEndsAnAttemptThatStillRuns(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "sleep", "1h")
	b.report(a, running)
	b.order(schemas.Order{Assignment: a, Want: schemas.WantClose})
	b.until("its container is removed", func() bool { return b.rt.Live() == 0 })
}

func TestAnAttemptReplacedWhileItStartsLeavesNothing(t *testing.T) {
	b := newBench(t)
	started := make(chan struct{})
	b.over = &spy{Runtime: b.rt, start: func(ctx context.Context, req agent.StartRequest, found agent.Attempt) agent.Attempt {
		if req.Assignment.Attempt == 1 {
			close(started)
			<-ctx.Done() // too late: the process is there
		}
		return found
	}}
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "sleep", "1h")
	<-started
	second := a
	second.Attempt = 2
	b.run(second, "sleep", "1h")
	b.report(second, running)
	b.until("only the second is left", func() bool { return b.rt.Live() == 1 })
}

func TestAnExtensionDuringTheStartIsNotLost(t *testing.T) {
	b := newBench(t)
	started, goOn := make(chan struct{}), make(chan struct{})
	b.over = &spy{Runtime: b.rt, start: func(ctx context.Context, _ agent.StartRequest, found agent.Attempt) agent.Attempt {
		close(started)
		select {
		case <-goOn:
		case <-ctx.Done():
		}
		return found
	}}
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "sleep", "1h")
	<-started
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command = "fake", []string{"sleep", "1h"}
	b.order(schemas.Order{Assignment: a, Want: schemas.WantRun, Spec: &spec, Extensions: 1, TimeLeft: schemas.Duration(50 * time.Millisecond)})
	b.report(a, func(r schemas.Report) bool { return r.Applied == 1 })
	close(goOn)
	if r := b.end(a); r.End.By != schemas.EndedDeadline {
		t.Errorf("ended by %s", r.End.By)
	}
}

func TestAStopBecauseTimeIsOverSaysSoBeforeTheStartToo(t *testing.T) {
	b := newBench(t)
	pulling := make(chan struct{})
	b.over = &spy{Runtime: b.rt, image: func(ctx context.Context, _ func(agent.Progress)) error {
		close(pulling)
		<-ctx.Done()
		return ctx.Err()
	}}
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "sleep", "1h")
	<-pulling
	b.order(schemas.Order{Assignment: a, Want: schemas.WantStop, Expired: true})
	if r := b.end(a); r.End.By != schemas.EndedDeadline {
		t.Errorf("ended by %s", r.End.By)
	}
}

func TestWordOfAPullThatComesLateDoesNotUnsayTheEnd(t *testing.T) {
	b := newBench(t)
	told := make(chan struct{})
	b.over = &spy{Runtime: b.rt, image: func(_ context.Context, progress func(agent.Progress)) error {
		begun := make(chan struct{})
		go func() { // a pull that others wait for tells those too who have just left
			for i := range 5000 {
				progress(agent.Progress{Sentence: strconv.Itoa(i)})
				if i == 100 {
					close(begun)
				}
			}
			told <- struct{}{}
		}()
		<-begun
		return &agent.StartError{Reason: schemas.ReasonImage}
	}}
	b.start()
	epoch := b.registered("").Epoch
	for range 20 {
		a := assignment(epoch, 1)
		b.run(a, "exit", "0")
		b.end(a)
		<-told
		b.run(a, "exit", "0") // asks for what is true now
		if r := b.report(a, func(r schemas.Report) bool { return r.Revision == b.rev }); r.Phase != schemas.PhaseEnded {
			t.Fatalf("the attempt has ended, and now says %s", r.Phase)
		}
		b.order(schemas.Order{Assignment: a, Want: schemas.WantClose})
	}
}

func TestOrdersOfAnEpochThatIsBeingGivenUpAreRefused(t *testing.T) {
	b := newBench(t)
	last := &stubborn{stopped: make(chan struct{}), done: make(chan struct{})}
	b.over = &spy{Runtime: b.rt, start: func(_ context.Context, _ agent.StartRequest, found agent.Attempt) agent.Attempt {
		if last.Attempt != nil {
			return found
		}
		last.Attempt = found
		return last
	}}
	b.start()
	first := b.registered("")
	a := assignment(first.Epoch, 1)
	b.run(a, "sleep", "1h")
	b.report(a, running)
	b.declareLost()
	<-last.stopped // the agent ends what it ran, and waits for that
	late := assignment(first.Epoch, 1)
	b.run(late, "sleep", "1h")
	b.order(schemas.Order{Assignment: a, Want: schemas.WantStop})
	b.handled()
	close(last.done)
	fresh := assignment(b.registered(first.Epoch).Epoch, 1)
	b.run(fresh, "exit", "0")
	b.end(fresh)
	if n := len(b.rt.Starts(late.Task)); n != 0 {
		t.Error("a task that was given up with the old registration was started under the new one")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.reports[a.Task] {
		if r.Phase == schemas.PhaseEnded {
			t.Errorf("an attempt that was not dead yet was reported as ended: %+v", r.End)
		}
	}
}

func TestWhatIsKeptAcrossRegistrationsIsReportedAgain(t *testing.T) {
	b := newBench(t)
	b.start()
	first := b.registered("")
	keep := assignment(first.Epoch, 1)
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command, spec.OnLost = "fake", []string{"sleep", "1h"}, schemas.OnLostWait
	b.order(schemas.Order{Assignment: keep, Want: schemas.WantRun, Spec: &spec, TimeLeft: spec.TTL})
	b.report(keep, running)
	b.mu.Lock()
	before := len(b.reports[keep.Task])
	b.mu.Unlock()
	b.declareLost()
	b.registered(first.Epoch)
	b.until("the kept attempt is reported again", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.reports[keep.Task]) > before
	})
	if err := b.beats.Wait(b.context(), string(worker), func(v schemas.Beat, _ uint64, _ bool) bool { return v.Reported }); err != nil {
		t.Error("the worker never says that it has reported everything")
	}
}

// storeOf is where the server keeps a stream.
func (b *bench) storeOf(stream string) string {
	return filepath.Join(b.server.NATS().JetStreamConfig().StoreDir, "CORE", "streams", stream)
}

// logBytes is what is stored of a log, in whatever order it came; what is missing is 0.
func (b *bench) logBytes(a schemas.Assignment) []byte {
	b.t.Helper()
	var log []byte
	err := b.core.Read(b.context(), bus.ReadOptions{Stream: schemas.StreamLogs, Filter: schemas.LogSubject(a.Worker, a.Task)}, func(m bus.Msg) error {
		off, err := strconv.Atoi(m.Header.Get(schemas.HeaderOffset))
		if err != nil {
			return err
		}
		log = append(log, make([]byte, max(0, off+len(m.Data)-len(log)))...)
		copy(log[off:], m.Data)
		return nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return log
}

func TestLogsThatTheServerLostAreSentAgainThoughTheTaskEnded(t *testing.T) {
	b := newBench(t)
	found := make(chan agent.Attempt, 1)
	b.over = &spy{Runtime: b.rt, start: func(_ context.Context, _ agent.StartRequest, a agent.Attempt) agent.Attempt {
		found <- a
		return a
	}}
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "term-exit", "0")
	b.report(a, running)
	b.until("the first words are stored", func() bool { return string(b.logBytes(a)) == "ready\n" })

	msgs := filepath.Join(b.storeOf(schemas.StreamLogs), "msgs")
	b.server.Shutdown()
	if err := os.RemoveAll(msgs); err != nil { // as a server that is killed loses its last milliseconds
		t.Fatal(err)
	}
	// For as long as what is stored counts as safe where the server stays.
	gone := time.Now()
	b.until("the server is away for long", func() bool { return time.Since(gone) > 1500*time.Millisecond })
	task := <-found
	task.Stop(time.Second) // it says "term", which has to wait for the server
	<-task.Done()
	natstest.Restart(t, b.server)
	b.end(a)
	b.until("the whole log is stored", func() bool { return string(b.logBytes(a)) == "ready\nterm\n" })
}

func TestARegistrationThatTheServerLostIsMadeAgain(t *testing.T) {
	b := newBench(t)
	b.start()
	first := b.registered("")
	if err := b.halt(); err != nil {
		t.Fatal(err)
	}
	dir := b.storeOf("KV_" + schemas.BucketWorkers)
	backup := t.TempDir()
	b.server.Shutdown()
	if err := os.CopyFS(backup, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	natstest.Restart(t, b.server)

	b.cfg.Beat, b.cfg.Lease = time.Hour, time.Hour // one beat, then one at each reconnect
	b.start()
	other := func(v schemas.Beat, _ uint64, _ bool) bool { return v.Instance != first.Instance && v.Instance != "" }
	if err := b.beats.Wait(b.context(), string(worker), other); err != nil {
		t.Fatal(err)
	}
	b.server.Shutdown()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(dir, os.DirFS(backup)); err != nil {
		t.Fatal(err)
	}
	natstest.Restart(t, b.server)
	b.until("the worker's key is this agent's again", func() bool {
		select {
		case err := <-b.ended:
			b.stop = nil
			t.Fatal("the agent ended: ", err)
		default:
		}
		m, err := b.core.NC.Request("$JS.API.DIRECT.GET.KV_workers.$KV.workers."+string(worker), nil, time.Second)
		var v schemas.Beat
		return err == nil && schemas.Decode(m.Data, &v) == nil && other(v, 0, true) && v.Epoch == first.Epoch
	})
}
