package schemas_test

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"dayfly.dev/schemas"
)

func TestIdsOfItems(t *testing.T) {
	b, err := schemas.NewBatchID(t0, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if back, err := schemas.ParseBatchID(string(b)); err != nil || back != b {
		t.Fatal(back, err)
	}
	last := schemas.TaskID("")
	for i := range schemas.MaxBatchItems {
		id := b.Task(i)
		if _, err := schemas.ParseTaskID(string(id)); err != nil || id <= last {
			t.Fatal(i, id, last, err)
		}
		if of, index := schemas.BatchOf(id); of != b || index != i {
			t.Fatalf("%d: %s is item %d of %s", i, id, index, of)
		}
		last = id
	}
	for _, s := range []string{"", "b-", "t-" + string(b[2:]), string(b[:len(b)-1]) + "1", string(b) + "0"} {
		if _, err := schemas.ParseBatchID(s); !errors.Is(err, schemas.ErrBadID) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func readBatch(body io.Reader) (schemas.BatchRequest, []string, error) {
	var items []string
	r, err := schemas.ReadBatch(body, func(_ int, raw []byte) error {
		items = append(items, string(raw))
		return nil
	})
	return r, items, err
}

func TestReadBatch(t *testing.T) {
	one := `{"items": [ {"command":["a"], "env":{"X":"1"}}, {} ],"labels":{"l":"v"},
		"callback":{"url":"http://a"},"template":{"image":"i","env":{"X":"0","Y":"2"},"labels":{"k":"v"}}}`
	same := `{"template":{"labels":{"k":"v"},"image":"i","env":{"X":"0","Y":"2"}},"callback":{"url":"http://a"},"labels":{"l":"v"},
		"items":[{"env":{"X":"1"},"command":["a"]},{}]}`
	r, items, err := readBatch(iotest.OneByteReader(strings.NewReader(one)))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(items, []string{`{"command":["a"],"env":{"X":"1"}}`, `{}`}) || r.Items != 2 || r.Callback.URL != "http://a" {
		t.Error(items, r)
	}
	other, _, err := readBatch(strings.NewReader(same))
	if err != nil || other.Fingerprint != r.Fingerprint {
		t.Error("the same request has another fingerprint", err)
	}
	if other, _, _ = readBatch(strings.NewReader(strings.Replace(same, `"a"]`, `"b"]`, 1))); other.Fingerprint == r.Fingerprint {
		t.Error("another request has the same fingerprint")
	}

	s, err := r.ParseItem([]byte(`{"name":"n-1","env":{"X":"1"},"command":["a"]}`), schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(s.Env, map[string]string{"X": "1", "Y": "2"}) || s.Image != "i" || s.OnLost != schemas.OnLostRequeue || s.Resources.Pids != 256 {
		t.Error(s)
	}
	if !maps.Equal(s.Labels, map[string]string{"k": "v", "l": "v", "name": "n-1"}) {
		t.Error(s.Labels)
	}
	if s, _ := r.ParseItem([]byte(`{}`), schemas.DefaultPolicy()); s.Env["X"] != "0" || s.Labels["name"] != "" {
		t.Error("an item changed the template", s)
	}
	for item, field := range map[string]string{
		`{"imagee":"a"}`: "imagee", `{"image":""}`: "image", `{"env":{"X":3}}`: "env.X", `{"name":"\u0001"}`: "labels.name", `{"callback":{"nope":1}}`: "callback.nope",
	} {
		_, err := r.ParseItem([]byte(item), schemas.DefaultPolicy())
		var e *schemas.Error
		if !errors.As(err, &e) || e.Field != field {
			t.Errorf("%s: %v", item, err)
		}
	}
}

// Each item is decoded over the template, which is decoded once: none changes it for the next.
func TestItemsShareNothingOfTheirTemplate(t *testing.T) {
	const template = `{"image":"i","entrypoint":["e"],"command":["a","b"],"env":{"X":"0","Y":"1"},"files":[{"path":"f","content":"c"},{"path":"g","content":"d"}],
		"secrets":[{"env":"S","value":"v"}],"resources":{"cpus":1},"tmpfs":{"/x":"1MiB"},"read_only":false,"ports":[{"name":"p","port":80}],"timeouts":{"stop":"1s"},
		"restart":{"policy":"always"},"health":{"http":{"port":80},"retries":5},"constraints":{"zone":"a"},"callback":{"url":"http://a"},"labels":{"k":"v"},"mounts":{"input":"/in"}}`
	p := schemas.DefaultPolicy().ForTemplates()
	items := []string{`{}`, `{"entrypoint":["E","F"],"command":["z"],"env":{"X":"9","Z":"9"},"files":[{"path":"h"}],"secrets":[{"env":"T","value":"w"}],"resources":{"cpus":2},
		"tmpfs":{"/x":"2MiB","/y":"1MiB"},"read_only":true,"ports":[{"name":"q","port":81}],"timeouts":{"stop":"9s"},"restart":{"policy":"on_failure","max":3},
		"health":{"http":{"port":81,"path":"/h"},"retries":9},"constraints":{"zone":"b","disk":"ssd"},"callback":{"url":"http://b"},"labels":{"k":"w","l":"w"},
		"mounts":{"input":"/other"},"name":"n"}`, `{"callback":null,"env":null,"files":[]}`, `{}`}
	batch := schemas.BatchRequest{Template: []byte(template), Labels: map[string]string{"all": "1"}}
	for n, item := range items {
		alone := schemas.BatchRequest{Template: []byte(template), Labels: map[string]string{"all": "1"}}
		want, err := alone.ParseItem([]byte(item), p)
		if err != nil {
			t.Fatal(item, err)
		}
		if got, err := batch.ParseItem([]byte(item), p); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("item %d: %v\n%+v\nalone it is\n%+v", n, err, got, want)
		}
	}
	// What a field refers to that is not exported could not be copied.
	seen := map[reflect.Type]bool{}
	var walk func(reflect.Type)
	walk = func(of reflect.Type) {
		if seen[of] {
			return
		}
		seen[of] = true
		switch of.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Map:
			walk(of.Elem())
		case reflect.Struct:
			for f := range of.Fields() {
				if !f.IsExported() {
					t.Errorf("%s.%s", of, f.Name)
				}
				walk(f.Type)
			}
		case reflect.Interface, reflect.Array, reflect.Func, reflect.Chan:
			t.Errorf("%s is not copied", of)
		}
	}
	walk(reflect.TypeFor[schemas.Spec]())
}

// BenchmarkItemsOfALongTemplate is what a gateway does for each of up to 10,000 items.
func BenchmarkItemsOfALongTemplate(b *testing.B) {
	env := map[string]string{}
	for i := range 600 {
		env[fmt.Sprintf("NAME_%d", i)] = strings.Repeat("x", 45)
	}
	template, err := schemas.Encode(schemas.Spec{Image: "i", Env: env, Timeouts: schemas.DefaultSpec().Timeouts})
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(template)))
	batch := schemas.BatchRequest{Template: template}
	for b.Loop() {
		if _, err := batch.ParseItem([]byte(`{}`), schemas.DefaultPolicy()); err != nil {
			b.Fatal(err)
		}
	}
}

func TestBatchesThatAreRefused(t *testing.T) {
	const tmpl = `"template":{"image":"i"}`
	many := strings.TrimSuffix(strings.Repeat(`{},`, schemas.MaxBatchItems+1), ",")
	for name, c := range map[string]struct {
		body   string
		status int
		code   schemas.Code
		field  string
	}{
		"nothing":           {``, 400, "invalid_json", ""},
		"a list":            {`[]`, 422, "invalid_type", ""},
		"no template":       {`{"items":[{}]}`, 422, "invalid_value", "template"},
		"no items":          {`{` + tmpl + `}`, 422, "invalid_value", "items"},
		"an empty list":     {`{"items":[],` + tmpl + `}`, 422, "invalid_value", "items"},
		"too many items":    {`{"items":[` + many + `],` + tmpl + `}`, 422, "invalid_value", "items"},
		"items an object":   {`{"items":{},` + tmpl + `}`, 422, "invalid_type", "items"},
		"an item no object": {`{"items":[{},7],` + tmpl + `}`, 422, "invalid_type", "items.1"},
		"a large item":      {`{"items":[{},{"stdin":"` + strings.Repeat("x", 100_000) + `"}]}`, 413, "too_large", "items.1"},
		"an endless item":   {`{"items":[{"stdin":"` + strings.Repeat("x", 1_000_000), 413, "too_large", "items.0"},
		"a large template":  {`{"template":{"stdin":"` + strings.Repeat("x", 100_000) + `"}}`, 413, "too_large", "template"},
		"white space":       {`{` + strings.Repeat(" ", 1_000_000) + `}`, 400, "invalid_json", ""},
		"a field twice":     {`{"items":[{}],"items":[{}]}`, 400, "duplicate_field", "items"},
		"another field":     {`{"itemz":[{}]}`, 422, "unknown_field", "itemz"},
		"cut off":           {`{"items":[{}`, 400, "invalid_json", ""},
		"more after it":     {`{"items":[{}],` + tmpl + `} {}`, 400, "invalid_json", ""},
		"a bad label":       {`{"items":[{}],` + tmpl + `,"labels":{"":""}}`, 422, "invalid_value", "labels"},
		"a label of 1":      {`{"items":[{}],` + tmpl + `,"labels":{"a":1}}`, 422, "invalid_type", "labels.a"},
		"a bad callback":    {`{"items":[{}],` + tmpl + `,"callback":{"url":"x"}}`, 422, "invalid_value", "callback.url"},
	} {
		_, _, err := readBatch(strings.NewReader(c.body))
		var e *schemas.Error
		if !errors.As(err, &e) || e.Status != c.status || e.Code != c.code || e.Field != c.field {
			t.Errorf("%s: %v", name, err)
		}
	}
	lost := errors.New("connection lost")
	if _, _, err := readBatch(io.MultiReader(strings.NewReader(`{"items":[{}`), iotest.ErrReader(lost))); !errors.Is(err, lost) {
		t.Error(err)
	}
}

func TestABatchIsDoneOnceWithItsLastResult(t *testing.T) {
	b := schemas.NewBatch("b-1", schemas.BatchRequest{Items: 4, Callback: &schemas.Callback{URL: "http://a"}}, "u", []int{0, 3}, schemas.Meta{At: t0, Op: "accept"})
	step := func(b schemas.Batch, begun, made int, results string) schemas.Batch {
		t.Helper()
		n, err := b.Next(schemas.BatchStep{Meta: schemas.Meta{At: t0.Add(time.Second), Op: "op"}, Begun: begun, Made: made, Results: []byte(results)})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if p, first, end := b.Part(2); p != 0 || first != 0 || end != 3 {
		t.Error(p, first, end)
	}
	if p, first, end := b.Part(3); p != 1 || first != 3 || end != 4 {
		t.Error(p, first, end)
	}
	half := step(b, 2, 1, ".f..")
	half = step(half, 1, 0, "....")
	if half.Begun != 2 || half.Made != 1 || half.Results != ".f.." || half.Done() || half.Headers() != nil {
		t.Errorf("%+v", half)
	}
	if v := half.View(3, func(int) schemas.State { return schemas.Running }); fmt.Sprint(v.Counts) != "map[failed:1 pending:2 running:1]" || v.State != "running" {
		t.Errorf("%+v", v)
	}

	done := step(step(half, 4, 4, "c..g"), 4, 4, "xxex")
	if done.Results != "cfeg" || !done.DoneAt.Equal(t0.Add(time.Second)) || done.Headers()[schemas.HeaderCallback] == nil || !done.Wrote("op") {
		t.Errorf("%+v", done)
	}
	if _, err := done.Next(schemas.BatchStep{}); !errors.Is(err, schemas.ErrFinal) {
		t.Error(err)
	}
	if _, err := done.AskCancel(schemas.Meta{}); !errors.Is(err, schemas.ErrFinal) {
		t.Error(err)
	}

	canceled, err := half.AskCancel(schemas.Meta{At: t0})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := canceled.AskCancel(schemas.Meta{}); !errors.Is(err, schemas.ErrUnchanged) {
		t.Error(err)
	}
	canceled = step(canceled, 4, 4, "....")
	if canceled.Begun != 2 || canceled.Made != 2 || canceled.Results != ".fxx" || canceled.View(1, nil).State != "canceling" {
		t.Errorf("%+v", canceled)
	}
	if canceled = step(canceled, 2, 2, "c..."); !canceled.Done() {
		t.Errorf("%+v", canceled)
	}
}
