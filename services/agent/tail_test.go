package agent_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

func TestTailKeepsTheNewest(t *testing.T) {
	var tail agent.Tail
	var all []byte
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 400 {
		piece := make([]byte, rnd.IntN(5000))
		for i := range piece {
			piece[i] = byte(rnd.Uint32())
		}
		tail.Append(schemas.Stdout, piece)
		all = append(all, piece...)
		oldest, end := tail.Size(schemas.Stdout)
		if end != int64(len(all)) || oldest != max(0, end-128<<10) {
			t.Fatalf("%d to %d of %d", oldest, end, len(all))
		}
		buf := make([]byte, rnd.IntN(200<<10))
		off := rnd.Int64N(end + 1)
		n, at, err := tail.ReadAt(schemas.Stdout, buf, off)
		if at != max(off, oldest) || (err == io.EOF) != (at >= end) || !bytes.Equal(buf[:n], all[at:at+int64(n)]) || n != int(min(int64(len(buf)), end-at)) {
			t.Fatalf("read %d at %d (asked %d), %v", n, at, off, err)
		}
	}
	if oldest, end := tail.Size(schemas.Stderr); oldest != 0 || end != 0 {
		t.Error("stderr has something")
	}
	changed := tail.Changed()
	tail.Append(schemas.Stderr, []byte("x"))
	<-changed
}
