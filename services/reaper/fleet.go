package reaper

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// fleet is what this reaper has itself seen of the workers' beats, by its own
// monotonic clock. Clocks of workers count for nothing.
type fleet struct {
	mu   sync.Mutex
	seen map[schemas.WorkerID]sighting // under mu
}

// sighting is the newest revision of a worker's beat, and when it was first seen
// here, or when this reaper last came to the bus.
type sighting struct {
	revision uint64
	at       time.Time
}

func newFleet() *fleet { return &fleet{seen: map[schemas.WorkerID]sighting{}} }

func (f *fleet) saw(w schemas.WorkerID, revision uint64, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s, ok := f.seen[w]; !ok || s.revision != revision {
		f.seen[w] = sighting{revision, now}
	}
}

// absent says that no beat of a worker is there, and whether that has been so for the
// fence: its key was lost with a server, and it has not come back to write it again.
func (f *fleet) absent(w schemas.WorkerID, now time.Time, fence time.Duration) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, ok := f.seen[w]
	if !ok {
		s = sighting{at: now}
		f.seen[w] = s
	}
	// A beat that came since the view was asked stays what it is: it may be the last one,
	// and a verdict is about its revision.
	return s.revision == 0 && now.Sub(s.at) >= fence
}

// stood is how long a revision of a worker's beat has been the newest here, counted from
// when this reaper last came to the bus.
func (f *fleet) stood(w schemas.WorkerID, revision uint64, now time.Time) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s, ok := f.seen[w]; ok && s.revision == revision {
		return now.Sub(s.at)
	}
	return 0
}

func (f *fleet) forget(w schemas.WorkerID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.seen, w)
}

// restart counts every worker's silence anew: while this reaper was away from the
// bus it could not have seen their beats.
func (f *fleet) restart(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for w, s := range f.seen {
		f.seen[w] = sighting{s.revision, now}
	}
}

// awake takes note that time has come to now. If this process was stopped since, or
// the machine was too busy for it, beats may have come that it has not looked at: then
// every worker's silence counts anew, and awake says so.
func (f *fleet) awake(last, now time.Time, fence time.Duration) (slept bool) {
	if now.Sub(last) < fence/4 {
		return false
	}
	f.restart(now)
	return true
}

// silent lists the workers whose beat has been the same for the fence.
func (f *fleet) silent(now time.Time, fence time.Duration) map[schemas.WorkerID]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	list := map[schemas.WorkerID]uint64{}
	for w, s := range f.seen {
		if now.Sub(s.at) >= fence {
			list[w] = s.revision
		}
	}
	return list
}

func (r *Reaper) beatChanged(c bus.Change[schemas.Beat]) {
	w := schemas.WorkerID(c.Key)
	if c.Deleted {
		r.fleet.forget(w)
		return
	}
	r.fleet.saw(w, c.Revision, time.Now())
	if !c.HadOld || c.Old.Epoch != c.New.Epoch || c.Old.Lost() != c.New.Lost() || c.Old.Reported != c.New.Reported {
		r.suspect(w)
	}
}

// suspect asks for a look at every task that the worker holds.
func (r *Reaper) suspect(w schemas.WorkerID) {
	r.mu.Lock()
	r.suspects[w] = struct{}{}
	r.mu.Unlock()
	select {
	case r.suspected <- struct{}{}:
	default:
	}
}

// lookAtSuspects asks for a look at the tasks of all suspects. It is one pass over
// the tasks for however many workers: after a start, or an outage, all of them are.
func (r *Reaper) lookAtSuspects() {
	r.mu.Lock()
	suspects := r.suspects
	r.suspects = map[schemas.WorkerID]struct{}{}
	r.mu.Unlock()
	if len(suspects) == 0 {
		return
	}
	now := time.Now()
	r.tasks.Range(func(key string, t task, _ uint64) bool {
		w, _, _ := strings.Cut(t.holder, " ")
		if _, ok := suspects[schemas.WorkerID(w)]; ok {
			r.due.add(schemas.TaskID(key), now)
		}
		return true
	})
}

// watchFleet declares workers lost until ctx ends.
func (r *Reaper) watchFleet(ctx context.Context) error {
	tick := time.NewTicker(max(r.cfg.Fence/20, 10*time.Millisecond))
	defer tick.Stop()
	last := time.Now()
	reconnected := r.conn.Reconnected()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-reconnected:
			reconnected = r.conn.Reconnected()
			r.fleet.restart(time.Now())
			r.listenAnew()
		case <-tick.C:
			now := time.Now() // a tick may have waited
			slept := r.fleet.awake(last, now, r.cfg.Fence)
			last = now
			if slept {
				r.log.Warn().Msg("this reaper was stopped for a while: it counts the silence of workers anew")
				r.listenAnew()
				continue
			}
			if !r.conn.Connected() {
				r.fleet.restart(now)
				r.listenAnew()
				continue
			}
			r.verdicts(ctx, now, reconnected)
		}
	}
}

// verdicts declares those lost that were silent for the fence. What this connection has
// shown counts for this connection: a server that was killed may have forgotten a beat
// that its worker knows to be stored, and then an older revision is the newest again.
func (r *Reaper) verdicts(ctx context.Context, now time.Time, reconnected <-chan struct{}) {
	here, cancel := r.conn.ThisConnection(ctx)
	defer cancel()
	select {
	case <-reconnected:
		return // it was away between two ticks
	default:
	}
	for w, revision := range r.fleet.silent(now, r.cfg.Fence) {
		r.verdict(here, w, revision)
	}
}

// verdict declares a worker lost by compare-and-set at the very revision that was
// watched unchanged. Whoever is alive and beats makes it fail.
func (r *Reaper) verdict(ctx context.Context, w schemas.WorkerID, revision uint64) {
	beat, seen, ok := r.beats.Get(string(w))
	if !ok || seen != revision || beat.Lost() {
		return
	}
	lost := beat
	lost.LostAt = time.Now().UTC()
	_, err := r.workers.Replace(ctx, bus.Entry[schemas.Beat]{Key: string(w), Value: beat, Revision: revision}, lost, "lost")
	switch {
	case err == nil:
		r.metrics.lost.Inc()
		r.log.Warn().Str("worker", string(w)).Str("epoch", string(beat.Epoch)).Dur("silent", r.cfg.Fence).Msg("worker declared lost")
	case errors.Is(err, bus.ErrConflict):
	case ctx.Err() == nil:
		r.log.Warn().Err(err).Str("worker", string(w)).Msg("declare worker lost")
	}
}

// verdictStands is the part of the fence for which a verdict stands before a task is given
// up for it. A single server does not wait for the disk with it, and with the record it
// does: were it killed in between, the worker would come back as if nothing had been, and
// start what is given up.
const verdictStands = 50

// stands says whether the verdict over a record's holder, which the view has at revision,
// can no longer be forgotten. A server that was killed may be away for longer than that
// takes, and nobody has told us yet: so it is asked too.
func (r *Reaper) stands(ctx context.Context, rec schemas.Record, revision uint64) (bool, error) {
	if r.fleet.stood(rec.Worker, revision, time.Now()) < r.cfg.Fence/verdictStands {
		return false, nil
	}
	e, err := r.workers.Get(ctx, string(rec.Worker))
	if errors.Is(err, bus.ErrNotFound) {
		return false, nil
	}
	return err == nil && e.Value.Lost() && e.Value.Epoch == rec.Epoch, err
}

// checkHolder gives up a task whose holder is lost, has another epoch by now, or has
// been unknown for the fence. It says whether the task was dealt with.
func (r *Reaper) checkHolder(ctx context.Context, e bus.Entry[schemas.Record]) (bool, error) {
	rec := e.Value
	beat, revision, ok := r.beats.Get(string(rec.Worker))
	former := rec.Epoch.Before(beat.Epoch) // the view may also be older than the record
	switch {
	case !ok && !r.fleet.absent(rec.Worker, time.Now(), r.cfg.Fence):
		r.due.add(rec.ID, time.Now().Add(r.cfg.Fence/4))
		return false, nil
	case !ok: // the view may have missed it
		if _, err := r.workers.Get(ctx, string(rec.Worker)); !errors.Is(err, bus.ErrNotFound) {
			return false, err
		}
	case !former && !(beat.Epoch == rec.Epoch && beat.Lost()):
		return false, nil
	case !former:
		if stands, err := r.stands(ctx, rec, revision); !stands {
			r.due.add(rec.ID, time.Now().Add(r.cfg.Fence/verdictStands))
			return false, err
		}
	}
	back := former && !beat.Lost()
	if back && slices.Contains(beat.Kept, rec.ID) {
		return false, nil // it is with its worker again, under the old epoch
	}
	gone := back && beat.Reported
	_, err := r.apply(ctx, e, func(m schemas.Meta) schemas.Event {
		return schemas.Lose{Meta: m, Worker: rec.Worker, Epoch: rec.Epoch, Gone: gone}
	})
	if err != nil && !settled(err) {
		return false, err
	}
	return !errors.Is(err, schemas.ErrUnchanged), nil
}
