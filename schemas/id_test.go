package schemas_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"dayfly.dev/schemas"
)

func TestParseTaskID(t *testing.T) {
	id, err := schemas.NewTaskID(t0, bytes.NewReader(make([]byte, 10)))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := schemas.ParseTaskID(string(id)); err != nil || got != id {
		t.Errorf("%s: %v", id, err)
	}
	for _, s := range []string{
		"", "t-", "%2e%2e%2f", "%00", "../../etc", strings.ToUpper(string(id)), string(id)[2:], string(id) + "0", string(id) + "\n",
		"t-01jd00000000000000000000i0", "t-01jd00000000.00000000000000", "t-01jd00000000*0000000000000", "t-01jd0000000000000000000\x000",
		"t-8zzzzzzzzzzzzzzzzzzzzzzzzz", // above the greatest ULID
	} {
		if _, err := schemas.ParseTaskID(s); !errors.Is(err, schemas.ErrBadID) || s != "" && strings.Contains(err.Error(), s) && s != "t-" {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestParseWorkerID(t *testing.T) {
	for _, s := range []string{"a", "worker-1", strings.Repeat("w", 63)} {
		if got, err := schemas.ParseWorkerID(s); err != nil || string(got) != s {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"", "A", "a.b", "a b", "*", ">", "a\n", "ä", strings.Repeat("w", 64)} {
		if _, err := schemas.ParseWorkerID(s); !errors.Is(err, schemas.ErrBadID) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func FuzzParseTaskID(f *testing.F) {
	for _, seed := range []string{string(taskID), "t-", "%2e%2e%2f", "t-8zzzzzzzzzzzzzzzzzzzzzzzzz"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := schemas.ParseTaskID(s)
		if err != nil {
			return
		}
		if string(id) != s || strings.ContainsAny(s, ".*> /\\%\x00") || s != strings.ToLower(s) || len(s) != 28 {
			t.Fatalf("%q was taken", s)
		}
	})
}
