package fakeruntime

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// The journal of a fake host stands for its Docker Engine, the inits of its containers
// and its kernel: a container in it goes on while no agent is there, or one that is
// stopped, and ends when its command, its permit, its deadline or a grace says so, at
// that time, even if it is written down only when an agent is there again. So it is
// also the full account of which attempt lived when: `end` has the time of the end,
// not of the line. Instants are of CLOCK_BOOTTIME.

// What a line tells.
const (
	doOpen     = "open" // an agent's process began
	doStart    = "start"
	doStop     = "stop"
	doFail     = "fail" // unhealthy
	doRestart  = "restart"
	doLaunch   = "launch" // a program in the background
	doQuit     = "quit"   // the end of one
	doDeadline = "deadline"
	doEnd      = "end"
	doRemove   = "remove"
	doPermit   = "permit"
)

type entry struct {
	At         time.Duration       `json:"at"`
	Do         string              `json:"do"`
	Assignment schemas.Assignment  `json:"assignment,omitzero"`
	Until      time.Duration       `json:"until,omitzero"`   // of permit, deadline, and stop: when the grace is over
	Request    *agent.StartRequest `json:"request,omitzero"` // of start
	Outcome    *agent.Outcome      `json:"outcome,omitzero"` // of end
	State      string              `json:"state,omitzero"`   // of open: which state folder
	Program    string              `json:"program,omitzero"` // of launch and quit
	Command    *agent.Command      `json:"command,omitzero"` // of launch
	Exit       *schemas.Exit       `json:"exit,omitzero"`    // of quit
}

type journal struct{ file *os.File }

// write appends a line in one write, which outlives a kill of this process. A nil
// journal takes everything.
func (j *journal) write(e entry) error {
	if j == nil {
		return nil
	}
	b, err := json.Marshal(e)
	if err == nil {
		_, err = j.file.Write(append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("write the fake host's journal: %w", err)
	}
	return nil
}

// orphanRemoval is how long the removal of a container takes of which no attempt can
// be made: as on a Docker Engine, it is done in the background.
const orphanRemoval = 300 * time.Millisecond

// reopen reads what an earlier process left. It runs under r.mu.
func (r *Runtime) reopen() error {
	state, err := stateID(r.cfg.StateDir)
	if err != nil {
		return err
	}
	old, err := os.ReadFile(r.cfg.Journal)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read the fake host's journal: %w", err)
	}
	file, err := os.OpenFile(r.cfg.Journal, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open the fake host's journal: %w", err)
	}
	found := map[schemas.Assignment]*attempt{}
	lines := bufio.NewScanner(bytes.NewReader(old))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e entry
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			continue // cut off: it never happened
		}
		a := found[e.Assignment]
		switch {
		case e.Do == doOpen && e.State != state:
			for _, a := range found {
				a.orphan = true
			}
		case e.Do == doPermit:
			r.permit = e.Until
			for _, a := range found {
				if !a.orphan {
					a.lastPermit = e.Until
				}
			}
		case e.Do == doStart:
			a = r.newAttempt(*e.Request, e.At)
			a.lastPermit = r.permit
			a.begin(e.At)
			found[e.Assignment] = a
		case a == nil:
		case e.Do == doDeadline:
			a.deadlineAt = e.Until
		case e.Do == doFail:
			a.catchUp(e.At)
			a.fail(e.At)
		case e.Do == doRestart:
			a.catchUp(e.At)
			a.restart(e.At)
		case e.Do == doStop:
			a.catchUp(e.At)
			a.stop(e.At, e.Until-e.At, agent.Outcome{By: schemas.EndedStop, Exit: &schemas.Exit{}})
		case e.Do == doLaunch:
			p := a.newProgram(*e.Command, e.At)
			p.id = e.Program
			a.backgrounds = append(a.backgrounds, p)
		case e.Do == doQuit:
			for _, p := range a.backgrounds {
				if p.id == e.Program && !p.over() {
					p.exit = *e.Exit
					close(p.done)
				}
			}
		case e.Do == doEnd:
			a.catchUp(e.At)
			a.finish(e.At, *e.Outcome)
		case e.Do == doRemove:
			delete(found, e.Assignment)
		}
	}
	r.journal = &journal{file}
	now := r.Now()
	if err := r.journal.write(entry{At: now, Do: doOpen, State: state}); err != nil {
		return err
	}
	for id, a := range found {
		a.catchUp(now)
		if a.orphan {
			time.AfterFunc(orphanRemoval, func() {
				r.mu.Lock()
				defer r.mu.Unlock()
				_ = a.remove()
			})
			continue
		}
		r.all[id] = a
		a.relaunch()
	}
	return nil
}

// relaunch lets the programs in the background go on, or says that they ended with their
// run. It runs under r.mu.
func (a *attempt) relaunch() {
	old := a.backgrounds
	a.backgrounds = nil
	for _, p := range old {
		f, err := p.function()
		switch {
		case p.over():
			a.backgrounds = append(a.backgrounds, p)
		case err == nil && a.run.Up && p.started >= a.began:
			p.launch(f, a.runs)
		default:
			p.exit = schemas.Exit{Code: 137, Signal: 9}
			close(p.done)
			a.backgrounds = append(a.backgrounds, p)
		}
	}
}

// stateID names a state folder for as long as it is not wiped.
func stateID(dir string) (string, error) {
	path := filepath.Join(dir, "fake-host")
	if b, err := os.ReadFile(path); err == nil && len(b) > 0 {
		return string(b), nil
	}
	id := rand.Text()
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		err = os.WriteFile(path, []byte(id), 0o600)
	}
	if err != nil {
		return "", fmt.Errorf("mark the state folder: %w", err)
	}
	return id, nil
}
