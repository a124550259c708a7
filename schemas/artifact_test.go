package schemas_test

import (
	"strings"
	"testing"

	"dayfly.dev/schemas"
)

func TestArtifactName(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "a/b c/ü": true, `"q'<>&`: true, "..a": true, strings.Repeat("a", schemas.MaxArtifactName): true,
		"": false, "/a": false, "a/": false, "a//b": false, "..": false, "a/../b": false, "./a": false, "a\x00": false, "a\nb": false,
		"\u0085": false, "a\xff": false, "\ufffd": false, strings.Repeat("a", schemas.MaxArtifactName+1): false,
	} {
		if schemas.ArtifactName(name) != ok {
			t.Errorf("%q: %v", name, !ok)
		}
	}
}

func TestArtifactSubjects(t *testing.T) {
	const id = schemas.TaskID("t-01arz3ndektsv4rrffq69g5fav")
	w, task, attempt, ok := schemas.ParseArtifactSubject(schemas.ArtifactSubject("w1", id, 3, 17))
	if !ok || w != "w1" || task != id || attempt != 3 {
		t.Error(w, task, attempt, ok)
	}
	for _, s := range []string{"", "dayfly.artifacts.w1.t-1.1", "dayfly.artifacts.w1.t-1.1.1.1", "dayfly.logs.w1.t-1.1.1", "dayfly.logs.w1." + string(id) + ".1.1",
		"dayfly.artifacts.w1.*.1.1", "dayfly.artifacts.*." + string(id) + ".1.1", "dayfly.artifacts.w1." + string(id) + ".*.1", "dayfly.artifacts.w1." + string(id) + ".1.>",
		"dayfly.artifacts.w1." + string(id) + ".01.1", "dayfly.artifacts.w1." + string(id) + ".0.1", "dayfly.artifacts.w1." + string(id) + ".1.-1", "dayfly.artifacts.w1." + string(id) + ".1.+1",
		"dayfly.artifacts.w1.a\x7fb.1.1"} {
		if _, _, _, ok := schemas.ParseArtifactSubject(s); ok {
			t.Errorf("%q is one", s)
		}
	}
}

// A worker may say what it likes: the record takes what can be true, and says of the rest
// that the artifacts are not complete.
func TestWhatAWorkerSaysOfArtifacts(t *testing.T) {
	hash := strings.Repeat("0a", 32)
	good := func() *schemas.ArtifactSum {
		return &schemas.ArtifactSum{Count: 2, Bytes: 10, Stored: 10, ListBytes: 100, ListSHA256: hash}
	}
	one := schemas.Artifact{Name: "a", Size: 5, SHA256: hash}
	for name, c := range map[string]struct {
		change func(*schemas.ArtifactSum)
		list   []schemas.Artifact
		kept   int
		broken bool
	}{
		"good":                      {list: []schemas.Artifact{one, one}, kept: 2},
		"more files than it counts": {list: []schemas.Artifact{one, one, one}, kept: 2},
		"a name that leads out":     {list: []schemas.Artifact{one, {Name: "../a", Size: 5, SHA256: hash}}, kept: 1},
		"a hash that is none":       {list: []schemas.Artifact{{Name: "a", Size: 5, SHA256: "x"}}},
		"a file longer than all":    {list: []schemas.Artifact{{Name: "a", Size: 11, SHA256: hash}}},
		"too many":                  {change: func(s *schemas.ArtifactSum) { s.Count = schemas.MaxArtifacts + 1 }, broken: true},
		"too long": {change: func(s *schemas.ArtifactSum) {
			s.Bytes, s.Stored = schemas.MaxArtifactBytes+1, schemas.MaxArtifactBytes+1
		}, broken: true},
		"less than nothing":     {change: func(s *schemas.ArtifactSum) { s.Bytes = -1 }, broken: true},
		"files without a list":  {change: func(s *schemas.ArtifactSum) { s.ListBytes, s.ListSHA256 = 0, "" }, broken: true},
		"a list without a hash": {change: func(s *schemas.ArtifactSum) { s.ListSHA256 = "" }, broken: true},
		"a list without end":    {change: func(s *schemas.ArtifactSum) { s.ListBytes = schemas.MaxArtifactList + 1 }, broken: true},
	} {
		t.Run(name, func(t *testing.T) {
			sum := good()
			if c.change != nil {
				c.change(sum)
			}
			n := must(t, must(t, newRecord(schemas.OnLostRequeue), choose(t0)))
			n = must(t, n, ended(n, t0, true, schemas.End{By: schemas.EndedItself, Exit: &schemas.Exit{}, Artifacts: c.list, ArtifactSum: sum}))
			if len(n.Artifacts) != c.kept || c.broken != (n.ArtifactSum.Truncated && n.ArtifactSum.Count == 0 && n.ArtifactSum.Why == schemas.ArtifactsUnreadable) {
				t.Errorf("%+v %+v", n.Artifacts, n.ArtifactSum)
			}
		})
	}
}

func TestArtifactsOfALostWorkerAreMissing(t *testing.T) {
	r := must(t, newRecord(schemas.OnLostFail), choose(t0))
	r = must(t, r, schemas.Lose{Meta: meta(t0), Worker: r.Worker, Epoch: r.Epoch})
	if s := r.ArtifactSum; s == nil || !s.Truncated || s.Why != schemas.ArtifactsWorkerLost {
		t.Errorf("%+v", s)
	}
	again := must(t, newRecord(schemas.OnLostRequeue), choose(t0))
	again = must(t, again, schemas.Lose{Meta: meta(t0), Worker: again.Worker, Epoch: again.Epoch})
	if again.State != schemas.Queued || again.ArtifactSum != nil {
		t.Errorf("%s with %+v", again.State, again.ArtifactSum)
	}
}

func TestMounts(t *testing.T) {
	p := schemas.DefaultPolicy()
	p.AllowMounts = true
	for body, field := range map[string]string{
		`{"input":"/in"}`: "", `{"output":"/srv/out"}`: "", `{"input":"/a","output":"/b"}`: "", `{}`: "", `{"output":"/task/out"}`: "",
		`{"input":"in"}`: "mounts.input", `{"output":"/"}`: "mounts.output", `{"output":"/proc/x"}`: "mounts.output", `{"output":"/a:b"}`: "mounts.output",
		`{"input":"/.dayfly/c"}`: "mounts.input", `{"input":"/a","output":"/a"}`: "mounts.input", `{"output":"/task/input/x"}`: "mounts.output",
		`{"input":"/task"}`: "mounts.input", `{"output":"/tmp/x"}`: "mounts.output", `{"output":"/cache"}`: "mounts.output", `{"input":"/cache/x"}`: "mounts.input",
		`{"output":"/a/../b"}`: "mounts.output",
	} {
		_, err := schemas.ParseSpec([]byte(`{"image":"a","tmpfs":{"/cache":"1MiB"},"mounts":`+body+`}`), p)
		got := ""
		if e, ok := err.(*schemas.Error); ok {
			got = e.Field
		}
		if got != field {
			t.Errorf("%s: %v, want %q", body, err, field)
		}
	}
}
