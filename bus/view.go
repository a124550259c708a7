package bus

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Change is one key that got another value or went. Revision is that of the new
// value or of the mark of the deletion; it is that of Old where a key went without a
// mark. Header is nil when the change came by Observe.
type Change[V any] struct {
	Key             string
	Old, New        V
	HadOld, Deleted bool
	Revision        uint64
	Header          nats.Header
}

// ViewOptions of NewView; the zero value is fine.
type ViewOptions[V any] struct {
	// OnChange is called for each change in the order in which the view took them, from
	// one goroutine of Run, outside locks. That is the order of revisions per key; over
	// several keys an observed change may come before older ones of the consumer. It must be quick: the view waits for it once
	// some thousand changes are queued. Get may already show a newer value.
	OnChange func(Change[V])
	// Prefix restricts the view to keys that begin with it. One that ends in "." spares
	// the others the way over the wire.
	Prefix string
}

// ErrForget from a view's decode: keep nothing of this key. A key that was there
// changes as one that was deleted, with this message's header. So a view stays small
// whose bucket also holds much that is of no more use to it.
var ErrForget = errors.New("the view keeps nothing of this key")

// View is an in-memory copy of a bucket. Call Run once, wait for Ready, then ask.
// Per key a view only goes forward. It resumes at the next message when the server
// was away, and finds out which keys went meanwhile; where revisions may have been
// lost with the server (a stream stored without waiting for the disk, a stream made
// anew) it reads everything again and drops what is not there any more. Meanwhile it
// answers from what it has.
//
// On a cluster it reads from whichever replica the server chose, perhaps one that has
// just been restarted. So it has caught up only when it has what the leader had, and
// never goes back to what such a replica believes.
type View[V any] struct {
	c      *Conn
	bucket string
	decode func(key string, h nats.Header, data []byte) (V, error)
	opts   ViewOptions[V]
	ready  chan struct{}

	mu      sync.Mutex
	entries map[string]viewEntry[V]
	waiters map[string]map[chan struct{}]struct{}

	forgotten map[string]grave // keys of Forget that the consumer may have older revisions of
	digging   int              // so many graves before those are looked for that are not needed any more
	forgets   int              // messages since the first one of the stream of which nothing is kept

	gen       uint64 // number of the last rebuild; an entry of an older one is not confirmed yet
	applied   uint64 // the consumer has passed this revision
	floor     uint64 // and had passed this one before it began anew; 0 once it has caught up
	pending   uint64 // messages until the session has caught up
	caughtUp  bool   // this session has
	sessions  int
	clustered func() bool // whether the server is one of several
	rebuild   bool        // the next session starts from the first message
	behind    time.Time   // since when it has not had all there is; zero: it has
	waiting   uint64      // messages that were behind the last one
	async     bool        // the stream is stored without waiting for the disk
	replica   bool        // this session reads from a replica, which may be behind
	whole     bool        // next decided that the session starts from the first message
	created   time.Time   // of the stream
	sure      bool        // the stream is the one of the sessions before

	queue   []viewEvent[V]
	wake    chan struct{} // has one token while queue is not empty
	space   *sync.Cond
	stopped bool
	passed  uint64 // OnChange has returned for everything up to here, in this session
	told    bool   // and for what was found gone when the session had caught up
	passers map[*passer]struct{}
}

type viewEntry[V any] struct {
	value    V
	revision uint64
	gen      uint64
	stored   int64 // the server's time; 0 when observed
}

// grave is what Forget leaves of a key until the consumer has passed its revision.
type grave struct {
	revision uint64
	gen      uint64
}

// viewEvent is a change to tell, or a step of the consumer in one session: in another
// the same revision may be of another stream.
type viewEvent[V any] struct {
	change  *Change[V]
	passed  uint64
	session int
	then    func()
}

type passer struct {
	revision uint64
	done     chan struct{}
}

const (
	viewQueue     = 4096
	smallView     = 2000 // up to here reading all again costs less than thinking
	auditInterval = time.Minute
	lagInterval   = 100 * time.Millisecond
	fewGraves     = 1024

	replicaInterval = 10 * time.Millisecond
)

// NewView makes a view of a bucket. decode turns a message into a value, which may be
// less than the record: the header often has all that is needed. A message that does
// not decode is logged and leaves its key as it was; of one for which it returns
// ErrForget the view keeps nothing. decode must not keep data.
func NewView[V any](c *Conn, bucket string, decode func(key string, h nats.Header, data []byte) (V, error), opts ViewOptions[V]) *View[V] {
	v := &View[V]{
		c: c, bucket: bucket, decode: decode, opts: opts, ready: make(chan struct{}), clustered: c.Clustered,
		entries: map[string]viewEntry[V]{}, waiters: map[string]map[chan struct{}]struct{}{},
		forgotten: map[string]grave{}, digging: fewGraves,
		wake: make(chan struct{}, 1), passers: map[*passer]struct{}{},
	}
	v.space = sync.NewCond(&v.mu)
	return v
}

// Run keeps the view until ctx ends, then returns nil. It waits for a bucket that is
// not there yet and for a server that is away.
func (v *View[V]) Run(ctx context.Context) error {
	var teller sync.WaitGroup
	tellCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	teller.Go(func() { v.tell(tellCtx) })
	unblock := context.AfterFunc(ctx, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.stopped = true
		v.space.Broadcast()
	})
	defer func() { unblock(); stop(); teller.Wait() }()
	v.mu.Lock()
	v.behind = time.Now()
	v.mu.Unlock()
	defer v.c.track(v.status)()
	f := &follower{c: v.c, stream: StreamOf(v.bucket), filter: v.filter(), next: v.next, started: v.started, handle: v.handle, side: v.watch}
	return f.run(ctx)
}

// filter is the subject of what comes over the wire.
func (v *View[V]) filter() string {
	if strings.HasSuffix(v.opts.Prefix, ".") {
		return keySubject(v.bucket, v.opts.Prefix+">")
	}
	return keySubject(v.bucket, ">")
}

// Ready is closed once everything that was there at the start has been seen and
// told to OnChange, also for an empty bucket.
func (v *View[V]) Ready() <-chan struct{} { return v.ready }

// Get returns the value of a key and its revision.
func (v *View[V]) Get(key string) (V, uint64, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	e, ok := v.entries[key]
	return e.value, e.revision, ok
}

// Len is the number of keys.
func (v *View[V]) Len() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.entries)
}

// Range calls fn for each key as they were when it began, in no order, until fn
// returns false. fn may use the view.
func (v *View[V]) Range(fn func(key string, value V, revision uint64) bool) {
	type item struct {
		key string
		viewEntry[V]
	}
	v.mu.Lock()
	items := make([]item, 0, len(v.entries))
	for k, e := range v.entries {
		items = append(items, item{k, e})
	}
	v.mu.Unlock()
	for _, it := range items {
		if !fn(it.key, it.value, it.revision) {
			return
		}
	}
}

// Observe folds in an own write or read, so that a service sees its own writes at
// once. Of two revisions the newer wins; what the consumer has already passed and
// does not have is not taken. A change goes to OnChange like any other, in line with
// those of the consumer and from the same goroutine, so perhaps after Observe returns;
// the consumer's copy of the same revision is then no change any more.
func (v *View[V]) Observe(key string, value V, revision uint64) {
	if !strings.HasPrefix(key, v.opts.Prefix) {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	old, had := v.entries[key]
	if had && revision <= old.revision || !had && revision <= max(v.applied, v.floor, v.forgotten[key].revision) {
		return
	}
	delete(v.forgotten, key)
	v.put(key, viewEntry[V]{value: value, revision: revision, gen: v.gen}, nil)
}

// Forget is Observe for an own write or read of which decode would keep nothing:
// neither an older revision of the consumer nor a late Observe brings the key back.
func (v *View[V]) Forget(key string, revision uint64) {
	if !strings.HasPrefix(key, v.opts.Prefix) {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	old, had := v.entries[key]
	if had && revision < old.revision || !had && revision <= max(v.applied, v.floor, v.forgotten[key].revision) {
		return
	}
	if revision > v.applied {
		v.forgotten[key] = grave{revision: revision, gen: v.gen}
		if len(v.forgotten) >= v.digging {
			v.exhume()
		}
	}
	v.remove(key, revision, nil)
}

// exhume drops the graves that the consumer has passed. It removes most of them
// itself when it meets their message, but one that was replaced or purged meanwhile
// never comes; v.mu is held.
func (v *View[V]) exhume() {
	for key, g := range v.forgotten {
		if g.revision <= v.applied || v.caughtUp && g.gen < v.gen {
			delete(v.forgotten, key)
		}
	}
	v.digging = max(fewGraves, 2*len(v.forgotten))
}

// Wait returns nil when done says so of the key's value, which it asks at once and
// after each change, or the cause of ctx's end. done is called outside locks.
func (v *View[V]) Wait(ctx context.Context, key string, done func(value V, revision uint64, exists bool) bool) error {
	changed := make(chan struct{}, 1)
	v.mu.Lock()
	if v.waiters[key] == nil {
		v.waiters[key] = map[chan struct{}]struct{}{}
	}
	v.waiters[key][changed] = struct{}{}
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		delete(v.waiters[key], changed)
		if len(v.waiters[key]) == 0 {
			delete(v.waiters, key)
		}
	}()
	for {
		if done(v.Get(key)) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// CaughtUp waits until the consumer has passed revision and OnChange has returned for
// it, or there is nothing up to there that it has not passed.
func (v *View[V]) CaughtUp(ctx context.Context, revision uint64) error {
	p := &passer{revision: revision, done: make(chan struct{})}
	v.mu.Lock()
	if v.passed >= revision {
		v.mu.Unlock()
		return nil
	}
	v.passers[p] = struct{}{}
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		delete(v.passers, p)
	}()
	// The message may be gone already, replaced by a later one of its key that is gone
	// too: then nothing comes, and only the server can tell.
	tick := time.NewTicker(lagInterval)
	defer tick.Stop()
	for {
		select {
		case <-p.done:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
		last, err := v.c.lastStored(ctx, StreamOf(v.bucket), v.filter())
		if err != nil {
			continue
		}
		v.mu.Lock()
		nothing := v.told && v.passed >= last
		v.mu.Unlock()
		if nothing {
			return nil
		}
	}
}

// put applies one change; v.mu is held.
func (v *View[V]) put(key string, e viewEntry[V], h nats.Header) {
	old, had := v.entries[key]
	v.entries[key] = e
	v.changed(Change[V]{Key: key, Old: old.value, New: e.value, HadOld: had, Revision: e.revision, Header: h})
}

// remove applies one deletion; v.mu is held.
func (v *View[V]) remove(key string, revision uint64, h nats.Header) {
	old, had := v.entries[key]
	if !had {
		return
	}
	delete(v.entries, key)
	v.changed(Change[V]{Key: key, Old: old.value, HadOld: true, Deleted: true, Revision: max(revision, old.revision), Header: h})
}

func (v *View[V]) changed(c Change[V]) {
	if v.opts.OnChange != nil {
		v.enqueue(viewEvent[V]{change: &c})
	}
	for w := range v.waiters[c.Key] {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

func (v *View[V]) enqueue(e viewEvent[V]) {
	v.queue = append(v.queue, e)
	select {
	case v.wake <- struct{}{}:
	default:
	}
}

// tell calls OnChange until ctx ends and the queue is empty.
func (v *View[V]) tell(ctx context.Context) {
	var batch []viewEvent[V]
	for {
		v.mu.Lock()
		batch, v.queue = v.queue, batch[:0]
		v.space.Broadcast()
		v.mu.Unlock()
		for i, e := range batch {
			switch {
			case e.change != nil:
				v.opts.OnChange(*e.change)
			case e.then != nil:
				e.then()
			default:
				v.pass(e.passed, e.session)
			}
			batch[i] = viewEvent[V]{}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-v.wake:
		case <-ctx.Done():
			return
		}
	}
}

func (v *View[V]) pass(revision uint64, session int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if session != v.sessions {
		return
	}
	v.passed, v.told = revision, true
	for p := range v.passers {
		if p.revision <= revision {
			delete(v.passers, p)
			close(p.done)
		}
	}
}

// next tells the follower where a session starts. A server that was killed may have
// forgotten the end of an asynchronous stream and given its revisions to other
// values since, so such a view never resumes in the middle.
func (v *View[V]) next() uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.lag(v.waiting, false)
	v.whole = v.rebuild || !v.clustered() && (v.async || len(v.entries)+v.forgets <= smallView)
	if v.whole {
		return 1
	}
	return v.applied + 1
}

// started begins a session; next has been asked before, perhaps more than once.
func (v *View[V]) started(pending uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.sessions > 0 && v.whole {
		v.gen++
		// What is observed meanwhile and not newer than what had been passed is left to the
		// consumer to bring, which finds out whether it is still there.
		v.floor, v.applied = max(v.floor, v.applied), 0
		v.forgets = 0
	}
	v.rebuild, v.replica = false, v.clustered()
	v.sessions++
	v.sure = v.sessions == 1 || v.whole // else the audit says whether it is still the same stream
	v.passed, v.told = 0, false
	v.pending, v.caughtUp = pending, false
	v.lag(pending, false)
	if pending == 0 && !v.replica {
		v.catchUp()
	}
}

// catchUp ends the first part of a session, when all that was there has come; v.mu is
// held.
func (v *View[V]) catchUp() {
	if v.caughtUp {
		return
	}
	v.caughtUp, v.floor = true, 0
	v.lag(0, true)
	v.exhume()
	for key, e := range v.entries {
		// In the first session what is newer than all that came is an own write on its way: a
		// server that replaces a revision says for a moment that nothing is pending.
		if e.gen < v.gen && (v.sessions > 1 || e.revision <= v.applied) {
			v.remove(key, 0, nil)
		}
	}
	v.step()
	select {
	case <-v.ready:
	default:
		v.enqueue(viewEvent[V]{then: func() {
			select {
			case <-v.ready:
			default:
				close(v.ready)
			}
		}})
	}
}

// step tells how far the consumer has come, once that is sure to mean that nothing older
// is left to tell: a session after the first may still find keys that went, or another
// stream. v.mu is held.
func (v *View[V]) step() {
	if v.sessions == 1 || v.caughtUp && v.sure {
		v.enqueue(viewEvent[V]{passed: v.applied, session: v.sessions})
	}
}

// handle takes one message of the consumer.
func (v *View[V]) handle(m jetstream.Msg, meta *jetstream.MsgMetadata) error {
	key, ok := strings.CutPrefix(m.Subject(), keySubject(v.bucket, ""))
	ok = ok && strings.HasPrefix(key, v.opts.Prefix)
	h, revision, stored := m.Headers(), meta.Sequence.Stream, meta.Timestamp.UnixNano()
	gone := isMarker(h) || len(m.Data()) == 0
	known := v.has(key, revision, stored)
	var value V
	var err error
	forget := false
	if ok && !gone && !known {
		value, err = v.decode(key, h, m.Data())
		if forget = errors.Is(err, ErrForget); forget {
			err = nil
		}
		if err != nil {
			v.c.log.Error().Err(err).Str("bucket", v.bucket).Str("key", key).Uint64("revision", revision).Msg("cannot decode, keeping what was there")
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for len(v.queue) > viewQueue && !v.stopped {
		v.space.Wait()
	}
	if v.stopped {
		return nil
	}
	old, had := v.entries[key]
	if known && !had { // it went meanwhile, with what was there of an older session
		v.mu.Unlock()
		err := v.handle(m, meta)
		v.mu.Lock()
		return err
	}
	newer := !had || revision > old.revision || old.gen < v.gen
	same := had && revision == old.revision && (old.stored == 0 || old.stored == stored)
	g, buried := v.forgotten[key]
	if buried && (revision >= g.revision || g.gen < v.gen) {
		delete(v.forgotten, key)
		buried = false
	}
	if forget {
		v.forgets++
	}
	switch {
	case !ok, buried, revision <= v.applied: // the last: a replica that is behind gives again what came before
	case same && !gone && !forget, err != nil && had:
		old.gen = v.gen
		if same {
			old.stored = stored
		}
		v.entries[key] = old
	case err != nil, !newer && !(same && forget):
	case gone, forget:
		v.remove(key, revision, h)
	default:
		v.put(key, viewEntry[V]{value: value, revision: revision, gen: v.gen, stored: stored}, h)
	}
	v.applied = max(v.applied, revision)
	v.step()
	if v.pending > 0 {
		v.pending--
	}
	if !v.replica && (v.pending == 0 || meta.NumPending == 0) {
		v.catchUp()
	}
	v.lag(meta.NumPending, v.caughtUp && meta.NumPending == 0)
	return nil
}

// has spares decoding what is there already.
func (v *View[V]) has(key string, revision uint64, stored int64) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	e, ok := v.entries[key]
	return ok && e.revision == revision && (e.stored == 0 || e.stored == stored)
}

// watch runs beside a session: it sees to it that the session catches up, and after
// the first one looks for what went or changed unseen.
func (v *View[V]) watch(ctx context.Context) error {
	v.mu.Lock()
	resumed, pause := v.sessions > 1, lagInterval
	if v.replica {
		pause = replicaInterval // nothing else says that it has caught up
	}
	v.mu.Unlock()
	for !v.isCaughtUp() {
		if !sleep(ctx, pause) {
			return nil
		}
		pause = min(2*pause, lagInterval)
		last, err := v.c.lastStored(ctx, StreamOf(v.bucket), v.filter())
		v.mu.Lock()
		if err == nil && v.applied >= last {
			v.catchUp() // also when the last messages went before they came
		}
		v.mu.Unlock()
	}
	for {
		silent, err := v.audit(ctx, resumed)
		switch {
		case errors.Is(err, errRestart):
			return err
		case ctx.Err() != nil:
			return nil
		case err != nil:
			if !sleep(ctx, time.Second) {
				return nil
			}
			continue
		case !silent:
			return nil
		}
		resumed = true
		if !sleep(ctx, auditInterval) {
			return nil
		}
	}
}

func (v *View[V]) isCaughtUp() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.caughtUp
}

// audit compares the view with the stream. silent says that keys of this bucket go
// without a mark. errRestart means that everything must be read again.
func (v *View[V]) audit(ctx context.Context, resumed bool) (silent bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	s, err := v.c.JS.Stream(ctx, StreamOf(v.bucket))
	if err != nil {
		return false, err
	}
	info := s.CachedInfo()
	silent = info.Config.MaxAge > 0 && info.Config.SubjectDeleteMarkerTTL == 0
	v.mu.Lock()
	behind := info.State.LastSeq < v.applied
	v.mu.Unlock()
	if behind && v.clustered() { // a new leader may not have all of it in place yet
		if !sleep(ctx, time.Second) {
			return false, ctx.Err()
		}
		if info, err = s.Info(ctx); err != nil {
			return false, err
		}
	}
	v.mu.Lock()
	lost := !v.created.IsZero() && !v.created.Equal(info.Created) || behind && info.State.LastSeq < v.applied
	v.async = info.Config.PersistMode == jetstream.AsyncPersistMode
	v.created = info.Created
	if lost {
		v.rebuild = true
	} else if !v.sure {
		v.sure = true
		v.step()
	}
	complete := v.opts.Prefix == "" && uint64(len(v.entries)) == info.State.NumSubjects
	// Where most keys are forgotten, asking for the few is less than listing all.
	few := v.forgets > 0 && len(v.entries) <= smallView
	v.mu.Unlock()
	if lost {
		return silent, errRestart
	}
	if !resumed || complete {
		return silent, nil
	}
	if !few {
		if info, err = s.Info(ctx, jetstream.WithSubjectFilter(v.filter())); err != nil {
			return silent, err
		}
	}
	var absent []string
	v.mu.Lock()
	for key, e := range v.entries {
		if _, there := info.State.Subjects[keySubject(v.bucket, key)]; !there && e.revision <= info.State.LastSeq {
			absent = append(absent, key)
		}
	}
	v.mu.Unlock()
	for _, key := range absent { // the list was not made in one instant, so ask
		_, revision, _ := v.Get(key)
		_, err := v.c.leaderGet(ctx, StreamOf(v.bucket), keySubject(v.bucket, key))
		if err != nil && !errors.Is(err, ErrNotFound) {
			return silent, err
		}
		v.mu.Lock()
		if e := v.entries[key]; err != nil && e.revision == revision {
			v.remove(key, 0, nil)
		}
		v.mu.Unlock()
	}
	return silent, nil
}
