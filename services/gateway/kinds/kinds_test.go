package kinds_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway/kinds"
	"dayfly.dev/services/gateway/presets"
)

const echo = `kind: echo
about: says it
spec:
  image: busybox
  command: [cat, /task/input/task.json]
  labels: {by: kind}
  env: {A: "1"}
allow: [labels, ttl]
payload:
  type: object
  required: [text]
  additionalProperties: false
  properties:
    text: {type: string, maxLength: 5, pattern: "^[a-z]*$"}
    how: {enum: [loud, low]}
    list: {type: array, maxItems: 2, items: {type: integer, minimum: 3}}
`

func folder(t *testing.T, texts ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, text := range texts {
		name, _, _ := strings.Cut(strings.TrimPrefix(text, "kind: "), "\n")
		if err := os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func policy(t *testing.T, texts ...string) schemas.Policy {
	t.Helper()
	f, err := kinds.Open(folder(t, texts...), schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	p := schemas.DefaultPolicy()
	p.Kinds = f
	return p
}

// What is delivered is right.
func TestTheKindsOfDeploy(t *testing.T) {
	s, err := kinds.Open("../../../deploy/kinds", schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Names(); !slices.Equal(got, []string{"judge-c", "judge-python", "judge-sh", "python"}) {
		t.Error(got)
	}
}

func TestMake(t *testing.T) {
	p := policy(t, echo)
	s, err := schemas.ParseSpec([]byte(`{"kind":"echo","payload":{ "text" : "hi" },"labels":{"mine":"x"},"ttl":"5m"}`), p)
	if err != nil {
		t.Fatal(err)
	}
	if s.Image != "busybox" || s.Kind != "echo" || s.Payload != nil || s.TTL.Std() != 5*time.Minute || s.Labels["by"] != "kind" || s.Labels["mine"] != "x" || s.Env["A"] != "1" ||
		len(s.Files) != 1 || s.Files[0].Path != "task.json" || s.Files[0].Content != `{"text":"hi"}` {
		t.Errorf("%+v", s)
	}
	// A task's labels are its own.
	if s, err = schemas.ParseSpec([]byte(`{"kind":"echo","payload":{"text":"hi"}}`), p); err != nil || s.Labels["mine"] != "" || len(s.Files) != 1 {
		t.Errorf("%+v %v", s, err)
	}
}

func TestPayloadsAreRefusedByFieldAndWithoutTheirValues(t *testing.T) {
	p := policy(t, echo)
	for body, want := range map[string]string{
		`{"kind":"echo"}`:                                                                        "payload invalid_value: is needed; GET /v1/kinds has its schema",
		`{"kind":"echo","payload":null}`:                                                         "payload invalid_type: must be of type object",
		`{"kind":"echo","payload":[]}`:                                                           "payload invalid_type: must be of type object",
		`{"kind":"echo","payload":{}}`:                                                           "payload invalid_value: needs text",
		`{"kind":"echo","payload":{"text":"SECRET"}}`:                                            "payload.text invalid_value",
		`{"kind":"echo","payload":{"text":"a","how":"SECRET"}}`:                                  "payload.how invalid_value: must be one of loud, low",
		`{"kind":"echo","payload":{"text":"a","list":[3,2]}}`:                                    "payload.list.1 invalid_value: must be at least 3",
		`{"kind":"echo","payload":{"text":"a","list":["SECRET"]}}`:                               "payload.list.0 invalid_type: must be of type integer",
		`{"kind":"echo","payload":{"text":"a","more":"SECRET"}}`:                                 "payload.more unknown_field",
		`{"kind":"echo","payload":{"text":"a"},"env":{"B":"SECRET"}}`:                            "env not_allowed: the kind decides it; leave it out",
		`{"kind":"echo","payload":{"text":"a"},"image":"SECRET"}`:                                "image not_allowed",
		`{"kind":"echo","payload":{"text":"a"},"ttl":"48h"}`:                                     "ttl invalid_value",
		`{"kind":"other","payload":{}}`:                                                          "kind invalid_value: is no kind of this site",
		`{"image":"a","payload":{}}`:                                                             "payload invalid_value: goes with kind",
		`{"kind":"echo","payload":{"text":"a","list":[` + strings.Repeat("9,", 100_000) + `9]}}`: "payload.list invalid_value: must have at most 2 items",
	} {
		_, err := schemas.ParseSpec([]byte(body), p)
		var e *schemas.Error
		if !errors.As(err, &e) {
			t.Fatalf("%.100s: %v", body, err)
		}
		got := fmt.Sprintf("%s %s: %s", e.Field, e.Code, e.Detail)
		if !strings.HasPrefix(got, want) || strings.Contains(fmt.Sprint(e, e.Errors), "SECRET") {
			t.Errorf("%.100s: %s, want %s", body, got, want)
		}
	}
	p.KindsOnly = true
	if _, err := schemas.ParseSpec([]byte(`{"image":"a"}`), p); !errors.Is(err, schemas.CodeNotAllowed) {
		t.Errorf("got %v", err)
	}
}

// A schema's bounds are compared exactly, so a number that nobody can compare is refused first.
func TestNumbersThatCannotBeCompared(t *testing.T) {
	p := policy(t, "kind: n\nspec: {image: a}\npayload: {type: array, items: {type: integer, minimum: 0, maximum: 1e300}}\n")
	for payload, right := range map[string]bool{
		`[1, 2e3, 1E+2, 100000000000000000000, 1e300]`: true,
		`[1e1000001]`: false, `[1e-1000001]`: false, `[1e999999]`: false, `[1E401]`: false,
		`[1` + strings.Repeat("0", 400) + `]`: false,
		`[1e99999999999999999999]`:            false,
		`[{"deep": [1e999999]}]`:              false,
	} {
		_, err := schemas.ParseSpec([]byte(`{"kind":"n","payload":`+payload+`}`), p)
		var e *schemas.Error
		if right && err != nil || !right && (!errors.As(err, &e) || e.Field != "payload" || e.Status != 422) {
			t.Errorf("%.40s: %v", payload, err)
		}
	}
}

func TestABatchOfAKind(t *testing.T) {
	p := policy(t, echo)
	b := schemas.BatchRequest{Template: []byte(`{"kind":"echo"}`), Labels: map[string]string{"batch": "1"}}
	s, err := b.ParseItem([]byte(`{"name":"one","payload":{"text":"hi"}}`), p)
	if err != nil || s.Labels["name"] != "one" || s.Labels["batch"] != "1" || s.Labels["by"] != "kind" || s.Files[0].Content != `{"text":"hi"}` {
		t.Errorf("%+v %v", s, err)
	}
	if _, err := b.ParseItem([]byte(`{"payload":{"text":"hi"},"command":["x"]}`), p); !errors.Is(err, schemas.CodeNotAllowed) {
		t.Errorf("got %v", err)
	}
}

const judge = `kind: c
spec:
  image: gcc
  resources: {memory: 128MiB}
judge:
  source: main.c
  compile: {command: [gcc, main.c]}
  run: {command: [./main], memory: 32MiB}
  max: {cpu: 4s}
`

func TestASubmission(t *testing.T) {
	p := policy(t, judge)
	s, err := schemas.ParseSpec([]byte(`{"kind":"c","payload":{"source":"int main(){}","files":[{"path":"a.h","content":"x"}],"tests":[{"stdin":"1","expected":"2"}],"limits":{"cpu":"3s"},"short_circuit":true}}`), p)
	if err != nil {
		t.Fatal(err)
	}
	j := s.Judge
	if len(s.Files) != 2 || s.Files[0].Path != "main.c" || j == nil || j.Run.CPU.Std() != 3*time.Second || j.Run.Memory != 32<<20 || j.Compile.CPU.Std() != 10*time.Second ||
		j.Tests[0].Expected != "2" || !j.ShortCircuit || j.Compare != schemas.CompareTokens {
		t.Errorf("%+v %+v", s, j)
	}
	for payload, field := range map[string]string{
		`{"source":"x","tests":[{}],"limits":{"cpu":"5s"}}`:                                                      "payload.limits.cpu",
		`{"source":"x","tests":[{}],"limits":{"memory":"64MiB"}}`:                                                "payload.limits.memory",
		`{"source":"x","tests":[{}],"compare":"SECRET"}`:                                                         "payload.compare",
		`{"source":"x","tests":[{}],"compile":{}}`:                                                               "payload.compile",
		`{"source":"x","tests":[{}],"files":[{"path":"../x"}]}`:                                                  "files.1.path",
		`{"source":"x","tests":[{}],"files":[{"path":"build/main"}]}`:                                            "files.1.path",
		`{"source":"x","tests":[` + strings.Repeat("{},", 100) + `{}]}`:                                          "payload.tests",
		`{"source":"x","tests":[` + strings.Repeat(`{"stdin":"`+strings.Repeat(`\u0001`, 70)+`"},`, 99) + `{}]}`: "payload.tests", // too short for blobs
		`{"source":"x","tests":[{},{"stdin":"x","stdin_blob":"sha256:` + strings.Repeat("a", 64) + `"}]}`:        "payload.tests.1.stdin_blob",
		`{"source":"x","tests":[{"expected_blob":"sha256:SECRET"}]}`:                                             "payload.tests.0.expected_blob",
	} {
		_, err := schemas.ParseSpec([]byte(`{"kind":"c","payload":`+payload+`}`), p)
		var e *schemas.Error
		if !errors.As(err, &e) || e.Field != field {
			t.Errorf("%.80s: %v, want %s", payload, err, field)
		}
	}
}

func TestFilesAreReadStrictly(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"no name":                {strings.Replace(echo, "kind: echo", "kind: ECHO", 1), "ECHO.yaml: the name must be"},
		"an unknown field":       {echo + "more: 1\n", ":17:1: more: there is no such field"},
		"no spec":                {"kind: a\npayload: {}\n", "spec: is needed"},
		"no image":               {"kind: a\nspec: {ttl: 5m}\npayload: {}\n", ":2:1: spec.image: is needed"},
		"a bad size":             {"kind: a\nspec:\n  image: a\n  resources: {memory: lots}\npayload: {}\n", ":4:23: spec.resources.memory: "},
		"too long":               {"kind: a\nspec: {image: a, ttl: 48h}\npayload: {}\n", ":2:23: spec.ttl: must be at most"},
		"no payload":             {"kind: a\nspec: {image: a}\n", "payload: is needed"},
		"a field it may not let": {"kind: a\nspec: {image: a}\npayload: {}\nallow: [labels, image]\n", ":4:17: allow.1: image is the kind's"},
		"a field that is none":   {"kind: a\nspec: {image: a}\npayload: {}\nallow: [label]\n", ":4:9: allow.0: is no field"},
		"no schema":              {"kind: a\nspec: {image: a}\npayload: {type: [text]}\n", ":3:"},
		"a schema from afar":     {"kind: a\nspec: {image: a}\npayload: {$ref: 'http://127.0.0.1:1/x'}\n", ":3:10: payload: "},
		"a schema of a file":     {"kind: a\nspec: {image: a}\npayload: {$ref: 'file:///etc/passwd'}\n", ":3:10: payload: "},
		"a kind in its spec":     {"kind: a\nspec: {image: a, kind: b}\npayload: {}\n", ":2:24: spec.kind: "},
		"a judge without room":   {strings.Replace(judge, "32MiB", "1GiB", 1), ":8:36: judge.run.memory: "},
		"a judge for too long":   {strings.Replace(judge, "spec:\n", "spec:\n  ttl: 48h\n", 1), "spec.ttl: must be at most"},
		"a judge with a path":    {strings.Replace(judge, "main.c\n", "a/main.c\n", 1), ":6:11: judge.source: "},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := kinds.Open(folder(t, c.text), schemas.DefaultPolicy())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
	if _, err := kinds.Open(folder(t), schemas.DefaultPolicy()); err == nil {
		t.Error("an empty folder is taken")
	}
}

func TestAChangeThatIsWrongChangesNothing(t *testing.T) {
	dir := folder(t, echo)
	f, err := kinds.Open(dir, schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	told, done := make(chan int), make(chan struct{})
	go func() {
		defer close(done)
		f.Follow(ctx, time.Millisecond, func(_ []string, faults []presets.Fault) {
			select {
			case told <- len(faults):
			case <-ctx.Done():
			}
		})
	}()
	put := func(text string) {
		next := filepath.Join(dir, ".next")
		if err := errors.Join(os.WriteFile(next, []byte(text), 0o644), os.Rename(next, filepath.Join(dir, "b.yaml"))); err != nil {
			t.Fatal(err)
		}
	}
	put("kind: b\n")
	if n := <-told; n == 0 || !slices.Equal(f.Names(), []string{"echo"}) {
		t.Errorf("%v %v", n, f.Names())
	}
	put("kind: b\nspec: {image: a}\npayload: {}\n")
	if n := <-told; n != 0 || !slices.Equal(f.Names(), []string{"b", "echo"}) {
		t.Errorf("%v %v", n, f.Names())
	}
	cancel()
	<-done
}
