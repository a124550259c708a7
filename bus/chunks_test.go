package bus_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
	"time"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

func someBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func readAll(t *testing.T, c *bus.Conn, subject string, first, end int64) []byte {
	t.Helper()
	var all []byte
	if err := c.ReadChunks(testContext(t), schemas.StreamBlobs, subject, first, end, func(b []byte) error {
		all = append(all, b...)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// What a core service writes in pieces, an agent reads, from the first or from the middle.
func TestChunksCrossTheAccounts(t *testing.T) {
	_, core, agent := agentSetup(t, time.Second)
	b := someBytes(100*1000 + 1)
	subject := schemas.BlobSubject("upload")
	n, err := core.WriteChunks(testContext(t), subject, 1000, bus.ChunkStall, iotest.HalfReader(bytes.NewReader(b)))
	if err != nil || n != int64(len(b)) {
		t.Fatal(n, err)
	}
	for _, c := range []*bus.Conn{core, agent} {
		if got := readAll(t, c, subject, 0, 101); !bytes.Equal(got, b) {
			t.Errorf("%d bytes of %d came, or others", len(got), len(b))
		}
		if got := readAll(t, c, subject, 40, 101); !bytes.Equal(got, b[40_000:]) {
			t.Error("from the middle other bytes came")
		}
	}
	if err := core.PurgeChunks(testContext(t), schemas.StreamBlobs, subject); err != nil {
		t.Fatal(err)
	}
	err = agent.ReadChunks(testContext(t), schemas.StreamBlobs, subject, 0, 101, func([]byte) error { return nil })
	if !errors.Is(err, bus.ErrNotFound) {
		t.Errorf("pieces that were purged: %v", err)
	}
	left, err := core.Subjects(testContext(t), schemas.StreamBlobs, "dayfly.blobs.>")
	if err != nil || len(left) > 0 {
		t.Error(left, err)
	}
}

func TestWriteChunksEndsWithItsReader(t *testing.T) {
	_, core := setup(t)
	broken := errors.New("broken")
	n, err := core.WriteChunks(testContext(t), schemas.BlobSubject("b"), 1000, bus.ChunkStall, io.MultiReader(bytes.NewReader(someBytes(2500)), iotest.ErrReader(broken)))
	if err != broken || n != 2500 {
		t.Error(n, err)
	}
	if n, err := core.WriteChunks(testContext(t), schemas.BlobSubject("c"), 1000, bus.ChunkStall, bytes.NewReader(nil)); n != 0 || err != nil {
		t.Error(n, err)
	}
	ctx, cancel := context.WithCancel(testContext(t))
	cancel()
	if _, err := core.WriteChunks(ctx, schemas.BlobSubject("d"), 1000, bus.ChunkStall, bytes.NewReader(someBytes(10))); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := core.WriteChunks(testContext(t), "nobody.listens", 2<<20, bus.ChunkStall, bytes.NewReader(someBytes(2<<20))); !errors.Is(err, nats.ErrMaxPayload) {
		t.Error(err)
	}
}

// Reading and writing goes on after the server was away.
func TestChunksOutliveARestart(t *testing.T) {
	s, core := setup(t)
	b := someBytes(64_000)
	restarted := false
	restart := func() io.Reader {
		return readerFunc(func(p []byte) (int, error) {
			if !restarted {
				restarted = true
				natstest.Restart(t, s)
			}
			return 0, io.EOF
		})
	}
	_, err := core.WriteChunks(testContext(t), schemas.BlobSubject("b"), 1000, bus.ChunkStall, io.MultiReader(bytes.NewReader(b[:32_000]), restart(), bytes.NewReader(b[32_000:])))
	if err != nil {
		t.Fatal(err)
	}
	restarted = false
	var all []byte
	if err := core.ReadChunks(testContext(t), schemas.StreamBlobs, schemas.BlobSubject("b"), 0, 64, func(p []byte) error {
		if all = append(all, p...); len(all) == 32_000 {
			_, _ = restart().Read(nil)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(all, b) {
		t.Errorf("%d bytes of %d came, or others", len(all), len(b))
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
