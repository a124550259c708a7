package gateway

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

const (
	blobUploads = 16       // bodies of blobs that are read at a time
	blobLook    = 64 << 20 // bytes after which an upload looks anew whether there is room
	touchesMost = 10_000   // blobs that are known to be left alone
	purgeWithin = 10 * time.Second
	entityBlob  = "sha256-"
)

// blobs stores blobs and finds them, over a connection of its own.
//
// The collector removes a blob whose entry in the bucket has not been written for a grace
// (schemas.BlobGrace) by its own clock, and that no record it knows of names. So whoever
// is about to name a blob writes the entry first, by compare-and-set: then it is gone, and
// that is said, or it stays for a grace, in which the record comes to be known. touched
// remembers such a write for a quarter of the grace.
type blobs struct {
	g       *Gateway
	table   *bus.Table[schemas.Blob]
	ready   chan struct{} // closed once conn is there
	conn    *bus.Conn
	uploads chan struct{}
	flight  singleflight.Group

	mu      sync.Mutex
	touched map[schemas.BlobID]touch // under mu
}

type touch struct {
	blob schemas.Blob
	at   time.Time
}

func newBlobs(g *Gateway) *blobs {
	return &blobs{
		g: g, ready: make(chan struct{}), uploads: make(chan struct{}, blobUploads), touched: map[schemas.BlobID]touch{},
		table: bus.NewTable(g.conn, schemas.BucketBlobs, bus.JSON(func(b schemas.Blob, op string) bool { return b.Op == op })),
	}
}

// run makes the connection and keeps it until ctx ends.
func (b *blobs) run(ctx context.Context) error {
	conn, err := b.g.conn.Sibling(ctx, "blobs")
	if err != nil {
		return err
	}
	defer conn.Close()
	b.conn = conn
	close(b.ready)
	<-ctx.Done()
	return nil
}

func (b *blobs) connected(ctx context.Context) error {
	select {
	case <-b.ready:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", bus.ErrUnavailable, context.Cause(ctx))
	}
}

// touch says that somebody is about to name a blob: it stays for at least three quarters
// of the grace from now. bus.ErrNotFound says that there is none, or that it was removed.
func (b *blobs) touch(ctx context.Context, id schemas.BlobID) (schemas.Blob, error) {
	b.mu.Lock()
	t, ok := b.touched[id]
	b.mu.Unlock()
	if ok && time.Since(t.at) < b.g.cfg.BlobGrace/4 {
		return t.blob, nil
	}
	return b.use(ctx, id, false)
}

// revive is touch for who has the bytes at hand: one that was removed is there again.
func (b *blobs) revive(ctx context.Context, id schemas.BlobID) (schemas.Blob, error) {
	e, err := b.table.Get(ctx, id.Hex())
	if err == nil && e.Value.RemovedAt.IsZero() {
		return b.touch(ctx, id)
	}
	if err == nil {
		return b.use(ctx, id, true)
	}
	return e.Value, err
}

// use writes that a blob is used.
func (b *blobs) use(ctx context.Context, id schemas.BlobID, revive bool) (schemas.Blob, error) {
	v, err, _ := b.flight.Do(fmt.Sprint(id.Hex(), revive), func() (any, error) {
		began, op := time.Now(), rand.Text()
		e, err := b.table.Update(ctx, id.Hex(), op, func(e bus.Entry[schemas.Blob]) (schemas.Blob, []bus.WriteOption, error) {
			next := e.Value
			if !next.RemovedAt.IsZero() && !revive {
				return next, nil, bus.ErrNotFound
			}
			next.UsedAt, next.Op, next.RemovedAt = began.UTC(), op, time.Time{}
			return next, nil, nil
		})
		if err == nil {
			b.remember(id, touch{e.Value, began})
		}
		return e.Value, err
	})
	if err != nil {
		return schemas.Blob{}, err
	}
	return v.(schemas.Blob), nil
}

func (b *blobs) remember(id schemas.BlobID, t touch) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.touched) >= touchesMost {
		clear(b.touched) // they are only written once more
	}
	b.touched[id] = t
}

// take makes a spec ready for a record: contents that it has no room for become blobs, and
// those that it names are found. faults names the fields whose blob is not there, or too long.
// A batch that was accepted keeps its blobs for its items, also those that were removed since.
func (b *blobs) take(ctx context.Context, spec schemas.Spec, item bool) (slim schemas.Spec, uses []schemas.BlobUse, faults []schemas.FieldError, err error) {
	slim, contents := spec.Slim()
	for _, c := range contents {
		if err := b.keep(ctx, c); err != nil {
			return slim, nil, nil, err
		}
	}
	names, fields := slim.Blobs()
	sizes := map[schemas.BlobID]schemas.Size{}
	for i, id := range names {
		blob, err := b.touch(ctx, id)
		if item && errors.Is(err, bus.ErrNotFound) {
			var e bus.Entry[schemas.Blob]
			e, err = b.table.Get(ctx, id.Hex())
			blob = e.Value
		}
		switch {
		case errors.Is(err, bus.ErrNotFound):
			e := missingBlob(fields[i])
			faults = append(faults, schemas.FieldError{Field: e.Field, Code: e.Code, Message: e.Detail})
		case errors.Is(err, bus.ErrUnknownOutcome): // no record was made
			return slim, nil, nil, fmt.Errorf("%w: %v", bus.ErrUnavailable, err)
		case err != nil:
			return slim, nil, nil, err
		}
		uses = append(uses, schemas.BlobUse{Blob: id, Size: blob.Size, Upload: blob.Upload})
		sizes[id] = blob.Size
	}
	return slim, uses, append(faults, slim.CheckExpected(sizes)...), nil
}

func missingBlob(field string) *schemas.Error {
	return &schemas.Error{Status: http.StatusUnprocessableEntity, Code: schemas.CodeBlobMissing, Field: field,
		Detail: "this blob is not stored; send it with PUT /v1/blobs/{sha256} first"}
}

// keep stores bytes that a client sent in a spec.
func (b *blobs) keep(ctx context.Context, data []byte) error {
	id := schemas.BlobIDOf(sha256.Sum256(data))
	_, err := b.revive(ctx, id)
	if !errors.Is(err, bus.ErrNotFound) {
		return err
	}
	if err := b.room(ctx, int64(len(data))); err != nil {
		return err
	}
	_, _, err = b.store(ctx, id, bytes.NewReader(data))
	return err
}

// room says whether the store takes so many bytes more.
func (b *blobs) room(ctx context.Context, n int64) error {
	if err := b.connected(ctx); err != nil {
		return err
	}
	have, err := b.conn.StreamState(ctx, schemas.StreamBlobs)
	if err != nil {
		return err
	}
	if int64(have.Bytes)+n > b.g.cfg.BlobBytes {
		return noRoom(b.g.cfg.BlobBytes)
	}
	return nil
}

func noRoom(most int64) *schemas.Error {
	return &schemas.Error{Status: http.StatusInsufficientStorage, Code: schemas.CodeNoSpace, RetryAfter: schemas.Duration(time.Minute),
		Detail: fmt.Sprintf("the blobs of this site may take %s, and it would be more; those that no task names are removed within minutes, else ask the operator for more (--blob-bytes)", schemas.Size(most))}
}

var errDigest = &schemas.Error{Status: http.StatusUnprocessableEntity, Code: schemas.CodeDigestMismatch, Field: "sha256",
	Detail: "the body has another SHA-256 than the path says; nothing was stored"}

// store takes in a blob: all of it, and only if it is what its name says. made is false
// where somebody else has just stored the same.
func (b *blobs) store(ctx context.Context, id schemas.BlobID, body io.Reader) (blob schemas.Blob, made bool, err error) {
	if err := b.connected(ctx); err != nil {
		return blob, false, err
	}
	upload := strings.ToLower(rand.Text())
	subject := schemas.BlobSubject(upload)
	keep := false
	defer func() {
		if keep {
			return
		}
		// What is left if this fails too, the collector finds.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), purgeWithin)
		defer cancel()
		if failed := b.conn.PurgeChunks(ctx, schemas.StreamBlobs, subject); failed != nil {
			b.g.log.Warn().Err(failed).Msg("remove what was stored of a blob")
		}
	}()
	in := &hiding{r: body, sum: sha256.New(), cipher: schemas.BlobCipher(id, upload, 0).XORKeyStream}
	n, err := b.conn.WriteChunks(ctx, subject, schemas.BlobChunk, bus.ChunkStall, in)
	if err != nil {
		return blob, false, err
	}
	if id != schemas.BlobIDOf([sha256.Size]byte(in.sum.Sum(nil))) {
		return blob, false, errDigest
	}
	now := time.Now()
	blob = schemas.Blob{Size: schemas.Size(n), Upload: upload, StoredAt: now.UTC(), UsedAt: now.UTC(), Op: rand.Text()}
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.g.cfg.OpTimeout)
	defer cancel()
	_, err = b.table.Create(wctx, id.Hex(), blob, blob.Op)
	switch {
	case err == nil:
		keep = true
		b.remember(id, touch{blob, now})
		return blob, true, nil
	case errors.Is(err, bus.ErrConflict):
		blob, made, err = b.mend(wctx, id, blob)
	}
	keep = made || errors.Is(err, bus.ErrUnknownOutcome)
	return blob, made, err
}

// mend puts a blob that was just stored in place of one whose bytes are gone. made is false
// where those are there: somebody else was quicker.
func (b *blobs) mend(ctx context.Context, id schemas.BlobID, blob schemas.Blob) (now schemas.Blob, made bool, err error) {
	there, err := b.revive(ctx, id)
	if err != nil {
		return there, false, err
	}
	if whole, err := b.whole(ctx, there); whole || err != nil {
		return there, false, err
	}
	e, err := b.table.Update(ctx, id.Hex(), blob.Op, func(e bus.Entry[schemas.Blob]) (schemas.Blob, []bus.WriteOption, error) {
		if e.Value.Upload != there.Upload {
			return e.Value, nil, errMended
		}
		return blob, nil, nil
	})
	if errors.Is(err, errMended) {
		there, err = e.Value, nil
	} else if err == nil {
		there, made = blob, true
		b.g.log.Warn().Str("blob", string(id)).Msg("bytes of a blob were gone, and came anew")
	}
	if err == nil {
		b.remember(id, touch{there, there.UsedAt})
	}
	return there, made, err
}

var errMended = errors.New("somebody else has mended it")

// whole says whether all bytes of a blob that has an entry are stored: a restore, or a disk
// that lost them, leaves the entry alone.
func (b *blobs) whole(ctx context.Context, blob schemas.Blob) (bool, error) {
	if err := b.connected(ctx); err != nil {
		return false, err
	}
	pieces, err := b.conn.Subjects(ctx, schemas.StreamBlobs, schemas.BlobSubject(blob.Upload)+".*")
	if err != nil {
		return false, fmt.Errorf("%w: %w", bus.ErrUnavailable, err)
	}
	return int64(len(pieces)) == schemas.BlobChunks(blob.Size), nil
}

// hiding reads what is to be stored: it takes the sum, and hides the bytes.
type hiding struct {
	r      io.Reader
	sum    hash.Hash
	cipher func(dst, src []byte)
}

func (h *hiding) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.sum.Write(p[:n])
	h.cipher(p[:n], p[:n])
	return n, err
}

func noBlob() *schemas.Error {
	return &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Detail: "there is no such blob; send it with PUT to the same path"}
}

// blobID takes the name from the path.
func blobID(r *http.Request) (schemas.BlobID, error) {
	id, err := schemas.ParseBlobID(r.PathValue("sha256"))
	if err != nil {
		return "", &schemas.Error{Status: http.StatusUnprocessableEntity, Code: schemas.CodeInvalidValue, Field: "sha256", Detail: err.Error()}
	}
	return id, nil
}

// putBlob is PUT /v1/blobs/{sha256}.
func (g *Gateway) putBlob(w *response, r *http.Request) error {
	id, err := blobID(r)
	if err != nil {
		return err
	}
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	body := &begunBody{ReadCloser: r.Body}
	r.Body = body
	blob, made, result, err := g.takeBlob(w, r, id)
	g.metrics.blobUploads.WithLabelValues(result).Inc()
	switch {
	case err != nil:
		g.early(w, r, body.begun, func() { g.fail(w, r, err) })
		return nil
	case made:
		w.Header().Set("Location", "/v1/blobs/"+string(id))
		return answer(w, http.StatusCreated, blob.Info(id))
	}
	g.early(w, r, body.begun, func() { err = answer(w, http.StatusOK, blob.Info(id)) })
	return err
}

// begunBody tells whether it was ever read.
type begunBody struct {
	io.ReadCloser
	begun bool
}

func (b *begunBody) Read(p []byte) (int, error) {
	b.begun = true
	return b.ReadCloser.Read(p)
}

// What comes of an upload, as the metric has it.
const (
	blobStored  = "stored"
	blobThere   = "there"
	blobRefused = "refused"
	blobBroken  = "broken"
)

// takeBlob stores the body, unless the blob is there. result is for the metric.
func (g *Gateway) takeBlob(w *response, r *http.Request, id schemas.BlobID) (blob schemas.Blob, made bool, result string, err error) {
	if e := r.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		return blob, false, blobRefused, &schemas.Error{Status: http.StatusUnsupportedMediaType, Code: schemas.CodeContentType, Detail: "send the bytes without a Content-Encoding"}
	}
	if err := g.reach(r.Context()); err != nil {
		return blob, false, blobBroken, err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	blob, err = g.blobs.revive(ctx, id)
	whole := false
	if err == nil {
		whole, err = g.blobs.whole(ctx, blob)
	}
	if err != nil && !errors.Is(err, bus.ErrNotFound) {
		return blob, false, blobBroken, readError(err)
	}
	if whole && r.ContentLength >= 0 && r.ContentLength != int64(blob.Size) {
		return blob, false, blobRefused, errDigest
	}
	if whole { // no need for the body
		return blob, false, blobThere, nil
	}
	tooLarge := &schemas.Error{Status: http.StatusRequestEntityTooLarge, Code: schemas.CodeTooLarge,
		Detail: fmt.Sprintf("a blob may have at most %s here; nothing was stored", schemas.Size(g.cfg.BlobMaxSize))}
	if r.ContentLength > g.cfg.BlobMaxSize {
		return blob, false, blobRefused, tooLarge
	}
	select {
	case g.blobs.uploads <- struct{}{}:
		defer func() { <-g.blobs.uploads }()
	default:
		return blob, false, blobRefused, &schemas.Error{Status: http.StatusTooManyRequests, Code: schemas.CodeTooManyRequests,
			RetryAfter: schemas.Duration(time.Second), Detail: fmt.Sprintf("%d blobs are being sent to this gateway; send this one in a while", blobUploads)}
	}
	if err := g.blobs.room(ctx, max(0, r.ContentLength)); err != nil {
		return blob, false, blobRefused, readError(err)
	}
	control := http.NewResponseController(w)
	body := &blobBody{g: g, r: http.MaxBytesReader(w, r.Body, g.cfg.BlobMaxSize), ctx: r.Context(), stall: func() {
		_ = control.SetReadDeadline(time.Now().Add(g.cfg.WriteStall))
	}}
	blob, made, err = g.blobs.store(r.Context(), id, body)
	_ = control.SetReadDeadline(time.Time{})
	var over *http.MaxBytesError
	var cut bodyCutOff
	var known *schemas.Error
	switch {
	case err == nil && made:
		return blob, true, blobStored, nil
	case err == nil:
		return blob, false, blobThere, nil
	case errors.As(err, &over):
		return blob, false, blobRefused, tooLarge
	case errors.As(err, &known):
		return blob, false, blobRefused, known
	case errors.As(err, &cut), r.Context().Err() != nil:
		return blob, false, blobBroken, &schemas.Error{Status: http.StatusBadRequest, Code: schemas.CodeCutOff,
			Detail: "the body did not come to its end as long as it was announced, or nothing came for long; nothing was stored"}
	case errors.Is(err, bus.ErrFull):
		return blob, false, blobRefused, noRoom(g.cfg.BlobBytes)
	}
	return blob, false, blobBroken, busError(err, "")
}

// blobBody is a body under way into the store. It ends where there is no more room.
type blobBody struct {
	g     *Gateway
	r     io.Reader
	ctx   context.Context
	stall func()
	since int64 // bytes since it last looked for room
}

func (b *blobBody) Read(p []byte) (int, error) {
	if b.since >= blobLook {
		if b.since = 0; b.ctx.Err() == nil {
			if err := b.g.blobs.room(b.ctx, 0); err != nil {
				return 0, err
			}
		}
	}
	b.stall()
	n, err := b.r.Read(p)
	b.since += int64(n)
	b.g.metrics.blobBytes.WithLabelValues("in").Add(float64(n))
	var over *http.MaxBytesError
	if err != nil && err != io.EOF && !errors.As(err, &over) {
		err = bodyCutOff{err}
	}
	return n, err
}

// getBlob is GET /v1/blobs/{sha256}, and HEAD.
func (g *Gateway) getBlob(w *response, r *http.Request) error {
	id, err := blobID(r)
	if err != nil {
		return err
	}
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	if err := g.reach(r.Context()); err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	e, err := g.blobs.table.Get(ctx, id.Hex())
	if errors.Is(err, bus.ErrNotFound) || err == nil && !e.Value.RemovedAt.IsZero() {
		return noBlob()
	}
	if err == nil {
		err = g.blobs.connected(ctx)
	}
	whole := true
	if err == nil && r.Method == http.MethodHead { // a GET finds out by itself
		whole, err = g.blobs.whole(ctx, e.Value)
	}
	if err != nil {
		return readError(err)
	}
	if !whole {
		return noBlob()
	}
	in := &blobReader{ctx: r.Context(), conn: g.blobs.conn, id: id, blob: e.Value}
	defer in.Close()
	h := w.Header()
	h.Set("Content-Type", kindBytes)
	h.Set("ETag", `"`+entityBlob+id.Hex()+`"`)
	control := http.NewResponseController(w)
	http.ServeContent(&blobWriter{w, g, func() { _ = control.SetWriteDeadline(time.Now().Add(g.cfg.WriteStall)) }}, r, "", e.Value.StoredAt, in)
	_ = control.SetWriteDeadline(time.Time{})
	if in.err != nil { // the client shall see that the answer is not whole
		g.log.Warn().Err(in.err).Str("request", w.id).Msg("read a blob")
		panic(http.ErrAbortHandler)
	}
	return nil
}

// blobWriter writes with a deadline for each piece, and counts.
type blobWriter struct {
	http.ResponseWriter
	g     *Gateway
	stall func()
}

func (w *blobWriter) Write(p []byte) (int, error) {
	w.stall()
	n, err := w.ResponseWriter.Write(p)
	w.g.metrics.blobBytes.WithLabelValues("out").Add(float64(n))
	return n, err
}

// blobReader reads a blob from wherever it is set to. It begins with the first Read.
type blobReader struct {
	ctx  context.Context
	conn *bus.Conn
	id   schemas.BlobID
	blob schemas.Blob
	at   int64
	err  error // of the store

	pipe  *io.PipeReader
	end   context.CancelFunc
	ended chan struct{}
}

func (b *blobReader) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += b.at
	case io.SeekEnd:
		offset += int64(b.blob.Size)
	}
	if offset < 0 {
		return 0, errors.New("before the first byte")
	}
	if offset != b.at {
		b.Close()
		b.at = offset
	}
	return offset, nil
}

func (b *blobReader) Read(p []byte) (int, error) {
	if b.at >= int64(b.blob.Size) {
		return 0, io.EOF
	}
	if b.pipe == nil {
		b.begin()
	}
	n, err := b.pipe.Read(p)
	b.at += int64(n)
	if err != nil && b.at < int64(b.blob.Size) && b.ctx.Err() == nil {
		b.err = cmp.Or(b.err, err)
	}
	return n, err
}

func (b *blobReader) begin() {
	ctx, end := context.WithCancel(b.ctx)
	in, out := io.Pipe()
	b.pipe, b.end, b.ended = in, end, make(chan struct{})
	first, skip := b.at/schemas.BlobChunk, b.at%schemas.BlobChunk
	show := schemas.BlobCipher(b.id, b.blob.Upload, first)
	ended := b.ended
	go func() {
		defer close(ended)
		err := b.conn.ReadChunks(ctx, schemas.StreamBlobs, schemas.BlobSubject(b.blob.Upload), first, schemas.BlobChunks(b.blob.Size), func(data []byte) error {
			show.XORKeyStream(data, data)
			_, err := out.Write(data[min(skip, int64(len(data))):])
			skip = 0
			return err
		})
		_ = out.CloseWithError(err)
	}()
}

// Close ends the reading; it may be called again.
func (b *blobReader) Close() {
	if b.pipe != nil {
		_ = b.pipe.Close()
		b.end()
		<-b.ended
		b.pipe = nil
	}
}
