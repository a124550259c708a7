package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
)

// record is a task's record with its bytes, so that what is written is encoded once
// and what is read is kept as it came.
type record struct {
	schemas.Record
	raw []byte
}

func sealRecord(r schemas.Record) (record, error) {
	raw, err := schemas.Encode(r)
	if err != nil {
		return record{}, fmt.Errorf("encode record %s: %w", r.ID, err)
	}
	return record{Record: r, raw: raw}, nil
}

func openRecord(raw []byte) (record, error) {
	r := record{raw: raw}
	if err := schemas.Decode(raw, &r.Record); err != nil {
		return record{}, fmt.Errorf("decode record: %w", err)
	}
	return r, nil
}

// item is what the view keeps of a task. Its state comes from a header; the record is
// decoded only for an answer that shows it.
type item struct {
	state  schemas.State
	holder string // "<worker> <epoch>" while a worker holds it
	ports  string // schemas.HeaderPorts
	blobs  string // schemas.HeaderBlobs
	// instance is the key of which the task is the instance, or was; empty for any other.
	instance string
	body     atomic.Pointer[body]

	// Only taskChanged looks at these.
	size    *schemas.Resources // nil: not known yet
	counted schemas.WorkerID   // whose assigned sums it stands in
	gone    bool               // another revision has taken its place
	cached  int                // bytes that it takes in recent
}

// body is an encoded record. A short one has only what lists show.
type body struct {
	raw   []byte
	short bool
}

func newItem(h nats.Header, raw []byte) *item {
	it := &item{state: schemas.State(h.Get(schemas.HeaderState)), holder: h.Get(schemas.HeaderHolder), ports: h.Get(schemas.HeaderPorts), blobs: strings.Clone(h.Get(schemas.HeaderBlobs)), instance: h.Get(schemas.HeaderInstance)}
	it.body.Store(&body{raw: raw})
	return it
}

// decodeItem is the view's decoder. Whoever sees a task in the view finds its endpoints.
func (g *Gateway) decodeItem(key string, h nats.Header, data []byte) (*item, error) {
	if h.Get(schemas.HeaderState) == "" {
		r, err := openRecord(data)
		if err != nil {
			return nil, err
		}
		h = r.Headers()
	}
	it := newItem(h, bytes.Clone(data))
	g.endpoints.learn(schemas.TaskID(key), it)
	return it, nil
}

// whole gives the record if the view has all of it.
func (it *item) whole() (record, bool) {
	b := it.body.Load()
	if b == nil || b.short {
		return record{}, false
	}
	r, err := openRecord(b.raw)
	return r, err == nil
}

// ready says whether the task is.
func (it *item) ready() bool {
	b := it.body.Load()
	if b == nil {
		return false // another revision has taken its place
	}
	r, err := b.listed()
	return err == nil && r.Ready()
}

// listed gives the record as lists show it.
func (b *body) listed() (schemas.Record, error) {
	r, err := openRecord(b.raw)
	if err == nil && !b.short {
		shorten(&r.Record)
	}
	return r.Record, err
}

// shorten takes from a record what lists do not show: history, output, and the
// bodies in its spec.
func shorten(r *schemas.Record) {
	r.History, r.LastOps, r.Holders, r.Avoid, r.Unknown = nil, nil, nil, nil, nil
	r.Stdout, r.Stderr, r.Artifacts = "", "", nil
	r.Spec.Stdin, r.Spec.Files, r.Spec.Secrets, r.Spec.Env = "", nil, nil, nil
	r.Spec.Callback, r.Spec.Judge, r.Spec.Unknown = nil, nil, nil
	if r.Result != nil {
		r.Result = &schemas.JudgeResult{Verdict: r.Result.Verdict}
	}
}

// recent bounds the memory of the view: the newest items keep their whole record, up
// to a number of bytes; older ones keep the short form, about 0.7 KB of a usual
// task. It belongs to the goroutine of taskChanged.
type recent struct {
	limit, bytes int
	items        []*item // oldest first; some may be gone
	live         int
}

func newRecent(limit int) *recent { return &recent{limit: limit} }

func (c *recent) changed(old, now *item) {
	if old != nil {
		old.gone = true
		old.body.Store(nil) // whoever holds it looks again
		c.forget(old)
	}
	if now == nil {
		return
	}
	if b := now.body.Load(); b != nil {
		now.cached = len(b.raw)
		c.bytes += now.cached
		c.live++
		c.items = append(c.items, now)
	}
	for c.bytes > c.limit && len(c.items) > 1 {
		oldest := c.items[0]
		c.items[0] = nil
		c.items = c.items[1:]
		if !oldest.gone {
			c.forget(oldest)
			oldest.shrink()
		}
	}
	if len(c.items) > 2*c.live+1024 {
		kept := make([]*item, 0, c.live)
		for _, it := range c.items {
			if !it.gone {
				kept = append(kept, it)
			}
		}
		c.items = kept
	}
}

func (c *recent) forget(it *item) {
	if it.cached > 0 {
		c.bytes -= it.cached
		c.live--
		it.cached = 0
	}
}

// shrink leaves only the short form of the record.
func (it *item) shrink() {
	b := it.body.Load()
	if b == nil || b.short {
		return
	}
	r, err := b.listed()
	if err != nil {
		return // it is shown as it is
	}
	raw, err := schemas.Encode(r)
	if err != nil {
		return
	}
	it.body.Store(&body{raw: raw, short: true})
}

// fold takes an own write or a read of the leader into the view, so that lists show
// no less than what was answered.
func (g *Gateway) fold(e bus.Entry[record]) {
	it := newItem(e.Value.Headers(), e.Value.raw)
	g.endpoints.learn(schemas.TaskID(e.Key), it)
	g.tasks.Observe(e.Key, it, e.Revision)
	g.index.add(e.Key)
}

// fetch reads a task: a final one from the view, where that has it, since it cannot
// change; any other from the leader.
func (g *Gateway) fetch(ctx context.Context, id schemas.TaskID) (bus.Entry[record], error) {
	if it, revision, ok := g.tasks.Get(string(id)); ok && it.state.Final() {
		if r, ok := it.whole(); ok {
			return bus.Entry[record]{Key: string(id), Value: r, Revision: revision}, nil
		}
	}
	if err := g.reach(ctx); err != nil {
		return bus.Entry[record]{}, err
	}
	e, err := g.records.Get(ctx, string(id))
	if err != nil {
		return e, readError(err)
	}
	g.fold(e)
	return e, nil
}

// change applies one event to a record, from its newest revision, if the client takes
// that one. Where Next refuses it the entry comes back as it is, with the sentinel.
func (g *Gateway) change(ctx context.Context, id schemas.TaskID, takes precondition, event func(schemas.Record, schemas.Meta) schemas.Event) (bus.Entry[record], error) {
	if err := g.reach(ctx); err != nil {
		return bus.Entry[record]{}, err
	}
	m := meta("client")
	before := schemas.State("")
	e, err := g.records.Update(ctx, string(id), m.Op, func(e bus.Entry[record]) (record, []bus.WriteOption, error) {
		r := e.Value
		if err := takes.check(e); err != nil {
			return r, nil, err
		}
		before, m.On = r.State, e.Revision
		next, err := schemas.Next(r.Record, event(r.Record, m))
		if err != nil {
			return r, nil, err
		}
		sealed, err := sealRecord(next)
		if next.State.Final() {
			return sealed, []bus.WriteOption{bus.TTL(g.cfg.Retention)}, err
		}
		return sealed, nil, err
	})
	var refused *schemas.TransitionError
	switch {
	case err == nil:
		g.fold(e)
		if before != e.Value.State {
			if e.Value.State.Final() {
				g.metrics.finished.WithLabelValues(string(e.Value.State), string(e.Value.Reason)).Inc()
			}
			tracing.Log(g.log.Info(), e.Value.Trace).Str("task", string(id)).Str("from", string(before)).Str("state", string(e.Value.State)).
				Str("reason", string(e.Value.Reason)).Msg("task")
		}
		return e, nil
	case errors.As(err, &refused), errors.Is(err, errPrecondition):
		g.fold(e)
		return e, err
	}
	return e, busError(err, id)
}
