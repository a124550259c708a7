package gateway

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// errPageFull ends the reading of a list.
var errPageFull = errors.New("the page is full")

// listBlobs is GET /v1/blobs: in the order of the last writes of the entries, so one that is
// used meanwhile may come twice, and none is left out.
func (g *Gateway) listBlobs(w *response, r *http.Request) error {
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	limit, err := q.number("limit", listDefault, 1, listMax)
	if err != nil {
		return err
	}
	after := uint64(0)
	if q.has("cursor") {
		if after, err = strconv.ParseUint(q.get("cursor"), 10, 63); err != nil {
			return badQuery("cursor", "must be next_cursor of the page before")
		}
	}
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	used := g.usedBlobs()
	page := schemas.BlobList{Items: []schemas.BlobInfo{}}
	ctx, cancel := context.WithTimeout(r.Context(), g.cfg.OpTimeout)
	defer cancel()
	stream := bus.StreamOf(schemas.BucketBlobs)
	err = g.conn.Read(ctx, bus.ReadOptions{Stream: stream, FromSequence: after + 1, Ahead: min(limit+1, 500)}, func(m bus.Msg) error {
		id, err := schemas.ParseBlobID(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:])
		if err != nil || len(m.Data) == 0 {
			return nil // the mark of one that has gone
		}
		var b schemas.Blob
		if err := schemas.Decode(m.Data, &b); err != nil {
			return fmt.Errorf("decode blob %s: %w", id, err)
		}
		if !b.RemovedAt.IsZero() {
			return nil
		}
		if len(page.Items) == limit {
			page.NextCursor = strconv.FormatUint(after, 10)
			return errPageFull
		}
		info := b.Info(id)
		_, info.InUse = used[id.Sum()]
		page.Items = append(page.Items, info)
		after = m.Sequence
		return nil
	})
	if err != nil && !errors.Is(err, errPageFull) {
		return readError(err)
	}
	return answer(w, http.StatusOK, page)
}

// usedBlobs are those that a task which is not over names, or a batch that is not done.
func (g *Gateway) usedBlobs() map[[sha256.Size]byte]struct{} {
	used := map[[sha256.Size]byte]struct{}{}
	g.tasks.Range(func(_ string, it *item, _ uint64) bool {
		for _, sum := range schemas.ParseBlobsHeader(it.blobs) {
			used[sum] = struct{}{}
		}
		return true
	})
	g.batches.view.Range(func(_ string, b *schemas.Batch, _ uint64) bool {
		if b != nil {
			for _, id := range b.Blobs {
				used[id.Sum()] = struct{}{}
			}
		}
		return true
	})
	return used
}

// usersOf names the tasks and batches that usedBlobs counts for a blob, oldest first.
func (g *Gateway) usersOf(id schemas.BlobID) (users []string) {
	g.tasks.Range(func(key string, it *item, _ uint64) bool {
		if strings.Contains(it.blobs, id.Hex()) {
			users = append(users, key)
		}
		return true
	})
	g.batches.view.Range(func(key string, b *schemas.Batch, _ uint64) bool {
		if b != nil && slices.Contains(b.Blobs, id) {
			users = append(users, key)
		}
		return true
	})
	slices.Sort(users)
	return users
}

// usersShown is how many of those that name a blob are named to who wants to remove it.
const usersShown = 10

// removeBlob is DELETE /v1/blobs/{sha256}. It marks the entry and leaves the rest to the
// collector, which waits until no record that counts on an older revision can be on its way:
// a task that was accepted meanwhile, here or by another gateway, has its blob.
func (g *Gateway) removeBlob(w *response, r *http.Request) error {
	id, err := blobID(r)
	if err != nil {
		return err
	}
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	if users := g.usersOf(id); len(users) > 0 {
		more := ""
		if n := len(users) - usersShown; n > 0 {
			users, more = users[:usersShown], fmt.Sprintf(" and %d more", n)
		}
		return &schemas.Error{Status: http.StatusConflict, Code: schemas.CodeInUse,
			Detail: "it is needed by " + strings.Join(users, ", ") + more + "; cancel them, or wait for their end"}
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	op := rand.Text()
	e, err := g.blobs.table.Update(ctx, id.Hex(), op, func(e bus.Entry[schemas.Blob]) (schemas.Blob, []bus.WriteOption, error) {
		next := e.Value
		if next.RemovedAt.IsZero() { // else a repetition, which is as once
			next.RemovedAt = time.Now().UTC()
		}
		next.Op = op
		return next, nil, nil
	})
	switch {
	case errors.Is(err, bus.ErrNotFound):
		return noBlob()
	case errors.Is(err, bus.ErrUnknownOutcome):
		return &schemas.Error{Status: http.StatusServiceUnavailable, Code: schemas.CodeUnknownOutcome, Detail: "it may have been removed; send it again", RetryAfter: schemas.Duration(time.Second)}
	case err != nil:
		return busError(err, "")
	}
	g.blobs.forget(id)
	g.log.Info().Str("blob", id.Hex()).Int64("bytes", int64(e.Value.Size)).Msg("blob removed")
	return answer(w, http.StatusOK, e.Value.Info(id))
}

func (b *blobs) forget(id schemas.BlobID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.touched, id)
}
