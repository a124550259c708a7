package gateway

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// batches makes the tasks of batches, and finds out when all of them are final. Of all
// gateways one works, by a lease, so that they do not do everything many times over.
// That two of them work for a moment does no harm: a task is made by create-only under
// an id that follows from its batch and index, and a batch changes by compare-and-set.
//
//	Made             Begun                                     Items
//	 │ tasks exist     │ perhaps                                  │ surely none yet
//
// Begun is written before the tasks are made. So a gateway that takes over knows for
// which items it cannot tell a task that was never made from one whose record went.
type batches struct {
	g        *Gateway
	table    *bus.Table[schemas.Batch]
	items    *bus.Table[[]byte]
	leaders  *bus.Table[schemas.Leadership]
	view     *bus.View[*schemas.Batch] // nil: done
	uploads  chan struct{}             // one for each body that is being read
	identity string
	lease    lease
	wake     chan struct{}
	working  atomic.Bool // there are works: changes of tasks matter
	all      index       // ids of all batches

	mu    sync.Mutex
	open  map[schemas.BatchID]struct{} // under mu: not done
	works map[schemas.BatchID]*work    // under mu
}

// work is one batch that this gateway works on. What the view of tasks tells is under
// the mutex of batches, the rest belongs to run.
type work struct {
	entry  bus.Entry[schemas.Batch]
	made   int
	asked  map[int]struct{} // canceled, and their workers told
	saved  time.Time
	stored bool // its items may still be stored
	req    schemas.BatchRequest
	part   schemas.BatchPart // the one that was last read
	first  int               // index of its first item; -1: none was read

	at      []byte // under mu: a letter of each item; beside those of results:
	queued  int    // under mu: how many are letterQueued
	left    int    // under mu: how many have no result
	missing []int  // under mu: their record went, or was not there
	news    bool   // under mu: results that are not saved
}

const (
	letterNone   = '.'
	letterQueued = 'q'
	letterHeld   = 'h'
)

const (
	makersAtOnce = 16
	beginAhead   = 512 // items for which Begun is written at a time
	saveEvery    = time.Second
	batchRole    = "batches" // key in the bucket of leaders
)

func newBatches(g *Gateway) *batches {
	b := &batches{
		g: g, identity: rand.Text(), wake: make(chan struct{}, 1), uploads: make(chan struct{}, uploadsMost),
		open: map[schemas.BatchID]struct{}{}, works: map[schemas.BatchID]*work{},
		table: bus.NewTable(g.conn, schemas.BucketBatches, bus.JSON(schemas.Batch.Wrote)),
		items: bus.NewTable(g.conn, schemas.BucketBatchItems, bus.Codec[[]byte]{
			Encode: func(v []byte) ([]byte, nats.Header, error) { return v, nil, nil },
			Decode: func(data []byte) ([]byte, error) { return data, nil },
		}),
		leaders: bus.NewTable(g.conn, schemas.BucketLeaders, bus.JSON[schemas.Leadership](nil)),
	}
	b.view = bus.NewView(g.conn, schemas.BucketBatches, func(_ string, _ nats.Header, data []byte) (*schemas.Batch, error) {
		v, err := decodeBatch(data)
		if v.Done() {
			return nil, err
		}
		return &v, err
	}, bus.ViewOptions[*schemas.Batch]{OnChange: b.changed})
	return b
}

func decodeBatch(data []byte) (v schemas.Batch, err error) { return v, schemas.Decode(data, &v) }

// observe folds an own write into the view.
func (b *batches) observe(e bus.Entry[schemas.Batch]) {
	v := &e.Value
	if v.Done() {
		v = nil
	}
	b.view.Observe(e.Key, v, e.Revision)
}

// changed is told of each change of a batch.
func (b *batches) changed(c bus.Change[*schemas.Batch]) {
	if c.Deleted {
		b.all.remove(c.Key)
	} else {
		b.all.add(c.Key)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.Deleted || c.New == nil {
		delete(b.open, schemas.BatchID(c.Key))
	} else {
		b.open[schemas.BatchID(c.Key)] = struct{}{}
	}
	b.poke()
}

func (b *batches) unfinished() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.open)
}

func (b *batches) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// taskChanged is told of each change of a task.
func (b *batches) taskChanged(c bus.Change[*item]) {
	if !b.working.Load() {
		return
	}
	task, err := schemas.ParseTaskID(c.Key)
	if err != nil {
		return
	}
	id, index := schemas.BatchOf(task)
	b.mu.Lock()
	defer b.mu.Unlock()
	w := b.works[id]
	switch {
	case w == nil || index >= len(w.at):
		return
	case c.Deleted:
		w.missing = append(w.missing, index)
	default:
		w.set(index, c.New.state)
	}
	b.poke()
}

// set takes note of an item's state; mu is held. A result stays.
func (w *work) set(index int, s schemas.State) {
	now := schemas.ItemLetter(s)
	switch {
	case s == schemas.Queued:
		now = letterQueued
	case s.Held():
		now = letterHeld
	}
	was := w.at[index]
	if was == now || schemas.ItemDone(was) {
		return
	}
	w.at[index] = now
	if was == letterQueued {
		w.queued--
	}
	if now == letterQueued {
		w.queued++
	}
	if schemas.ItemDone(now) {
		w.left--
		w.news = true
	}
}

// run works on batches until ctx ends.
func (b *batches) run(ctx context.Context) error {
	for _, ready := range []<-chan struct{}{b.g.tasks.Ready(), b.view.Ready()} {
		select {
		case <-ready:
		case <-ctx.Done():
			return nil
		}
	}
	defer b.resign(ctx)
	tick := time.NewTicker(b.g.cfg.BatchLease / 5)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-b.wake:
		}
		b.pass(ctx)
	}
}

// pass does what can be done now for each batch that is not done.
func (b *batches) pass(ctx context.Context) {
	b.mu.Lock()
	open := slices.Sorted(maps.Keys(b.open))
	maps.DeleteFunc(b.works, func(id schemas.BatchID, _ *work) bool {
		_, ok := b.open[id]
		return !ok
	})
	b.mu.Unlock()
	b.working.Store(len(open) > 0)
	if len(open) == 0 {
		b.resign(ctx)
	}
	for _, id := range open {
		if !b.lead(ctx) {
			b.mu.Lock()
			clear(b.works)
			b.mu.Unlock()
			b.working.Store(false)
			return
		}
		if err := b.step(ctx, id); err != nil && ctx.Err() == nil {
			b.g.log.Warn().Err(err).Str("batch", string(id)).Msg("work on a batch, trying again")
		}
	}
}

// step does what can be done now for one batch.
func (b *batches) step(ctx context.Context, id schemas.BatchID) error {
	b.mu.Lock()
	w := b.works[id]
	b.mu.Unlock()
	if w == nil {
		var err error
		if w, err = b.take(ctx, id); err != nil || w == nil {
			return err
		}
	}
	if v, revision, ok := b.view.Get(string(id)); ok && v != nil && revision > w.entry.Revision {
		w.entry.Value, w.entry.Revision = *v, revision // somebody canceled it
		b.mu.Lock()
		w.made, w.news = max(w.made, v.Made), true
		b.mu.Unlock()
	}
	err := b.findMissing(ctx, w)
	if err == nil {
		err = b.makeTasks(ctx, w)
		if w.entry.Value.Cancel != nil { // what runs shall end whatever cannot be made
			err = errors.Join(err, b.cancelTasks(ctx, w))
		}
	}
	return errors.Join(err, b.save(ctx, w, 0))
}

// take begins to work on a batch, wherever another gateway left it; nil if it is done.
func (b *batches) take(ctx context.Context, id schemas.BatchID) (*work, error) {
	e, err := b.table.Get(ctx, string(id))
	if err != nil || e.Value.Done() {
		if err == nil {
			b.observe(e)
		}
		return nil, err
	}
	v := e.Value
	w := &work{entry: e, made: v.Made, asked: map[int]struct{}{}, stored: true, first: -1, at: []byte(v.Results), news: true}
	for _, l := range w.at {
		if !schemas.ItemDone(l) {
			w.left++
		}
	}
	b.mu.Lock()
	b.works[id] = w // from now on it hears of changes
	b.mu.Unlock()
	b.working.Store(true)
	// Between Made and Begun a record that is not there was never made, if so little time
	// has passed that it cannot have come and gone.
	old := time.Since(e.Created) > b.g.cfg.Retention/2
	for i := range v.Begun {
		it, _, ok := b.g.tasks.Get(string(id.Task(i)))
		b.mu.Lock()
		switch {
		case ok:
			w.set(i, it.state)
		case i < v.Made || old:
			w.missing = append(w.missing, i)
		}
		b.mu.Unlock()
	}
	return w, nil
}

// findMissing asks the leader for the records that are not in the view.
func (b *batches) findMissing(ctx context.Context, w *work) error {
	for {
		b.mu.Lock()
		index := -1
		for len(w.missing) > 0 && index < 0 {
			if i := w.missing[0]; !schemas.ItemDone(w.at[i]) {
				index = i
			} else {
				w.missing = w.missing[1:]
			}
		}
		b.mu.Unlock()
		if index < 0 {
			return nil
		}
		state := schemas.ItemGone
		e, err := b.g.records.Get(ctx, string(w.entry.Value.ID.Task(index)))
		switch {
		case err == nil:
			b.g.fold(e)
			state = e.Value.State
		case !errors.Is(err, bus.ErrNotFound):
			return err
		}
		b.mu.Lock()
		w.missing = w.missing[1:]
		w.set(index, state)
		b.mu.Unlock()
	}
}

// makeTasks makes the next tasks, so many that no more than BatchAhead wait for a
// worker. Those of a canceled batch that may have been begun are made too, as canceled
// ones: only then is it sure that nobody makes them later.
func (b *batches) makeTasks(ctx context.Context, w *work) error {
	b.mu.Lock()
	room := b.g.cfg.BatchAhead - w.queued
	b.mu.Unlock()
	v := w.entry.Value
	if w.made == v.Begun && v.Begun < v.Items && v.Cancel == nil && room > 0 {
		if err := b.save(ctx, w, v.Begun+beginAhead); err != nil {
			return err
		}
		v = w.entry.Value
	}
	if v.Cancel != nil {
		room = beginAhead
	}
	n := min(room, v.Begun-w.made)
	if n <= 0 || v.Done() {
		return nil
	}
	var g errgroup.Group
	g.SetLimit(makersAtOnce)
	failed := make([]error, n)
	for i := range n {
		index := w.made + i
		if failed[i] = ctx.Err(); failed[i] != nil {
			break
		}
		b.mu.Lock()
		known := w.at[index] != letterNone
		b.mu.Unlock()
		if known {
			continue
		}
		spec, err := b.spec(ctx, w, index)
		var refused *schemas.Error
		switch {
		case err == nil:
			g.Go(func() error {
				err := b.makeTask(ctx, w, index, spec)
				if e, ok := errors.AsType[*schemas.Error](err); ok && e.Status/100 == 4 && e.Status != http.StatusTooManyRequests {
					// Unless it was made, under another policy, and the view is behind.
					if _, missing := b.g.records.Get(ctx, string(v.ID.Task(index))); errors.Is(missing, bus.ErrNotFound) {
						b.refuse(w, index, err)
						err = nil
					}
				}
				failed[i] = err
				return nil
			})
			continue
		case errors.As(err, &refused):
			b.refuse(w, index, err)
			continue
		case errors.Is(err, bus.ErrNotFound) && v.Cancel != nil: // nobody can make it any more
			b.mu.Lock()
			w.missing = append(w.missing, index)
			b.mu.Unlock()
			continue
		case errors.Is(err, bus.ErrNotFound): // as old as items may get
			_, cancelErr := b.cancel(ctx, v.ID, "gateway")
			err = errors.Join(err, cancelErr)
		}
		failed[i] = err
		break
	}
	_ = g.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, err := range failed {
		if err != nil {
			return err
		}
		w.made++
		w.news = true
	}
	b.poke()
	return nil
}

// refuse lets an item fail that can never be made: the operator's policy is another than
// when it was accepted.
func (b *batches) refuse(w *work, index int, err error) {
	b.g.log.Warn().Err(err).Str("batch", string(w.entry.Value.ID)).Int("item", index).Msg("the item is no longer allowed")
	b.mu.Lock()
	defer b.mu.Unlock()
	w.set(index, schemas.Failed)
}

func (b *batches) makeTask(ctx context.Context, w *work, index int, spec schemas.Spec) error {
	v := w.entry.Value
	id := v.ID.Task(index)
	began := time.Now()
	var e bus.Entry[record]
	var err error
	if v.Cancel == nil {
		e, err = b.g.accept(ctx, id, spec, v.ID, "")
	} else {
		e, err = b.g.acceptCanceled(ctx, id, spec, v.ID, v.Cancel.By)
	}
	var state schemas.State
	switch {
	case err == nil:
		state = e.Value.State
		b.g.metrics.itemMade.Observe(time.Since(began).Seconds())
	case errors.Is(err, bus.ErrConflict): // it was made before
		if e, err = b.g.records.Get(ctx, string(id)); errors.Is(err, bus.ErrNotFound) {
			return fmt.Errorf("%s came and went: %w", id, bus.ErrConflict)
		}
		b.g.fold(e)
		state = e.Value.State
	}
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if w.at[index] == letterNone || state.Final() {
		w.set(index, state)
	}
	return nil
}

// spec gives the spec of an item. Items are asked for in their order, mostly.
func (b *batches) spec(ctx context.Context, w *work, index int) (s schemas.Spec, err error) {
	v := w.entry.Value
	if w.req.Template == nil {
		e, err := b.items.Get(ctx, templateKey(v.Upload))
		if err != nil {
			return s, err
		}
		w.req = schemas.BatchRequest{Template: e.Value, Labels: v.Labels}
	}
	n, first, _ := v.Part(index)
	if w.first != first {
		if w.part, err = b.part(ctx, v.Upload, n); err != nil {
			return s, err
		}
		w.first = first
	}
	return w.req.ParseItem(w.part[index-first], b.g.cfg.Policy)
}

func (b *batches) part(ctx context.Context, upload string, n int) (part schemas.BatchPart, err error) {
	e, err := b.items.Get(ctx, partKey(upload, n))
	if err == nil {
		err = schemas.Decode(e.Value, &part)
	}
	return part, err
}

// dropItems deletes the items of an upload. What stays, because nobody lived to delete
// it, goes with its age.
func (b *batches) dropItems(ctx context.Context, upload string, parts int) {
	for n := -1; n < parts; n++ {
		key := templateKey(upload)
		if n >= 0 {
			key = partKey(upload, n)
		}
		e, err := b.items.Get(ctx, key)
		if err == nil {
			err = b.items.Delete(ctx, key, e.Revision)
		}
		if err != nil && !errors.Is(err, bus.ErrNotFound) {
			b.g.log.Warn().Err(err).Msg("delete items of a batch; they go with their age")
			return
		}
	}
}

// cancel marks a batch as canceled; one that is done stays as it is.
func (b *batches) cancel(ctx context.Context, id schemas.BatchID, by string) (bus.Entry[schemas.Batch], error) {
	m := meta(by)
	e, err := b.table.Update(ctx, string(id), m.Op, func(e bus.Entry[schemas.Batch]) (schemas.Batch, []bus.WriteOption, error) {
		v, err := e.Value.AskCancel(m)
		return v, nil, err
	})
	if errors.Is(err, schemas.ErrFinal) || errors.Is(err, schemas.ErrUnchanged) {
		return e, nil
	}
	if err == nil {
		b.observe(e)
	}
	return e, err
}

// cancelTasks cancels all tasks of a batch that are there.
func (b *batches) cancelTasks(ctx context.Context, w *work) error {
	var todo []int
	b.mu.Lock()
	for i, l := range w.at {
		if _, asked := w.asked[i]; (l == letterQueued || l == letterHeld) && !asked {
			todo = append(todo, i)
		}
	}
	b.mu.Unlock()
	var g errgroup.Group
	g.SetLimit(makersAtOnce)
	failed := make([]error, len(todo))
	for n, index := range todo {
		g.Go(func() error {
			e, err := b.g.change(ctx, w.entry.Value.ID.Task(index), nil, func(rec schemas.Record, m schemas.Meta) schemas.Event {
				return schemas.AskCancel{Meta: m, Grace: rec.Spec.Timeouts.Stop}
			})
			var gone *schemas.Error
			switch {
			case err == nil:
				b.g.order(e)
			case errors.Is(err, schemas.ErrFinal), errors.Is(err, schemas.ErrUnchanged):
			case errors.As(err, &gone) && gone.Code == schemas.CodeNotFound:
			default:
				failed[n] = err
			}
			return nil
		})
	}
	_ = g.Wait()
	for n, index := range todo {
		if failed[n] == nil {
			w.asked[index] = struct{}{}
		}
	}
	return errors.Join(failed...)
}

// save writes what was done and seen, not more often than every second unless it
// matters: begun says up to where items may be begun now. The write that brings the
// last result makes the batch done, and is the one and only that announces it.
func (b *batches) save(ctx context.Context, w *work, begun int) error {
	v := w.entry.Value
	b.mu.Lock()
	step := schemas.BatchStep{Meta: meta("gateway"), Begun: begun, Made: w.made}
	due := begun > v.Begun || w.news && (w.left == 0 || v.Cancel != nil || time.Since(w.saved) >= saveEvery) ||
		w.made < v.Begun && time.Since(w.saved) >= b.g.cfg.Retention/4 // see take
	if due {
		step.Results = []byte(strings.Map(func(r rune) rune {
			if schemas.ItemDone(byte(r)) {
				return r
			}
			return letterNone
		}, string(w.at)))
		w.news = false
	}
	b.mu.Unlock()
	if !due {
		return nil
	}
	before := ""
	e, err := b.table.UpdateFrom(ctx, w.entry, step.Op, func(e bus.Entry[schemas.Batch]) (schemas.Batch, []bus.WriteOption, error) {
		before = e.Value.Results
		v, err := e.Value.Next(step)
		if v.Done() {
			return v, []bus.WriteOption{bus.TTL(b.g.cfg.Retention)}, err
		}
		return v, nil, err
	})
	if errors.Is(err, schemas.ErrFinal) {
		w.entry = e
		b.observe(e)
		return nil
	}
	if err != nil {
		b.mu.Lock()
		w.news = true
		b.mu.Unlock()
		return err
	}
	w.entry, w.saved = e, time.Now()
	b.observe(e)
	b.count(before, e.Value)
	if v = e.Value; w.stored && (v.Made == v.Items || v.Done()) {
		w.stored = false
		b.dropItems(ctx, v.Upload, len(v.Parts))
	}
	if v.Done() {
		b.g.log.Info().Str("batch", string(v.ID)).Int("items", v.Items).Msg("batch done")
	}
	return nil
}

// count takes a write into account: each result is counted by the write that brought it.
func (b *batches) count(before string, v schemas.Batch) {
	for i := range min(len(before), len(v.Results)) {
		if before[i] != v.Results[i] {
			b.g.metrics.batchItems.WithLabelValues(string(v.Item(i, nil))).Inc()
		}
	}
	if v.Done() {
		b.g.metrics.batchDone.Observe(v.DoneAt.Sub(v.AcceptedAt).Seconds())
	}
}

// lease is by which one gateway works. Nobody compares clocks: it is taken over when it
// was seen unchanged for its length.
type lease struct {
	entry bus.Entry[schemas.Leadership]
	since time.Time // when entry was first seen, or sent by us
	ours  bool
}

// lead says whether this gateway works, and sees to it that it goes on to.
func (b *batches) lead(ctx context.Context) bool {
	l, length := &b.lease, b.g.cfg.BatchLease
	now := time.Now()
	if l.ours && now.Sub(l.since) < length/3 {
		return true
	}
	e, err := b.leaders.Get(ctx, batchRole)
	free := errors.Is(err, bus.ErrNotFound)
	if err != nil && !free {
		return l.ours && now.Sub(l.since) < length
	}
	if e.Revision != l.entry.Revision {
		l.entry, l.since = e, now
	}
	mine := e.Value.Holder == b.identity
	next := schemas.Leadership{Holder: b.identity, Term: e.Value.Term + 1, Beat: e.Value.Beat + 1, Length: schemas.Duration(length)}
	switch {
	case free:
		e, err = b.leaders.Create(ctx, batchRole, next, "")
	case mine:
		next.Term = e.Value.Term
		e, err = b.leaders.Replace(ctx, e, next, "")
	case now.Sub(l.since) >= e.Value.Length.Std():
		e, err = b.leaders.Replace(ctx, e, next, "")
	default:
		err = bus.ErrConflict
	}
	if l.ours = err == nil; l.ours {
		l.entry, l.since = e, now
	}
	return l.ours
}

// resign lets another gateway work at once.
func (b *batches) resign(ctx context.Context) {
	if !b.lease.ours {
		return
	}
	b.lease.ours = false
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := b.leaders.Delete(ctx, batchRole, b.lease.entry.Revision); err != nil {
		b.g.log.Debug().Err(err).Msg("resign from batches; the lease ends by itself")
	}
}
