package placer

import (
	"crypto/sha256"
	"strings"

	"dayfly.dev/schemas"
)

type blobSum = [sha256.Size]byte

// blob is one that a task names.
type blob struct {
	sum  blobSum
	size int64
}

// need is what a task takes of its worker, and what it must find there.
type need struct {
	resources
	blobs []blob
}

func blobsOf(uses []schemas.BlobUse) []blob {
	if len(uses) == 0 {
		return nil
	}
	list := make([]blob, len(uses))
	for i, u := range uses {
		list[i] = blob{u.Blob.Sum(), int64(u.Size)}
	}
	return list
}

// blobsKey is blobs as one comparable string.
func blobsKey(blobs []blob) string {
	if len(blobs) == 0 {
		return ""
	}
	var b strings.Builder
	for _, x := range blobs {
		b.Write(x.sum[:])
	}
	return b.String()
}

func total(blobs []blob) (bytes int64) {
	for _, b := range blobs {
		bytes += b.size
	}
	return bytes
}

// fetchWorst is how many bytes to fetch are as bad as a machine that is full: who holds
// that much is preferred for as long as it has room. Little is worth little.
const fetchWorst = 256 << 20

// fetching is what it is worth not to go to this worker: from 0, where it holds all that
// the shape names or one of its tasks has it come, or had it since the last beat, to 1.
func (w *worker) fetching(s *shape) float64 {
	missing := int64(0)
	for _, b := range s.names {
		if _, came := w.came[b.sum]; !came && w.coming[b.sum] == 0 && !w.blobs.Has(b.sum) {
			missing += b.size
		}
	}
	return min(1, float64(missing)/fetchWorst)
}

// expect counts what comes to a worker with its tasks: a beat is too late for those that
// are placed together.
func (w *worker) expect(blobs []blob, n int) {
	for _, b := range blobs {
		if w.coming == nil {
			w.coming = map[blobSum]int{}
		}
		if w.coming[b.sum] += n; w.coming[b.sum] == 0 {
			delete(w.coming, b.sum)
		}
	}
}

// fetched remembers what a task had when it ran, until a beat says what is held: a short one
// comes and goes between two beats.
func (w *worker) fetched(blobs []blob) {
	if w.came == nil && len(blobs) > 0 {
		w.came = map[blobSum]struct{}{}
	}
	for _, b := range blobs {
		w.came[b.sum] = struct{}{}
	}
}

func lacksCache(x *trial, w *worker) bool {
	return len(x.shape.names) > 0 && total(x.shape.names) > int64(w.host.Cache)
}
