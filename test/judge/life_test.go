package judge

import (
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// What is expected, and the input of other tests, is nowhere in the container.
func TestASubmissionFindsNoAnswer(t *testing.T) {
	_, cl := start(t)
	const look = `read x
for f in /proc/[0-9]*; do tr '\0' '\n' <$f/environ; tr '\0' '\n' <$f/cmdline; cat $f/fd/[3-9] </dev/null; done 2>/dev/null | grep -q 'ANSW[E]R\|INP[U]T' && echo processes
grep -rsq 'ANSW[E]R\|INP[U]T' /task /tmp /etc /dev/shm /.dayfly/permit && echo files
ls /.dayfly/c
echo nothing`
	task := judge(t, cl, "judge-sh", submission{Source: look, Tests: []schemas.JudgeTest{{Stdin: "a", Expected: "ANSWER-1"}, {Stdin: "INPUT-2", Expected: "ANSWER-2"}, {Stdin: "b", Expected: "ANSWER-3"}}})
	if task.Stdout != "deadline\nnothing\n" {
		t.Errorf("it found %q, %q", task.Stdout, task.Stderr)
	}
	if got := verdicts(task); got != "wrong_answer wrong_answer wrong_answer" {
		t.Error(got)
	}
}

func TestTheFirstFailureEndsIt(t *testing.T) {
	_, cl := start(t)
	tests := []schemas.JudgeTest{{Stdin: "1", Expected: "1"}, {Stdin: "2", Expected: "7"}, {Stdin: "3", Expected: "3"}}
	task := judge(t, cl, "judge-sh", submission{Source: "cat", Tests: tests, ShortCircuit: true})
	if got := verdicts(task); got != "accepted wrong_answer" || task.Result.Verdict != schemas.VerdictWrongAnswer {
		t.Errorf("%s: %+v", got, task.Result)
	}
	task = judge(t, cl, "judge-sh", submission{Source: "cat", Tests: tests})
	if got := verdicts(task); got != "accepted wrong_answer accepted" || task.Result.Verdict != schemas.VerdictWrongAnswer {
		t.Errorf("%s: %+v", got, task.Result)
	}
	// Each test is an event, in order, and each once.
	var notes []string
	for e, err := range cl.Events(t.Context(), client.EventOptions{Task: task.ID}) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Judge != nil {
			notes = append(notes, fmt.Sprintf("%d/%d %s", e.Judge.Test, e.Judge.Tests, e.Judge.Verdict))
		}
	}
	if want := []string{"1/3 accepted", "2/3 wrong_answer", "3/3 accepted"}; !slices.Equal(notes, want) {
		t.Errorf("events %q", notes)
	}
	// Lists show the verdict alone.
	list, err := cl.List(t.Context(), client.ListOptions{Limit: 2})
	if err != nil || list.Items[0].Result == nil || list.Items[0].Result.Verdict != schemas.VerdictWrongAnswer || list.Items[0].Result.Cases != nil || list.Items[0].Spec.Judge != nil {
		t.Errorf("%+v %v", list.Items, err)
	}
}

// A killed agent goes on with the test that was under way: no test is lost, none is told twice,
// and it stays the same attempt.
func TestAKilledAgentGoesOn(t *testing.T) {
	up, cl := start(t)
	var tests []schemas.JudgeTest
	for i := range 12 {
		tests = append(tests, schemas.JudgeTest{Stdin: fmt.Sprint(i), Expected: fmt.Sprint(i)})
	}
	task := submit(t, cl, "judge-c", submission{Source: c + `int main(){int a; scanf("%d",&a); usleep(300000); FILE*f=fopen("/tmp/seen","r"); printf(f?"-1":"%d",a); f=fopen("/tmp/seen","w");}`, Tests: tests})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, at := range []int{2, 6} {
		if err := harness.Poll(ctx, func() error {
			now, err := cl.Get(ctx, task.ID, client.GetOptions{})
			if err == nil && (now.Result == nil || len(now.Result.Cases) < at) {
				err = fmt.Errorf("%+v", now.Result)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if err := up.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := up.Start(ctx); err != nil {
			t.Fatal(err)
		}
	}
	task, err := cl.Wait(ctx, task.ID)
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.TrimSpace(strings.Repeat("accepted ", 12)); verdicts(task) != want || task.Attempt != 1 {
		t.Errorf("attempt %d: %s", task.Attempt, verdicts(task))
	}
	if left, _ := filepath.Glob(filepath.Join(up.Dir, "data", "agent", "judges", "*")); len(left) > 0 {
		if err := harness.Poll(ctx, func() error {
			if left, _ := filepath.Glob(filepath.Join(up.Dir, "data", "agent", "judges", "*")); len(left) > 0 {
				return fmt.Errorf("%q are left", left)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
}

// Tests may be larger than a record: as blobs that were sent before, or by themselves. Nothing
// of them is ever in the container, nor what a submission leaves in the API.
func TestLargeTests(t *testing.T) {
	_, cl := start(t)
	large := strings.Repeat("0123456789abcde\n", 1<<19) // 8 MiB
	blob, _, err := cl.PutBlob(t.Context(), strings.NewReader(large), int64(len(large)))
	if err != nil {
		t.Fatal(err)
	}
	middle := strings.Repeat("x y ", 20<<10)
	limits := map[string]string{"output": "16MiB", "memory": "64MiB", "cpu": "10s", "wall": "60s"}
	task := judge(t, cl, "judge-sh", submission{Source: "echo mine >/task/output/mine; ls -R /task/input /.dayfly/c >&2; exec cat", Compare: "exact", Limits: limits, Tests: []schemas.JudgeTest{
		{StdinBlob: blob.Blob, ExpectedBlob: blob.Blob}, {Stdin: "x", ExpectedBlob: blob.Blob}, {Stdin: middle, Expected: middle}, {StdinBlob: blob.Blob, Expected: "x"}, {Expected: ""}}})
	if got := verdicts(task); got != "accepted wrong_answer accepted wrong_answer accepted" {
		t.Errorf("%s %s: %s", task.State, task.Message, got)
	}
	if want := "/.dayfly/c:\ndeadline\n\n/task/input:\nmain.sh\n"; task.Stderr != want {
		t.Errorf("in the container are %q", task.Stderr)
	}
	if task.Artifacts != nil || task.ArtifactSum != nil {
		t.Errorf("artifacts: %+v", task.ArtifactSum)
	}
	if j := task.Spec.Judge; j == nil || j.Tests[2].Stdin != "" && j.Tests[2].Expected != "" {
		t.Error("nothing became a blob")
	}
	task = judge(t, cl, "judge-sh", submission{Source: "head -c 5", Limits: limits, Tests: []schemas.JudgeTest{{StdinBlob: blob.Blob, Expected: "01234"}}})
	if got := verdicts(task); got != "accepted" {
		t.Errorf("it reads a part: %s", got)
	}
	_, err = cl.CreateRaw(t.Context(), []byte(`{"kind":"judge-sh","payload":{"source":"cat","tests":[{},{"expected_blob":"sha256:`+strings.Repeat("7", 64)+`"}]}}`), client.CreateOptions{})
	if e, ok := err.(*schemas.Error); !ok || e.Code != schemas.CodeBlobMissing || e.Field != "payload.tests.1.expected_blob" {
		t.Errorf("a blob that is not there: %v", err)
	}
}

// Cancel and TTL end a judge like any task, and exec finds nothing to run beside.
func TestAJudgeIsATask(t *testing.T) {
	_, cl := start(t)
	long := submission{Source: "sleep 100", Tests: sums, Limits: map[string]string{"wall": "60s"}}
	task := submit(t, cl, "judge-sh", long)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := cl.WaitRunning(ctx, task.ID); err != nil {
		t.Fatal(err)
	}
	if x, err := cl.Exec(ctx, task.ID, schemas.ExecRequest{Command: []string{"true"}}); err == nil {
		t.Errorf("exec: %+v", x)
	}
	if _, err := cl.Cancel(ctx, task.ID, nil); err != nil {
		t.Fatal(err)
	}
	if task, err := cl.Wait(ctx, task.ID); err != nil || task.State != schemas.Canceled || task.Result != nil && task.Result.Verdict != "" {
		t.Errorf("%s %+v %v", task.State, task.Result, err)
	}
}

// Time and memory are those that /usr/bin/time tells of the same program, run bare.
func TestUsageIsPlausible(t *testing.T) {
	for _, tool := range []string{"/usr/bin/time", "/usr/bin/gcc"} {
		if _, err := os.Stat(tool); err != nil {
			t.Skip(err)
		}
	}
	_, cl := start(t)
	const source = c + `int main(){ volatile char*p=malloc(40<<20); for(long i=0;i<40<<20;i+=512) p[i]=1; volatile unsigned long n=0; for(unsigned long i=0;i<300000000UL;i++) n+=i; printf("%d\n", p[512]); }`
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "main.c"), []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-O2", "-std=gnu11", "-o", filepath.Join(dir, "main"), filepath.Join(dir, "main.c")).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	// The least of five each: where others use the processors, one run may take thrice as long.
	bare, judged := math.Inf(1), math.Inf(1)
	for range 5 {
		out, err := exec.Command("/usr/bin/time", "-f", "%U %S %M", filepath.Join(dir, "main")).CombinedOutput()
		if err != nil {
			t.Fatalf("%v %s", err, out)
		}
		var one int
		var user, system, kib float64
		if _, err := fmt.Sscan(string(out), &one, &user, &system, &kib); err != nil {
			t.Fatal(err)
		}
		task := judge(t, cl, "judge-c", submission{Source: source, Tests: []schemas.JudgeTest{{Expected: "1"}}, Limits: map[string]string{"cpu": "10s"}})
		if verdicts(task) != "accepted" {
			t.Fatal(verdicts(task))
		}
		used := task.Result.Cases[0]
		bare, judged = min(bare, 1000*(user+system)), min(judged, float64(used.CPUMillis))
		if got := float64(used.Memory >> 10); got < 0.9*kib || got > 1.15*kib {
			t.Errorf("%.0f KiB, and %.0f bare", got, kib)
		}
	}
	t.Logf("bare %.0f ms, judged %.0f ms", bare, judged)
	if judged < 0.5*bare || judged > 2*bare+20 {
		t.Errorf("%.0f ms of processor time, and %.0f bare", judged, bare)
	}
}

// Sixteen at once on one worker.
func TestSixteenAtOnce(t *testing.T) {
	_, cl := start(t, "--slots", "16")
	var ids []schemas.TaskID
	for i := range 16 {
		answer := fmt.Sprint(i)
		ids = append(ids, submit(t, cl, "judge-python", submission{Source: "import time; time.sleep(0.2); print(input())",
			Tests: []schemas.JudgeTest{{Stdin: answer, Expected: answer}, {Stdin: "x", Expected: "y"}}, Limits: map[string]string{"wall": "60s"}}).ID)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, id := range ids {
		task, err := cl.Wait(ctx, id)
		if err != nil || verdicts(task) != "accepted wrong_answer" {
			t.Errorf("%s: %s %v", id, verdicts(task), err)
		}
	}
}

// A kind fixes what it says, the payload fits its schema, and no value is repeated.
func TestPython(t *testing.T) {
	_, cl := start(t, "--kinds-only")
	task := judge(t, cl, "python", map[string]any{"script_base64": "aW1wb3J0IHN5cwpwcmludChzeXMuYXJndlsxOl0pCnN5cy5leGl0KDMp", "args": []string{"a b", "c"}})
	if task.State != schemas.Failed || task.Exit == nil || task.Exit.Code != 3 || task.Stdout != "['a b', 'c']\n" || task.Spec.Kind != "python" || task.Spec.Payload != nil {
		t.Errorf("%+v", task)
	}
	for body, want := range map[string]string{
		`{"image":"busybox"}`:          "kind",
		`{"kind":"perl","payload":{}}`: "kind",
		`{"kind":"python"}`:            "payload",
		`{"kind":"python","payload":{"script":"SECRET","args":[{"x":"SECRET"}]}}`:        "payload.args.0",
		`{"kind":"python","payload":{"script":7}}`:                                       "payload.script",
		`{"kind":"python","payload":{"script":"x","extra":"SECRET"}}`:                    "payload.extra",
		`{"kind":"python","payload":{"script":"x"},"image":"SECRET"}`:                    "image",
		`{"kind":"python","payload":{"script":"x"},"resources":{"memory":"1GiB"}}`:       "resources",
		`{"kind":"judge-c","payload":{"source":"SECRET","tests":[]}}`:                    "payload.tests",
		`{"kind":"judge-c","payload":{"tests":[{}]}}`:                                    "payload.source",
		`{"kind":"judge-c","payload":{"source":"x","tests":[{"out":"SECRET"}]}}`:         "payload.tests.0.out",
		`{"kind":"judge-c","payload":{"source":"x","tests":[{}],"limits":{"cpu":"1h"}}}`: "payload.limits.cpu",
	} {
		_, err := cl.CreateRaw(t.Context(), []byte(body), client.CreateOptions{})
		e, ok := err.(*schemas.Error)
		if !ok || e.Status != 422 || e.Field != want || strings.Contains(fmt.Sprint(e, e.Errors), "SECRET") {
			t.Errorf("%s: %v", body, err)
		}
	}
	kinds, err := cl.Kinds(t.Context())
	if err != nil || len(kinds.Items) != 4 || !kinds.Only || kinds.Items[3].Name != "python" || !strings.Contains(string(kinds.Items[3].Payload), "script_base64") {
		t.Errorf("%+v %v", kinds, err)
	}
}
