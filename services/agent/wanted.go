package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// wanted makes the images present that the control plane wants here, one at a time and
// behind everything that a task waits for.
type wanted struct {
	agent *Agent
	table *bus.Table[schemas.WantedImages]

	mu       sync.Mutex
	revision uint64                // under mu: of the list that was read last
	items    []schemas.WantedImage // under mu: those for this worker, one for each name
	failed   map[string]failure    // under mu: by image
	pulling  string                // under mu: the image whose turn it is
	pull     *schemas.Pull         // under mu: how far that is
}

// failure is that of the last try.
type failure struct {
	why   string
	tries int
	until time.Duration // of the next try, on the runtime's clock
}

// How often things are done, in beats: so that one factor scales all.
const (
	wantedEvery  = 3   // between two looks at the list
	wantedFirst  = 6   // before an image that failed is tried again; then twice that, and so on
	wantedMost   = 720 // an hour
	wantedWithin = 360 // for one pull: half an hour
)

func newWanted(a *Agent) *wanted {
	return &wanted{agent: a, table: bus.NewTable(a.conn, schemas.BucketImages, bus.JSON[schemas.WantedImages](nil)), failed: map[string]failure{}}
}

// run reads the list and pulls until ctx ends.
func (w *wanted) run(ctx context.Context) error {
	var pulls sync.WaitGroup
	defer pulls.Wait()
	var done <-chan struct{} // closed at the end of the pull that is under way
	reconnected := w.agent.conn.Reconnected()
	for {
		if err := w.read(ctx); err != nil && ctx.Err() == nil {
			w.agent.log.Warn().Err(err).Msg("read which images are wanted")
		}
		if done == nil {
			if item, ok := w.next(); ok {
				over := make(chan struct{})
				done = over
				pulls.Go(func() {
					defer close(over)
					w.obtain(ctx, item)
				})
			}
		}
		// Not all agents shall ask at once.
		every := wantedEvery * w.agent.cfg.Beat
		tick := time.NewTimer(every - every/8 + rand.N(every/4+1))
		select {
		case <-ctx.Done():
		case <-tick.C:
		case <-done:
			done = nil
		case <-reconnected:
			reconnected = w.agent.conn.Reconnected()
		}
		tick.Stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// read takes the list as it stands now.
func (w *wanted) read(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	e, err := w.table.Get(ctx, schemas.KeyWanted)
	if err != nil && !errors.Is(err, bus.ErrNotFound) {
		return err
	}
	var items []schemas.WantedImage
	var names []string
	for _, i := range e.Value.Items[:min(len(e.Value.Items), schemas.MaxWanted)] {
		if i.On(w.agent.cfg.Worker, w.agent.host) && !slices.Contains(names, i.Image) {
			items, names = append(items, i), append(names, i.Image)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if e.Revision < w.revision && err == nil {
		return nil // of a replica that is behind
	}
	w.agent.rt.Keep(names)
	w.revision, w.items = e.Revision, items
	for image := range w.failed {
		if !slices.Contains(names, image) {
			delete(w.failed, image)
		}
	}
	return nil
}

// next gives the image whose turn it is: none while a task waits for one.
func (w *wanted) next() (schemas.WantedImage, bool) {
	if w.agent.pulling.Load() > 0 {
		return schemas.WantedImage{}, false
	}
	images, now := w.agent.rt.Images(), w.agent.rt.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, i := range w.items {
		if !images.Has(i.Image) && now >= w.failed[i.Image].until {
			w.pulling, w.pull = i.Image, nil
			return i, true
		}
	}
	return schemas.WantedImage{}, false
}

// obtain makes one image present.
func (w *wanted) obtain(ctx context.Context, i schemas.WantedImage) {
	ctx, cancel := context.WithTimeoutCause(ctx, wantedWithin*w.agent.cfg.Beat, errors.New("it took too long"))
	defer cancel()
	began := time.Now()
	_, err := w.agent.rt.Image(ctx, schemas.Spec{Image: i.Image, Pull: schemas.PullMissing, Credentials: i.Credentials}, nil, func(p Progress) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.pull = p.Pull
	})
	if ctx.Err() != nil && err != nil {
		err = context.Cause(ctx)
	}
	result := "ok"
	if err != nil {
		result = "failed"
	}
	w.agent.metrics.wanted.WithLabelValues(result).Inc()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pulling, w.pull = "", nil
	if err == nil {
		w.failed[i.Image] = failure{until: w.agent.rt.Now() + w.agent.cfg.Beat} // until the runtime lists it
		w.agent.log.Info().Str("image", i.Image).Dur("took", time.Since(began)).Msg("wanted image is here")
		return
	}
	f := w.failed[i.Image]
	wait := min(time.Duration(wantedFirst)<<min(f.tries, 16), wantedMost) * w.agent.cfg.Beat
	why := fmt.Sprint(err)
	if fault, ok := errors.AsType[*StartError](err); ok {
		why = fault.Message
	}
	w.failed[i.Image] = failure{why: text(why, schemas.MaxMissingText), tries: f.tries + 1, until: w.agent.rt.Now() + wait}
	w.agent.log.Warn().Str("image", i.Image).Str("error", why).Msg("wanted image cannot be had")
}

// missing says for the beat what is wanted here and not present: what is pulled and what
// has failed first. unnamed is how much of it the list has no room for.
func (w *wanted) missing() (revision uint64, list []schemas.MissingImage, unnamed int) {
	images := w.agent.rt.Images()
	w.mu.Lock()
	defer w.mu.Unlock()
	var waiting []schemas.MissingImage
	for _, i := range w.items {
		if images.Has(i.Image) {
			continue
		}
		m := schemas.MissingImage{Image: i.Image, State: schemas.MissingWaits}
		switch f := w.failed[i.Image]; {
		case i.Image == w.pulling:
			m.State, m.Pull = schemas.MissingPulling, w.pull
			list = slices.Insert(list, 0, m)
		case f.why != "":
			m.State, m.Message = schemas.MissingFailed, f.why
			list = append(list, m)
		default:
			waiting = append(waiting, m)
		}
	}
	list = append(list, waiting...)
	named := min(len(list), schemas.MaxBeatMissing)
	return w.revision, list[:named], len(list) - named
}
