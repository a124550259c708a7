package agent_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

// run gives the bytes that are stored of an attempt, chunk by chunk.
func (b *bench) stored(a schemas.Assignment, s schemas.ArtifactSum) []byte {
	b.t.Helper()
	var all []byte
	for n := int64(0); int64(len(all)) < s.Stored+s.ListBytes; n++ {
		chunk, err := b.core.Stored(b.context(), schemas.StreamArtifacts, schemas.ArtifactSubject(a.Worker, a.Task, a.Attempt, n))
		if err != nil {
			b.t.Fatal(err)
		}
		all = append(all, chunk...)
	}
	return all
}

// What an attempt has left is stored, all of it, when its end is reported.
func TestArtifactsAreStoredBeforeTheEndIsReported(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "leave", "40", "70000")
	end := b.end(a).End
	s := end.ArtifactSum
	if s == nil || s.Count != 40 || s.Bytes != 40*70000 || s.Truncated || len(end.Artifacts) != schemas.MaxInlineArtifacts {
		t.Fatalf("%+v, %d in the report", s, len(end.Artifacts))
	}
	all := b.stored(a, *s)
	if sum := sha256.Sum256(all[s.Stored:]); int64(len(all)) != s.Stored+s.ListBytes || hex.EncodeToString(sum[:]) != s.ListSHA256 {
		t.Errorf("%d bytes are stored", len(all))
	}
	lines := slices.Collect(bytes.Lines(all[s.Stored:]))
	var last schemas.ArtifactLine
	if err := schemas.Decode(lines[len(lines)-1], &last); err != nil || len(lines) != 40 || last.Name != "file-00039" {
		t.Errorf("%d lines, the last %s: %v", len(lines), lines[len(lines)-1], err)
	}
	if got := all[last.Offset:][:last.Size]; string(got) != strings.Repeat("n", 70000) {
		t.Errorf("the last has %.20q…", got)
	}
}

func TestNothingIsStoredOfAnEmptyFolder(t *testing.T) {
	for limit, command := range map[int64][]string{1 << 20: {"leave", "0", "0"}, 0: {"leave", "1", "1"}} {
		b := newBench(t)
		b.cfg.ArtifactLimit = limit
		b.start()
		a := assignment(b.registered("").Epoch, 1)
		b.run(a, command...)
		if end := b.end(a).End; end.ArtifactSum != nil || end.Artifacts != nil {
			t.Errorf("%+v", end)
		}
		if got, err := b.core.Subjects(b.context(), schemas.StreamArtifacts, schemas.ArtifactFilter("*", "*", "*")); err != nil || len(got) > 0 {
			t.Errorf("%v %v", got, err)
		}
	}
}

// A server that goes away in the midst of it is waited for.
func TestArtifactsOutliveTheServer(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "leave", "20", "1000000")
	b.until("something of it is stored", func() bool {
		got, err := b.core.Subjects(b.context(), schemas.StreamArtifacts, schemas.ArtifactFilter(worker, a.Task, "1"))
		return err == nil && len(got) > 0
	})
	natstest.Restart(t, b.server)
	s := b.end(a).End.ArtifactSum
	if s == nil || s.Count != 20 || s.Truncated {
		t.Fatalf("%+v", s)
	}
	b.stored(a, *s)
}

// The time for which the server is away does not count, and what is much does not go where
// beats do.
func TestArtifactsHaveTimeWhileTheServerIsAway(t *testing.T) {
	b := newBench(t)
	b.cfg.ArtifactTime = 3 * time.Second
	b.start()
	epoch := b.registered("").Epoch
	first, second := assignment(epoch, 1), assignment(epoch, 1)
	b.run(first, "leave", "4", "1000000")
	b.end(first)
	if sent := b.conn.NC.Stats().OutBytes; sent > 1<<20 {
		t.Errorf("%d bytes went over the connection of the beats", sent)
	}
	b.run(second, "leave", "4", "1000000", "200ms")
	b.report(second, func(r schemas.Report) bool { return r.Phase == schemas.PhaseRunning })
	b.server.Shutdown()
	gone := time.Now()
	b.until("more time has gone by than artifacts have", func() bool { return time.Since(gone) > b.cfg.ArtifactTime*3/2 })
	natstest.Restart(t, b.server)
	s := b.end(second).End.ArtifactSum
	if s == nil || s.Count != 4 || s.Truncated {
		t.Fatalf("%+v", s)
	}
	b.stored(second, *s)
}

// When the time is over nothing more is begun, and what was left out is told.
func TestArtifactsThatTakeTooLong(t *testing.T) {
	b := newBench(t)
	b.cfg.ArtifactTime = 1
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "leave", "4", "1000000")
	if s := b.end(a).End.ArtifactSum; s == nil || s.Count != 0 || !s.Truncated || s.Why != schemas.ArtifactsTimeout {
		t.Errorf("%+v", s)
	}
}

// More than the task's disk can only be holes and twins.
func TestArtifactsAreNoMoreThanTheDisk(t *testing.T) {
	b := newBench(t)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.runSpec(a, func(s *schemas.Spec) { s.Resources.Disk = 100_000 }, "leave", "2", "60000")
	if s := b.end(a).End.ArtifactSum; s == nil || s.Count != 1 || !s.Truncated || s.Why != schemas.ArtifactsLimit || s.Skipped != 1 {
		t.Errorf("%+v", s)
	}
}

// A store that takes no more says so, and the task's end is reported all the same.
func TestArtifactsOfAFullStore(t *testing.T) {
	b := newBench(t)
	assets := schemas.Assets(time.Hour)
	for i := range assets {
		if assets[i].Name == schemas.StreamArtifacts {
			assets[i].MaxBytes = 1 << 20
		}
	}
	if err := bus.Provision(b.context(), b.core, assets, 1); err != nil {
		t.Fatal(err)
	}
	b.start()
	epoch := b.registered("").Epoch
	small, large := assignment(epoch, 1), assignment(epoch, 1)
	b.run(small, "leave", "1", "100")
	if s := b.end(small).End.ArtifactSum; s == nil || s.Count != 1 || s.Truncated {
		t.Fatalf("%+v", s)
	}
	b.run(large, "leave", "3", "700000")
	if s := b.end(large).End.ArtifactSum; s == nil || s.Count != 0 || !s.Truncated || s.Why != schemas.ArtifactsStoreFull {
		t.Errorf("%+v", s)
	}
	if _, err := b.core.Stored(b.context(), schemas.StreamArtifacts, schemas.ArtifactSubject(worker, small.Task, 1, 0)); err != nil {
		t.Errorf("what was stored before has gone: %v", err)
	}
}

// An agent that is told to stop in the midst of it leaves the rest to the next, which
// does all of it again.
func TestArtifactsAreTheNextAgentsToo(t *testing.T) {
	b := newBench(t)
	b.start()
	epoch := b.registered("").Epoch
	a := assignment(epoch, 1)
	b.run(a, "leave", "20", "1000000", "200ms")
	b.report(a, func(r schemas.Report) bool { return r.Phase == schemas.PhaseRunning })
	b.until("something of it is stored", func() bool {
		got, err := b.core.Subjects(b.context(), schemas.StreamArtifacts, schemas.ArtifactFilter(worker, a.Task, "1"))
		return err == nil && len(got) > 0
	})
	if err := b.halt(); err != nil {
		t.Fatal(err)
	}
	b.start()
	s := b.end(a).End.ArtifactSum
	if s == nil || s.Count != 20 || s.Bytes != 20_000_000 || s.Truncated {
		t.Fatalf("%+v", s)
	}
	b.stored(a, *s)
}
