package gateway

import (
	"bytes"
	"cmp"
	"slices"
	"time"

	"dayfly.dev/schemas"
)

// piece is a run of bytes of one stream of one attempt.
type piece struct {
	lane
	offset int64
	at     time.Time
	data   []byte
}

// lane is one stream of one attempt.
type lane struct {
	attempt int
	stream  schemas.Stream
}

// sequencer puts the pieces of each lane in the order of their offsets and gives
// each byte once. A worker sends again what may have been lost, so pieces overlap,
// and one may come after its successor. What comes too early is held, but only so
// many bytes of it: then, and when release is called, the missing bytes are given up.
// The zero value is ready.
type sequencer struct {
	next map[lane]int64 // offset of the next byte to give
	held []piece
	size int // of what is held
}

const (
	maxHeld = 1 << 20
	// maxHeldPieces bounds them where a worker sends single bytes: each costs more than it
	// says, and is compared with all that comes.
	maxHeldPieces = 2048
)

func (s *sequencer) at(l lane) int64 { return s.next[l] }

func (s *sequencer) set(l lane, offset int64) {
	if s.next == nil {
		s.next = map[lane]int64{}
	}
	s.next[l] = offset
}

// take gives what can be delivered now that p is here.
func (s *sequencer) take(p piece) []piece {
	next := s.at(p.lane)
	if p.offset > next {
		for _, h := range s.held {
			if h.lane == p.lane && h.offset == p.offset && len(h.data) >= len(p.data) {
				return nil
			}
		}
		s.held = append(s.held, p)
		s.size += len(p.data)
		if s.size > maxHeld || len(s.held) > maxHeldPieces {
			return s.release()
		}
		return nil
	}
	p, ok := s.pass(p)
	if !ok {
		return nil
	}
	out := []piece{p}
	for again := true; again && len(s.held) > 0; {
		again = false
		s.held = slices.DeleteFunc(s.held, func(h piece) bool {
			if h.lane != p.lane || h.offset > s.at(h.lane) {
				return false
			}
			again = true
			s.size -= len(h.data)
			if h, ok := s.pass(h); ok {
				out = append(out, h)
			}
			return true
		})
	}
	return out
}

// release gives all that is held, over the gaps.
func (s *sequencer) release() []piece {
	slices.SortStableFunc(s.held, func(a, b piece) int {
		return cmp.Or(cmp.Compare(a.attempt, b.attempt), cmp.Compare(a.offset, b.offset))
	})
	var out []piece
	for _, h := range s.held {
		if h, ok := s.pass(h); ok {
			out = append(out, h)
		}
	}
	s.held, s.size = nil, 0
	return out
}

// pass cuts off what was given before and counts the rest as given.
func (s *sequencer) pass(p piece) (piece, bool) {
	next, end := s.at(p.lane), p.offset+int64(len(p.data))
	if end <= next {
		return p, false
	}
	if p.offset < next {
		p.data = p.data[next-p.offset:]
		p.offset = next
	}
	s.set(p.lane, end)
	return p, true
}

// tail keeps the last lines of a log, and no more than maxTail bytes of them in
// maxTailPieces pieces.
type tail struct {
	lines  int
	pieces []piece
	breaks int // in pieces
	size   int
}

const (
	maxTail       = 1 << 20
	maxTailPieces = maxTailLines // one for each line is the most that makes sense
)

func (t *tail) add(p piece) {
	if t.lines == 0 {
		return
	}
	t.pieces = append(t.pieces, p)
	t.breaks += bytes.Count(p.data, newline)
	t.size += len(p.data)
	t.trim()
}

var newline = []byte{'\n'}

// trim drops what comes before the last lines.
func (t *tail) trim() {
	last := t.pieces[len(t.pieces)-1].data
	lines := t.breaks
	if last[len(last)-1] != '\n' {
		lines++ // the last one is not ended yet
	}
	for skip := lines - t.lines; skip > 0; {
		front := &t.pieces[0]
		n := bytes.Count(front.data, newline)
		if n >= skip {
			cut := 0
			for range skip {
				cut += bytes.IndexByte(front.data[cut:], '\n') + 1
			}
			t.drop(cut)
			break
		}
		skip -= n
		t.drop(len(front.data))
	}
	for t.size > maxTail {
		t.drop(min(t.size-maxTail, len(t.pieces[0].data)))
	}
	if len(t.pieces) > maxTailPieces {
		t.drop(len(t.pieces[0].data))
	}
}

// drop takes n bytes from the first piece.
func (t *tail) drop(n int) {
	front := &t.pieces[0]
	t.breaks -= bytes.Count(front.data[:n], newline)
	t.size -= n
	front.data, front.offset = front.data[n:], front.offset+int64(n)
	if len(front.data) == 0 {
		t.pieces = t.pieces[1:]
	}
}
