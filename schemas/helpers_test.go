package schemas_test

import (
	"reflect"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"dayfly.dev/schemas"
)

var (
	t0     = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	taskID = schemas.TaskID("t-01jd0000000000000000000000")
)

func meta(at time.Time) schemas.Meta { return schemas.Meta{At: at, By: "tester"} }

// newRecord is an accepted task of the default spec, with on_lost as given.
func newRecord(lost schemas.OnLost) schemas.Record {
	s := schemas.DefaultSpec()
	s.Image, s.OnLost = "busybox", lost
	return schemas.NewRecord(taskID, s, schemas.DefaultPolicy(), meta(t0))
}

// must applies events that have to be taken.
func must(tb testing.TB, r schemas.Record, events ...schemas.Event) schemas.Record {
	tb.Helper()
	for _, e := range events {
		before := encode(tb, r)
		n, err := schemas.Next(r, e)
		if err != nil {
			tb.Fatalf("%T: %v", e, err)
		}
		if encode(tb, r) != before {
			tb.Fatalf("%T changed the record that it was given", e)
		}
		r = n
	}
	return r
}

func choose(at time.Time) schemas.Choose {
	return schemas.Choose{Meta: meta(at), Worker: "w1", Epoch: "e1"}
}

// report is a settle of the record's own attempt.
func report(r schemas.Record, at time.Time, rep schemas.Report) schemas.Settle {
	rep.Assignment = r.Assignment()
	return schemas.Settle{Meta: meta(at), Report: rep}
}

func running(r schemas.Record, at time.Time) schemas.Settle {
	return report(r, at, schemas.Report{Phase: schemas.PhaseRunning, Ran: true})
}

func ended(r schemas.Record, at time.Time, ran bool, end schemas.End) schemas.Settle {
	return report(r, at, schemas.Report{Phase: schemas.PhaseEnded, Ran: ran, End: &end})
}

func encode(tb testing.TB, v any) string {
	tb.Helper()
	b, err := schemas.Encode(v)
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}

// fill sets every field that v reaches to something that is not zero.
func fill(v reflect.Value) {
	switch p := v.Addr().Interface().(type) {
	case *time.Time:
		*p = t0
		return
	case *schemas.RawJSON:
		*p = schemas.RawJSON(`{"later":1}`)
		return
	case *schemas.Unknown:
		*p = schemas.Unknown{"later": jsontext.Value(`{"n":[1,null]}`)}
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		key, elem := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(key)
		fill(elem)
		v.SetMapIndex(key, elem)
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Float64:
		v.SetFloat(0.5)
	case reflect.Uint64, reflect.Uint16, reflect.Uint8:
		v.SetUint(7)
	default:
		v.SetInt(7)
	}
}

func filled[T any]() T {
	var v T
	fill(reflect.ValueOf(&v).Elem())
	return v
}
