package gateway

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// Events are the history of the records, told in the order of the writes. A record in
// its bucket has its newest revision alone, and in its history those before it. So what
// was written up to a revision is known once all records have been seen that were stored
// by then: only then is it sorted and given out. An event's id is the revision of
// its write; a client that has it has everything before it too, from any gateway.

// eventAhead is how many records are fetched before they are asked for.
const eventAhead = 64

// eventQuiet is how long after a record that was not the newest the next is waited for.
const eventQuiet = time.Second

// eventRequest is which events a client asks for.
type eventRequest struct {
	follow  bool
	now     bool   // only what is still to come
	after   uint64 // of what was written after this revision
	resumed bool   // by Last-Event-ID
	filter  filter
	format  streamFormat
}

func parseEventRequest(r *http.Request, q query) (a eventRequest, err error) {
	a.follow = true
	if q.has("follow") {
		if a.follow, err = q.flag("follow"); err != nil {
			return a, err
		}
	}
	if a.filter, err = parseFilter(q); err != nil {
		return a, err
	}
	a.format = streamFormatOf(r.Header, formatSSE, formatJSON)
	if v := q.get("after"); v == "now" {
		a.now = true
	} else if q.has("after") {
		if a.after, err = strconv.ParseUint(v, 10, 63); err != nil {
			return a, badQuery("after", "must be the id of an event, or now")
		}
	}
	if id := r.Header.Get("Last-Event-ID"); id != "" { // says more than the address, which does not change
		if a.after, err = strconv.ParseUint(id, 10, 63); err != nil {
			return a, badHeader("Last-Event-ID", "must be the id of an event")
		}
		a.now, a.resumed = false, true
	}
	return a, nil
}

// taskEvents is GET /v1/tasks/{id}/events.
func (g *Gateway) taskEvents(w *response, r *http.Request) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	return g.sendEvents(w, r, q, id)
}

// events is GET /v1/events.
func (g *Gateway) events(w *response, r *http.Request) error {
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	return g.sendEvents(w, r, q, "")
}

func (g *Gateway) sendEvents(w *response, r *http.Request, q query, id schemas.TaskID) error {
	ask, err := parseEventRequest(r, q)
	if err != nil {
		return err
	}
	done, err := g.follower("events")
	if err != nil {
		return err
	}
	defer done()
	e := &eventReader{g: g, ask: ask, id: id, out: g.newStream(w, ask.format)}
	if err := e.open(r); err != nil {
		return err
	}
	if r.Method == http.MethodHead {
		w.Header().Set("Content-Type", string(ask.format))
		return nil
	}
	defer e.out.close()
	if err := e.read(r.Context()); err != nil {
		if w.wrote || r.Context().Err() != nil {
			panic(http.ErrAbortHandler) // what was sent is not all there is
		}
		return readError(err)
	}
	if ask.resumed && !w.wrote {
		w.WriteHeader(http.StatusNoContent) // an EventSource stops asking
		return nil
	}
	if err := e.out.end(struct{}{}); err != nil {
		panic(http.ErrAbortHandler)
	}
	return nil
}

// eventReader hands out events to one client. One goroutine at a time touches it.
type eventReader struct {
	g   *Gateway
	ask eventRequest
	id  schemas.TaskID // "": of all tasks
	out *streamWriter

	given uint64              // the client has all events up to this revision
	next  uint64              // sequence to read on from
	held  []schemas.TaskEvent // of records up to next, after given, in no order
	cut   uint64              // events from this revision on did not fit into held; 0: all did
	over  bool                // of one task: it is final, or its record is gone

	goal  uint64 // the end of the stream when it was opened
	mark  uint64 // what was written up to here is known
	until uint64 // once all up to here was read; 0: there is no mark
}

var (
	errAgain = errors.New("events were left out that have to be read again")
	errQuiet = errors.New("the newest record went before it came")
)

// open finds out where to begin.
func (e *eventReader) open(r *http.Request) error {
	ctx, cancel := e.g.onBus(r)
	defer cancel()
	if e.id != "" {
		if _, err := e.g.fetch(ctx, e.id); err != nil {
			return err
		}
	}
	if err := e.g.reach(ctx); err != nil {
		return err
	}
	stream, err := e.g.conn.JS.Stream(ctx, bus.StreamOf(schemas.BucketTasks))
	if err != nil {
		return unavailable()
	}
	last := stream.CachedInfo().State.LastSeq
	switch {
	case e.ask.now:
		e.ask.after = last
	case e.ask.after > last && e.ask.resumed:
		return badHeader("Last-Event-ID", "no event has this id yet: it is of another dayfly, or of one that lost its data; begin without it")
	case e.ask.after > last:
		return badQuery("after", "no event has this id yet: it is of another dayfly, or of one that lost its data; begin without it")
	}
	e.given, e.next, e.goal = e.ask.after, e.ask.after+1, last
	if e.id != "" {
		e.next = 1 // its one record says whether there is anything to wait for
	}
	return nil
}

// read hands out what there is and, with follow, what comes.
func (e *eventReader) read(ctx context.Context) error {
	for {
		err := e.stored(ctx)
		if err == nil && (e.over || !e.ask.follow) {
			return nil
		}
		if err == nil {
			err = e.live(ctx)
		}
		switch {
		case errors.Is(err, errAgain), errors.Is(err, errQuiet):
		case err != nil:
			return err
		case e.over:
			return nil
		}
	}
}

func (e *eventReader) options(follow bool) bus.ReadOptions {
	token := ">"
	if e.id != "" {
		token = string(e.id)
	}
	return bus.ReadOptions{Stream: bus.StreamOf(schemas.BucketTasks), Filter: "$KV." + schemas.BucketTasks + "." + token,
		FromSequence: e.next, Follow: follow, Ahead: eventAhead}
}

// stored reads to the end of the stream.
func (e *eventReader) stored(ctx context.Context) error {
	for {
		end, none := true, true
		err := e.g.conn.Read(ctx, e.options(false), func(m bus.Msg) error {
			end, none = m.Pending == 0, false
			return e.take(m)
		})
		switch {
		case err != nil:
			return err
		case none: // nothing stands behind what was read, so nothing can have gone there
			e.until = 0
			return e.give(e.next - 1)
		case !end:
			continue
		}
		if sure, err := e.complete(ctx); err != nil || sure || e.given >= e.goal {
			return err
		}
	}
}

// complete gives out what is known by now, and says whether that is all that was read.
// That the server has nothing more does not say so: it forgets a record that has changed
// before it counts the new revision. So what was read is complete once all is read that
// was stored by then.
func (e *eventReader) complete(ctx context.Context) (sure bool, err error) {
	read := e.next - 1
	if e.id != "" { // the one record has it all
		return true, e.give(read)
	}
	if e.until > 0 && read >= e.until {
		e.until = 0
		if err := e.give(e.mark); err != nil {
			return false, err
		}
	}
	if e.until > 0 {
		return false, nil
	}
	last, err := e.g.newest.ask(ctx)
	switch {
	case err != nil: // it is asked again
		return false, ctx.Err()
	case last <= read:
		return true, e.give(read)
	}
	e.mark, e.until = read, last
	return false, nil
}

// live hands out what comes.
func (e *eventReader) live(ctx context.Context) error {
	if err := e.out.goLive(strconv.FormatUint(e.given, 10)); err != nil {
		return err
	}
	live, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	quiet := time.AfterFunc(time.Hour, func() { cancel(errQuiet) })
	defer quiet.Stop()
	quiet.Stop()
	err := e.g.conn.Read(live, e.options(true), func(m bus.Msg) error {
		quiet.Stop()
		if err := e.take(m); err != nil {
			return err
		}
		sure := false
		if m.Pending == 0 || e.until > 0 && m.Sequence >= e.until {
			var err error
			if sure, err = e.complete(live); err != nil {
				return err
			}
		}
		switch {
		case !sure:
			quiet.Reset(eventQuiet)
		case e.over:
			return errOver
		}
		return nil
	})
	if errors.Is(err, errOver) {
		return nil
	}
	return err
}

// history is what events need of a record.
type history struct {
	ID   schemas.TaskID `json:"id"`
	Spec struct {
		Labels map[string]string `json:"labels"`
		Judge  *struct {
			Tests []struct{} `json:"tests"`
		} `json:"judge"`
	} `json:"spec"`
	Attempt   int                  `json:"attempt"`
	Worker    schemas.WorkerID     `json:"worker"`
	Result    *schemas.JudgeResult `json:"result"`
	State     schemas.State        `json:"state"`
	History   []schemas.Change     `json:"history"`
	Forgotten uint64               `json:"forgotten"`
}

// take holds the events of one record.
func (e *eventReader) take(m bus.Msg) error {
	e.next = m.Sequence + 1
	if len(m.Data) == 0 { // swept
		e.over = e.id != ""
		return nil
	}
	var h history
	if err := schemas.Decode(m.Data, &h); err != nil {
		e.g.log.Error().Err(err).Uint64("revision", m.Sequence).Msg("cannot decode a record, leaving out its events")
		return nil
	}
	e.over = e.id != "" && h.State.Final()
	if !e.ask.filter.takesLabels(h.Spec.Labels) {
		return nil
	}
	e.takeJudged(h, m.Sequence)
	missing := h.Forgotten > e.given
	rec := schemas.Record{History: h.History}
	for _, c := range rec.Changes(m.Sequence) {
		if c.Revision <= e.given || !e.ask.filter.takesState(c.State) || e.ask.filter.worker != "" && c.Worker != e.ask.filter.worker {
			continue
		}
		v := schemas.TaskEvent{ID: c.Revision, Task: h.ID, At: c.At, State: c.State, Reason: c.Reason, By: c.By, Note: c.Note,
			Attempt: c.Attempt, Worker: c.Worker, Labels: h.Spec.Labels}
		if missing && c.Revision > h.Forgotten {
			v.Truncated, missing = true, false
		}
		if e.cut == 0 || v.ID < e.cut {
			e.held = append(e.held, v)
		}
	}
	if window := e.g.cfg.EventWindow; len(e.held) > 2*window {
		e.sort()
		if len(e.held) <= window {
			return nil
		}
		e.cut = e.held[window].ID
		keep := slices.IndexFunc(e.held, func(v schemas.TaskEvent) bool { return v.ID == e.cut })
		clear(e.held[keep:])
		e.held = e.held[:keep]
	}
	return nil
}

// takeJudged holds the events of the tests of a judge.
func (e *eventReader) takeJudged(h history, revision uint64) {
	if h.Spec.Judge == nil || !e.ask.filter.takesState(schemas.Running) || e.ask.filter.worker != "" && h.Worker != e.ask.filter.worker {
		return
	}
	for _, c := range h.Result.Events(revision, len(h.Spec.Judge.Tests)) {
		if c.Revision > e.given && (e.cut == 0 || c.Revision < e.cut) {
			e.held = append(e.held, schemas.TaskEvent{ID: c.Revision, Task: h.ID, At: c.At, State: schemas.Running, By: "reaper", Note: c.JudgeEvent.String(),
				Attempt: h.Attempt, Worker: h.Worker, Labels: h.Spec.Labels, Judge: &c.JudgeEvent})
		}
	}
}

// sort puts what is held in order, each event once: a record that changes while others
// are read comes again, with what it told before in its history.
func (e *eventReader) sort() {
	slices.SortStableFunc(e.held, func(a, b schemas.TaskEvent) int { return cmp.Compare(a.ID, b.ID) })
	once := e.held[:0]
	begin := 0 // of the events of one write
	for _, v := range e.held {
		if len(once) > 0 && once[len(once)-1].ID != v.ID {
			begin = len(once)
		}
		if !slices.ContainsFunc(once[begin:], func(o schemas.TaskEvent) bool {
			return o.State == v.State && o.Reason == v.Reason && o.By == v.By && o.Note == v.Note && o.Attempt == v.Attempt && o.Worker == v.Worker
		}) {
			once = append(once, v)
		}
	}
	clear(e.held[len(once):])
	e.held = once
}

// give hands out what is held up to a revision, now that all up to there is known.
func (e *eventReader) give(bound uint64) error {
	e.sort()
	n := 0
	for ; n < len(e.held) && e.held[n].ID <= bound; n++ {
		v := e.held[n]
		id := strconv.FormatUint(v.ID, 10)
		if n+1 < len(e.held) && e.held[n+1].ID == v.ID {
			id = "" // a revision has been given when its last event has
		}
		if err := e.out.event(id, v); err != nil {
			return err
		}
	}
	rest := copy(e.held, e.held[n:])
	var again error
	if e.cut > 0 { // what did not fit is read again
		bound, rest = min(bound, e.cut-1), 0
		e.next, e.cut, e.until, e.over, again = bound+1, 0, 0, false, errAgain
	}
	clear(e.held[rest:])
	e.held = e.held[:rest]
	e.given = max(e.given, bound)
	return cmp.Or(e.out.reached(strconv.FormatUint(e.given, 10)), again)
}

// event appends one event and hands over what has gathered.
func (s *streamWriter) event(id string, v schemas.TaskEvent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.piece()
	if err := s.value("task", id, v); err != nil {
		return err
	}
	if s.buf.Len() > 32<<10 {
		return s.out()
	}
	return nil
}

// reached hands over what has gathered, up to a place from which a client may go on.
func (s *streamWriter) reached(place string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.place = place
	if s.buf.Len() == 0 {
		return nil
	}
	return s.out()
}
