package simulation

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
	"dayfly.dev/test/faults"
)

// wish is what a client will ask for.
type wish struct {
	at     time.Duration
	spec   string
	cancel time.Duration // after it was accepted; 0: never
	extend time.Duration // the same
	ttl    time.Duration // to extend to
	surely bool          // the cancel is asked for until it is acknowledged
}

// wish makes up one task. There is none that every worker refuses and no queue timeout
// ends.
func (w *world) wish(sz size) wish {
	code := w.number(4) * w.number(2)
	commands := []string{
		fmt.Sprintf(`["exit","%d"]`, code), `["exit","0"]`, fmt.Sprintf(`["sleep","%s","%d"]`, w.between(200*time.Millisecond, 4*time.Second), code),
		fmt.Sprintf(`["sleep","%s","%d"]`, w.between(time.Second, 100*time.Second), code), `["sleep"]`, `["sleep"]`, `["ignore-term"]`,
		fmt.Sprintf(`["ignore-term","%s"]`, w.between(0, 30*time.Second)), `["term-exit","0"]`, `["log","20000","1s"]`, `["oom"]`,
		`["fail","image"]`, `["fail","start"]`, `["refuse"]`,
	}
	weights := []int{3, 3, 3, 5, 5, 5, 2, 2, 2, 1, 1, 1, 1, 1}
	lasts := []bool{4: true, 5: true, 6: true, 8: true, 13: true} // until somebody ends it
	n, i := w.number(35), 0
	for ; n >= weights[i]; i++ {
		n -= weights[i]
	}
	x := wish{at: w.between(0, sz.span*5/6), ttl: w.between(10*time.Second, 3*time.Minute)}
	if w.chance(0.5) { // many at once
		x.at = x.at.Truncate(40*time.Second) + w.between(0, 20*time.Millisecond)
	}
	if w.chance(0.2) {
		x.cancel = w.between(0, 20*time.Second)
		if w.chance(0.5) {
			x.cancel /= 200
		}
	}
	if w.chance(0.3) {
		x.extend = w.between(0, 40*time.Second)
	}
	ttl := time.Duration(5+w.number(115)) * time.Second
	if w.chance(sz.long) {
		ttl *= 3
	}
	if w.chance(0.3) { // so that its time does not end what its own end or its cancel should have
		ttl, x.surely = time.Hour, lasts[i]
		if x.surely {
			x.cancel = max(x.cancel, w.between(time.Millisecond, 2*time.Minute))
		}
	}
	x.spec = fmt.Sprintf(`{"image":"any","command":%s,"ttl":"%s","max_attempts":%d,"timeouts":{"stop":"%s","queue":"2m"},
		"resources":{"cpus":0.5,"memory":"64MiB"},"on_lost":"%s"}`, commands[i], ttl, 1+w.number(4),
		w.between(100*time.Millisecond, 8*time.Second), []string{"requeue", "requeue", "requeue", "fail", "wait", "wait"}[w.number(6)])
	return x
}

// client does what a gateway does with a task, for some clients.
type client struct {
	w     *world
	conn  *bus.Conn
	table *bus.Table[schemas.Record]
}

// runClients starts a gateway of which clients wish all that. It ends when they have
// been answered, and nobody meddles any more.
func (w *world) runClients(name string, wishes []wish) *process {
	return w.launch(name, "", func(ctx context.Context, _ *process, conn *bus.Conn, _ zerolog.Logger) error {
		c := &client{w: w, conn: conn, table: bus.NewTable(conn, schemas.BucketTasks, bus.JSON(schemas.Record.Wrote))}
		w.mu.Lock()
		w.clients = append(w.clients, c)
		w.mu.Unlock()
		var each sync.WaitGroup
		for _, x := range wishes {
			each.Go(func() { c.serve(ctx, x) })
		}
		each.Wait()
		select {
		case <-w.answered:
		case <-ctx.Done():
		}
		return nil
	})
}

func (c *client) serve(ctx context.Context, x wish) {
	pause(ctx, x.at)
	began := time.Now()
	id, outcome := c.create(ctx, x)
	if outcome == faults.Failed || outcome == faults.Unknown && !x.surely {
		return
	}
	var both sync.WaitGroup
	defer both.Wait()
	if x.cancel > 0 {
		both.Go(func() {
			pause(ctx, x.cancel)
			for err := c.cancel(ctx, id); err != nil && x.surely && ctx.Err() == nil; err = c.cancel(ctx, id) {
				if errors.Is(err, bus.ErrNotFound) && time.Since(began) > longest+time.Minute {
					return // it was not made after all
				}
				pause(ctx, 2*time.Second)
			}
		})
	}
	if x.extend > 0 {
		both.Go(func() {
			pause(ctx, x.extend)
			c.extend(ctx, id, x.ttl)
		})
	}
}

// meddle lets clients ask for something about a task of which something has just been
// said, perhaps several by different gateways.
func (w *world) meddle(span time.Duration) {
	time.Sleep(w.between(0, span*11/12))
	id := w.next([]moment{recordRuns, recordRuns, recordWritten, recordGiven, orderSent, reportSent, lastReportSent}[w.number(7)]).task
	w.mu.Lock()
	clients := w.clients
	w.mu.Unlock()
	if id == "" || len(clients) == 0 {
		return
	}
	var each sync.WaitGroup
	for range 1 + w.number(4) {
		each.Go(func() {
			c := clients[w.number(len(clients))]
			time.Sleep(w.between(0, 10*time.Millisecond))
			if w.chance(0.05) {
				_ = c.cancel(context.Background(), id)
				return
			}
			c.extend(context.Background(), id, w.between(10*time.Second, 2*time.Minute))
		})
	}
	each.Wait()
}

// clientName is who asked, in a record's history.
const clientName = "client"

func meta() schemas.Meta {
	return schemas.Meta{At: time.Now().UTC(), By: clientName, Op: rand.Text()}
}

func (c *client) create(ctx context.Context, x wish) (schemas.TaskID, string) {
	spec, err := schemas.ParseSpec([]byte(x.spec), schemas.DefaultPolicy())
	if err != nil {
		panic(err)
	}
	id, err := schemas.NewTaskID(time.Now(), rand.Reader)
	if err != nil {
		panic(err)
	}
	spec.Labels = map[string]string{"key": string(id)} // so that the checker can tell what was refused and made all the same
	m, op := meta(), &faults.Op{Name: "create", Task: id, Key: string(id), Began: c.w.now()}
	c.w.tell("client", "%s creates %s", id, spec.Command)
	e, err := c.table.Create(ctx, string(id), schemas.NewRecord(id, spec, schemas.DefaultPolicy(), m), m.Op)
	c.answer(op, e, http.StatusCreated, err)
	return id, op.Outcome
}

func (c *client) change(ctx context.Context, id schemas.TaskID, event func(schemas.Record, schemas.Meta) schemas.Event) (bus.Entry[schemas.Record], error) {
	m := meta()
	e, err := c.table.Update(ctx, string(id), m.Op, func(e bus.Entry[schemas.Record]) (schemas.Record, []bus.WriteOption, error) {
		r := e.Value
		m.On = e.Revision
		next, err := schemas.Next(r, event(r, m))
		return next, nil, err
	})
	if err == nil && e.Value.State.Held() {
		body, err := schemas.Encode(schemas.NewOrder(e.Value, e.Revision, e.Value.Assignment(), time.Now()))
		if err != nil {
			panic(err)
		}
		c.conn.PublishAsync(schemas.OrderSubject(e.Value.Worker, id), nil, body, nil)
	}
	return e, err
}

func (c *client) cancel(ctx context.Context, id schemas.TaskID) error {
	op := &faults.Op{Name: "cancel", Task: id, Began: c.w.now()}
	e, err := c.change(ctx, id, func(r schemas.Record, m schemas.Meta) schemas.Event {
		return schemas.AskCancel{Meta: m, Grace: r.Spec.Timeouts.Stop}
	})
	if errors.Is(err, schemas.ErrFinal) || errors.Is(err, schemas.ErrUnchanged) {
		err = nil
	}
	c.answer(op, e, http.StatusOK, err)
	return err
}

func (c *client) extend(ctx context.Context, id schemas.TaskID, ttl time.Duration) {
	op := &faults.Op{Name: "extend", Task: id, Began: c.w.now(), TTL: ttl}
	e, err := c.change(ctx, id, func(_ schemas.Record, m schemas.Meta) schemas.Event {
		return schemas.AskExtend{Meta: m, TTL: schemas.Duration(ttl)}
	})
	if errors.Is(err, schemas.ErrUnchanged) {
		err = nil
	}
	heard := func() bool { return !e.Value.State.Held() || e.Value.Applied >= e.Value.Extensions }
	for until := time.Now().Add(2 * time.Second); err == nil && !heard() && time.Now().Before(until); {
		pause(ctx, 100*time.Millisecond)
		if now, err := c.table.Get(ctx, string(id)); err == nil {
			e = now
		}
	}
	switch {
	case err != nil:
		c.answer(op, e, 0, err)
	case e.Value.State.Final():
		c.answer(op, e, http.StatusConflict, schemas.ErrFinal)
	case !heard():
		c.answer(op, e, http.StatusAccepted, nil)
	default:
		c.answer(op, e, http.StatusOK, nil)
	}
}

// answer writes down what the client was told.
func (c *client) answer(op *faults.Op, e bus.Entry[schemas.Record], status int, err error) {
	var refused *schemas.TransitionError
	switch {
	case err == nil:
		op.Outcome, op.Status = faults.OK, status
		op.Seen = &faults.Seen{State: e.Value.State, Attempt: e.Value.Attempt, Revision: e.Revision, ExpiresAt: e.Value.ExpiresAt}
	case errors.As(err, &refused), errors.Is(err, schemas.ErrFinal), errors.Is(err, bus.ErrUnavailable), errors.Is(err, bus.ErrConflict):
		op.Outcome, op.Error = faults.Failed, err.Error()
	default:
		op.Outcome, op.Error = faults.Unknown, err.Error()
	}
	c.w.add(faults.Event{Op: op})
	c.w.tell("client", "%s %s: %s %d %s", op.Task, op.Name, op.Outcome, op.Status, op.Error)
}

// pause waits, or ends with ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
