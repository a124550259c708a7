//go:build faults

package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// client does one thing after the other, by its seed.
type client struct {
	name  string
	site  *harness.Site
	rec   *Recorder
	rng   *rand.Rand
	run   string // makes keys of this run its own
	hosts *hosts // nil: no real containers
	n     int
	ids   []schemas.TaskID // the newest
}

// opTimeout bounds one request.
const opTimeout = 6 * time.Second

// transport makes a connection for each request: a gateway that is stopped must not
// hold those to the other.
var transport = &http.Transport{DisableKeepAlives: true}

func (c *client) drive(ctx context.Context) {
	for ctx.Err() == nil {
		switch p := c.rng.IntN(100); {
		case p < 45 || len(c.ids) == 0:
			c.create(ctx)
		case p < 68:
			c.get(c.pick(), c.gateway())
		case p < 82:
			c.one("cancel", http.MethodDelete, c.pick(), "", 0)
		case p < 94:
			ttl := time.Duration(3+c.rng.IntN(20)) * time.Second
			c.one("extend", http.MethodPost, c.pick(), "/extend", ttl)
		default:
			c.list(c.gateway())
		}
		sleep(ctx, time.Duration(20+c.rng.IntN(350))*time.Millisecond) // the pace of clients
	}
}

func (c *client) gateway() int { return c.rng.IntN(len(c.site.Gateway)) }

func (c *client) pick() schemas.TaskID { return c.ids[c.rng.IntN(len(c.ids))] }

// spec draws a task. All are over by themselves, by their TTL or by their queue timeout
// within half a minute. What no worker takes is given back until that.
func (c *client) spec(key string) map[string]any {
	code := c.rng.IntN(4) * c.rng.IntN(2)
	commands := [][]string{
		{"exit", fmt.Sprint(code)}, {"exit", "0"}, {"sleep", fmt.Sprintf("%dms", 200+c.rng.IntN(3000)), fmt.Sprint(code)},
		{"sleep", fmt.Sprintf("%dms", 1000+c.rng.IntN(14000)), fmt.Sprint(code)}, {"sleep"}, {"ignore-term"},
		{"ignore-term", fmt.Sprintf("%dms", c.rng.IntN(8000))}, {"term-exit", "0"}, {"log", fmt.Sprint(c.rng.IntN(300_000)), fmt.Sprintf("%dms", c.rng.IntN(5000))}, {"oom"},
		{"fail", "image"}, {"fail", "start"}, {"refuse"},
	}
	weights := []int{3, 3, 4, 5, 3, 2, 2, 2, 4, 1, 1, 1, 2}
	n := c.rng.IntN(33)
	i := 0
	for ; n >= weights[i]; i++ {
		n -= weights[i]
	}
	s := map[string]any{
		"image": "any", "command": commands[i], "ttl": fmt.Sprintf("%ds", 4+c.rng.IntN(20)), "max_attempts": 1 + c.rng.IntN(6),
		"timeouts": map[string]any{"stop": fmt.Sprintf("%dms", 100+c.rng.IntN(1500)), "queue": "30s"},
		"labels":   map[string]string{"key": key}, "resources": map[string]any{"cpus": 0.1, "memory": "16MiB"},
		"constraints": map[string]string{"engine": "fake"},
		"on_lost":     []string{"requeue", "requeue", "requeue", "requeue", "fail", "wait"}[c.rng.IntN(6)],
	}
	if commands[i][0] == "refuse" { // which no container can play
		s["timeouts"] = map[string]any{"queue": fmt.Sprintf("%ds", 4+c.rng.IntN(8))}
	} else if c.hosts != nil && c.rng.IntN(6) == 0 {
		c.hosts.real(s)
	}
	return s
}

// create makes a task, and asks again with the same key, through the gateways in turn,
// while the outcome is not known.
func (c *client) create(ctx context.Context) {
	c.n++
	key := fmt.Sprintf("%s-%s-%d", c.run, c.name, c.n)
	spec, g := c.spec(key), c.gateway()
	for try := range 12 {
		var task schemas.Task
		op := &Op{Name: "create", Key: key, Gateway: (g + try) % len(c.site.Gateway)}
		c.call(op, http.MethodPost, "/v1/tasks", spec, &task)
		if op.Outcome == OK {
			if c.ids = append(c.ids, task.ID); len(c.ids) > 10 {
				c.ids = c.ids[1:]
			}
			return
		}
		if op.Status >= 400 && op.Status < 500 && op.Status != http.StatusConflict {
			return
		}
		sleep(ctx, time.Duration(100+c.rng.IntN(900))*time.Millisecond)
		if ctx.Err() != nil {
			return
		}
	}
}

func (c *client) get(id schemas.TaskID, gateway int) (t schemas.Task, ok bool) {
	op := &Op{Name: "get", Task: id, Gateway: gateway}
	c.call(op, http.MethodGet, "/v1/tasks/"+string(id), nil, &t)
	return t, op.Outcome == OK
}

func (c *client) one(name, method string, id schemas.TaskID, path string, ttl time.Duration) {
	var body any
	if ttl > 0 {
		body = schemas.ExtendRequest{TTL: schemas.Duration(ttl)}
	}
	c.call(&Op{Name: name, Task: id, TTL: ttl, Gateway: c.gateway()}, method, "/v1/tasks/"+string(id)+path, body, new(schemas.Task))
}

// log reads the log of a final task's final attempt, as far as it is there.
func (c *client) log(ctx context.Context, r *schemas.Record, gateway int) error {
	var text string
	path := fmt.Sprintf("/v1/tasks/%s/logs?stream=stdout&attempt=%d", r.ID, r.Attempt)
	_, err := harness.Request(ctx, transport, http.MethodGet, c.site.Gateway[gateway].Addrs.HTTP+path, "", nil, &text)
	if err != nil {
		return err
	}
	good := 0
	for line := 0; good < len(text); line++ {
		want := fmt.Sprintf("o%062d\n", line)
		n := min(len(want), len(text)-good)
		if text[good:good+n] != want[:n] {
			break
		}
		good += n
	}
	c.rec.Add(Now(), Event{Log: &Log{Task: r.ID, Gateway: gateway, Bytes: int64(len(text)), Good: int64(good)}})
	return nil
}

// list reads all pages.
func (c *client) list(gateway int) *Op {
	op := &Op{Name: "list", Gateway: gateway, Began: Now(), Client: c.name, Outcome: OK}
	for cursor := ""; ; {
		var page schemas.TaskList
		ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
		_, err := harness.Request(ctx, transport, http.MethodGet, c.site.Gateway[gateway].Addrs.HTTP+"/v1/tasks?limit=100"+cursor, "", nil, &page)
		cancel()
		if err != nil {
			op.Outcome, op.Error = Failed, err.Error()
			break
		}
		for _, t := range page.Items {
			op.Tasks = append(op.Tasks, t.ID)
		}
		if page.NextCursor == "" {
			break
		}
		cursor = "&cursor=" + url.QueryEscape(page.NextCursor)
	}
	c.rec.Add(Now(), Event{Op: op})
	return op
}

func (c *client) call(op *Op, method, path string, in any, task *schemas.Task) {
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	op.Client, op.Began = c.name, Now()
	status, err := harness.Request(ctx, transport, method, c.site.Gateway[op.Gateway].Addrs.HTTP+path, op.Key, in, task)
	op.Status, op.Outcome = status, OK
	var e *schemas.Error
	switch {
	case err == nil:
		op.Task = task.ID
		op.Seen = &Seen{State: task.State, Attempt: task.Attempt, Revision: task.Revision, ExpiresAt: task.ExpiresAt}
	case errors.As(err, &e) && (e.Status < 500 || e.Code == schemas.CodeUnavailable):
		op.Outcome, op.Error = Failed, err.Error()
	default:
		op.Outcome, op.Error = Unknown, err.Error()
	}
	c.rec.Add(Now(), Event{Op: op})
}
