package fakeruntime

import (
	"bytes"
	"context"
	"os"
	"syscall"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// process implements agent.Main for the command cat; others read nothing of what comes.
type process struct{ a *attempt }

// Main implements agent.Attempt.
func (a *attempt) Main() agent.Main {
	if !a.req.Spec.Interactive() {
		return nil
	}
	return process{a}
}

// Fed implements agent.Main.
func (p process) Fed() (int64, error) {
	p.a.r.mu.Lock()
	defer p.a.r.mu.Unlock()
	return p.a.fed, nil
}

// Write implements agent.Main.
func (p process) Write(_ context.Context, b []byte) (int, error) {
	a := p.a
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	now := a.r.Now()
	a.catchUp(now)
	if a.ended || a.shut || !a.req.Spec.StdinOpen {
		return 0, os.ErrClosed
	}
	a.fed += int64(len(b))
	if is(a.req.Spec, "cat") && a.run.Up {
		text, _, over := bytes.Cut(b, []byte{4})
		if !a.req.Spec.TTY {
			text, over = b, false
		}
		a.print(string(text))
		if over {
			a.quit()
		}
	}
	return len(b), nil
}

// quit ends cat at the end of what it reads. It runs under r.mu.
func (a *attempt) quit() {
	a.lifeAt, a.lifeCode = a.r.Now(), 0
	a.catchUp(a.lifeAt)
}

// CloseInput implements agent.Main.
func (p process) CloseInput() {
	a := p.a
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	if a.req.Spec.TTY || a.shut {
		return
	}
	a.shut = true
	if is(a.req.Spec, "cat") && a.run.Up {
		a.quit()
	}
}

// Resize implements agent.Main.
func (p process) Resize(agent.Window) error {
	if !p.a.req.Spec.TTY {
		return os.ErrInvalid
	}
	return nil
}

// Signal implements agent.Main: any ends the run.
func (p process) Signal(sig syscall.Signal) error {
	a := p.a
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	if a.run.Up && a.stopping == nil {
		a.end(a.r.Now(), agent.Outcome{By: schemas.EndedItself, Reason: schemas.ReasonSignal, Exit: &schemas.Exit{Code: 128 + int(sig), Signal: int(sig)}})
	}
	return nil
}

// End implements agent.Main.
func (p process) End(s schemas.Stream) int64 {
	kept, _ := p.a.Size(s)
	return kept
}

// ReadAt implements agent.Main.
func (p process) ReadAt(s schemas.Stream, b []byte, off int64) (int, int64, error) {
	n, err := p.a.ReadAt(s, b, off)
	return n, off, err
}

// Hold implements agent.Main: nothing waits here.
func (p process) Hold(*[2]int64) {}
