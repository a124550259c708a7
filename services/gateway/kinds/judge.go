package kinds

import (
	"cmp"
	"fmt"
	"path"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// judge is the part of a file that makes its kind a judge: how a submission becomes a
// program, and the limits.
type judge struct {
	Source  string              `json:"source"` // the file that the payload's source becomes, such as main.c
	Compile *schemas.JudgeStage `json:"compile,omitzero"`
	Run     schemas.JudgeStage  `json:"run"`          // its limits hold where a payload has none
	Max     limits              `json:"max,omitzero"` // the most that a payload may ask for; where it is not given, Run's
}

// limits are those that a payload may ask for, of a run.
type limits struct {
	CPU    schemas.Duration `json:"cpu,omitzero"`
	Wall   schemas.Duration `json:"wall,omitzero"`
	Memory schemas.Size     `json:"memory,omitzero"`
	Output schemas.Size     `json:"output,omitzero"`
}

// submission is the payload of a judge.
type submission struct {
	Source       string              `json:"source,omitzero"`
	Files        []schemas.File      `json:"files,omitzero"`
	Tests        []schemas.JudgeTest `json:"tests"`
	Limits       limits              `json:"limits,omitzero"`
	Compare      schemas.Compare     `json:"compare,omitzero"`
	ShortCircuit bool                `json:"short_circuit,omitzero"`
}

const blobSchema = `{"type":"string","pattern":"^sha256:[0-9a-f]{64}$"}`

// judgeSchema describes a submission.
const judgeSchema = `{"type":"object","required":["tests"],"additionalProperties":false,"properties":{` +
	`"source":{"type":"string","description":"the program, as the one file that the kind names"},` +
	`"files":{"type":"array","description":"files beside it, or in its place","items":{"type":"object","required":["path"],"additionalProperties":false,"properties":{` +
	`"path":{"type":"string"},"content":{"type":"string"},"base64":{"type":"string"},"blob":` + blobSchema + `}}},` +
	`"tests":{"type":"array","minItems":1,"maxItems":100,"items":{"type":"object","additionalProperties":false,"properties":{` +
	`"stdin":{"type":"string"},"stdin_blob":` + blobSchema + `,"expected":{"type":"string"},"expected_blob":` + blobSchema + `}}},` +
	`"limits":{"type":"object","additionalProperties":false,"description":"of each test","properties":{` +
	`"cpu":{"type":"string","examples":["1s"]},"wall":{"type":"string","examples":["5s"]},` +
	`"memory":{"type":"string","examples":["64MiB"]},"output":{"type":"string","examples":["1MiB"]}}},` +
	`"compare":{"enum":["tokens","lines","exact"],"default":"tokens"},` +
	`"short_circuit":{"type":"boolean","default":false,"description":"end at the first test that is not accepted"}}}`

// parse checks the part, and the kind with it.
func (j *judge) parse(k *kind, p schemas.Policy) error {
	if j.Source == "" || path.Base(j.Source) != j.Source {
		return fault("judge.source", schemas.CodeInvalidValue, "must be the name of a file, such as main.c")
	}
	try := k.base
	try.Files = append(try.Files, schemas.File{Path: j.Source})
	try.Judge = &schemas.Judge{Compile: j.Compile, Run: j.Run, Tests: []schemas.JudgeTest{{}}}
	done, err := schemas.CompleteSpec(try, operator(p))
	if err != nil {
		return fieldOf(err)
	}
	j.Compile, j.Run = done.Judge.Compile, done.Judge.Run
	m := &j.Max
	m.CPU, m.Wall = max(m.CPU, j.Run.CPU), max(m.Wall, j.Run.Wall)
	m.Memory, m.Output = max(m.Memory, j.Run.Memory), max(m.Output, j.Run.Output)
	if m.Memory > k.base.Resources.Memory {
		return fault("judge.max.memory", schemas.CodeInvalidValue, "must be at most spec.resources.memory")
	}
	return nil
}

// fieldOf puts the fields of a spec where they stand in a file: judge has a place of its own.
func fieldOf(err error) error {
	return placed(err, func(field string) string {
		if strings.HasPrefix(field, "judge") {
			return field
		}
		return "spec." + field
	})
}

// make makes a task of a submission.
func (j *judge) make(out schemas.Spec, payload schemas.RawJSON) (schemas.Spec, error) {
	var s submission
	if err := schemas.DecodeStrict(payload, &s); err != nil {
		return out, under("payload", err)
	}
	refuse := func(field, message string, args ...any) (schemas.Spec, error) {
		return out, fault("payload."+field, schemas.CodeInvalidValue, fmt.Sprintf(message, args...))
	}
	if s.Source == "" && len(s.Files) == 0 {
		return refuse("source", "is needed: the program; or give files")
	}
	if s.Source != "" {
		out.Files = append(out.Files, schemas.File{Path: j.Source, Content: s.Source})
	}
	out.Files = append(out.Files, s.Files...)
	run, l := j.Run, s.Limits
	if err := cmp.Or(limit("cpu", &run.CPU, l.CPU, j.Max.CPU), limit("wall", &run.Wall, l.Wall, j.Max.Wall)); err != nil {
		return out, err
	}
	if l.CPU > 0 && l.Wall == 0 { // the kind's own would be of another cpu
		run.Wall = min(3*l.CPU+schemas.Duration(2*time.Second), max(j.Max.Wall, j.Run.Wall))
	}
	if err := cmp.Or(limit("memory", &run.Memory, l.Memory, j.Max.Memory), limit("output", &run.Output, l.Output, j.Max.Output)); err != nil {
		return out, err
	}
	switch {
	case len(s.Tests) == 0 || len(s.Tests) > schemas.MaxTests:
		return refuse("tests", "must be 1 to %d", schemas.MaxTests)
	case s.Compare != "" && s.Compare != schemas.CompareTokens && s.Compare != schemas.CompareLines && s.Compare != schemas.CompareExact:
		return refuse("compare", `must be "tokens", "lines" or "exact"`)
	}
	out.Judge = &schemas.Judge{Compile: j.Compile, Run: run, Tests: s.Tests, Compare: s.Compare, ShortCircuit: s.ShortCircuit}
	return out, nil
}

// under says that what is wrong is in a field.
func under(name string, err error) error {
	return placed(err, func(field string) string { return strings.TrimSuffix(name+"."+field, ".") })
}

// placed is the error with its fields named anew.
func placed(err error, place func(field string) string) error {
	e, ok := err.(*schemas.Error)
	if !ok {
		return err
	}
	out := *e
	out.Field, out.Errors = place(e.Field), nil
	for _, one := range e.Errors {
		one.Field = place(one.Field)
		out.Errors = append(out.Errors, one)
	}
	return &out
}

// limit sets what a submission asks for, as far as its kind lets it.
func limit[T schemas.Duration | schemas.Size](field string, to *T, given, allowed T) error {
	switch {
	case given < 0 || given > allowed:
		return fault("payload.limits."+field, schemas.CodeInvalidValue, fmt.Sprintf("must be at most %v", allowed))
	case given > 0:
		*to = given
	}
	return nil
}
