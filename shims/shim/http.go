package shim

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

// Problem is why a request was not done: a status and a sentence for people. It is an
// error, so that handlers return it.
type Problem struct {
	Status  int
	Message string // begins with the field, if one is wrong
	Field   string // by the protocol's name
}

// Error implements error.
func (p Problem) Error() string { return p.Message }

// Refuse makes a Problem.
func Refuse(status int, format string, args ...any) Problem {
	return Problem{Status: status, Message: fmt.Sprintf(format, args...)}
}

// Explain makes a Problem of what went wrong. Fields have the protocol's names.
func (s *Shim) Explain(err error) Problem {
	var p Problem
	var e *schemas.Error
	var away *client.UnreachableError
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &e):
		p = Problem{Status: e.Status, Message: cmp.Or(e.Detail, string(e.Code))}
		if e.Field != "" {
			p.Field = s.field(e.Field)
			p.Message = p.Field + ": " + p.Message
		}
		if p.Status < 400 || p.Status > 599 {
			p.Status = http.StatusBadGateway
		}
		return p
	case errors.As(err, &away):
		return Problem{Status: http.StatusServiceUnavailable, Message: "no gateway of dayfly answers; try again"}
	}
	return Problem{Status: http.StatusInternalServerError, Message: "the gateway's answer was not understood"}
}

// field is the protocol's name of a field of ours, or of a part of one.
func (s *Shim) field(name string) string {
	for i := len(name); i > 0; i = strings.LastIndexByte(name[:i], '.') {
		if theirs, ok := s.Fields[name[:i]]; ok {
			return theirs + name[i:]
		}
	}
	return name
}

// readWithin bounds how long a body may take to come.
const readWithin = 30 * time.Second

// Options of Read.
var (
	// AnyCase takes names of fields in any case, as Go's encoding/json does.
	AnyCase = json.MatchCaseInsensitiveNames(true)
	// Lenient passes over fields that are not known.
	Lenient = json.RejectUnknownMembers(false)
)

// Read reads the JSON object in the body of a request into v. A field that v does not
// have is refused unless Lenient is given. Errors are of status 400, 413 or 422.
func Read(w http.ResponseWriter, r *http.Request, v any, opts ...json.Options) error {
	b, err := Body(w, r)
	if err != nil {
		return err
	}
	return schemas.DecodeStrict(b, v, opts...)
}

// Body reads the body of a request, at most schemas.MaxBodyBytes of it.
func Body(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	c := http.NewResponseController(w)
	_ = c.SetReadDeadline(time.Now().Add(readWithin)) // tests' writers have none
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, schemas.MaxBodyBytes))
	_ = c.SetReadDeadline(time.Time{})
	var big *http.MaxBytesError
	switch {
	case errors.As(err, &big):
		return nil, Refuse(http.StatusRequestEntityTooLarge, "the body must be at most %s", schemas.Size(schemas.MaxBodyBytes))
	case err != nil:
		return nil, Refuse(http.StatusBadRequest, "the body broke off, or took too long")
	}
	return b, nil
}

// Answer writes v as JSON.
func Answer(w http.ResponseWriter, status int, v any) error {
	b, err := schemas.Encode(v)
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // whoever has gone needs no answer
	return nil
}

// Raw is a JSON value as it came, for a part of a body whose form depends on another.
type Raw []byte

// UnmarshalJSON implements json.Unmarshaler.
func (r *Raw) UnmarshalJSON(b []byte) error {
	*r = append((*r)[:0], b...)
	return nil
}

// Number reads 0.1 and "0.1". null is as if it were not there.
type Number float64

// UnmarshalJSON implements json.Unmarshaler.
func (n *Number) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		return nil
	}
	if text, err := jsontext.AppendUnquote(nil, b); err == nil {
		b = text
	}
	v, err := strconv.ParseFloat(string(b), 64)
	if err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
		return fmt.Errorf("must be a number")
	}
	*n = Number(v)
	return nil
}
