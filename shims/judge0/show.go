package judge0

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/shims/shim"
)

// usual are the fields that are shown where a request does not say.
var usual = []string{"stdout", "time", "memory", "stderr", "token", "compile_output", "message", "status"}

// more are those that it may ask for.
var more = []string{"status_id", "language_id", "language", "created_at", "finished_at", "wall_time", "exit_code", "exit_signal"}

// unkept are those that are null where it asks for them by name: nobody has them after the
// submission was taken.
var unkept = []string{"source_code", "stdin", "expected_output", "additional_files", "compiler_options", "command_line_arguments", "callback_url",
	"cpu_time_limit", "cpu_extra_time", "wall_time_limit", "memory_limit", "stack_limit", "max_processes_and_or_threads", "max_file_size",
	"enable_per_process_and_thread_time_limit", "enable_per_process_and_thread_memory_limit", "redirect_stderr_to_stdout", "enable_network",
	"number_of_runs", "started_at", "queued_at", "updated_at", "queue_host", "execution_host"}

// view is how a request wants submissions shown.
type view struct {
	encoded bool // texts in base64
	fields  []string
}

func viewOf(r *http.Request) (v view, err error) {
	v.encoded, v.fields = r.URL.Query().Get("base64_encoded") == "true", usual
	asked := r.URL.Query().Get("fields")
	if asked == "" {
		return v, nil
	}
	all := slices.Concat(usual, more)
	v.fields = strings.Split(asked, ",")
	if slices.Contains(v.fields, "*") {
		v.fields = all
		return v, nil
	}
	unknown := slices.DeleteFunc(slices.Clone(v.fields), func(f string) bool { return slices.Contains(all, f) || slices.Contains(unkept, f) })
	if len(unknown) > 0 {
		return v, shim.Refuse(http.StatusBadRequest, "invalid fields: this shim shows %s", strings.Join(all, ", "))
	}
	return v, nil
}

// show gives the fields of a submission.
func (h handler) show(ctx context.Context, t schemas.Task, v view) (map[string]any, error) {
	var stdout, stderr []byte
	if t.State.Final() && (slices.Contains(v.fields, "stdout") || slices.Contains(v.fields, "stderr")) {
		var err error
		if stdout, stderr, err = h.Output(ctx, t); err != nil {
			return nil, err
		}
	}
	return render(t, v, stdout, stderr), nil
}

// Announce gives what is PUT to the callback_url of a submission that is over.
func Announce(t schemas.Task) ([]byte, error) {
	return schemas.Encode(render(t, view{encoded: true, fields: usual}, []byte(t.Stdout), []byte(t.Stderr)))
}

func render(t schemas.Task, v view, stdout, stderr []byte) map[string]any {
	status, message := outcome(t)
	id, _ := strconv.Atoi(t.Spec.Labels[labelLanguage])
	texts := map[string][]byte{"message": []byte(message), "stdout": stdout, "stderr": stderr}
	all := map[string]any{
		"token": string(t.ID), "status": status, "status_id": status.ID, "language_id": id, "language": Language{ID: id, Name: nameOf(id)},
		"created_at": instant(t.Timings.Accepted),
	}
	if t.State.Final() {
		all["finished_at"] = instant(t.Timings.Ended)
	}
	if r := t.Result; r != nil {
		if r.Compile != nil {
			texts["compile_output"] = []byte(r.Compile.Output)
		}
		if len(r.Cases) > 0 {
			c := r.Cases[0]
			all["time"], all["wall_time"] = seconds(c.CPUMillis), seconds(c.WallMillis)
			all["memory"] = int64(c.Memory >> 10)
			if t.State.Final() {
				all["exit_code"] = c.ExitCode
			}
			if c.Signal != 0 {
				all["exit_signal"] = c.Signal
			}
		}
	}
	shown := map[string]any{}
	for _, f := range v.fields {
		shown[f] = all[f]
		switch b := texts[f]; {
		case len(b) == 0:
		case v.encoded:
			shown[f] = base64Lines(b)
		default:
			shown[f] = shim.Text(b)
		}
	}
	return shown
}

// instant is a time as Judge0 writes it: its clients want a fraction.
func instant(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

// seconds is a time as Judge0 writes it.
func seconds(ms int64) string { return fmt.Sprintf("%d.%03d", ms/1000, ms%1000) }

// base64Lines is base64 in lines of 60, each with its end, as Judge0 writes it.
func base64Lines(b []byte) string {
	var out strings.Builder
	for line := range slices.Chunk([]byte(base64.StdEncoding.EncodeToString(b)), 60) {
		out.Write(line)
		out.WriteByte('\n')
	}
	return out.String()
}

// outcome gives the status, and a message where there is something to say.
func outcome(t schemas.Task) (Status, string) {
	of := func(id int) Status { return statuses[id-1] }
	switch {
	case t.State == schemas.Queued:
		return of(1), ""
	case !t.State.Final():
		return of(2), ""
	case t.Result == nil || t.Result.Verdict == "":
		return of(13), strings.TrimSpace(string(t.State) + " " + t.Message)
	}
	var c schemas.JudgeCase
	if len(t.Result.Cases) > 0 {
		c = t.Result.Cases[0]
	}
	switch t.Result.Verdict {
	case schemas.VerdictAccepted:
		return of(3), ""
	case schemas.VerdictWrongAnswer:
		if t.Spec.Labels[labelExpected] == "" { // nothing was expected
			return of(3), ""
		}
		return of(4), ""
	case schemas.VerdictTimeLimit:
		return of(5), "Time limit exceeded"
	case schemas.VerdictCompileError:
		return of(6), ""
	case schemas.VerdictOutputLimit:
		return of(8), "Output limit exceeded"
	case schemas.VerdictMemoryLimit:
		return of(12), "Memory limit exceeded"
	}
	switch signal := syscall.Signal(c.Signal); {
	case signal == syscall.SIGSEGV:
		return of(7), "Caught fatal signal 11"
	case signal == syscall.SIGXFSZ:
		return of(8), "Caught fatal signal 25"
	case signal == syscall.SIGFPE:
		return of(9), "Caught fatal signal 8"
	case signal == syscall.SIGABRT:
		return of(10), "Caught fatal signal 6"
	case signal != 0:
		return of(12), fmt.Sprintf("Caught fatal signal %d", c.Signal)
	}
	return of(11), fmt.Sprintf("Exited with error status %d", c.ExitCode)
}
