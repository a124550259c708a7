package gateway

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"dayfly.dev/schemas"
)

var update = flag.Bool("update", false, "write openapi.json anew")

// openapi.json follows from the table of operations, the types of the contract and
// what their comments say.
func TestOpenAPI(t *testing.T) {
	text := document(t)
	if *update {
		if err := os.WriteFile("openapi.json", text, 0o644); err != nil {
			t.Fatal(err)
		}
	} else if !bytes.Equal(text, openAPI) {
		t.Error("openapi.json is not what the code says; look at what changes: go test -run OpenAPI -update")
	}
}

type object = map[string]any

// generator makes schemas of Go types.
type generator struct {
	t      *testing.T
	types  map[string]string   // what the comment on a type says
	fields map[string]string   // the same of "Type.Field"
	values map[string][]string // constants of a type
	made   object
}

func document(t *testing.T) []byte {
	g := &generator{t: t, types: map[string]string{}, fields: map[string]string{}, values: map[string][]string{}, made: object{}}
	for _, dir := range []string{".", "../../schemas"} {
		g.readComments(dir)
	}
	paths := object{}
	for _, o := range operations() {
		path := strings.ReplaceAll(o.path, "...}", "}")
		if paths[path] == nil {
			paths[path] = object{}
		}
		paths[path].(object)[strings.ToLower(o.method)] = g.operation(o)
	}
	for _, v := range []any{schemas.LogLine{}, schemas.TaskEvent{}, schemas.ExecControl{}, schemas.FilesSkipped{}, problem{}} {
		g.schema(reflect.TypeOf(v))
	}
	g.made["Spec"].(object)["examples"] = []any{object{"image": "busybox", "command": []string{"echo", "hi"}, "ttl": "5m",
		"resources": object{"cpus": 0.5, "memory": "64MiB"}, "labels": object{"owner": "litmus"}}}
	doc, err := schemas.Encode(object{
		"openapi": "3.1.0",
		"info": object{"title": "dayfly", "version": "v1",
			"description": "Runs containers that live for a while. Every answer carries X-Request-Id. A query parameter that an operation does not know is refused; so is an unknown field of a body. Paths take OPTIONS, and HEAD where they take GET; any other method is answered with 405 and method_not_allowed."},
		"servers":    []any{object{"url": "/"}},
		"paths":      paths,
		"components": object{"schemas": g.made},
	})
	if err != nil {
		t.Fatal(err)
	}
	text := jsontext.Value(doc)
	if err := text.Indent(jsontext.WithIndent(" ")); err != nil {
		t.Fatal(err)
	}
	return append(text, '\n')
}

var inPath = regexp.MustCompile(`\{(\w+)(?:\.\.\.)?\}`)

func (g *generator) operation(o operation) object {
	var params []any
	for _, m := range inPath.FindAllStringSubmatch(o.path, -1) {
		of := reflect.TypeFor[schemas.TaskID]()
		if strings.Contains(o.path, "/workers/") {
			of = reflect.TypeFor[schemas.WorkerID]()
		} else if strings.HasPrefix(o.path, "/v1/batches") {
			of = reflect.TypeFor[schemas.BatchID]()
		}
		schema := g.schema(of)
		switch m[1] {
		case "template":
			schema = object{"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
		case "owner":
			schema = object{"type": "string", "minLength": 1, "maxLength": schemas.MaxOwnerBytes}
		case "name":
			schema = object{"type": "string", "description": "With its slashes."}
		case "sha256":
			schema = object{"type": "string", "pattern": "^(sha256:)?[0-9a-f]{64}$"}
		case "port":
			schema = object{"type": "integer", "minimum": 1, "maximum": 65535}
		case "exec":
			schema = g.schema(reflect.TypeFor[schemas.ExecID]())
		}
		params = append(params, object{"name": m[1], "in": "path", "required": true, "schema": schema})
	}
	for _, p := range o.params {
		var schema any = jsontext.Value(p.schema)
		if p.many {
			schema = object{"type": "array", "items": schema}
		}
		params = append(params, object{"name": p.name, "in": p.in, "description": p.about, "schema": schema})
		if p.required {
			params[len(params)-1].(object)["required"] = true
		}
	}
	op := object{"operationId": o.name, "summary": strings.SplitAfter(o.about, ".")[0], "description": o.about, "responses": g.responses(o)}
	if len(params) > 0 {
		op["parameters"] = params
	}
	if o.body != nil {
		op["requestBody"] = object{"required": !o.bodyOptional, "content": object{"application/json": object{"schema": g.schema(reflect.TypeOf(o.body))}}}
	}
	if len(o.kinds) > 0 {
		content := object{}
		for _, kind := range o.kinds {
			content[kind] = object{"schema": object{"type": "string"}}
		}
		op["requestBody"] = object{"required": true, "content": content}
	}
	return op
}

func (g *generator) responses(o operation) object {
	all := object{}
	header := func(names ...string) object {
		h := object{"X-Request-Id": object{"description": "Finds the request in the log.", "schema": object{"type": "string"}}}
		for _, name := range names {
			h[name] = object{"schema": object{"type": "string"}}
		}
		return h
	}
	for _, a := range o.answers {
		content := object{}
		if a.value != nil {
			content["application/json"] = object{"schema": g.schema(reflect.TypeOf(a.value))}
		}
		for _, kind := range a.kinds {
			content[kind] = object{"schema": object{"type": "string"}}
		}
		r := object{"description": a.about, "headers": header(a.header...)}
		if len(content) > 0 {
			r["content"] = content
		}
		all[strconv.Itoa(a.status)] = r
	}
	codes := map[int][]string{}
	for _, f := range o.fails {
		for _, c := range f.codes {
			codes[f.status] = append(codes[f.status], string(c))
		}
	}
	for status, of := range codes {
		slices.Sort(of)
		names := []string(nil)
		if status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests {
			names = []string{"Retry-After"}
		}
		all[strconv.Itoa(status)] = object{"description": http.StatusText(status) + ": " + strings.Join(of, ", "), "headers": header(names...),
			"content": object{"application/problem+json": object{"schema": object{
				"allOf": []any{g.schema(reflect.TypeFor[problem]()), object{"properties": object{"status": object{"const": status}, "code": object{"enum": of}}}}}}}}
	}
	return all
}

// words are strings with a form of their own.
var words = map[reflect.Type]object{
	reflect.TypeFor[time.Time]():         {"type": "string", "format": "date-time"},
	reflect.TypeFor[schemas.TaskID]():    {"type": "string", "pattern": "^t-[0-7][0-9a-hjkmnp-tv-z]{25}$", "examples": []string{"t-01jd6q0t000000000000000000"}},
	reflect.TypeFor[schemas.BatchID]():   {"type": "string", "pattern": "^b-[0-7][0-9a-hjkmnp-tv-z]{25}$"},
	reflect.TypeFor[schemas.ExecID]():    {"type": "string", "pattern": "^[A-Za-z0-9]{1,64}$"},
	reflect.TypeFor[schemas.WorkerID]():  {"type": "string", "pattern": "^[a-z0-9-]{1,63}$"},
	reflect.TypeFor[schemas.Duration]():  {"type": "string", "pattern": `^-?([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+$|^0$`, "examples": []string{"90s", "15m", "1h30m"}},
	reflect.TypeFor[schemas.Size]():      {"type": []string{"integer", "string"}, "pattern": `^[0-9.]+ ?([bB]|[kKmMgGtTpP]([iI]?[bB])?)?$`, "examples": []any{"256MiB", 268435456}},
	reflect.TypeFor[schemas.CPUs]():      {"type": "number"},
	reflect.TypeFor[schemas.Reason]():    {"type": "string"},
	reflect.TypeFor[schemas.Code]():      {"type": "string"},
	reflect.TypeFor[schemas.RawJSON]():   {},
	reflect.TypeFor[jsontext.Value]():    {},
	reflect.TypeFor[map[string]any]():    {"type": "object"},
	reflect.TypeFor[map[string]string](): {"type": "object", "additionalProperties": object{"type": "string"}},
}

func (g *generator) schema(t reflect.Type) object {
	own := t.PkgPath() != "" && t.Name() != "" && t != reflect.TypeFor[time.Time]()
	if !own {
		return g.form(t)
	}
	name := strings.ToUpper(t.Name()[:1]) + t.Name()[1:]
	if g.made[name] == nil {
		made := object{}
		g.made[name] = made // first: a type may hold itself
		maps.Copy(made, g.form(t))
		if about := g.types[t.Name()]; about != "" {
			made["description"] = about
		}
		if open := t == reflect.TypeFor[schemas.Reason]() || t == reflect.TypeFor[schemas.Code](); open {
			made["examples"] = g.values[t.Name()]
		} else if values := g.values[t.Name()]; t.Kind() == reflect.String && len(values) > 0 {
			made["enum"] = values
		}
	}
	return object{"$ref": "#/components/schemas/" + name}
}

func (g *generator) form(t reflect.Type) object {
	if w := words[t]; w != nil {
		return w
	}
	switch t.Kind() {
	case reflect.Pointer:
		return g.schema(t.Elem())
	case reflect.Slice:
		return object{"type": "array", "items": g.schema(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": g.schema(t.Elem())}
	case reflect.String:
		return object{"type": "string"}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Int, reflect.Int64, reflect.Uint64, reflect.Uint16:
		return object{"type": "integer"}
	case reflect.Float64:
		return object{"type": "number"}
	case reflect.Struct:
		s := object{"type": "object"}
		properties, required := object{}, []string{}
		g.properties(t, properties, &required)
		if len(properties) > 0 {
			s["properties"] = properties
		}
		if len(required) > 0 {
			s["required"] = required
		}
		return s
	}
	g.t.Fatalf("no schema for %s", t)
	return nil
}

// optional are fields that are always written and need not be given.
var optional = []string{"Timeouts.Stop", "LogSum.Truncated", "ArtifactSum.Truncated"}

func (g *generator) properties(t reflect.Type, into object, required *[]string) {
	for i := range t.NumField() {
		f := t.Field(i)
		tag := strings.Split(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous:
			g.properties(f.Type, into, required)
			continue
		case f.Name == "Unknown":
			continue
		}
		p := maps.Clone(g.schema(f.Type))
		if about := g.fields[t.Name()+"."+f.Name]; about != "" {
			p["description"] = about
		}
		into[tag[0]] = p
		if !slices.Contains(tag, "omitzero") && !slices.Contains(optional, t.Name()+"."+f.Name) {
			*required = append(*required, tag[0])
		}
	}
}

// readComments takes what a package's source says of its types, fields and constants.
func (g *generator) readComments(dir string) {
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		g.t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			g.t.Fatal(err)
		}
		for _, d := range file.Decls {
			d, ok := d.(*ast.GenDecl)
			if !ok {
				continue
			}
			for _, spec := range d.Specs {
				switch spec := spec.(type) {
				case *ast.TypeSpec:
					g.types[spec.Name.Name] = oneLine(d.Doc)
					if s, ok := spec.Type.(*ast.StructType); ok {
						for _, f := range s.Fields.List {
							for _, n := range f.Names {
								g.fields[spec.Name.Name+"."+n.Name] = strings.TrimSpace(oneLine(f.Doc) + " " + oneLine(f.Comment))
							}
						}
					}
				case *ast.ValueSpec:
					of, ok := spec.Type.(*ast.Ident)
					if !ok || d.Tok != token.CONST {
						continue
					}
					for _, v := range spec.Values {
						if lit, ok := v.(*ast.BasicLit); ok && lit.Kind == token.STRING && lit.Value != `""` {
							text, _ := strconv.Unquote(lit.Value)
							g.values[of.Name] = append(g.values[of.Name], text)
						}
					}
				}
			}
		}
	}
}

// oneLine is a comment on one line.
func oneLine(c *ast.CommentGroup) string { return strings.Join(strings.Fields(c.Text()), " ") }

func TestDocsPageNamesEverything(t *testing.T) {
	page, err := docsPage()
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range operations() {
		for _, want := range []string{`id="` + o.name + `"`, fmt.Sprintf("<b>%s</b> %s", o.method, o.path)} {
			if !bytes.Contains(page, []byte(want)) {
				t.Errorf("the page lacks %s", want)
			}
		}
	}
	for _, never := range []string{"<script", "http://", "https://", "ZgotmplZ"} {
		if bytes.Contains(page, []byte(never)) {
			t.Errorf("the page has %s", never)
		}
	}
}
