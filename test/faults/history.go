// Package faults runs dayfly as production does, injects faults by a seed while seeded
// clients go on, and records what happened: the history. Check reads a history and says
// which promises it breaks; it needs nothing but the history, so a run can be judged
// again later, and the checker has tests with histories made by hand.
package faults

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/initproto"
)

// Event is one line of a history. T is CLOCK_BOOTTIME of the one machine on which
// everything ran; exactly one of the other fields is set.
type Event struct {
	T      time.Duration `json:"t"`
	Run    *Run          `json:"run,omitzero"`
	Op     *Op           `json:"op,omitzero"`
	Fault  *Fault        `json:"fault,omitzero"`
	Rev    *Rev          `json:"rev,omitzero"`
	Life   *Life         `json:"life,omitzero"`
	Write  *Write        `json:"write,omitzero"`
	Log    *Log          `json:"log,omitzero"`
	Healed *Healed       `json:"healed,omitzero"`
}

// Run is the head of a history.
type Run struct {
	Seed  uint64        `json:"seed"`
	Lease time.Duration `json:"lease"`
	Fence time.Duration `json:"fence"`
	// Epoch is when T was zero by the wall clock, by which records are stamped.
	Epoch time.Time `json:"epoch"`
}

// What came of an operation.
const (
	OK      = "ok"
	Failed  = "fail"    // the answer says that nothing was done
	Unknown = "unknown" // it may have been done, or will be
)

// Op is one request of a client. T of its event is when the answer came.
type Op struct {
	Client  string           `json:"client"`
	Name    string           `json:"name"` // create, get, cancel, extend, list
	Gateway int              `json:"gateway"`
	Began   time.Duration    `json:"began"`
	Outcome string           `json:"outcome"`
	Key     string           `json:"key,omitzero"` // of create; also the task's label "key"
	Task    schemas.TaskID   `json:"task,omitzero"`
	TTL     time.Duration    `json:"ttl,omitzero"` // that extend asked for
	Status  int              `json:"status,omitzero"`
	Error   string           `json:"error,omitzero"`
	Seen    *Seen            `json:"seen,omitzero"`  // of the answer's task
	Tasks   []schemas.TaskID `json:"tasks,omitzero"` // of a list that was read to its end
}

// Seen is what an answer says of a task.
type Seen struct {
	State     schemas.State `json:"state"`
	Attempt   int           `json:"attempt,omitzero"`
	Revision  uint64        `json:"revision"`
	ExpiresAt time.Time     `json:"expires_at,omitzero"`
}

// Fault is one fault. T is when it began.
type Fault struct {
	Kind   string        `json:"kind"`
	Target string        `json:"target"`
	Until  time.Duration `json:"until"`  // when it was healed
	Effect string        `json:"effect"` // what was seen of it; "" if nothing was
}

// Rev is one revision of a record, as the bus delivered it to an observer. Where the
// observer was away several steps may lie between two.
type Rev struct {
	Task     schemas.TaskID  `json:"task"`
	Revision uint64          `json:"revision"`
	Deleted  bool            `json:"deleted,omitzero"`
	Record   *schemas.Record `json:"record,omitzero"`
}

// Kinds of faults that Check must know: a clock that is off, by the target's name, and
// messages that come twice, which hurt nobody.
const (
	ClockOff = "clock"
	Copies   = "messages twice and late"
)

// Write is a publish to a record's subject, accepted or not. Only those that are no
// compare-and-set are written down.
type Write struct {
	Task schemas.TaskID `json:"task"`
}

// Life is an attempt's start or end, of a fake host's journal or as it was seen of a
// real container: nobody says then by whom it was ended. T is when that happened.
type Life struct {
	Do         string             `json:"do"` // start, end
	Assignment schemas.Assignment `json:"assignment"`
	By         schemas.EndedBy    `json:"by,omitzero"`
	Code       int                `json:"code,omitzero"`
	// Idle, of a start: a container was there, and no process of the task was seen in it.
	Idle bool `json:"idle,omitzero"`
}

// Log is what a client read of the log of a final task: stdout of its final attempt.
type Log struct {
	Task    schemas.TaskID `json:"task"`
	Gateway int            `json:"gateway"`
	Bytes   int64          `json:"bytes"`
	// Good is how many of them, from the first, are those that the task wrote.
	Good int64 `json:"good"`
}

// Healed says that all faults are over and no client creates any more. Within all
// tasks shall be final.
type Healed struct {
	Within time.Duration `json:"within"`
}

// Now is the clock of a history.
func Now() time.Duration { return initproto.Now() }

// Recorder writes a history.
type Recorder struct {
	mu     sync.Mutex
	w      io.Writer // under mu
	err    error     // under mu: the first
	events []Event   // under mu
}

// NewRecorder makes one that writes to w.
func NewRecorder(w io.Writer) *Recorder { return &Recorder{w: w} }

// Add writes an event that happened at t.
func (r *Recorder) Add(t time.Duration, e Event) {
	e.T = t
	b, err := json.Marshal(e)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
	if err == nil {
		_, err = r.w.Write(append(b, '\n'))
	}
	if r.err == nil {
		r.err = err
	}
}

// History gives what was recorded, and the first error of writing it.
func (r *Recorder) History() ([]Event, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Event(nil), r.events...), r.err
}

// Read reads a history.
func Read(r io.Reader) (list []Event, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return nil, fmt.Errorf("line %d: %w", len(list)+1, err)
		}
		list = append(list, e)
	}
	return list, lines.Err()
}

// ReadLives reads a fake host's journal (services/agent/fakeruntime).
func ReadLives(r io.Reader) (list []Event, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e struct {
			At         time.Duration      `json:"at"`
			Do         string             `json:"do"`
			Assignment schemas.Assignment `json:"assignment"`
			Outcome    *struct {
				By   schemas.EndedBy
				Exit *schemas.Exit
			} `json:"outcome"`
		}
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			continue // cut off by a kill
		}
		switch {
		case e.Do == "start":
			list = append(list, Event{T: e.At, Life: &Life{Do: "start", Assignment: e.Assignment}})
		case e.Do == "end" && e.Outcome != nil:
			l := &Life{Do: "end", Assignment: e.Assignment, By: e.Outcome.By}
			if e.Outcome.Exit != nil {
				l.Code = e.Outcome.Exit.Code
			}
			list = append(list, Event{T: e.At, Life: l})
		}
	}
	return list, lines.Err()
}
