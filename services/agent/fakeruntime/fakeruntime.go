// Package fakeruntime is an agent.Runtime without containers, for tests of the
// control plane with thousands of tasks. It keeps everything in memory and uses no
// goroutine for a task that is only there.
//
// The command of a task says what it does:
//
//	exit N          ends at once with code N
//	sleep D [N]     ends after the duration D with code N
//	log BYTES [D]   writes numbered lines of that many bytes, then ends after D
//	spam BYTES      the same
//	echo WORD…      writes the words
//	cat             writes its stdin; where clients write that, to its end or to a Ctrl-D
//	ignore-term [D] writes "ready"; like sleep, but TERM does nothing
//	term-exit [N]   writes "ready"; ends with code N at TERM
//	flaky N [C [D]] exits with C (1) in the first N runs, later writes "ready" and ends after D
//	leave N BYTES [D]  leaves N files of so many bytes in its output folder, then ends after D
//	http PORT       writes "ready", serves until it is ended: "hello", /status/N, /until/D
//	tcp PORT        writes "ready", sends back what it is sent until it is ended
//	signal N        is killed by signal N, not by us
//	oom, eat BYTES  is killed for want of memory
//	fail image      the image does not exist
//	fail start      the command is not there (127)
//	refuse          the host cannot run it: an error that is not the task's fault
//
// Any other command, and none, is "exit 0". The entrypoint "/nowhere" is not there,
// as with "fail start". The commands are also those of the program in package guest,
// where it has them, so that one suite (package runtimetest) runs on both.
package fakeruntime

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

// MissingImage is an image that does not exist.
const MissingImage = "missing"

// Config of a fake host. The zero value is a large host that starts at once.
type Config struct {
	Host       schemas.Host  // zero: 1e6 slots, 1e6 CPUs, 1 PiB
	StartDelay time.Duration // before a process counts as started

	// Journal is a file in which the host keeps what it runs, so that containers outlive
	// the agent's process as real ones do: see journal.go. "" keeps it in memory.
	Journal string
	// StateDir is the agent's, with a Journal. If it is wiped, no attempt can be made of
	// the containers of before.
	StateDir string
}

// Runtime implements agent.Runtime.
type Runtime struct {
	cfg   Config
	began time.Time

	mu     sync.Mutex
	permit time.Duration                           // under mu
	timer  *time.Timer                             // under mu: at the permit's end
	all    map[schemas.Assignment]*attempt         // under mu: not removed
	starts map[schemas.TaskID][]schemas.Assignment // under mu: every start there ever was

	images  []string      // under mu: names, those asked for last first
	present *agent.Images // under mu: nil where it must be made anew

	journal *journal // nil without Config.Journal

	closing sync.Once
	closed  chan struct{}
}

// New makes an empty host.
func New(cfg Config) *Runtime {
	if cfg.Host.Slots == 0 {
		cfg.Host = schemas.Host{OS: "linux", Arch: "amd64", CPUs: 1e6, Memory: 1 << 50, Slots: 1e6, Engine: "fake"}
	}
	return &Runtime{cfg: cfg, began: time.Now(), all: map[schemas.Assignment]*attempt{}, starts: map[schemas.TaskID][]schemas.Assignment{}, closed: make(chan struct{})}
}

// Host implements agent.Runtime.
func (r *Runtime) Host(context.Context) (schemas.Host, error) { return r.cfg.Host, nil }

// Recover gives what was started through this Runtime, or stands in its journal, and
// was not removed: an agent that is started again finds it.
func (r *Runtime) Recover(context.Context) ([]agent.Attempt, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.journal == nil && r.cfg.Journal != "" {
		if err := r.reopen(); err != nil {
			return nil, err
		}
	}
	var list []agent.Attempt
	for _, a := range r.all {
		if p, ok := a.stage.(*program); ok { // it was the earlier agent's
			p.kill()
		}
		list = append(list, a)
	}
	return list, nil
}

// Image implements agent.Runtime.
func (r *Runtime) Image(_ context.Context, spec schemas.Spec, pinned *schemas.Resolved, _ func(agent.Progress)) (agent.Image, error) {
	if is(spec, "fail", "image") || spec.Image == MissingImage {
		return agent.Image{}, &agent.StartError{Reason: schemas.ReasonImage, Message: "no such image: " + spec.Image}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if name := schemas.ImageName(spec.Image); !slices.Contains(r.images, name) {
		if len(r.images) >= schemas.MaxBeatImages {
			r.images = r.images[:schemas.MaxBeatImages/2]
		}
		r.images = append([]string{name}, r.images...)
		r.present = nil
	}
	id := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(spec.Image)))
	if pinned != nil {
		id = pinned.ID
	}
	return agent.Image{Ref: spec.Image, ID: id}, nil
}

// Images implements agent.Runtime: it has those that it was asked for.
func (r *Runtime) Images() *agent.Images {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.present == nil {
		r.present = agent.NewImages(r.images, schemas.ImageCache{Images: len(r.images)})
	}
	return r.present
}

// Keep implements agent.Runtime: nothing is ever removed.
func (r *Runtime) Keep([]string) {}

// Credentials implements agent.Runtime.
func (r *Runtime) Credentials() []string { return r.cfg.Host.Credentials }

func is(spec schemas.Spec, words ...string) bool {
	for i, w := range words {
		if i >= len(spec.Command) || spec.Command[i] != w {
			return false
		}
	}
	return true
}

// Start implements agent.Runtime.
func (r *Runtime) Start(ctx context.Context, req agent.StartRequest) (agent.Attempt, error) {
	ctx, cancel := req.Begin(ctx)
	defer cancel()
	if r.cfg.StartDelay > 0 {
		select {
		case <-time.After(r.cfg.StartDelay):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	switch {
	case is(req.Spec, "fail", "start"), len(req.Spec.Entrypoint) > 0 && req.Spec.Entrypoint[0] == "/nowhere":
		return nil, &agent.StartError{Reason: schemas.ReasonNotFound, Exit: &schemas.Exit{Code: 127}, Message: "command not found: " + strings.Join(req.Spec.Entrypoint, " ")}
	case is(req.Spec, "refuse"):
		return nil, errors.New("the host refuses")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.newAttempt(req, r.Now())
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if a.started >= r.permit {
		return nil, errors.New("the permit is over")
	}
	if r.all[req.Assignment] != nil {
		return nil, fmt.Errorf("%s exists", req.Assignment)
	}
	if err := r.journal.write(entry{At: a.started, Do: doStart, Assignment: req.Assignment, Request: &req}); err != nil {
		return nil, err
	}
	r.all[req.Assignment] = a
	r.starts[req.Assignment.Task] = append(r.starts[req.Assignment.Task], req.Assignment)
	a.begin(a.started)
	a.catchUp(a.started)
	return a, nil
}

func (r *Runtime) newAttempt(req agent.StartRequest, started time.Duration) *attempt {
	a := &attempt{r: r, req: req, started: started, lifeAt: never, killAt: never, resumeAt: never,
		deadlineAt: started + req.TimeLeft, done: make(chan struct{}), changed: make(chan struct{}), runs: make(chan struct{})}
	if req.Spec.Restarts() {
		a.pause = req.Spec.Restart.Backoff.Std()
	}
	return a
}

// Starts lists every start of a task, in order.
func (r *Runtime) Starts(id schemas.TaskID) []schemas.Assignment {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]schemas.Assignment(nil), r.starts[id]...)
}

// Live is how many attempts have not been removed.
func (r *Runtime) Live() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// Permit implements agent.Runtime.
func (r *Runtime) Permit(until time.Duration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.Now()
	if r.permit > 0 && now >= r.permit {
		r.permitOver(now) // this process slept; the containers did not
	}
	if err := r.journal.write(entry{At: now, Do: doPermit, Until: until}); err != nil {
		return err
	}
	r.permit = until
	if r.timer == nil {
		r.timer = time.AfterFunc(until-now, func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.permitOver(r.Now())
		})
	} else {
		r.timer.Reset(until - now)
	}
	return nil
}

// permitOver ends what needed the permit, if it is over. It runs under r.mu.
func (r *Runtime) permitOver(now time.Duration) {
	if now < r.permit {
		return // it was lengthened
	}
	for _, a := range r.all {
		a.catchUp(now)
	}
}

// Now implements agent.Runtime.
func (r *Runtime) Now() time.Duration {
	if r.cfg.Journal != "" {
		return initproto.Now()
	}
	return time.Since(r.began) + time.Hour
}

// Close implements agent.Runtime: what runs goes on, save for the functions that stand
// for programs.
func (r *Runtime) Close() error {
	r.closing.Do(func() { close(r.closed) })
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.all { // no other Runtime finds their files
		a.removeFolder()
	}
	return nil
}

// Kill ends the process of an attempt as somebody else would.
func (r *Runtime) Kill(id schemas.TaskID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for as, a := range r.all {
		if as.Task == id {
			a.end(r.Now(), agent.Outcome{By: schemas.EndedLost, Reason: schemas.ReasonWorkerLost, Message: "its container was killed"})
		}
	}
}

// attempt implements agent.Attempt and agent.Output. Its fields are guarded by the
// Runtime's mutex, save those that never change.
type attempt struct {
	r       *Runtime
	req     agent.StartRequest
	started time.Duration
	done    chan struct{}
	changed chan struct{}

	run      agent.RunState
	runs     chan struct{} // closed when run changes
	began    time.Duration // the present run
	pause    time.Duration // before the next
	resumeAt time.Duration // when it begins; never while one is there
	conns    []net.Conn    // that were dialed

	backgrounds []*program
	stage       agent.Foreground // the last one of a judge
	folder      string           // of its files, "" until they are asked for

	fed      int64 // bytes of stdin that clients wrote
	shut     bool  // nothing more comes
	out      []byte
	dropped  int64
	ended    bool
	outcome  agent.Outcome
	deaf     bool // to TERM
	termCode int  // at TERM
	termSig  int
	stopping *agent.Outcome // who first asked for the end
	again    bool           // the run ends to begin anew
	asked    int            // restarts that were asked for

	orphan     bool          // no attempt can be made of it: it gets no new permit
	lastPermit time.Duration // of an orphan

	lifeAt     time.Duration // when it ends by itself
	lifeCode   int           // with this code
	deadlineAt time.Duration
	killAt     time.Duration // when the grace is over
	wake       *time.Timer   // at the first of them
}

// never is later than everything.
const never = time.Duration(math.MaxInt64)

// begin does what the command says, at an instant. It runs under r.mu, like all small
// methods here.
func (a *attempt) begin(at time.Duration) {
	a.began = at
	a.is(agent.RunState{Restarts: a.run.Restarts, Up: true, Last: a.run.Last})
	c := append(append([]string(nil), a.req.Spec.Command...), "", "", "", "")
	a.termCode, a.termSig, a.deaf = 143, 15, false
	if a.req.Spec.Judge != nil { // it waits for its programs
		return
	}
	switch c[0] {
	case "sleep", "ignore-term":
		if a.deaf = c[0] == "ignore-term"; a.deaf {
			a.print("ready\n")
		}
		d, err := time.ParseDuration(c[1])
		if err != nil {
			d = 1000 * time.Hour
		}
		a.endAfter(d, number(c[2]))
	case "flaky":
		a.print(fmt.Sprintf("run %d\n", a.run.Restarts+1))
		if a.run.Restarts < number(c[1]) {
			a.exit(cmp.Or(number(c[2]), 1))
			return
		}
		a.print("ready\n")
		d, _ := time.ParseDuration(c[3])
		a.endAfter(d, 0)
	case "leave":
		if err := a.leave(number(c[1]), number(c[2])); err != nil {
			a.print(err.Error() + "\n")
			a.exit(1)
			return
		}
		a.print("ready\n")
		d, _ := time.ParseDuration(c[3])
		a.endAfter(d, 0)
	case "http", "tcp":
		a.print("ready\n")
	case "term-exit":
		a.print("ready\n")
		a.termCode, a.termSig = number(c[1]), 0
	case "echo":
		a.print(strings.Join(a.req.Spec.Command[1:], " ") + "\n")
		a.exit(0)
	case "cat":
		if !a.req.Spec.Interactive() {
			a.print(a.req.Spec.Stdin)
			a.exit(0)
		}
	case "signal":
		n := number(c[1])
		a.end(at, agent.Outcome{By: schemas.EndedItself, Reason: schemas.ReasonSignal, Exit: &schemas.Exit{Code: 128 + n, Signal: n}})
	case "log", "spam":
		a.write(number(c[1]))
		d, _ := time.ParseDuration(c[2])
		a.endAfter(d, 0)
	case "oom", "eat":
		a.end(at, agent.Outcome{By: schemas.EndedItself, Reason: schemas.ReasonOOM, Exit: &schemas.Exit{Code: 137, Signal: 9, OOMKilled: true}})
	case "exit":
		a.exit(number(c[1]))
	default:
		a.exit(0)
	}
}

func number(s string) int {
	n, _ := strconv.Atoi(s)
	return n
}

func (a *attempt) exit(code int) {
	a.lifeAt, a.lifeCode = a.began, code
}

func (a *attempt) endAfter(d time.Duration, code int) {
	a.lifeAt, a.lifeCode = a.began+max(0, d), code
	if a.lifeAt < a.began {
		a.lifeAt = never
	}
}

// catchUp lets happen, each at its own time, what was due by now, and sets the timer
// for what comes next. A process that was stopped for a while finds its containers as
// if it had not been.
func (a *attempt) catchUp(now time.Duration) {
	for !a.ended {
		permit := never
		if !a.req.NoPermit {
			permit = a.permit()
		}
		at := min(a.lifeAt, permit, a.killAt, a.deadlineAt, a.resumeAt)
		if at > now {
			if next := min(a.lifeAt, a.killAt, a.deadlineAt, a.resumeAt); a.wake == nil {
				a.wake = time.AfterFunc(next-now, func() {
					a.r.mu.Lock()
					defer a.r.mu.Unlock()
					a.catchUp(a.r.Now())
				})
			} else {
				a.wake.Reset(next - now)
			}
			return
		}
		switch at {
		case a.lifeAt:
			a.end(at, agent.Outcome{By: schemas.EndedItself, Reason: schemas.ReasonExit, Exit: &schemas.Exit{Code: a.lifeCode}})
		case permit:
			a.end(at, agent.Outcome{By: schemas.EndedPermit, Exit: &schemas.Exit{Code: 137, Signal: 9}})
		case a.killAt:
			a.end(at, *a.stopping)
		case a.resumeAt:
			a.resumeAt = never
			a.run.Restarts++
			a.begin(at)
		default:
			a.deadlineAt = never
			a.stop(at, a.req.Grace, agent.Outcome{By: schemas.EndedDeadline, Reason: schemas.ReasonExpired, Exit: &schemas.Exit{TimedOut: true}})
		}
	}
}

// permit is until when the attempt may run if it needs a permit.
func (a *attempt) permit() time.Duration {
	if a.orphan {
		return a.lastPermit
	}
	return a.r.permit
}

// write writes numbered lines, those of the guest's spam.
func (a *attempt) write(n int) {
	keep := n
	if limit := a.req.LogLimit; limit > 0 {
		keep = int(min(int64(n), limit))
	}
	b := make([]byte, 0, keep+64)
	for i := 0; len(b) < keep; i++ {
		b = fmt.Appendf(b, "o%062d\n", i)
	}
	a.out, a.dropped = b[:keep], int64(n-keep)
}

func (a *attempt) print(s string) {
	a.out = append(a.out, s...)
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *attempt) is(run agent.RunState) {
	a.run = run
	close(a.runs)
	a.runs = make(chan struct{})
}

// rest is the end of a run that another follows.
func (a *attempt) rest(at time.Duration, o agent.Outcome) bool {
	if a.again && o.By == schemas.EndedItself {
		a.again = false
		a.restAsked(at, o.Exit)
		return true
	}
	if !a.req.Spec.Restarts() {
		return false
	}
	p := a.req.Spec.Restart
	failed := o.Exit.Code != 0 || o.Reason == schemas.ReasonUnhealthy
	if o.By != schemas.EndedItself || !failed && p.Policy != schemas.RestartAlways || p.Max > 0 && a.run.Restarts-a.asked >= p.Max {
		return false
	}
	if at-a.began >= schemas.RestartCalm*a.pause {
		a.pause = p.Backoff.Std()
	}
	a.lifeAt, a.killAt, a.stopping, a.resumeAt = never, never, nil, at+a.pause
	a.pause = min(2*a.pause, schemas.MaxRestartPause)
	a.is(agent.RunState{Restarts: a.run.Restarts, Last: o.Exit})
	a.hangUp()
	return true
}

// restAsked is the end of a run that another follows at once.
func (a *attempt) restAsked(at time.Duration, last *schemas.Exit) {
	a.asked++
	if a.req.Spec.Restarts() {
		a.pause = a.req.Spec.Restart.Backoff.Std()
	}
	a.lifeAt, a.killAt, a.stopping, a.resumeAt = never, never, nil, at
	a.is(agent.RunState{Restarts: a.run.Restarts, Last: last})
	a.hangUp()
}

func (a *attempt) hangUp() {
	for _, c := range a.conns {
		_ = c.Close()
	}
	a.conns = nil
}

// end is the end of a run, and of the attempt unless another follows.
func (a *attempt) end(at time.Duration, o agent.Outcome) {
	if !a.ended && !a.rest(at, o) {
		a.finish(at, o)
	}
}

func (a *attempt) finish(at time.Duration, o agent.Outcome) {
	if a.ended {
		return
	}
	a.ended = true
	if a.resumeAt != never && o.Exit != nil {
		o.Exit.Code, o.Exit.Signal = a.run.Last.Code, a.run.Last.Signal // between two runs
	}
	a.run.Up = false
	close(a.runs)
	a.hangUp()
	if a.wake != nil {
		a.wake.Stop()
	}
	o.Usage.WallMillis = (at - a.started).Milliseconds()
	a.outcome = o
	_ = a.r.journal.write(entry{At: at, Do: doEnd, Assignment: a.req.Assignment, Outcome: &o})
	close(a.changed)
	close(a.done)
}

// stop is TERM now and KILL after grace. The first who asks is the one who ended it;
// a later one may only make it sooner.
func (a *attempt) stop(now, grace time.Duration, o agent.Outcome) {
	if a.ended {
		return
	}
	if a.stopping == nil || a.stopping.By == schemas.EndedItself { // of this run alone
		a.stopping, a.again = &o, false
	}
	if a.resumeAt != never {
		a.end(now, o)
		return
	}
	a.term(now, grace)
}

// term ends the run as stopping says.
func (a *attempt) term(now, grace time.Duration) {
	if !a.deaf && grace > 0 {
		if a.termSig == 0 {
			a.print("term\n") // as the guest does
		}
		a.stopping.Exit.Code, a.stopping.Exit.Signal = a.termCode, a.termSig
		a.end(now, *a.stopping)
		return
	}
	a.stopping.Exit.Code, a.stopping.Exit.Signal = 137, 9
	a.killAt = min(a.killAt, now+max(0, grace))
}

// Assignment implements agent.Attempt.
func (a *attempt) Assignment() schemas.Assignment { return a.req.Assignment }

// StartedFor implements agent.Attempt.
func (a *attempt) StartedFor() (time.Duration, bool) { return a.r.Now() - a.started, true }

// Done implements agent.Attempt.
func (a *attempt) Done() <-chan struct{} { return a.done }

// Outcome implements agent.Attempt.
func (a *attempt) Outcome() agent.Outcome {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	return a.outcome
}

// Stop implements agent.Attempt.
func (a *attempt) Stop(grace time.Duration) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	now := a.r.Now()
	a.catchUp(now)
	a.stop(now, grace, agent.Outcome{By: schemas.EndedStop, Exit: &schemas.Exit{}})
	_ = a.r.journal.write(entry{At: now, Do: doStop, Assignment: a.req.Assignment, Until: now + grace})
	a.catchUp(now)
}

// Run implements agent.Attempt.
func (a *attempt) Run() (agent.RunState, <-chan struct{}) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	return a.run, a.runs
}

// Fail implements agent.Attempt.
func (a *attempt) Fail(restarts int) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	now := a.r.Now()
	a.catchUp(now)
	if a.ended || !a.run.Up || a.run.Restarts != restarts || a.stopping != nil {
		return
	}
	_ = a.r.journal.write(entry{At: now, Do: doFail, Assignment: a.req.Assignment})
	a.fail(now)
	a.catchUp(now)
}

func (a *attempt) fail(now time.Duration) {
	a.stop(now, a.req.Grace, agent.Outcome{By: schemas.EndedItself, Reason: schemas.ReasonUnhealthy, Message: "its health check failed", Exit: &schemas.Exit{}})
}

// Restart implements agent.Attempt.
func (a *attempt) Restart(to int) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	now := a.r.Now()
	a.catchUp(now)
	if a.ended || to <= a.run.Restarts || a.again {
		return
	}
	_ = a.r.journal.write(entry{At: now, Do: doRestart, Assignment: a.req.Assignment})
	a.restart(now)
	a.catchUp(now)
}

func (a *attempt) restart(now time.Duration) {
	switch {
	case a.resumeAt != never:
		a.asked++
		a.resumeAt = now
	case a.stopping == nil || a.stopping.By == schemas.EndedItself:
		a.again = true
		a.stopping = &agent.Outcome{By: schemas.EndedItself, Exit: &schemas.Exit{}}
		a.term(now, a.req.Grace)
	}
}

// SetDeadline implements agent.Attempt.
func (a *attempt) SetDeadline(left time.Duration) error {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	now := a.r.Now()
	a.catchUp(now)
	switch {
	case a.ended:
		return nil
	case a.deadlineAt == never:
		return agent.ErrOver
	}
	a.deadlineAt = now + left
	err := a.r.journal.write(entry{At: now, Do: doDeadline, Assignment: a.req.Assignment, Until: a.deadlineAt})
	a.catchUp(now)
	return err
}

// Output implements agent.Attempt.
func (a *attempt) Output() agent.Output { return a }

// Remove implements agent.Attempt.
func (a *attempt) Remove(context.Context) error {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	return a.remove()
}

// remove runs under r.mu.
func (a *attempt) remove() error {
	now := a.r.Now()
	a.catchUp(now)
	a.end(now, agent.Outcome{By: schemas.EndedStop, Exit: &schemas.Exit{Code: 137, Signal: 9}})
	a.removeFolder()
	delete(a.r.all, a.req.Assignment)
	return a.r.journal.write(entry{At: now, Do: doRemove, Assignment: a.req.Assignment})
}

// ReadAt implements agent.Output.
func (a *attempt) ReadAt(stream schemas.Stream, p []byte, off int64) (int, error) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	if stream != schemas.Stdout || off >= int64(len(a.out)) {
		return 0, io.EOF
	}
	return copy(p, a.out[off:]), nil
}

// Size implements agent.Output.
func (a *attempt) Size(stream schemas.Stream) (kept, dropped int64) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	if stream != schemas.Stdout {
		return 0, 0
	}
	return int64(len(a.out)), a.dropped
}

// Full implements agent.Output.
func (a *attempt) Full() bool { return false }

// Changed implements agent.Output.
func (a *attempt) Changed() <-chan struct{} {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	return a.changed
}
