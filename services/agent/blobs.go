package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/blobs"
)

// blobStore is where this worker's blobs come from, over a connection that beats and
// reports do not share.
type blobStore struct{ bulk *bus.Aside }

// Fetch implements blobs.Source.
func (s *blobStore) Fetch(ctx context.Context, b schemas.BlobUse, first int64, fn func([]byte) error) error {
	conn, err := s.bulk.Conn(ctx)
	if err != nil {
		return err
	}
	show := schemas.BlobCipher(b.Blob, b.Upload, first)
	err = conn.ReadChunks(ctx, schemas.StreamBlobs, schemas.BlobSubject(b.Upload), first, schemas.BlobChunks(b.Size), func(data []byte) error {
		show.XORKeyStream(data, data)
		return fn(data)
	})
	if errors.Is(err, bus.ErrNotFound) {
		err = fmt.Errorf("%w: %w", blobs.ErrMissing, err)
	}
	return err
}

// openBlobs opens the cache, if this worker has one. Call close at the end.
func (a *Agent) openBlobs() (closeAll func(), err error) {
	if a.cfg.BlobCache <= 0 {
		return func() {}, nil
	}
	store := &blobStore{a.bulk}
	a.blobs, err = blobs.Open(filepath.Join(a.cfg.StateDir, "blobs"), a.cfg.BlobCache, store, a.log, func(n int) { a.metrics.blobBytes.Add(float64(n)) })
	if err != nil {
		return nil, err
	}
	return a.blobs.Close, nil
}

// advertise puts into a beat which blobs are here. It runs under a.mu.
func (a *Agent) advertise(b *schemas.Beat) {
	if a.blobs == nil {
		return
	}
	stat := a.blobs.Stat()
	a.metrics.blobs.Set(float64(stat.Blobs))
	a.metrics.blobCache.Set(float64(stat.Bytes))
	if a.filter == nil || a.filterOf != stat.Version {
		a.filter, a.filterOf = a.blobs.Filter(), stat.Version
	}
	b.Blobs = a.filter
	b.Host.Cache = schemas.Size(a.cfg.BlobCache)
}

// fetchBlobs makes the blobs of a task present, and says where they are. They stay until
// the attempt has ended.
func (t *attempt) fetchBlobs(ctx context.Context, uses []schemas.BlobUse) (paths map[schemas.BlobID]string, err error) {
	if len(uses) == 0 {
		return nil, nil
	}
	if t.agent.blobs == nil {
		return nil, fmt.Errorf("worker %s takes no blobs", t.Worker)
	}
	paths = map[schemas.BlobID]string{}
	began, fetched := time.Now(), false
	span := t.span("blobs", began)
	for i, u := range uses {
		held, err := t.agent.blobs.Get(ctx, u, func(done int64) {
			fetched = true
			t.progress(Progress{Sentence: fmt.Sprintf("fetching blob %d of %d: %s of %s", i+1, len(uses), roundSize(done), roundSize(int64(u.Size)))})
		})
		err = because(ctx, err)
		if errors.Is(err, blobs.ErrMissing) {
			err = &StartError{Reason: schemas.ReasonBlobMissing, Message: fmt.Sprintf("blob %s is not stored any more; send it again, and ask for a new task", u.Blob)}
		}
		if err != nil {
			span.End(err)
			return nil, err
		}
		t.pins = append(t.pins, held.Release)
		paths[u.Blob] = held.Path
	}
	span.Set("dayfly.blobs", cmp.Or(map[bool]string{true: "fetched"}[fetched], "present"))
	span.End(nil)
	return paths, nil
}

// unpin lets go of the blobs.
func (t *attempt) unpin() {
	for _, release := range t.pins {
		release()
	}
	t.pins = nil
}

// roundSize is a number of bytes for people.
func roundSize(n int64) string {
	if n < 10<<20 {
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d MiB", n>>20)
}
