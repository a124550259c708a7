package client

import (
	"context"
	"crypto/rand"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"dayfly.dev/schemas"
)

// Until says what a call waits for.
type Until string

// What can be waited for. The end of a task ends all kinds of waiting.
const (
	UntilRunning Until = "running"
	UntilReady   Until = "ready" // it has passed its health check; running, if it has none
	UntilDone    Until = "done"
)

// maxHold is how long one request may be held back by the server. Longer waits are
// made of several, so that no proxy between cuts them off.
const maxHold = 30 * time.Second

// CreateOptions say how a task is created.
type CreateOptions struct {
	// IdempotencyKey makes a repeated Create give back the first one's task, for 24 h.
	// Create makes one up if it is empty, so that its own repetitions are safe.
	IdempotencyKey string
	// Wait holds the answer back until the task has come that far, or for Timeout (the
	// server's default if 0, and at most its limit). It is no error if the task has not
	// come that far by then: look at its state, and go on with Wait.
	Wait    Until
	Timeout time.Duration
}

// Create asks for a task. Fields of spec that are zero are left out, so the server's
// defaults hold.
func (c *Client) Create(ctx context.Context, spec schemas.Spec, o CreateOptions) (schemas.Task, error) {
	body, err := schemas.Encode(spec)
	if err != nil {
		return schemas.Task{}, fmt.Errorf("encode spec: %w", err)
	}
	return c.CreateRaw(ctx, body, o)
}

// CreateRaw is Create with the JSON of the spec as it shall be sent.
func (c *Client) CreateRaw(ctx context.Context, spec []byte, o CreateOptions) (schemas.Task, error) {
	if o.IdempotencyKey == "" {
		o.IdempotencyKey = "auto-" + rand.Text()
	}
	q := url.Values{}
	wait(q, o.Wait, o.Timeout)
	var t schemas.Task
	_, err := c.call(ctx, request{
		method: http.MethodPost, path: "/v1/tasks", query: q, body: spec,
		key: o.IdempotencyKey, repeatable: true, wait: hold(o.Wait, o.Timeout),
	}, &t)
	return t, err
}

func wait(q url.Values, until Until, timeout time.Duration) {
	if until == "" {
		return
	}
	q.Set("wait", string(until))
	if timeout > 0 {
		q.Set("timeout", schemas.Duration(timeout).String())
	}
}

func hold(until Until, timeout time.Duration) time.Duration {
	if until == "" {
		return 0
	}
	return max(timeout, time.Minute)
}

// GetOptions say what a Get waits for, as in CreateOptions.
type GetOptions struct {
	Wait    Until
	Timeout time.Duration
}

// Get gives a task as it is, or as it has become while waiting.
func (c *Client) Get(ctx context.Context, id schemas.TaskID, o GetOptions) (schemas.Task, error) {
	q := url.Values{}
	wait(q, o.Wait, o.Timeout)
	var t schemas.Task
	_, err := c.call(ctx, request{
		method: http.MethodGet, path: taskPath(id, ""), query: q, repeatable: true, wait: hold(o.Wait, o.Timeout),
	}, &t)
	return t, err
}

// Wait waits until the task is final, however long that takes.
func (c *Client) Wait(ctx context.Context, id schemas.TaskID) (schemas.Task, error) {
	return c.waitFor(ctx, id, UntilDone)
}

// WaitRunning waits until the task's process runs, or the task is final.
func (c *Client) WaitRunning(ctx context.Context, id schemas.TaskID) (schemas.Task, error) {
	return c.waitFor(ctx, id, UntilRunning)
}

// WaitReady waits until the task runs and has passed its health check, if it has one, or
// is final.
func (c *Client) WaitReady(ctx context.Context, id schemas.TaskID) (schemas.Task, error) {
	return c.waitFor(ctx, id, UntilReady)
}

func (c *Client) waitFor(ctx context.Context, id schemas.TaskID, until Until) (schemas.Task, error) {
	b := backoff{first: c.backoffFirst, most: c.backoffMost}
	for {
		asked := time.Now()
		t, err := c.Get(ctx, id, GetOptions{Wait: until, Timeout: maxHold})
		if err != nil {
			return t, err
		}
		if t.State.Final() || until == UntilRunning && t.State == schemas.Running || until == UntilReady && t.Ready {
			return t, nil
		}
		// A server that shuts down answers early: do not ask it in a tight loop.
		if time.Since(asked) >= time.Second {
			b.n = 0
			continue
		}
		if err := sleep(ctx, b.next(nil)); err != nil {
			return t, err
		}
	}
}

// ListOptions choose tasks.
type ListOptions struct {
	States       []schemas.State   // any of these; all if empty
	Labels       map[string]string // all of these
	HasLabels    []string          // all of these, whatever their values
	Worker       schemas.WorkerID  // "": any and none
	CreatedAfter time.Time         // zero: whenever
	Limit        int               // of a page; the server's default if 0
	Cursor       string            // of the page before
}

// filters gives what lists and events are chosen by.
func filters(states []schemas.State, labels map[string]string, has []string, worker schemas.WorkerID) url.Values {
	q := url.Values{}
	for _, s := range states {
		q.Add("state", string(s))
	}
	for k, v := range labels {
		q.Add("label", k+"="+v)
	}
	for _, k := range has {
		q.Add("label", k)
	}
	slices.Sort(q["label"])
	if worker != "" {
		q.Set("worker", string(worker))
	}
	return q
}

// List gives one page of tasks, newest first. A page may be short, or empty, and not be
// the last: that one has no NextCursor.
func (c *Client) List(ctx context.Context, o ListOptions) (schemas.TaskList, error) {
	q := filters(o.States, o.Labels, o.HasLabels, o.Worker)
	if !o.CreatedAfter.IsZero() {
		q.Set("created_after", o.CreatedAfter.UTC().Format(time.RFC3339Nano))
	}
	if o.Limit > 0 {
		q.Set("limit", strconv.Itoa(o.Limit))
	}
	if o.Cursor != "" {
		q.Set("cursor", o.Cursor)
	}
	var l schemas.TaskList
	_, err := c.call(ctx, request{method: http.MethodGet, path: "/v1/tasks", query: q, repeatable: true}, &l)
	return l, err
}

// All gives the tasks of all pages, newest first, fetching a page when it is needed.
// It ends at the first error.
func (c *Client) All(ctx context.Context, o ListOptions) iter.Seq2[schemas.Task, error] {
	return func(yield func(schemas.Task, error) bool) {
		for {
			l, err := c.List(ctx, o)
			if err != nil {
				yield(schemas.Task{}, err)
				return
			}
			for _, t := range l.Items {
				if !yield(t, nil) {
					return
				}
			}
			if l.NextCursor == "" || l.NextCursor == o.Cursor {
				return
			}
			o.Cursor = l.NextCursor
		}
	}
}

// ChangeOption is a condition of a change.
type ChangeOption func(*request)

// IfRevision lets a change happen only if the task is still as it was shown at that
// revision; it is schemas.CodePrecondition otherwise, and nothing was done. Such a call
// is not repeated where it may have been done, because the second would be refused.
func IfRevision(revision uint64) ChangeOption {
	return func(r *request) {
		r.header = http.Header{"If-Match": {strconv.Quote(strconv.FormatUint(revision, 10))}}
		r.repeatable = false
	}
}

// change does a request under conditions.
func (c *Client) change(ctx context.Context, r request, opts []ChangeOption) (t schemas.Task, err error) {
	for _, o := range opts {
		o(&r)
	}
	_, err = c.call(ctx, r, &t)
	return t, err
}

// Cancel asks for the task's end: TERM to its processes, and KILL after grace (the
// task's own if nil). It does not wait for the end. A final task stays as it is.
func (c *Client) Cancel(ctx context.Context, id schemas.TaskID, grace *time.Duration, opts ...ChangeOption) (schemas.Task, error) {
	q := url.Values{}
	if grace != nil {
		q.Set("grace", schemas.Duration(*grace).String())
	}
	return c.change(ctx, request{method: http.MethodDelete, path: taskPath(id, ""), query: q, repeatable: true}, opts)
}

// Extend moves the task's deadline to ttl from now, never back. The task that comes
// back has the new deadline; the worker may not have heard of it yet.
func (c *Client) Extend(ctx context.Context, id schemas.TaskID, ttl time.Duration, opts ...ChangeOption) (schemas.Task, error) {
	body, err := schemas.Encode(schemas.ExtendRequest{TTL: schemas.Duration(ttl)})
	if err != nil {
		return schemas.Task{}, fmt.Errorf("encode extension: %w", err)
	}
	// The deadline never moves back and never beyond now+ttl, so twice does no harm.
	return c.change(ctx, request{method: http.MethodPost, path: taskPath(id, "/extend"), body: body, repeatable: true}, opts)
}

// Restart runs the command of a running task again in the same container. The task that
// comes back may not have been restarted yet. Its answer lost, a second call may restart
// it once more: IfRevision tells.
func (c *Client) Restart(ctx context.Context, id schemas.TaskID, opts ...ChangeOption) (schemas.Task, error) {
	return c.change(ctx, request{method: http.MethodPost, path: taskPath(id, "/restart"), body: []byte("{}")}, opts)
}

// Workers gives all workers, by name.
func (c *Client) Workers(ctx context.Context) (schemas.WorkerList, error) {
	var l schemas.WorkerList
	_, err := c.call(ctx, request{method: http.MethodGet, path: "/v1/workers", repeatable: true}, &l)
	return l, err
}

// Drain lets a worker take nothing new; its tasks go on to their ends and get no more
// time. It stays so until Undrain, also over a restart of the worker. Twice is as once.
// Until it is confirmed, by the placer that leads, one more task may be given to it: ask again.
func (c *Client) Drain(ctx context.Context, id schemas.WorkerID) (w schemas.Worker, confirmed bool, err error) {
	return c.drain(ctx, id, "/drain")
}

// Undrain lets a drained worker take tasks again.
func (c *Client) Undrain(ctx context.Context, id schemas.WorkerID) (schemas.Worker, error) {
	w, _, err := c.drain(ctx, id, "/undrain")
	return w, err
}

func (c *Client) drain(ctx context.Context, id schemas.WorkerID, verb string) (w schemas.Worker, confirmed bool, err error) {
	status := 0
	_, err = c.call(ctx, request{
		method: http.MethodPost, path: "/v1/workers/" + url.PathEscape(string(id)) + verb, body: []byte("{}"), repeatable: true, status: &status,
	}, &w)
	return w, err == nil && status == http.StatusOK, err
}

func taskPath(id schemas.TaskID, rest string) string {
	return "/v1/tasks/" + url.PathEscape(string(id)) + rest
}

// Kinds gives the kinds of tasks that the site has, by name.
func (c *Client) Kinds(ctx context.Context) (schemas.KindList, error) {
	var l schemas.KindList
	_, err := c.call(ctx, request{method: http.MethodGet, path: "/v1/kinds", repeatable: true}, &l)
	return l, err
}
