package gateway_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/ops"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a NATS server, one gateway, and a connection that plays everybody else.
type world struct {
	testing.TB
	nats    *natsd.Server
	conn    *bus.Conn
	records *bus.Table[schemas.Record]
	beats   *bus.Table[schemas.Beat]
	api
}

// api is one gateway over HTTP.
type api struct {
	testing.TB
	url    string
	client *http.Client
	logs   *buffer
	health *ops.Health
	reg    *prometheus.Registry
	g      *gateway.Gateway
	stop   func() // as a kill would: connections break
}

func newWorld(t testing.TB, cfg gateway.Config) *world {
	t.Helper()
	w := newStore(t)
	w.api = newAPI(t, natstest.Connect(t, w.nats), cfg)
	return w
}

// newStore is a world without a gateway.
func newStore(t testing.TB) *world {
	t.Helper()
	s := natstest.Server(t)
	c := natstest.Connect(t, s)
	if err := bus.Provision(deadline(t), c, schemas.Assets(time.Hour), 1); err != nil {
		t.Fatal(err)
	}
	return &world{TB: t, nats: s, conn: c, api: api{TB: t},
		records: bus.NewTable(c, schemas.BucketTasks, bus.JSON(schemas.Record.Wrote)),
		beats:   bus.NewTable(c, schemas.BucketWorkers, bus.JSON[schemas.Beat](nil)),
	}
}

// newAPI starts a gateway over an own connection.
func newAPI(t testing.TB, c *bus.Conn, cfg gateway.Config) api {
	t.Helper()
	return newAPIOf(t, c, cfg, nil)
}

// newAPIOf is newAPI with templates.
func newAPIOf(t testing.TB, c *bus.Conn, cfg gateway.Config, templates *gateway.Templates) api {
	t.Helper()
	// However busy the machine is: tests of what happens without the bus say how long.
	cfg.Unavailable, cfg.OpTimeout = cmp.Or(cfg.Unavailable, 20*time.Second), cmp.Or(cfg.OpTimeout, 20*time.Second)
	a := api{TB: t, logs: &buffer{}, health: ops.NewHealth(), reg: prometheus.NewRegistry()}
	a.g = gateway.New(gateway.Deps{Conn: c, Logger: zerolog.New(a.logs), Metrics: a.reg, Health: a.health, Templates: templates}, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		if err := a.g.KeepViews(ctx); err != nil && ctx.Err() == nil {
			t.Error(err)
		}
	})
	srv := httptest.NewUnstartedServer(a.g.Handler())
	srv.Config.DisableGeneralOptionsHandler = true // as ops.Serve does
	srv.Start()
	a.url = srv.URL
	a.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 300, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	a.stop = sync.OnceFunc(func() {
		a.client.CloseIdleConnections()
		srv.CloseClientConnections()
		srv.Close()
		cancel()
		done.Wait()
	})
	t.Cleanup(a.stop)
	return a
}

type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// until polls for a fact.
func until(t testing.TB, what string, fact func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	end := time.After(time.Minute)
	for !fact() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("never came true: %s", what)
		}
	}
}

// reply is an answer of the API.
type reply struct {
	status int
	header http.Header
	body   []byte
}

func (r reply) task(t testing.TB) schemas.Task {
	t.Helper()
	var task schemas.Task
	if err := schemas.Decode(r.body, &task); err != nil || task.ID == "" {
		t.Fatalf("%d is no task (%v): %s", r.status, err, r.body)
	}
	return task
}

func (r reply) problem(t testing.TB) schemas.Error {
	t.Helper()
	var e struct {
		Type string `json:"type"`
		schemas.Error
	}
	if ct := r.header.Get("Content-Type"); ct != "application/problem+json" {
		t.Fatalf("%d with content type %q: %s", r.status, ct, r.body)
	}
	if err := schemas.Decode(r.body, &e); err != nil {
		t.Fatalf("%v: %s", err, r.body)
	}
	if e.Type != "urn:dayfly:problem:"+string(e.Code) || e.Title != http.StatusText(r.status) || e.Status != r.status ||
		e.RequestID == "" || e.RequestID != r.header.Get("X-Request-Id") || r.header.Get("Cache-Control") != "no-store" {
		t.Fatalf("not a whole problem: %d %v %s", r.status, r.header, r.body)
	}
	return e.Error
}

// want checks status and code of a problem.
func (r reply) want(t testing.TB, status int, code schemas.Code) schemas.Error {
	t.Helper()
	if r.status != status {
		t.Fatalf("status %d, want %d: %s", r.status, status, r.body)
	}
	e := r.problem(t)
	if e.Code != code {
		t.Fatalf("code %s, want %s: %s", e.Code, code, r.body)
	}
	return e
}

// do sends a request; extra are pairs of header names and values. A body goes as JSON.
func (a api) do(method, path, body string, extra ...string) reply {
	a.Helper()
	r, err := a.try(method, path, body, extra...)
	if err != nil {
		a.Fatal(err)
	}
	return r
}

func (a api) try(method, path, body string, extra ...string) (reply, error) {
	req, err := http.NewRequest(method, a.url+path, strings.NewReader(body))
	if err != nil {
		return reply{}, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(extra); i += 2 {
		req.Header.Set(extra[i], extra[i+1])
	}
	res, err := a.client.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return reply{res.StatusCode, res.Header, b}, err
}

func (a api) get(path string, extra ...string) reply {
	a.Helper()
	return a.do("GET", path, "", extra...)
}

// create makes a task and gives it.
func (a api) create(spec string, extra ...string) schemas.Task {
	a.Helper()
	r := a.do("POST", "/v1/tasks", spec, extra...)
	if r.status != 201 {
		a.Fatalf("create: %d %s", r.status, r.body)
	}
	return r.task(a)
}

func (a api) task(id schemas.TaskID) schemas.Task {
	a.Helper()
	r := a.get("/v1/tasks/" + string(id))
	if r.status != 200 {
		a.Fatalf("get: %d %s", r.status, r.body)
	}
	return r.task(a)
}

const spec = `{"image":"busybox","command":["true"]}`

func meta(by string) schemas.Meta {
	return schemas.Meta{At: time.Now(), By: by, Op: strconv.FormatInt(time.Now().UnixNano(), 36)}
}

// on is meta of a write that replaces e.
func on(e bus.Entry[schemas.Record], by string) schemas.Meta {
	m := meta(by)
	m.On = e.Revision
	return m
}

// next changes a record as another service would.
func (w *world) next(id schemas.TaskID, event func(bus.Entry[schemas.Record]) schemas.Event) schemas.Record {
	w.Helper()
	e, err := w.records.Update(deadline(w), string(id), meta("").Op, func(e bus.Entry[schemas.Record]) (schemas.Record, []bus.WriteOption, error) {
		n, err := schemas.Next(e.Value, event(e))
		return n, nil, err
	})
	if err != nil {
		w.Fatal(err)
	}
	return e.Value
}

func (w *world) choose(id schemas.TaskID, worker schemas.WorkerID) {
	w.Helper()
	w.next(id, func(e bus.Entry[schemas.Record]) schemas.Event {
		return schemas.Choose{Meta: on(e, "placer"), Worker: worker, Epoch: schemas.Epoch("e-" + worker)}
	})
}

func (w *world) report(id schemas.TaskID, phase schemas.Phase, end *schemas.End) {
	w.Helper()
	w.next(id, func(e bus.Entry[schemas.Record]) schemas.Event {
		return schemas.Settle{Meta: on(e, "reaper"), Report: schemas.Report{
			Assignment: e.Value.Assignment(), Phase: phase, Ran: phase != schemas.PhaseAccepted, Applied: e.Value.Applied, End: end}}
	})
}

func (w *world) run(id schemas.TaskID) {
	w.Helper()
	w.choose(id, "w1")
	w.report(id, schemas.PhaseRunning, nil)
}

func ended(code int, stdout, stderr int) *schemas.End {
	return &schemas.End{By: schemas.EndedItself, Exit: &schemas.Exit{Code: code},
		Logs: schemas.LogSum{StdoutBytes: int64(stdout), StderrBytes: int64(stderr)}}
}

// chunk stores a piece of a log as a worker would.
func (w *world) chunk(id schemas.TaskID, worker schemas.WorkerID, attempt int, stream schemas.Stream, offset int, data string) {
	w.Helper()
	_, err := w.conn.Publish(deadline(w), schemas.LogSubject(worker, id), nats.Header{
		schemas.HeaderAttempt: {strconv.Itoa(attempt)}, schemas.HeaderStream: {string(stream)},
		schemas.HeaderOffset: {strconv.Itoa(offset)}, schemas.HeaderTime: {time.Now().UTC().Format(time.RFC3339Nano)},
	}, []byte(data))
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) beat(b schemas.Beat) {
	w.Helper()
	ctx := deadline(w)
	e, err := w.beats.Get(ctx, string(b.Worker))
	if errors.Is(err, bus.ErrNotFound) {
		_, err = w.beats.Create(ctx, string(b.Worker), b, "")
	} else if err == nil {
		_, err = w.beats.Replace(ctx, e, b, "")
	}
	if err != nil {
		w.Fatal(err)
	}
}

func beat(worker schemas.WorkerID, cpus schemas.CPUs, memory schemas.Size) schemas.Beat {
	return schemas.Beat{Worker: worker, Epoch: "e-" + schemas.Epoch(worker), Version: "1", At: time.Now().UTC(),
		Host: schemas.Host{OS: "linux", Arch: "amd64", CPUs: cpus, Memory: memory, Slots: 8}}
}

// newest is the last message of a subject, nil if there is none.
func (w *world) newest(stream, subject string) []byte {
	w.Helper()
	st, err := w.conn.JS.Stream(deadline(w), stream)
	if err != nil {
		w.Fatal(err)
	}
	m, err := st.GetLastMsgForSubject(deadline(w), subject)
	if err != nil {
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil
		}
		w.Fatal(err)
	}
	return m.Data
}

// in is the world for a subtest.
func (w world) in(t testing.TB) *world {
	w.TB, w.api.TB = t, t
	return &w
}

// play is placer, worker and reaper at once: each queued task ends with code 0.
func (w *world) play() {
	work := make(chan bus.Change[schemas.State], 4096)
	v := bus.NewView(w.conn, schemas.BucketTasks, func(_ string, h nats.Header, _ []byte) (schemas.State, error) {
		return schemas.State(h.Get(schemas.HeaderState)), nil
	}, bus.ViewOptions[schemas.State]{OnChange: func(c bus.Change[schemas.State]) {
		if c.New == schemas.Queued && !c.Deleted {
			work <- c
		}
	}})
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { _ = v.Run(ctx) })
	for range 4 {
		done.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case c := <-work:
					w.end(ctx, c.Key)
				}
			}
		})
	}
	w.Cleanup(func() { cancel(); done.Wait() })
}

func (w *world) end(ctx context.Context, key string) {
	e, err := w.records.Update(ctx, key, meta("").Op, func(e bus.Entry[schemas.Record]) (schemas.Record, []bus.WriteOption, error) {
		n, err := schemas.Next(e.Value, schemas.Choose{Meta: on(e, "placer"), Worker: "w1", Epoch: "e1"})
		return n, nil, err
	})
	if err != nil {
		return
	}
	_, err = w.records.UpdateFrom(ctx, e, meta("").Op, func(e bus.Entry[schemas.Record]) (schemas.Record, []bus.WriteOption, error) {
		n, err := schemas.Next(e.Value, schemas.Settle{Meta: on(e, "reaper"), Report: schemas.Report{
			Assignment: e.Value.Assignment(), Phase: schemas.PhaseEnded, Ran: true, End: ended(0, 0, 0)}})
		return n, nil, err
	})
	if err != nil && ctx.Err() == nil && !errors.Is(err, bus.ErrUnavailable) {
		w.Error(fmt.Errorf("end %s: %w", key, err))
	}
}
