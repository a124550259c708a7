package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// beatCodec knows that the verdict is written over a beat and carries its name, but is
// not it.
var beatCodec = bus.JSON(func(b schemas.Beat, op string) bool { return beatOp(b) == op && !b.Lost() })

// beatOp names one write of one agent's process.
func beatOp(b schemas.Beat) string { return fmt.Sprintf("%s/%d", b.Instance, b.Sequence) }

func randomID() string { return strings.ToLower(rand.Text()) }

// register makes this agent the holder of its worker's key: under the epoch of the
// journal if that still stands there, else under a new one, after everything of the
// old epoch that needs a permit has been ended. It tries until the bus answers.
func (a *Agent) register(ctx context.Context) error {
	instance, begun := randomID(), false
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		err := a.tryRegister(ctx, instance, &begun)
		if err == nil || errors.Is(err, ErrNameTaken) || ctx.Err() != nil {
			return err
		}
		a.log.Warn().Err(err).Msg("register")
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// tryRegister is one try. begun says that a try before has begun a new epoch.
func (a *Agent) tryRegister(ctx context.Context, instance string, begun *bool) error {
	key := string(a.cfg.Worker)
	now, err := a.table.Get(ctx, key)
	known := !errors.Is(err, bus.ErrNotFound)
	if err != nil && known {
		return fmt.Errorf("read own beat: %w", err)
	}
	a.mu.Lock()
	epoch := a.epoch
	a.mu.Unlock()

	ours := known && epoch != "" && now.Value.Epoch == epoch && !now.Value.Lost()
	if !ours {
		if known && !now.Value.Lost() && now.Value.Epoch != epoch {
			if now, err = a.observe(ctx, now); err != nil {
				return err
			}
		}
		// The beat of a try before may still be on its way, and is one of this process: it
		// would be taken for the beat of this try, and must not name another epoch.
		if !*begun || known && !now.Value.Epoch.Before(epoch) {
			if epoch, err = a.renew(ctx, max(epoch, now.Value.Epoch)); err != nil {
				return err
			}
			*begun = true
		}
	}
	first := schemas.Beat{
		Worker: a.cfg.Worker, Epoch: epoch, Instance: instance, Sequence: 1, Version: a.cfg.Version,
		Since: time.Now().UTC(), Host: a.host,
	}
	if ours {
		first.Since = now.Value.Since
	}
	sent := a.rt.Now()
	a.fill(&first)
	var e bus.Entry[schemas.Beat]
	if known {
		e, err = a.table.Replace(ctx, now, first, beatOp(first))
	} else {
		e, err = a.table.Create(ctx, key, first, beatOp(first))
	}
	if err != nil {
		return fmt.Errorf("send the first beat: %w", err)
	}
	a.acknowledged(e, sent)
	a.log.Info().Str("epoch", string(epoch)).Bool("same", ours).Msg("registered")
	a.sayKept()
	return nil
}

// observe waits for a lease whether somebody else beats under our name.
func (a *Agent) observe(ctx context.Context, e bus.Entry[schemas.Beat]) (bus.Entry[schemas.Beat], error) {
	a.log.Info().Dur("for", a.cfg.Lease).Msg("the name was used before by another registration: see whether its agent is alive")
	tick := time.NewTicker(a.cfg.Beat)
	defer tick.Stop()
	end := time.NewTimer(a.cfg.Lease)
	defer end.Stop()
	changed := false
	// Revisions prove nothing: of two replicas one may be behind, and a bucket that was made
	// anew counts from 1.
	seen := map[string]uint64{e.Value.Instance: e.Value.Sequence}
	for {
		select {
		case <-ctx.Done():
			return e, ctx.Err()
		case <-end.C:
			return e, nil
		case <-tick.C:
			now, err := a.table.Get(ctx, e.Key)
			switch {
			case err != nil:
				return e, err
			case now.Value.Lost():
				return now, nil
			case now.Value.Sequence <= seen[now.Value.Instance]:
			case changed:
				return e, fmt.Errorf("worker %s: %w", a.cfg.Worker, ErrNameTaken)
			default:
				// The last beat of one that has just died may have been under way, or the replica
				// that answered first was behind. Whoever lives beats again.
				changed = true
				seen[now.Value.Instance] = now.Value.Sequence
				end.Reset(a.cfg.Lease)
			}
			e = now // perhaps an older one: a server that was killed lost the newest
		}
	}
}

// renew begins a new epoch: what ran under the old one ends first, save what needs
// no permit, and is forgotten.
func (a *Agent) renew(ctx context.Context, former schemas.Epoch) (schemas.Epoch, error) {
	epoch := schemas.NewEpoch(former, time.Now(), rand.Text())
	a.mu.Lock()
	a.epoch = epoch // what is ordered for the former one is refused from here on
	var old []*attempt
	for id, t := range a.live {
		if !t.noPermit {
			old = append(old, t)
			delete(a.live, id)
		}
	}
	a.mu.Unlock()
	for _, t := range old {
		t.log.Warn().Str("epoch", string(t.Epoch)).Msg("attempt ends with its registration")
		t.supersede()
	}
	for _, t := range old {
		select {
		case <-t.dead:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	keep := map[schemas.Assignment]bool{}
	a.mu.Lock()
	for _, t := range a.live {
		keep[t.Assignment] = true
		t.unsaid.Store(true)
	}
	a.mu.Unlock()
	if err := a.journal.register(registration{Epoch: epoch, Boot: a.boot}, func(e entry) bool { return keep[e.Assignment] }); err != nil {
		return "", err
	}
	return epoch, nil
}

// sayKept reports what is still to be reported under this registration.
func (a *Agent) sayKept() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, t := range a.live {
		if t.unsaid.Load() {
			t.again()
		}
	}
}

// fill puts into a beat what changes from one to the next.
func (a *Agent) fill(b *schemas.Beat) {
	a.mu.Lock()
	defer a.mu.Unlock()
	b.At = time.Now().UTC()
	b.Running = a.used.Tasks
	b.Order = a.newest
	b.Reported = true
	b.Kept = b.Kept[:0:0]
	for _, t := range a.live {
		b.Reported = b.Reported && !t.unsaid.Load()
		if t.Epoch != b.Epoch {
			b.Kept = append(b.Kept, t.Task)
		}
	}
	images := a.rt.Images()
	b.Images, b.Cache = images.Names, images.Cache
	b.Wanted, b.Missing, b.Unnamed = a.wanted.missing()
	b.Host, b.Version = a.host, a.cfg.Version
	b.Host.Credentials = a.rt.Credentials()
	a.advertise(b)
}

// acknowledged keeps an acknowledged beat and lengthens lease and permit: both
// count from the moment it was sent.
func (a *Agent) acknowledged(e bus.Entry[schemas.Beat], sent time.Duration) {
	until := sent + a.cfg.Lease
	a.mu.Lock()
	a.beat, a.lease = e, until
	a.mu.Unlock()
	if err := a.rt.Permit(until); err != nil {
		a.log.Error().Err(err).Msg("write the permit; tasks will end with the old one")
	}
	a.metrics.beats.WithLabelValues("ok").Inc()
}

// beats sends a heartbeat at every tick until ctx ends. A beat takes the lock that
// orders are handled under: an agent that is stuck with its orders does not beat.
func (a *Agent) beats(ctx context.Context) error {
	tick := time.NewTicker(a.cfg.Beat)
	defer tick.Stop()
	reconnected := a.conn.Reconnected()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-reconnected:
			reconnected = a.conn.Reconnected()
		}
		if err := a.sendBeat(ctx); err != nil {
			return err
		}
		a.journal.forget(a.rt.Now())
	}
}

// sendBeat sends one beat. Only an error that ends the agent comes back.
func (a *Agent) sendBeat(ctx context.Context) error {
	a.mu.Lock()
	last := a.beat
	a.mu.Unlock()
	next := last.Value
	next.Sequence++
	a.fill(&next)
	sent := a.rt.Now()
	try, cancel := context.WithTimeout(ctx, a.cfg.Lease/3)
	defer cancel()
	e, err := a.table.Replace(try, last, next, beatOp(next))
	switch {
	case err == nil:
		a.acknowledged(e, sent)
	case errors.Is(err, bus.ErrConflict):
		a.metrics.beats.WithLabelValues("conflict").Inc()
		return a.dispossessed(ctx)
	case ctx.Err() == nil:
		a.metrics.beats.WithLabelValues("error").Inc()
		a.log.Warn().Err(err).Msg("beat")
	}
	return nil
}

// dispossessed finds out why the own key was written by somebody else: the reaper,
// who declared this worker lost; a first copy of a beat whose answer was lost; a server
// that was killed and gave back what stood there before; or another agent of the same
// name.
func (a *Agent) dispossessed(ctx context.Context) error {
	now, err := a.table.Get(ctx, string(a.cfg.Worker))
	if err != nil {
		if errors.Is(err, bus.ErrNotFound) {
			return a.register(ctx)
		}
		a.log.Warn().Err(err).Msg("read own beat")
		return nil
	}
	a.mu.Lock()
	mine := a.beat.Value.Instance
	older := now.Revision < a.beat.Revision
	epoch := a.epoch
	if now.Value.Instance == mine && !now.Value.Lost() && now.Value.Epoch == epoch {
		a.beat = now // an own beat of unknown outcome
		a.mu.Unlock()
		return nil
	}
	a.mu.Unlock()
	if now.Value.Lost() {
		a.log.Warn().Str("epoch", string(epoch)).Msg("this worker was declared lost: end its tasks and register anew")
		return a.register(ctx)
	}
	if older {
		a.log.Warn().Str("epoch", string(epoch)).Msg("the server has lost this registration: make it again")
		return a.register(ctx)
	}
	return fmt.Errorf("worker %s: %w", a.cfg.Worker, ErrNameTaken)
}
