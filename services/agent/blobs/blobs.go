// Package blobs keeps blobs on a worker's disk: up to a number of bytes, those last that
// were used last. Each is fetched once, however many wait for it; what broke off goes on
// where it was, also after a kill.
//
//	c, err := blobs.Open(dir, limit, source, log)
//	b, err := c.Get(ctx, use, progress) // b.Path has the bytes, verified, until b.Release
//
// A file is "<sha256>" once it is whole and verified, and "<sha256>.part" until then; its
// time of change is that of its last use. Tasks get it as a hard link that they cannot
// write through: a blob with more than one link is in use, whoever knows of it.
package blobs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/schemas"
)

// Source is where blobs come from.
type Source interface {
	// Fetch gives the bytes of a blob from the chunk with number first on to fn, in order
	// and BlobChunk bytes at a time, save the last. ErrMissing says that it is not stored.
	// An error of fn ends it and comes back.
	Fetch(ctx context.Context, b schemas.BlobUse, first int64, fn func([]byte) error) error
}

// Errors of Get.
var (
	// ErrMissing: the blob is not stored any more.
	ErrMissing = errors.New("is not stored any more")
	// ErrFull: it has no room beside the blobs that are in use.
	ErrFull = errors.New("has no room in the cache of blobs")
	// ErrDamaged: what came is not what its name says, twice.
	ErrDamaged = errors.New("is not what its name says")
	errClosed  = errors.New("the cache of blobs is closed")
)

// fetches is how many blobs are fetched at a time.
const fetches = 2

// Cache is the blobs of one worker. It has its folder for itself.
type Cache struct {
	dir    string
	limit  int64
	source Source
	log    zerolog.Logger
	count  func(n int) // bytes fetched

	ctx     context.Context
	stop    context.CancelFunc
	turns   chan struct{}
	working sync.WaitGroup

	mu      sync.Mutex
	closed  bool                     // under mu
	blobs   map[schemas.BlobID]*blob // under mu
	version int                      // under mu: grows with each change of what is held
}

// blob is one file. All of it is under the cache's mu.
type blob struct {
	id    schemas.BlobID
	size  int64 // what it takes, once it is whole
	used  time.Time
	whole bool
	pins  int
	fetch *fetch // under way
}

// fetch is one blob under way.
type fetch struct {
	ctx     context.Context
	cancel  context.CancelFunc
	done    atomic.Int64 // bytes
	ended   chan struct{}
	err     error // once ended
	waiting int   // under the cache's mu
}

// Held is a blob that is there until it is released.
type Held struct {
	Path    string
	Release func() // may be called again
}

// Open takes back what is in dir, which is made if it is not there. count, which may be
// nil, is told of bytes that were fetched.
func Open(dir string, limit int64, source Source, log zerolog.Logger, count func(int)) (*Cache, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make folder of blobs: %w", err)
	}
	c := &Cache{dir: dir, limit: limit, source: source, log: log, count: count, turns: make(chan struct{}, fetches), blobs: map[schemas.BlobID]*blob{}}
	if count == nil {
		c.count = func(int) {}
	}
	c.ctx, c.stop = context.WithCancel(context.Background())
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read folder of blobs: %w", err)
	}
	for _, f := range files {
		name, part := strings.CutSuffix(f.Name(), partSuffix)
		id, err := schemas.ParseBlobID(name)
		info, statErr := f.Info()
		if err != nil || statErr != nil || !info.Mode().IsRegular() || c.blobs[id] != nil {
			_ = os.RemoveAll(filepath.Join(dir, f.Name())) // "x" comes before "x.part"
			continue
		}
		c.blobs[id] = &blob{id: id, size: info.Size(), used: info.ModTime(), whole: !part}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shrink(0)
	return c, nil
}

const partSuffix = ".part"

// Close ends what is under way, and waits for it. What has come stays.
func (c *Cache) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.stop()
	c.working.Wait()
}

func (c *Cache) path(id schemas.BlobID) string { return filepath.Join(c.dir, id.Hex()) }

// Get makes a blob present. progress, which may be nil, is told how many bytes have come,
// about once a second. A context that ends leaves what others wait for under way.
func (c *Cache) Get(ctx context.Context, use schemas.BlobUse, progress func(done int64)) (Held, error) {
	for {
		b, f, err := c.begin(use)
		if err != nil {
			return Held{}, err
		}
		release := sync.OnceFunc(func() { c.release(b) })
		if f != nil {
			err = c.wait(ctx, f, progress)
		}
		switch {
		case err == nil:
			_ = os.Chtimes(c.path(b.id), time.Time{}, time.Now()) // for the next agent
			return Held{Path: c.path(b.id), Release: release}, nil
		case errors.Is(err, context.Canceled) && ctx.Err() == nil && c.ctx.Err() == nil:
			release() // all others had left it in that moment
		default:
			release()
			return Held{}, err
		}
	}
}

// begin finds the blob, or its fetch, or begins one. The blob is pinned.
func (c *Cache) begin(use schemas.BlobUse) (*blob, *fetch, error) {
	if _, err := schemas.ParseBlobID(string(use.Blob)); err != nil || use.Size < 0 || use.Size > schemas.MaxBlobSize {
		return nil, nil, fmt.Errorf("blob %q: %w", use.Blob, ErrMissing)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, nil, errClosed
	}
	b := c.blobs[use.Blob]
	if b != nil && b.whole {
		if info, err := os.Stat(c.path(b.id)); err != nil || info.Size() != int64(use.Size) {
			c.remove(b) // somebody was at the folder
			b = nil
		}
	}
	size := int64(use.Size)
	if b == nil || !b.whole && b.fetch == nil {
		have := int64(0)
		if b != nil { // a part of it
			have = b.size
			b.pins++
		}
		room := c.shrink(size - have)
		if b != nil {
			b.pins--
		}
		if !room {
			return nil, nil, fmt.Errorf("blob %s of %s %w of %s: what is in it is in use", use.Blob, use.Size, ErrFull, schemas.Size(c.limit))
		}
		if b == nil {
			b = &blob{id: use.Blob}
			c.blobs[b.id] = b
		}
		b.size = size
		b.fetch = &fetch{ended: make(chan struct{})}
		b.fetch.ctx, b.fetch.cancel = context.WithCancel(c.ctx)
		f := b.fetch
		c.working.Go(func() { c.run(b, f, use) })
	}
	b.pins++
	b.used = time.Now()
	if b.fetch != nil {
		b.fetch.waiting++
	}
	return b, b.fetch, nil
}

func (c *Cache) wait(ctx context.Context, f *fetch, progress func(int64)) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-f.ended:
			return f.err
		case <-ctx.Done():
			c.mu.Lock()
			defer c.mu.Unlock()
			if f.waiting--; f.waiting == 0 {
				f.cancel() // the next who wants it goes on from there
			}
			return context.Cause(ctx)
		case <-tick.C:
			if progress != nil {
				progress(f.done.Load())
			}
		}
	}
}

func (c *Cache) release(b *blob) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b.pins--
	b.used = time.Now()
}

// shrink removes those that were not used for longest until there is room for more bytes,
// and says whether there is. It runs under mu.
func (c *Cache) shrink(more int64) bool {
	total := more
	for _, b := range c.blobs {
		total += b.size
	}
	if total <= c.limit {
		return true
	}
	oldest := slices.SortedFunc(maps.Values(c.blobs), func(a, b *blob) int {
		return cmp.Or(a.used.Compare(b.used), cmp.Compare(a.id, b.id))
	})
	var free []*blob
	for _, b := range oldest {
		if total > c.limit && b.pins == 0 && b.fetch == nil && !c.linked(b) {
			free = append(free, b)
			total -= b.size
		}
	}
	if total > c.limit && more > 0 {
		return false // nothing goes for what has no room anyway
	}
	for _, b := range free {
		c.remove(b)
	}
	return total <= c.limit
}

// linked says that a task has the blob.
func (c *Cache) linked(b *blob) bool {
	info, err := os.Stat(c.path(b.id))
	if err != nil {
		return false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && stat.Nlink > 1
}

// remove runs under mu.
func (c *Cache) remove(b *blob) {
	for _, path := range []string{c.path(b.id), c.path(b.id) + partSuffix} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			c.log.Warn().Err(err).Msg("remove a blob")
		}
	}
	delete(c.blobs, b.id)
	c.version++
}

// Stat is how much the cache holds.
type Stat struct {
	Blobs   int
	Bytes   int64 // what is under way counted whole
	Version int   // grows with each change
}

// Stat says how much the cache holds.
func (c *Cache) Stat() Stat {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Stat{Version: c.version}
	for _, b := range c.blobs {
		s.Bytes += b.size
		if b.whole {
			s.Blobs++
		}
	}
	return s
}

// Filter says which blobs are held.
func (c *Cache) Filter() schemas.BlobFilter {
	c.mu.Lock()
	defer c.mu.Unlock()
	var held []schemas.BlobID
	for id, b := range c.blobs {
		if b.whole {
			held = append(held, id)
		}
	}
	return schemas.NewBlobFilter(held)
}
