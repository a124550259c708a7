package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"

	"sigs.k8s.io/yaml"

	"dayfly.dev/schemas"
)

// The formats of -o. What follows templateFormat is a template of text/template.
const (
	formats        = "table, json, yaml, name or go-template=TEMPLATE"
	templateFormat = "go-template="
)

// parseFormat checks -o.
func (c *cli) parseFormat() error {
	switch c.format {
	case "table", "json", "yaml", "name":
		return nil
	}
	text, ok := strings.CutPrefix(c.format, templateFormat)
	if !ok {
		return errors.New("-o must be " + formats)
	}
	var err error
	if c.template, err = template.New("-o").Option("missingkey=zero").Parse(text); err != nil {
		return fmt.Errorf("-o %s: %w", templateFormat, err)
	}
	return nil
}

// data says that the answer is printed as the API gives it, in one of the formats that
// programs read.
func (c *cli) data() bool { return c.format == "json" || c.format == "yaml" || c.template != nil }

// printData prints v as the API would: as indented JSON, as YAML, or by a template, which
// gets each item of a list and a line of its own for it.
func (c *cli) printData(v any) error {
	b, err := schemas.Encode(v)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	switch {
	case c.template != nil:
		err = c.fillIn(&out, b)
	case c.format == "yaml":
		b, err = yaml.JSONToYAML(b)
		out.Write(b)
	default:
		err = json.Indent(&out, b, "", "  ")
		out.WriteByte('\n')
	}
	if err != nil {
		return err
	}
	_, err = out.WriteTo(c.out)
	return err
}

// printLine prints one of many values that come one after the other: as JSON in one
// line, or as printData does.
func (c *cli) printLine(v any) error {
	if c.format != "json" {
		if c.format == "yaml" {
			fmt.Fprintln(c.out, "---")
		}
		return c.printData(v)
	}
	b, err := schemas.Encode(v)
	if err != nil {
		return err
	}
	_, err = c.out.Write(append(b, '\n'))
	return err
}

func (c *cli) fillIn(out *bytes.Buffer, body []byte) error {
	var v any
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber() // sizes are not floats
	if err := d.Decode(&v); err != nil {
		return err
	}
	items, ok := v.([]any)
	if !ok {
		items = []any{v}
	}
	for _, item := range items {
		if err := c.template.Execute(out, item); err != nil {
			return fmt.Errorf("-o %s: %w", templateFormat, err)
		}
		out.WriteByte('\n')
	}
	return nil
}

// names says whether only ids are asked for.
func (c *cli) names() bool { return c.quiet || c.format == "name" }

// table prints rows under a header, aligned with spaces, so that grep and cut work.
func (c *cli) table(rows [][]string) error {
	w := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		for i, cell := range r {
			if cell == "" {
				r[i] = "-"
			}
			r[i] = printable(r[i])
		}
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	return w.Flush()
}

// printable keeps what a task or a client wrote from steering the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '�'
		}
		return r
	}, s)
}

// ago gives an age in one or two units: "12s", "3m", "5h", "2d".
func ago(d time.Duration) string {
	d = max(0, d)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// brief rounds a duration to what a person reads: three digits or so.
func brief(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(10 * time.Millisecond).String()
	}
	return schemas.Duration(d.Round(time.Second)).String()
}

// clip shortens s to n characters.
func clip(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}
