// Package kinds has the job types that a site has whitelisted: a folder of YAML files, one
// for each, that say what a task of the kind is made from, which payload it takes, and
// which fields a client may still give. docs/kinds.md describes the files.
//
// A Folder is what gateways ask (schemas.Policy.Kinds). It reads the folder again when
// that changes; one that is not right stays without effect.
package kinds

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway/presets"
)

// file is what stands in a file.
type file struct {
	Kind    string          `json:"kind"`
	About   string          `json:"about,omitzero"`
	Spec    schemas.RawJSON `json:"spec"`
	Allow   []string        `json:"allow,omitzero"`
	Payload schemas.RawJSON `json:"payload,omitzero"`
	File    string          `json:"file,omitzero"`  // where the payload goes, in /task/input; "" is DefaultFile
	Judge   *judge          `json:"judge,omitzero"` // it is a judge's, and goes nowhere
}

// DefaultFile is where the payload goes, in /task/input.
const DefaultFile = "task.json"

// allowed are the fields that a task of any kind may give, unless its kind says otherwise.
var allowed = []string{"labels", "priority", "callback", "constraints"}

// never are those that a kind cannot leave to its tasks.
var never = []string{"kind", "payload", "judge", "files", "image"}

// kind is one that is read and found right.
type kind struct {
	name, about string
	base        schemas.Spec
	allow       []string
	file        string
	raw         schemas.RawJSON // the schema, "" if there is none
	schema      *jsonschema.Schema
	judge       *judge
}

// parse makes a kind of a file.
func parse(name string, d presets.Document, p schemas.Policy) (*kind, []presets.Fault) {
	at := func(field, format string, args ...any) (*kind, []presets.Fault) {
		return nil, []presets.Fault{d.At(field, fmt.Sprintf(format, args...))}
	}
	var y file
	if err := schemas.DecodeStrict(d.JSON, &y); err != nil {
		return nil, d.Faults(err)
	}
	k := &kind{name: y.Kind, about: y.About, allow: y.Allow, file: y.File, judge: y.Judge}
	if k.allow == nil {
		k.allow = allowed
	}
	if k.file == "" {
		k.file = DefaultFile
	}
	switch {
	case k.name != name || !schemas.KindName(name):
		return at("kind", "must be the name of the file, of a-z, 0-9 and -")
	case len(k.about) > 1024:
		return at("about", "must be at most 1024 bytes")
	case y.Spec == nil:
		return at("spec", "is needed: what holds for every task of the kind, its image at least")
	case y.Judge == nil && y.Payload == nil:
		return at("payload", "is needed: the JSON Schema of the payload; {} takes any")
	case y.Judge != nil && y.File != "":
		return at("file", "does not go with judge, whose payload goes nowhere")
	}
	for i, name := range k.allow {
		if field := fmt.Sprintf("allow.%d", i); !slices.Contains(schemas.SpecFields(), name) {
			return at(field, "is no field of a task")
		} else if slices.Contains(never, name) {
			return at(field, "%s is the kind's", name)
		}
	}
	k.base = schemas.DefaultSpec()
	if err := schemas.DecodeStrict(y.Spec, &k.base); err != nil {
		return nil, d.Faults(under("spec", err))
	}
	for field, given := range map[string]bool{"kind": k.base.Kind != "", "payload": k.base.Payload != nil, "judge": k.base.Judge != nil} {
		if given {
			return at("spec."+field, "does not go into spec")
		}
	}
	if y.Payload != nil {
		var faults []presets.Fault
		if k.schema, faults = compile(d, y.Payload); faults != nil {
			return nil, faults
		}
		k.raw = y.Payload
	}
	if k.judge != nil {
		if err := k.judge.parse(k, p); err != nil {
			return nil, d.Faults(err)
		}
	} else if err := k.try(p); err != nil {
		return nil, d.Faults(under("spec", err))
	}
	return k, nil
}

// try makes a task of the kind, with an empty payload, to see what is wrong with the kind.
func (k *kind) try(p schemas.Policy) error {
	s := k.base
	s.Kind, s.Files = k.name, append(slices.Clone(s.Files), schemas.File{Path: k.file, Content: "{}"})
	_, err := schemas.CompleteSpec(s, operator(p))
	return err
}

// operator is what a kind may use: it is the operator's own.
func operator(p schemas.Policy) schemas.Policy {
	return schemas.Policy{MaxTTL: p.MaxTTL, AllowEntrypoint: true, AllowTmpfs: true, AllowImageUser: true}
}

// compile compiles the schema of a payload. It may refer to nothing outside.
func compile(d presets.Document, raw schemas.RawJSON) (*jsonschema.Schema, []presets.Fault) {
	at := func(format string, args ...any) []presets.Fault {
		return []presets.Fault{d.At("payload", fmt.Sprintf(format, args...))}
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
	if err != nil {
		return nil, at("%s", firstLine(err))
	}
	switch doc.(type) {
	case map[string]any, bool:
	default:
		return nil, at("must be a JSON Schema")
	}
	c := jsonschema.NewCompiler()
	c.UseLoader(jsonschema.SchemeURLLoader{})
	const name = "payload.json"
	if err := c.AddResource(name, doc); err != nil {
		return nil, at("%s", firstLine(err))
	}
	s, err := c.Compile(name)
	var invalid *jsonschema.SchemaValidationError
	var faults *jsonschema.ValidationError
	switch {
	case errors.As(err, &invalid) && errors.As(invalid.Err, &faults):
		var all []presets.Fault
		for _, e := range leaves(faults) {
			all = append(all, d.At(strings.Join(append([]string{"payload"}, e.InstanceLocation...), "."), message(e)))
		}
		return nil, all
	case err != nil:
		return nil, at("%s", firstLine(err))
	}
	return s, nil
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// List shows the kinds.
func (f *Folder) List() (list []schemas.Kind) {
	for _, p := range f.presets.Set().Presets {
		k := p.Value
		v := schemas.Kind{Name: k.name, About: k.about, Image: k.base.Image, Resources: k.base.Resources, TTL: k.base.TTL, Allow: k.allow, Payload: k.raw, Judge: k.judge != nil}
		if k.judge != nil && v.Payload == nil {
			v.Payload = schemas.RawJSON(judgeSchema)
		}
		list = append(list, v)
	}
	return list
}

// make makes a task of the kind.
func (k *kind) make(asked schemas.Spec, given []string) (schemas.Spec, error) {
	var wrong []schemas.FieldError
	for _, name := range given {
		if name != "kind" && name != "payload" && !slices.Contains(k.allow, name) {
			wrong = append(wrong, schemas.FieldError{Field: name, Code: schemas.CodeNotAllowed, Message: "the kind decides it; leave it out"})
		}
	}
	if len(wrong) > 0 {
		return asked, schemas.InvalidSpec(wrong[:min(len(wrong), schemas.MaxFaults)])
	}
	out := k.base
	out.Files = slices.Clone(out.Files)
	labels, env := out.Labels, out.Env
	out.Take(asked, slices.DeleteFunc(slices.Clone(given), func(n string) bool { return n == "payload" })...)
	out.Labels, out.Env = over(labels, out.Labels), over(env, out.Env)
	payload := asked.Payload
	if payload == nil {
		return asked, fault("payload", schemas.CodeInvalidValue, "is needed; GET /v1/kinds has its schema")
	}
	if k.schema != nil {
		if err := validate(k.schema, payload); err != nil {
			return asked, err
		}
	}
	if k.judge != nil {
		return k.judge.make(out, payload)
	}
	var small bytes.Buffer
	if err := json.Compact(&small, payload); err != nil {
		return asked, fault("payload", schemas.CodeInvalidJSON, "is not valid JSON")
	}
	out.Files = append(out.Files, schemas.File{Path: k.file, Content: small.String()})
	return out, nil
}

func over(base, top map[string]string) map[string]string {
	if len(base) == 0 {
		return top
	}
	m := maps.Clone(base)
	maps.Copy(m, top)
	return m
}

func fault(field string, code schemas.Code, message string) error {
	return schemas.InvalidSpec([]schemas.FieldError{{Field: field, Code: code, Message: message}})
}

// The most that a number of a payload may have: a schema's bounds are compared exactly, so that
// 1e999999 would become a million digits.
const (
	maxNumber   = 400
	maxExponent = 400
)

// calculable says whether no number in a document is too long to be compared.
func calculable(doc any) bool {
	switch v := doc.(type) {
	case json.Number:
		_, exponent, _ := strings.Cut(strings.ToLower(v.String()), "e")
		if exponent == "" {
			exponent = "0"
		}
		e, err := strconv.Atoi(exponent)
		return err == nil && len(v) <= maxNumber && e >= -maxExponent && e <= maxExponent
	case []any:
		return !slices.ContainsFunc(v, func(one any) bool { return !calculable(one) })
	case map[string]any:
		for _, one := range v {
			if !calculable(one) {
				return false
			}
		}
	}
	return true
}

// validate holds a payload against the schema of its kind.
func validate(s *jsonschema.Schema, payload schemas.RawJSON) error {
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(payload))
	if err != nil {
		return fault("payload", schemas.CodeInvalidJSON, "is not valid JSON")
	}
	if !calculable(doc) {
		return fault("payload", schemas.CodeInvalidValue, fmt.Sprintf("has a number of more than %d characters, or with an exponent beyond %d", maxNumber, maxExponent))
	}
	var faults *jsonschema.ValidationError
	switch err := s.Validate(doc); {
	case err == nil:
		return nil
	case !errors.As(err, &faults):
		return fault("payload", schemas.CodeInvalidValue, "does not fit the kind's schema")
	}
	var wrong []schemas.FieldError
	for _, e := range leaves(faults) {
		for _, at := range places(e) {
			wrong = append(wrong, schemas.FieldError{Field: field(at), Code: code(e), Message: message(e)})
		}
	}
	return schemas.InvalidSpec(wrong[:min(len(wrong), schemas.MaxFaults)])
}

// Folder is a folder of kinds that may change. It implements schemas.Kinds.
type Folder struct{ presets *presets.Folder[*kind] }

// Open reads the folder for the first time. The error has all that is wrong with it, a line for
// each.
func Open(dir string, p schemas.Policy) (*Folder, error) {
	folder, err := presets.Open(dir, func(name string, d presets.Document) (*kind, []presets.Fault) { return parse(name, d, p) })
	if err != nil {
		return nil, err
	}
	f := &Folder{folder}
	set := folder.Set()
	var wrong []error
	for _, fault := range set.Faults {
		wrong = append(wrong, errors.New(fault.String()))
	}
	if len(wrong) == 0 && len(set.Presets) == 0 {
		wrong = append(wrong, fmt.Errorf("%s has no kind: no file *.yaml", dir))
	}
	return f, errors.Join(wrong...)
}

// Follow reads the folder again when it changes, until ctx ends, and tells of each change: the
// kinds that hold now, and what is wrong with files of which the kinds of before hold.
func (f *Folder) Follow(ctx context.Context, every time.Duration, told func(names []string, faults []presets.Fault)) {
	f.presets.Follow(ctx, every, func(s *presets.Set[*kind]) { told(f.Names(), s.Faults) })
}

// Make implements schemas.Kinds.
func (f *Folder) Make(asked schemas.Spec, given []string) (schemas.Spec, error) {
	k, ok := f.presets.Set().Get(asked.Kind)
	if !ok {
		return asked, fault("kind", schemas.CodeInvalidValue, "is no kind of this site; GET /v1/kinds lists them")
	}
	return k.Value.make(asked, given)
}

// Names implements schemas.Kinds.
func (f *Folder) Names() (names []string) {
	for _, k := range f.presets.Set().Presets {
		names = append(names, k.Name)
	}
	return names
}
