package placer

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// fakeLeaders is the bucket in memory. While away, everything waits for its timeout.
type fakeLeaders struct {
	mu    sync.Mutex
	entry bus.Entry[schemas.Leadership]
	away  map[string]bool // by holder, "" is everybody's reads
}

func (f *fakeLeaders) reach(ctx context.Context, who string) error {
	f.mu.Lock()
	away := f.away[who]
	f.mu.Unlock()
	if !away {
		return nil
	}
	<-ctx.Done()
	return bus.ErrUnavailable
}

func (f *fakeLeaders) Get(ctx context.Context, key string) (bus.Entry[schemas.Leadership], error) {
	if err := f.reach(ctx, ""); err != nil {
		return bus.Entry[schemas.Leadership]{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.entry.Revision == 0 {
		return bus.Entry[schemas.Leadership]{Key: key}, bus.ErrNotFound
	}
	return f.entry, nil
}

func (f *fakeLeaders) Create(ctx context.Context, key string, v schemas.Leadership, op string, _ ...bus.WriteOption) (bus.Entry[schemas.Leadership], error) {
	return f.Replace(ctx, bus.Entry[schemas.Leadership]{Key: key}, v, op)
}

func (f *fakeLeaders) Replace(ctx context.Context, e bus.Entry[schemas.Leadership], v schemas.Leadership, _ string, _ ...bus.WriteOption) (bus.Entry[schemas.Leadership], error) {
	if err := f.reach(ctx, v.Holder); err != nil {
		return e, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.entry.Revision != e.Revision {
		return e, bus.ErrConflict
	}
	f.entry = bus.Entry[schemas.Leadership]{Key: e.Key, Value: v, Revision: e.Revision + 1}
	return f.entry, nil
}

func (f *fakeLeaders) cut(who string, away bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.away[who] = away
}

const (
	testLength = 3 * time.Second
	testWrite  = 2 * time.Second
)

func newFakeLeaders() *fakeLeaders { return &fakeLeaders{away: map[string]bool{}} }

func (f *fakeLeaders) elector(identity string) *elector {
	return &elector{leaders: f, identity: identity, length: testLength, write: testWrite, log: zerolog.Nop()}
}

// lead campaigns and keeps the lease until ctx ends.
func lead(ctx context.Context, t *testing.T, e *elector) (*lease, <-chan error) {
	t.Helper()
	l, err := e.campaign(ctx)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- l.keep(ctx) }()
	return l, done
}

func TestTheFirstLeadsAtOnceAndKeepsOnLeading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeLeaders()
		start := time.Now()
		l, done := lead(t.Context(), t, f.elector("a"))
		if waited := time.Since(start); waited != 0 {
			t.Errorf("waited %s", waited)
		}
		other, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := f.elector("b").campaign(other); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("another one took the lease: %v", err)
		}
		select {
		case err := <-done:
			t.Errorf("it stopped leading: %v", err)
		default:
		}
		if !l.Valid() || l.Held().Term != 1 || l.Held().Beat < 55 {
			t.Errorf("the lease is %+v", l.Held())
		}
	})
}

func TestADeadLeadersLeaseIsWaitedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeLeaders()
		dead, kill := context.WithCancel(t.Context())
		old, _ := lead(dead, t, f.elector("a"))
		time.Sleep(10 * time.Second)
		kill()
		died := time.Now()
		l, _ := lead(t.Context(), t, f.elector("b"))
		// It has to watch for a whole length and a write's timeout itself.
		if waited := time.Since(died); waited < testLength+testWrite || waited > testLength+testWrite+testLength/5 {
			t.Errorf("took over after %s", waited)
		}
		if old.Valid() || !l.Valid() || l.Held().Term != 2 {
			t.Errorf("old leader valid: %v, new lease %+v", old.Valid(), l.Held())
		}
	})
}

func TestALeaderThatCannotRenewStopsBeforeAnotherBegins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeLeaders()
		old, done := lead(t.Context(), t, f.elector("a"))
		stopped := make(chan time.Time, 1)
		go func() {
			if err := <-done; !errors.Is(err, errDeposed) {
				t.Errorf("it ended with %v", err)
			}
			stopped <- time.Now()
		}()
		f.cut("a", true)
		cut := time.Now()
		_, _ = lead(t.Context(), t, f.elector("b"))
		took := time.Now()
		at := <-stopped
		if at.Sub(cut) > testLength || took.Sub(at) < testWrite || old.Valid() {
			t.Errorf("stopped after %s, taken over after %s", at.Sub(cut), took.Sub(cut))
		}
	})
}

func TestADeposedLeaderKnowsAtItsNextRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeLeaders()
		_, done := lead(t.Context(), t, f.elector("a"))
		f.mu.Lock()
		f.entry.Revision++ // somebody else has written
		f.mu.Unlock()
		start := time.Now()
		if err := <-done; !errors.Is(err, errDeposed) || time.Since(start) > testLength/3 {
			t.Errorf("ended with %v after %s", err, time.Since(start))
		}
	})
}

func TestTheSameIdentityAndAReleasedLeaseAreTakenAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeLeaders()
		first, kill := context.WithCancel(t.Context())
		_, done := lead(first, t, f.elector("a"))
		kill()
		<-done
		start := time.Now()
		again, stop := context.WithCancel(t.Context())
		l, done := lead(again, t, f.elector("a"))
		if waited := time.Since(start); waited != 0 || l.Held().Term != 2 {
			t.Errorf("the same identity waited %s for term %d", waited, l.Held().Term)
		}
		stop()
		<-done
		if err := l.release(again); err != nil {
			t.Fatal(err)
		}
		l, _ = lead(t.Context(), t, f.elector("b"))
		if waited := time.Since(start); waited != 0 || l.Held().Term != 3 {
			t.Errorf("another identity waited %s for term %d", waited, l.Held().Term)
		}
	})
}

func TestSilenceThatWasNotWatchedCountsForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeLeaders()
		l, done := lead(t.Context(), t, f.elector("a"))
		f.cut("", true) // b cannot look, a renews
		var b *lease
		go func() { b, _ = f.elector("b").campaign(t.Context()) }()
		time.Sleep(time.Minute)
		f.cut("", false)
		time.Sleep(time.Minute)
		synctest.Wait()
		if b != nil || !l.Valid() {
			t.Error("b took the lease of a leader that renewed it")
		}
		select {
		case err := <-done:
			t.Error(err)
		default:
		}
	})
}
