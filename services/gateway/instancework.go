package gateway

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// instances keeps the bucket that says which task is the instance of a (template, owner).
//
// An entry is written before the record of its task: whoever finds one without the other
// makes the record, by create-only, so that of any number of requests one makes a task. An
// entry is replaced only where its task is final, or was never made and no longer can be,
// and always by a task with a greater id. So of two tasks of one key the lesser may never
// be the instance again: should one appear all the same, it is canceled.
type instances struct {
	g     *Gateway
	table *bus.Table[schemas.InstanceEntry]
	view  *bus.View[schemas.InstanceEntry]
	index index // of the view's keys

	making [64]sync.Mutex // one owner's requests at this gateway make instances one after the other

	gone   chan goneInstance
	orphan map[string]time.Time // entries without a record, and since when; of run

	mu   sync.Mutex
	live map[string]map[schemas.TaskID]struct{} // under mu: tasks that are not final, by instance
}

// goneInstance is a task whose record is gone.
type goneInstance struct {
	key  string
	task schemas.TaskID
}

func newInstances(g *Gateway) *instances {
	n := &instances{g: g, table: bus.NewTable(g.conn, schemas.BucketInstances, bus.JSON[schemas.InstanceEntry](nil)),
		gone: make(chan goneInstance, 1024), orphan: map[string]time.Time{}, live: map[string]map[schemas.TaskID]struct{}{}}
	n.view = bus.NewView(g.conn, schemas.BucketInstances, func(_ string, _ nats.Header, data []byte) (e schemas.InstanceEntry, err error) {
		return e, schemas.Decode(data, &e)
	}, bus.ViewOptions[schemas.InstanceEntry]{OnChange: func(c bus.Change[schemas.InstanceEntry]) {
		if c.Deleted {
			n.index.remove(c.Key)
		} else {
			n.index.add(c.Key)
		}
	}})
	return n
}

// wanted is what a PUT asks for.
type wanted struct {
	template, owner string       // owner is "" for a shared one
	refused         error        // why none can be made, such as a value that is needed; one that there is is given all the same
	spec            schemas.Spec // of a new one
	of              schemas.InstanceOf
	maxTTL          schemas.Duration
	trace           string
}

// What became of a PUT.
const (
	instanceCreated  = "created"
	instanceReplaced = "replaced" // created, where one was before that is over
	instanceExists   = "exists"
)

// ensure gives the instance, which it makes if there is none. It waits for the end of one
// that is ending until ctx ends.
func (n *instances) ensure(ctx context.Context, want wanted) (e bus.Entry[record], how string, err error) {
	for {
		e, how, err = n.ensureOnce(ctx, want)
		if err != nil || how != instanceExists || !ending(e.Value.Record) {
			return e, how, err
		}
		if err := n.untilOver(ctx, e); err != nil {
			return e, how, err
		}
	}
}

// ending says whether a task that is not final is on its way to its end.
func ending(r schemas.Record) bool {
	return r.Cancel != nil || !r.ExpiresAt.IsZero() && !time.Now().Before(r.ExpiresAt)
}

// untilOver waits for the end of a task.
func (n *instances) untilOver(ctx context.Context, e bus.Entry[record]) error {
	err := n.g.tasks.Wait(ctx, e.Key, func(it *item, revision uint64, exists bool) bool {
		return revision >= e.Revision && (!exists || it.state.Final())
	})
	if err == nil {
		return nil
	}
	detail := "the owner's instance before is still ending; ask again in a moment"
	if !e.Value.WorkerLostAt.IsZero() {
		detail = "the owner's instance before is ending, and its worker is away; ask again when it is back, or when the time of the instance is over"
	}
	return &schemas.Error{Status: http.StatusConflict, Code: schemas.CodeEnding, Detail: detail, Task: e.Value.ID, State: e.Value.State, RetryAfter: schemas.Duration(time.Second)}
}

func (n *instances) ensureOnce(ctx context.Context, want wanted) (bus.Entry[record], string, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.g.cfg.OpTimeout)
	defer cancel()
	h := fnv.New32a()
	h.Write([]byte(schemas.OwnerHash(want.owner)))
	if want.owner == "" {
		h.Write([]byte(want.template))
	}
	turn := &n.making[h.Sum32()%uint32(len(n.making))]
	turn.Lock()
	defer turn.Unlock()
	for {
		e, how, err := n.make(ctx, want)
		if errors.Is(err, bus.ErrConflict) && ctx.Err() == nil {
			continue // another gateway was quicker
		}
		return e, how, repeatable(err)
	}
}

// repeatable is busError for a request that may be sent again as it is.
func repeatable(err error) error {
	err = busError(err, "")
	if e, ok := err.(*schemas.Error); ok && e.Code == schemas.CodeUnknownOutcome {
		e.Detail = "it may have been done; send the request again"
	}
	return err
}

// make is one try. ErrConflict says that somebody else changed something meanwhile.
func (n *instances) make(ctx context.Context, want wanted) (e bus.Entry[record], how string, err error) {
	key := schemas.InstanceKey(want.template, want.owner)
	entry, err := n.table.Get(ctx, key)
	if err != nil && !errors.Is(err, bus.ErrNotFound) {
		return e, "", readError(err)
	}
	var former schemas.Record
	how = instanceCreated
	fresh := true // the entry shall name a new task
	if entry.Revision != 0 {
		how = instanceReplaced
		e, err = n.g.records.Get(ctx, string(entry.Value.Task))
		switch {
		case err == nil && e.Value.State.Final():
			former = e.Value.Record
		case err == nil:
			n.g.fold(e)
			return e, instanceExists, nil
		case !errors.Is(err, bus.ErrNotFound):
			return e, "", readError(err)
		case e.Gone: // it was there, and was kept as long as it is to be
		default:
			if _, _, known := n.g.tasks.Get(string(entry.Value.Task)); known { // the leader is behind
				return e, "", unavailable()
			}
			age := time.Since(entry.Created)
			if age >= n.grace() && age < n.afterGrace() { // who came just before may be about to make it
				return e, "", unavailable()
			}
			// Whoever wrote the entry may be about to make the record, or has died.
			fresh = age >= n.grace()
		}
	}
	if want.refused != nil {
		return e, "", want.refused
	}
	if err := n.fits(want, key); err != nil {
		return e, "", err
	}
	id := entry.Value.Task
	if fresh {
		if id, err = schemas.NewTaskIDAfter(id, time.Now(), rand.Reader); err != nil {
			return e, "", err
		}
	}
	policy, m := n.g.cfg.Policy, meta("gateway")
	policy.MaxTTL = want.maxTTL
	r, err := n.g.newRecord(ctx, id, want.spec, policy, "", m)
	if err != nil {
		return e, "", err
	}
	of := want.of
	r.Instance = &of
	if fresh {
		if err := n.name(ctx, entry, key, want, id); err != nil {
			return e, "", err
		}
	}
	if e, err = n.g.acceptRecord(ctx, r, m.Op, want.trace, former); err != nil {
		return e, "", err // the entry stays: another gateway may be making the record that it names
	}
	n.alive(key, id, true)
	if it, _, ok := n.g.tasks.Get(string(id)); ok && it.state.Final() { // and the view had said so before
		n.alive(key, id, false)
	}
	return e, how, nil
}

// grace is how long a record that is missing was surely never made, rather than made and
// gone. Until then nobody makes another instead of it: the write that makes it may be on its
// way for as long as a server is stopped that has it in its hands.
func (n *instances) grace() time.Duration { return max(n.g.cfg.KeyGrace, n.g.cfg.Retention) }

// afterGrace is when nobody can be making the record of an entry any more: whoever found it
// young enough has given up.
func (n *instances) afterGrace() time.Duration { return n.grace() + 2*n.g.cfg.OpTimeout }

// name lets the entry name a new task.
func (n *instances) name(ctx context.Context, entry bus.Entry[schemas.InstanceEntry], key string, want wanted, id schemas.TaskID) error {
	v := schemas.InstanceEntry{Template: want.template, Owner: want.owner, Task: id, At: time.Now().UTC()}
	var err error
	if entry.Revision == 0 {
		entry, err = n.table.Create(ctx, key, v, "")
	} else {
		entry, err = n.table.Replace(ctx, entry, v, "")
	}
	if errors.Is(err, bus.ErrUnknownOutcome) {
		err = bus.ErrUnavailable // no task was made
	}
	if err == nil {
		n.view.Observe(key, v, entry.Revision)
		n.index.add(key) // a list shows what was answered
	}
	return err
}

// fits says why an instance may not be made.
func (n *instances) fits(want wanted, key string) error {
	if misfit := n.g.fleet.misfit(want.spec); misfit != nil {
		return misfit
	}
	if misfit := n.g.ports.misfit(want.spec); misfit != nil {
		return misfit
	}
	limit := n.g.cfg.MaxPerOwner
	if limit == 0 || want.owner == "" {
		return nil
	}
	has := n.of(want.owner, key)
	if len(has) < limit {
		return nil
	}
	return &schemas.Error{Status: http.StatusConflict, Code: schemas.CodeOwnerLimit, Field: "owner",
		Detail: fmt.Sprintf("an owner may have %d instances here, and this one has: %s; end one of them first", limit, strings.Join(has, ", "))}
}

// of gives the templates of the owner's other instances that are not over.
func (n *instances) of(owner, but string) (templates []string) {
	suffix := "." + schemas.OwnerHash(owner)
	n.mu.Lock()
	defer n.mu.Unlock()
	for key := range n.live {
		if template, ok := strings.CutSuffix(key, suffix); ok && key != but {
			templates = append(templates, template)
		}
	}
	slices.Sort(templates)
	return templates
}

// find gives the instance that an owner has, or that all have.
func (n *instances) find(ctx context.Context, template, owner string) (bus.Entry[record], error) {
	if err := n.g.reach(ctx); err != nil {
		return bus.Entry[record]{}, err
	}
	owners := []string{owner, ""}
	if t, missing := n.g.template(template); missing == nil && t.Value.Shared {
		slices.Reverse(owners)
	}
	for _, o := range owners {
		entry, err := n.table.Get(ctx, schemas.InstanceKey(template, o))
		if errors.Is(err, bus.ErrNotFound) {
			continue
		}
		if err != nil {
			return bus.Entry[record]{}, readError(err)
		}
		e, err := n.g.fetch(ctx, entry.Value.Task)
		if err == nil && e.Value.Instance != nil {
			return e, nil
		}
		if !errors.Is(err, schemas.CodeNotFound) {
			return e, err
		}
	}
	return bus.Entry[record]{}, noInstance()
}

// alive remembers whether a task of an instance can still run.
func (n *instances) alive(key string, id schemas.TaskID, alive bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	tasks := n.live[key]
	if !alive {
		if delete(tasks, id); len(tasks) == 0 {
			delete(n.live, key)
		}
		return
	}
	if tasks == nil {
		tasks = map[schemas.TaskID]struct{}{}
		n.live[key] = tasks
	}
	tasks[id] = struct{}{}
}

// open is how many instances are not over.
func (n *instances) open() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.live)
}

// taskChanged follows the view of tasks.
func (n *instances) taskChanged(c bus.Change[*item]) {
	it := c.New
	if c.Deleted {
		it = c.Old
	}
	if it == nil || it.instance == "" {
		return
	}
	id := schemas.TaskID(c.Key)
	n.alive(it.instance, id, !c.Deleted && !it.state.Final())
	if !c.Deleted {
		return
	}
	select {
	case n.gone <- goneInstance{it.instance, id}:
	default: // the sweep finds it
	}
}

// markAge is how long the mark of a deleted entry stays, for views that are away.
const markAge = time.Hour

// run keeps the bucket in order until ctx ends.
func (n *instances) run(ctx context.Context) error {
	var view sync.WaitGroup
	defer view.Wait()
	view.Go(func() { _ = n.view.Run(ctx) }) // it ends with ctx alone
	tick := time.NewTicker(n.g.cfg.InstanceSweep)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case gone := <-n.gone:
			if e, revision, ok := n.view.Get(gone.key); ok && e.Task == gone.task {
				n.forget(ctx, gone.key, e.Task, revision)
			}
		case <-tick.C:
			if n.g.ready() {
				n.sweep(ctx)
				n.g.prepull(ctx)
			}
		}
	}
}

// forget deletes an entry that is still at revision and whose task had a record, or can
// have none any more. That the record is gone the leader must say: a view may believe it
// for a moment, and a task that runs without its entry would get another beside it.
func (n *instances) forget(ctx context.Context, key string, id schemas.TaskID, revision uint64) {
	if e, err := n.g.records.Get(ctx, string(id)); !errors.Is(err, bus.ErrNotFound) {
		if err == nil {
			n.g.log.Warn().Str("task", string(id)).Uint64("revision", e.Revision).Msg("record taken for gone is there")
		}
		return
	}
	err := n.table.Delete(ctx, key, revision, bus.TTL(markAge))
	if err != nil && !errors.Is(err, bus.ErrConflict) && ctx.Err() == nil {
		n.g.log.Debug().Err(err).Str("instance", key).Msg("entry of an instance not deleted; the sweep does it")
	}
}

// sweep deletes entries whose tasks are gone, and sees to it that each task which can run
// is the one that its entry names.
func (n *instances) sweep(ctx context.Context) {
	orphan := map[string]time.Time{}
	n.view.Range(func(key string, e schemas.InstanceEntry, revision uint64) bool {
		if _, _, ok := n.g.tasks.Get(string(e.Task)); ok {
			return true
		}
		since, before := n.orphan[key+string(e.Task)]
		if !before {
			since = time.Now()
		}
		orphan[key+string(e.Task)] = since
		if time.Since(since) >= n.afterGrace() {
			n.forget(ctx, key, e.Task, revision)
		}
		return ctx.Err() == nil
	})
	n.orphan = orphan
	n.mu.Lock()
	live := map[string][]schemas.TaskID{}
	for key, tasks := range n.live {
		live[key] = slices.Collect(maps.Keys(tasks))
	}
	n.mu.Unlock()
	for key, tasks := range live {
		for _, id := range tasks {
			if e, _, ok := n.view.Get(key); (!ok || e.Task != id) && ctx.Err() == nil {
				n.reconcile(ctx, key, id)
			}
		}
	}
}

// reconcile looks at a task that can run, and that the entry of its instance does not
// seem to name.
func (n *instances) reconcile(ctx context.Context, key string, id schemas.TaskID) {
	log := n.g.log.Warn().Str("instance", key).Str("task", string(id))
	task, err := n.g.records.Get(ctx, string(id))
	if err != nil || task.Value.State.Final() || task.Value.Instance == nil {
		return
	}
	of := task.Value.Instance
	v := schemas.InstanceEntry{Template: of.Template, Owner: of.Owner, Task: id, At: time.Now().UTC()}
	e, err := n.table.Get(ctx, key)
	switch {
	case errors.Is(err, bus.ErrNotFound):
		_, err = n.table.Create(ctx, key, v, "")
		log.Err(err).Msg("instance had no entry")
		return
	case err != nil || e.Value.Task == id:
		return
	}
	other, err := n.g.records.Get(ctx, string(e.Value.Task))
	if err != nil && !errors.Is(err, bus.ErrNotFound) {
		return
	}
	if otherRuns := err == nil && !other.Value.State.Final(); !otherRuns && e.Value.Task < id { // of a backup
		_, err = n.table.Replace(ctx, e, v, "")
		log.Err(err).Msg("entry named an instance that is over")
		return
	}
	_, err = n.g.cancelTask(ctx, id, nil, -1)
	log.Err(err).Msg("second task of an instance canceled")
}
