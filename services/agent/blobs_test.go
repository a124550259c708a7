package agent_test

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// store puts a blob there as a gateway does.
func (b *bench) store(seed byte, n int) schemas.BlobUse {
	b.t.Helper()
	data := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(data)
	u := schemas.BlobUse{Blob: schemas.BlobIDOf(sha256.Sum256(data)), Size: schemas.Size(n), Upload: "u" + string('a'+rune(seed))}
	schemas.BlobCipher(u.Blob, u.Upload, 0).XORKeyStream(data, data)
	if _, err := b.core.WriteChunks(b.context(), schemas.BlobSubject(u.Upload), schemas.BlobChunk, bus.ChunkStall, bytes.NewReader(data)); err != nil {
		b.t.Fatal(err)
	}
	return u
}

// name orders a task that names blobs.
func (b *bench) name(a schemas.Assignment, uses []schemas.BlobUse, command ...string) {
	b.t.Helper()
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command, spec.OnLost = "fake", command, schemas.OnLostRequeue
	for _, u := range uses {
		spec.Files = append(spec.Files, schemas.File{Path: u.Upload, Blob: u.Blob})
	}
	b.order(schemas.Order{Assignment: a, Want: schemas.WantRun, Spec: &spec, TimeLeft: spec.TTL, Blobs: uses})
}

// A task's blobs are here when it starts, the beat says so, and what is in use stays.
func TestBlobsAreFetchedForATask(t *testing.T) {
	b := newBench(t)
	b.cfg.BlobCache = 3 * schemas.BlobChunk
	one, two := b.store(1, 2*schemas.BlobChunk), b.store(2, 2*schemas.BlobChunk)
	b.start()
	epoch := b.registered("").Epoch
	first := assignment(epoch, 1)
	b.name(first, []schemas.BlobUse{one}, "sleep", "1h")
	b.report(first, func(r schemas.Report) bool { return r.Phase == schemas.PhaseRunning })
	path := filepath.Join(b.cfg.StateDir, "blobs", one.Blob.Hex())
	if data, err := os.ReadFile(path); err != nil || schemas.BlobIDOf(sha256.Sum256(data)) != one.Blob {
		t.Fatal(err)
	}
	b.until("the beat says that it is here", func() bool {
		beat, _, _ := b.beats.Get(string(worker))
		return beat.Blobs.Has(one.Blob.Sum()) && !beat.Blobs.Has(two.Blob.Sum()) && beat.Host.Cache == 3*schemas.BlobChunk
	})
	// There is no room for another while it is in use, and there is afterwards.
	second := assignment(epoch, 1)
	b.name(second, []schemas.BlobUse{two}, "exit", "0")
	if r := b.end(second); r.End.By != schemas.EndedGaveBack || !strings.Contains(r.End.Message, "no room in the cache of blobs") || !strings.Contains(r.End.Message, "in use") {
		t.Errorf("%+v", r.End)
	}
	b.order(schemas.Order{Assignment: first, Want: schemas.WantStop})
	b.end(first)
	third := assignment(epoch, 1)
	b.name(third, []schemas.BlobUse{two}, "exit", "0")
	if r := b.end(third); r.End.By != schemas.EndedItself || r.End.Exit == nil || r.End.Exit.Code != 0 {
		t.Errorf("%+v", r.End)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the first did not make room: %v", err)
	}
}

// A task whose blob is not stored any more fails, for a reason of its own.
func TestABlobIsMissingAtTheStart(t *testing.T) {
	b := newBench(t)
	u := b.store(1, schemas.BlobChunk+1)
	if err := b.core.PurgeChunks(b.context(), schemas.StreamBlobs, schemas.BlobSubject(u.Upload)); err != nil {
		t.Fatal(err)
	}
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.name(a, []schemas.BlobUse{u}, "exit", "0")
	if r := b.end(a); r.End.By != schemas.EndedItself || r.End.Reason != schemas.ReasonBlobMissing || !strings.Contains(r.End.Message, string(u.Blob)) {
		t.Errorf("%+v", r.End)
	}
	// It may be stopped meanwhile.
	a = assignment(a.Epoch, 1)
	b.name(a, []schemas.BlobUse{u}, "exit", "0")
	b.report(a, func(r schemas.Report) bool { return r.Phase == schemas.PhaseAccepted })
	b.order(schemas.Order{Assignment: a, Want: schemas.WantStop})
	began := time.Now()
	if r := b.end(a); r.End.By != schemas.EndedStop {
		t.Errorf("%+v after %s", r.End, time.Since(began))
	}
}

// A worker that takes no blobs gives the task back.
func TestAWorkerWithoutACache(t *testing.T) {
	b := newBench(t)
	b.cfg.BlobCache = 0
	u := b.store(1, 1)
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.name(a, []schemas.BlobUse{u}, "exit", "0")
	if r := b.end(a); r.End.By != schemas.EndedGaveBack || !strings.Contains(r.End.Message, "takes no blobs") {
		t.Errorf("%+v", r.End)
	}
}
