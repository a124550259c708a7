package schemas

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Encode writes v as JSON with its map keys sorted, so that equal values have
// equal bytes.
func Encode(v any) ([]byte, error) { return json.Marshal(v, json.Deterministic(true)) }

// Decode reads a message of our own. Fields that it does not know are kept where
// the type has a place for them and skipped elsewhere: a newer service may have
// written them.
func Decode(b []byte, v any) error { return json.Unmarshal(b, v) }

// Text gives bytes as JSON can hold them: as text where they are UTF-8, else in base64.
func Text(b []byte) (text, base64ed string) {
	if utf8.Valid(b) {
		return string(b), ""
	}
	return "", base64.StdEncoding.EncodeToString(b)
}

// Limits of a JSON body from outside.
const (
	MaxBodyBytes = 1 << 20
	MaxBodyDepth = 32
)

// Unknown holds the fields of an object that this version does not know, as they
// came. Every part of a record has a place for them, because services of several
// versions rewrite the same record.
type Unknown map[string]jsontext.Value

// refuseUnknown makes an error of the first field that would go into an Unknown.
var refuseUnknown = json.WithUnmarshalers(json.UnmarshalFromFunc(
	func(*jsontext.Decoder, *jsontext.Value) error { return json.ErrUnknownName }))

// DecodeStrict reads what a client sent: one JSON object in UTF-8, no unknown and
// no duplicate field, nothing after it, nested no deeper than MaxBodyDepth. What
// is wrong comes back as an *Error of status 400, 413 or 422 that names the field
// and never repeats a value. Names, also those of map entries, are not values. More
// options change how names are read: shims speak for systems that are less strict.
func DecodeStrict(b []byte, v any, more ...json.Options) error {
	switch body := bytes.TrimSpace(b); {
	case len(b) > MaxBodyBytes:
		return &Error{Status: 413, Code: CodeTooLarge, Detail: fmt.Sprintf("the body must be at most %s", Size(MaxBodyBytes))}
	case len(body) == 0:
		return &Error{Status: 400, Code: CodeInvalidJSON, Detail: "the body is empty; send a JSON object"}
	case !utf8.Valid(b):
		return &Error{Status: 400, Code: CodeInvalidJSON, Detail: "the body is not valid UTF-8"}
	case string(body) == "null": // which would be the zero value of anything
		return &Error{Status: 422, Code: CodeInvalidType, Detail: "must be an object"}
	}
	if err := checkDepth(b); err != nil {
		return err
	}
	err := json.Unmarshal(b, v, json.RejectUnknownMembers(true), refuseUnknown, json.JoinOptions(more...))
	var syntax *jsontext.SyntacticError
	var semantic *json.SemanticError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &syntax) && errors.Is(err, jsontext.ErrDuplicateName):
		return &Error{Status: 400, Code: CodeDuplicateField, Field: field(syntax.JSONPointer), Detail: "the field stands there twice"}
	case errors.As(err, &syntax):
		return &Error{Status: 400, Code: CodeInvalidJSON, Detail: fmt.Sprintf("not valid JSON near byte %d", syntax.ByteOffset)}
	case errors.As(err, &semantic) && errors.Is(err, json.ErrUnknownName):
		return &Error{Status: 422, Code: CodeUnknownField, Field: field(semantic.JSONPointer), Detail: "there is no such field in this version"}
	case errors.As(err, &semantic):
		return &Error{Status: 422, Code: CodeInvalidType, Field: field(semantic.JSONPointer), Detail: mustBe(semantic.GoType)}
	}
	return &Error{Status: 400, Code: CodeInvalidJSON, Detail: "not valid JSON"}
}

// mustBe says which JSON a value of Go type t is written as.
func mustBe(t reflect.Type) string {
	switch t {
	case nil:
		return "has the wrong type"
	case reflect.TypeFor[Duration]():
		return errDuration.Error()
	case reflect.TypeFor[Size]():
		return errSize.Error()
	}
	switch t.Kind() {
	case reflect.String:
		return "must be a string"
	case reflect.Slice:
		return "must be a list"
	case reflect.Bool:
		return "must be true or false"
	case reflect.Float64:
		return "must be a number"
	case reflect.Int, reflect.Int64, reflect.Uint64:
		return "must be a whole number"
	}
	return "must be an object"
}

// field turns a JSON pointer into the dotted form that our errors use. Names of
// map entries are the client's own words, so they are cut where they are long.
func field(p jsontext.Pointer) string {
	var parts []string
	for token := range p.Tokens() {
		if len(token) > 64 {
			token = token[:64] + "…"
		}
		parts = append(parts, strings.ToValidUTF8(token, ""))
	}
	return strings.Join(parts, ".")
}

func checkDepth(b []byte) error {
	d := jsontext.NewDecoder(bytes.NewReader(b))
	for {
		if _, err := d.ReadToken(); err != nil {
			return nil // the end, or what json.Unmarshal will report better
		}
		if d.StackDepth() > MaxBodyDepth {
			return &Error{Status: 400, Code: CodeInvalidJSON, Detail: fmt.Sprintf("nested deeper than %d levels", MaxBodyDepth)}
		}
	}
}
