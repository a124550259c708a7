package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// logRequest is what of a task's log a client asks for.
type logRequest struct {
	follow  bool
	tail    int // -1: all
	since   time.Time
	stream  schemas.Stream // "": both
	attempt int            // 0: the newest that has logs, and those after it
	stamps  bool
	format  streamFormat
	resume  *logPlace
}

const maxTailLines = 100_000

func parseLogRequest(w *response, r *http.Request) (l logRequest, err error) {
	q, err := parseQuery(w, r)
	if err != nil {
		return l, err
	}
	if l.follow, err = q.flag("follow"); err != nil {
		return l, err
	}
	if l.stamps, err = q.flag("timestamps"); err != nil {
		return l, err
	}
	if l.tail, err = q.number("tail", -1, 0, maxTailLines); err != nil {
		return l, err
	}
	if l.attempt, err = q.number("attempt", 0, 1, 1<<30); err != nil {
		return l, err
	}
	if q.has("since") {
		if l.since, err = parseTime("since", q.get("since"), time.Now()); err != nil {
			return l, err
		}
	}
	l.stream = schemas.Stream(q.get("stream"))
	if q.has("stream") && l.stream != schemas.Stdout && l.stream != schemas.Stderr {
		return l, badQuery("stream", "must be stdout or stderr")
	}
	l.format = streamFormatOf(r.Header, formatText, formatSSE, formatJSON)
	if id := r.Header.Get("Last-Event-ID"); id != "" && l.format == formatSSE {
		place, ok := parsePlace(id)
		if !ok {
			return l, badHeader("Last-Event-ID", "must be the id of an event of this log")
		}
		l.resume, l.tail = &place, -1
	}
	return l, nil
}

func parseTime(name, text string, now time.Time) (time.Time, error) {
	var d schemas.Duration
	if d.UnmarshalText([]byte(text)) == nil && d >= 0 {
		return now.Add(-d.Std()), nil
	}
	if t, err := time.Parse(time.RFC3339Nano, text); err == nil && len(text) <= 64 {
		return t, nil
	}
	return time.Time{}, badQuery(name, `must be a duration such as "10m" or a time such as "2026-01-31T12:00:00Z"`)
}

// logPlace is a place in a log from which reading goes on: everything up to the
// offsets was handed out, and so was all that stands up to the sequence in the stream.
type logPlace struct {
	attempt        int
	stdout, stderr int64
	sequence       uint64
}

func (p logPlace) String() string {
	return fmt.Sprintf("%d-%d-%d-%d", p.attempt, p.stdout, p.stderr, p.sequence)
}

func parsePlace(text string) (p logPlace, ok bool) {
	parts := strings.Split(text, "-")
	if len(text) > 80 || len(parts) != 4 {
		return p, false
	}
	var n [4]int64
	for i, part := range parts {
		v, err := strconv.ParseInt(part, 10, 64)
		if err != nil || v < 0 || part[0] == '+' {
			return p, false
		}
		n[i] = v
	}
	return logPlace{int(n[0]), n[1], n[2], uint64(n[3])}, n[0] >= 1 && n[0] < 1<<30
}

// logs is GET /v1/tasks/{id}/logs.
func (g *Gateway) logs(w *response, r *http.Request) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	ask, err := parseLogRequest(w, r)
	if err != nil {
		return err
	}
	kind := "logs"
	if ask.format == formatSSE {
		kind = "sse"
	}
	done, err := g.follower(kind)
	if err != nil {
		return err
	}
	defer done()

	l, err := g.openLog(r, id, ask)
	if err != nil {
		return err
	}
	if r.Method == http.MethodHead {
		w.Header().Set("Content-Type", string(ask.format))
		return nil
	}
	if ask.resume != nil && l.over() && l.complete() {
		w.WriteHeader(http.StatusNoContent) // an EventSource stops asking
		return nil
	}
	l.out = g.newLogWriter(w, ask.format, ask.stamps)
	defer l.out.close()
	if err := l.read(r.Context()); err != nil {
		if w.wrote || r.Context().Err() != nil {
			panic(http.ErrAbortHandler) // what was sent is not all there is
		}
		return readError(err)
	}
	return nil
}

// logReader hands out one task's log to one client. Only the goroutine that runs
// read, and the bus's while that waits for it, touch it.
type logReader struct {
	g   *Gateway
	ask logRequest
	id  schemas.TaskID
	out *logWriter

	rec      schemas.Record // as it was last seen
	revision uint64
	gone     bool // the record was swept

	from, to int // attempts that are shown
	order    sequencer
	tail     *tail
	given    map[lane]int64   // offset behind what the client has
	next     uint64           // sequence to go on from
	safe     uint64           // everything up to here was handed out
	denied   map[claim]uint64 // what is not so, at which revision of the record
	onGap    func()           // called when something is missing, while following
}

// claim is a worker's word that it holds an attempt.
type claim struct {
	worker  schemas.WorkerID
	attempt int
}

var (
	errOver = errors.New("it has come to its end")
	errGap  = errors.New("a piece of the log is missing")
)

// openLog finds the task and the attempts to show.
func (g *Gateway) openLog(r *http.Request, id schemas.TaskID, ask logRequest) (*logReader, error) {
	ctx, cancel := g.onBus(r)
	defer cancel()
	e, err := g.fetch(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := g.reach(ctx); err != nil { // the record may have come from memory
		return nil, err
	}
	l := &logReader{g: g, ask: ask, id: id, rec: e.Value.Record, revision: e.Revision,
		next: 1, to: 1 << 30, given: map[lane]int64{}, denied: map[claim]uint64{}}
	switch {
	case ask.attempt > l.rec.Attempt:
		return nil, &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Field: "attempt", Detail: "the task has no such attempt yet"}
	case ask.attempt > 0:
		l.from, l.to = ask.attempt, ask.attempt
	default:
		if l.from, err = g.newestLogged(ctx, l.rec); err != nil {
			return nil, readError(err)
		}
		if !ask.follow && l.from > 0 {
			l.to = l.from
		}
	}
	if p := ask.resume; p != nil {
		l.from = max(l.from, min(p.attempt, l.to))
		for stream, offset := range map[schemas.Stream]int64{schemas.Stdout: p.stdout, schemas.Stderr: p.stderr} {
			l.order.set(lane{p.attempt, stream}, offset)
			l.given[lane{p.attempt, stream}] = offset
		}
		l.next, l.safe = p.sequence+1, p.sequence
	}
	if ask.tail >= 0 {
		l.tail = &tail{lines: ask.tail}
	}
	return l, nil
}

// newestLogged finds the newest attempt that has logs, 0 if none has. Attempts of one
// worker come one after the other, so its last chunk is of its newest.
func (g *Gateway) newestLogged(ctx context.Context, rec schemas.Record) (int, error) {
	if len(rec.Holders) <= 1 {
		return rec.Attempt, nil
	}
	stream, err := g.conn.JS.Stream(ctx, schemas.StreamLogs)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", bus.ErrUnavailable, err)
	}
	newest, asked := 0, map[schemas.WorkerID]bool{}
	for _, h := range rec.Holders {
		if asked[h.Worker] {
			continue
		}
		asked[h.Worker] = true
		m, err := stream.GetLastMsgForSubject(ctx, schemas.LogSubject(h.Worker, rec.ID))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("%w: %w", bus.ErrUnavailable, err)
		}
		if attempt, err := strconv.Atoi(m.Header.Get(schemas.HeaderAttempt)); err == nil && rec.HeldBy(h.Worker, attempt) {
			newest = max(newest, attempt)
		}
	}
	return newest, nil
}

// over says that nothing more will come: what the record says had its bytes stored
// before the record said it.
func (l *logReader) over() bool {
	return l.gone || l.rec.State.Final() || l.to < l.rec.Attempt
}

// complete says that all bytes which the record counts have come.
func (l *logReader) complete() bool {
	if l.gone || l.to < l.rec.Attempt {
		return false
	}
	sum := l.rec.Logs
	return sum == nil ||
		l.order.at(lane{l.rec.Attempt, schemas.Stdout}) >= sum.StdoutBytes &&
			l.order.at(lane{l.rec.Attempt, schemas.Stderr}) >= sum.StderrBytes
}

// read hands the log out to its end.
func (l *logReader) read(ctx context.Context) error {
	if err := l.stored(ctx, l.next); err != nil {
		return err
	}
	following := l.ask.follow && !l.over()
	if !following {
		if err := l.give(l.order.release()); err != nil {
			return err
		}
	}
	if err := l.endTail(); err != nil {
		return err
	}
	if following {
		if err := l.follow(ctx); err != nil {
			return err
		}
	} else if l.ask.resume != nil && l.over() && !l.complete() {
		if err := l.stored(ctx, 1); err != nil {
			return err
		}
	}
	if err := l.give(l.order.release()); err != nil {
		return err
	}
	return l.out.end(map[string]schemas.State{"state": l.rec.State})
}

// endTail hands out the last lines of what was stored.
func (l *logReader) endTail() error {
	if l.tail == nil {
		return nil
	}
	pieces := l.tail.pieces
	l.tail = nil
	for k, offset := range l.order.next { // what the tail left out the client shall not get later
		l.given[k] = offset
	}
	for _, p := range slices.Backward(pieces) {
		l.given[p.lane] = p.offset
	}
	return l.write(pieces)
}

// follow hands out what comes until the log is over.
func (l *logReader) follow(ctx context.Context) error {
	if err := l.out.goLive(""); err != nil {
		return err
	}
	for !l.over() {
		err := l.live(ctx)
		switch {
		case errors.Is(err, errOver):
			if err := l.refresh(ctx); err != nil {
				return err
			}
		case errors.Is(err, errGap):
			// It may have been stored under a sequence that we have passed: a server that was
			// killed forgets the last ones and gives them again.
			if err := l.stored(ctx, 1); err != nil {
				return err
			}
			if err := l.give(l.order.release()); err != nil {
				return err
			}
		default:
			return err
		}
	}
	for _, from := range []uint64{l.next, 1} {
		if l.complete() {
			break
		}
		if err := l.stored(ctx, from); err != nil {
			return err
		}
	}
	return nil
}

// live reads on until the task is over, a piece is missing for too long, or ctx ends.
func (l *logReader) live(ctx context.Context) error {
	live, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		err := l.g.tasks.Wait(live, string(l.id), func(it *item, _ uint64, exists bool) bool {
			if !exists || it.state.Final() {
				return true
			}
			if l.ask.attempt == 0 {
				return false
			}
			rec, ok := it.whole() // one attempt: has the task moved on?
			return ok && rec.Attempt > l.to
		})
		if err == nil {
			cancel(errOver)
		}
	}()
	var gap *time.Timer
	l.onGap = func() {
		if gap == nil {
			gap = time.AfterFunc(l.g.cfg.LogGap, func() { cancel(errGap) })
		}
	}
	if len(l.order.held) > 0 {
		l.onGap()
	}
	err := l.g.conn.Read(live, l.options(l.next, true), func(m bus.Msg) error {
		if err := l.message(ctx, m); err != nil {
			return err
		}
		if gap != nil && len(l.order.held) == 0 {
			gap.Stop()
			gap = nil
		}
		return nil
	})
	l.onGap = nil
	if gap != nil {
		gap.Stop()
	}
	cancel(nil)
	<-watched
	return err
}

// logAhead bounds what a reader that is slow holds in memory, to half a megabyte of
// chunks that are no longer than they may be.
const logAhead = 8

func (l *logReader) options(from uint64, follow bool) bus.ReadOptions {
	return bus.ReadOptions{Stream: schemas.StreamLogs, Filter: schemas.LogSubject("*", l.id), FromSequence: from, Follow: follow, Ahead: logAhead}
}

// stored reads what is there.
func (l *logReader) stored(ctx context.Context, from uint64) error {
	return l.g.conn.Read(ctx, l.options(from, false), func(m bus.Msg) error { return l.message(ctx, m) })
}

// refresh takes the record as it is now.
func (l *logReader) refresh(ctx context.Context) error {
	for {
		try, cancel := context.WithTimeout(ctx, l.g.cfg.OpTimeout)
		e, err := l.g.fetch(try, l.id)
		cancel()
		var problem *schemas.Error
		switch {
		case err == nil:
			l.rec, l.revision = e.Value.Record, e.Revision
			return nil
		case errors.As(err, &problem) && problem.Code == schemas.CodeNotFound:
			l.gone = true
			return nil
		case ctx.Err() != nil || !errors.As(err, &problem) || problem.Code != schemas.CodeUnavailable:
			return err
		}
	}
}

// message takes one chunk.
func (l *logReader) message(ctx context.Context, m bus.Msg) error {
	p, worker, ok := parseChunk(m)
	if ok && p.attempt >= l.from && p.attempt <= l.to {
		held, err := l.held(ctx, claim{worker, p.attempt})
		if err != nil {
			return err
		}
		if !held {
			l.g.metrics.foreign.Inc()
		} else if err := l.give(l.order.take(p)); err != nil {
			return err
		}
	}
	l.next = max(l.next, m.Sequence+1)
	switch {
	case len(l.order.held) == 0:
		l.safe = max(l.safe, m.Sequence)
	case l.onGap != nil:
		l.onGap()
	}
	return nil
}

// give hands pieces out, to the client or to the tail.
func (l *logReader) give(pieces []piece) error {
	if l.tail == nil {
		return l.write(pieces)
	}
	for _, p := range pieces {
		if l.asked(p) {
			l.tail.add(p)
		}
	}
	return nil
}

func (l *logReader) asked(p piece) bool {
	return (l.ask.stream == "" || p.stream == l.ask.stream) && (l.ask.since.IsZero() || !p.at.Before(l.ask.since))
}

func (l *logReader) write(pieces []piece) error {
	for _, p := range pieces {
		l.given[p.lane] = p.offset + int64(len(p.data))
		if !l.asked(p) {
			continue
		}
		id := ""
		if l.ask.format == formatSSE {
			id = logPlace{
				attempt: p.attempt, sequence: l.safe,
				stdout: l.given[lane{p.attempt, schemas.Stdout}], stderr: l.given[lane{p.attempt, schemas.Stderr}],
			}.String()
		}
		if err := l.out.write(p, id); err != nil {
			return err
		}
	}
	return nil
}

// held asks the record whether the worker held the attempt. An attempt that it does
// not know yet is looked for in the newest record, since the chunk may be quicker
// than our copy of it; but not again for each chunk of a worker that makes things up.
func (l *logReader) held(ctx context.Context, c claim) (bool, error) {
	if l.rec.HeldBy(c.worker, c.attempt) {
		return true, nil
	}
	if l.over() || c.attempt <= l.rec.Attempt {
		return false, nil
	}
	if at, ok := l.denied[c]; ok {
		if _, revision, _ := l.g.tasks.Get(string(l.id)); revision <= at {
			return false, nil
		}
	}
	if err := l.refresh(ctx); err != nil {
		return false, err
	}
	if l.rec.HeldBy(c.worker, c.attempt) {
		return true, nil
	}
	if len(l.denied) >= 64 {
		clear(l.denied)
	}
	l.denied[c] = l.revision
	return false, nil
}

// parseChunk reads subject and headers of a chunk. They come from a worker, so
// anything may stand there.
func parseChunk(m bus.Msg) (p piece, worker schemas.WorkerID, ok bool) {
	parts := strings.Split(m.Subject, ".")
	if len(parts) != 4 || len(m.Data) == 0 || len(m.Data) > schemas.MaxLogChunk {
		return p, "", false
	}
	attempt, err := strconv.Atoi(m.Header.Get(schemas.HeaderAttempt))
	offset, err2 := strconv.ParseInt(m.Header.Get(schemas.HeaderOffset), 10, 64)
	at, err3 := time.Parse(time.RFC3339Nano, m.Header.Get(schemas.HeaderTime))
	if at = at.UTC(); err3 != nil || at.Year() < 1 || at.Year() > 9999 { // a zone moves it out of what JSON can say
		at = m.Time.UTC()
	}
	p = piece{lane{attempt, schemas.Stream(m.Header.Get(schemas.HeaderStream))}, offset, at, m.Data}
	ok = err == nil && err2 == nil && attempt >= 1 && offset >= 0 && offset < 1<<50 &&
		(p.stream == schemas.Stdout || p.stream == schemas.Stderr)
	return p, schemas.WorkerID(parts[2]), ok
}
