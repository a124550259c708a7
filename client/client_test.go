package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/client/clienttest"
	"dayfly.dev/schemas"
)

func start(t *testing.T) (*clienttest.Server, *client.Client) {
	t.Helper()
	s := clienttest.Start(t)
	c, err := client.New(s.URL, client.WithBackoff(time.Millisecond, 4*time.Millisecond), client.WithRetryFor(5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	return s, c
}

func create(t *testing.T, c *client.Client, command ...string) schemas.Task {
	t.Helper()
	task, err := c.Create(t.Context(), schemas.Spec{Image: "busybox", Command: command}, client.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return task
}

func code(err error) schemas.Code {
	var e *schemas.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func TestCreateLeavesDefaultsToTheServer(t *testing.T) {
	t.Parallel()
	_, c := start(t)
	task, err := c.Create(t.Context(), schemas.Spec{Image: "busybox", Command: []string{"echo", "hi"}},
		client.CreateOptions{Wait: client.UntilDone, Timeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if task.State != schemas.Completed || task.Stdout != "hi\n" {
		t.Errorf("got %s with output %q", task.State, task.Stdout)
	}
	if want := schemas.DefaultSpec(); task.Spec.TTL != want.TTL || task.Spec.Resources.Memory != want.Resources.Memory || task.Spec.Priority != want.Priority {
		t.Errorf("defaults did not hold: %+v", task.Spec)
	}
}

func TestErrorsCarryTheirCode(t *testing.T) {
	t.Parallel()
	_, c := start(t)
	_, err := c.CreateRaw(t.Context(), []byte(`{"image":"busybox","colour":"red"}`), client.CreateOptions{})
	if code(err) != schemas.CodeUnknownField {
		t.Errorf("unknown field: %v", err)
	}
	_, err = c.Get(t.Context(), "t-00000000000000000000000000", client.GetOptions{})
	var e *schemas.Error
	if !errors.As(err, &e) || e.Code != schemas.CodeNotFound || e.Status != 404 || e.RequestID != "r-1" {
		t.Errorf("missing task: %#v", err)
	}
	done := create(t, c, "exit:0")
	if _, err := c.Wait(t.Context(), done.ID); err != nil {
		t.Fatal(err)
	}
	if _, err = c.Extend(t.Context(), done.ID, time.Hour); code(err) != schemas.CodeStateConflict {
		t.Errorf("extend of a final task: %v", err)
	}
}

func TestCreateIsRepeatedUnderOneKey(t *testing.T) {
	t.Parallel()
	s, c := start(t)
	var n atomic.Int32
	keys := make(chan string, 10)
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPost {
			return false
		}
		keys <- r.Header.Get("Idempotency-Key")
		switch n.Add(1) {
		case 1:
			clienttest.Fail(w, schemas.Error{Status: 503, Code: schemas.CodeUnknownOutcome})
		case 2:
			panic(http.ErrAbortHandler)
		case 3:
			clienttest.Fail(w, schemas.Error{Status: 409, Code: schemas.CodeInProgress})
		default:
			return false
		}
		return true
	})
	create(t, c, "exit:0")
	close(keys)
	first := <-keys
	for k := range keys {
		if k != first || k == "" {
			t.Errorf("keys %q and %q", first, k)
		}
	}
	if n.Load() != 4 || len(s.Tasks()) != 1 {
		t.Errorf("%d requests made %d tasks", n.Load(), len(s.Tasks()))
	}
}

func TestRetriesEndWithTheirTime(t *testing.T) {
	t.Parallel()
	s, c := start(t)
	var n atomic.Int32
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
		n.Add(1)
		clienttest.Fail(w, schemas.Error{Status: 503, Code: schemas.CodeUnavailable, RetryAfter: schemas.Duration(time.Hour)})
		return true
	})
	if _, err := c.Workers(t.Context()); code(err) != schemas.CodeUnavailable || n.Load() != 1 {
		t.Errorf("a Retry-After beyond the time for retries: %v after %d tries", err, n.Load())
	}
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
		n.Add(1)
		clienttest.Fail(w, schemas.Error{Status: 422, Code: schemas.CodeNoCapacity})
		return true
	})
	n.Store(0)
	if _, err := c.Workers(t.Context()); code(err) != schemas.CodeNoCapacity || n.Load() != 1 {
		t.Errorf("a refusal was repeated: %v after %d tries", err, n.Load())
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	c, _ := client.New("http://"+l.Addr().String(), client.WithRetryFor(0))
	_, err = c.Workers(t.Context())
	var u *client.UnreachableError
	if !errors.As(err, &u) || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Workers(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("the caller's own end: %v", err)
	}
}

func TestNewRefusesAddressesThatAreNone(t *testing.T) {
	t.Parallel()
	for _, u := range []string{"", "localhost:8080", "ftp://x", "http://", "http://x?y=1"} {
		if _, err := client.New(u); err == nil {
			t.Errorf("%q was taken", u)
		}
	}
}

func TestAllReadsEveryPage(t *testing.T) {
	t.Parallel()
	_, c := start(t)
	for range 5 {
		create(t, c, "hold")
	}
	var ids []schemas.TaskID
	for task, err := range c.All(t.Context(), client.ListOptions{Limit: 2, States: []schemas.State{schemas.Running, schemas.Starting, schemas.Assigned, schemas.Queued}}) {
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, task.ID)
	}
	if len(ids) != 5 {
		t.Errorf("got %d tasks: %v", len(ids), ids)
	}
}

func TestCancelExtendAndRestart(t *testing.T) {
	t.Parallel()
	_, c := start(t)
	task := create(t, c, "hold")
	if _, err := c.WaitRunning(t.Context(), task.ID); err != nil {
		t.Fatal(err)
	}
	if now, err := c.WaitReady(t.Context(), task.ID); err != nil || !now.Ready {
		t.Errorf("ready %v: %v", now.Ready, err)
	}
	longer, err := c.Extend(t.Context(), task.ID, 3*time.Hour)
	if err != nil || time.Until(longer.ExpiresAt) < 2*time.Hour {
		t.Errorf("extended to %v: %v", longer.ExpiresAt, err)
	}
	again, err := c.Restart(t.Context(), task.ID, client.IfRevision(longer.Revision))
	if err != nil || again.Restarts != 1 || !again.ExpiresAt.Equal(longer.ExpiresAt) {
		t.Errorf("restarted %d times, expires at %v: %v", again.Restarts, again.ExpiresAt, err)
	}
	grace := time.Second
	if _, err := c.Cancel(t.Context(), task.ID, &grace); err != nil {
		t.Fatal(err)
	}
	end, err := c.Wait(t.Context(), task.ID)
	if err != nil || end.State != schemas.Canceled || end.Cancel.Grace.Std() != grace {
		t.Errorf("ended %s %+v: %v", end.State, end.Cancel, err)
	}
}

// collect reads the log and checks that offsets join.
func collect(t *testing.T, c *client.Client, id schemas.TaskID, o client.LogOptions) map[schemas.Stream][]byte {
	t.Helper()
	got := map[schemas.Stream][]byte{}
	next := map[schemas.Stream]int64{}
	for l, err := range c.Logs(t.Context(), id, o) {
		if err != nil {
			t.Fatal(err)
		}
		b, err := client.LineBytes(l)
		if err != nil {
			t.Fatal(err)
		}
		if n, seen := next[l.Stream]; seen && n != l.Offset {
			t.Errorf("%s goes on at %d, not %d", l.Stream, l.Offset, n)
		}
		next[l.Stream] = l.Offset + int64(len(b))
		got[l.Stream] = append(got[l.Stream], b...)
	}
	return got
}

func TestLogsResumeWithoutLossOrDoubling(t *testing.T) {
	t.Parallel()
	for name, cuts := range map[string][]int{
		"no cut":                         nil,
		"cut in the middle of lines":     {3, 1, 7, 12, 2, 40},
		"ended in good order by a drain": {-2, -5, 9, -60},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, c := start(t)
			task := create(t, c, "hold")
			want := map[schemas.Stream][]byte{}
			write := func(i int) {
				stream := []schemas.Stream{schemas.Stdout, schemas.Stderr}[i%2]
				b := fmt.Appendf(nil, "line %d é\xff%s\n", i, strings.Repeat("x", i))
				want[stream] = append(want[stream], b...)
				s.Log(task.ID, stream, b)
			}
			for i := range 50 {
				write(i)
			}
			s.CutLogs(cuts...)
			go func() {
				// The rest comes while the log is followed.
				for i := range 50 {
					write(50 + i)
				}
				s.Release(task.ID)
			}()
			got := collect(t, c, task.ID, client.LogOptions{Follow: true})
			for _, st := range []schemas.Stream{schemas.Stdout, schemas.Stderr} {
				if !bytes.Equal(got[st], want[st]) {
					t.Errorf("%s: %d bytes, want %d", st, len(got[st]), len(want[st]))
				}
			}
		})
	}
}

func TestResumeReadsTheSamePiecesSplitElsewhere(t *testing.T) {
	t.Parallel()
	s, c := start(t)
	task := create(t, c, "hold")
	var n atomic.Int32
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/logs") {
			return false
		}
		if n.Add(1) == 1 {
			fmt.Fprintf(w, "{\"attempt\":1,\"stream\":\"stdout\",\"offset\":0,\"data\":\"abcd\"}\n\n{\"attempt\":1,\"str")
			return true
		}
		fmt.Fprint(w, "{\"attempt\":1,\"stream\":\"stdout\",\"offset\":0,\"data\":\"ab\"}\n")
		fmt.Fprint(w, "{\"attempt\":1,\"stream\":\"stdout\",\"offset\":2,\"data\":\"cdé\"}\n")
		return true
	})
	got := collect(t, c, task.ID, client.LogOptions{})
	if string(got[schemas.Stdout]) != "abcdé" || n.Load() != 2 {
		t.Errorf("got %q over %d connections", got, n.Load())
	}
}

func TestResumeFinishesTheAttemptThatBrokeOff(t *testing.T) {
	t.Parallel()
	s, c := start(t)
	id := schemas.TaskID("t-01jd6q0t000000000000000000")
	r := schemas.NewRecord(id, schemas.DefaultSpec(), schemas.DefaultPolicy(), schemas.Meta{At: time.Now(), By: "gateway"})
	r.State, r.Attempt, r.Logs = schemas.Completed, 3, &schemas.LogSum{StdoutBytes: 2}
	s.Seed(r)
	var asked []string
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/logs") {
			return false
		}
		q := r.URL.Query()
		asked = append(asked, q.Get("attempt")+"/"+q.Get("follow"))
		line := func(attempt, offset int, data string) {
			fmt.Fprintf(w, "{\"attempt\":%d,\"stream\":\"stdout\",\"offset\":%d,\"data\":%q}\n", attempt, offset, data)
		}
		switch {
		case len(asked) == 1: // attempt 1 is the newest yet, and the connection breaks
			line(1, 0, "on")
			fmt.Fprint(w, "{")
		case q.Get("attempt") == "1":
			line(1, 0, "one,")
		case q.Get("attempt") == "2":
			line(2, 0, "two,")
		default:
			line(3, 0, "3.")
		}
		return true
	})
	got := ""
	for l, err := range c.Logs(t.Context(), id, client.LogOptions{Follow: true}) {
		if err != nil {
			t.Fatal(err)
		}
		got += l.Data
	}
	if got != "one,two,3." || strings.Join(asked, " ") != "/true 1/ 2/ /true" {
		t.Errorf("got %q by %q", got, asked)
	}
}

func TestTailStaysATailAfterACut(t *testing.T) {
	t.Parallel()
	s, c := start(t)
	task := create(t, c, "hold")
	for i := range 10 {
		s.Log(task.ID, []schemas.Stream{schemas.Stdout, schemas.Stderr}[i%2], fmt.Appendf(nil, "%d", i))
	}
	s.CutLogs(1)
	s.Release(task.ID)
	got := collect(t, c, task.ID, client.LogOptions{Follow: true, Tail: 2})
	if string(got[schemas.Stdout]) != "8" || string(got[schemas.Stderr]) != "9" {
		t.Errorf("got %q", got)
	}
}

func TestALogThatIsNoLongerKeptSaysSo(t *testing.T) {
	t.Parallel()
	s, c := start(t)
	task := create(t, c, "out:hello")
	if _, err := c.Wait(t.Context(), task.ID); err != nil {
		t.Fatal(err)
	}
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/logs") })
	var last error
	for _, err := range c.Logs(t.Context(), task.ID, client.LogOptions{Follow: true}) {
		last = err
	}
	if !errors.Is(last, client.ErrLogsIncomplete) {
		t.Errorf("got %v", last)
	}
}

func TestLogsEndWithTheCallersContext(t *testing.T) {
	t.Parallel()
	_, c := start(t)
	task := create(t, c, "out:x", "hold")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var last error
	for _, err := range c.Logs(ctx, task.ID, client.LogOptions{Follow: true}) {
		last = err
		cancel()
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("got %v", last)
	}
}
