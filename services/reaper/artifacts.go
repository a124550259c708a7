package reaper

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// mostChunks is how many chunks an attempt of a task has at the most, its list among them:
// a worker has no more room than the tasks that it was given.
func mostChunks(rec schemas.Record) int {
	most := int64(schemas.MaxArtifactBytes)
	if disk := int64(rec.Spec.Resources.Disk); disk > 0 {
		most = min(most, disk)
	}
	return int((2*most+schemas.MaxArtifactList)/schemas.ArtifactChunk) + 2
}

// Between two passes the collector looks how full the store is, and makes another one when
// it is fuller than busyFrom and has filled by busyStep since: a worker that stores what
// nobody asked for, faster than the disk takes it in one such time, does not shut others out.
const (
	busyLooks = 60 // in the time between two passes
	busyFrom  = 0.5
	busyStep  = 0.05
)

// purgesAtOnce is how many tasks are looked at, and purged, at a time.
const purgesAtOnce = 16

// collector takes away the artifacts that no record names: those of a task whose record is
// gone, of an attempt that the record has left, and what a worker made up. What it takes
// away can never be asked for again, so it needs no more than a read.
type collector struct {
	r      *Reaper
	looked uint64  // the sequence up to which each subject was looked at
	filled float64 // after the last pass

	mu sync.Mutex
	// kept are the final tasks that were looked at, with how many subjects they had then
	// and until when their records are there.
	kept map[schemas.TaskID]keptTask // under mu
	// wrong are the chunks that no honest worker stores, by worker, since the last pass.
	wrong map[string]int // under mu
}

type keptTask struct {
	subjects int
	until    time.Time
}

// holding is what stands under one task: subjects by worker and attempt.
type holding map[claim]int

type claim struct {
	worker  schemas.WorkerID
	attempt int
}

func (h holding) total() (n int) {
	for _, of := range h {
		n += of
	}
	return n
}

// collect looks at all artifacts once in a while, and when there are many more of them,
// until ctx ends.
func (r *Reaper) collect(ctx context.Context) error {
	select {
	case <-r.tasks.Ready():
	case <-ctx.Done():
		return nil
	}
	c := &collector{r: r, kept: map[schemas.TaskID]keptTask{}}
	every, often := time.NewTicker(r.cfg.Collect), time.NewTicker(max(r.cfg.Collect/busyLooks, time.Millisecond))
	defer every.Stop()
	defer often.Stop()
	for {
		if err := c.pass(ctx, time.Now()); err != nil && ctx.Err() == nil {
			r.log.Warn().Err(err).Msg("collect artifacts")
		}
		for due := false; !due; {
			select {
			case <-every.C:
				due = true
			case <-often.C:
				due = c.filling(ctx)
			case <-ctx.Done():
				return nil
			}
		}
	}
}

// filling says whether the store is so full, and fills so fast, that the next pass is due.
func (c *collector) filling(ctx context.Context) bool {
	s, err := c.state(ctx)
	return err == nil && s.Filled() >= busyFrom && s.Filled() >= c.filled+busyStep
}

func (c *collector) state(ctx context.Context) (bus.StreamState, error) {
	s, err := c.r.conn.StreamState(ctx, schemas.StreamArtifacts)
	if err == nil {
		c.r.metrics.artifactsFilled.Set(s.Filled())
	}
	return s, err
}

// pass looks at all artifacts that there are now, the tasks with the most of them first.
func (c *collector) pass(ctx context.Context, now time.Time) error {
	c.wrong = map[string]int{}
	failed := c.tidy(ctx)
	subjects, err := c.r.conn.Subjects(ctx, schemas.StreamArtifacts, schemas.ArtifactFilter("*", "*", "*"))
	if err != nil {
		return err
	}
	tasks := map[schemas.TaskID]holding{}
	for subject := range subjects {
		w, t, attempt, ok := schemas.ParseArtifactSubject(subject)
		if !ok {
			continue // it came just now
		}
		if tasks[t] == nil {
			tasks[t] = holding{}
		}
		tasks[t][claim{w, attempt}]++
	}
	c.r.metrics.artifactChunks.Set(float64(len(subjects)))
	for t := range c.kept {
		if tasks[t] == nil {
			delete(c.kept, t)
		}
	}
	var g errgroup.Group
	g.SetLimit(purgesAtOnce)
	for _, t := range slices.SortedFunc(maps.Keys(tasks), func(a, b schemas.TaskID) int { return cmp.Compare(tasks[b].total(), tasks[a].total()) }) {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error { return c.task(ctx, t, tasks[t], now) })
	}
	failed = errors.Join(failed, g.Wait())
	for w, n := range c.wrong {
		c.r.log.Warn().Str("worker", w).Int("chunks", n).Msg("worker stored artifacts that no task of it can have")
	}
	if s, err := c.state(ctx); err == nil {
		c.filled = s.Filled()
	}
	return failed
}

// task looks at one. The record is read after the subjects were listed, from who leads:
// so an attempt that the list has and the record does not is one that never was.
func (c *collector) task(ctx context.Context, t schemas.TaskID, h holding, now time.Time) error {
	total := h.total()
	c.mu.Lock()
	k, ok := c.kept[t]
	delete(c.kept, t)
	if ok = ok && k.subjects == total && now.Before(k.until); ok {
		c.kept[t] = k
	}
	c.mu.Unlock()
	if ok {
		return nil
	}
	e, err := c.r.table.Get(ctx, string(t))
	if errors.Is(err, bus.ErrNotFound) {
		return c.purge(ctx, "*", t, "*", "record_gone")
	}
	if err != nil {
		return err
	}
	rec := e.Value
	for of, n := range h {
		why := "superseded"
		if of.worker == rec.Worker && of.attempt == rec.Attempt && (rec.State.Held() || rec.State.Final() && listed(rec.ArtifactSum)) {
			if n <= mostChunks(rec) {
				continue
			}
			why = "excess"
			c.blame(string(of.worker), n)
		}
		if err := c.purge(ctx, of.worker, t, strconv.Itoa(of.attempt), why); err != nil {
			return err
		}
		total -= n
	}
	if rec.State.Final() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.kept[t] = keptTask{subjects: total, until: rec.EndedAt.Add(c.r.cfg.Retention)}
	}
	return nil
}

// blame counts what no honest worker stores.
func (c *collector) blame(worker string, chunks int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wrong[worker] += chunks
}

// listed says whether anything of what is stored can be found: where a store was full, or no
// time was left, what had come by then would only take the room of others.
func listed(s *schemas.ArtifactSum) bool { return s != nil && s.ListBytes > 0 }

func (c *collector) purge(ctx context.Context, w schemas.WorkerID, t schemas.TaskID, attempt, why string) error {
	err := c.r.conn.Purge(ctx, schemas.StreamArtifacts, schemas.ArtifactFilter(w, t, attempt))
	if err == nil {
		c.r.metrics.collected.WithLabelValues(why).Inc()
	}
	return err
}

// tidy removes each message whose subject is not that of a chunk, by its sequence: a
// purge would take "*" for the artifacts of all. A server stores a subject with a DEL byte
// and does not list it, and its count of subjects can be led astray with wildcards: so each
// message is looked at itself, once.
func (c *collector) tidy(ctx context.Context) error {
	s, err := c.state(ctx)
	if err != nil {
		return err
	}
	if s.Last < c.looked { // the stream was made anew
		c.looked = 0
	}
	last := c.looked
	var odd []uint64
	err = c.r.conn.Read(ctx, bus.ReadOptions{Stream: schemas.StreamArtifacts, HeadersOnly: true, FromSequence: c.looked + 1}, func(m bus.Msg) error {
		last = m.Sequence
		if _, _, _, ok := schemas.ParseArtifactSubject(m.Subject); !ok {
			odd = append(odd, m.Sequence)
			worker, _, _ := strings.Cut(strings.TrimPrefix(m.Subject, schemas.ArtifactSubjects), ".")
			c.blame(worker, 1)
		}
		return nil
	})
	if err == nil {
		err = c.r.conn.DeleteMsgs(ctx, schemas.StreamArtifacts, odd)
	}
	if err == nil {
		c.looked = last
		c.r.metrics.collected.WithLabelValues("unknown").Add(float64(len(odd)))
	}
	return err
}
