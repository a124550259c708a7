package agent

import (
	"io"
	"sync"

	"dayfly.dev/schemas"
)

// tailBytes is what is kept of each stream of a background program.
const tailBytes = 128 << 10

// Tail is the newest of what a background program has written: two byte streams, of
// each of which the last 128 KiB are kept. Whoever writes never waits. It begins anew
// with each agent: what an earlier one has read is gone with it.
type Tail struct {
	mu      sync.Mutex
	rings   [2]ring       // under mu
	changed chan struct{} // under mu: nil while nobody waits
}

// ring holds the last bytes of a stream. Its buffer grows up to tailBytes.
type ring struct {
	buf []byte
	end int64 // bytes ever written
}

func (t *Tail) ring(s schemas.Stream) *ring {
	if s == schemas.Stderr {
		return &t.rings[1]
	}
	return &t.rings[0]
}

// Append adds what was written to a stream.
func (t *Tail) Append(s schemas.Stream, p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.ring(s)
	for len(p) > 0 {
		if len(r.buf) < tailBytes {
			n := min(len(p), tailBytes-len(r.buf))
			r.buf = append(r.buf, p[:n]...)
			r.end += int64(n)
			p = p[n:]
			continue
		}
		n := copy(r.buf[r.end%tailBytes:], p)
		r.end += int64(n)
		p = p[n:]
	}
	t.wakeLocked()
}

// Wake tells those who wait that there is news other than bytes.
func (t *Tail) Wake() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.wakeLocked()
}

func (t *Tail) wakeLocked() {
	if t.changed != nil {
		close(t.changed)
		t.changed = nil
	}
}

// ReadAt reads from a stream at the offset, or from the oldest byte that is kept if that
// is behind it, and says where it has read. It returns io.EOF at the present end.
func (t *Tail) ReadAt(s schemas.Stream, p []byte, off int64) (n int, at int64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.ring(s)
	at = max(off, r.end-int64(len(r.buf)))
	if at >= r.end {
		return 0, at, io.EOF
	}
	p = p[:min(int64(len(p)), r.end-at)]
	from := at % tailBytes
	n = copy(p, r.buf[from:])
	n += copy(p[n:], r.buf)
	return n, at, nil
}

// all gives what is kept of a stream.
func (t *Tail) all(s schemas.Stream) []byte {
	oldest, end := t.Size(s)
	p := make([]byte, end-oldest)
	n, _, _ := t.ReadAt(s, p, oldest)
	return p[:n]
}

// Size is where the kept bytes of a stream begin and end.
func (t *Tail) Size(s schemas.Stream) (oldest, end int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.ring(s)
	return r.end - int64(len(r.buf)), r.end
}

// Changed returns a channel that is closed at the next change of a Size, and when the
// program has ended.
func (t *Tail) Changed() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.changed == nil {
		t.changed = make(chan struct{})
	}
	return t.changed
}
