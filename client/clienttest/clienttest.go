// Package clienttest is a small dayfly without NATS and Docker, for tests of
// programs that use package client. It speaks the HTTP API over records in memory
// that schemas.Next drives, and acts out each task's command word by word:
//
//	out:TEXT  err:TEXT   writes TEXT and a newline
//	exit:N               ends with code N (0 if there is none)
//	oom                  is killed for want of memory
//	hold                 goes on until it is canceled, expires or is released
//	term:N               as hold, and ends by itself with code N when it is canceled
//	echo …               writes the words after it
//
// A batch's items all become tasks at once.
//
// An image called "missing" does not exist. A task with constraints stays queued.
package clienttest

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"dayfly.dev/schemas"
)

// Server is the API. Its methods may be called while it serves.
type Server struct {
	URL string

	mu        sync.Mutex
	changed   chan struct{} // closed and replaced at each change
	closed    bool
	tasks     map[schemas.TaskID]*task
	keys      map[string]schemas.TaskID
	batches   map[schemas.BatchID]*batch
	intercept func(http.ResponseWriter, *http.Request) bool
	cuts      []int
	requests  []string
	revision  uint64 // of the newest change of any task
}

type task struct {
	server   *Server
	record   schemas.Record
	revision uint64
	logs     []schemas.LogLine
	size     map[schemas.Stream]int64
	released bool
}

// Start serves until the test ends.
func Start(t testing.TB) *Server {
	s := &Server{changed: make(chan struct{}), tasks: map[schemas.TaskID]*task{}, keys: map[string]schemas.TaskID{}, batches: map[schemas.BatchID]*batch{}}
	h := httptest.NewUnstartedServer(s.handler())
	h.Config.ErrorLog = nil
	h.Start()
	s.URL = h.URL
	t.Cleanup(func() {
		s.change(func() { s.closed = true })
		h.CloseClientConnections()
		h.Close()
	})
	return s
}

// Intercept lets f see each request first; it says whether it has answered.
func (s *Server) Intercept(f func(http.ResponseWriter, *http.Request) bool) {
	s.change(func() { s.intercept = f })
}

// CutLogs breaks the first connection of a log or of events in the middle of a line after lines[0]
// whole ones, the second after lines[1], and so on. A negative number ends the
// connection in good order.
func (s *Server) CutLogs(lines ...int) { s.change(func() { s.cuts = lines }) }

// Requests lists what was asked so far, as "GET /v1/tasks?limit=1".
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Release lets a task that holds go on.
func (s *Server) Release(id schemas.TaskID) { s.change(func() { s.tasks[id].released = true }) }

// Expire ends the task as its deadline would.
func (s *Server) Expire(id schemas.TaskID) {
	s.finish(id, schemas.End{By: schemas.EndedDeadline, Exit: &schemas.Exit{Code: 137, Signal: 9, TimedOut: true}})
}

// Log writes b to the task's log.
func (s *Server) Log(id schemas.TaskID, stream schemas.Stream, b []byte) {
	s.change(func() { s.tasks[id].log(stream, b) })
}

// Tasks gives all tasks, newest first.
func (s *Server) Tasks() []schemas.Task {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.newestFirst()
}

// newestFirst is Tasks with mu held.
func (s *Server) newestFirst() []schemas.Task {
	var l []schemas.Task
	for _, t := range s.tasks {
		l = append(l, t.view())
	}
	slices.SortFunc(l, func(a, b schemas.Task) int { return strings.Compare(string(b.ID), string(a.ID)) })
	return l
}

// Await waits until f likes the tasks, newest first; it says whether that came
// before stop.
func (s *Server) Await(stop <-chan struct{}, f func([]schemas.Task) bool) bool {
	return s.await(stop, func() bool { return f(s.newestFirst()) })
}

// Seed puts a task there as it is, under an id of the test's choice.
func (s *Server) Seed(r schemas.Record) {
	s.change(func() { s.add(r) })
}

// add puts a task there; mu is held.
func (s *Server) add(r schemas.Record) {
	t := &task{server: s, size: map[schemas.Stream]int64{}}
	t.put(r)
	s.tasks[r.ID] = t
}

func (s *Server) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

// await calls f under the lock at each change until it says so, and says whether it did.
func (s *Server) await(stop <-chan struct{}, f func() bool) bool {
	for {
		s.mu.Lock()
		done, closed, changed := f(), s.closed, s.changed
		s.mu.Unlock()
		if done || closed {
			return done
		}
		select {
		case <-changed:
		case <-stop:
			return false
		}
	}
}

func (t *task) view() schemas.Task {
	v := t.record.View(t.revision, time.Now())
	if t.record.State == schemas.Queued && len(t.record.Spec.Constraints) > 0 {
		v.Why = &schemas.Why{Task: v.ID, Position: 1, Summary: "no worker has the labels that it asks for"}
	}
	return v
}

func (t *task) next(e schemas.Event) error {
	r, err := schemas.Next(t.record, e)
	if err != nil {
		return err
	}
	t.put(r)
	return nil
}

// put makes r the newest revision; the server's mu is held.
func (t *task) put(r schemas.Record) {
	t.server.revision++
	t.revision = t.server.revision
	t.record = r
	t.record.History = r.Changes(t.revision)
}

func (t *task) log(stream schemas.Stream, b []byte) {
	l := schemas.LogLine{Attempt: 1, Stream: stream, Offset: t.size[stream], At: time.Now().UTC()}
	if utf8.Valid(b) {
		l.Data = string(b)
	} else {
		l.Base64 = base64.StdEncoding.EncodeToString(b)
	}
	t.logs = append(t.logs, l)
	t.size[stream] += int64(len(b))
}

const worker, epoch = "worker-1", "e1"

func meta(by string) schemas.Meta { return schemas.Meta{At: time.Now().UTC(), By: by, Op: rand.Text()} }

func (s *Server) report(id schemas.TaskID, phase schemas.Phase, end *schemas.End) {
	s.change(func() {
		t := s.tasks[id]
		r := schemas.Report{Assignment: t.record.Assignment(), Phase: phase, Restarts: t.record.Restarts, Ran: phase != schemas.PhaseAccepted, End: end}
		if end != nil {
			for _, l := range t.logs {
				if l.Stream == schemas.Stdout {
					end.Stdout += l.Data
				} else {
					end.Stderr += l.Data
				}
			}
			end.Logs = schemas.LogSum{StdoutBytes: t.size[schemas.Stdout], StderrBytes: t.size[schemas.Stderr]}
		}
		_ = t.next(schemas.Settle{Meta: meta("reaper"), Report: r}) // stale: it has ended otherwise
	})
}

func (s *Server) finish(id schemas.TaskID, end schemas.End) { s.report(id, schemas.PhaseEnded, &end) }

func exit(code int, reason schemas.Reason) schemas.End {
	return schemas.End{By: schemas.EndedItself, Reason: reason, Exit: &schemas.Exit{Code: code}}
}

// act is the worker.
func (s *Server) act(id schemas.TaskID) {
	var spec schemas.Spec
	s.change(func() {
		t := s.tasks[id]
		spec = t.record.Spec
		if len(spec.Constraints) == 0 {
			_ = t.next(schemas.Choose{Meta: meta("placer"), Worker: worker, Epoch: epoch})
		}
	})
	if len(spec.Constraints) > 0 {
		return
	}
	s.report(id, schemas.PhaseAccepted, nil)
	if strings.HasPrefix(spec.Image, "missing") {
		s.finish(id, schemas.End{By: schemas.EndedItself, Reason: schemas.ReasonImage, Message: "the image does not exist in its registry"})
		return
	}
	s.report(id, schemas.PhaseRunning, nil)
	end := exit(0, schemas.ReasonExit)
	words := append(slices.Clone(spec.Entrypoint), spec.Command...)
	for i, word := range words {
		verb, text, _ := strings.Cut(word, ":")
		n, _ := strconv.Atoi(text)
		switch verb {
		case "echo":
			s.Log(id, schemas.Stdout, []byte(strings.Join(words[i+1:], " ")+"\n"))
			s.finish(id, end)
			return
		case "cat":
			s.Log(id, schemas.Stdout, []byte(spec.Stdin))
		case "out":
			s.Log(id, schemas.Stdout, []byte(text+"\n"))
		case "err":
			s.Log(id, schemas.Stderr, []byte(text+"\n"))
		case "exit":
			end = exit(n, schemas.ReasonExit)
		case "oom":
			end = exit(137, schemas.ReasonOOM)
			end.Exit.Signal, end.Exit.OOMKilled = 9, true
		case "hold", "term":
			canceled := false
			if !s.await(nil, func() bool {
				canceled = s.tasks[id].record.Cancel != nil
				return canceled || s.tasks[id].released || s.tasks[id].record.State.Final()
			}) {
				return
			}
			if canceled && verb == "hold" {
				end = schemas.End{By: schemas.EndedStop, Exit: &schemas.Exit{Code: 143, Signal: 15}}
			} else if canceled {
				end = exit(n, schemas.ReasonExit)
			}
		}
	}
	s.finish(id, end)
}

func (s *Server) handler() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("POST /v1/tasks", s.create)
	m.HandleFunc("GET /v1/tasks", s.list)
	m.HandleFunc("GET /v1/tasks/{id}", s.get)
	m.HandleFunc("DELETE /v1/tasks/{id}", s.cancel)
	m.HandleFunc("POST /v1/tasks/{id}/extend", s.extend)
	m.HandleFunc("POST /v1/tasks/{id}/restart", s.restart)
	m.HandleFunc("GET /v1/tasks/{id}/logs", s.log)
	m.HandleFunc("GET /v1/events", s.events)
	m.HandleFunc("GET /v1/tasks/{id}/events", s.events)
	m.HandleFunc("POST /v1/batches", s.createBatch)
	m.HandleFunc("GET /v1/batches", s.listBatches)
	m.HandleFunc("GET /v1/batches/{id}", s.getBatch)
	m.HandleFunc("GET /v1/batches/{id}/items", s.batchItems)
	m.HandleFunc("DELETE /v1/batches/{id}", s.cancelBatch)
	m.HandleFunc("GET /v1/workers", s.workers)
	m.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		Fail(w, schemas.Error{Status: 404, Code: schemas.CodeNotFound, Detail: "no such path"})
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.requests = append(s.requests, r.Method+" "+r.URL.RequestURI())
		f := s.intercept
		s.mu.Unlock()
		if f == nil || !f(w, r) {
			m.ServeHTTP(w, r)
		}
	})
}

// Fail answers with a problem.
func Fail(w http.ResponseWriter, e schemas.Error) {
	w.Header().Set("Content-Type", "application/problem+json")
	if e.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(e.RetryAfter.Std().Seconds())))
	}
	write(w, e.Status, e)
}

func write(w http.ResponseWriter, status int, v any) {
	b, err := schemas.Encode(v)
	if err != nil {
		panic(err)
	}
	if w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", "application/json")
	}
	w.WriteHeader(status)
	_, _ = w.Write(b)
}

func fail(w http.ResponseWriter, err error) {
	e, ok := err.(*schemas.Error)
	if !ok {
		e = &schemas.Error{Status: 500, Code: schemas.CodeInternal}
	}
	Fail(w, *e)
}

func (s *Server) create(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, schemas.MaxBodyBytes))
	if err != nil {
		return
	}
	spec, err := schemas.ParseSpec(body, schemas.DefaultPolicy())
	if err != nil {
		fail(w, err)
		return
	}
	key := r.Header.Get("Idempotency-Key")
	var id schemas.TaskID
	known := false
	s.change(func() {
		if id, known = s.keys[key]; known {
			return
		}
		id, _ = schemas.NewTaskID(time.Now(), rand.Reader)
		rec := schemas.NewRecord(id, spec, schemas.DefaultPolicy(), meta("gateway"))
		s.add(rec)
		if key != "" {
			s.keys[key] = id
		}
	})
	if known {
		w.Header().Set("Idempotency-Replayed", "true")
	} else {
		go s.act(id)
	}
	w.Header().Set("Location", "/v1/tasks/"+string(id))
	s.answer(w, r, id, http.StatusCreated)
}

// answer gives the task once it has come as far as the request waits for.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, id schemas.TaskID, status int) {
	q := r.URL.Query()
	stop := make(chan struct{})
	if until := q.Get("wait"); until != "" {
		d := 30 * time.Second
		if v, err := time.ParseDuration(q.Get("timeout")); err == nil {
			d = v
		}
		timer := time.AfterFunc(d, func() { close(stop) })
		defer timer.Stop()
		s.await(stop, func() bool {
			t := s.tasks[id]
			return t.record.State.Final() || until == "running" && t.record.State == schemas.Running || until == "ready" && t.record.Ready()
		})
	}
	s.mu.Lock()
	v := s.tasks[id].view()
	s.mu.Unlock()
	write(w, status, v)
}

// known gives the path's task, or answers that there is none.
func (s *Server) known(w http.ResponseWriter, r *http.Request) (schemas.TaskID, bool) {
	id := schemas.TaskID(r.PathValue("id"))
	s.mu.Lock()
	_, ok := s.tasks[id]
	s.mu.Unlock()
	if !ok {
		Fail(w, schemas.Error{Status: 404, Code: schemas.CodeNotFound, Detail: "no such task", RequestID: "r-1"})
	}
	return id, ok
}

func (s *Server) get(w http.ResponseWriter, r *http.Request) {
	if id, ok := s.known(w, r); ok {
		s.answer(w, r, id, http.StatusOK)
	}
}

func (s *Server) list(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	limit := limitOf(r)
	l := schemas.TaskList{Items: []schemas.Task{}}
	for _, t := range s.Tasks() {
		if c := q.Get("cursor"); c != "" && string(t.ID) >= c || len(q["state"]) > 0 && !slices.Contains(q["state"], string(t.State)) {
			continue
		}
		if !labeled(t.Spec.Labels, q["label"]) {
			continue
		}
		if len(l.Items) == limit {
			l.NextCursor = string(l.Items[limit-1].ID)
			break
		}
		t.History, t.Stdout, t.Stderr = nil, "", ""
		l.Items = append(l.Items, t)
	}
	write(w, http.StatusOK, l)
}

// labeled says whether labels has all of these: name=value, or a name alone.
func labeled(labels map[string]string, want []string) bool {
	return !slices.ContainsFunc(want, func(pair string) bool {
		k, v, valued := strings.Cut(pair, "=")
		has, ok := labels[k]
		return !ok || valued && has != v
	})
}

// changed answers 412 where the task is not at the revision of If-Match; mu is held.
func (t *task) changed(w http.ResponseWriter, r *http.Request) bool {
	tag := r.Header.Get("If-Match")
	if tag == "" || tag == strconv.Quote(strconv.FormatUint(t.revision, 10)) {
		return false
	}
	Fail(w, schemas.Error{Status: 412, Code: schemas.CodePrecondition, Task: t.record.ID, State: t.record.State})
	return true
}

// events tells the changes that the histories have, in their order.
func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	id := schemas.TaskID(r.PathValue("id"))
	if id != "" {
		if _, ok := s.known(w, r); !ok {
			return
		}
	}
	q := r.URL.Query()
	cut := 1 << 30
	var given uint64
	s.change(func() {
		if len(s.cuts) > 0 {
			cut, s.cuts = s.cuts[0], s.cuts[1:]
		}
		if given = s.revision; q.Get("after") != "now" {
			given, _ = strconv.ParseUint(q.Get("after"), 10, 64)
		}
	})
	w.Header().Set("Content-Type", "text/event-stream")
	out := http.NewResponseController(w)
	fmt.Fprintf(w, ": here\nid: %d\n\n", given)
	_ = out.Flush()
	for sent := 0; ; {
		var fresh []schemas.TaskEvent
		over := q.Get("follow") == "false"
		if !s.await(r.Context().Done(), func() bool {
			for _, t := range s.tasks {
				if id != "" && t.record.ID != id {
					continue
				}
				over = over || id != "" && t.record.State.Final()
				for _, c := range t.record.History {
					if c.Revision > given && labeled(t.record.Spec.Labels, q["label"]) && (len(q["state"]) == 0 || slices.Contains(q["state"], string(c.State))) {
						fresh = append(fresh, schemas.TaskEvent{ID: c.Revision, Task: t.record.ID, At: c.At, State: c.State, Reason: c.Reason, By: c.By,
							Note: c.Note, Attempt: c.Attempt, Worker: c.Worker, Labels: t.record.Spec.Labels})
					}
				}
			}
			return len(fresh) > 0 || over
		}) {
			return
		}
		slices.SortFunc(fresh, func(a, b schemas.TaskEvent) int { return int(a.ID) - int(b.ID) })
		for _, e := range fresh {
			body, _ := schemas.Encode(e)
			if sent == cut {
				_, _ = w.Write(body[:len(body)/2])
				_ = out.Flush()
				panic(http.ErrAbortHandler)
			}
			fmt.Fprintf(w, "id: %d\nevent: task\ndata: %s\n\n", e.ID, body)
			given = e.ID
			sent++
		}
		if over {
			fmt.Fprint(w, "event: end\ndata: {}\n\n")
			return
		}
		_ = out.Flush()
	}
}

func (s *Server) cancel(w http.ResponseWriter, r *http.Request) {
	id, ok := s.known(w, r)
	if !ok {
		return
	}
	grace, _ := time.ParseDuration(r.URL.Query().Get("grace"))
	refused := false
	s.change(func() {
		if refused = s.tasks[id].changed(w, r); refused {
			return
		}
		_ = s.tasks[id].next(schemas.AskCancel{Meta: meta("client"), Grace: schemas.Duration(grace)})
	})
	if refused {
		return
	}
	s.answer(w, r, id, http.StatusOK)
}

func (s *Server) extend(w http.ResponseWriter, r *http.Request) {
	id, ok := s.known(w, r)
	if !ok {
		return
	}
	body, _ := io.ReadAll(r.Body)
	var req schemas.ExtendRequest
	if err := schemas.DecodeStrict(body, &req); err != nil {
		fail(w, err)
		return
	}
	s.ask(w, r, id, func(t *task) error { return t.next(schemas.AskExtend{Meta: meta("client"), TTL: req.TTL}) })
}

// restart is carried out at once.
func (s *Server) restart(w http.ResponseWriter, r *http.Request) {
	id, ok := s.known(w, r)
	if !ok {
		return
	}
	s.ask(w, r, id, func(t *task) error {
		err := t.next(schemas.AskRestart{Meta: meta("client")})
		if err == nil {
			err = t.next(schemas.Settle{Meta: meta("reaper"), Report: schemas.Report{
				Assignment: t.record.Assignment(), Phase: schemas.PhaseRunning, Ran: true, Restarts: t.record.RestartTo, Last: &schemas.Exit{Code: 143}}})
		}
		return err
	})
}

// ask changes a task that may refuse it, and answers.
func (s *Server) ask(w http.ResponseWriter, r *http.Request, id schemas.TaskID, change func(*task) error) {
	var err error
	var state schemas.State
	refused := false
	s.change(func() {
		t := s.tasks[id]
		if refused = t.changed(w, r); refused {
			return
		}
		state = t.record.State
		err = change(t)
	})
	if refused {
		return
	}
	if err != nil {
		Fail(w, schemas.Error{Status: 409, Code: schemas.CodeStateConflict, Detail: "the task is " + string(state), Task: id, State: state})
		return
	}
	s.answer(w, r, id, http.StatusOK)
}

func (s *Server) log(w http.ResponseWriter, r *http.Request) {
	id, ok := s.known(w, r)
	if !ok {
		return
	}
	q := r.URL.Query()
	cut := 1 << 30
	s.change(func() {
		if len(s.cuts) > 0 {
			cut, s.cuts = s.cuts[0], s.cuts[1:]
		}
	})
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := http.NewResponseController(w)
	_ = out.Flush()
	since, _ := time.Parse(time.RFC3339Nano, q.Get("since"))
	sent, seen := 0, 0
	if n, err := strconv.Atoi(q.Get("tail")); err == nil {
		s.mu.Lock()
		seen = max(0, len(s.tasks[id].logs)-n)
		s.mu.Unlock()
	}
	for {
		var fresh []schemas.LogLine
		final := false
		if !s.await(r.Context().Done(), func() bool {
			t := s.tasks[id]
			fresh, final = slices.Clone(t.logs[seen:]), t.record.State.Final()
			return len(fresh) > 0 || final || q.Get("follow") == ""
		}) {
			return
		}
		seen += len(fresh)
		var b bytes.Buffer
		for _, l := range fresh {
			if st := q.Get("stream"); st != "" && st != string(l.Stream) || l.At.Before(since) {
				continue
			}
			line, _ := schemas.Encode(l)
			if sent == max(cut, -cut) {
				if cut > 0 {
					b.Write(line[:len(line)/2])
				}
				_, _ = w.Write(b.Bytes())
				_ = out.Flush()
				if cut > 0 {
					panic(http.ErrAbortHandler)
				}
				return
			}
			fmt.Fprintf(&b, "%s\n", line)
			sent++
		}
		if _, err := w.Write(b.Bytes()); err != nil {
			return
		}
		_ = out.Flush()
		if final || q.Get("follow") == "" {
			return
		}
	}
}

func (s *Server) workers(w http.ResponseWriter, r *http.Request) {
	write(w, http.StatusOK, schemas.WorkerList{Items: []schemas.Worker{{
		ID: worker, State: "ready", Epoch: epoch, Version: "1.0.0",
		Host:     schemas.Host{OS: "linux", Arch: "amd64", CPUs: 4, Memory: 8 << 30, Slots: 16, GPUs: 2},
		Assigned: schemas.Allocation{Tasks: 2, CPUs: 1, Memory: 512 << 20, GPUs: 1}, Running: 2,
		BeatAgo: schemas.Duration(time.Second),
	}}})
}
