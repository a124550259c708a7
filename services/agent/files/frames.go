package files

import (
	"encoding/binary"
	"errors"
	"io"
)

const maxFrame = 1 << 20

// NewFrames gives a writer of frames: a length in four bytes before each piece. Close
// writes an empty one, which says that this was all, and closes w.
func NewFrames(w io.WriteCloser) io.WriteCloser { return &frames{w: w} }

type frames struct {
	w   io.WriteCloser
	buf [4 + 64<<10]byte
}

func (f *frames) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		k := copy(f.buf[4:], p)
		binary.BigEndian.PutUint32(f.buf[:], uint32(k))
		if _, err = f.w.Write(f.buf[:4+k]); err == nil {
			n, p = n+k, p[k:]
		}
	}
	return n, err
}

func (f *frames) Close() error {
	_, err := f.w.Write([]byte{0, 0, 0, 0})
	return errors.Join(err, f.w.Close())
}

// errCutOff says that the input ended without the empty frame.
var errCutOff = faultf(CutOff, "the input broke off; nothing was changed")

// unframe reads frames. It ends at the empty one.
type unframe struct {
	r    io.Reader
	left uint32
	over bool
}

func (u *unframe) Read(p []byte) (int, error) {
	if u.over {
		return 0, io.EOF
	}
	if u.left == 0 {
		var head [4]byte
		if _, err := io.ReadFull(u.r, head[:]); err != nil {
			return 0, errCutOff
		}
		u.left = binary.BigEndian.Uint32(head[:])
		if u.left == 0 {
			u.over = true
			return 0, io.EOF
		}
		if u.left > maxFrame {
			return 0, errCutOff
		}
	}
	n, err := u.r.Read(p[:min(len(p), int(u.left))])
	u.left -= uint32(n)
	if n == 0 && err != nil {
		return 0, errCutOff
	}
	return n, nil
}
