package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"dayfly.dev/schemas"
)

// journalKeep is how long a closed attempt is remembered. An order comes again within
// minutes, if at all.
const journalKeep = time.Hour

// entry is what the journal remembers of a task: the highest attempt seen.
type entry struct {
	schemas.Assignment
	Revision uint64            `json:"revision,omitzero"` // of the newest order handled
	Applied  int               `json:"applied,omitzero"`  // extensions carried out
	NoPermit bool              `json:"no_permit,omitzero"`
	Needs    schemas.Resources `json:"needs,omitzero"`
	GPUs     []int             `json:"gpus,omitzero"` // the devices that it has
	Health   *schemas.Health   `json:"health,omitzero"`
	Judge    bool              `json:"judge,omitzero"`  // it has a judgeLog
	Stdout   int64             `json:"stdout,omitzero"` // bytes of the log that are surely stored
	Stderr   int64             `json:"stderr,omitzero"`
	Closed   bool              `json:"closed,omitzero"`
	Trace    string            `json:"trace,omitzero"` // W3C traceparent of the order that brought it
	// At is when it was closed, by the runtime's clock, which nobody sets: a wall clock
	// that is put forward would make the agent forget all, and start again what is over.
	At schemas.Duration `json:"at,omitzero"`
}

// journalVersion is the form of the lines. A journal of a later form is refused: what
// is not understood would be forgotten, and started again.
const journalVersion = 1

// registration is the journal's head: whose epoch the entries belong to. A host
// that was rebooted has another boot id, and nothing of its containers is left.
type registration struct {
	Version int           `json:"v,omitzero"` // 0: from before it was written down
	Epoch   schemas.Epoch `json:"epoch"`
	Boot    string        `json:"boot"`
}

// line is one line of the journal file: the head, or a task's newest entry.
type line struct {
	Head  *registration `json:"head,omitzero"`
	Entry *entry        `json:"entry,omitzero"`
}

// journal is the agent's own memory of attempts: a file of JSON lines of which the
// last of each task counts. It is written without fsync: it must outlive a kill of
// the agent, not a crash of the host, after which the boot id differs.
type journal struct {
	path string

	mu      sync.Mutex
	file    *os.File                 // under mu
	head    registration             // under mu
	entries map[schemas.TaskID]entry // under mu
	lines   int                      // under mu: in the file
	torn    bool                     // under mu: a write failed
}

// openJournal reads the journal in dir, or begins one. A last line that was cut off
// by a crash is dropped.
func openJournal(dir string, now time.Duration) (*journal, error) {
	j := &journal{path: filepath.Join(dir, "journal"), entries: map[schemas.TaskID]entry{}}
	if f, err := os.Open(j.path); err == nil {
		err = j.read(f, now)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("read journal %s: %w", j.path, err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	for id, e := range j.entries {
		if e.Closed && now-e.At.Std() > journalKeep {
			delete(j.entries, id)
		}
	}
	return j, j.compact()
}

func (j *journal) read(r io.Reader, now time.Duration) error {
	lines := bufio.NewReader(r)
	for {
		b, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		var form struct {
			Head struct {
				Version int `json:"v"`
			} `json:"head"`
		}
		if schemas.Decode(b, &form) == nil && form.Head.Version > journalVersion {
			return fmt.Errorf("it is of version %d, and this dayfly reads up to %d: run the dayfly that wrote it; "+
				"to go back to this one, let the worker's tasks end first (dayfly drain), then remove the file", form.Head.Version, journalVersion)
		}
		l, err := decodeLine(b, now)
		if err != nil {
			continue // damaged: the attempt is then known by its container alone
		}
		switch {
		case l.Head != nil:
			j.head = *l.Head
		case l.Entry != nil:
			j.entries[l.Entry.Task] = *l.Entry
		}
	}
}

// decodeLine reads one line. At first the time in an entry was that of the wall clock,
// which tells nothing on the runtime's: it counts as now.
func decodeLine(b []byte, now time.Duration) (line, error) {
	var l line
	err := schemas.Decode(b, &l)
	if err == nil {
		return l, nil
	}
	var old struct {
		Entry schemas.Unknown `json:"entry"`
	}
	if schemas.Decode(b, &old) != nil || old.Entry["at"] == nil {
		return line{}, err
	}
	delete(old.Entry, "at")
	if b, err = schemas.Encode(old); err == nil {
		l = line{}
		err = schemas.Decode(b, &l)
	}
	if err == nil && l.Entry != nil {
		l.Entry.At = schemas.Duration(now)
	}
	return l, err
}

// compact rewrites the file with what still counts.
func (j *journal) compact() error {
	tmp := j.path + ".new"
	f, err := os.Create(tmp)
	if err != nil {
		return fmt.Errorf("rewrite journal: %w", err)
	}
	w := bufio.NewWriter(f)
	write := func(l line) {
		var b []byte
		if err == nil {
			b, err = schemas.Encode(l)
		}
		if err == nil {
			_, err = w.Write(append(b, '\n'))
		}
	}
	j.head.Version = journalVersion
	write(line{Head: &j.head})
	for _, e := range j.entries {
		write(line{Entry: &e})
	}
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = os.Rename(tmp, j.path)
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("rewrite journal: %w", err)
	}
	if j.file != nil {
		j.file.Close()
	}
	j.file, j.lines, j.torn = f, len(j.entries)+1, false
	return nil
}

func (j *journal) append(l line) error {
	b, err := schemas.Encode(l)
	if err != nil {
		return err
	}
	if j.torn { // the last line may be cut off, and must not take this one along
		return j.compact()
	}
	if _, err := j.file.Write(append(b, '\n')); err != nil {
		j.torn = true
		return fmt.Errorf("write journal: %w", err)
	}
	j.lines++
	if j.lines > 10_000 && j.lines > 4*len(j.entries) {
		return j.compact()
	}
	return nil
}

// registered gives the epoch and boot id that the entries belong to.
func (j *journal) registered() registration {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.head
}

// register begins a new registration. Entries of attempts that keep is true for
// stay; all others are of containers that are gone.
func (j *journal) register(r registration, keep func(entry) bool) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.head = r
	for id, e := range j.entries {
		if !keep(e) {
			delete(j.entries, id)
		}
	}
	return j.compact()
}

// get gives the entry of a task.
func (j *journal) get(id schemas.TaskID) (entry, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e, ok := j.entries[id]
	return e, ok
}

// put writes a task's entry. It is remembered in memory even when the disk refuses.
func (j *journal) put(e entry) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.entries[e.Task] = e
	return j.append(line{Entry: &e})
}

// change lets fn alter the entry of an attempt, if it is still the task's newest.
func (j *journal) change(a schemas.Assignment, fn func(*entry)) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	e, ok := j.entries[a.Task]
	if !ok || e.Assignment != a {
		return nil
	}
	fn(&e)
	j.entries[a.Task] = e
	return j.append(line{Entry: &e})
}

// open lists the entries that are not closed.
func (j *journal) open() []entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	var list []entry
	for _, e := range j.entries {
		if !e.Closed {
			list = append(list, e)
		}
	}
	return list
}

// forget drops closed entries that are old enough.
func (j *journal) forget(now time.Duration) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for id, e := range j.entries {
		if e.Closed && now-e.At.Std() > journalKeep {
			delete(j.entries, id)
		}
	}
}

func (j *journal) close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.file.Close()
}
