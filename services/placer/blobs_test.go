package placer

import (
	"crypto/sha256"
	"fmt"
	"testing"

	"dayfly.dev/schemas"
)

func nameBlob(text string, size schemas.Size) func(*queued, *seen) {
	return func(_ *queued, s *seen) {
		s.need.blobs = append(s.need.blobs, blob{sha256.Sum256([]byte(text)), int64(size)})
	}
}

func cacheOf(w schemas.WorkerID, slots int, held ...string) schemas.Beat {
	v := beat(string(w), host(64, 64*gib, slots))
	v.Host.Cache = gib
	var ids []schemas.BlobID
	for _, h := range held {
		ids = append(ids, schemas.BlobIDOf(sha256.Sum256([]byte(h))))
	}
	v.Blobs = schemas.NewBlobFilter(ids)
	return v
}

// Tasks go to who holds a large blob while there is room, and then to as few others as
// can be, though no beat says yet that it comes there.
func TestTasksKeepToTheHoldersOfTheirBlobs(t *testing.T) {
	for _, policy := range []Policy{Weighted, EPVM} {
		t.Run(string(policy), func(t *testing.T) {
			b := testBook(policy)
			b.fleet.beat(cacheOf("a", 16), t0)
			b.fleet.beat(cacheOf("b", 16), t0)
			b.fleet.beat(cacheOf("c", 16, "data"), t0)
			b.fleet.beat(cacheOf("d", 16), t0)
			for i := range 40 {
				id, s := ask(i, nameBlob("data", 500<<20))
				b.changed(id, s, 1, t0)
			}
			count := map[schemas.WorkerID]int{}
			for i, d := range place(b, t0) {
				if count[d.worker]++; i < 16 && d.worker != "c" {
					t.Fatalf("task %d went to %s while the holder had room", i, d.worker)
				}
			}
			if len(count) != 3 || count["c"] != 16 {
				t.Errorf("%v", count)
			}
		})
	}
}

// A small blob is no reason to crowd a worker.
func TestASmallBlobWeighsLittle(t *testing.T) {
	b := testBook(Weighted)
	b.fleet.beat(cacheOf("a", 16, "data"), t0)
	b.fleet.beat(cacheOf("b", 16), t0)
	for i := range 16 {
		id, s := ask(i, nameBlob("data", 4<<20))
		b.changed(id, s, 1, t0)
	}
	count := map[schemas.WorkerID]int{}
	for _, d := range place(b, t0) {
		count[d.worker]++
	}
	if count["b"] < 4 {
		t.Errorf("%v", count)
	}
}

func TestACacheThatIsTooSmallSaysSo(t *testing.T) {
	b := testBook(Weighted)
	b.fleet.beat(cacheOf("a", 16), t0)
	id, s := ask(1, nameBlob("x", gib), nameBlob("y", 1<<20))
	b.changed(id, s, 1, t0)
	if list := place(b, t0); len(list) > 0 {
		t.Fatalf("%+v", list)
	}
	y := b.why(id, t0)
	if want := "no worker's cache of blobs is large enough: asks 1.001GiB (--blob-cache-bytes)"; y.Summary != want || len(y.Workers) != 1 || y.Workers[0].Filter != "blobs" {
		t.Errorf("%+v", y)
	}
}

// What a worker's tasks have come counts until the last of them is over.
func TestWhatComesIsCounted(t *testing.T) {
	f := newFleet(0)
	n := need{blobs: []blob{{sha256.Sum256([]byte("x")), 1 << 30}}}
	s := &shape{names: n.blobs}
	w := f.get("a")
	states := fmt.Sprint(w.fetching(s))
	f.take("a", n)
	f.take("a", n)
	f.give("a", n)
	states += fmt.Sprint(" ", w.fetching(s))
	w.known = true
	f.give("a", n)
	states += fmt.Sprint(" ", w.fetching(s))
	if states != "1 0 1" || len(w.coming) != 0 {
		t.Error(states)
	}
}

// A task that comes and goes between two beats leaves its blobs behind, if it ran.
func TestWhatCameStaysUntilTheNextBeat(t *testing.T) {
	for name, c := range map[string]struct {
		states []schemas.State
		want   schemas.WorkerID
	}{
		"it ran":                      {[]schemas.State{schemas.Running, schemas.Failed}, "b"},
		"it was seen at its end only": {[]schemas.State{schemas.Completed}, "b"},
		"it never ran":                {[]schemas.State{schemas.Starting, schemas.Failed}, "a"},
		"it was given back":           {[]schemas.State{schemas.Starting, schemas.Queued, schemas.Canceled}, "a"},
	} {
		t.Run(name, func(t *testing.T) {
			b := testBook(Weighted)
			for _, w := range []schemas.WorkerID{"a", "b"} {
				b.fleet.beat(cacheOf(w, 16), t0)
			}
			id, s := ask(1, nameBlob("data", 500<<20))
			held := seen{state: schemas.Assigned, worker: "b", need: s.need}
			b.changed(id, held, 1, t0)
			for i, state := range c.states {
				now := seen{state: state}
				switch {
				case state.Held():
					now.worker, now.need = "b", s.need
				case state == schemas.Queued:
					now = s
				}
				b.changed(id, now, uint64(2+i), t0)
			}
			next, s := ask(2, nameBlob("data", 500<<20))
			b.changed(next, s, 1, t0)
			if list := place(b, t0); len(list) != 1 || list[0].worker != c.want {
				t.Errorf("%+v, want %s", list, c.want)
			}
			b.fleet.beat(cacheOf("b", 16), t0) // which says that it holds nothing
			if w := b.fleet.get("b"); len(w.came) != 0 {
				t.Errorf("%v", w.came)
			}
		})
	}
}
