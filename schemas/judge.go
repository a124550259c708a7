package schemas

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
)

// Judge says that the task is a submission, judged by its worker: nothing runs in the
// container but one program at a time, each alone, in places to write that are empty, with
// no more than one test's input. What is expected never comes into the container.
type Judge struct {
	Compile *JudgeStage `json:"compile,omitzero"` // run once; what it leaves in /task/output is at /task/input/build from then on
	Run     JudgeStage  `json:"run"`              // once for each test
	Tests   []JudgeTest `json:"tests"`
	Compare Compare     `json:"compare,omitzero"` // "" is CompareTokens
	// ShortCircuit ends it at the first test that is not accepted.
	ShortCircuit bool `json:"short_circuit,omitzero"`

	Unknown Unknown `json:",embed"`
}

// JudgeStage is a program and its limits.
type JudgeStage struct {
	Command []string `json:"command"`
	CPU     Duration `json:"cpu,omitzero"`    // processor time, of all its processes; 0 is 1s, and 10s to compile
	Wall    Duration `json:"wall,omitzero"`   // 0 is three times CPU and two seconds more
	Memory  Size     `json:"memory,omitzero"` // what it writes into /tmp counted in; 0 is 64MiB, or that of the task if it has less; to compile, that of the task
	Output  Size     `json:"output,omitzero"` // stdout; 0 is 1MiB

	Unknown Unknown `json:",embed"`
}

// JudgeTest is what the program reads and what it should write: each a text, or a blob.
type JudgeTest struct {
	Stdin        string `json:"stdin,omitzero"`
	StdinBlob    BlobID `json:"stdin_blob,omitzero"` // instead of stdin
	Expected     string `json:"expected,omitzero"`
	ExpectedBlob BlobID `json:"expected_blob,omitzero"` // instead of expected

	Unknown Unknown `json:",embed"`
}

// Compare is how output is held against what is expected.
type Compare string

// The ways.
const (
	CompareTokens Compare = "tokens" // words, whatever white space is between
	CompareLines  Compare = "lines"  // white space at the ends of lines and empty lines at the end do not count
	CompareExact  Compare = "exact"  // byte by byte
)

// Verdict is what came of a test, or of all.
type Verdict string

// The verdicts. That of all tests is the first one that is not VerdictAccepted.
const (
	VerdictAccepted     Verdict = "accepted"
	VerdictWrongAnswer  Verdict = "wrong_answer"
	VerdictTimeLimit    Verdict = "time_limit" // of processor time or of wall time
	VerdictMemoryLimit  Verdict = "memory_limit"
	VerdictOutputLimit  Verdict = "output_limit"
	VerdictRuntimeError Verdict = "runtime_error" // an exit code, or a signal
	VerdictCompileError Verdict = "compile_error"
)

// Verdicts lists all of them.
func Verdicts() []Verdict {
	return []Verdict{VerdictAccepted, VerdictWrongAnswer, VerdictTimeLimit, VerdictMemoryLimit, VerdictOutputLimit, VerdictRuntimeError, VerdictCompileError}
}

// Bounds of judging.
const (
	MaxTests       = 100
	MaxJudgeTime   = 10 * time.Minute // of one stage
	MaxJudgeOutput = 256 << 20
	MinJudgeMemory = 1 << 20

	defaultJudgeOutput = 1 << 20
	MaxCompileOutput   = 2 << 10 // kept of what the compiler says
	BuildFolder        = "build" // in /task/input
)

// JudgeResult is what has come of a Judge so far.
type JudgeResult struct {
	Verdict Verdict       `json:"verdict,omitzero"` // once it is over
	Compile *JudgeCompile `json:"compile,omitzero"`
	Cases   []JudgeCase   `json:"cases,omitzero"` // of the tests, in their order

	Unknown Unknown `json:",embed"`
}

// JudgeUse is what a stage has used.
type JudgeUse struct {
	CPUMillis  int64 `json:"time_ms"` // processor time
	WallMillis int64 `json:"wall_ms"`
	Memory     Size  `json:"memory_bytes"`
}

// JudgeCompile is what came of the compile stage.
type JudgeCompile struct {
	Verdict Verdict `json:"verdict"` // accepted or compile_error
	JudgeUse
	Message string `json:"message,omitzero"` // why it failed
	Output  string `json:"output,omitzero"`  // the beginning of what the compiler said

	At       time.Time `json:"at,omitzero"`       // when it was settled
	Revision uint64    `json:"revision,omitzero"` // as of a Change

	Unknown Unknown `json:",embed"`
}

// JudgeCase is what came of a test.
type JudgeCase struct {
	Verdict Verdict `json:"verdict"`
	JudgeUse
	ExitCode int `json:"exit_code,omitzero"`
	Signal   int `json:"signal,omitzero"`

	At       time.Time `json:"at,omitzero"`       // when it was settled
	Revision uint64    `json:"revision,omitzero"` // as of a Change

	Unknown Unknown `json:",embed"`
}

// JudgeEvent is the part of a TaskEvent that tells of a test, or of the compile stage.
type JudgeEvent struct {
	Test    int     `json:"test"` // from 1; 0 is the compile stage
	Tests   int     `json:"tests"`
	Verdict Verdict `json:"verdict"`
	JudgeUse
}

// Over says what the verdict on all tests is, "" while there is none.
func (j *Judge) Over(r JudgeResult) Verdict {
	switch {
	case r.Compile != nil && r.Compile.Verdict != VerdictAccepted:
		return VerdictCompileError
	case j.Compile != nil && r.Compile == nil:
		return ""
	}
	bad := slices.IndexFunc(r.Cases, func(c JudgeCase) bool { return c.Verdict != VerdictAccepted })
	switch {
	case bad >= 0 && (j.ShortCircuit || len(r.Cases) == len(j.Tests)):
		return r.Cases[bad].Verdict
	case len(r.Cases) == len(j.Tests):
		return VerdictAccepted
	}
	return ""
}

// complete fills in the defaults, for a task with so much memory.
func (j *Judge) complete(memory Size) *Judge {
	if j == nil {
		return nil
	}
	out := *j
	fill := func(s JudgeStage, cpu time.Duration, memory Size) JudgeStage {
		s.CPU = cmp.Or(s.CPU, Duration(cpu))
		s.Wall = cmp.Or(s.Wall, 3*s.CPU+Duration(2*time.Second))
		s.Memory, s.Output = cmp.Or(s.Memory, memory), cmp.Or(s.Output, defaultJudgeOutput)
		return s
	}
	if j.Compile != nil {
		c := fill(*j.Compile, 10*time.Second, memory)
		out.Compile = &c
	}
	out.Run = fill(j.Run, time.Second, min(64<<20, memory))
	out.Compare = cmp.Or(j.Compare, CompareTokens)
	return &out
}

func (s *Spec) checkJudge(c *checker) {
	j := s.Judge
	if j == nil {
		return
	}
	for _, f := range []struct {
		field string
		given bool
	}{
		{"entrypoint", s.Entrypoint != nil}, {"command", s.Command != nil}, {"ports", len(s.Ports) > 0}, {"restart", s.Restart != nil}, {"health", s.Health != nil},
		{"stdin", s.Stdin != ""}, {"stdin_blob", s.StdinBlob != ""}, {"stdin_open", s.StdinOpen}, {"tty", s.TTY}, // a program reads its test
	} {
		c.value(!f.given, f.field, "does not go with judge")
	}
	// The image's folders would take from one test to the next what is written there, and
	// its user might write where nobody cleans.
	c.value(!s.WritableRoot(), "read_only", "must be true with judge; use tmpfs for places to write")
	c.value(s.User != "image", "user", `must be "UID:GID" with judge`)
	c.value(s.Network == NetworkNone, "network", `must be "none" with judge`)
	if j.Compile != nil {
		j.Compile.check(c, "judge.compile", s.Resources.Memory)
	}
	j.Run.check(c, "judge.run", s.Resources.Memory)
	c.value(len(j.Tests) >= 1 && len(j.Tests) <= MaxTests, "judge.tests", "must be 1 to %d", MaxTests)
	c.value(slices.Contains([]Compare{CompareTokens, CompareLines, CompareExact}, j.Compare), "judge.compare", `must be "tokens", "lines" or "exact"`)
	for i, t := range j.Tests {
		at := s.testField(i)
		c.checkBlob(t.StdinBlob, at+".stdin_blob")
		c.checkBlob(t.ExpectedBlob, at+".expected_blob")
		c.value(t.Stdin == "" || t.StdinBlob == "", at+".stdin_blob", "give stdin or stdin_blob, not both")
		c.value(t.Expected == "" || t.ExpectedBlob == "", at+".expected_blob", "give expected or expected_blob, not both")
	}
	for i, f := range s.Files {
		c.value(f.Path != BuildFolder && !strings.HasPrefix(f.Path, BuildFolder+"/"), fmt.Sprintf("files.%d.path", i), "must not be in %s, where what is compiled goes", BuildFolder)
	}
}

// MaxExpected is how long the expected output of a test may be that is a blob: twice what the
// program may write, as white space may not count. What comes in a body is never too long.
func (j *Judge) MaxExpected() Size {
	return max(2*cmp.Or(j.Run.Output, defaultJudgeOutput), MaxBodyBytes)
}

// CheckExpected names the tests whose expected output is longer than it may be: the worker would
// read all of it, of every submission, and it could hardly be right. sizes has the blobs that the spec names.
func (s *Spec) CheckExpected(sizes map[BlobID]Size) (faults []FieldError) {
	if s.Judge == nil {
		return nil
	}
	most := s.Judge.MaxExpected()
	for i, t := range s.Judge.Tests {
		if sizes[t.ExpectedBlob] > most {
			faults = append(faults, FieldError{Field: s.testField(i) + ".expected_blob", Code: CodeInvalidValue,
				Message: fmt.Sprintf("must be a blob of at most %s, twice what the program may write; raise that limit (output), or send a shorter one", most)})
		}
	}
	return faults
}

// testField is where a client gave the test: those of a kind are in its payload.
func (s *Spec) testField(i int) string {
	if s.Kind != "" {
		return fmt.Sprintf("payload.tests.%d", i)
	}
	return fmt.Sprintf("judge.tests.%d", i)
}

func (j *JudgeStage) check(c *checker, at string, memory Size) {
	c.value(len(j.Command) > 0, at+".command", "must name a program")
	checkArgs(c, at+".command", j.Command)
	for _, t := range []struct {
		field string
		value Duration
	}{{"cpu", j.CPU}, {"wall", j.Wall}} {
		c.value(t.value.Std() >= 10*time.Millisecond && t.value.Std() <= MaxJudgeTime, at+"."+t.field, `must be "10ms" to %s`, Duration(MaxJudgeTime))
	}
	c.value(j.Memory >= MinJudgeMemory && j.Memory <= memory, at+".memory", "must be %s to that of the task, resources.memory", Size(MinJudgeMemory))
	c.value(j.Output >= 0 && j.Output <= MaxJudgeOutput, at+".output", "must be at most %s", Size(MaxJudgeOutput))
}

// judged folds what a worker says of a Judge into the record: what stands there never
// changes within an attempt, and no more is taken than there are tests.
func (r *Record) judged(said *JudgeResult, m Meta) (changed bool) {
	j := r.Spec.Judge
	if j == nil || said == nil {
		return false
	}
	now := JudgeResult{}
	if r.Result != nil {
		now = *r.Result
	}
	now.Cases = slices.Clone(now.Cases)
	at := m.At.Truncate(time.Millisecond)
	if c := said.Compile; c != nil && now.Compile == nil && j.Compile != nil {
		verdict := VerdictCompileError
		if c.Verdict == VerdictAccepted {
			verdict = VerdictAccepted
		}
		now.Compile = &JudgeCompile{Verdict: verdict, JudgeUse: c.tidy(), Message: line(c.Message, 256), Output: cut(printable(c.Output), MaxCompileOutput), At: at}
		changed = true
	}
	for i := len(now.Cases); i < min(len(said.Cases), len(j.Tests)) && j.Over(now) == ""; i++ {
		c := said.Cases[i]
		if !slices.Contains(Verdicts(), c.Verdict) || c.Verdict == VerdictCompileError {
			break
		}
		now.Cases = append(now.Cases, JudgeCase{Verdict: c.Verdict, JudgeUse: c.tidy(), ExitCode: c.ExitCode & 0xff, Signal: c.Signal & 0x7f, At: at})
		changed = true
	}
	if changed {
		now.Verdict = j.Over(now)
		r.Result = &now
	}
	return changed
}

func (u JudgeUse) tidy() JudgeUse {
	bound := func(n int64) int64 { return min(max(n, 0), int64(24*time.Hour/time.Millisecond)) }
	return JudgeUse{CPUMillis: bound(u.CPUMillis), WallMillis: bound(u.WallMillis), Memory: min(max(u.Memory, 0), maxBytes)}
}

// printable makes other control characters than those of lines visible: in JSON each
// would take six bytes.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// sealed gives the result with all revisions.
func (j *JudgeResult) sealed(on uint64) *JudgeResult {
	if j == nil {
		return nil
	}
	out := *j
	if j.Compile != nil && j.Compile.Revision == 0 {
		c := *j.Compile
		c.Revision = on
		out.Compile = &c
	}
	if i := slices.IndexFunc(j.Cases, func(c JudgeCase) bool { return c.Revision == 0 }); i >= 0 {
		out.Cases = slices.Clone(j.Cases)
		for ; i < len(out.Cases); i++ {
			out.Cases[i].Revision = on
		}
	}
	return &out
}

// Events tells what a record at revision on knows of the stages of its judge. tests is how many
// there are.
func (j *JudgeResult) Events(on uint64, tests int) (list []JudgeChange) {
	if j == nil {
		return nil
	}
	j = j.sealed(on)
	if c := j.Compile; c != nil {
		list = append(list, JudgeChange{c.Revision, c.At, JudgeEvent{Tests: tests, Verdict: c.Verdict, JudgeUse: c.JudgeUse}})
	}
	for i, c := range j.Cases {
		list = append(list, JudgeChange{c.Revision, c.At, JudgeEvent{Test: i + 1, Tests: tests, Verdict: c.Verdict, JudgeUse: c.JudgeUse}})
	}
	return list
}

// JudgeChange is a JudgeEvent with the write that brought it.
type JudgeChange struct {
	Revision uint64
	At       time.Time
	JudgeEvent
}

// String says it in words.
func (e JudgeEvent) String() string {
	if e.Test == 0 {
		if e.Verdict == VerdictAccepted {
			return "compiled"
		}
		return "compile error"
	}
	return fmt.Sprintf("test %d of %d: %s in %d ms", e.Test, e.Tests, strings.ReplaceAll(string(e.Verdict), "_", " "), e.CPUMillis)
}
