package presets

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"dayfly.dev/schemas"
)

// Fault is one thing wrong with a file. Message repeats no value of the file: it may be a
// secret.
type Fault struct {
	File    string // its name in the folder; "" is the folder itself
	Line    int    // from 1; 0 if it is about no place in the file
	Column  int    // from 1
	Field   string // dotted, such as "ports.0.port"; "" if it is about none
	Message string
}

// String gives the fault as compilers do: file:line:column: field: message.
func (f Fault) String() string {
	var b strings.Builder
	b.WriteString(f.File)
	if f.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", f.Line, f.Column)
	}
	if b.Len() > 0 {
		b.WriteString(": ")
	}
	if f.Field != "" {
		b.WriteString(f.Field + ": ")
	}
	return b.String() + f.Message
}

// Document is a YAML file as JSON, and where its fields stand.
type Document struct {
	JSON  []byte // one object
	file  string
	where map[string]place // by dotted field
}

type place struct{ key, value position }

type position struct{ line, column int }

// MaxFileBytes is how long a file may be.
const MaxFileBytes = 64 << 10

// Read takes one YAML document that is a mapping. What YAML has beyond JSON's values, as
// anchors, merge keys and tags, it refuses: a preset is read by people.
func Read(file string, text []byte) (Document, []Fault) {
	d := Document{file: file, where: map[string]place{}}
	if len(text) > MaxFileBytes {
		return d, []Fault{{File: file, Message: fmt.Sprintf("the file must be at most %s", schemas.Size(MaxFileBytes))}}
	}
	in := yaml.NewDecoder(bytes.NewReader(text))
	var root, more yaml.Node
	if err := in.Decode(&root); errors.Is(err, io.EOF) {
		return d, []Fault{{File: file, Line: 1, Column: 1, Message: "the file is empty"}}
	} else if err != nil {
		return d, []Fault{syntaxFault(file, err)}
	}
	if err := in.Decode(&more); err == nil {
		return d, []Fault{{File: file, Line: more.Line, Column: more.Column, Message: "must be one document; each preset has a file of its own"}}
	} else if !errors.Is(err, io.EOF) {
		return d, []Fault{syntaxFault(file, err)}
	}
	top := root.Content[0]
	if top.Kind != yaml.MappingNode {
		return d, []Fault{{File: file, Line: top.Line, Column: top.Column, Message: "must be fields with values"}}
	}
	c := converter{d: &d}
	var out bytes.Buffer
	c.value(&out, top, "", 0)
	if len(c.faults) > 0 {
		return d, c.faults
	}
	d.JSON = out.Bytes()
	return d, nil
}

// Faults gives what is wrong with a document by the error that came of its JSON, with
// the places in the file. nil stays nil.
func (d Document) Faults(err error) []Fault {
	if err == nil {
		return nil
	}
	var e *schemas.Error
	if !errors.As(err, &e) {
		return []Fault{d.At("", err.Error())}
	}
	if len(e.Errors) == 0 {
		return []Fault{d.fault(e.Field, e.Code, e.Detail)}
	}
	var all []Fault
	for _, f := range e.Errors {
		all = append(all, d.fault(f.Field, f.Code, f.Message))
	}
	return all
}

// At is a fault of a field: where it stands or, if it does not, where the nearest field
// around it does.
func (d Document) At(field, message string) Fault { return d.fault(field, "", message) }

func (d Document) fault(field string, code schemas.Code, message string) Fault {
	if message == "must be a string" {
		message += "; put numbers, dates, true and false in quotes"
	}
	for near := field; ; {
		p, ok := d.where[near]
		if ok {
			at := p.value
			if code == schemas.CodeUnknownField || near != field {
				at = p.key
			}
			return Fault{d.file, at.line, at.column, field, message}
		}
		i := strings.LastIndexByte(near, '.')
		if i < 0 && near == "" {
			return Fault{d.file, 1, 1, field, message}
		}
		near = near[:max(i, 0)]
	}
}

var yamlLine = regexp.MustCompile(`^(?:yaml: )?line (\d+): `)

// anchorName is the one word of a file that the parser repeats.
var anchorName = regexp.MustCompile(`anchor '.*'`)

// syntaxFault is what the YAML parser says; it knows the line alone.
func syntaxFault(file string, err error) Fault {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	f := Fault{File: file, Line: 1, Column: 1}
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		f.Line, _ = strconv.Atoi(m[1])
		text = text[len(m[0]):]
	}
	f.Message = "not valid YAML: " + anchorName.ReplaceAllString(text, "anchor")
	return f
}

// converter writes YAML nodes as JSON.
type converter struct {
	d      *Document
	faults []Fault
}

func (c *converter) fault(n *yaml.Node, field, message string) {
	if len(c.faults) < schemas.MaxFaults {
		c.faults = append(c.faults, Fault{c.d.file, n.Line, n.Column, field, message})
	}
}

func (c *converter) value(out *bytes.Buffer, n *yaml.Node, field string, depth int) {
	if _, ok := c.d.where[field]; !ok {
		here := position{n.Line, n.Column}
		c.d.where[field] = place{here, here}
	}
	switch {
	case depth > schemas.MaxBodyDepth:
		c.fault(n, field, fmt.Sprintf("nested deeper than %d levels", schemas.MaxBodyDepth))
	case n.Kind == yaml.AliasNode, n.Anchor != "":
		c.fault(n, field, "anchors and aliases are not taken; write the value out")
	case n.Kind == yaml.MappingNode && n.ShortTag() == "!!map":
		c.mapping(out, n, field, depth)
	case n.Kind == yaml.SequenceNode && n.ShortTag() == "!!seq":
		out.WriteByte('[')
		for i, item := range n.Content {
			if i > 0 {
				out.WriteByte(',')
			}
			c.value(out, item, join(field, strconv.Itoa(i)), depth+1)
		}
		out.WriteByte(']')
	case n.Kind == yaml.ScalarNode:
		c.scalar(out, n, field)
	default:
		c.fault(n, field, "tags are not taken")
	}
}

func (c *converter) mapping(out *bytes.Buffer, n *yaml.Node, field string, depth int) {
	seen := map[string]bool{}
	out.WriteByte('{')
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode || key.ShortTag() == "!!merge" {
			c.fault(key, field, "names of fields must be plain words")
			continue
		}
		if seen[key.Value] {
			c.fault(key, join(field, key.Value), "the field stands there twice")
			continue
		}
		seen[key.Value] = true
		if len(seen) > 1 {
			out.WriteByte(',')
		}
		name := join(field, key.Value)
		c.d.where[name] = place{position{key.Line, key.Column}, position{value.Line, value.Column}}
		writeString(out, key.Value)
		out.WriteByte(':')
		c.value(out, value, name, depth+1)
	}
	out.WriteByte('}')
}

func (c *converter) scalar(out *bytes.Buffer, n *yaml.Node, field string) {
	switch n.ShortTag() {
	case "!!str", "!!timestamp":
		writeString(out, n.Value)
	case "!!null":
		c.fault(n, field, "has no value; give one, or leave the field out")
	case "!!bool":
		var v bool
		if n.Decode(&v) != nil {
			c.fault(n, field, "must be true or false")
			return
		}
		out.WriteString(strconv.FormatBool(v))
	case "!!int":
		var v int64
		if n.Decode(&v) != nil {
			c.fault(n, field, "the number is too large")
			return
		}
		out.WriteString(strconv.FormatInt(v, 10))
	case "!!float":
		var v float64
		if n.Decode(&v) != nil || math.IsNaN(v) || math.IsInf(v, 0) {
			c.fault(n, field, "must be a plain number")
			return
		}
		out.WriteString(strconv.FormatFloat(v, 'g', -1, 64))
	default:
		c.fault(n, field, "tags are not taken")
	}
}

func writeString(out *bytes.Buffer, s string) {
	b, _ := json.Marshal(s)
	out.Write(b)
}

// join is the dotted name of a field, as DecodeStrict gives it.
func join(field, name string) string {
	if len(name) > 64 {
		name = name[:64] + "…"
	}
	name = strings.ToValidUTF8(name, "")
	if field == "" {
		return name
	}
	return field + "." + name
}
