package reaper

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// Blobs says when blobs are collected. Zero values are the defaults.
type Blobs struct {
	Bytes int64         // that all may take: above 90 % of it those go that were not named for longest
	Age   time.Duration // how long one stays that nobody names
	Grace time.Duration // schemas.BlobGrace
	Every time.Duration // between two passes
}

func defaultBlobs() Blobs {
	return Blobs{Bytes: schemas.BlobBytes, Age: schemas.BlobAge, Grace: schemas.BlobGrace, Every: time.Minute}
}

func (b Blobs) withDefaults() Blobs {
	d := defaultBlobs()
	b.Bytes, b.Age = cmp.Or(b.Bytes, d.Bytes), cmp.Or(b.Age, d.Age)
	b.Grace, b.Every = cmp.Or(b.Grace, d.Grace), cmp.Or(b.Every, d.Every)
	return b
}

type blobSum = [sha256.Size]byte

// blobCollector removes blobs that nobody names, for long or because they were removed, and
// what was left of uploads that broke off.
//
// Who names a blob has written its entry less than a quarter of the grace before it writes
// the record. The collector takes only entries that it has itself seen unchanged for a
// grace, by its own clock; then it waits until its views have come to what is stored, and
// looks who names them; then it deletes the entry, by compare-and-set at the revision that it
// saw. So a record that counts on an older write is in the view, and who writes the entry
// after that meets the deletion, and is told that there is no such blob. The bytes go
// after the entry: nobody finds them any more.
type blobCollector struct {
	cfg     Blobs
	conn    *bus.Conn
	log     zerolog.Logger
	metrics *metrics
	table   *bus.Table[schemas.Blob]
	entries *bus.View[blobSeen]
	tasks   *bus.View[task]
	batches *bus.View[string] // the blobs that those name which are not done

	named   map[blobSum]time.Time // when a blob was last seen to be named
	orphans map[string]orphan     // by upload
}

// blobSeen is an entry, and when this revision of it was first seen here.
type blobSeen struct {
	schemas.Blob
	at time.Time
}

// orphan is an upload without an entry: it may be under way.
type orphan struct {
	chunks int
	since  time.Time // it has had so many
}

func newBlobCollector(conn *bus.Conn, tasks *bus.View[task], log zerolog.Logger, cfg Blobs) *blobCollector {
	return &blobCollector{
		cfg: cfg.withDefaults(), conn: conn, log: log, tasks: tasks,
		table: bus.NewTable(conn, schemas.BucketBlobs, bus.JSON(func(b schemas.Blob, op string) bool { return b.Op == op })),
		entries: bus.NewView(conn, schemas.BucketBlobs, func(_ string, _ nats.Header, data []byte) (s blobSeen, err error) {
			s.at = time.Now()
			return s, schemas.Decode(data, &s.Blob)
		}, bus.ViewOptions[blobSeen]{}),
		batches: bus.NewView(conn, schemas.BucketBatches, func(_ string, h nats.Header, _ []byte) (string, error) {
			return strings.Clone(h.Get(schemas.HeaderBlobs)), nil
		}, bus.ViewOptions[string]{}),
		named: map[blobSum]time.Time{}, orphans: map[string]orphan{},
	}
}

func (c *blobCollector) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.entries.Run(ctx) })
	g.Go(func() error { return c.batches.Run(ctx) })
	g.Go(func() error {
		for _, ready := range []<-chan struct{}{c.tasks.Ready(), c.entries.Ready(), c.batches.Ready()} {
			select {
			case <-ready:
			case <-ctx.Done():
				return nil
			}
		}
		tick := time.NewTicker(c.cfg.Every)
		defer tick.Stop()
		for {
			if err := c.pass(ctx); err != nil && ctx.Err() == nil {
				c.log.Warn().Err(err).Msg("collect blobs")
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return nil
			}
		}
	})
	return g.Wait()
}

// stale is an entry that has been left alone for the grace.
type stale struct {
	key      string
	blob     schemas.Blob
	revision uint64
	unused   time.Duration // since it was last named, for all that is known
}

// pass collects what is to go now.
func (c *blobCollector) pass(ctx context.Context) error {
	now := time.Now()
	var alone []stale
	sizes, count := int64(0), 0
	c.entries.Range(func(key string, s blobSeen, revision uint64) bool {
		sizes += int64(s.Size)
		count++
		if now.Sub(s.at) >= c.cfg.Grace {
			alone = append(alone, stale{key: key, blob: s.Blob, revision: revision})
		}
		return true
	})
	c.metrics.blobs.Set(float64(count))
	c.metrics.blobBytes.Set(float64(sizes))
	if err := c.catchUp(ctx); err != nil {
		return err
	}
	names := c.names()
	for sum := range names {
		c.named[sum] = now
	}
	maps.DeleteFunc(c.named, func(_ blobSum, at time.Time) bool { return now.Sub(at) > c.cfg.Age })
	alone = slices.DeleteFunc(alone, func(s stale) bool {
		_, ok := names[schemas.BlobID(s.key).Sum()]
		if ok && now.Sub(s.blob.UsedAt) > c.cfg.Age/4 {
			c.keep(ctx, s) // whoever collects after us shall know
		}
		return ok
	})
	for i := range alone {
		s := &alone[i]
		// The clock of who wrote it may be wrong: then it goes too soon, or too late, and still
		// not while it is named.
		s.unused = now.Sub(s.blob.UsedAt)
		if at, ok := c.named[schemas.BlobID(s.key).Sum()]; ok {
			s.unused = min(s.unused, now.Sub(at))
		}
	}
	slices.SortFunc(alone, func(a, b stale) int { return cmp.Compare(b.unused, a.unused) })
	var errs []error
	over := sizes > c.cfg.Bytes/10*9
	for _, s := range alone {
		why := ""
		switch {
		case !s.blob.RemovedAt.IsZero():
			why = collectedRemoved
		case s.unused >= c.cfg.Age:
			why = collectedUnused
		case over && sizes > c.cfg.Bytes/10*8:
			why = collectedRoom
		default:
			continue
		}
		gone, err := c.collect(ctx, s, why)
		if gone {
			sizes -= int64(s.blob.Size)
		}
		errs = append(errs, err)
	}
	return errors.Join(append(errs, c.sweepUploads(ctx, now))...)
}

// Why a blob was collected, as the metric has it.
const (
	collectedUnused  = "unused"
	collectedRoom    = "room"
	collectedOrphan  = "orphan"
	collectedRemoved = "removed"
)

// catchUp waits until the views have come to what is stored now.
func (c *blobCollector) catchUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for bucket, view := range map[string]interface {
		CaughtUp(context.Context, uint64) error
	}{schemas.BucketTasks: c.tasks, schemas.BucketBatches: c.batches, schemas.BucketBlobs: c.entries} {
		last, err := c.conn.LastStored(ctx, bucket)
		if err == nil {
			err = view.CaughtUp(ctx, last)
		}
		if err != nil {
			return fmt.Errorf("wait for the view of %s: %w", bucket, err)
		}
	}
	return nil
}

// names are the blobs that a task which can still run names, or a batch that is not done.
func (c *blobCollector) names() map[blobSum]struct{} {
	names := map[blobSum]struct{}{}
	add := func(header string) {
		for _, sum := range schemas.ParseBlobsHeader(header) {
			names[sum] = struct{}{}
		}
	}
	c.tasks.Range(func(_ string, t task, _ uint64) bool {
		add(t.blobs)
		return true
	})
	c.batches.Range(func(_ string, header string, _ uint64) bool {
		add(header)
		return true
	})
	return names
}

// keep writes an entry that is named: its time of use is of now.
func (c *blobCollector) keep(ctx context.Context, s stale) {
	next := s.blob
	next.UsedAt, next.Op = time.Now().UTC(), rand.Text()
	_, err := c.table.Replace(ctx, bus.Entry[schemas.Blob]{Key: s.key, Value: s.blob, Revision: s.revision}, next, next.Op)
	if err != nil && !errors.Is(err, bus.ErrConflict) && ctx.Err() == nil {
		c.log.Warn().Err(err).Msg("note that a blob is in use")
	}
}

// markAge is how long the mark of a collected blob stays, for views that are away.
const markAge = time.Hour

func (c *blobCollector) collect(ctx context.Context, s stale, why string) (gone bool, err error) {
	err = c.table.Delete(ctx, s.key, s.revision, bus.TTL(markAge))
	if errors.Is(err, bus.ErrConflict) || errors.Is(err, bus.ErrNotFound) {
		return false, nil // somebody is about to name it, or was quicker
	}
	if err == nil {
		err = c.conn.PurgeChunks(ctx, schemas.StreamBlobs, schemas.BlobSubject(s.blob.Upload))
		c.metrics.blobsGone.WithLabelValues(why).Inc()
		c.log.Info().Str("blob", s.key).Str("why", why).Int64("bytes", int64(s.blob.Size)).Msg("blob collected")
		return true, err
	}
	return false, err
}

// firstChunks are those of which at least one is stored of any upload that has stored
// something: more are not under way at a time.
const firstChunks = 8

// sweepUploads removes what no entry has, once nothing has come to it for the grace: who
// sends a blob is cut off long before. An entry may go before its bytes, so those of a
// blob are never found here while it has one.
func (c *blobCollector) sweepUploads(ctx context.Context, now time.Time) error {
	uploads := map[string]struct{}{}
	for n := range firstChunks {
		subjects, err := c.conn.Subjects(ctx, schemas.StreamBlobs, fmt.Sprintf("%s.%d", schemas.BlobSubject("*"), n))
		if err != nil {
			return err
		}
		for s := range subjects {
			if parts := strings.Split(s, "."); len(parts) == 4 {
				uploads[parts[2]] = struct{}{}
			}
		}
	}
	if err := c.catchUp(ctx); err != nil { // an entry that was written before we looked is in the view
		return err
	}
	c.entries.Range(func(_ string, s blobSeen, _ uint64) bool {
		delete(uploads, s.Upload)
		return true
	})
	maps.DeleteFunc(c.orphans, func(u string, _ orphan) bool {
		_, there := uploads[u]
		return !there
	})
	for u := range uploads {
		chunks, err := c.conn.Subjects(ctx, schemas.StreamBlobs, schemas.BlobSubject(u)+".*")
		if err != nil {
			return err
		}
		o, known := c.orphans[u]
		if !known || o.chunks != len(chunks) {
			c.orphans[u] = orphan{len(chunks), now}
			continue
		}
		if now.Sub(o.since) < c.cfg.Grace {
			continue
		}
		if err := c.conn.PurgeChunks(ctx, schemas.StreamBlobs, schemas.BlobSubject(u)); err != nil {
			return err
		}
		delete(c.orphans, u)
		c.metrics.blobsGone.WithLabelValues(collectedOrphan).Inc()
	}
	return nil
}

// newTask is what the view keeps of a record that can still change.
func newTask(h nats.Header, raw []byte) task {
	return task{holder: h.Get(schemas.HeaderHolder), blobs: strings.Clone(h.Get(schemas.HeaderBlobs)), body: newBody(bytes.Clone(raw))}
}
