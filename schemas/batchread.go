package schemas

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

// BatchSpec is what POST /v1/batches takes.
type BatchSpec struct {
	Template Spec              `json:"template"` // what holds for every item
	Items    []BatchSpecItem   `json:"items"`
	Labels   map[string]string `json:"labels,omitzero"`   // of each task too
	Callback *Callback         `json:"callback,omitzero"` // announces the end of all
}

// BatchSpecItem is what a task of a batch differs in from the template: a field that is
// given replaces the template's, entries of maps are added. Any field of a spec may
// stand here.
type BatchSpecItem struct {
	Name    string            `json:"name,omitzero"` // becomes the label "name"
	Command []string          `json:"command,omitzero"`
	Env     map[string]string `json:"env,omitzero"`
	Stdin   string            `json:"stdin,omitzero"`
	Files   []File            `json:"files,omitzero"`
	Labels  map[string]string `json:"labels,omitzero"`
}

// BatchRequest is what POST /v1/batches asks for, but its items.
type BatchRequest struct {
	Template []byte // the JSON of a spec: what holds for every item
	Items    int
	Labels   map[string]string // of the batch, and of each task
	Callback *Callback         // announces the end of the batch

	// Fingerprint tells equal requests: white space and the order of fields make no
	// difference. It follows from nothing else, so who has it can test guesses at a secret.
	Fingerprint string

	read *itemTemplate // what Template says; nil until an item is parsed
}

// itemTemplate is a template that was decoded: items are many, and it may be long.
type itemTemplate struct {
	spec  Spec
	given []string // its fields
	err   error
}

// ReadBatch reads the body of POST /v1/batches as it comes: {template, items, labels,
// callback} in any order. It holds no more than one item, and gives each in its turn,
// compact, to item, whose error ends it. What is wrong with
// the body is an *Error that repeats no value; the reader's own error comes back wrapped.
func ReadBatch(r io.Reader, item func(index int, raw []byte) error) (BatchRequest, error) {
	b := batchReader{from: &portions{r: r}}
	b.d = jsontext.NewDecoder(b.from)
	req, err := b.read(item)
	if err != nil {
		return req, b.explain(err)
	}
	return req, nil
}

type batchReader struct {
	from *portions
	d    *jsontext.Decoder
}

func (b *batchReader) read(item func(int, []byte) error) (req BatchRequest, err error) {
	if err := b.expect('{', ""); err != nil {
		return req, err
	}
	items, sums := sha256.New(), map[string]string{} // what the fingerprint is made of
	for {
		b.from.next()
		name, err := b.d.ReadToken()
		if err != nil {
			return req, err
		}
		if name.Kind() == '}' {
			break
		}
		field := name.String()
		switch field {
		case "items":
			if err := b.expect('[', field); err != nil {
				return req, err
			}
			for b.from.next(); b.d.PeekKind() != ']'; b.from.next() {
				if req.Items == MaxBatchItems {
					return req, &Error{Status: 422, Code: CodeInvalidValue, Field: field, Detail: fmt.Sprintf("must be at most %d", MaxBatchItems)}
				}
				raw, canonical, err := b.value(fmt.Sprintf("items.%d", req.Items))
				if err != nil {
					return req, err
				}
				items.Write(append(canonical, '\n'))
				if err := item(req.Items, raw); err != nil {
					return req, err
				}
				req.Items++
			}
			if _, err := b.d.ReadToken(); err != nil {
				return req, err
			}
			sums[field] = hex.EncodeToString(items.Sum(nil))
		case "template", "labels", "callback":
			raw, canonical, err := b.value(field)
			if err != nil {
				return req, err
			}
			sums[field] = string(canonical)
			switch field {
			case "template":
				req.Template = raw
			case "labels":
				err = within(field, DecodeStrict(raw, &req.Labels))
			case "callback":
				req.Callback = new(Callback)
				err = within(field, DecodeStrict(raw, req.Callback))
			}
			if err != nil {
				return req, err
			}
		default:
			if len(field) > 64 {
				field = strings.ToValidUTF8(field[:64], "") + "…"
			}
			return req, &Error{Status: 422, Code: CodeUnknownField, Field: field, Detail: "there is no such field in this version"}
		}
	}
	b.from.next()
	if _, err := b.d.ReadToken(); err != io.EOF {
		if err == nil {
			err = &Error{Status: 400, Code: CodeInvalidJSON, Detail: "there is something after the end of the object"}
		}
		return req, err
	}
	c := checker{}
	c.value(req.Template != nil, "template", "is needed: a task's spec that holds for every item; it may be {}")
	c.value(req.Items > 0, "items", "must be 1 to %d", MaxBatchItems)
	checkPairs(&c, "labels", req.Labels)
	req.Callback.check(&c, "callback")
	if e := InvalidSpec(c.errs); e != nil {
		return req, e
	}
	whole, err := Encode(sums)
	sum := sha256.Sum256(whole)
	req.Fingerprint = hex.EncodeToString(sum[:])
	return req, err
}

// expect reads the token that begins a field's value.
func (b *batchReader) expect(kind jsontext.Kind, field string) error {
	b.from.next()
	if k := b.d.PeekKind(); k != kind && k != 0 {
		must := "must be an object"
		if kind == '[' {
			must = "must be a list"
		}
		return &Error{Status: 422, Code: CodeInvalidType, Field: field, Detail: must}
	}
	_, err := b.d.ReadToken()
	return err
}

// value reads an object, and gives it compact, and as all equal ones are written.
func (b *batchReader) value(field string) (compact, canonical jsontext.Value, err error) {
	b.from.next()
	if k := b.d.PeekKind(); k != '{' && k != 0 {
		return nil, nil, &Error{Status: 422, Code: CodeInvalidType, Field: field, Detail: "must be an object"}
	}
	v, err := b.d.ReadValue()
	if errors.Is(err, errPortion) || err == nil && len(v) > MaxItemBytes {
		return nil, nil, &Error{Status: 413, Code: CodeTooLarge, Field: field, Detail: fmt.Sprintf("must be at most %s as JSON", Size(MaxItemBytes))}
	}
	if err != nil {
		return nil, nil, err
	}
	compact, canonical = v.Clone(), v.Clone()
	if err := compact.Compact(); err != nil {
		return nil, nil, err
	}
	return compact, canonical, canonical.Canonicalize()
}

// explain turns an error of the decoder into one for clients.
func (b *batchReader) explain(err error) error {
	var e *Error
	var syntax *jsontext.SyntacticError
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, errPortion):
		return &Error{Status: 400, Code: CodeInvalidJSON, Detail: "too much white space, or a name that is too long"}
	case errors.As(err, &syntax) && errors.Is(err, jsontext.ErrDuplicateName):
		return &Error{Status: 400, Code: CodeDuplicateField, Field: field(syntax.JSONPointer), Detail: "the field stands there twice"}
	case errors.As(err, &syntax):
		return &Error{Status: 400, Code: CodeInvalidJSON, Detail: fmt.Sprintf("not valid JSON near byte %d", syntax.ByteOffset)}
	case err == io.EOF:
		return &Error{Status: 400, Code: CodeInvalidJSON, Detail: "the body is empty; send a JSON object"}
	}
	return err
}

// portions bounds how much the decoder reads, and so keeps in memory, for one step.
type portions struct {
	r    io.Reader
	left int
}

var errPortion = errors.New("too much for one value")

func (p *portions) next() { p.left = MaxItemBytes + 16<<10 }

func (p *portions) Read(b []byte) (int, error) {
	if p.left <= 0 {
		return 0, errPortion
	}
	n, err := p.r.Read(b[:min(len(b), p.left)])
	p.left -= n
	return n, err
}

// within says that what is wrong is inside a field.
func within(field string, err error) error {
	var e *Error
	if !errors.As(err, &e) {
		return err
	}
	at := *e
	at.Field = strings.TrimSuffix(field+"."+e.Field, ".")
	at.Errors = nil
	for _, f := range e.Errors {
		f.Field = strings.TrimSuffix(field+"."+f.Field, ".")
		at.Errors = append(at.Errors, f)
	}
	return &at
}

// ParseItem gives the spec of an item: the item's fields over those of the template, as
// JSON decodes over a value that is there: entries of maps are added, all else that is
// given replaces. Labels are those of the batch. Errors name fields from the item on.
// It is not for several goroutines at once: the first call decodes the template.
func (b *BatchRequest) ParseItem(item []byte, p Policy) (Spec, error) {
	if b.read == nil {
		t := itemTemplate{spec: DefaultSpec(), given: given(b.Template)}
		t.err = within("template", DecodeStrict(b.Template, &t.spec))
		b.read = &t
	}
	if b.read.err != nil {
		return Spec{}, b.read.err
	}
	s := b.read.spec
	unshare(reflect.ValueOf(&s).Elem()) // decoding over a value writes into its maps and lists
	over := struct {
		Name string `json:"name,omitzero"`
		Spec
	}{Spec: s}
	if err := DecodeStrict(item, &over); err != nil {
		return s, err
	}
	labels := maps.Clone(b.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, over.Labels)
	if over.Name != "" {
		labels[ItemLabel] = over.Name
	}
	if len(labels) > 0 {
		over.Labels = labels
	}
	spec, err := over.Spec.ofKind(p, itemFields(b.read.given, item, len(labels) > 0))
	if err != nil {
		return s, err
	}
	return spec.complete(p)
}

// unshare gives a value its own copies of all that it refers to.
func unshare(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		for _, field := range v.Fields() {
			unshare(field)
		}
	case reflect.Pointer:
		if !v.IsNil() {
			own := reflect.New(v.Type().Elem())
			own.Elem().Set(v.Elem())
			unshare(own.Elem())
			v.Set(own)
		}
	case reflect.Slice:
		if !v.IsNil() {
			own := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
			reflect.Copy(own, v)
			for i := 0; i < own.Len() && refers(v.Type().Elem()); i++ {
				unshare(own.Index(i))
			}
			v.Set(own)
		}
	case reflect.Map:
		if !v.IsNil() {
			own := reflect.MakeMapWithSize(v.Type(), v.Len())
			value := reflect.New(v.Type().Elem()).Elem()
			for key, of := range v.Seq2() {
				value.Set(of)
				unshare(value)
				own.SetMapIndex(key, value)
			}
			v.Set(own)
		}
	}
}

// refers says whether a value of the type may refer to others.
func refers(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Struct, reflect.Pointer, reflect.Slice, reflect.Map:
		return true
	}
	return false
}

// itemFields names what of a spec the template and the item give.
func itemFields(template []string, item []byte, labels bool) []string {
	names := slices.DeleteFunc(slices.Concat(template, given(item)), func(n string) bool { return n == "name" })
	if labels {
		names = append(names, "labels")
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// ItemLabel is the label that the name of a batch's item becomes.
const ItemLabel = "name"
