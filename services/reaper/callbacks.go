package reaper

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	mathrand "math/rand/v2"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
)

// Callbacks says how the ends of tasks are announced. Zero values are the defaults.
type Callbacks struct {
	Allow   []netip.Prefix // addresses besides the public ones that may be reached
	Timeout time.Duration  // of one try
	First   time.Duration  // the first pause after a failure; each is twice the one before
	Most    time.Duration  // the longest pause
	For     time.Duration  // how long it is tried at most
	// Form gives the request that announces a task of another system's protocol. The usual one
	// goes out if it is nil, or gives no method.
	Form func(schemas.Task) (method string, body []byte, err error)
}

func defaultCallbacks() Callbacks {
	return Callbacks{Timeout: 10 * time.Second, First: time.Second, Most: 10 * time.Minute, For: 24 * time.Hour}
}

func (c Callbacks) withDefaults() Callbacks {
	d := defaultCallbacks()
	c.Timeout, c.First = cmp.Or(c.Timeout, d.Timeout), cmp.Or(c.First, d.First)
	c.Most, c.For = cmp.Or(c.Most, d.Most), cmp.Or(c.For, d.For)
	return c
}

const (
	perHost = 8  // tries at a time to one host
	atOnce  = 64 // in all
	// refusals is how often in a row a callback is refused until that is believed.
	refusals = 3
	// claimSlack is how long after a try its outcome may be written.
	claimSlack = 5 * time.Second
)

// courier delivers the callbacks of final tasks and of batches that are done, at least once. The records say which
// there are, by a header; the bucket "callbacks" says what became of each. Before a try
// the courier claims it there by compare-and-set, until a time when the try is surely
// over: a reaper that dies with it in its hands is followed by any other.
type courier struct {
	cfg       Callbacks
	retention time.Duration
	records   *bus.Table[schemas.Record]
	batches   *bus.Table[schemas.Batch]
	done      *bus.View[string] // schemas.HeaderCallback of each batch
	table     *bus.Table[schemas.Delivery]
	marks     *bus.View[schemas.Delivery]
	log       zerolog.Logger
	metrics   *metrics
	tracer    *tracing.Tracer
	due       *timers[string]
	lanes     *lanes
	poster    *poster

	mu      sync.Mutex
	pending map[string]announcement // under mu: not delivered yet, as far as is known
}

// announcement is one callback that is due.
type announcement struct {
	since time.Time
	host  string
}

func newCourier(conn *bus.Conn, records *bus.Table[schemas.Record], log zerolog.Logger, cfg Config) *courier {
	c := &courier{
		cfg: cfg.Callbacks.withDefaults(), retention: cfg.Retention, records: records, log: log,
		table: bus.NewTable(conn, schemas.BucketCallbacks, bus.JSON(func(d schemas.Delivery, op string) bool { return d.Op == op })),
		due:   newTimers[string](), lanes: newLanes(perHost, atOnce), pending: map[string]announcement{},
	}
	c.batches = bus.NewTable(conn, schemas.BucketBatches, bus.JSON[schemas.Batch](nil)) // only read here
	c.done = bus.NewView(conn, schemas.BucketBatches, func(_ string, h nats.Header, _ []byte) (string, error) {
		return h.Get(schemas.HeaderCallback), nil
	}, bus.ViewOptions[string]{OnChange: func(b bus.Change[string]) { c.changed(b.Key, b.Old, b.New) }})
	c.poster = newPoster(c.cfg.Allow, c.cfg.Timeout)
	c.marks = bus.NewView(conn, schemas.BucketCallbacks, func(_ string, _ nats.Header, data []byte) (schemas.Delivery, error) {
		return decodeDelivery(data)
	}, bus.ViewOptions[schemas.Delivery]{OnChange: c.marked})
	return c
}

func decodeDelivery(data []byte) (d schemas.Delivery, err error) { return d, schemas.Decode(data, &d) }

// changed is told of each change of a record, with its headers before and after.
func (c *courier) changed(id, old, now string) {
	if now == "" {
		if old != "" {
			c.forget(id)
		}
		return
	}
	since, host, ok := schemas.ParseCallbackHeader(now)
	if mark, _, _ := c.marks.Get(id); !ok || mark.Done() {
		return
	}
	c.mu.Lock()
	c.pending[id] = announcement{since, host}
	c.mu.Unlock()
	c.due.add(id, time.Now())
}

// marked is told of each change of a delivery.
func (c *courier) marked(m bus.Change[schemas.Delivery]) {
	if m.New.Done() {
		c.forget(m.Key)
	} else if _, ok := c.look(m.Key); ok {
		c.due.add(m.Key, c.when(m.New))
	}
}

func (c *courier) look(id string) (announcement, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, ok := c.pending[id]
	return a, ok
}

func (c *courier) forget(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, id)
	c.due.drop(id)
}

// oldest is the age in seconds of the oldest callback that is not delivered yet.
func (c *courier) oldest() float64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	var age time.Duration
	for _, a := range c.pending {
		age = max(age, time.Since(a.since))
	}
	return age.Seconds()
}

// when is the time of the next try. A clock that was wrong when it was written delays
// it by no more than the longest pause.
func (c *courier) when(d schemas.Delivery) time.Time {
	now := time.Now()
	return now.Add(min(max(0, d.NextAt.Sub(now)), max(c.cfg.Most, c.cfg.Timeout+claimSlack)))
}

// run delivers until ctx ends. records is closed once all records have been seen.
func (c *courier) run(ctx context.Context, records <-chan struct{}) error {
	var tries sync.WaitGroup
	defer c.poster.close()
	defer tries.Wait()
	tries.Go(func() { _ = c.marks.Run(ctx) })
	tries.Go(func() { _ = c.done.Run(ctx) })
	for _, ready := range []<-chan struct{}{records, c.done.Ready(), c.marks.Ready()} {
		select {
		case <-ready:
		case <-ctx.Done():
			return nil
		}
	}
	var begin func(ids []string)
	begin = func(ids []string) {
		for _, id := range ids {
			tries.Go(func() {
				next := c.deliver(ctx, id)
				begin(c.lanes.done(id))
				if !next.IsZero() {
					c.due.add(id, next)
				}
			})
		}
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-c.due.wake:
		}
		ids, next := c.due.pop(time.Now(), sweepBatch)
		for _, id := range ids {
			if a, ok := c.look(id); ok {
				begin(c.lanes.add(id, a.host))
			}
		}
		if next.IsZero() {
			timer.Reset(time.Hour)
		} else {
			timer.Reset(time.Until(next))
		}
	}
}

// deliver makes the next try of one callback, if it is time, and says when to look
// again: never, if that is zero.
func (c *courier) deliver(ctx context.Context, id string) (again time.Time) {
	a, ok := c.look(id)
	mark, revision, _ := c.marks.Get(id)
	if mark.Done() { // the mark may have come while changed took it for due
		c.forget(id)
	}
	if !ok || mark.Done() || ctx.Err() != nil {
		return time.Time{}
	}
	if at := c.when(mark); time.Now().Before(at) {
		return at
	}
	m, err := c.compose(ctx, id)
	if errors.Is(err, bus.ErrNotFound) {
		c.forget(id)
		return time.Time{}
	}
	soon := time.Now().Add(retryAfter)
	if err != nil {
		c.warn(ctx, id, err)
		return soon
	}

	claim := mark
	claim.State, claim.Tries, claim.NextAt = schemas.DeliveryPending, mark.Tries+1, time.Now().Add(c.cfg.Timeout+claimSlack).UTC()
	claimed, err := c.write(ctx, id, revision, claim)
	if err != nil { // with a conflict: another reaper was quicker
		if !errors.Is(err, bus.ErrConflict) {
			c.warn(ctx, id, err)
		}
		return soon
	}
	span := c.tracer.Start(m.trace, "callback", tracing.Client)
	span.Set("dayfly.callback", id)
	span.SetInt("dayfly.try", claim.Tries)
	o := c.poster.send(ctx, m.method, m.URL, m.header(time.Now(), span.Traceparent()), m.body)
	span.SetInt("http.response.status_code", o.status)
	if o.word != "" {
		span.End(errors.New(o.word))
	} else {
		span.End(nil)
	}

	result, word := c.judge(claim, o, a.since, time.Now().UTC())
	if o.status == 0 && ctx.Err() != nil { // we are told to stop: any other reaper may try at once
		result, word = claim, "interrupted"
		result.NextAt = time.Now().UTC()
	}
	c.metrics.callbacks.WithLabelValues(word).Inc()
	if result.Done() {
		tracing.Log(c.log.Info(), m.trace).Str("callback", id).Str("state", string(result.State)).Int("tries", result.Tries).Str("error", result.LastError).Msg("callback")
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), claimSlack)
	defer cancel()
	if _, err := c.write(ctx, id, claimed.Revision, result); err != nil {
		if !errors.Is(err, bus.ErrConflict) { // else another reaper thinks this one dead
			c.warn(ctx, id, err)
		}
		return claim.NextAt
	}
	if result.Done() {
		c.forget(id)
		return time.Time{}
	}
	return c.when(result)
}

// judge gives the delivery as it is after a try, and a word for the metrics.
func (c *courier) judge(d schemas.Delivery, o outcome, since, now time.Time) (schemas.Delivery, string) {
	d.LastStatus, d.LastError, d.NextAt = o.status, o.word, time.Time{}
	if o.word == "" {
		d.State, d.DeliveredAt = schemas.DeliveryDelivered, now
		return d, string(d.State)
	}
	d.Refusals++
	if !o.refused {
		d.Refusals = 0
	}
	pause := min(c.cfg.Most, c.cfg.First<<min(d.Tries-1, 20))
	pause = pause/2 + mathrand.N(pause/2+1)
	next := now.Add(max(pause, min(o.after, c.cfg.Most)))
	switch {
	case d.Refusals >= refusals:
		d.State = schemas.DeliveryRefused
	case next.After(since.Add(min(c.cfg.For, c.retention))):
		d.State = schemas.DeliveryGaveUp
	default:
		d.NextAt = next
		return d, "retry"
	}
	return d, string(d.State)
}

// write replaces the delivery at a revision, 0 if there is none yet. It outlives what
// it is about, since that was written before.
func (c *courier) write(ctx context.Context, id string, revision uint64, d schemas.Delivery) (e bus.Entry[schemas.Delivery], err error) {
	d.Op = rand.Text()[:12]
	if revision == 0 {
		e, err = c.table.Create(ctx, id, d, d.Op, bus.TTL(c.retention))
	} else {
		e, err = c.table.Replace(ctx, bus.Entry[schemas.Delivery]{Key: id, Revision: revision}, d, d.Op, bus.TTL(c.retention))
	}
	if err == nil {
		c.marks.Observe(id, e.Value, e.Revision)
	}
	return e, err
}

func (c *courier) warn(ctx context.Context, id string, err error) {
	if ctx.Err() == nil {
		c.log.Warn().Err(err).Str("callback", id).Msg("deliver")
	}
}

// message is what is sent.
type message struct {
	schemas.Callback
	method string
	fields map[string]string // headers
	body   []byte
	trace  string // W3C traceparent, empty if there is none
}

// compose makes the message of a final record: the same one each time.
func (c *courier) compose(ctx context.Context, id string) (m message, err error) {
	if strings.HasPrefix(id, "b-") {
		return c.composeBatch(ctx, id)
	}
	e, err := c.records.Get(ctx, id)
	if err != nil {
		return m, err
	}
	if e.Value.Spec.Callback == nil {
		return m, bus.ErrNotFound
	}
	m.Callback, m.trace = *e.Value.Spec.Callback, e.Value.Trace
	m.fields = map[string]string{
		schemas.CallbackDelivery: "d-" + id, schemas.CallbackTask: id, schemas.CallbackAttempt: strconv.Itoa(e.Value.Attempt),
	}
	t := e.Value.View(e.Revision, time.Now()).WithoutBodies()
	if c.cfg.Form != nil {
		if m.method, m.body, err = c.cfg.Form(t); err != nil || m.method != "" {
			return m, err
		}
	}
	m.method = http.MethodPost
	m.body, err = schemas.Encode(t)
	return m, err
}

func (c *courier) composeBatch(ctx context.Context, id string) (m message, err error) {
	e, err := c.batches.Get(ctx, id)
	if err != nil {
		return m, err
	}
	if e.Value.Callback == nil {
		return m, bus.ErrNotFound
	}
	m.Callback, m.method = *e.Value.Callback, http.MethodPost
	m.fields = map[string]string{schemas.CallbackDelivery: "d-" + id, schemas.CallbackBatch: id}
	v := e.Value.View(e.Revision, nil)
	v.Callback = nil
	m.body, err = schemas.Encode(v)
	return m, err
}

func (m message) header(now time.Time, trace string) http.Header {
	h := http.Header{"Content-Type": {"application/json"}, "User-Agent": {"dayfly"}}
	for name, v := range m.fields {
		h.Set(name, v)
	}
	if trace != "" {
		h.Set("Traceparent", trace)
	}
	if m.Secret != "" {
		h.Set(schemas.CallbackSignature, m.Signature(now, m.body))
	}
	return h
}
