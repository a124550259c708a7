package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

func remembered(id schemas.TaskID, closed bool, at time.Duration) entry {
	return entry{Assignment: schemas.Assignment{Task: id, Attempt: 1, Worker: "w1", Epoch: "e1"}, Closed: closed, At: schemas.Duration(at)}
}

func TestAJournalOutlivesAKillAndAFailedWrite(t *testing.T) {
	dir, now := t.TempDir(), 100*time.Hour
	j, err := openJournal(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.register(registration{Epoch: "e1", Boot: "b1"}, func(entry) bool { return true }); err != nil {
		t.Fatal(err)
	}
	for _, e := range []entry{remembered("t-open", false, now), remembered("t-closed", true, now), remembered("t-old", true, now-2*journalKeep)} {
		if err := j.put(e); err != nil {
			t.Fatal(err)
		}
	}
	j.file.Close() // the disk refuses
	if err := j.put(remembered("t-refused", false, now)); err == nil {
		t.Error("a write to a closed file went well")
	}
	if err := j.put(remembered("t-later", false, now)); err != nil {
		t.Errorf("after the disk took writes again: %v", err)
	}
	// A kill in the midst of a line.
	f, err := os.OpenFile(j.path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"entry":{"task":"t-cut"`); err != nil {
		t.Fatal(err)
	}
	f.Close()

	again, err := openJournal(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	defer again.close()
	if r := again.registered(); r.Epoch != "e1" || r.Boot != "b1" {
		t.Errorf("registration %+v", r)
	}
	for id, want := range map[schemas.TaskID]bool{"t-open": true, "t-closed": true, "t-later": true, "t-refused": true, "t-old": false, "t-cut": false} {
		if _, ok := again.get(id); ok != want {
			t.Errorf("%s is remembered: %t, want %t", id, ok, want)
		}
	}
	if n := len(again.open()); n != 3 {
		t.Errorf("%d open attempts, want 3", n)
	}
}

func TestAJournalOfAnotherVersion(t *testing.T) {
	for name, c := range map[string]struct {
		lines, refused string
	}{
		"first, with the time of the wall clock": {lines: `{"head":{"epoch":"e1","boot":"b1"}}
{"entry":{"task":"t-a","attempt":2,"worker":"w1","epoch":"e1","closed":true,"at":"2026-11-20T08:00:00.123Z"}}
{"entry":{"task":"t-b","attempt":1,"worker":"w1","epoch":"e1","at":"2026-11-20T08:00:00Z"}}
`},
		"first, with the time of the boot clock": {lines: `{"head":{"epoch":"e1","boot":"b1"}}
{"entry":{"task":"t-a","attempt":2,"worker":"w1","epoch":"e1","closed":true,"at":"100h0m0s"}}
{"entry":{"task":"t-b","attempt":1,"worker":"w1","epoch":"e1","at":"99h0m0s"}}
`},
		"to come": {lines: `{"head":{"v":2,"epoch":["e1"],"boot":"b1"}}
{"entry":{"task":"t-a","attempt":2,"worker":"w1","epoch":"e1"}}
`, refused: "of version 2"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, now := t.TempDir(), 100*time.Hour
			path := filepath.Join(dir, "journal")
			if err := os.WriteFile(path, []byte(c.lines), 0o600); err != nil {
				t.Fatal(err)
			}
			j, err := openJournal(dir, now)
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) || !strings.Contains(err.Error(), "remove the file") {
					t.Errorf("error %v", err)
				}
				if b, err := os.ReadFile(path); err != nil || string(b) != c.lines {
					t.Errorf("the journal was changed: %q %v", b, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer j.close()
			a, _ := j.get("t-a")
			b, _ := j.get("t-b")
			if a.Attempt != 2 || !a.Closed || b.Attempt != 1 || b.Closed || j.registered().Epoch != "e1" {
				t.Errorf("read %+v, %+v under %+v", a, b, j.registered())
			}
			again, err := os.ReadFile(path)
			if err != nil || !strings.HasPrefix(string(again), `{"head":{"v":1,`) {
				t.Errorf("written again: %q %v", again, err)
			}
		})
	}
}
