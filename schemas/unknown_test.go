package schemas_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// Every object inside a record, and inside the beat that the reaper rewrites, keeps
// the fields of a newer writer.
func TestEveryPartOfARecordHasRoomForUnknownFields(t *testing.T) {
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		switch typ.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Map:
			walk(typ.Elem())
		case reflect.Struct:
			if typ == reflect.TypeFor[time.Time]() {
				return
			}
			f, ok := typ.FieldByName("Unknown")
			if !ok || f.Type != reflect.TypeFor[schemas.Unknown]() || f.Tag != `json:",embed"` {
				t.Errorf("%s: give it a last field: Unknown Unknown `json:\",embed\"`", typ)
			}
			for i := range typ.NumField() {
				if f := typ.Field(i); f.Name != "Unknown" && !f.Anonymous {
					walk(f.Type)
				}
			}
		}
	}
	for _, typ := range []reflect.Type{
		reflect.TypeFor[schemas.Record](), reflect.TypeFor[schemas.Beat](),
		reflect.TypeFor[schemas.Order](), reflect.TypeFor[schemas.Report](),
		reflect.TypeFor[schemas.Batch](), reflect.TypeFor[schemas.Delivery](),
	} {
		walk(typ)
	}
}

func TestFullMessagesSurviveARoundTrip(t *testing.T) {
	roundTrip(t, filled[schemas.Record]())
	roundTrip(t, filled[schemas.Order]())
	roundTrip(t, filled[schemas.Report]())
	roundTrip(t, filled[schemas.Beat]())
	roundTrip(t, filled[schemas.Task]())
	roundTrip(t, filled[schemas.Worker]())
	roundTrip(t, filled[schemas.Error]())
}

func roundTrip[T any](t *testing.T, v T) {
	t.Helper()
	var back T
	if err := schemas.Decode([]byte(encode(t, v)), &back); err != nil {
		t.Fatalf("%T: %v", v, err)
	}
	if !reflect.DeepEqual(v, back) {
		t.Errorf("%T changed:\n%s\n%s", v, encode(t, v), encode(t, back))
	}
}

// An older service decodes, changes and writes the record of a newer one: nothing
// of the newer one is lost.
func TestUnknownFieldsSurviveNext(t *testing.T) {
	r := filled[schemas.Record]()
	r.State, r.Cancel, r.Spec.OnLost = schemas.Running, nil, schemas.OnLostRequeue
	r.ExpiresAt, r.MaxTTL = t0.Add(time.Hour), schemas.Duration(24*time.Hour)
	text := encode(t, r)

	var old schemas.Record
	if err := schemas.Decode([]byte(text), &old); err != nil {
		t.Fatal(err)
	}
	n := must(t, old, schemas.AskExtend{Meta: meta(t0), TTL: schemas.Duration(2 * time.Hour)})
	before, after := paths(t, text), paths(t, encode(t, n))
	for p := range before {
		if !after[p] {
			t.Errorf("lost %s", p)
		}
	}
	if !before[".spec.resources.later"] || !before[".history.0.later"] {
		t.Fatalf("the test looks at too little: %v", before)
	}
}

// What a newer agent says about an end reaches the record through an older reaper.
func TestUnknownFieldsOfAnEndReachTheRecord(t *testing.T) {
	r := must(t, newRecord(schemas.OnLostRequeue), choose(t0))
	end := filled[schemas.End]()
	end.By = schemas.EndedItself
	n := must(t, r, ended(r, t0, true, end))
	got := paths(t, encode(t, n))
	for _, p := range []string{".exit.later", ".usage.later", ".logs.later"} {
		if !got[p] {
			t.Errorf("lost %s", p)
		}
	}
}

// paths gives the path of every value in a JSON text.
func paths(t *testing.T, text string) map[string]bool {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	all := map[string]bool{}
	var walk func(string, any)
	walk = func(at string, v any) {
		all[at] = true
		switch v := v.(type) {
		case map[string]any:
			for k, e := range v {
				walk(at+"."+k, e)
			}
		case []any:
			for i, e := range v {
				walk(fmt.Sprintf("%s.%d", at, i), e)
			}
		}
	}
	walk("", v)
	return all
}
