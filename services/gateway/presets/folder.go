// Package presets keeps what the YAML files of an operator's folder say, one preset to a
// file: the file web.yaml is the preset web. The folder is read again when it changes.
//
// A file that is wrong changes nothing: the preset that it had stays, and the fault is
// kept with its line and column until the file is right. A file that is gone takes its
// preset with it. What the whole folder says changes at once.
package presets

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// MaxPresets is how many files a folder may have.
const MaxPresets = 1000

// Preset is what one file says.
type Preset[T any] struct {
	Name   string // of the file, without .yaml
	Digest string // of its bytes: 16 hexadecimal digits. Not to be shown: who guesses a secret of the file can test it
	ReadAt time.Time
	Value  T
}

// Set is what a folder says at one time. It does not change.
type Set[T any] struct {
	Presets []Preset[T] // by name
	Faults  []Fault     // by file
	Digest  string      // of all that holds: equal where several read the same. Not to be shown either
}

// Get gives a preset by its name.
func (s *Set[T]) Get(name string) (Preset[T], bool) {
	i, ok := slices.BinarySearchFunc(s.Presets, name, func(p Preset[T], name string) int { return strings.Compare(p.Name, name) })
	if !ok {
		return Preset[T]{}, false
	}
	return s.Presets[i], true
}

// Parse makes a value of a document. What is wrong it says with Document.Faults.
type Parse[T any] func(name string, d Document) (T, []Fault)

// Folder is a folder of presets. Its methods may be called at the same time.
type Folder[T any] struct {
	dir   string
	parse Parse[T]
	set   atomic.Pointer[Set[T]]
	poked chan struct{}

	mu    sync.Mutex
	files map[string]file[T] // under mu: by the name of the file
}

// file is what was last read of one.
type file[T any] struct {
	sum    [sha256.Size]byte // of what was read last, right or wrong
	faults []Fault           // of that
	holds  *Preset[T]        // the last that was right
}

// Open reads a folder. Wrong files are no error, a folder that cannot be read is.
func Open[T any](dir string, parse Parse[T]) (*Folder[T], error) {
	f := &Folder[T]{dir: dir, parse: parse, files: map[string]file[T]{}, poked: make(chan struct{}, 1)}
	if _, err := os.ReadDir(dir); err != nil {
		return nil, err
	}
	f.Reload()
	return f, nil
}

// Set is what the folder says now.
func (f *Folder[T]) Set() *Set[T] { return f.set.Load() }

// Poke lets Follow read the folder at once.
func (f *Folder[T]) Poke() {
	select {
	case f.poked <- struct{}{}:
	default: // it is about to
	}
}

// Follow reads the folder again each interval, and when it is poked, until ctx ends.
// changed hears of each set that differs from the one before.
func (f *Folder[T]) Follow(ctx context.Context, interval time.Duration, changed func(*Set[T])) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-f.poked:
		}
		if f.Reload() {
			changed(f.Set())
		}
	}
}

// Reload reads the folder again, and says whether anything differs. Files whose bytes are
// the same are not parsed again.
func (f *Folder[T]) Reload() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	next := &Set[T]{}
	names, err := f.list()
	if err != nil { // all that was read stays
		next.Faults = append(next.Faults, Fault{Message: "the folder cannot be read: " + reason(err)})
		for name := range f.files {
			names = append(names, name)
		}
		slices.Sort(names)
	}
	if len(names) > MaxPresets {
		next.Faults = append(next.Faults, Fault{Message: fmt.Sprintf("the folder must have at most %d files; those behind %s are left out", MaxPresets, names[MaxPresets-1])})
		names = names[:MaxPresets]
	}
	files := map[string]file[T]{}
	taken := map[string]string{} // names of presets, and their files
	for _, name := range names {
		last := f.files[name]
		if err == nil {
			if last = f.read(name, last); last.faults == nil && last.holds == nil {
				continue // gone meanwhile
			}
		}
		files[name] = last
		next.Faults = append(next.Faults, last.faults...)
		if last.holds == nil {
			continue
		}
		if other, twice := taken[last.holds.Name]; twice {
			next.Faults = append(next.Faults, Fault{File: name, Message: other + " has that name already; rename one of them"})
			continue
		}
		taken[last.holds.Name] = name
		next.Presets = append(next.Presets, *last.holds)
	}
	f.files = files
	slices.SortFunc(next.Presets, func(a, b Preset[T]) int { return strings.Compare(a.Name, b.Name) })
	sum := sha256.New()
	for _, p := range next.Presets {
		fmt.Fprintf(sum, "%s %s\n", p.Name, p.Digest)
	}
	next.Digest = short(sum.Sum(nil))
	before := f.set.Load()
	if before != nil && before.Digest == next.Digest && slices.Equal(before.Faults, next.Faults) {
		return false
	}
	f.set.Store(next)
	return true
}

// list gives the names of the folder's files. What begins with a dot is none: editors and
// mounted volumes have such beside the true ones.
func (f *Folder[T]) list() (names []string, err error) {
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		ext := filepath.Ext(e.Name())
		if !strings.HasPrefix(e.Name(), ".") && (ext == ".yaml" || ext == ".yml") && !e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// read gives what a file says now. Where it is wrong, what it said before holds.
func (f *Folder[T]) read(name string, last file[T]) file[T] {
	text, err := readFile(filepath.Join(f.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return file[T]{}
	}
	if err != nil {
		last.faults, last.sum = []Fault{{File: name, Message: "cannot be read: " + reason(err)}}, [sha256.Size]byte{}
		return last
	}
	sum := sha256.Sum256(text)
	if last.sum == sum {
		return last
	}
	last.sum = sum
	preset := strings.TrimSuffix(name, filepath.Ext(name))
	if !ValidName(preset) {
		last.faults = []Fault{{File: name, Message: "the name must be 1 to 63 of a-z, 0-9 and -, and neither begin nor end with -"}}
		return last
	}
	d, faults := Read(name, text)
	var v T
	if len(faults) == 0 {
		v, faults = f.parse(preset, d)
	}
	last.faults = faults
	if len(faults) == 0 {
		last.faults = nil
		last.holds = &Preset[T]{Name: preset, Digest: short(sum[:]), ReadAt: time.Now().UTC(), Value: v}
	}
	return last
}

// readFile reads no more of a file than may be in one, and no device or pipe.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("is no regular file")
	}
	if info.Size() > MaxFileBytes {
		return make([]byte, MaxFileBytes+1), nil // which is said as any other fault
	}
	return os.ReadFile(path)
}

// reason is an error without the path, which the fault has.
func reason(err error) string {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err.Error()
	}
	return err.Error()
}

func short(sum []byte) string { return hex.EncodeToString(sum[:8]) }

// ValidName says whether a preset may be called s: 1 to 63 of a-z, 0-9 and -.
func ValidName(s string) bool {
	return s != "" && len(s) <= 63 && s[0] != '-' && s[len(s)-1] != '-' && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}
