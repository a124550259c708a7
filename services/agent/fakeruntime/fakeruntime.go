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
//	ignore-term [D] writes "ready"; like sleep, but TERM does nothing
//	term-exit [N]   writes "ready"; ends with code N at TERM
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
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// MissingImage is an image that does not exist.
const MissingImage = "missing"

// Config of a fake host. The zero value is a large host that starts at once.
type Config struct {
	Host       schemas.Host  // zero: 1e6 slots, 1e6 CPUs, 1 PiB
	StartDelay time.Duration // before a process counts as started
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
}

// New makes an empty host.
func New(cfg Config) *Runtime {
	if cfg.Host.Slots == 0 {
		cfg.Host = schemas.Host{OS: "linux", Arch: "amd64", CPUs: 1e6, Memory: 1 << 50, Slots: 1e6, Engine: "fake"}
	}
	return &Runtime{cfg: cfg, began: time.Now(), all: map[schemas.Assignment]*attempt{}, starts: map[schemas.TaskID][]schemas.Assignment{}}
}

// Host implements agent.Runtime.
func (r *Runtime) Host(context.Context) (schemas.Host, error) { return r.cfg.Host, nil }

// Recover gives what was started through this Runtime and not removed: an agent that
// is started again on the same Runtime finds it.
func (r *Runtime) Recover(context.Context) ([]agent.Attempt, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []agent.Attempt
	for _, a := range r.all {
		list = append(list, a)
	}
	return list, nil
}

// Image implements agent.Runtime.
func (r *Runtime) Image(_ context.Context, spec schemas.Spec, _ func(string)) (agent.Image, error) {
	if is(spec, "fail", "image") || spec.Image == MissingImage {
		return agent.Image{}, &agent.StartError{Reason: schemas.ReasonImage, Message: "no such image: " + spec.Image}
	}
	return agent.Image{Ref: spec.Image, ID: "sha256:fake"}, nil
}

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
	a := &attempt{r: r, req: req, started: r.Now(), done: make(chan struct{}), changed: make(chan struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if r.Now() >= r.permit {
		return nil, errors.New("the permit is over")
	}
	if r.all[req.Assignment] != nil {
		return nil, fmt.Errorf("%s exists", req.Assignment)
	}
	r.all[req.Assignment] = a
	r.starts[req.Assignment.Task] = append(r.starts[req.Assignment.Task], req.Assignment)
	a.begin()
	return a, nil
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
	r.permit = until
	if r.timer == nil {
		r.timer = time.AfterFunc(until-r.Now(), r.permitOver)
	} else {
		r.timer.Reset(until - r.Now())
	}
	return nil
}

func (r *Runtime) permitOver() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.Now() < r.permit {
		return // it was lengthened
	}
	for _, a := range r.all {
		if !a.req.NoPermit {
			a.end(agent.Outcome{By: schemas.EndedPermit, Exit: &schemas.Exit{Code: 137, Signal: 9}})
		}
	}
}

// Now implements agent.Runtime.
func (r *Runtime) Now() time.Duration { return time.Since(r.began) + time.Hour }

// Close implements agent.Runtime: what runs goes on.
func (r *Runtime) Close() error { return nil }

// Kill ends the process of an attempt as somebody else would.
func (r *Runtime) Kill(id schemas.TaskID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for as, a := range r.all {
		if as.Task == id {
			a.end(agent.Outcome{By: schemas.EndedLost, Reason: schemas.ReasonWorkerLost, Message: "its container was killed"})
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

	out      []byte
	dropped  int64
	ended    bool
	outcome  agent.Outcome
	deaf     bool // to TERM
	termCode int  // at TERM
	termSig  int
	stopping *agent.Outcome // who first asked for the end
	killAt   time.Duration  // when the grace is over
	life     *time.Timer    // until it ends by itself
	kill     *time.Timer    // after a grace
	deadline *time.Timer
}

// begin does what the command says. It runs under r.mu, like all small methods here.
func (a *attempt) begin() {
	c := append(append([]string(nil), a.req.Spec.Command...), "", "", "")
	a.termCode, a.termSig = 143, 15
	a.deadlineIn(a.req.TimeLeft)
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
	case "term-exit":
		a.print("ready\n")
		a.termCode, a.termSig = number(c[1]), 0
	case "echo":
		a.print(strings.Join(a.req.Spec.Command[1:], " ") + "\n")
		a.exit(0)
	case "signal":
		n := number(c[1])
		a.end(agent.Outcome{By: schemas.EndedItself, Reason: schemas.ReasonSignal, Exit: &schemas.Exit{Code: 128 + n, Signal: n}})
	case "log", "spam":
		a.write(number(c[1]))
		d, _ := time.ParseDuration(c[2])
		a.endAfter(d, 0)
	case "oom", "eat":
		a.end(agent.Outcome{By: schemas.EndedItself, Reason: schemas.ReasonOOM, Exit: &schemas.Exit{Code: 137, Signal: 9, OOMKilled: true}})
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
	a.end(agent.Outcome{By: schemas.EndedItself, Reason: schemas.ReasonExit, Exit: &schemas.Exit{Code: code}})
}

func (a *attempt) endAfter(d time.Duration, code int) {
	if d <= 0 {
		a.exit(code)
		return
	}
	a.life = a.after(d, func() { a.exit(code) })
}

func (a *attempt) after(d time.Duration, fn func()) *time.Timer {
	return time.AfterFunc(d, func() {
		a.r.mu.Lock()
		defer a.r.mu.Unlock()
		fn()
	})
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

func (a *attempt) print(s string) { a.out = append(a.out, s...) }

func (a *attempt) end(o agent.Outcome) {
	if a.ended {
		return
	}
	a.ended = true
	for _, t := range []*time.Timer{a.life, a.kill, a.deadline} {
		if t != nil {
			t.Stop()
		}
	}
	o.Usage.WallMillis = (a.r.Now() - a.started).Milliseconds()
	a.outcome = o
	close(a.changed)
	close(a.done)
}

func (a *attempt) deadlineIn(left time.Duration) {
	if a.deadline != nil {
		a.deadline.Stop()
	}
	a.deadline = a.after(left, func() {
		a.stop(a.req.Grace, agent.Outcome{By: schemas.EndedDeadline, Reason: schemas.ReasonExpired, Exit: &schemas.Exit{TimedOut: true}})
	})
}

// stop is TERM now and KILL after grace. The first who asks is the one who ended it;
// a later one may only make it sooner.
func (a *attempt) stop(grace time.Duration, o agent.Outcome) {
	if a.ended {
		return
	}
	if a.stopping == nil {
		a.stopping = &o
	}
	if !a.deaf && grace > 0 {
		if a.termSig == 0 {
			a.print("term\n") // as the guest does
		}
		a.stopping.Exit.Code, a.stopping.Exit.Signal = a.termCode, a.termSig
		a.end(*a.stopping)
		return
	}
	a.stopping.Exit.Code, a.stopping.Exit.Signal = 137, 9
	if grace <= 0 {
		a.end(*a.stopping)
		return
	}
	at := a.r.Now() + grace
	if a.kill != nil && at >= a.killAt {
		return
	}
	if a.kill != nil {
		a.kill.Stop()
	}
	a.killAt = at
	a.kill = a.after(grace, func() { a.end(*a.stopping) })
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
	a.stop(grace, agent.Outcome{By: schemas.EndedStop, Exit: &schemas.Exit{}})
}

// SetDeadline implements agent.Attempt.
func (a *attempt) SetDeadline(left time.Duration) error {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	if !a.ended {
		a.deadlineIn(left)
	}
	return nil
}

// Output implements agent.Attempt.
func (a *attempt) Output() agent.Output { return a }

// Remove implements agent.Attempt.
func (a *attempt) Remove(context.Context) error {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	a.end(agent.Outcome{By: schemas.EndedStop, Exit: &schemas.Exit{Code: 137, Signal: 9}})
	delete(a.r.all, a.req.Assignment)
	return nil
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

// Changed implements agent.Output. All output is there from the start.
func (a *attempt) Changed() <-chan struct{} { return a.changed }
