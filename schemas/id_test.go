package schemas_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

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

// An epoch sorts after the one before it, also when the clock was set back.
func TestEpochsSort(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var former schemas.Epoch
		for range 5 {
			now := t0.Add(time.Duration(rapid.Int64Range(-1e17, 1e17).Draw(t, "clock")))
			e := schemas.NewEpoch(former, now, rapid.StringMatching(`[A-Z0-9]{1,20}`).Draw(t, "random"))
			if !former.Before(e) || e.Before(former) || e.Before(e) || len(e) > 64 || strings.ContainsAny(string(e), " .*>") {
				t.Fatalf("%q does not follow %q", e, former)
			}
			former = e
		}
	})
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
