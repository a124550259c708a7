// Package judge0 answers Judge0's API for submissions:
//
//	POST /submissions[?wait=true]   GET /submissions/TOKEN
//	POST /submissions/batch         GET /submissions/batch?tokens=…
//	GET  /languages[/ID]            GET /statuses
//	GET  /about, /version           GET /config_info
//
// A submission is a task of one of the site's kinds that judge, with one test. Its token is
// the task's id.
package judge0

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/shims/shim"
)

// Labels of the tasks.
const (
	labelLanguage = "judge0.language_id"
	labelExpected = "judge0.expected_output" // "given", if the output is compared
)

const (
	maxBatch = 20
	waitMost = 10 * time.Minute
	// undoWithin bounds what is done for a request that went wrong.
	undoWithin = 10 * time.Second
)

// Status is what has come of a submission.
type Status struct {
	ID          int    `json:"id"`
	Description string `json:"description"`
}

// statuses are Judge0's, from 1 on.
var statuses = []Status{
	{1, "In Queue"}, {2, "Processing"}, {3, "Accepted"}, {4, "Wrong Answer"}, {5, "Time Limit Exceeded"}, {6, "Compilation Error"},
	{7, "Runtime Error (SIGSEGV)"}, {8, "Runtime Error (SIGXFSZ)"}, {9, "Runtime Error (SIGFPE)"}, {10, "Runtime Error (SIGABRT)"},
	{11, "Runtime Error (NZEC)"}, {12, "Runtime Error (Other)"}, {13, "Internal Error"}, {14, "Exec Format Error"},
}

// Submission is the body of POST /submissions.
type Submission struct {
	SourceCode     *string     `json:"source_code"`
	LanguageID     shim.Number `json:"language_id"`
	Stdin          *string     `json:"stdin"`
	ExpectedOutput *string     `json:"expected_output"`
	CPUTimeLimit   shim.Number `json:"cpu_time_limit"`  // s
	WallTimeLimit  shim.Number `json:"wall_time_limit"` // s
	MemoryLimit    shim.Number `json:"memory_limit"`    // KB

	AdditionalFiles string `json:"additional_files"` // a zip archive, in base64 whatever the request says
	CallbackURL     string `json:"callback_url"`

	// What no submission has here: refused where it asks for something.
	CompilerOptions string      `json:"compiler_options"`
	Arguments       string      `json:"command_line_arguments"`
	Network         bool        `json:"enable_network"`
	Redirect        bool        `json:"redirect_stderr_to_stdout"`
	PerProcessTime  bool        `json:"enable_per_process_and_thread_time_limit"`
	PerProcessSpace bool        `json:"enable_per_process_and_thread_memory_limit"`
	NumberOfRuns    shim.Number `json:"number_of_runs"`
}

// Batch is the body of POST /submissions/batch.
type Batch struct {
	Submissions []Submission `json:"submissions"`
}

// faults are what is wrong with a submission, by field.
type faults map[string][]string

func (f faults) Error() string { return "the submission is not valid" }

type handler struct{ *shim.Shim }

// New makes the handler.
func New(c *client.Client, cfg shim.Config) http.Handler {
	h := handler{shim.New(c, cfg, shim.Protocol{
		Name:  "judge0",
		Shown: func(r *http.Request) string { return r.Header.Get("X-Auth-Token") },
		Fail: func(w http.ResponseWriter, p shim.Problem) {
			if p.Field != "" && p.Status == http.StatusUnprocessableEntity {
				_ = shim.Answer(w, p.Status, faults{p.Field: {strings.TrimPrefix(p.Message, p.Field+": ")}})
				return
			}
			_ = shim.Answer(w, p.Status, map[string]string{"error": p.Message})
		},
		Fields: map[string]string{
			"kind": "language_id", "payload.source": "source_code", "payload.tests": "stdin", "payload.limits.cpu": "cpu_time_limit",
			"payload.limits.wall": "wall_time_limit", "payload.limits.memory": "memory_limit", "payload.files": "additional_files", "files": "additional_files",
			"callback.url": "callback_url", "callback": "callback_url",
		},
	})}
	h.Handle("POST /submissions", h.create)
	h.Handle("POST /submissions/batch", h.createBatch)
	h.Handle("GET /submissions/batch", h.getBatch)
	h.Handle("GET /submissions/{token}", h.get)
	h.Handle("DELETE /submissions/{token}", func(http.ResponseWriter, *http.Request) error {
		return shim.Refuse(http.StatusBadRequest, "delete not allowed")
	})
	h.Handle("GET /submissions", func(http.ResponseWriter, *http.Request) error { // of everybody: never with the token that all have
		return shim.Refuse(http.StatusForbidden, "listing submissions is not allowed")
	})
	h.Handle("GET /languages", h.languages)
	h.Handle("GET /languages/all", h.languages)
	h.Handle("GET /languages/{id}", h.language)
	h.Handle("GET /about", func(w http.ResponseWriter, _ *http.Request) error {
		return shim.Answer(w, http.StatusOK, map[string]string{"version": Version, "homepage": "", "source_code": "", "maintainer": ""})
	})
	h.Handle("GET /version", func(w http.ResponseWriter, _ *http.Request) error {
		_, _ = w.Write([]byte(Version))
		return nil
	})
	h.Handle("GET /config_info", func(w http.ResponseWriter, _ *http.Request) error {
		return shim.Answer(w, http.StatusOK, config)
	})
	h.Handle("GET /statuses", func(w http.ResponseWriter, _ *http.Request) error {
		return shim.Answer(w, http.StatusOK, statuses)
	})
	h.Handle("POST /authenticate", func(w http.ResponseWriter, _ *http.Request) error {
		w.WriteHeader(http.StatusOK) // whoever comes so far has shown the token
		return nil
	})
	return h
}

// task is what is asked of dayfly.
type task struct {
	Kind     string            `json:"kind"`
	Payload  payload           `json:"payload"`
	Labels   map[string]string `json:"labels"`
	Callback *schemas.Callback `json:"callback,omitzero"`
}

// payload is that of a kind that judges.
type payload struct {
	Source  string              `json:"source"`
	Files   []schemas.File      `json:"files,omitzero"`
	Tests   []schemas.JudgeTest `json:"tests"`
	Limits  limits              `json:"limits"`
	Compare schemas.Compare     `json:"compare"`
}

type limits struct {
	CPU    schemas.Duration `json:"cpu,omitzero"`
	Wall   schemas.Duration `json:"wall,omitzero"`
	Memory schemas.Size     `json:"memory,omitzero"`
}

// translate makes a task of a submission; encoded says that its texts are in base64.
func (s Submission) translate(encoded bool) (task, error) {
	wrong := faults{}
	text := func(field string, p *string) string {
		if p == nil {
			return ""
		}
		v := *p
		if encoded {
			b, err := fromBase64(v)
			if err != nil {
				wrong[field] = append(wrong[field], "must be in base64")
			}
			v = string(b)
		}
		return v
	}
	t := task{Labels: map[string]string{shim.Label: "judge0", labelLanguage: strconv.Itoa(int(s.LanguageID))}}
	switch id := int32(s.LanguageID); {
	case s.LanguageID == 0:
		wrong["language_id"] = []string{"can't be blank"}
	case id <= 0 || float64(id) != float64(s.LanguageID):
		wrong["language_id"] = []string{"must be a number of GET /languages"}
	default:
		t.Kind = kindOf(int(id))
	}
	t.Payload = payload{
		Source: text("source_code", s.SourceCode), Compare: schemas.CompareLines, // Judge0's own way
		Tests: []schemas.JudgeTest{{Stdin: text("stdin", s.Stdin), Expected: text("expected_output", s.ExpectedOutput)}},
	}
	switch {
	case wrong["source_code"] != nil:
	case t.Payload.Source == "":
		wrong["source_code"] = []string{"can't be blank"}
	case !utf8.ValidString(t.Payload.Source):
		wrong["source_code"] = []string{"must be text in UTF-8"}
	}
	if s.ExpectedOutput != nil {
		t.Labels[labelExpected] = "given"
	}
	seconds := func(field string, n shim.Number) schemas.Duration {
		if n < 0 || n > 1e6 {
			wrong[field] = []string{"must be greater than or equal to 0"}
			return 0
		}
		return schemas.Duration(float64(n) * float64(time.Second))
	}
	t.Payload.Limits.CPU, t.Payload.Limits.Wall = seconds("cpu_time_limit", s.CPUTimeLimit), seconds("wall_time_limit", s.WallTimeLimit)
	if s.MemoryLimit != 0 && (s.MemoryLimit < 2048 || s.MemoryLimit > 1e9) {
		wrong["memory_limit"] = []string{"must be greater than or equal to 2048"}
	} else {
		t.Payload.Limits.Memory = schemas.Size(s.MemoryLimit * 1024)
	}
	for _, no := range []struct {
		given bool
		field string
		why   string
	}{
		{s.CompilerOptions != "", "compiler_options", "setting compiler options is not allowed"},
		{s.Arguments != "", "command_line_arguments", "setting command line arguments is not allowed"},
		{s.Network, "enable_network", "enabling network is not allowed"},
		{s.Redirect, "redirect_stderr_to_stdout", "this option cannot be enabled"},
		{s.PerProcessTime, "enable_per_process_and_thread_time_limit", "this option cannot be enabled"},
		{s.PerProcessSpace, "enable_per_process_and_thread_memory_limit", "this option cannot be enabled"},
		{s.NumberOfRuns != 0 && s.NumberOfRuns != 1, "number_of_runs", "must be less than or equal to 1"},
	} {
		if no.given {
			wrong[no.field] = []string{no.why}
		}
	}
	if s.CallbackURL != "" {
		t.Callback = &schemas.Callback{URL: s.CallbackURL}
	}
	files, err := unzip(s.AdditionalFiles)
	if err != nil {
		wrong["additional_files"] = []string{err.Error()}
	}
	if t.Payload.Files = files; len(wrong) > 0 {
		return t, wrong
	}
	return t, nil
}

func noLanguage(id string) string { return "language with id " + id + " doesn't exist" }

// submit asks for a submission's task. What is wrong with it comes back as faults.
func (h handler) submit(ctx context.Context, s Submission, encoded bool) (schemas.Task, error) {
	asked, err := s.translate(encoded)
	if err != nil {
		return schemas.Task{}, err
	}
	if err := h.spill(ctx, &asked.Payload); err != nil {
		return schemas.Task{}, err
	}
	body, err := schemas.Encode(asked)
	if err != nil {
		return schemas.Task{}, shim.Refuse(http.StatusUnprocessableEntity, "the submission must be text in UTF-8")
	}
	t, err := h.Client.CreateRaw(ctx, body, client.CreateOptions{})
	var e *schemas.Error
	if errors.As(err, &e) && e.Status == http.StatusUnprocessableEntity && e.Field != "" {
		p := h.Explain(err)
		if e.Field == "kind" { // the site lacks it
			p.Message = noLanguage(strconv.Itoa(int(s.LanguageID)))
		}
		return t, faults{p.Field: {strings.TrimPrefix(p.Message, p.Field+": ")}}
	}
	return t, err
}

func (h handler) create(w http.ResponseWriter, r *http.Request) error {
	v, err := viewOf(r)
	if err != nil {
		return err
	}
	var s Submission
	if err := shim.Read(w, r, &s, shim.Lenient); err != nil {
		return err
	}
	t, err := h.submit(r.Context(), s, v.encoded)
	var wrong faults
	switch {
	case errors.As(err, &wrong):
		return shim.Answer(w, http.StatusUnprocessableEntity, wrong)
	case err != nil:
		return err
	case r.URL.Query().Get("wait") != "true":
		return shim.Answer(w, http.StatusCreated, map[string]string{"token": string(t.ID)})
	}
	ctx, cancel := context.WithTimeout(r.Context(), waitMost)
	defer cancel()
	if t, err = h.Client.Wait(ctx, t.ID); err != nil {
		return err
	}
	said, err := h.show(ctx, t, v)
	if err != nil {
		return err
	}
	return shim.Answer(w, http.StatusCreated, said)
}

func (h handler) createBatch(w http.ResponseWriter, r *http.Request) error {
	v, err := viewOf(r)
	if err != nil {
		return err
	}
	var b Batch
	if err := shim.Read(w, r, &b, shim.Lenient); err != nil {
		return err
	}
	switch {
	case len(b.Submissions) == 0:
		return shim.Refuse(http.StatusBadRequest, "there should be at least one submission in a batch")
	case len(b.Submissions) > maxBatch:
		return shim.Refuse(http.StatusBadRequest, "number of submissions in a batch should be less than or equal to %d", maxBatch)
	}
	list := make([]any, len(b.Submissions))
	status := http.StatusUnprocessableEntity
	var made []schemas.TaskID
	for i, s := range b.Submissions {
		t, err := h.submit(r.Context(), s, v.encoded)
		var wrong faults
		switch {
		case errors.As(err, &wrong):
			list[i] = wrong
		case err != nil:
			h.undo(r.Context(), made)
			return err
		default:
			made = append(made, t.ID)
			list[i], status = map[string]string{"token": string(t.ID)}, http.StatusCreated
		}
	}
	return shim.Answer(w, status, list)
}

// undo ends the submissions of a batch whose caller learns of none.
func (h handler) undo(ctx context.Context, made []schemas.TaskID) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoWithin)
	defer cancel()
	now := time.Duration(0)
	for _, id := range made {
		_, _ = h.Client.Cancel(ctx, id, &now)
	}
}

// find gives a submission; false if there is none of this token.
func (h handler) find(ctx context.Context, token string) (schemas.Task, bool, error) {
	id, err := schemas.ParseTaskID(token)
	if err != nil {
		return schemas.Task{}, false, nil
	}
	t, err := h.Client.Get(ctx, id, client.GetOptions{})
	if errors.Is(err, schemas.CodeNotFound) {
		return t, false, nil
	}
	return t, err == nil && h.Mine(t), err
}

func (h handler) get(w http.ResponseWriter, r *http.Request) error {
	v, err := viewOf(r)
	if err != nil {
		return err
	}
	t, found, err := h.find(r.Context(), r.PathValue("token"))
	if err == nil && !found {
		err = shim.Refuse(http.StatusNotFound, "there is no submission with this token")
	}
	if err != nil {
		return err
	}
	said, err := h.show(r.Context(), t, v)
	if err != nil {
		return err
	}
	return shim.Answer(w, http.StatusOK, said)
}

func (h handler) getBatch(w http.ResponseWriter, r *http.Request) error {
	v, err := viewOf(r)
	if err != nil {
		return err
	}
	tokens := strings.Split(r.URL.Query().Get("tokens"), ",")
	switch {
	case r.URL.Query().Get("tokens") == "":
		return shim.Refuse(http.StatusBadRequest, "there should be at least one submission in a batch")
	case len(tokens) > maxBatch:
		return shim.Refuse(http.StatusBadRequest, "number of submissions in a batch should be less than or equal to %d", maxBatch)
	}
	list := make([]any, len(tokens))
	for i, token := range tokens {
		t, found, err := h.find(r.Context(), token)
		if err != nil {
			return err
		}
		if !found {
			continue // null
		}
		if list[i], err = h.show(r.Context(), t, v); err != nil {
			return err
		}
	}
	return shim.Answer(w, http.StatusOK, map[string]any{"submissions": list})
}
