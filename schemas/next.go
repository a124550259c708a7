package schemas

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Meta is what every event carries.
type Meta struct {
	At time.Time // by the clock of the service that writes
	By string    // the actor: "gateway", "placer", "reaper", or a client's name
	Op string    // random id of this write, kept in last_ops
	On uint64    // revision of the record that the write replaces; 0 if it is the first
}

// Event is something that may change a record. The kinds are below.
type Event interface{ meta() Meta }

func (m Meta) meta() Meta { return m }

// tidy gives m as a record keeps it: the time as JSON gives it back, the words short.
func (m Meta) tidy() Meta {
	return Meta{At: m.At.UTC().Round(0), By: line(m.By, maxWordBytes), Op: line(m.Op, maxWordBytes), On: m.On}
}

// Choose gives a queued task to a worker: the placer's event.
type Choose struct {
	Meta
	Worker WorkerID
	Epoch  Epoch
}

// AskCancel is a client's wish to end the task. A queued task ends at once, a held
// one when no process of it is left.
type AskCancel struct {
	Meta
	Grace Duration // between TERM and KILL
}

// AskExtend moves the deadline to TTL from now, never back and never beyond MaxTTL
// after the start. Before the task has run it lengthens the TTL instead. A renewal of an
// instance is one that counts, so it must move the deadline.
type AskExtend struct {
	Meta
	TTL     Duration
	Renewal bool
}

// AskRestart asks for another run of the command in the same container. While one that
// was asked for has not been reported yet, asking again changes nothing.
type AskRestart struct{ Meta }

// Settle folds a worker's report into the record.
type Settle struct {
	Meta
	Report Report
}

// Lose says that the registration (Worker, Epoch) is over and that its containers
// must be dead by now, save those that need no permit: the reaper's event after
// its verdict. Gone says that the worker came back and does not have the attempt,
// so that even such a task is dead.
type Lose struct {
	Meta
	Worker WorkerID
	Epoch  Epoch
	Gone   bool
}

// Sweep lets time do its work: queue timeout, TTL of a queued task, TTL of a task
// whose worker is away for good, or says nothing.
type Sweep struct{ Meta }

// Restore says that the record was read from a backup and that the world has gone on
// since: the task may have been given to workers that the record does not know. All
// containers that need a permit are dead by now.
type Restore struct{ Meta }

// Sentinels of Next. All of them leave the record as it was.
var (
	ErrFinal     = errors.New("the task is final")
	ErrStale     = errors.New("the event is about an attempt or phase that is no longer current")
	ErrUnchanged = errors.New("the event changes nothing")
	ErrTooLate   = errors.New("too little of the task's time is left")
	ErrLimit     = errors.New("the longest lifetime is reached")
	ErrRenewals  = errors.New("the instance has had all its renewals")
	ErrState     = errors.New("the task's state does not allow it")
)

// TransitionError says which event was refused in which state. It wraps one of the
// sentinels.
type TransitionError struct {
	Task  TaskID
	From  State
	Event string
	Err   error
}

func (e *TransitionError) Error() string {
	return fmt.Sprintf("task %s: %s while %s: %v", e.Task, e.Event, e.From, e.Err)
}

// Unwrap gives the sentinel.
func (e *TransitionError) Unwrap() error { return e.Err }

// Intervals that the rules need.
const (
	// ExtendLeast is how much of its time a task must have left to be extended: the
	// new deadline must reach the worker before the old one ends the task.
	ExtendLeast = 2 * time.Second
	// AvoidFor is how long the placer skips a worker that gave the task back.
	AvoidFor = 30 * time.Second
	// LostSlack is what a worker that is away may take, beyond deadline and grace, to
	// end a task by its init alone.
	LostSlack = 10 * time.Second

	// SilentFor is how long a worker that beats may say nothing of a task whose time is over,
	// or whose start should be: storing what many tasks left takes long.
	SilentFor = time.Hour

	// RestoreLeap is how far a restored record leaps over the attempts and extensions that
	// may have been made since the backup: more than there can have been.
	RestoreLeap = 1_000_000

	backoffFirst = 200 * time.Millisecond
	backoffMost  = 30 * time.Second
)

// Transition is one row of the table of a task's life.
type Transition struct {
	From State // "" before the task exists
	To   State
	Who  string
	On   string
}

// Table is the life of a task. Next makes exactly these transitions; the diagram in
// README.md is drawn from it.
func Table() []Transition {
	t := []Transition{
		{"", Queued, "gateway", "accepted"},
		{Queued, Assigned, "placer", "a worker chosen"},
		{Queued, Canceled, "gateway", "cancel"},
		{Queued, Expired, "reaper", "TTL over while queued again"},
		{Queued, Failed, "reaper", "queue timeout"}, // or the restore of a backup
		{Assigned, Starting, "reaper", "report: accepted"},
		{Assigned, Running, "reaper", "report: process started"},
		{Starting, Running, "reaper", "report: process started"},
	}
	for _, from := range []State{Assigned, Starting, Running} {
		for _, to := range []State{Completed, Failed, Canceled, Expired, Queued} {
			t = append(t, Transition{from, to, "reaper", "no process is left"})
		}
	}
	return t
}

// Next gives the record that follows from r by the event. It is pure: it changes
// neither argument, and services may call it again on a newer record after a lost
// compare-and-set. An error is a *TransitionError; errors.Is tells which sentinel.
func Next(r Record, event Event) (Record, error) {
	m := event.meta().tidy()
	n := r.clone()
	n.seal(m.On)
	err := ErrFinal
	if !r.State.Final() {
		switch e := event.(type) {
		case Choose:
			e.Meta = m
			err = n.choose(e)
		case AskCancel:
			e.Meta = m
			err = n.cancel(e)
		case AskExtend:
			e.Meta = m
			err = n.extend(e)
		case AskRestart:
			err = n.restart(m)
		case Settle:
			e.Meta = m
			err = n.settle(e)
		case Lose:
			e.Meta = m
			err = n.lose(e)
		case Sweep:
			err = n.sweep(m)
		case Restore:
			n.restore(m)
			err = nil
		default:
			panic(fmt.Sprintf("schemas: unknown event %T", event))
		}
	}
	if err != nil {
		return r, &TransitionError{Task: r.ID, From: r.State, Event: fmt.Sprintf("%T", event)[len("schemas."):], Err: err}
	}
	return n, nil
}

func (r *Record) choose(e Choose) error {
	if r.State != Queued {
		return ErrState
	}
	// The epoch comes from a beat: no worker shall make a record too large to write.
	if _, err := ParseWorkerID(string(e.Worker)); err != nil || !e.Epoch.Valid() {
		return ErrState
	}
	r.Attempt++
	r.Worker, r.Epoch = e.Worker, e.Epoch
	r.Applied = r.Extensions // its order carries the time left
	r.AssignedAt, r.StartingAt = e.At, time.Time{}
	r.Holders = append(r.Holders, Holder{Attempt: r.Attempt, Worker: e.Worker, Epoch: e.Epoch})
	if n := len(r.Holders); n > MaxHolders {
		r.Holders = slices.Delete(r.Holders, 0, n-MaxHolders)
	}
	r.enter(Assigned, ReasonNone, "", e.Meta)
	return nil
}

func (r *Record) cancel(e AskCancel) error {
	if r.State == Queued {
		r.finish(Canceled, ReasonCanceled, "canceled while it waited for a worker", e.Meta)
		return nil
	}
	if r.Cancel != nil {
		return ErrUnchanged
	}
	r.Cancel = &CancelMark{At: e.At, By: e.By, Grace: e.Grace}
	r.note(e.Meta, "cancel asked")
	return nil
}

func (r *Record) extend(e AskExtend) error {
	if r.Cancel != nil {
		return ErrState
	}
	if r.ExpiresAt.IsZero() {
		ttl := min(e.TTL, r.MaxTTL)
		switch {
		case e.TTL <= r.TTL:
			return ErrUnchanged
		case ttl <= r.TTL:
			return ErrLimit
		case e.Renewal && !r.renew():
			return ErrRenewals
		}
		r.TTL = ttl
		r.Extensions++
		r.note(e.Meta, "ttl lengthened to "+ttl.String())
		return nil
	}
	if r.ExpiresAt.Sub(e.At) < ExtendLeast {
		return ErrTooLate
	}
	last := r.RunningAt.Add(r.MaxTTL.Std())
	asked := e.At.Add(max(e.TTL.Std(), 0))
	switch {
	case asked.After(r.ExpiresAt) && !last.After(r.ExpiresAt):
		return ErrLimit
	case asked.After(last):
		asked = last
	}
	switch {
	case !e.Renewal:
	case !asked.After(r.ExpiresAt):
		return ErrUnchanged
	case !r.renew():
		return ErrRenewals
	}
	// The record may put the end later than the worker has it, by as long as the word of
	// the start was under way: so an end that stays is said to the worker too.
	if asked.After(r.ExpiresAt) {
		r.ExpiresAt = asked
	}
	r.Extensions++
	r.note(e.Meta, "extended to "+r.ExpiresAt.Format(time.RFC3339))
	return nil
}

// renew counts a renewal, if the instance may have one more.
func (r *Record) renew() bool {
	i := r.Instance
	if i == nil || i.Most != nil && i.Renewals >= *i.Most {
		return false
	}
	renewed := *i
	renewed.Renewals++
	r.Instance = &renewed
	return true
}

func (r *Record) restart(m Meta) error {
	switch {
	case r.State != Running || r.Cancel != nil || r.Spec.Judge != nil:
		return ErrState
	case !m.At.Before(r.ExpiresAt):
		return ErrTooLate
	case r.RestartTo > r.Restarts:
		return ErrUnchanged
	}
	r.RestartTo = r.Restarts + 1
	r.note(m, "restart asked")
	return nil
}

// settle joins a report into the record by (attempt, restarts, phase): a phase never
// goes back within one count of restarts.
func (r *Record) settle(e Settle) error {
	rep := e.Report
	if !r.State.Held() || rep.Assignment != r.Assignment() {
		return ErrStale
	}
	if rep.Phase.rank() == 0 || rep.Restarts < r.Restarts {
		return ErrStale
	}
	changed := false
	ended := rep.Phase == PhaseEnded
	ran := r.State == Running || rep.Phase == PhaseRunning || ended && rep.Ran
	if rep.Phase == PhaseRunning && r.State != Running && (!r.ExpiresAt.IsZero() || r.Extensions > 0) {
		// Its deadline was promised, and the worker has it off by as long as its order or this
		// report was under way. So it hears it anew, as it does an extension.
		r.Extensions++
	}
	if ran && r.RunningAt.IsZero() {
		r.RunningAt = r.startedAt(rep.RanFor.Std(), e.At)
		r.ExpiresAt = r.RunningAt.Add(r.TTL.Std())
	}
	if !r.WorkerLostAt.IsZero() { // it came back, and brought its task
		r.WorkerLostAt = time.Time{}
		changed = true
	}
	if applied := min(rep.Applied, r.Extensions); applied > r.Applied {
		r.Applied = applied
		changed = true
	}
	if r.Exposed == 0 && len(r.Spec.Ports) == 0 && rep.Port >= 1 && rep.Port <= 65535 {
		r.Exposed = rep.Port
		changed = true
	}
	judged := r.judged(rep.Judge, e.Meta)
	what := ""
	if r.pin(rep.Image) {
		changed = true
	}
	if rep.Restarts > r.Restarts {
		r.Restarts, r.ReadyAt = rep.Restarts, time.Time{}
		what = fmt.Sprintf("restart %d%s", r.Restarts, rep.Last.after())
		changed = true
	}
	if rep.Ready && rep.Phase == PhaseRunning && r.ReadyAt.IsZero() {
		r.ReadyAt = e.At
		what = "ready"
		changed = true
	}
	if ended {
		end := End{By: EndedLost, Message: "the worker did not say how it ended"}
		if rep.End != nil {
			end = *rep.End
		}
		r.conclude(end, ran, e.Meta)
		return nil
	}
	progress, pull := line(rep.Progress, maxProgressBytes), rep.Pull.sane()
	switch rank := rep.Phase.rank(); {
	case rank == PhaseRunning.rank() && r.State != Running:
		r.try()
		r.Progress, r.ImagePull, r.GiveBacks = "", nil, 0
		r.enter(Running, ReasonNone, "", e.Meta)
		r.History[len(r.History)-1].Note = what
	case rank == PhaseAccepted.rank() && r.State == Assigned:
		r.try()
		r.StartingAt, r.Progress, r.ImagePull = e.At, progress, pull
		r.enter(Starting, ReasonNone, "", e.Meta)
	case rank == PhaseAccepted.rank() && r.State == Starting && r.Progress != progress:
		r.Progress, r.ImagePull = progress, pull
		r.op(e.Meta)
	case changed:
		r.note(e.Meta, cmp.Or(what, "worker reported"))
	case judged:
		r.op(e.Meta)
	case rank < phaseOf(r.State).rank():
		return ErrStale
	default:
		return ErrUnchanged
	}
	return nil
}

// after says for the history what came before a restart.
func (e *Exit) after() string {
	if e == nil {
		return ""
	}
	return fmt.Sprintf(" after exit code %d", e.Code)
}

func phaseOf(s State) Phase {
	switch s {
	case Starting:
		return PhaseAccepted
	case Running:
		return PhaseRunning
	}
	return ""
}

// Heard says whether a worker that sent the report knows all that the record asks of it.
// Of the orders of one task the bus keeps the one that came last, not the newest. on is
// the record's revision when the report came.
func (r *Record) Heard(rep Report, on uint64) bool {
	if !r.State.Held() || rep.Assignment != r.Assignment() || rep.Phase == PhaseEnded {
		return true
	}
	return rep.Applied >= r.Extensions && (r.Cancel == nil || rep.Revision >= on)
}

// startedAt is when the process was started, by our clock: the worker says how long
// ago, and is believed as far as that is after it was given the attempt.
func (r *Record) startedAt(ago time.Duration, now time.Time) time.Time {
	at := now.Add(-min(max(ago, 0), r.MaxTTL.Std()))
	if at.Before(r.AssignedAt) {
		at = r.AssignedAt
	}
	if at.After(now) {
		at = now
	}
	return at
}

// try counts the attempt against max_attempts, once: when it reaches "starting".
func (r *Record) try() {
	if r.State == Assigned {
		r.Tries++
	}
}

// conclude decides what becomes of the task now that no process of it is left, in
// the order of the design: it ended by itself; a client canceled it; its time was
// over; it was given back; it was lost.
func (r *Record) conclude(end End, ran bool, m Meta) {
	end.Reason, end.Message = Reason(line(string(end.Reason), maxWordBytes)), line(end.Message, maxMessageBytes)
	gaveBack := end.By == EndedGaveBack && !ran
	if gaveBack && r.State == Starting { // it had been counted, and shall cost nothing
		r.Tries--
	}
	if !gaveBack {
		r.try()
		r.Exit, r.Stdout, r.Stderr = nil, end.Stdout, end.Stderr
		if end.Exit != nil {
			exit := *end.Exit
			exit.Unknown = exit.Unknown.few()
			r.Exit = &exit
		}
		usage, logs := end.Usage, end.Logs
		logs.Why = line(logs.Why, maxWordBytes)
		usage.Unknown, logs.Unknown = usage.Unknown.few(), logs.Unknown.few()
		r.Usage, r.Logs = &usage, &logs
		r.ArtifactSum = end.ArtifactSum.tidy()
		r.Artifacts = inlineArtifacts(end.Artifacts, r.ArtifactSum)
	}
	timeOver := end.By == EndedDeadline || !r.ExpiresAt.IsZero() && !m.At.Before(r.ExpiresAt)
	switch {
	case end.By == EndedItself && end.Exit != nil && end.Exit.Code == 0 && end.Reason != ReasonUnhealthy:
		r.finish(Completed, ReasonExit, end.Message, m)
	case end.By == EndedItself:
		r.finish(Failed, cmp.Or(end.Reason, ReasonExit), end.Message, m)
	case r.Cancel != nil:
		r.finish(Canceled, ReasonCanceled, "canceled by "+r.Cancel.By, m)
	case timeOver:
		if r.Exit != nil {
			exit := *r.Exit
			exit.TimedOut = true
			r.Exit = &exit
		}
		r.finish(Expired, ReasonExpired, "its time of "+r.TTL.String()+" was over", m)
	case gaveBack:
		r.giveBack(end, m)
	default:
		r.lostAttempt(end, m)
	}
	r.fit()
}

// giveBack puts the task back in the queue at no cost, since nothing of it ran.
func (r *Record) giveBack(end End, m Meta) {
	// Nothing of the attempt ran, so it has no log; its place is for one that has.
	r.Holders = slices.DeleteFunc(r.Holders, func(h Holder) bool { return h.Attempt == r.Attempt })
	back := backoffFirst << min(r.GiveBacks, 10)
	r.GiveBacks++
	r.Avoid = slices.DeleteFunc(r.Avoid, func(a Avoid) bool { return a.Worker == r.Worker || !m.At.Before(a.Until) })
	r.Avoid = append(r.Avoid, Avoid{Worker: r.Worker, Until: m.At.Add(AvoidFor)})
	if n := len(r.Avoid); n > MaxHolders {
		r.Avoid = slices.Delete(r.Avoid, 0, n-MaxHolders)
	}
	waits := r.QueuedAt // a task that no worker can run has waited since then
	r.requeue(ReasonGaveBack, end.Message, min(back, backoffMost), m)
	r.QueuedAt = waits
}

// lostAttempt ends an attempt that its worker lost: on_lost decides.
func (r *Record) lostAttempt(end End, m Meta) {
	message := end.Message
	if message == "" {
		message = fmt.Sprintf("worker %s was lost", r.Worker)
	}
	switch {
	case r.Spec.OnLost != OnLostRequeue:
		r.finish(Failed, ReasonWorkerLost, message, m)
	case r.Tries >= r.Spec.MaxAttempts:
		r.finish(Failed, ReasonWorkerLost, fmt.Sprintf("%s; all %d attempts are used", message, r.Spec.MaxAttempts), m)
	default:
		r.Exit, r.Stdout, r.Stderr, r.Usage, r.Logs, r.Artifacts, r.ArtifactSum = nil, "", "", nil, nil, nil, nil
		r.requeue(ReasonWorkerLost, message, 0, m)
	}
}

func (r *Record) requeue(reason Reason, message string, after time.Duration, m Meta) {
	r.enter(Queued, reason, message, m) // the history still names the worker
	r.Worker, r.Epoch, r.Restarts, r.RestartTo, r.Progress, r.ImagePull = "", "", 0, 0, "", nil
	r.Result = nil
	r.QueuedAt, r.BackAt, r.NotBefore, r.ReadyAt = m.At, m.At, time.Time{}, time.Time{}
	if after > 0 {
		r.NotBefore = m.At.Add(after)
	}
}

func (r *Record) lose(e Lose) error {
	if !r.State.Held() || r.Worker != e.Worker || r.Epoch != e.Epoch {
		return ErrStale
	}
	if r.Spec.OnLost == OnLostWait && !e.Gone {
		if !r.WorkerLostAt.IsZero() {
			return ErrUnchanged
		}
		r.WorkerLostAt = e.At
		r.note(e.Meta, "worker lost; the task waits for it")
		return nil
	}
	r.conclude(unseenEnd(EndedLost), false, e.Meta)
	return nil
}

// unseenEnd is the end of an attempt of which nothing more will be heard.
func unseenEnd(by EndedBy) End {
	return End{By: by, Logs: LogSum{Truncated: true, Why: LogsWorkerLost}, ArtifactSum: &ArtifactSum{Truncated: true, Why: ArtifactsWorkerLost}}
}

// restore decides what becomes of a task of which nobody knows what happened since the
// backup. One that needs no permit may still run somewhere, so it stays with the worker
// that had it, or fails; it is never given to another. Of the others no process is left.
func (r *Record) restore(m Meta) {
	const message = "its record is from a backup, and it may have run since"
	if r.Spec.OnLost == OnLostWait && r.State.Held() {
		r.Extensions += RestoreLeap // so that the worker hears the deadline anew
		r.note(m, "restored from a backup")
		return
	}
	if r.State == Queued || r.State == Assigned { // what nobody knows counts as a try
		r.Tries++
	}
	switch {
	case r.Cancel != nil:
		r.finish(Canceled, ReasonCanceled, "canceled by "+r.Cancel.By, m)
	case !r.ExpiresAt.IsZero() && !m.At.Before(r.ExpiresAt):
		r.finish(Expired, ReasonExpired, "its time of "+r.TTL.String()+" was over", m)
	case r.Spec.OnLost == OnLostRequeue && r.Tries < r.Spec.MaxAttempts:
		r.requeue(ReasonRestored, message, 0, m)
		r.Attempt += RestoreLeap
	default:
		r.finish(Failed, ReasonRestored, message, m)
	}
}

func (r *Record) sweep(m Meta) error {
	switch {
	case r.State == Queued && !r.ExpiresAt.IsZero() && !m.At.Before(r.ExpiresAt):
		r.finish(Expired, ReasonExpired, "its time of "+r.TTL.String()+" was over before another worker was found", m)
	case r.State == Queued && !m.At.Before(r.QueuedAt.Add(r.Spec.Timeouts.Queue.Std())):
		r.finish(Failed, ReasonQueueTimeout, "no worker had room for it within "+r.Spec.Timeouts.Queue.String(), m)
	case !r.WorkerLostAt.IsZero() && !m.At.Before(r.surelyDead()):
		r.conclude(unseenEnd(EndedDeadline), false, m)
	case r.State.Held() && r.WorkerLostAt.IsZero() && !m.At.Before(r.silentAt()):
		r.silence(m)
	default:
		return ErrUnchanged
	}
	return nil
}

// silentAt is until when a worker must have said how its attempt ended, or that it runs.
func (r *Record) silentAt() time.Time {
	if !r.ExpiresAt.IsZero() {
		return r.ExpiresAt.Add(r.Spec.Timeouts.Stop.Std() + SilentFor)
	}
	began := r.AssignedAt
	if r.StartingAt.After(began) {
		began = r.StartingAt
	}
	if n := len(r.History); n > 0 && r.Extensions >= RestoreLeap { // nobody could tell it before the restore
		began = r.History[n-1].At
	}
	return began.Add(r.Spec.Timeouts.Pull.Std() + r.Spec.Timeouts.Start.Std() + SilentFor)
}

// silence ends a task of which its worker, that beats, says nothing. It may still run there,
// so it is never given to another: only what is final can be left behind.
func (r *Record) silence(m Meta) {
	silent := fmt.Sprintf("worker %s did not say what became of it", r.Worker)
	if r.ExpiresAt.IsZero() && r.Cancel == nil {
		end := unseenEnd(EndedItself)
		end.Reason, end.Message = ReasonStartTimeout, silent
		r.conclude(end, false, m)
		return
	}
	r.conclude(unseenEnd(EndedDeadline), false, m)
	r.Message += "; " + silent
}

// surelyDead is when a task that needs no permit has been ended by its own init,
// whose worker is away: at the latest it was started just before the verdict.
func (r *Record) surelyDead() time.Time {
	last := r.ExpiresAt
	if last.IsZero() {
		last = r.WorkerLostAt.Add(r.TTL.Std())
	}
	return last.Add(r.Spec.Timeouts.Stop.Std() + LostSlack)
}

// SweepAt is when Sweep has something to do for the record, the zero time if it is final.
func (r *Record) SweepAt() time.Time {
	switch {
	case r.State == Queued:
		at := r.QueuedAt.Add(r.Spec.Timeouts.Queue.Std())
		if !r.ExpiresAt.IsZero() && r.ExpiresAt.Before(at) {
			at = r.ExpiresAt
		}
		return at
	case r.State.Held() && !r.WorkerLostAt.IsZero():
		return r.surelyDead()
	case r.State.Held():
		return r.silentAt()
	}
	return time.Time{}
}

func (r *Record) enter(s State, reason Reason, message string, m Meta) {
	r.State, r.Reason, r.Message = s, reason, message
	r.note(m, "")
}

func (r *Record) finish(s State, reason Reason, message string, m Meta) {
	r.ImagePull = nil
	r.Spec.Secrets = hidden(r.Spec.Secrets) // they have done their work
	r.EndedAt, r.Progress, r.WorkerLostAt, r.NotBefore, r.Avoid = m.At, "", time.Time{}, time.Time{}, nil
	r.enter(s, reason, message, m)
}

// How long the words are that a record takes from elsewhere.
const (
	maxWordBytes     = 64 // an actor, an op, a reason, an epoch
	maxProgressBytes = 256
	maxMessageBytes  = 512
	maxUnknownBytes  = 1024 // fields of a part of a report that this version does not know
)

// few gives u if it is short: a newer worker may say more than this version knows, but no
// worker shall make a record too large to write.
func (u Unknown) few() Unknown {
	n := 0
	for name, v := range u {
		n += len(name) + len(v)
	}
	if n > maxUnknownBytes {
		return nil
	}
	return u
}

// fit keeps the record of a task that is over within MaxRecordBytes: the inline outputs give
// way. The spec is bounded when it is accepted, and the rest by its counts and by line.
func (r *Record) fit() {
	for limit := MaxInlineOutput; ; limit /= 2 {
		r.Stdout, r.Stderr = cut(r.Stdout, limit), cut(r.Stderr, limit)
		if r.Result != nil && r.Result.Compile != nil && len(r.Result.Compile.Output) > limit {
			result, compile := *r.Result, *r.Result.Compile
			compile.Output, result.Compile = cut(compile.Output, limit), &compile
			r.Result = &result
		}
		b, err := Encode(r)
		if err != nil || len(b) <= MaxRecordBytes {
			return
		}
		if limit == 0 {
			r.Artifacts = nil // the stored list has them
			r.Blobs = nil     // nobody fetches them any more
			return
		}
	}
}

// cut gives at most the first n bytes of s, whole characters, and what is no UTF-8
// as U+FFFD: JSON refuses anything else.
func cut(s string, n int) string {
	if len(s) > n {
		for n > 0 && !utf8.RuneStart(s[n]) {
			n--
		}
		s = s[:n]
	}
	if !utf8.ValidString(s) {
		return cut(strings.ToValidUTF8(s, "\uFFFD"), n)
	}
	return s
}

// line is cut for a line of text: control characters become spaces.
func line(s string, n int) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, cut(s, n))
}
