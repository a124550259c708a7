package gateway

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"strings"

	"dayfly.dev/schemas"
)

// openAPI is made from operations and the types of schemas by openapi_test.go.
//
//go:embed openapi.json
var openAPI []byte

//go:embed docs.html
var docsTemplate string

//go:embed docs.css
var docsStyle string

// openapi is GET /openapi.json.
func (g *Gateway) openapi(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.send(http.StatusOK, openAPI)
	return nil
}

// docs is GET /docs/.
func (g *Gateway) docs(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	page, err := g.page()
	if err != nil {
		return err
	}
	sum := sha256.Sum256([]byte(docsStyle))
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.send(http.StatusOK, page)
	return nil
}

// docsPage renders openapi.json for people. It is the same for every request.
func docsPage() ([]byte, error) {
	var components struct {
		Components struct {
			Schemas map[string]struct {
				Description string
				Enum        []string
				Required    []string
				Properties  map[string]map[string]any
			} `json:"schemas"`
		} `json:"components"`
	}
	if err := schemas.Decode(openAPI, &components); err != nil {
		return nil, fmt.Errorf("read openapi.json: %w", err)
	}
	var b bytes.Buffer
	t, err := template.New("docs").Funcs(template.FuncMap{"css": func() template.CSS { return template.CSS(docsStyle) }, "kind": kindOf,
		"in": func(all []string, one string) bool { return slices.Contains(all, one) }}).Parse(docsTemplate)
	if err == nil {
		err = t.Execute(&b, map[string]any{"Operations": pageOperations(), "Schemas": components.Components.Schemas})
	}
	return b.Bytes(), err
}

// pageOperation is an operation as the page shows it.
type pageOperation struct {
	Method, Path, Name, About, Body string
	Params                          []pageRow
	Answers                         []pageRow
}

type pageRow struct{ Name, Of, About string }

func pageOperations() (all []pageOperation) {
	for _, o := range operations() {
		p := pageOperation{Method: o.method, Path: o.path, Name: o.name, About: o.about, Body: typeName(o.body)}
		for _, q := range o.params {
			p.Params = append(p.Params, pageRow{q.name, q.in, q.about})
		}
		for _, a := range o.answers {
			p.Answers = append(p.Answers, pageRow{fmt.Sprint(a.status), strings.Join(append(slices.Clone(a.kinds), typeName(a.value)), " "), a.about})
		}
		codes := map[int][]string{}
		for _, f := range o.fails {
			for _, c := range f.codes {
				codes[f.status] = append(codes[f.status], string(c))
			}
		}
		for status := 400; status < 600; status++ {
			if len(codes[status]) > 0 {
				p.Answers = append(p.Answers, pageRow{fmt.Sprint(status), "Problem", strings.Join(codes[status], ", ")})
			}
		}
		all = append(all, p)
	}
	return all
}

// typeName is the name of a type of schemas, "" for others.
func typeName(v any) string {
	name, ok := strings.CutPrefix(fmt.Sprintf("%T", v), "schemas.")
	if !ok {
		return ""
	}
	return name
}

// kindOf says in a word what a JSON Schema is.
func kindOf(s map[string]any) string {
	if ref, ok := s["$ref"].(string); ok {
		return ref[strings.LastIndexByte(ref, '/')+1:]
	}
	if items, ok := s["items"].(map[string]any); ok {
		return "list of " + kindOf(items)
	}
	if values, ok := s["additionalProperties"].(map[string]any); ok {
		return "map of " + kindOf(values)
	}
	return fmt.Sprint(s["type"])
}
