package placer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// role is the key of the placers' lease in the bucket of leaders.
const role = "placer"

// leaders is the bucket in which the lease lives: a bus.Table, and a fake in tests.
type leaders interface {
	Get(ctx context.Context, key string) (bus.Entry[schemas.Leadership], error)
	Create(ctx context.Context, key string, v schemas.Leadership, op string, opts ...bus.WriteOption) (bus.Entry[schemas.Leadership], error)
	Replace(ctx context.Context, e bus.Entry[schemas.Leadership], v schemas.Leadership, op string, opts ...bus.WriteOption) (bus.Entry[schemas.Leadership], error)
}

// elector seeks the lease of leadership and keeps it.
//
// Nobody compares clocks. The leader counts its lease from when it sent the write
// that renewed it. A candidate counts from when it read the newest renewal, which is
// later, and takes the lease by compare-and-set at the very revision that it watched
// unchanged for the lease's length and a write's timeout: whatever the old leader sent
// while it led has arrived by then.
type elector struct {
	leaders  leaders
	identity string
	length   time.Duration
	write    time.Duration // timeout of one write
	log      zerolog.Logger
}

// lease is one term of leadership.
type lease struct {
	e *elector

	mu    sync.Mutex
	entry bus.Entry[schemas.Leadership] // under mu
	until time.Time                     // under mu
}

// Until is when the lease is over if it is not renewed.
func (l *lease) Until() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.until
}

// Held is the lease as it was last written.
func (l *lease) Held() schemas.Leadership {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.entry.Value
}

// Valid says whether this placer surely leads.
func (l *lease) Valid() bool { return time.Now().Before(l.Until()) }

// campaign waits until this placer leads, or ctx ends.
func (e *elector) campaign(ctx context.Context) (*lease, error) {
	var last bus.Entry[schemas.Leadership]
	var since time.Time
	quiet := false
	for {
		entry, err := e.get(ctx)
		now := time.Now()
		if err == nil && (since.IsZero() || entry.Revision != last.Revision || entry.Value != last.Value) {
			last, since = entry, now
		}
		holder := entry.Value
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case errors.Is(err, bus.ErrNotFound):
			since = time.Time{}
		case err != nil:
			if !quiet {
				e.log.Warn().Err(err).Msg("cannot read the placers' lease, trying again")
				quiet = true
			}
		}
		// Nobody else can be this very placer: its identity is its own, or guarded by a lock.
		free := err == nil && (holder.Holder == "" || holder.Holder == e.identity || now.Sub(since) >= holder.Length.Std()+e.write)
		if free || errors.Is(err, bus.ErrNotFound) {
			l, err := e.take(ctx, entry)
			if err == nil {
				return l, nil
			}
			if !errors.Is(err, bus.ErrConflict) && ctx.Err() == nil {
				e.log.Warn().Err(err).Msg("cannot take the placers' lease, trying again")
			}
		}
		if !sleep(ctx, e.length/10) {
			return nil, context.Cause(ctx)
		}
	}
}

func (e *elector) get(ctx context.Context) (bus.Entry[schemas.Leadership], error) {
	ctx, cancel := context.WithTimeout(ctx, e.write)
	defer cancel()
	return e.leaders.Get(ctx, role)
}

// take makes this placer the holder of the lease in entry, or of the first.
func (e *elector) take(ctx context.Context, entry bus.Entry[schemas.Leadership]) (*lease, error) {
	v := schemas.Leadership{Holder: e.identity, Term: entry.Value.Term + 1, Length: schemas.Duration(e.length)}
	ctx, cancel := context.WithTimeout(ctx, e.write)
	defer cancel()
	sent := time.Now()
	var err error
	if entry.Revision == 0 {
		entry, err = e.leaders.Create(ctx, role, v, "")
	} else {
		entry, err = e.leaders.Replace(ctx, entry, v, "")
	}
	if err != nil {
		return nil, err
	}
	l := &lease{e: e, entry: entry, until: sent.Add(e.length)}
	if !l.Valid() {
		return nil, fmt.Errorf("the answer came after the lease was over")
	}
	return l, nil
}

// errDeposed: the lease was lost, or could not be renewed in time.
var errDeposed = errors.New("no longer the leading placer")

// keep renews the lease until it is lost, with errDeposed, or ctx ends, with nil.
func (l *lease) keep(ctx context.Context) error {
	pause := l.e.length / 3
	for {
		if !sleep(ctx, min(pause, time.Until(l.Until()))) {
			return nil
		}
		if !l.Valid() {
			return fmt.Errorf("%w: the lease could not be renewed", errDeposed)
		}
		switch err := l.renew(ctx); {
		case err == nil:
			pause = l.e.length / 3
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, bus.ErrConflict):
			return fmt.Errorf("%w: %w", errDeposed, err)
		default:
			pause = l.e.length / 20
		}
	}
}

func (l *lease) renew(ctx context.Context) error {
	ctx, cancel := context.WithDeadline(ctx, l.Until())
	defer cancel()
	v := l.entry.Value
	v.Beat++
	sent := time.Now()
	entry, err := l.e.leaders.Replace(ctx, l.entry, v, "")
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entry, l.until = entry, sent.Add(l.e.length)
	return nil
}

// release lets another placer lead at once. Call it when keep has returned and
// nothing of this term is under way.
func (l *lease) release(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.e.write)
	defer cancel()
	v := l.entry.Value
	v.Holder = ""
	_, err := l.e.leaders.Replace(ctx, l.entry, v, "")
	return err
}

// sleep reports whether d passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
