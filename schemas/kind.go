package schemas

import (
	"reflect"
	"slices"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

// Kinds are the job types that a site has whitelisted.
type Kinds interface {
	// Make gives the spec of a task of the kind: asked is what the client sent, decoded over
	// the defaults, and given names the fields that it gave. The answer has no payload any
	// more. What is wrong comes back as an *Error that names the field.
	Make(asked Spec, given []string) (Spec, error)
	// Names lists the kinds.
	Names() []string
}

// Kind is a job type as the API shows it.
type Kind struct {
	Name      string    `json:"name"`
	About     string    `json:"about,omitzero"`
	Image     string    `json:"image"`
	Resources Resources `json:"resources"`
	TTL       Duration  `json:"ttl"`
	Judge     bool      `json:"judge,omitzero"` // its tasks have a result with verdicts
	Allow     []string  `json:"allow"`          // fields of a spec that a task may give beside kind and payload
	// Payload is the JSON Schema of the payload.
	Payload RawJSON `json:"payload"`
}

// KindList is the answer of GET /v1/kinds, by name.
type KindList struct {
	Items []Kind `json:"items"`
	Only  bool   `json:"only"` // the site takes no other tasks
}

// SpecFields names the fields of a spec, as JSON has them.
func SpecFields() (names []string) {
	for f := range specFields() {
		names = append(names, f)
	}
	return names
}

// specFields gives the fields of a spec by their names in JSON.
func specFields() func(func(string, int) bool) {
	t := reflect.TypeFor[Spec]()
	return func(yield func(string, int) bool) {
		for i := range t.NumField() {
			name, options, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
			if options != "embed" && !yield(name, i) {
				return
			}
		}
	}
}

// Take sets the named fields of s to those of from. Names that a spec does not have are
// left out.
func (s *Spec) Take(from Spec, names ...string) {
	to, of := reflect.ValueOf(s).Elem(), reflect.ValueOf(from)
	for name, i := range specFields() {
		if slices.Contains(names, name) {
			to.Field(i).Set(of.Field(i))
		}
	}
}

// KindName says whether name may be that of a kind.
func KindName(name string) bool {
	_, err := ParseWorkerID(name)
	return err == nil
}

// given lists the fields of an object that was decoded before.
func given(body []byte) []string {
	var fields map[string]jsontext.Value
	_ = Decode(body, &fields)
	names := make([]string, 0, len(fields))
	for name := range fields {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// ofKind makes a spec of what was asked for, if that is of a kind.
func (s Spec) ofKind(p Policy, given []string) (Spec, error) {
	refuse := func(code Code, field, detail string) error {
		return InvalidSpec([]FieldError{{Field: field, Code: code, Message: detail}})
	}
	switch {
	case s.Kind != "" && p.Kinds == nil:
		return s, refuse(CodeInvalidValue, "kind", "this site has no kinds; leave it out")
	case s.Kind != "" && !slices.Contains(p.Kinds.Names(), s.Kind):
		return s, refuse(CodeInvalidValue, "kind", "is no kind of this site; GET /v1/kinds lists them")
	case s.Kind != "":
		return p.Kinds.Make(s, given)
	case p.KindsOnly:
		return s, refuse(CodeNotAllowed, "kind", "this site takes only tasks of its kinds; GET /v1/kinds lists them")
	case s.Payload != nil:
		return s, refuse(CodeInvalidValue, "payload", "goes with kind")
	}
	return s, nil
}

// RawJSON is a JSON value that is handed on as it came.
type RawJSON []byte

// UnmarshalJSONFrom implements json.UnmarshalerFrom.
func (r *RawJSON) UnmarshalJSONFrom(d *jsontext.Decoder) error {
	v, err := d.ReadValue()
	*r = append((*r)[:0], v...)
	return err
}

// MarshalJSONTo implements json.MarshalerTo.
func (r RawJSON) MarshalJSONTo(e *jsontext.Encoder) error {
	if r == nil {
		return e.WriteToken(jsontext.Null)
	}
	return e.WriteValue(jsontext.Value(r))
}
