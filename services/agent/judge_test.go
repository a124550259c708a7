package agent_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// judge orders that a submission be judged, which is the command.
func (b *bench) judge(a schemas.Assignment, tests []schemas.JudgeTest, uses []schemas.BlobUse, command ...string) {
	b.t.Helper()
	spec := schemas.DefaultSpec()
	spec.Image, spec.OnLost = "fake", schemas.OnLostRequeue
	spec.Judge = &schemas.Judge{Tests: tests, Compare: schemas.CompareExact,
		Run: schemas.JudgeStage{Command: command, CPU: schemas.Duration(time.Hour), Wall: schemas.Duration(time.Hour), Memory: 64 << 20, Output: 1 << 30}}
	b.order(schemas.Order{Assignment: a, Want: schemas.WantRun, Spec: &spec, TimeLeft: spec.TTL, Blobs: uses})
}

// A test may be larger than a record: its blobs go to the program, and to the comparison.
func TestTestsAreBlobs(t *testing.T) {
	b := newBench(t)
	b.cfg.BlobCache = 16 * schemas.BlobChunk
	one, two := b.store(1, 5*schemas.BlobChunk), b.store(2, 5*schemas.BlobChunk)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.judge(a, []schemas.JudgeTest{{StdinBlob: one.Blob, ExpectedBlob: one.Blob}, {StdinBlob: one.Blob, ExpectedBlob: two.Blob},
		{Stdin: "x", Expected: "x"}, {Stdin: "x", ExpectedBlob: one.Blob}, {StdinBlob: two.Blob, Expected: "x"}, {StdinBlob: two.Blob, ExpectedBlob: two.Blob}},
		[]schemas.BlobUse{one, two}, "cat")
	r := b.end(a)
	if r.Judge == nil {
		t.Fatalf("%+v", r.End)
	}
	var got []string
	for _, c := range r.Judge.Cases {
		got = append(got, string(c.Verdict))
	}
	if want := "accepted wrong_answer accepted wrong_answer wrong_answer accepted"; strings.Join(got, " ") != want {
		t.Errorf("%q, want %s", got, want)
	}
	if r.End.ArtifactSum != nil || r.End.Artifacts != nil {
		t.Errorf("it has artifacts: %+v", r.End.ArtifactSum)
	}
}

// The blobs of a judge stay for the next agent, and go with the attempt.
func TestTheBlobsOfAJudgeStay(t *testing.T) {
	b := newBench(t)
	b.cfg.BlobCache = 3 * schemas.BlobChunk
	one, two := b.store(1, 2*schemas.BlobChunk), b.store(2, 2*schemas.BlobChunk)
	b.start()
	epoch := b.registered("").Epoch
	a := assignment(epoch, 1)
	b.judge(a, []schemas.JudgeTest{{StdinBlob: one.Blob}}, []schemas.BlobUse{one}, "sleep", "1h", "0")
	b.report(a, func(r schemas.Report) bool { return r.Phase == schemas.PhaseRunning })
	if err := b.halt(); err != nil {
		t.Fatal(err)
	}
	b.start()
	other := assignment(epoch, 1)
	b.name(other, []schemas.BlobUse{two}, "exit", "0")
	if r := b.end(other); r.End.By != schemas.EndedGaveBack || !strings.Contains(r.End.Message, "in use") {
		t.Errorf("%+v", r.End)
	}
	b.order(schemas.Order{Assignment: a, Want: schemas.WantStop})
	if r := b.end(a); r.End.By != schemas.EndedStop || r.Judge != nil && r.Judge.Verdict != "" {
		t.Errorf("%+v %+v", r.End, r.Judge)
	}
	b.order(schemas.Order{Assignment: a, Want: schemas.WantClose})
	b.until("its folder is gone", func() bool {
		left, err := os.ReadDir(filepath.Join(b.cfg.StateDir, "judges"))
		return err == nil && len(left) == 0
	})
	third := assignment(epoch, 1)
	b.name(third, []schemas.BlobUse{two}, "exit", "0")
	if r := b.end(third); r.End.By != schemas.EndedItself {
		t.Errorf("%+v", r.End)
	}
}
