package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
)

var (
	errStopped    = errors.New("an order says stop")
	errSuperseded = errors.New("the task's record has left this attempt")
)

// attempt is what the agent knows of one attempt that is not closed. One goroutine
// takes it from its order to its end; orders reach in through the methods that
// lock mu.
type attempt struct {
	schemas.Assignment
	agent     *Agent
	noPermit  bool
	needs     schemas.Resources
	health    *schemas.Health
	gpus      []int // of the attempt's goroutine, with reserved
	recovered bool
	isJudge   bool
	trace     string // W3C traceparent of the order
	log       zerolog.Logger

	ctx     context.Context // ends with the agent, or with cause errSuperseded
	cancel  context.CancelCauseFunc
	closed  chan struct{} // closed by close
	unsaid  atomic.Bool   // recovered or kept, and not reported yet under this registration
	dead    chan struct{} // closed once no process of it is left, or ever will be
	removed chan struct{} // closed when the agent has done with it

	reserved bool     // of the attempt's goroutine: it holds room on the host
	image    string   // of the attempt's goroutine: how its image came
	pins     []func() // of the attempt's goroutine: let go of its blobs
	exposed  int      // of the attempt's goroutine: the port that its image exposes, if the spec names none

	// reconnected is of the attempt's goroutine: closed by a reconnect to which the
	// attempt has not answered yet. It outlives watch, so that none is missed.
	reconnected <-chan struct{}

	judgement *judgeLog // of the attempt's goroutine, while it is a judge's

	logs *shipper // of the attempt's goroutine; nil before the process was started
	safe offsets  // of the journal: log bytes that an earlier agent has surely stored

	mu        sync.Mutex
	found     Attempt                 // under mu: once started
	unstart   context.CancelCauseFunc // under mu: breaks off pulling and starting
	stop      *time.Duration          // under mu: grace, once an order said stop
	expired   bool                    // under mu: the stop said that its time is over
	revision  uint64                  // under mu: of the newest order handled
	applied   int                     // under mu: extensions carried out
	restarts  int                     // under mu: at least so many, as the record has it
	restartTo int                     // under mu: a client asked for so many
	readyRun  int                     // under mu: the run that is ready, counted from 1
	unhealthy string                  // under mu: why a run was stopped
	judged    *schemas.JudgeResult    // under mu: of a judge, what has come of it so far
	deadline  deadline                // under mu: as the newest order says it
	given     deadline                // under mu: what the process was started with
	report    schemas.Report          // under mu: what is true, as last said or about to be
	timer     *time.Timer             // under mu: says it later, or again
	resolved  *schemas.Resolved       // under mu: which image it is, once known
	pullSince time.Duration           // under mu: when it first said how far the image is
	sends     int                     // under mu: reports sent
	repeats   int                     // under mu: of the present one
	gone      bool                    // under mu: closed or superseded: nothing more is said
}

// deadline is the time left at the moment an order was handled.
type deadline struct {
	left     time.Duration
	at       time.Duration // on the runtime's clock
	counting bool          // it stands, even if the process has not been started
}

// remaining is what is left at now for a process that was started ran ago.
func (d deadline) remaining(now, ran time.Duration) time.Duration {
	if !d.counting {
		return max(0, d.left-ran)
	}
	return max(0, d.left-(now-d.at))
}

// run takes the attempt through body to its end, and through its closing.
func (t *attempt) run(body func()) {
	t.agent.attempts.Go(func() {
		defer t.cancel(nil)
		body()
		t.vacate()
		close(t.dead)
		t.agent.ended(t)
		defer t.agent.done(t)
		t.await()
	})
}

// begin takes a new attempt from its order to its end.
func (t *attempt) begin(o schemas.Order, before *attempt, journalled error) {
	t.mu.Lock()
	sctx, unstart := context.WithCancelCause(t.ctx)
	t.unstart = unstart
	if t.stop != nil {
		unstart(errStopped)
	}
	t.mu.Unlock()
	defer unstart(nil)

	if before != nil {
		<-before.dead // two containers of one task never run at once
	}
	if journalled != nil {
		t.log.Error().Err(journalled).Msg("journal")
		t.giveBack("the worker cannot write its journal")
		return
	}
	if o.Spec.Judge != nil {
		var err error
		if t.judgement, err = newJudgeLog(t.agent.judgePath(t.Assignment), *o.Spec.Judge); err != nil {
			t.log.Error().Err(err).Msg("judge")
			t.giveBack("the worker cannot write down what it judges")
			return
		}
	}
	if !t.agent.takes(o.Spec.Kind) {
		t.giveBack(fmt.Sprintf("worker %s does not take tasks of this kind", t.Worker))
		return
	}
	gpus, err := t.agent.reserve(t.needs)
	if err != nil {
		t.giveBack(err.Error())
		return
	}
	t.reserved, t.gpus = true, gpus
	if len(gpus) > 0 { // the next agent must know which are taken
		if err := t.agent.journal.change(t.Assignment, func(e *entry) { e.GPUs = gpus }); err != nil {
			t.log.Error().Err(err).Msg("journal")
			t.giveBack("the worker cannot write its journal")
			return
		}
	}

	t.say(schemas.Report{Phase: schemas.PhaseAccepted}, t.agent.cfg.HoldBack)
	began := t.agent.rt.Now()
	found, end := t.start(sctx, *o.Spec, o.Image, o.Blobs)
	switch {
	case t.ctx.Err() != nil:
		// The agent ends or the attempt was superseded. What was started in that very
		// moment is the next agent's to recover, or must not live.
		if found != nil && context.Cause(t.ctx) == errSuperseded {
			t.kill(found)
		}
	case end != nil:
		t.finish(*end, false)
	default:
		took := t.agent.rt.Now() - began
		t.agent.metrics.started.WithLabelValues(t.image).Observe(took.Seconds())
		t.watch(found, took)
	}
}

// resume goes on with an attempt of an earlier agent. found is nil if nothing of it
// was begun.
func (t *attempt) resume(found Attempt) {
	if found == nil {
		t.giveBack("the agent was restarted before it had begun")
		return
	}
	_, started := found.StartedFor()
	if !started {
		t.kill(found)
		_, started = found.StartedFor() // just now, perhaps
	}
	if !started {
		t.giveBack("the agent was restarted before the process was started")
		return
	}
	if t.isJudge {
		var err error
		if t.judgement, err = openJudgeLog(t.agent.judgePath(t.Assignment)); err != nil {
			t.log.Error().Err(err).Msg("judge")
			t.kill(found)
			t.finish(schemas.End{By: schemas.EndedLost, Message: "the worker has lost what it was to judge"}, true)
			return
		}
	}
	t.watch(found, t.agent.cfg.HoldBack)
}

// start makes the image present and the process run. It returns either an attempt
// or how it ended without one.
func (t *attempt) start(ctx context.Context, spec schemas.Spec, pinned *schemas.Resolved, uses []schemas.BlobUse) (Attempt, *schemas.End) {
	pull, cancel := context.WithTimeoutCause(ctx, spec.Timeouts.Pull.Std(), &StartError{
		Reason: schemas.ReasonPullTimeout, Message: fmt.Sprintf("the image and the blobs were not here within %s", spec.Timeouts.Pull)})
	began := time.Now()
	var pulled atomic.Int32 // 1 once it is pulled, 2 when that is over: word of a pull may come late, and from elsewhere
	span := t.span("image", began)
	image, err := t.agent.rt.Image(pull, spec, pinned, func(said Progress) {
		if pulled.CompareAndSwap(0, 1) {
			t.agent.pulling.Add(1)
		}
		t.progress(said)
	})
	err = because(pull, err)
	defer cancel()
	t.image = imagePresent
	if pulled.Swap(2) == 1 {
		t.agent.pulling.Add(-1)
		t.image = imagePulled
	}
	how := t.image
	if err != nil {
		how = imageFailed
	}
	t.agent.metrics.image.WithLabelValues(how).Observe(time.Since(began).Seconds())
	span.Set("dayfly.image", how)
	span.End(err)
	if err != nil {
		return nil, t.unstarted(ctx, err)
	}
	t.mu.Lock()
	t.resolved = &schemas.Resolved{ID: image.ID, Digest: image.Digest}
	t.mu.Unlock()
	if len(spec.Ports) == 0 {
		t.exposed = image.Port
	}
	paths, err := t.fetchBlobs(pull, uses)
	if err == nil && t.judgement != nil {
		err = t.judgement.keep(paths)
	}
	if err != nil {
		return nil, t.unstarted(ctx, err)
	}

	t.agent.mu.Lock()
	lease := t.agent.lease
	t.agent.mu.Unlock()
	if t.agent.rt.Now() >= lease {
		return nil, &schemas.End{By: schemas.EndedGaveBack, Message: fmt.Sprintf("worker %s has lost touch with the bus", t.Worker)}
	}
	t.mu.Lock()
	t.given = t.deadline
	left := t.deadline.remaining(t.agent.rt.Now(), 0)
	t.mu.Unlock()
	span = t.span("start", time.Now())
	found, err := t.agent.rt.Start(span.In(ctx), StartRequest{
		Assignment: t.Assignment, Spec: spec, Image: image, TimeLeft: left, NoPermit: t.noPermit,
		Grace: spec.Timeouts.Stop.Std(), LogLimit: t.agent.cfg.LogLimit, GPUs: t.gpus, Blobs: paths, Within: spec.Timeouts.Start.Std(),
	})
	span.End(err)
	if err != nil {
		return nil, t.unstarted(ctx, because(ctx, err))
	}
	return found, nil
}

// span begins one of the attempt's, below the order that brought it.
func (t *attempt) span(name string, at time.Time) tracing.Span {
	s := t.agent.tracer.StartAt(t.trace, name, tracing.Inner, at)
	s.Task(string(t.Task), t.Attempt)
	s.Set("dayfly.worker", string(t.Worker))
	return s
}

// because gives the cause of ctx's end where that is why err came.
func because(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// unstarted says how an attempt ended whose process was never started.
func (t *attempt) unstarted(ctx context.Context, err error) *schemas.End {
	var fault *StartError
	switch {
	case errors.Is(err, errStopped) || errors.Is(context.Cause(ctx), errStopped):
		return &schemas.End{By: schemas.EndedStop, Message: "stopped before the process was started"}
	case errors.As(err, &fault):
		return &schemas.End{By: schemas.EndedItself, Reason: fault.Reason, Exit: fault.Exit, Message: text(fault.Message, 1024)}
	}
	t.log.Warn().Err(err).Msg("start")
	return &schemas.End{By: schemas.EndedGaveBack, Reason: schemas.ReasonStart, Message: text(fmt.Sprintf("worker %s could not start it: %v", t.Worker, err), 1024)}
}

// watch follows a started attempt to its end, ships its log, and reports.
func (t *attempt) watch(found Attempt, startTook time.Duration) {
	t.mu.Lock()
	t.found = found
	if t.stop != nil {
		found.Stop(*t.stop)
	}
	if t.restartTo > 0 {
		found.Restart(t.restartTo)
	}
	if t.deadline != t.given { // an order moved it while the process was being started
		_ = t.moveDeadline()
	}
	t.mu.Unlock()
	hold := t.agent.cfg.HoldBack
	if startTook > hold || t.recovered {
		hold = 0
	}
	t.say(schemas.Report{Phase: schemas.PhaseRunning, Ran: true, Port: t.exposed}, hold)

	var checks sync.WaitGroup
	defer checks.Wait()
	ctx, endChecks := context.WithCancel(t.ctx)
	defer endChecks()
	if t.health != nil {
		checks.Go(func() { t.checkHealth(ctx, found, *t.health) })
	}

	var judged *judging
	judge := make(chan struct{})
	if t.judgement != nil {
		go func() {
			defer close(judge)
			judged = t.judge(ctx, found, t.judgement)
		}()
	} else {
		close(judge)
	}
	defer func() {
		endChecks()
		<-judge
	}()

	out := found.Output()
	t.logs = t.newShipper(out, t.safe)
	_, ranAgain := found.Run()
	for ended := false; ; {
		changed := out.Changed()
		select {
		case <-found.Done():
			ended = true
		default:
		}
		if t.logs.ship(t.ctx) != nil {
			break // the agent ends, or the record has left this attempt
		}
		if ended {
			end := t.outcome(found, out)
			<-judge // it ends with the task
			if judged != nil {
				judged.conclude(&end)
			}
			if t.judgement == nil && t.keepArtifacts(found, &end) != nil { // what a submission leaves is nobody's
				break
			}
			t.finish(end, true)
			return
		}
		select {
		case <-changed:
			t.gather(found)
		case <-ranAgain:
			var run RunState
			run, ranAgain = found.Run()
			t.ranAgain(run)
		case <-t.reconnected:
		case <-found.Done():
		case <-t.ctx.Done():
		}
	}
	if context.Cause(t.ctx) == errSuperseded {
		t.kill(found)
	}
}

// ranAgain reports a restart: at once if a client waits for it, else in a while, for what
// restarts often shall not report as often.
func (t *attempt) ranAgain(run RunState) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.report.Phase != schemas.PhaseRunning:
	case run.Up && run.Restarts == t.restartTo:
		t.send()
	default:
		t.tell(t.report, time.Second)
	}
}

// gather lets log bytes come together, unless the attempt ends.
func (t *attempt) gather(found Attempt) {
	timer := time.NewTimer(t.agent.cfg.LogDelay)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-found.Done():
	case <-t.ctx.Done():
	}
}

// outcome is how an attempt ended whose process had been started.
func (t *attempt) outcome(found Attempt, out Output) schemas.End {
	o := found.Outcome()
	// It is told at its end, so that it is whole whichever agent began it.
	ran, _ := found.StartedFor()
	span := t.span("run", time.Now().Add(-ran))
	span.Set("dayfly.ended_by", string(o.By))
	if o.Exit != nil {
		span.SetInt("dayfly.exit_code", o.Exit.Code)
	}
	span.End(nil)
	end := schemas.End{By: o.By, Reason: o.Reason, Message: text(o.Message, 1024), Exit: o.Exit, Usage: o.Usage,
		Stdout: head(out, schemas.Stdout), Stderr: head(out, schemas.Stderr)}
	t.mu.Lock()
	if o.Reason == schemas.ReasonUnhealthy && t.unhealthy != "" {
		end.Message = t.unhealthy
	}
	t.mu.Unlock()
	var dropped, more int64
	end.Logs.StdoutBytes, dropped = out.Size(schemas.Stdout)
	end.Logs.StderrBytes, more = out.Size(schemas.Stderr)
	if end.Logs.Dropped = dropped + more; end.Logs.Dropped > 0 {
		end.Logs.Truncated, end.Logs.Why = true, schemas.LogsLimit
		if out.Full() {
			end.Logs.Why = schemas.LogsDiskFull
		}
	}
	return end
}

// head gives the first bytes of a stream, as text.
func head(out Output, stream schemas.Stream) string {
	kept, _ := out.Size(stream)
	if kept == 0 {
		return ""
	}
	buf := make([]byte, min(kept, schemas.MaxInlineOutput))
	n, _ := out.ReadAt(stream, buf, 0)
	return text(string(buf[:n]), schemas.MaxInlineOutput)
}

// text makes valid UTF-8 of at most n bytes.
func text(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

func (t *attempt) giveBack(why string) {
	t.finish(schemas.End{By: schemas.EndedGaveBack, Message: why}, false)
}

// finish reports the end, again and again until an order closes the attempt, and
// takes then what is left of it away.
func (t *attempt) finish(end schemas.End, ran bool) {
	t.vacate()
	t.mu.Lock()
	if end.By == schemas.EndedStop && t.expired {
		end.By = schemas.EndedDeadline // whatever the deadline is by the time this is settled
	}
	t.mu.Unlock()
	t.agent.metrics.ended.WithLabelValues(string(end.By)).Inc()
	t.log.Info().Str("by", string(end.By)).Str("reason", string(end.Reason)).Msg("attempt ended")
	t.say(schemas.Report{Phase: schemas.PhaseEnded, Ran: ran, End: &end}, 0)
}

// vacate gives back the room on the host, however the attempt ended.
func (t *attempt) vacate() {
	t.unpin()
	if t.reserved {
		t.reserved = false
		t.agent.release(t.needs, t.gpus)
	}
}

// await waits until the ended attempt is closed and its log surely stored, and
// removes its container.
func (t *attempt) await() {
	defer func() {
		t.judgement.close()
		if t.isJudge && t.agent.ctx.Err() == nil {
			_ = os.RemoveAll(t.agent.judgePath(t.Assignment))
		}
		t.mu.Lock()
		found := t.found
		t.mu.Unlock()
		if found != nil && t.agent.ctx.Err() == nil {
			t.agent.remove(found)
		}
	}()
	closed := t.closed
	var settled <-chan time.Time
	for {
		select {
		case <-t.ctx.Done():
			return
		case <-closed:
			if t.logs == nil || t.logs.settled() == 0 {
				return
			}
			closed, settled = nil, time.After(t.logs.settled())
		case <-settled:
			return
		case <-t.reconnected:
			if t.logs == nil {
				t.reconnected = t.agent.conn.Reconnected()
			} else if t.logs.ship(t.ctx) != nil {
				return
			}
			if closed == nil {
				settled = time.After(logSafe)
				continue
			}
			t.again()
		}
	}
}

// kill ends a started attempt and waits until no process of it is left.
func (t *attempt) kill(found Attempt) {
	t.mu.Lock()
	t.found = found // to be removed
	t.mu.Unlock()
	found.Stop(0)
	select {
	case <-found.Done():
	case <-t.agent.ctx.Done():
	}
}

// progress says what the worker is doing while the task starts. It may come late, when
// more than that has been said.
// Each report is a write of the record, so a long pull is told of less often.
func (t *attempt) progress(p Progress) {
	sentence := text(p.Sentence, 256)
	t.mu.Lock()
	defer t.mu.Unlock()
	if r := t.report; r.Phase == schemas.PhaseAccepted && r.Progress != sentence {
		now := t.agent.rt.Now()
		if t.pullSince == 0 {
			t.pullSince = now
		}
		r.Progress, r.Pull = sentence, p.Pull
		t.tell(r, min(max(time.Second, (now-t.pullSince)/10), progressMost))
	}
}

// progressMost is the longest pause between two reports of how far an image is.
const progressMost = 10 * time.Second

// say makes r what is true of the attempt, and sends it after a while: at once if
// that is zero. What is said meanwhile goes in its place.
func (t *attempt) say(r schemas.Report, after time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tell(r, after)
}

// tell is say under t.mu.
func (t *attempt) tell(r schemas.Report, after time.Duration) {
	t.report, t.repeats = r, 0
	if after <= 0 {
		t.send()
	} else if t.timer == nil {
		t.later(after)
	}
}

// later sends the report after a while. It runs under t.mu.
func (t *attempt) later(after time.Duration) {
	if t.timer != nil {
		t.timer.Stop()
	}
	t.timer = time.AfterFunc(after, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.timer = nil
		t.send()
	})
}

// How often the last report is repeated until an order closes the attempt.
const (
	repeatFirst = 2 * time.Second
	repeatMost  = 30 * time.Second
	// repeatFailed is the pause after a report that the bus did not take.
	repeatFailed = 300 * time.Millisecond
)

// send publishes the report as it is now. It runs under t.mu, so reports leave in
// the order in which they became true.
func (t *attempt) send() {
	if t.gone || t.ctx.Err() != nil || t.report.Phase == "" {
		return
	}
	if t.timer != nil {
		t.timer.Stop()
		t.timer = nil
	}
	r := t.report
	r.Assignment, r.Revision, r.Applied = t.Assignment, t.revision, t.applied
	r.Judge = t.judged
	if t.found != nil && r.Ran {
		ran, _ := t.found.StartedFor()
		r.RanFor = schemas.Duration(ran)
		run, _ := t.found.Run()
		r.Restarts, r.Last = run.Restarts, run.Last
		r.Ready = t.readyRun == run.Restarts+1 && r.Phase == schemas.PhaseRunning
	}
	r.Image = t.resolved
	r.Restarts = max(r.Restarts, t.restarts) // the record takes no fewer
	body, err := schemas.Encode(r)
	if err != nil {
		t.log.Error().Err(err).Msg("encode report")
		return
	}
	last := r.Phase == schemas.PhaseEnded
	t.sends++
	this := t.sends
	again := min(repeatFirst<<min(t.repeats, 8), repeatMost)
	t.repeats++
	// The answer may come before PublishAsync returns, and so while t.mu is held.
	span := t.agent.tracer.Start(t.trace, "report", tracing.Producer)
	span.Task(string(t.Task), t.Attempt)
	span.Set("dayfly.phase", string(r.Phase))
	t.agent.conn.PublishAsync(schemas.ReportSubject(t.Worker, t.Task), tracing.Header(span.Traceparent()), body, func(err error) {
		span.End(err)
		switch {
		case err != nil:
			time.AfterFunc(repeatFailed, func() { t.repeat(this) })
		case last:
			time.AfterFunc(again, func() { t.repeat(this) })
		}
		if err == nil {
			t.unsaid.Store(false)
		}
	})
}

// again sends the report as it is now.
func (t *attempt) again() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.send()
}

// repeat sends the report again, unless it was sent since.
func (t *attempt) repeat(sends int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sends == sends && t.timer == nil {
		t.send()
	}
}

// extend applies a run order to an attempt that is live.
func (t *attempt) extend(o schemas.Order) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.revision, t.restarts = o.Revision, max(t.restarts, o.Restarts)
	if o.Extensions > t.applied || t.found == nil {
		t.deadline = deadline{left: o.TimeLeft.Std(), at: t.agent.rt.Now(), counting: o.Counting}
		if t.found != nil {
			if err := t.moveDeadline(); err != nil {
				return
			}
		}
		t.applied = o.Extensions
		if err := t.agent.journal.change(t.Assignment, func(e *entry) { e.Applied = o.Extensions }); err != nil {
			t.log.Error().Err(err).Msg("journal")
		}
	}
	if t.restartTo = max(t.restartTo, o.RestartTo); t.restartTo > 0 && t.found != nil {
		t.found.Restart(t.restartTo)
	}
	t.send() // the order came, or came again: its sender waits for this
}

// moveDeadline gives the process what the newest order left it. It runs under t.mu.
func (t *attempt) moveDeadline() error {
	ran, _ := t.found.StartedFor()
	err := t.found.SetDeadline(t.deadline.remaining(t.agent.rt.Now(), ran))
	switch {
	case errors.Is(err, ErrOver):
		t.log.Info().Msg("the extension came after the deadline")
	case err != nil:
		t.log.Error().Err(err).Msg("move deadline")
	}
	return err
}

// halt applies a stop order.
func (t *attempt) halt(o schemas.Order) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.revision, t.restarts = o.Revision, max(t.restarts, o.Restarts)
	grace := o.Grace.Std()
	t.stop, t.expired = &grace, o.Expired
	switch {
	case t.report.Phase == schemas.PhaseEnded:
		t.send()
	case t.found != nil:
		t.found.Stop(grace)
	case t.unstart != nil:
		t.unstart(errStopped)
	}
}

// close ends an attempt whose end is settled, or that no record waits for: what still
// runs of that is killed.
func (t *attempt) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.silence()
	if t.report.Phase != schemas.PhaseEnded {
		t.cancel(errSuperseded)
	}
	close(t.closed)
}

// supersede ends an attempt that a later one has replaced.
func (t *attempt) supersede() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.silence()
	t.cancel(errSuperseded)
}

// silence runs under t.mu.
func (t *attempt) silence() {
	t.gone = true
	if t.timer != nil {
		t.timer.Stop()
		t.timer = nil
	}
}
