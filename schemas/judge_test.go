package schemas_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// judged is the record of a judge that runs.
func judged(t *testing.T, tests int, compile, short bool) schemas.Record {
	t.Helper()
	j := schemas.Judge{Run: schemas.JudgeStage{Command: []string{"./main"}}, Tests: make([]schemas.JudgeTest, tests), ShortCircuit: short}
	if compile {
		j.Compile = &schemas.JudgeStage{Command: []string{"cc"}}
	}
	s := schemas.DefaultSpec()
	s.Image, s.Judge = "gcc", &j
	s, err := schemas.CompleteSpec(s, schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	id, err := schemas.NewTaskID(t0, strings.NewReader(strings.Repeat("x", 32)))
	if err != nil {
		t.Fatal(err)
	}
	r := schemas.NewRecord(id, s, schemas.DefaultPolicy(), schemas.Meta{At: t0, By: "gateway", Op: "1"})
	r, err = schemas.Next(r, schemas.Choose{Meta: schemas.Meta{At: t0, By: "placer", On: 1}, Worker: "w", Epoch: "e1-x"})
	if err != nil {
		t.Fatal(err)
	}
	r, err = schemas.Next(r, schemas.Settle{Meta: schemas.Meta{At: t0, By: "reaper", On: 2}, Report: schemas.Report{Assignment: r.Assignment(), Phase: schemas.PhaseRunning, Ran: true}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func tell(r schemas.Record, on uint64, said schemas.JudgeResult) (schemas.Record, error) {
	return schemas.Next(r, schemas.Settle{Meta: schemas.Meta{At: t0.Add(time.Second), By: "reaper", On: on},
		Report: schemas.Report{Assignment: r.Assignment(), Phase: schemas.PhaseRunning, Ran: true, Judge: &said}})
}

func cases(list ...schemas.Verdict) (out []schemas.JudgeCase) {
	for _, v := range list {
		out = append(out, schemas.JudgeCase{Verdict: v})
	}
	return out
}

func TestAJudgeIsFolded(t *testing.T) {
	const ok, wrong = schemas.VerdictAccepted, schemas.VerdictWrongAnswer
	r := judged(t, 3, true, false)
	if _, err := tell(r, 3, schemas.JudgeResult{}); !errors.Is(err, schemas.ErrUnchanged) {
		t.Errorf("nothing new: %v", err)
	}
	r, err := tell(r, 3, schemas.JudgeResult{Compile: &schemas.JudgeCompile{Verdict: ok}, Cases: cases(ok)})
	if err != nil || len(r.Result.Cases) != 1 || r.Result.Verdict != "" {
		t.Fatalf("%+v %v", r.Result, err)
	}
	if history := len(r.History); history != 3 {
		t.Errorf("a test is no entry of the history: %d", history)
	}
	// What stands there stays, an older report changes nothing, and a worker's words are bounded.
	if _, err := tell(r, 4, schemas.JudgeResult{}); !errors.Is(err, schemas.ErrUnchanged) {
		t.Errorf("an older report: %v", err)
	}
	lie := schemas.JudgeResult{Verdict: ok, Compile: &schemas.JudgeCompile{Verdict: wrong}, Cases: cases(wrong, wrong, ok, ok, ok)}
	lie.Cases[1].CPUMillis, lie.Cases[1].ExitCode = -5, 1<<30
	r, err = tell(r, 4, lie)
	if err != nil || len(r.Result.Cases) != 3 || r.Result.Cases[0].Verdict != ok || r.Result.Cases[1].CPUMillis != 0 || r.Result.Cases[1].ExitCode != 0 || r.Result.Verdict != wrong {
		t.Fatalf("%+v %v", r.Result, err)
	}
	events := r.Result.Events(5, 3)
	if len(events) != 4 || events[0].Revision != 4 || events[1].Revision != 4 || events[2].Revision != 5 || events[3].Test != 3 || events[2].String() != "test 2 of 3: wrong answer in 0 ms" {
		t.Errorf("%+v", events)
	}
	// Another attempt judges anew.
	n, err := schemas.Next(r, schemas.Lose{Meta: schemas.Meta{At: t0, By: "reaper", On: 5}, Worker: "w", Epoch: "e1-x"})
	if err != nil || n.State != schemas.Queued || n.Result != nil {
		t.Errorf("%s %+v %v", n.State, n.Result, err)
	}
	if _, err := schemas.Next(r, schemas.AskRestart{Meta: schemas.Meta{At: t0, By: "client"}}); !errors.Is(err, schemas.ErrState) {
		t.Errorf("restart: %v", err)
	}
}

func TestAVerdictIsThatOfTheFirstFailure(t *testing.T) {
	const ok, wrong, late = schemas.VerdictAccepted, schemas.VerdictWrongAnswer, schemas.VerdictTimeLimit
	for name, c := range map[string]struct {
		short   bool
		compile schemas.Verdict
		cases   []schemas.JudgeCase
		want    schemas.Verdict
	}{
		"not compiled":         {false, "", cases(ok, ok), ""},
		"does not compile":     {false, schemas.VerdictCompileError, nil, schemas.VerdictCompileError},
		"not all":              {false, ok, cases(late), ""},
		"not all, and it ends": {true, ok, cases(late), late},
		"all":                  {false, ok, cases(ok, ok), ok},
		"two failures":         {false, ok, cases(late, wrong), late},
	} {
		j := schemas.Judge{Compile: &schemas.JudgeStage{}, Tests: make([]schemas.JudgeTest, 2), ShortCircuit: c.short}
		r := schemas.JudgeResult{Cases: c.cases}
		if c.compile != "" {
			r.Compile = &schemas.JudgeCompile{Verdict: c.compile}
		}
		if got := j.Over(r); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// The largest judge and the wordiest worker fit into a record.
func TestTheLargestJudgeFits(t *testing.T) {
	r := judged(t, schemas.MaxTests, true, false)
	for i := range schemas.MaxBlobs {
		id := blobOf(fmt.Sprint(i))
		r.Spec.Judge.Tests[i].ExpectedBlob = id
		r.Blobs = append(r.Blobs, schemas.BlobUse{Blob: id, Size: schemas.MaxBlobSize, Upload: strings.Repeat("U", 26)})
	}
	room := schemas.MaxSpecBytes - 1 - len(encode(t, r.Spec))
	r.Spec.Judge.Tests[99].Stdin = strings.Repeat("x", room-len(`"stdin":"",`))
	if errs := r.Spec.Validate(schemas.DefaultPolicy()); errs != nil {
		t.Fatal(errs)
	}
	said := schemas.JudgeResult{Compile: &schemas.JudgeCompile{Verdict: schemas.VerdictAccepted, Output: strings.Repeat("\x01", 1<<16), Message: strings.Repeat("\x01", 1<<16)}}
	for range schemas.MaxTests {
		said.Cases = append(said.Cases, schemas.JudgeCase{Verdict: schemas.VerdictRuntimeError, ExitCode: 255, Signal: 64,
			JudgeUse: schemas.JudgeUse{CPUMillis: 1 << 60, WallMillis: 1 << 60, Memory: 1 << 62}, Unknown: schemas.Unknown{"x": []byte(`"` + strings.Repeat("x", 1<<12) + `"`)}})
	}
	r, err := schemas.Next(r, schemas.Settle{Meta: schemas.Meta{At: t0.Add(time.Second + 123456789), By: "reaper", On: 1 << 50}, Report: schemas.Report{Assignment: r.Assignment(), Phase: schemas.PhaseEnded, Ran: true, Judge: &said,
		End: &schemas.End{By: schemas.EndedItself, Exit: &schemas.Exit{}, Stdout: strings.Repeat("x", 1<<16), Stderr: strings.Repeat("x", 1<<16)}}})
	if err != nil || r.State != schemas.Completed || len(r.Result.Cases) != schemas.MaxTests {
		t.Fatalf("%s %v", r.State, err)
	}
	if n := len(encode(t, r)); n > schemas.MaxRecordBytes {
		t.Errorf("%d bytes", n)
	}
}

// What a judge's spec may not say, and a test not say twice.
func TestWhatDoesNotGoWithJudge(t *testing.T) {
	id := `"sha256:` + strings.Repeat("a", 64) + `"`
	policy := schemas.DefaultPolicy()
	policy.AllowImageUser, policy.AllowWritableRoot, policy.AllowEntrypoint = true, true, true
	for more, want := range map[string]string{
		`"entrypoint": ["sh"]`:            "entrypoint",
		`"command": ["sh"]`:               "command",
		`"stdin": "x"`:                    "stdin",
		`"stdin_blob": ` + id:             "stdin_blob",
		`"stdin_open": true`:              "stdin_open",
		`"tty": true`:                     "tty",
		`"user": "image"`:                 "user",
		`"read_only": false`:              "read_only",
		`"network": "egress"`:             "network",
		`"restart": {"policy": "always"}`: "restart",
		`"ports": [{"name": "a", "port": 80, "protocol": "http"}]`:                                            "ports",
		`"health": {"exec": ["true"]}`:                                                                        "health",
		`"judge": {"run": {"command": ["a"]}, "tests": [{"stdin": "x", "stdin_blob": ` + id + `}]}`:           "judge.tests.0.stdin_blob",
		`"judge": {"run": {"command": ["a"]}, "tests": [{}, {"expected": "x", "expected_blob": ` + id + `}]}`: "judge.tests.1.expected_blob",
		`"judge": {"run": {"command": ["a"]}, "tests": [{"stdin_blob": "sha256:AB"}]}`:                        "judge.tests.0.stdin_blob",
	} {
		body := `{"image": "a", ` + more
		if !strings.Contains(more, `"judge"`) {
			body += `, "judge": {"run": {"command": ["a"]}, "tests": [{}]}`
		}
		_, err := schemas.ParseSpec([]byte(body+`}`), policy)
		var e *schemas.Error
		if !errors.As(err, &e) || e.Status != 422 || !strings.Contains(fmt.Sprintf("%+v", e.Errors), "{Field:"+want+" ") && e.Field != want {
			t.Errorf("%s: %+v, want %s", more, err, want)
		}
	}
}
