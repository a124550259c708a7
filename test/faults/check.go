package faults

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// Rule names a promise.
type Rule string

// The rules.
const (
	Lost          Rule = "lost"           // an acknowledged task is not in the records
	Stuck         Rule = "stuck"          // not final in time after everything was healed
	IllegalStep   Rule = "illegal step"   // the table of schemas does not have it
	FinalChanged  Rule = "final changed"  // a final record was written
	Unguarded     Rule = "unguarded"      // a record was written without compare-and-set
	Overlap       Rule = "overlap"        // two attempts of a task lived at once
	StartedTwice  Rule = "started twice"  // one attempt
	AfterFinal    Rule = "after final"    // an attempt lived when its record was final
	Orphan        Rule = "orphan"         // left running
	WrongEnd      Rule = "wrong end"      // its script, wishes and faults do not allow it
	Doubled       Rule = "doubled"        // one Idempotency-Key made two tasks
	RefusedMade   Rule = "refused, made"  // an answer said that nothing was done
	CancelIgnored Rule = "cancel ignored" // overtaken by another attempt
	ExtendLost    Rule = "extend lost"    // it ended before the deadline that was promised
	StaleRead     Rule = "stale read"     // older than what was answered before
	LogLost       Rule = "log lost"       // bytes of a log are missing or wrong, and the record does not say why
)

var rules = []Rule{Lost, Stuck, Overlap, StartedTwice, Orphan, AfterFinal, WrongEnd, IllegalStep, FinalChanged, Unguarded,
	Doubled, RefusedMade, CancelIgnored, ExtendLost, StaleRead, LogLost}

// Violation is one broken promise.
type Violation struct {
	Rule Rule
	Task schemas.TaskID
	At   time.Duration
	What string
}

func (v Violation) String() string {
	return fmt.Sprintf("%s: %s at %v: %s", v.Rule, v.Task, v.At, v.What)
}

// Result is what Check found.
type Result struct {
	Violations []Violation
	Run        Run
	Ops        map[string]int // by "name outcome"
	Accepted   int            // tasks that a client was told of
	Records    int
	Finals     map[string]int // by "state reason"
	Attempts   map[int]int    // tasks by their number of attempts
	Requeues   map[string]int // by cause
	Truncated  map[string]int // logs, by cause
	Logs       int            // that were read
	ByClock    map[string]int // ends and promises that are wrong because a clock was off
	Lives      map[string]int // ended attempts by who ended them
	Faults     []Fault
	FaultsAt   []time.Duration
	Recovery   []time.Duration // of Faults: from healing until what was hurt did its work again; -1 if it did not
	Settled    time.Duration   // from the healing of everything until all were final
	ShownLate  []time.Duration // by how much the deadline in a record was after the one of the container
	IdleLeft   int             // containers that are left and in which nothing was run: init ends them
	Overshoot  []time.Duration // how long after its deadline an expired attempt ended
}

type life struct {
	schemas.Assignment
	start, end time.Duration // end 0: none
	ends       int
	by         schemas.EndedBy
	code       int
	idle       bool
}

type subject struct {
	id      schemas.TaskID
	revs    []Rev
	seenAt  []time.Duration // of revs
	ops     []Event
	lives   []*life
	log     *Log
	created bool // a client was told
	skewed  bool // its record may have been stamped by a clock that was off
}

func (s *subject) last() *schemas.Record {
	if len(s.revs) == 0 {
		return nil
	}
	return s.revs[len(s.revs)-1].Record
}

type checker struct {
	Result
	tasks  map[schemas.TaskID]*subject
	keys   map[string][]Event
	healed time.Duration
	within time.Duration
}

// Check judges a history.
func Check(history []Event) Result {
	c := &checker{tasks: map[schemas.TaskID]*subject{}, keys: map[string][]Event{}, Result: Result{
		Ops: map[string]int{}, Finals: map[string]int{}, Attempts: map[int]int{}, Requeues: map[string]int{}, Lives: map[string]int{},
		Truncated: map[string]int{}, ByClock: map[string]int{}}}
	history = slices.Clone(history)
	slices.SortStableFunc(history, func(a, b Event) int { return cmp.Compare(a.T, b.T) })
	for _, e := range history {
		c.take(e)
	}
	for _, s := range c.tasks {
		slices.SortFunc(s.lives, func(a, b *life) int { return cmp.Compare(a.start, b.start) })
		s.skewed = c.clockWasOff(s)
		c.records(s)
		c.living(s)
		c.wishes(s)
		c.applied(s)
		c.ending(s)
		c.reads(s)
		c.logs(s)
	}
	c.creates()
	c.recoveries(history)
	slices.SortFunc(c.Violations, func(a, b Violation) int { return cmp.Compare(a.At, b.At) })
	return c.Result
}

func (c *checker) broken(rule Rule, s *subject, at time.Duration, format string, args ...any) {
	c.Violations = append(c.Violations, Violation{rule, s.id, at, fmt.Sprintf(format, args...)})
}

func (c *checker) task(id schemas.TaskID) *subject {
	s := c.tasks[id]
	if s == nil {
		s = &subject{id: id}
		c.tasks[id] = s
	}
	return s
}

// since turns a record's time into that of the history.
func (c *checker) since(t time.Time) time.Duration { return t.Sub(c.Run.Epoch) }

func (c *checker) take(e Event) {
	switch {
	case e.Run != nil:
		c.Run = *e.Run
	case e.Op != nil:
		c.Ops[e.Op.Name+" "+e.Op.Outcome]++
		if e.Op.Key != "" {
			c.keys[e.Op.Key] = append(c.keys[e.Op.Key], e)
		}
		if e.Op.Task != "" {
			s := c.task(e.Op.Task)
			s.ops = append(s.ops, e)
			if e.Op.Name == "create" && e.Op.Outcome == OK && !s.created {
				s.created = true
				c.Accepted++
			}
		}
	case e.Rev != nil:
		s := c.task(e.Rev.Task)
		s.revs, s.seenAt = append(s.revs, *e.Rev), append(s.seenAt, e.T)
	case e.Log != nil:
		c.task(e.Log.Task).log = e.Log
	case e.Write != nil:
		c.broken(Unguarded, c.task(e.Write.Task), e.T, "written without an expected revision")
	case e.Fault != nil:
		c.Faults, c.FaultsAt = append(c.Faults, *e.Fault), append(c.FaultsAt, e.T)
	case e.Healed != nil:
		c.healed, c.within = e.T, e.Healed.Within
	case e.Life != nil:
		c.takeLife(e)
	}
}

func (c *checker) takeLife(e Event) {
	s := c.task(e.Life.Assignment.Task)
	i := slices.IndexFunc(s.lives, func(l *life) bool { return l.Assignment == e.Life.Assignment })
	if i < 0 {
		s.lives = append(s.lives, &life{Assignment: e.Life.Assignment, start: -1})
		i = len(s.lives) - 1
	}
	l := s.lives[i]
	switch {
	case e.Life.Do == "start" && l.start >= 0:
		c.broken(StartedTwice, s, e.T, "attempt %d on %s was started again", l.Attempt, l.Worker)
	case e.Life.Do == "start":
		l.start, l.idle = e.T, e.Life.Idle
	case l.ends == 0:
		l.end, l.by, l.code = e.T, e.Life.By, e.Life.Code
		l.ends = 1
		c.Lives[cmp.Or(string(l.by), "unsaid")]++
	}
}

func steps() map[[2]schemas.State]bool {
	m := map[[2]schemas.State]bool{}
	for _, t := range schemas.Table() {
		m[[2]schemas.State{t.From, t.To}] = true
	}
	return m
}

var allowed = steps()

// records checks every step of a record.
func (c *checker) records(s *subject) {
	if len(s.revs) == 0 {
		if s.created {
			c.broken(Lost, s, s.ops[0].T, "a client was told of it, and there is no record")
		}
		return
	}
	c.Records++
	// The observer may be told of one revision twice.
	var before *Rev
	for i, rev := range s.revs {
		if before != nil && rev.Revision == before.Revision {
			continue
		}
		at := s.seenAt[i]
		if rev.Deleted || rev.Record == nil {
			c.broken(Lost, s, at, "its record was deleted at revision %d", rev.Revision)
			return
		}
		c.step(s, before, rev, at)
		before = &s.revs[i]
	}
	r := s.last()
	if !r.State.Final() {
		if s.skewed && r.State == schemas.Queued { // its queue timeout counts from an hour to come
			c.ByClock["still queued"]++
			return
		}
		c.broken(Stuck, s, s.seenAt[len(s.seenAt)-1], "it is %s in attempt %d on %q", r.State, r.Attempt, r.Worker)
		return
	}
	final := s.seenAt[len(s.seenAt)-1]
	if c.healed > 0 && final > c.healed+c.within {
		c.broken(Stuck, s, final, "it was final %v after everything was healed", (final - c.healed).Round(time.Millisecond))
	}
	if c.healed > 0 {
		c.Settled = max(c.Settled, final-c.healed)
	}
	c.Finals[string(r.State)+" "+string(r.Reason)]++
	c.Attempts[r.Attempt]++
	for i, h := range r.History {
		if i > 0 && h.State == schemas.Queued && r.History[i-1].State != schemas.Queued {
			c.Requeues[c.cause(s, h)]++
		}
	}
}

// cause says why a task was given up.
func (c *checker) cause(s *subject, h schemas.Change) string {
	for _, l := range s.lives {
		if l.Attempt == h.Attempt {
			return fmt.Sprintf("%s, ended by %s", h.Reason, cmp.Or(l.by, "nobody"))
		}
	}
	return string(h.Reason) + ", not started"
}

func (c *checker) step(s *subject, before *Rev, rev Rev, at time.Duration) {
	r := rev.Record
	var old []schemas.Change
	if before != nil {
		b := before.Record
		old = b.History
		if rev.Revision < before.Revision {
			c.broken(IllegalStep, s, at, "revision %d came after %d", rev.Revision, before.Revision)
			return
		}
		if b.State.Final() {
			c.broken(FinalChanged, s, at, "it was %s at revision %d and is %s at %d", b.State, before.Revision, r.State, rev.Revision)
			return
		}
		switch {
		case r.Attempt < b.Attempt:
			c.broken(IllegalStep, s, at, "attempt %d after %d", r.Attempt, b.Attempt)
		case r.ExpiresAt.Before(b.ExpiresAt):
			c.broken(IllegalStep, s, at, "the deadline went back from %v to %v", b.ExpiresAt, r.ExpiresAt)
		case b.Cancel != nil && r.Cancel == nil:
			c.broken(IllegalStep, s, at, "the cancel mark went")
		case !b.RunningAt.IsZero() && !r.RunningAt.Equal(b.RunningAt):
			c.broken(IllegalStep, s, at, "it ran first at another time")
		}
	}
	h := r.History
	if len(h) == 0 || h[len(h)-1].State != r.State || h[len(h)-1].Attempt != r.Attempt {
		c.broken(IllegalStep, s, at, "revision %d: its history does not end with its state", rev.Revision)
		return
	}
	if len(h) < schemas.MaxHistory { // a longer one has lost its middle
		if len(h) < len(old) || !slices.EqualFunc(old, h[:len(old)], same) {
			c.broken(IllegalStep, s, at, "revision %d forgets what stood in the one before: a write was overwritten", rev.Revision)
			return
		}
	}
	from := max(0, len(old)-1)
	if len(h) == schemas.MaxHistory {
		from = 2
	}
	var was schemas.Change
	if before != nil || from > 0 {
		was, h = h[from], h[from+1:]
	}
	for _, n := range h {
		if n.State != was.State && !allowed[[2]schemas.State{was.State, n.State}] {
			c.broken(IllegalStep, s, at, "revision %d: from %q to %q by %s", rev.Revision, was.State, n.State, n.By)
		}
		want := was.Attempt
		if n.State == schemas.Assigned && was.State == schemas.Queued {
			want++
		}
		if n.Attempt != want {
			c.broken(IllegalStep, s, at, "revision %d: attempt %d after %d", rev.Revision, n.Attempt, was.Attempt)
		}
		was = n
	}
}

func same(a, b schemas.Change) bool {
	return a.At.Equal(b.At) && a.State == b.State && a.By == b.By && a.Attempt == b.Attempt && a.Note == b.Note
}

// living checks when attempts lived.
func (c *checker) living(s *subject) {
	r := s.last()
	var before *life
	for _, l := range s.lives {
		if l.idle { // of a start that was broken off, or of a process too quick to be seen
			if l.ends == 0 {
				c.IdleLeft++
			}
			continue
		}
		if l.ends == 0 {
			c.broken(Orphan, s, l.start, "attempt %d on %s was never ended", l.Attempt, l.Worker)
			l.end = 1 << 62
		}
		if before != nil && before.ends > 0 && l.start < before.end {
			c.broken(Overlap, s, l.start, "attempt %d on %s began %v before the end of attempt %d on %s",
				l.Attempt, l.Worker, (before.end - l.start).Round(time.Millisecond), before.Attempt, before.Worker)
		}
		if before == nil || l.end > before.end {
			before = l
		}
		if r == nil {
			c.broken(Lost, s, l.start, "attempt %d on %s was started, and there is no record", l.Attempt, l.Worker)
			continue
		}
		if !r.State.Final() {
			continue
		}
		if final := c.ended(s); l.start > final {
			c.broken(AfterFinal, s, l.start, "attempt %d on %s was started %v after the task was %s", l.Attempt, l.Worker, l.start-final, r.State)
		} else if l.ends > 0 && l.end > final+clockSlack {
			c.broken(AfterFinal, s, l.end, "attempt %d on %s lived until %v after the task was %s (%s)", l.Attempt, l.Worker, l.end-final, r.State, r.Reason)
		}
		if r.State == schemas.Expired && !s.skewed && (l.by == schemas.EndedDeadline || l.by == "" && l.Attempt == r.Attempt) {
			c.Overshoot = append(c.Overshoot, l.end-c.since(r.ExpiresAt))
		}
	}
}

// clockWasOff says whether a service whose clock was off may have stamped the record.
// An agent stamps none, and a NATS server's clock is in none.
func (c *checker) clockWasOff(s *subject) bool {
	if len(s.revs) == 0 {
		return false
	}
	for i, f := range c.Faults {
		core := !strings.HasPrefix(f.Target, "agent") && !strings.HasPrefix(f.Target, "nats")
		if strings.HasPrefix(f.Kind, ClockOff) && core && c.FaultsAt[i] <= s.seenAt[len(s.seenAt)-1] && s.seenAt[0] <= f.Until {
			return true
		}
	}
	return false
}

// ended is when a final record was written: as it says, unless a clock was off.
func (c *checker) ended(s *subject) time.Duration {
	if s.skewed {
		return s.seenAt[len(s.seenAt)-1]
	}
	return c.since(s.last().EndedAt)
}

// clockSlack is how far the wall clock of records may drift from that of the history
// during a run.
const clockSlack = 50 * time.Millisecond

// sightSlack is how much of the life of a real container may not have been seen.
const sightSlack = time.Second

// wishes checks what was promised to clients.
func (c *checker) wishes(s *subject) {
	r := s.last()
	if r == nil {
		return
	}
	for _, e := range s.ops {
		op := e.Op
		if op.Outcome != OK || op.Seen == nil {
			continue
		}
		if op.Seen.State.Final() && r.State != op.Seen.State {
			c.broken(FinalChanged, s, e.T, "%s was answered with %s, and it is %s", op.Name, op.Seen.State, r.State)
		}
		switch op.Name {
		case "cancel":
			if op.Seen.State.Final() {
				continue
			}
			if r.Attempt > op.Seen.Attempt {
				c.broken(CancelIgnored, s, e.T, "attempt %d came after the cancel in attempt %d", r.Attempt, op.Seen.Attempt)
			}
			if r.State == schemas.Expired || r.State == schemas.Failed && (r.Reason == schemas.ReasonWorkerLost || r.Reason == schemas.ReasonQueueTimeout) {
				c.broken(CancelIgnored, s, e.T, "it is %s (%s) although its cancel was acknowledged before", r.State, r.Reason)
			}
		case "extend":
			if op.Seen.ExpiresAt.IsZero() {
				continue
			}
			if r.ExpiresAt.Before(op.Seen.ExpiresAt) {
				c.broken(ExtendLost, s, e.T, "its deadline is %v before the acknowledged one", op.Seen.ExpiresAt.Sub(r.ExpiresAt))
			}
			promised := c.since(op.Seen.ExpiresAt)
			for _, l := range s.lives {
				if op.Status != 200 || l.by != schemas.EndedDeadline || l.end <= e.T || l.end >= promised-time.Second {
					continue
				}
				if s.skewed {
					c.ByClock["extended, yet ended before"]++
				} else {
					c.broken(ExtendLost, s, l.end, "attempt %d was ended %v before the acknowledged deadline", l.Attempt, promised-l.end)
				}
			}
		}
	}
}

// applied checks that no attempt was ended before a deadline that its record had shown
// as carried out.
func (c *checker) applied(s *subject) {
	for _, l := range s.lives {
		if l.by != schemas.EndedDeadline {
			continue
		}
		for i, rev := range s.revs {
			r := rev.Record
			if s.seenAt[i] >= l.end || r == nil || r.State != schemas.Running || r.Attempt != l.Attempt || r.Extensions == 0 || r.Applied < r.Extensions {
				continue
			}
			if until := c.since(r.ExpiresAt); l.end >= until-time.Second {
				continue
			} else if s.skewed {
				c.ByClock["extended, yet ended before"]++
			} else {
				c.broken(ExtendLost, s, l.end, "attempt %d was ended %v before the deadline that it had at revision %d", l.Attempt, until-l.end, rev.Revision)
			}
			break
		}
	}
}

// script is what a task's command does by itself.
type script struct {
	life   time.Duration // -1: it never ends
	code   int
	reason schemas.Reason // of its failure
	starts bool
	output int64 // bytes of stdout; 0: that does not matter
}

func scriptOf(spec schemas.Spec) script {
	w := append(slices.Clone(spec.Command), "", "", "")
	number := func(s string) int { n, _ := strconv.Atoi(s); return n }
	length := func(s string) time.Duration {
		d, err := time.ParseDuration(s)
		if err != nil {
			return -1
		}
		return d
	}
	switch w[0] {
	case "exit":
		return script{code: number(w[1]), reason: schemas.ReasonExit, starts: true}
	case "sleep", "ignore-term":
		return script{life: length(w[1]), code: number(w[2]), reason: schemas.ReasonExit, starts: true}
	case "log":
		return script{life: length(w[2]), starts: true, output: int64(number(w[1]))}
	case "spam":
		return script{starts: true, output: int64(number(w[1]))}
	case "oom", "eat":
		return script{code: 137, reason: schemas.ReasonOOM, starts: true}
	case "fail":
		if w[1] == "image" {
			return script{reason: schemas.ReasonImage}
		}
		return script{code: 127, reason: schemas.ReasonNotFound}
	case "refuse":
		return script{life: -1}
	}
	return script{life: -1, starts: true}
}

// ending checks that a final state is one that the task may have.
func (c *checker) ending(s *subject) {
	r := s.last()
	if r == nil || !r.State.Final() {
		return
	}
	at := c.ended(s)
	wrong := func(format string, args ...any) {
		c.broken(WrongEnd, s, at, "%s (%s), %v: %s", r.State, r.Reason, r.Spec.Command, fmt.Sprintf(format, args...))
	}
	do := scriptOf(r.Spec)
	var final *life
	for _, l := range s.lives {
		if l.Attempt == r.Attempt {
			final = l
		}
		if l.by == schemas.EndedItself && (do.life < 0 || l.end-l.start < do.life) {
			wrong("attempt %d ended by itself after %v", l.Attempt, l.end-l.start)
		}
	}
	itself := func() {
		switch {
		case r.Exit == nil:
			wrong("it has no exit code")
		case r.Exit.Code != do.code:
			wrong("its exit code is %d", r.Exit.Code)
		case !do.starts:
		case final == nil:
			wrong("attempt %d never lived", r.Attempt)
		case final.by == "" && final.ends > 0:
			if do.life < 0 || final.end-final.start < do.life-sightSlack {
				wrong("attempt %d lived only %v", r.Attempt, final.end-final.start)
			}
		case final.by != schemas.EndedItself:
			wrong("attempt %d was ended by %s", r.Attempt, cmp.Or(final.by, "nobody"))
		}
	}
	switch {
	case r.State == schemas.Completed:
		if itself(); do.code != 0 || !do.starts {
			wrong("its script fails")
		}
		if l := r.Logs; do.output > 0 && (l == nil || !l.Truncated && l.StdoutBytes != do.output) {
			wrong("of its log there is %+v", l)
		}
	case r.State == schemas.Canceled:
		// The end is stamped when it was heard of, and a cancel may have come between that and its write.
		written := s.seenAt[len(s.seenAt)-1]
		if !slices.ContainsFunc(s.ops, func(e Event) bool { return e.Op.Name == "cancel" && e.Op.Began <= written }) {
			wrong("nobody asked")
		}
	case r.State == schemas.Expired:
		// The worker's own clock decides, and its report of the start may have come late.
		over := !s.skewed && !r.ExpiresAt.IsZero() && at >= c.since(r.ExpiresAt)-time.Second
		if !over && final != nil && (final.by == schemas.EndedDeadline || final.by == "") {
			over = final.end-s.lives[0].start >= r.Spec.TTL.Std()-time.Second
			if late := c.since(r.ExpiresAt) - final.end; over && r.Extensions == 0 && !s.skewed {
				c.ShownLate = append(c.ShownLate, late)
			}
		}
		if r.ExpiresAt.IsZero() && r.Spec.OnLost == schemas.OnLostWait {
			// Whether it ran is not known: it would have been ended by its init.
			over = over || r.EndedAt.Sub(r.AssignedAt) >= r.TTL.Std()
		}
		switch {
		case over:
		case s.skewed:
			c.ByClock["expired too soon"]++
		default:
			wrong("its time was not over")
		}
	case r.Reason == schemas.ReasonImage && do.reason == r.Reason:
	case r.Reason == schemas.ReasonWorkerLost:
		switch {
		case !c.hurt(at):
			wrong("no worker was hurt")
		case r.Spec.OnLost == schemas.OnLostRequeue && r.Tries < r.Spec.MaxAttempts:
			wrong("only %d of %d attempts are used", r.Tries, r.Spec.MaxAttempts)
		}
	case r.Reason == schemas.ReasonQueueTimeout:
		waited := r.EndedAt.Sub(r.QueuedAt)
		if s.skewed {
			waited = at - s.seenAt[0]
		}
		switch {
		case waited >= r.Spec.Timeouts.Queue.Std():
		case s.skewed:
			c.ByClock["queue timeout too soon"]++
		default:
			wrong("it waited only %v", waited)
		}
	case r.Reason == do.reason:
		itself()
	default:
		wrong("its script has no such end")
	}
}

// hurt says whether there was a fault before at that may take a worker away.
func (c *checker) hurt(at time.Duration) bool {
	for i, f := range c.Faults {
		if f.Kind != Copies && c.FaultsAt[i] <= at {
			return true
		}
	}
	return false
}

// logs checks that a final task's log is all there, or that the record says why not.
func (c *checker) logs(s *subject) {
	r := s.last()
	if s.log == nil || r == nil || !r.State.Final() || r.Logs == nil {
		return
	}
	i := slices.IndexFunc(s.lives, func(l *life) bool { return l.Attempt == r.Attempt })
	if i < 0 {
		return
	}
	c.Logs++
	at := s.seenAt[len(s.seenAt)-1]
	wrote, got := scriptOf(r.Spec).output, s.log
	bad := func(format string, args ...any) {
		c.broken(LogLost, s, at, "%s (%s), attempt %d on %s wrote %d bytes, %d were read: %s",
			r.State, r.Reason, r.Attempt, r.Worker, wrote, got.Bytes, fmt.Sprintf(format, args...))
	}
	if got.Good < got.Bytes {
		bad("byte %d is not what was written", got.Good)
	}
	switch l := r.Logs; {
	case !l.Truncated:
		if got.Bytes != wrote || l.StdoutBytes != wrote {
			bad("the record says all %d", l.StdoutBytes)
		}
		return
	case l.Why == schemas.LogsLimit, l.Why == schemas.LogsDiskFull:
		if got.Bytes != l.StdoutBytes || l.StdoutBytes+l.Dropped != wrote {
			bad("the record says %d, and that %d were dropped", l.StdoutBytes, l.Dropped)
		}
		if l.Why == schemas.LogsDiskFull && !c.hurt(at) {
			bad("no disk was full")
		}
	case l.Why == schemas.LogsWorkerLost:
		if s.lives[i].by == schemas.EndedItself && !c.hurt(at) {
			bad("its worker was not hurt")
		}
	default:
		bad("truncated by %q", l.Why)
	}
	c.Truncated[r.Logs.Why]++
}

// reads checks that what was answered once is not unsaid later.
func (c *checker) reads(s *subject) {
	for i, e := range s.ops {
		if e.Op.Name == "get" && e.Op.Status == 404 && slices.ContainsFunc(s.ops[:i], func(b Event) bool {
			return b.Op.Name == "create" && b.Op.Outcome == OK && b.T < e.Op.Began
		}) {
			c.broken(Lost, s, e.T, "gateway %d does not know it", e.Op.Gateway+1)
		}
		if e.Op.Seen == nil {
			continue
		}
		for _, b := range s.ops[:i] {
			if b.Op.Seen != nil && b.T < e.Op.Began && b.Op.Seen.Revision > e.Op.Seen.Revision {
				c.broken(StaleRead, s, e.T, "%s answered revision %d after %d", e.Op.Name, e.Op.Seen.Revision, b.Op.Seen.Revision)
				break
			}
		}
	}
}

// creates checks what became of the Idempotency-Keys.
func (c *checker) creates() {
	made := map[string][]schemas.TaskID{}
	for _, s := range c.tasks {
		if r := s.last(); r != nil && r.Spec.Labels["key"] != "" {
			made[r.Spec.Labels["key"]] = append(made[r.Spec.Labels["key"]], s.id)
		}
	}
	for key, ops := range c.keys {
		told := map[schemas.TaskID]bool{}
		may := false
		for _, e := range ops {
			if e.Op.Outcome == OK {
				told[e.Op.Task] = true
			}
			may = may || e.Op.Outcome != Failed
		}
		at := ops[len(ops)-1].T
		if len(told) > 1 || len(made[key]) > 1 {
			c.broken(Doubled, c.task(ops[0].Op.Task), at, "key %s: told of %v, made %v", key, slices.Sorted(maps.Keys(told)), made[key])
		}
		if !may && len(made[key]) > 0 {
			c.broken(RefusedMade, c.task(made[key][0]), at, "key %s was refused every time", key)
		}
	}
}

// recoveries finds, for each fault, when all that it hurt did their work again: a worker
// started an attempt, a gateway answered, a placer placed, a reaper wrote, and a record
// was written where NATS was hurt.
func (c *checker) recoveries(history []Event) {
	did := func(e Event, name string) bool {
		service := strings.TrimRight(name, "0123456789")
		var by string
		if e.Rev != nil && e.Rev.Record != nil {
			if h := e.Rev.Record.History; len(h) > 0 {
				by = h[len(h)-1].By
			}
		}
		switch {
		case strings.HasPrefix(name, "agent-"):
			return e.Life != nil && e.Life.Do == "start" && name == "agent-"+string(e.Life.Assignment.Worker)
		case service == "gateway":
			return e.Op != nil && e.Op.Outcome == OK && name == fmt.Sprintf("gateway%d", e.Op.Gateway+1)
		case service == "nats":
			return e.Rev != nil
		}
		return by == service
	}
	for _, f := range c.Faults {
		all := time.Duration(0)
		if f.Kind == Copies {
			all = -1 // nothing to recover from
		}
		for _, name := range strings.Fields(f.Target) {
			from, _ := slices.BinarySearchFunc(history, f.Until, func(e Event, t time.Duration) int { return cmp.Compare(e.T, t) })
			i := slices.IndexFunc(history[from:], func(e Event) bool { return did(e, name) })
			if i < 0 {
				all = -1
				break
			}
			all = max(all, history[from+i].T-f.Until)
		}
		c.Recovery = append(c.Recovery, all)
	}
}

// Count is how many violations of a rule there are.
func (r Result) Count(rule Rule) (n int) {
	for _, v := range r.Violations {
		if v.Rule == rule {
			n++
		}
	}
	return n
}
