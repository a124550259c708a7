package gateway

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

const (
	partBytes    = 128 << 10 // of items in one message
	uploadsMost  = 8         // bodies of batches that are read at a time
	uploadMost   = time.Minute
	itemsDefault = 100
	itemsMost    = 1000
	readsAtOnce  = 16 // of batches that a list shows
)

// createBatch is POST /v1/batches. Its items are stored as they come, since there may
// be more of them than should be in memory, and checked when all are there: the
// template may come last. The batch exists once its record is stored.
func (g *Gateway) createBatch(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	key, err := idempotencyKey(r.Header)
	if err != nil {
		return err
	}
	if err := checkContentType(r.Header); err != nil {
		return err
	}
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	tooMany := &schemas.Error{Status: http.StatusTooManyRequests, Code: schemas.CodeTooManyRequests, RetryAfter: schemas.Duration(5 * time.Second)}
	if g.batches.unfinished() >= g.cfg.MaxBatches {
		tooMany.Detail = fmt.Sprintf("%d batches are not done yet; wait for one of them", g.cfg.MaxBatches)
		return tooMany
	}
	select {
	case g.batches.uploads <- struct{}{}:
		defer func() { <-g.batches.uploads }()
	default:
		tooMany.Detail = "too many batches are being sent at the same time"
		return tooMany
	}

	up := upload{g: g, id: strings.ToLower(rand.Text())}
	// The client's leaving ends the reading and the check, and nothing after that.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), 2*uploadMost)
	defer cancel()
	req, err := up.read(ctx, w, r)
	if err == nil {
		checking, stop := context.WithTimeout(r.Context(), uploadMost)
		err = up.check(checking, req)
		stop()
	}
	var e bus.Entry[schemas.Batch]
	if err == nil {
		e, err = g.createBatchOnce(ctx, key, req, &up)
	}
	if !up.used {
		g.batches.dropItems(ctx, up.id, len(up.parts))
		if err == nil {
			g.metrics.replays.Inc()
			w.Header().Set("Idempotency-Replayed", "true")
		}
	}
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/v1/batches/"+e.Key)
	return answer(w, http.StatusCreated, g.batchView(ctx, e))
}

// createBatchOnce accepts a batch, or gives the one that the key made before.
func (g *Gateway) createBatchOnce(ctx context.Context, key clientKey, req schemas.BatchRequest, up *upload) (e bus.Entry[schemas.Batch], err error) {
	id, err := schemas.NewBatchID(time.Now(), rand.Reader)
	if err != nil {
		return e, err
	}
	if key.given != "" {
		key.stored = "batch-" + key.stored
		made, err := g.keys.Create(ctx, key.stored, schemas.IdempotencyEntry{Fingerprint: g.fingerprint(key, req.Fingerprint), Batch: id, At: time.Now().UTC()}, "")
		if errors.Is(err, bus.ErrConflict) {
			made, err = g.keys.Get(ctx, key.stored)
			if err == nil && !g.sameRequest(made.Value, key, req.Fingerprint) {
				return e, &schemas.Error{Status: http.StatusUnprocessableEntity, Code: schemas.CodeKeyReused, Field: "Idempotency-Key",
					Detail: "this key came before with another batch; use a new key for a new batch"}
			}
			if err == nil {
				e, err = g.batches.table.Get(ctx, string(made.Value.Batch))
				if err == nil || !errors.Is(err, bus.ErrNotFound) {
					return e, readError(err)
				}
				if err = nil; keyAge(made) >= g.cfg.KeyGrace {
					return e, &schemas.Error{Status: http.StatusGone, Code: schemas.CodeKeyExpired, Field: "Idempotency-Key",
						Detail: "the batch of this key was never made, or is gone; use a new key"}
				}
			}
		}
		if err != nil {
			if errors.Is(err, bus.ErrUnknownOutcome) || errors.Is(err, bus.ErrNotFound) {
				err = bus.ErrUnavailable // no record was made
			}
			return e, busError(err, "")
		}
		id = made.Value.Batch
	}
	m := meta("gateway")
	b := schemas.NewBatch(id, req, up.id, up.parts, m)
	b.Blobs = up.blobs
	e, err = g.batches.table.Create(ctx, string(id), b, m.Op)
	switch {
	case err == nil:
		up.used = true
		g.batches.observe(e)
		g.metrics.batches.Inc()
		g.log.Info().Str("batch", string(id)).Int("items", req.Items).Msg("batch accepted")
	case errors.Is(err, bus.ErrConflict) && key.given != "": // somebody with the same key was quicker
		e, err = g.batches.table.Get(ctx, string(id))
		return e, readError(err)
	case errors.Is(err, bus.ErrUnknownOutcome):
		up.used = true // perhaps; if not, its items go with their age
	}
	return e, busError(err, "")
}

// upload is the items of one request, stored under an id of their own.
type upload struct {
	g     *Gateway
	id    string
	parts []int // index of the first item of each
	part  schemas.BatchPart
	size  int
	used  bool             // a batch has them
	blobs []schemas.BlobID // that the items name
}

// read stores the items of a body.
func (u *upload) read(ctx context.Context, w *response, r *http.Request) (schemas.BatchRequest, error) {
	tooLarge := &schemas.Error{Status: http.StatusRequestEntityTooLarge, Code: schemas.CodeTooLarge,
		Detail: fmt.Sprintf("the body must be at most %s", schemas.Size(schemas.MaxBatchBytes))}
	if r.ContentLength > schemas.MaxBatchBytes {
		return schemas.BatchRequest{}, tooLarge
	}
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(uploadMost))
	req, err := schemas.ReadBatch(http.MaxBytesReader(w, r.Body, schemas.MaxBatchBytes), func(index int, raw []byte) error {
		if len(u.part) > 0 && u.size+len(raw) > partBytes {
			if err := u.flush(ctx); err != nil {
				return err
			}
		}
		if len(u.part) == 0 {
			u.parts = append(u.parts, index)
		}
		u.part, u.size = append(u.part, raw), u.size+len(raw)
		return nil
	})
	_ = control.SetReadDeadline(time.Time{})
	var known *schemas.Error
	switch {
	case errors.Is(err, errStore):
		return req, readError(err)
	case errors.As(err, &known):
		return req, known
	case err != nil:
		return req, bodyError(err, tooLarge)
	}
	if err = u.flush(ctx); err == nil {
		_, err = u.g.batches.items.Create(ctx, templateKey(u.id), req.Template, "")
	}
	return req, readError(err)
}

// errStore tells errors of the store from those of the body.
var errStore = errors.New("store items")

func (u *upload) flush(ctx context.Context) error {
	b, err := schemas.Encode(u.part)
	if err == nil {
		_, err = u.g.batches.items.Create(ctx, partKey(u.id, len(u.parts)-1), b, "")
	}
	if errors.Is(err, bus.ErrUnknownOutcome) {
		err = bus.ErrUnavailable // there is no batch yet
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errStore, err)
	}
	u.part, u.size = u.part[:0], 0
	return nil
}

// check looks at every item, and names those that are wrong.
func (u *upload) check(ctx context.Context, req schemas.BatchRequest) error {
	var faults []schemas.FieldError
	var last schemas.Spec
	for n, first := range u.parts {
		part, err := u.g.batches.part(ctx, u.id, n)
		if err != nil {
			return readError(err)
		}
		for i, raw := range part {
			if err := ctx.Err(); err != nil {
				return readError(err)
			}
			spec, err := req.ParseItem(raw, u.g.cfg.Policy)
			if err == nil {
				misfit := u.g.ports.off(spec)
				if misfit == nil && !fitsLike(spec, last) {
					misfit = u.g.fleet.misfit(spec)
				}
				if misfit != nil {
					err = misfit
				}
			}
			if err == nil {
				last = spec
				err = u.checkBlobs(ctx, spec)
			}
			if err == nil {
				continue
			}
			var e *schemas.Error
			if !errors.As(err, &e) {
				return err
			}
			at := "items." + strconv.Itoa(first+i)
			if e.Field == "template" || strings.HasPrefix(e.Field, "template.") {
				return e
			}
			faults = append(faults, schemas.FieldError{Field: strings.TrimSuffix(at+"."+e.Field, "."), Code: e.Code, Message: e.Detail})
			if len(faults) == schemas.MaxFaults {
				return schemas.InvalidSpec(faults)
			}
		}
	}
	if len(faults) > 0 {
		return schemas.InvalidSpec(faults)
	}
	return nil
}

// fitsLike says that what fleet.misfit says of two specs is the same: it looks at all workers.
func fitsLike(a, b schemas.Spec) bool {
	return a.Resources.CPUs == b.Resources.CPUs && a.Resources.Memory == b.Resources.Memory && a.Resources.GPUs == b.Resources.GPUs &&
		maps.Equal(a.Constraints, b.Constraints)
}

// checkBlobs notes which blobs an item names. They are not collected from here on: the
// batch's record follows soon, and names them.
func (u *upload) checkBlobs(ctx context.Context, spec schemas.Spec) error {
	names, fields := spec.Blobs()
	sizes := map[schemas.BlobID]schemas.Size{}
	for i, id := range names {
		blob, err := u.g.blobs.touch(ctx, id)
		sizes[id] = blob.Size
		switch {
		case errors.Is(err, bus.ErrNotFound):
			return missingBlob(fields[i])
		case err != nil:
			return readError(err)
		case slices.Contains(u.blobs, id):
			continue
		case len(u.blobs) == schemas.MaxBatchBlobs:
			return &schemas.Error{Status: http.StatusUnprocessableEntity, Code: schemas.CodeInvalidValue, Field: fields[i],
				Detail: fmt.Sprintf("all items of a batch may name %d blobs together; put files that belong together into one", schemas.MaxBatchBlobs)}
		}
		u.blobs = append(u.blobs, id)
	}
	if faults := spec.CheckExpected(sizes); len(faults) > 0 {
		return schemas.InvalidSpec(faults)
	}
	return nil
}

func partKey(upload string, n int) string { return upload + "." + strconv.Itoa(n) }
func templateKey(upload string) string    { return upload + ".template" }

// batchID takes the id from the path.
func batchID(r *http.Request) (schemas.BatchID, error) {
	id, err := schemas.ParseBatchID(r.PathValue("id"))
	if err != nil {
		return "", noBatch()
	}
	return id, nil
}

func noBatch() *schemas.Error {
	return &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Detail: "there is no such batch; it may be over for longer than records are kept"}
}

func (g *Gateway) fetchBatch(ctx context.Context, r *http.Request) (e bus.Entry[schemas.Batch], err error) {
	id, err := batchID(r)
	if err != nil {
		return e, err
	}
	if err := g.upToDate(ctx); err != nil {
		return e, err
	}
	e, err = g.batches.table.Get(ctx, string(id))
	if errors.Is(err, bus.ErrNotFound) {
		return e, noBatch()
	}
	return e, readError(err)
}

// live is the state of an item's task, as far as this gateway has heard.
func (g *Gateway) live(id schemas.BatchID) func(int) schemas.State {
	return func(index int) schemas.State {
		if it, _, ok := g.tasks.Get(string(id.Task(index))); ok {
			return it.state
		}
		return schemas.ItemPending
	}
}

func (g *Gateway) batchView(ctx context.Context, e bus.Entry[schemas.Batch]) schemas.BatchStatus {
	v := e.Value.View(e.Revision, g.live(e.Value.ID))
	if e.Value.Done() && v.Callback != nil {
		if status := g.delivery(ctx, e.Key); status != nil {
			status.URL = v.Callback.URL
			v.Callback = status
		}
	}
	return v
}

// listBatches is GET /v1/batches: newest first. The view knows which there are, and those
// that are not done; the others are read.
func (g *Gateway) listBatches(w *response, r *http.Request) error {
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	limit, err := q.number("limit", listDefault, 1, listMax)
	if err != nil {
		return err
	}
	after := ""
	if q.has("cursor") {
		id, err := schemas.ParseBatchID(q.get("cursor"))
		if err != nil {
			return badQuery("cursor", "must be next_cursor of the page before")
		}
		after = string(id)
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	if err := g.upToDate(ctx); err != nil {
		return err
	}
	ids := g.batches.all.before(after, limit+1)
	page := schemas.BatchList{Items: []schemas.BatchStatus{}}
	if len(ids) > limit {
		ids = ids[:limit]
		page.NextCursor = ids[limit-1]
	}
	shown := make([]schemas.BatchStatus, len(ids))
	var reads errgroup.Group
	reads.SetLimit(readsAtOnce)
	for i, id := range ids {
		reads.Go(func() error {
			v, revision, ok := g.batches.view.Get(id)
			if !ok {
				return nil
			}
			if v == nil {
				e, err := g.batches.table.Get(ctx, id)
				if errors.Is(err, bus.ErrNotFound) {
					return nil
				}
				if err != nil {
					return readError(err)
				}
				v, revision = &e.Value, e.Revision
			}
			shown[i] = v.View(revision, g.live(v.ID))
			shown[i].Callback = nil
			return nil
		})
	}
	if err := reads.Wait(); err != nil {
		return err
	}
	for _, b := range shown {
		if b.ID != "" { // else it went meanwhile
			page.Items = append(page.Items, b)
		}
	}
	return answer(w, http.StatusOK, page)
}

// getBatch is GET /v1/batches/{id}.
func (g *Gateway) getBatch(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	e, err := g.fetchBatch(ctx, r)
	if err != nil {
		return err
	}
	return answer(w, http.StatusOK, g.batchView(ctx, e))
}

// listItems is GET /v1/batches/{id}/items: by index.
func (g *Gateway) listItems(w *response, r *http.Request) error {
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	limit, err := q.number("limit", itemsDefault, 1, itemsMost)
	if err != nil {
		return err
	}
	first, err := q.number("cursor", 0, 0, schemas.MaxBatchItems)
	if err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	e, err := g.fetchBatch(ctx, r)
	if err != nil {
		return err
	}
	b := e.Value
	page := schemas.BatchItemList{Items: []schemas.BatchItem{}}
	end := min(b.Items, first+limit)
	for i := first; i < end; i++ {
		item := schemas.BatchItem{Index: i, Task: b.ID.Task(i), State: b.Item(i, g.live(b.ID))}
		rec, known, err := g.listed(string(item.Task), filter{}, time.Now())
		if err != nil {
			return err
		}
		if known {
			item.Name, item.State, item.Reason, item.Exit = rec.Spec.Labels[schemas.ItemLabel], rec.State, rec.Reason, rec.Exit
		}
		page.Items = append(page.Items, item)
	}
	if end < b.Items {
		page.NextCursor = strconv.Itoa(end)
	}
	return answer(w, http.StatusOK, page)
}

// cancelBatch is DELETE /v1/batches/{id}. The gateway that works on the batch cancels
// its tasks.
func (g *Gateway) cancelBatch(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	id, err := batchID(r)
	if err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	if err := g.upToDate(ctx); err != nil {
		return err
	}
	e, err := g.batches.cancel(ctx, id, "client")
	if errors.Is(err, bus.ErrNotFound) {
		return noBatch()
	}
	if err != nil {
		return busError(err, "")
	}
	return answer(w, http.StatusOK, g.batchView(ctx, e))
}
