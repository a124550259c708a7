package blobs_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/blobs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const chunk = schemas.BlobChunk

// shelf is a source in memory that counts what it gives.
type shelf struct {
	mu     sync.Mutex
	bytes  map[schemas.BlobID][]byte // under mu
	begun  []int64                   // under mu: the first chunk of each fetch
	given  int                       // under mu: chunks
	hold   chan struct{}             // nil: nothing is held back
	holdAt int64                     // the chunk before which it is
	gone   chan struct{}             // gets one for each fetch that was broken off
}

func newShelf() *shelf {
	return &shelf{bytes: map[schemas.BlobID][]byte{}, gone: make(chan struct{}, 100)}
}

func (s *shelf) add(n int) schemas.BlobUse {
	b := make([]byte, n)
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _ = rand.NewChaCha8([32]byte{byte(len(s.bytes))}).Read(b)
	id := schemas.BlobIDOf(sha256.Sum256(b))
	s.bytes[id] = b
	return schemas.BlobUse{Blob: id, Size: schemas.Size(n), Upload: "u"}
}

func (s *shelf) Fetch(ctx context.Context, u schemas.BlobUse, first int64, fn func([]byte) error) error {
	s.mu.Lock()
	b, ok := s.bytes[u.Blob]
	s.begun = append(s.begun, first)
	s.mu.Unlock()
	if !ok {
		return blobs.ErrMissing
	}
	for n := first; n*chunk < int64(len(b)); n++ {
		if s.hold != nil && n >= s.holdAt {
			select {
			case <-s.hold:
			case <-ctx.Done():
				s.gone <- struct{}{}
				return context.Cause(ctx)
			}
		}
		s.mu.Lock()
		s.given++
		s.mu.Unlock()
		if err := fn(b[n*chunk : min((n+1)*chunk, int64(len(b)))]); err != nil {
			return err
		}
	}
	return nil
}

func open(t *testing.T, dir string, limit int64, s *shelf) *blobs.Cache {
	t.Helper()
	c, err := blobs.Open(dir, limit, s, zerolog.Nop(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func get(t *testing.T, c *blobs.Cache, s *shelf, u schemas.BlobUse) blobs.Held {
	t.Helper()
	h, err := c.Get(t.Context(), u, nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(h.Path); err != nil || string(b) != string(s.bytes[u.Blob]) {
		t.Fatalf("%d bytes of %d, or others: %v", len(b), u.Size, err)
	}
	return h
}

func TestManyWantOneBlob(t *testing.T) {
	s := newShelf()
	u := s.add(3*chunk + 5)
	c := open(t, t.TempDir(), 10*chunk, s)
	var all sync.WaitGroup
	for range 40 {
		all.Go(func() {
			if h, err := c.Get(context.Background(), u, nil); err != nil {
				t.Error(err)
			} else {
				h.Release()
			}
		})
	}
	all.Wait()
	if len(s.begun) != 1 || s.given != 4 {
		t.Errorf("%d fetches, %d chunks", len(s.begun), s.given)
	}
	if !c.Filter().Has(u.Blob.Sum()) || c.Stat().Blobs != 1 {
		t.Error("it is not said to be here")
	}
	empty := s.add(0)
	get(t, c, s, empty).Release()
}

// What has come is kept when all have left, and when the agent was killed.
func TestABrokenFetchGoesOn(t *testing.T) {
	s := newShelf()
	s.hold, s.holdAt = make(chan struct{}), 3
	u := s.add(5*chunk + 1)
	dir := t.TempDir()
	c := open(t, dir, 10*chunk, s)
	ctx, leave := context.WithCancelCause(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := c.Get(ctx, u, nil)
		left <- err
	}()
	part := filepath.Join(dir, u.Blob.Hex()+".part")
	for info, err := os.Stat(part); err != nil || info.Size() < 3*chunk; info, err = os.Stat(part) {
		time.Sleep(time.Millisecond)
	}
	bye := errors.New("bye")
	leave(bye)
	if err := <-left; err != bye {
		t.Fatal(err)
	}
	<-s.gone
	c.Close()
	// A kill may cut a chunk off.
	if err := os.Truncate(part, 2*chunk+100); err != nil {
		t.Fatal(err)
	}
	s.hold = nil
	c = open(t, dir, 10*chunk, s)
	if c.Filter() != nil || c.Stat().Bytes != 2*chunk+100 {
		t.Errorf("%+v", c.Stat())
	}
	get(t, c, s, u).Release()
	if len(s.begun) != 2 || s.begun[1] != 2 {
		t.Errorf("began at %v", s.begun)
	}
	c.Close()
	c = open(t, dir, 10*chunk, s)
	get(t, c, s, u).Release()
	if len(s.begun) != 2 {
		t.Error("it was fetched again")
	}
}

// A host that crashed may leave a file whose bytes never came to the disk.
func TestADamagedPartIsFetchedAnew(t *testing.T) {
	s := newShelf()
	u := s.add(3 * chunk)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, u.Blob.Hex()+".part"), make([]byte, 2*chunk), 0o600); err != nil {
		t.Fatal(err)
	}
	c := open(t, dir, 10*chunk, s)
	get(t, c, s, u).Release()
	if fmt.Sprint(s.begun) != "[2 0]" {
		t.Errorf("began at %v", s.begun)
	}
	// What is damaged where it comes from leaves nothing.
	bad := s.add(2 * chunk)
	s.bytes[bad.Blob][7] ^= 1
	if _, err := c.Get(t.Context(), bad, nil); !errors.Is(err, blobs.ErrDamaged) {
		t.Error(err)
	}
	missing := bad
	missing.Blob = schemas.BlobID("sha256:" + strings.Repeat("0", 64))
	if _, err := c.Get(t.Context(), missing, nil); !errors.Is(err, blobs.ErrMissing) {
		t.Error(err)
	}
	wrong := s.add(2 * chunk)
	wrong.Size--
	if _, err := c.Get(t.Context(), wrong, nil); !errors.Is(err, blobs.ErrDamaged) {
		t.Error(err)
	}
	if files, _ := os.ReadDir(dir); len(files) != 1 || c.Stat().Bytes != 3*chunk {
		t.Errorf("%v %+v", files, c.Stat())
	}
}

// Those that were not used for longest make room, save those that tasks have.
func TestRoomIsMade(t *testing.T) {
	s := newShelf()
	dir, tasks := t.TempDir(), t.TempDir()
	c := open(t, dir, 3*chunk, s)
	var uses []schemas.BlobUse
	for range 5 {
		uses = append(uses, s.add(chunk))
	}
	for _, u := range uses[:3] {
		get(t, c, s, u).Release()
	}
	get(t, c, s, uses[0]).Release()
	get(t, c, s, uses[3]).Release()
	f := c.Filter()
	if f.Has(uses[1].Blob.Sum()) || !f.Has(uses[0].Blob.Sum()) || c.Stat().Bytes != 3*chunk {
		t.Errorf("not the one went that was used first: %+v", c.Stat())
	}
	// One is pinned, one is linked, and one is free.
	held := get(t, c, s, uses[2])
	if err := os.Link(filepath.Join(dir, uses[0].Blob.Hex()), filepath.Join(tasks, "a")); err != nil {
		t.Fatal(err)
	}
	two := s.add(2 * chunk)
	_, err := c.Get(t.Context(), two, nil)
	if !errors.Is(err, blobs.ErrFull) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("%v", err)
	}
	if c.Stat().Blobs != 3 {
		t.Error("a blob went for one that has no room")
	}
	held.Release()
	held.Release()
	get(t, c, s, two).Release()
	if !c.Filter().Has(uses[0].Blob.Sum()) {
		t.Error("a blob went that a task has")
	}
	if _, err := c.Get(t.Context(), s.add(4*chunk), nil); !errors.Is(err, blobs.ErrFull) {
		t.Error(err)
	}
	// A smaller cache is tidied when it is opened, as far as may be.
	c.Close()
	if c = open(t, dir, chunk, s); c.Stat().Bytes != chunk {
		t.Errorf("%+v", c.Stat())
	}
}
