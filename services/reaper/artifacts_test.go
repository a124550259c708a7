package reaper_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

// Artifacts are kept as long as the record that names them, and nothing else is.
func TestArtifactsThatNoRecordNamesAreCollected(t *testing.T) {
	b := newBench(t)
	b.cfg.Collect, b.cfg.Fence = 50*time.Millisecond, time.Hour // no worker beats here
	put := func(w schemas.WorkerID, id schemas.TaskID, attempt int, chunk int64) {
		t.Helper()
		if _, err := b.core.Publish(b.ctx(), schemas.ArtifactSubject(w, id, attempt, chunk), nil, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	stored := func() []string {
		t.Helper()
		got, err := b.core.Subjects(b.ctx(), schemas.StreamArtifacts, schemas.ArtifactFilter("*", "*", "*"))
		if err != nil {
			t.Fatal(err)
		}
		return slices.Sorted(maps.Keys(got))
	}
	until := func(what string, want ...string) {
		t.Helper()
		want = slices.Sorted(slices.Values(want)) // the caller's stays as it is
		ctx := b.ctx()
		for !slices.Equal(stored(), want) {
			select {
			case <-ctx.Done():
				t.Fatalf("%s: there is %q, want %q", what, stored(), want)
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	end := func(id schemas.TaskID, s *schemas.ArtifactSum) {
		t.Helper()
		b.next(id, func(m schemas.Meta) schemas.Event {
			return schemas.Settle{Meta: m, Report: schemas.Report{Assignment: schemas.Assignment{Task: id, Attempt: 1, Worker: worker, Epoch: "e1"}, Phase: schemas.PhaseEnded, Ran: true,
				End: &schemas.End{By: schemas.EndedItself, Exit: &schemas.Exit{}, ArtifactSum: s}}}
		})
	}
	sum := &schemas.ArtifactSum{Count: 1, Bytes: 1, Stored: 1, ListBytes: 1, ListSHA256: "0000000000000000000000000000000000000000000000000000000000000000"}

	final, held, nothing, refused := b.accept(nil), b.accept(nil), b.accept(nil), b.accept(nil)
	for _, id := range []schemas.TaskID{final, held, nothing, refused} {
		b.assign(id, "e1")
		put(worker, id, 1, 0)
		put(worker, id, 1, 1)
		put(worker, id, 2, 0)                                             // made up
		put("w2", id, 1, 0)                                               // of a worker that never held it
		b.core.NC.Publish("dayfly.artifacts.w1."+string(id)+".01.0", nil) // no attempt at all
	}
	end(final, sum)
	end(nothing, nil)
	end(refused, &schemas.ArtifactSum{Truncated: true, Why: schemas.ArtifactsStoreFull}) // in the midst of it
	put(worker, "t-01arz3ndektsv4rrffq69g5fav", 1, 0)                                    // of no task
	keep := []string{
		schemas.ArtifactSubject(worker, final, 1, 0), schemas.ArtifactSubject(worker, final, 1, 1),
		schemas.ArtifactSubject(worker, held, 1, 0), schemas.ArtifactSubject(worker, held, 1, 1),
	}
	b.start()
	until("at first", keep...)
	put("w2", final, 7, 0) // a final task is looked at again where something came
	until("made up later", keep...)

	e, err := b.table.Get(b.ctx(), string(final))
	if err != nil {
		t.Fatal(err)
	}
	if err := b.table.Delete(b.ctx(), string(final), e.Revision); err != nil {
		t.Fatal(err)
	}
	put(worker, final, 1, 2) // else it is looked at when its retention is over
	until("the record is gone", keep[2:]...)

}

// A worker that puts a wildcard in place of a task, or what a server does not list, loses
// that message, and nobody loses anything else.
func TestOddArtifactsTakeNothingElseAway(t *testing.T) {
	b := newBench(t)
	b.cfg.Collect, b.cfg.Fence = 50*time.Millisecond, time.Hour
	id := b.accept(nil)
	b.assign(id, "e1")
	publish := func(subject string) {
		t.Helper()
		if _, err := b.core.Publish(b.ctx(), subject, nil, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	tidy := func(want uint64) {
		t.Helper()
		ctx := b.ctx()
		for {
			s, err := b.core.JS.Stream(ctx, schemas.StreamArtifacts)
			if err != nil {
				t.Fatal(err)
			}
			if n := s.CachedInfo().State.Msgs; n == want {
				return
			} else if n < want {
				t.Fatalf("%d messages are left of %d", n, want)
			}
			select {
			case <-ctx.Done():
				t.Fatal("odd messages stay")
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	publish(schemas.ArtifactSubject(worker, id, 1, 0))
	for _, odd := range []string{"*", ">", "a\x7fb", "\xff\xfe", "t-1"} {
		for _, after := range []string{odd + ".1.0", string(id) + "." + odd + ".0", string(id) + ".1." + odd} {
			publish("dayfly.artifacts.w2." + after)
			publish("dayfly.artifacts.w2." + after)
		}
	}
	b.start()
	tidy(1)
}

// A worker whose wildcards lead the server's count of subjects astray hides nothing, and no
// subject that its credentials let it publish stays.
func TestAWorkerHidesNoArtifacts(t *testing.T) {
	b := newBench(t)
	b.cfg.Collect, b.cfg.Fence = 50*time.Millisecond, time.Hour
	id := b.accept(nil)
	a := b.assign(id, "e1")
	hostile := natstest.ConnectAgent(t, b.server, worker)
	put := func(subject string) {
		t.Helper()
		if _, err := hostile.Publish(b.ctx(), subject, nil, []byte("x")); err != nil {
			t.Logf("%q: %v", subject, err)
		}
	}
	left := func(want uint64) func() bool {
		return func() bool {
			s, err := b.core.StreamState(b.ctx(), schemas.StreamArtifacts)
			return err == nil && s.Messages == want
		}
	}
	put(schemas.ArtifactSubject(worker, id, a.Attempt, 0))
	odd := []string{"*", ">", "a\x7fb", "\x7f", "\x01", "\xff\xfe", "\xc3\x28", "t-1", "$", strings.Repeat("x", 2000), string(id) + "\x7f", strings.ToUpper(string(id)), "٣"}
	publish := func() {
		for _, o := range odd {
			for _, rest := range []string{o + ".1.0", string(id) + "." + o + ".0", string(id) + ".1." + o} {
				put("dayfly.artifacts.w1." + rest)
				put("dayfly.artifacts.w1." + rest)
			}
		}
		for _, other := range []string{"t-01arz3ndektsv4rrffq69g5fav.1.0", string(id) + ".01.0", string(id) + ".1.00", string(id) + ".1.+0", string(id) + ".1.-0",
			string(id) + ".1.9223372036854775807", string(id) + ".1.9223372036854775808", string(id) + ".2147483648.0"} {
			put("dayfly.artifacts.w1." + other)
		}
	}
	publish()
	b.start()
	// The chunk with the highest number is of an attempt that holds its artifacts: it is kept.
	b.until("only what is a chunk of its own attempt stays", left(2))
	for range 3 { // what the server's counts have become
		publish()
		b.until("only what is a chunk of its own attempt stays, again", left(2))
	}
}

// What a worker stores for a task is bounded by the task, and a store that fills is looked
// at long before the next pass.
func TestAFloodOfArtifactsIsTakenAway(t *testing.T) {
	b := newBench(t)
	b.cfg.Collect, b.cfg.Fence = 6*time.Second, time.Hour
	id := b.accept(func(s *schemas.Spec) { s.Resources.Disk = 4 << 10 })
	a := b.assign(id, "e1")
	stream, err := b.core.JS.Stream(b.ctx(), schemas.StreamArtifacts)
	if err != nil {
		t.Fatal(err)
	}
	cfg := stream.CachedInfo().Config
	cfg.MaxMsgs = 300
	if _, err := b.core.JS.UpdateStream(b.ctx(), cfg); err != nil {
		t.Fatal(err)
	}
	b.start()
	hostile := natstest.ConnectAgent(t, b.server, worker)
	refused := 0
	for n := range int64(1200) {
		subject := schemas.ArtifactSubject(worker, id, a.Attempt, n) // more than its task can have
		if n%2 == 0 {
			subject = schemas.ArtifactSubject(worker, schemas.TaskID(fmt.Sprintf("t-01arz3ndektsv4rrffq69g%04d", n)), 1, 0) // of no task
		}
		for {
			_, err := hostile.Publish(b.ctx(), subject, nil, []byte("x"))
			if err == nil {
				break
			}
			if !errors.Is(err, bus.ErrFull) {
				t.Fatal(err)
			}
			refused++
			select {
			case <-b.ctx().Done():
				t.Fatalf("full after %d", n)
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	t.Logf("%d were refused", refused)
	b.until("there is room again", func() bool {
		s, err := b.core.StreamState(b.ctx(), schemas.StreamArtifacts)
		return err == nil && s.Filled() < 0.5
	})
}

func (b *bench) until(what string, fact func() bool) {
	b.t.Helper()
	ctx := b.ctx()
	for !fact() {
		select {
		case <-ctx.Done():
			b.t.Fatal(what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
