package schemas

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// Template is an operator's preset for instances: a spec, and what holds for the
// instances made of it.
type Template struct {
	Description string                   `json:"description,omitzero"`
	Spec        Spec                     `json:"spec"`
	MaxTTL      Duration                 `json:"max_ttl"`             // longest lifetime, renewals included
	Extensions  *int                     `json:"extensions,omitzero"` // how often an instance may be renewed; any number if not given
	Shared      bool                     `json:"shared,omitzero"`     // all owners have one instance
	Prepull     bool                     `json:"prepull,omitzero"`    // workers shall hold the image
	Values      map[string]TemplateValue `json:"values,omitzero"`     // what an owner's PUT brings, and where it goes
	Connection  string                   `json:"connection,omitzero"` // such as "ssh -p {port} ctf@{host}"
}

// TemplateValue says where a value of one owner goes, such as a flag.
type TemplateValue struct {
	Env      string `json:"env,omitzero"`  // the name of a variable, or
	Path     string `json:"path,omitzero"` // of a file in /task/input
	Optional bool   `json:"optional,omitzero"`
}

// TemplateView is a template as the API shows it.
type TemplateView struct {
	Name   string    `json:"name"`
	Digest string    `json:"digest"`  // of its file, by the site's key: the same at every gateway that has read the same
	ReadAt time.Time `json:"read_at"` // by this gateway
	Template
}

// TemplateFault is something wrong with a file of templates. What was read before holds.
type TemplateFault struct {
	File    string `json:"file,omitzero"` // "" if it is the folder
	Line    int    `json:"line,omitzero"`
	Column  int    `json:"column,omitzero"`
	Field   string `json:"field,omitzero"`
	Message string `json:"message"`
}

// TemplateList is the answer of GET /v1/templates, by name.
type TemplateList struct {
	Items  []TemplateView  `json:"items"`
	Digest string          `json:"digest"` // of all, likewise; "" if there are no templates
	Faults []TemplateFault `json:"faults,omitzero"`
}

// Limits of a template.
const (
	MaxValues      = 32
	MaxDescription = 1024
	MaxConnection  = 512
	MaxExtensions  = 1000
)

// templateFields are those beside the spec's.
var templateFields = []string{"description", "max_ttl", "extensions", "shared", "prepull", "values", "connection"}

// ForTemplates is what a template may ask for: it is the operator's own word, so only the
// longest lifetime binds it.
func (p Policy) ForTemplates() Policy {
	p.AllowEntrypoint, p.AllowTmpfs, p.AllowImageUser, p.AllowMounts, p.AllowWritableRoot, p.AllowCaps = true, true, true, true, true, Capabilities
	return p
}

// ParseTemplate reads a template: the fields of a spec, and its own beside them. Every
// error is an *Error.
func ParseTemplate(body []byte, p Policy) (Template, error) {
	if err := DecodeStrict(body, &map[string]any{}); err != nil {
		return Template{}, err
	}
	fields := map[string]jsontext.Value{}
	if err := Decode(body, &fields); err != nil {
		return Template{}, err
	}
	var t Template
	own := map[string]jsontext.Value{}
	for _, name := range templateFields {
		if v, ok := fields[name]; ok {
			own[name] = v
			delete(fields, name)
		}
	}
	b, err := Encode(own)
	if err == nil {
		err = DecodeStrict(b, &t)
	}
	if err != nil {
		return Template{}, err
	}
	b, err = Encode(fields)
	if err != nil {
		return Template{}, err
	}
	if t.Spec, err = ParseSpec(b, p.ForTemplates()); err != nil {
		return Template{}, err
	}
	if t.MaxTTL == 0 {
		t.MaxTTL = p.MaxTTL
	}
	c := &checker{}
	t.check(c, p)
	if len(c.errs) > 0 {
		return Template{}, InvalidSpec(c.errs)
	}
	return t, nil
}

func (t *Template) check(c *checker, p Policy) {
	c.value(len(t.Description) <= MaxDescription, "description", "must be at most %d bytes", MaxDescription)
	c.value(t.MaxTTL >= t.Spec.TTL && t.MaxTTL <= p.MaxTTL, "max_ttl", "must be at least the ttl (%s) and at most %s here", t.Spec.TTL, p.MaxTTL)
	c.value(t.Extensions == nil || *t.Extensions >= 0 && *t.Extensions <= MaxExtensions, "extensions", "must be 0 to %d", MaxExtensions)
	c.value(len(t.Values) <= MaxValues, "values", "must be at most %d", MaxValues)
	c.value(!t.Shared || len(t.Values) == 0, "values", "cannot be of one owner where shared is true: one instance is for all")
	for _, label := range []string{LabelTemplate, LabelOwner} {
		_, given := t.Spec.Labels[label]
		c.value(!given, "labels."+label, "is given by dayfly")
	}
	for _, name := range slices.Sorted(maps.Keys(t.Values)) {
		v := t.Values[name]
		if !LabelName(name) {
			c.add("values", CodeInvalidValue, "names must be 1 to 63 of letters, digits and -_./")
			continue
		}
		trial := t.Spec
		trial.Secrets = append(slices.Clone(trial.Secrets), t.secrets(func(n string) (string, bool) { return "x", n <= name })...)
		faults := &checker{}
		trial.checkSecrets(faults)
		if len(faults.errs) > 0 {
			of := faults.errs[0]
			field := "values." + name
			if v.Env != "" && v.Path == "" {
				field += ".env"
			} else if v.Path != "" && v.Env == "" {
				field += ".path"
			}
			c.add(field, of.Code, "%s", of.Message)
			return // those behind it would only say the same
		}
	}
	if t.Connection == "" {
		return
	}
	_, ok := fillConnection(t.Connection, func(port, _ string) (string, bool) {
		return "", port == "" || slices.ContainsFunc(t.Spec.Ports, func(p Port) bool { return p.Name == port })
	})
	c.value(ok && len(t.Connection) <= MaxConnection && line(t.Connection, MaxConnection) == t.Connection, "connection",
		"must be one line of at most %d bytes; in braces may stand host, port and url, and PORTNAME.host and so on", MaxConnection)
}

// secrets are the values that value gives, where they go.
func (t *Template) secrets(value func(name string) (string, bool)) (list []Secret) {
	for _, name := range slices.Sorted(maps.Keys(t.Values)) {
		if v, ok := value(name); ok {
			list = append(list, Secret{Env: t.Values[name].Env, Path: t.Values[name].Path, Value: v})
		}
	}
	return list
}

// The labels of an instance's task.
const (
	LabelTemplate = "template"
	LabelOwner    = "owner"
)

// Make gives the spec of an instance of the template called name, and what goes into its
// record. owner is "" for a shared one. Every error is an *Error.
func (t *Template) Make(name, owner string, ask InstanceRequest, p Policy) (Spec, InstanceOf, error) {
	c := &checker{}
	for _, given := range slices.Sorted(maps.Keys(ask.Values)) {
		if _, known := t.Values[given]; !known {
			c.add("values", CodeUnknownField, "the template takes %s", t.takes())
			break
		}
	}
	for _, v := range slices.Sorted(maps.Keys(t.Values)) {
		_, given := ask.Values[v]
		c.value(given || t.Values[v].Optional, "values."+v, "is needed")
	}
	spec := t.Spec
	if ask.TTL != 0 {
		c.value(ask.TTL.Std() >= time.Second && ask.TTL <= t.MaxTTL, "ttl", `must be "1s" to %s`, t.MaxTTL)
		spec.TTL = ask.TTL
	}
	if len(c.errs) > 0 {
		return spec, InstanceOf{}, InvalidSpec(c.errs)
	}
	own := len(spec.Secrets)
	spec.Secrets = append(slices.Clone(spec.Secrets), t.secrets(func(name string) (string, bool) { v, ok := ask.Values[name]; return v, ok })...)
	spec.Labels = maps.Clone(spec.Labels)
	if spec.Labels == nil {
		spec.Labels = map[string]string{}
	}
	spec.Labels[LabelTemplate] = name
	if owner != "" {
		spec.Labels[LabelOwner] = owner
	}
	if errs := spec.Validate(p.ForTemplates()); len(errs) > 0 {
		for i := range errs {
			errs[i].Field = t.valueField(errs[i].Field, own, ask.Values)
		}
		return spec, InstanceOf{}, InvalidSpec(errs)
	}
	of := InstanceOf{Template: name, Owner: owner, Connection: t.Connection}
	if t.Extensions != nil {
		most := *t.Extensions
		of.Most = &most
	}
	return spec, of, nil
}

// takes names the values of the template.
func (t *Template) takes() string {
	if len(t.Values) == 0 {
		return "no values"
	}
	return "only " + strings.Join(slices.Sorted(maps.Keys(t.Values)), ", ")
}

// valueField gives the field of a request from which that of a spec was made: of its
// secrets those from own on are values.
func (t *Template) valueField(field string, own int, values map[string]string) string {
	if field == "secrets" {
		return "values"
	}
	var i int
	if _, err := fmt.Sscanf(field, "secrets.%d", &i); err == nil && i >= own {
		names := slices.Sorted(maps.Keys(values))
		if i-own < len(names) {
			return "values." + names[i-own]
		}
	}
	return field
}

// Public is the template as it may be shown.
func (t Template) Public() Template {
	t.Spec.Callback, t.Spec.Secrets = t.Spec.Callback.public(), hidden(t.Spec.Secrets)
	return t
}
