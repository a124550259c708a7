package schemas

import (
	"bytes"
	"errors"
	"fmt"
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

// Limits of a JSON body from outside.
const (
	MaxBodyBytes = 1 << 20
	MaxBodyDepth = 32
)

// DecodeStrict reads what a client sent: one JSON value in UTF-8, no unknown and
// no duplicate field, nothing after it, nested no deeper than MaxBodyDepth. What
// is wrong comes back as an *Error of status 400 or 422 that names the field and
// never repeats a value.
func DecodeStrict(b []byte, v any) error {
	if len(bytes.TrimSpace(b)) == 0 {
		return &Error{Status: 400, Code: CodeInvalidJSON, Detail: "the body is empty; send a JSON object"}
	}
	if !utf8.Valid(b) {
		return &Error{Status: 400, Code: CodeInvalidJSON, Detail: "the body is not valid UTF-8"}
	}
	if err := checkDepth(b); err != nil {
		return err
	}
	err := json.Unmarshal(b, v, json.RejectUnknownMembers(true))
	if err == nil {
		return nil
	}
	var syn *jsontext.SyntacticError
	if errors.As(err, &syn) {
		if errors.Is(err, jsontext.ErrDuplicateName) {
			return &Error{Status: 400, Code: CodeDuplicateField, Field: field(syn.JSONPointer), Detail: "the field stands there twice"}
		}
		return &Error{Status: 400, Code: CodeInvalidJSON, Detail: fmt.Sprintf("not valid JSON near byte %d", syn.ByteOffset)}
	}
	var sem *json.SemanticError
	if errors.As(err, &sem) {
		f := field(sem.JSONPointer)
		if errors.Is(err, json.ErrUnknownName) {
			return &Error{Status: 422, Code: CodeUnknownField, Field: f, Detail: "no such field; see /openapi.json for those there are"}
		}
		detail := "has the wrong type"
		if sem.GoType != nil {
			detail = "must be " + typeWord(sem.GoType.String())
		}
		// Our own text types say best what they want, and promise not to repeat the input.
		if inner := sem.Err; inner == errDuration || inner == errSize || errors.Is(inner, errDuration) || errors.Is(inner, errSize) {
			detail = unwrapQuantity(inner).Error()
		}
		return &Error{Status: 422, Code: CodeInvalidType, Field: f, Detail: detail}
	}
	return &Error{Status: 400, Code: CodeInvalidJSON, Detail: "not valid JSON"}
}

func unwrapQuantity(err error) error {
	if errors.Is(err, errDuration) {
		return errDuration
	}
	return errSize
}

func typeWord(goType string) string {
	switch {
	case strings.HasPrefix(goType, "[]"):
		return "a list"
	case strings.HasPrefix(goType, "map["), strings.HasPrefix(goType, "schemas."), strings.HasPrefix(goType, "*schemas."):
		switch strings.TrimPrefix(goType, "*") {
		case "schemas.CPUs":
			return "a number"
		case "schemas.Duration":
			return strings.TrimPrefix(errDuration.Error(), "must be ")
		case "schemas.Size":
			return strings.TrimPrefix(errSize.Error(), "must be ")
		case "schemas.OnLost", "schemas.Network", "schemas.ImagePolicy":
			return "a string"
		}
		return "an object"
	case strings.Contains(goType, "string"):
		return "a string"
	case strings.Contains(goType, "bool"):
		return "true or false"
	case strings.Contains(goType, "int"):
		return "a whole number"
	case strings.Contains(goType, "float"):
		return "a number"
	}
	return "of another type"
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
