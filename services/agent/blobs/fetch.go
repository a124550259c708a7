package blobs

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
)

// run fetches a blob to its end, or until nobody waits for it any more.
func (c *Cache) run(b *blob, f *fetch, use schemas.BlobUse) {
	defer f.cancel()
	err := c.fetch(f, use)
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(f.ended)
	b.fetch = nil
	switch {
	case err == nil:
		b.whole = true
		c.version++
	case errors.Is(err, ErrMissing), errors.Is(err, ErrDamaged), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		c.remove(b)
	default: // what has come is of use to the next
		b.size = 0
		if info, err := os.Stat(c.path(b.id) + partSuffix); err == nil {
			b.size = info.Size()
		}
	}
	if err != nil {
		f.err = fmt.Errorf("blob %s: %w", use.Blob, err)
	}
}

func (c *Cache) fetch(f *fetch, use schemas.BlobUse) error {
	select {
	case c.turns <- struct{}{}:
		defer func() { <-c.turns }()
	case <-f.ctx.Done():
		return context.Cause(f.ctx)
	}
	part := c.path(use.Blob) + partSuffix
	for range 2 {
		err := c.fill(f, use, part)
		if !errors.Is(err, ErrDamaged) {
			return err
		}
		// Perhaps what was there before: a host that crashed may leave a file with holes.
		c.log.Warn().Str("blob", string(use.Blob)).Msg("a blob came damaged")
		if err := os.Remove(part); err != nil {
			return err
		}
	}
	return ErrDamaged
}

// fill goes on with the file where it ends, and gives it its name once it is whole.
func (c *Cache) fill(f *fetch, use schemas.BlobUse, part string) error {
	file, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	sum := sha256.New()
	chunks, err := takeUp(f.ctx, file, sum, int64(use.Size))
	if err != nil {
		return err
	}
	have := chunks * schemas.BlobChunk
	f.done.Store(have)
	err = c.source.Fetch(f.ctx, use, chunks, func(data []byte) error {
		if have+int64(len(data)) > int64(use.Size) {
			return ErrDamaged
		}
		if _, err := file.Write(data); err != nil {
			return err
		}
		sum.Write(data)
		have += int64(len(data))
		f.done.Store(have)
		c.count(len(data))
		return nil
	})
	if err != nil {
		return err
	}
	if have != int64(use.Size) || schemas.BlobIDOf([sha256.Size]byte(sum.Sum(nil))) != use.Blob {
		return ErrDamaged
	}
	// Tasks have this very file: they may read and run it, whoever they are.
	if err := file.Chmod(0o555); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	return os.Rename(part, c.path(use.Blob))
}

// takeUp reads what the file has, and leaves whole chunks of it.
func takeUp(ctx context.Context, file *os.File, sum hash.Hash, size int64) (chunks int64, err error) {
	info, err := file.Stat()
	if err != nil {
		return 0, err
	}
	chunks = min(info.Size(), size) / schemas.BlobChunk
	have := chunks * schemas.BlobChunk
	if err := file.Truncate(have); err != nil {
		return 0, err
	}
	b := make([]byte, schemas.BlobChunk)
	for range chunks {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		if _, err := io.ReadFull(file, b); err != nil {
			return 0, err
		}
		sum.Write(b)
	}
	return chunks, nil
}
