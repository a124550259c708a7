package reaper_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
	"dayfly.dev/services/reaper"
)

// blobBench is a bench with blobs that are collected soon.
type blobBench struct {
	*bench
	blobs *bus.Table[schemas.Blob]
}

func newBlobBench(t *testing.T, cfg reaper.Blobs) blobBench {
	b := newBench(t)
	cfg.Every = 20 * time.Millisecond
	b.cfg.Blobs = cfg
	return blobBench{b, bus.NewTable(b.core, schemas.BucketBlobs, bus.JSON(func(b schemas.Blob, op string) bool { return b.Op == op }))}
}

// store puts a blob there as a gateway does, used so long ago.
func (b blobBench) store(text string, ago time.Duration) schemas.BlobUse {
	b.t.Helper()
	u := schemas.BlobUse{Blob: schemas.BlobIDOf(sha256.Sum256([]byte(text))), Size: schemas.Size(len(text)), Upload: "u" + text[:1]}
	if _, err := b.core.WriteChunks(b.t.Context(), schemas.BlobSubject(u.Upload), 1000, bus.ChunkStall, bytes.NewReader([]byte(text))); err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.blobs.Create(b.t.Context(), u.Blob.Hex(), schemas.Blob{Size: u.Size, Upload: u.Upload, UsedAt: time.Now().Add(-ago), Op: "1"}, "1"); err != nil {
		b.t.Fatal(err)
	}
	return u
}

func (b blobBench) there(u schemas.BlobUse) bool {
	b.t.Helper()
	_, err := b.blobs.Get(b.t.Context(), u.Blob.Hex())
	if err != nil && !errors.Is(err, bus.ErrNotFound) {
		b.t.Fatal(err)
	}
	return err == nil
}

func (b blobBench) messages() int {
	b.t.Helper()
	all, err := b.core.Subjects(b.t.Context(), schemas.StreamBlobs, schemas.BlobSubject(">"))
	if err != nil {
		b.t.Fatal(err)
	}
	return len(all)
}

func (b blobBench) eventually(what string, ok func() bool) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 15*time.Second)
	defer cancel()
	for !ok() {
		select {
		case <-ctx.Done():
			b.t.Fatal("never: ", what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// record makes a queued task that names a blob, as a gateway does.
func (b blobBench) record(u schemas.BlobUse) bus.Entry[schemas.Record] {
	b.t.Helper()
	spec := schemas.DefaultSpec()
	spec.Image, spec.StdinBlob = "a", u.Blob
	id, err := schemas.NewTaskID(time.Now(), rand.Reader)
	if err != nil {
		b.t.Fatal(err)
	}
	r := schemas.NewRecord(id, spec, schemas.DefaultPolicy(), schemas.Meta{At: time.Now(), By: "gateway", Op: string(id)})
	r.Blobs = []schemas.BlobUse{u}
	e, err := b.table.Create(b.t.Context(), string(id), r, string(id))
	if err != nil {
		b.t.Fatal(err)
	}
	return e
}

// Those go that nobody has named for long, and no others; and what was left of uploads.
func TestBlobsThatNobodyNamesGo(t *testing.T) {
	b := newBlobBench(t, reaper.Blobs{Age: time.Hour, Grace: 300 * time.Millisecond})
	old, named, batch, young := b.store("old", 2*time.Hour), b.store("named", 2*time.Hour), b.store("batch", 2*time.Hour), b.store("young", time.Minute)
	e := b.record(named)
	batchID, err := schemas.NewBatchID(time.Now(), bytes.NewReader(make([]byte, 100)))
	if err != nil {
		t.Fatal(err)
	}
	items := schemas.NewBatch(batchID, schemas.BatchRequest{Items: 1}, "x", []int{0}, schemas.Meta{At: time.Now(), Op: "1"})
	items.Blobs = []schemas.BlobID{batch.Blob}
	if _, err := bus.NewTable(b.core, schemas.BucketBatches, bus.JSON(schemas.Batch.Wrote)).Create(t.Context(), string(batchID), items, "1"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.core.WriteChunks(t.Context(), schemas.BlobSubject("broken"), 1, bus.ChunkStall, bytes.NewReader(make([]byte, 20))); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.eventually("the old one is gone, and the rest of the upload", func() bool { return !b.there(old) && b.messages() == 3 })
	if err := b.core.Read(t.Context(), bus.ReadOptions{Stream: bus.StreamOf(schemas.BucketBlobs)}, func(m bus.Msg) error {
		if m.Header.Get("KV-Operation") != "" && m.Header.Get("Nats-TTL") == "" {
			t.Errorf("the mark of %s stays for ever", m.Subject)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if !b.there(named) || !b.there(batch) || !b.there(young) {
		t.Error("one went that is named, or young")
	}
	// The use of what is named is noted, so that its age counts from its end.
	b.eventually("its use is noted", func() bool {
		e, err := b.blobs.Get(t.Context(), named.Blob.Hex())
		return err == nil && time.Since(e.Value.UsedAt) < time.Minute
	})
	m := schemas.Meta{At: time.Now(), By: "gateway", Op: "2", On: e.Revision}
	if _, err := b.table.Update(t.Context(), e.Key, "2", func(e bus.Entry[schemas.Record]) (schemas.Record, []bus.WriteOption, error) {
		next, err := schemas.Next(e.Value, schemas.AskCancel{Meta: m})
		return next, nil, err
	}); err != nil {
		t.Fatal(err)
	}
	if !b.there(named) {
		t.Error("it went with its task")
	}
}

// Above nine tenths of the room those go that nobody has named for longest, down to eight.
func TestBlobsMakeRoom(t *testing.T) {
	b := newBlobBench(t, reaper.Blobs{Bytes: 1000, Age: time.Hour, Grace: 200 * time.Millisecond})
	var all []schemas.BlobUse
	for i := range 10 {
		all = append(all, b.store(fmt.Sprintf("%d%099d", i, i), time.Duration(20-i)*time.Minute))
	}
	b.record(all[0])
	b.start()
	b.eventually("there is room", func() bool { return b.messages() == 8 })
	for i, u := range all {
		if b.there(u) != (i != 1 && i != 2) {
			t.Errorf("blob %d: there %v", i, b.there(u))
		}
	}
}

// A gateway that is about to name a blob, and the collector that is about to take it: one
// of the two hears of the other, whoever comes first.
func TestNamingAndCollectingABlobAtOnce(t *testing.T) {
	b := newBlobBench(t, reaper.Blobs{Age: time.Minute, Grace: 30 * time.Millisecond})
	b.start()
	kept, gone := 0, 0
	for i := range 40 {
		u := b.store(fmt.Sprintf("%c%d", 'A'+i, i), time.Hour)
		select { // anywhere in the collector's pass
		case <-time.After(time.Duration(20+3*i) * time.Millisecond):
		case <-t.Context().Done():
		}
		op := fmt.Sprint("touch", i)
		_, err := b.blobs.Update(t.Context(), u.Blob.Hex(), op, func(e bus.Entry[schemas.Blob]) (schemas.Blob, []bus.WriteOption, error) {
			next := e.Value
			next.Op, next.UsedAt = op, time.Now()
			return next, nil, nil
		})
		if errors.Is(err, bus.ErrNotFound) {
			gone++
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		b.record(u)
		kept++
		if !b.there(u) {
			t.Fatalf("blob %d went though it is named", i)
		}
	}
	t.Logf("%d kept, %d gone", kept, gone)
	left := 0
	for i := range 40 {
		u := schemas.BlobIDOf(sha256.Sum256([]byte(fmt.Sprintf("%c%d", 'A'+i, i))))
		if b.there(schemas.BlobUse{Blob: u}) {
			left++
		}
	}
	if left != kept {
		t.Errorf("%d are left of %d that are named", left, kept)
	}
}

// What a client has removed goes once nobody can be about to name it; what is named all the
// same goes after its task.
func TestRemovedBlobsGo(t *testing.T) {
	b := newBlobBench(t, reaper.Blobs{Age: time.Hour, Grace: 100 * time.Millisecond})
	removed, named, young := b.store("removed", 0), b.store("named", 0), b.store("young", 0)
	for _, u := range []schemas.BlobUse{removed, named} {
		if _, err := b.blobs.Update(t.Context(), u.Blob.Hex(), "2", func(e bus.Entry[schemas.Blob]) (schemas.Blob, []bus.WriteOption, error) {
			e.Value.Op, e.Value.RemovedAt = "2", time.Now()
			return e.Value, nil, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	e := b.record(named)
	b.start()
	b.eventually("it is gone", func() bool { return !b.there(removed) && b.messages() == 2 })
	if !b.there(named) || !b.there(young) {
		t.Fatal("one went that is named, or was not removed")
	}
	m := schemas.Meta{At: time.Now(), By: "gateway", Op: "3", On: e.Revision}
	if _, err := b.table.Update(t.Context(), e.Key, "3", func(e bus.Entry[schemas.Record]) (schemas.Record, []bus.WriteOption, error) {
		next, err := schemas.Next(e.Value, schemas.AskCancel{Meta: m})
		return next, nil, err
	}); err != nil {
		t.Fatal(err)
	}
	b.eventually("it goes after its task", func() bool { return !b.there(named) && b.messages() == 1 })
}
