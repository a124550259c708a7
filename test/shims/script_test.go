// Package shims holds the shims against conformance scripts made from the documents of
// the systems whose protocols they answer: a real `dayfly up`, real containers.
//
// A script in testdata is read from top to bottom:
//
//	# a comment
//	> METHOD PATH          a request; NAME: VALUE lines below it are headers, JSON is its body
//	< STATUS               its answer; "< STATUS eventually" asks again until it is so
//	= CHECK WORD…          a check that is written in Go
//
// The JSON below an answer must be found in it: further fields may be there, lists are of
// the same length. In it "*" is any value, "/…/" a regular expression, and "$NAME" keeps
// the value under that name, or is the one that was kept. $NAME in a request or in a check
// is the value that was kept.
package shims

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"dayfly.dev/test/harness"
)

// factWithin bounds the wait for one fact.
const factWithin = 30 * time.Second

// script is one that runs.
type script struct {
	testing.TB
	file   string
	url    string // of the shim
	vars   map[string]string
	checks map[string]func(args []string) error
}

// step is a request with its answer, or a check.
type step struct {
	line       int
	method     string
	path       string
	header     http.Header
	body       string
	status     int
	eventually bool
	want       string
	check      []string
}

// run does all steps. The first that is not so ends the test.
func (s *script) run(ctx context.Context) {
	s.Helper()
	b, err := os.ReadFile(s.file)
	if err != nil {
		s.Fatal(err)
	}
	steps, err := parse(string(b))
	if err != nil {
		s.Fatalf("%s: %v", s.file, err)
	}
	for _, st := range steps {
		if err := s.do(ctx, st); err != nil {
			s.Fatalf("%s:%d: %v", s.file, st.line, err)
		}
	}
}

func parse(text string) (steps []step, err error) {
	var in *string // what the lines belong to
	for i, line := range strings.Split(text, "\n") {
		mark, rest, _ := strings.Cut(line, " ")
		words := strings.Fields(rest)
		switch {
		case mark == "#":
		case mark == ">" && len(words) == 2:
			steps = append(steps, step{line: i + 1, method: words[0], path: words[1], header: http.Header{}})
			in = &steps[len(steps)-1].body
		case mark == "<" && len(words) > 0 && len(steps) > 0:
			st := &steps[len(steps)-1]
			if st.status, err = strconv.Atoi(words[0]); err != nil {
				return nil, fmt.Errorf("line %d: %w", i+1, err)
			}
			st.eventually = len(words) > 1 && words[1] == "eventually"
			in = &st.want
		case mark == "=" && len(words) > 0:
			steps = append(steps, step{line: i + 1, check: words})
			in = nil
		case strings.TrimSpace(line) == "":
		case in == nil:
			return nil, fmt.Errorf("line %d: belongs to nothing", i+1)
		default:
			if name, value, ok := strings.Cut(line, ": "); ok && *in == "" && steps[len(steps)-1].status == 0 && !strings.ContainsAny(name, `{["`) {
				steps[len(steps)-1].header.Set(name, value)
				continue
			}
			*in += line + "\n"
		}
	}
	return steps, nil
}

// variable is $NAME.
var variable = regexp.MustCompile(`\$[a-z_]+`)

func (s *script) fill(text string) string {
	return variable.ReplaceAllStringFunc(text, func(v string) string {
		if kept, ok := s.vars[v[1:]]; ok {
			return kept
		}
		return v
	})
}

func (s *script) do(ctx context.Context, st step) error {
	if st.check != nil {
		check, ok := s.checks[st.check[0]]
		if !ok {
			return fmt.Errorf("there is no check %q", st.check[0])
		}
		ctx, cancel := context.WithTimeout(ctx, factWithin)
		defer cancel()
		args := strings.Fields(s.fill(strings.Join(st.check[1:], " ")))
		return harness.Poll(ctx, func() error { return check(args) })
	}
	once := func() error {
		status, body, err := s.ask(ctx, st)
		if err != nil {
			return err
		}
		said := fmt.Sprintf("%s %s was answered\n< %d\n%s", st.method, st.path, status, body)
		if status != st.status {
			return fmt.Errorf("%s, not %d", said, st.status)
		}
		if st.want == "" {
			return nil
		}
		var want, have any
		if err := json.Unmarshal([]byte(st.want), &want); err != nil {
			return harness.Fatal(fmt.Errorf("the answer that is wanted: %w", err))
		}
		if err := json.Unmarshal(body, &have); err != nil {
			return fmt.Errorf("%s, which is no JSON: %w", said, err)
		}
		kept := map[string]string{}
		if err := s.match("", want, have, kept); err != nil {
			return fmt.Errorf("%s%w", said, err)
		}
		for name, v := range kept {
			s.vars[name] = v
		}
		return nil
	}
	if st.eventually {
		ctx, cancel := context.WithTimeout(ctx, factWithin)
		defer cancel()
		return harness.Poll(ctx, once)
	}
	return once()
}

func (s *script) ask(ctx context.Context, st step) (status int, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, st.method, s.url+s.fill(st.path), strings.NewReader(s.fill(st.body)))
	if err != nil {
		return 0, nil, err
	}
	if st.body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for name, v := range st.header {
		req.Header.Set(name, s.fill(v[0]))
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	body, err = io.ReadAll(res.Body)
	return res.StatusCode, body, err
}

// match holds a value against what is wanted.
func (s *script) match(at string, want, have any, kept map[string]string) error {
	differs := func() error {
		w, _ := json.Marshal(want)
		h, _ := json.Marshal(have)
		return fmt.Errorf("%s is %s, not %s", strings.TrimPrefix(at, "."), h, w)
	}
	switch w := want.(type) {
	case map[string]any:
		h, ok := have.(map[string]any)
		if !ok {
			return differs()
		}
		var all error
		for k, v := range w {
			value, ok := h[k]
			if !ok {
				all = errors.Join(all, fmt.Errorf("%s.%s is not there", at, k))
				continue
			}
			all = errors.Join(all, s.match(at+"."+k, v, value, kept))
		}
		return all
	case []any:
		h, ok := have.([]any)
		if !ok || len(h) != len(w) {
			return differs()
		}
		for i := range w {
			if err := s.match(fmt.Sprintf("%s.%d", at, i), w[i], h[i], kept); err != nil {
				return err
			}
		}
		return nil
	case string:
		switch {
		case w == "*":
			return nil
		case strings.HasPrefix(w, "$"):
			said := fmt.Sprint(have)
			if known, ok := s.vars[w[1:]]; ok && known != said {
				return differs()
			}
			kept[w[1:]] = said
			return nil
		case len(w) > 2 && strings.HasPrefix(w, "/") && strings.HasSuffix(w, "/"):
			said, ok := have.(string)
			if n, number := have.(float64); number {
				said, ok = strconv.FormatFloat(n, 'f', -1, 64), true
			}
			if !ok || !regexp.MustCompile(w[1:len(w)-1]).MatchString(said) {
				return differs()
			}
			return nil
		}
	}
	if !reflect.DeepEqual(want, have) {
		return differs()
	}
	return nil
}
