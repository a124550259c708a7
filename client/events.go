package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// EventOptions choose which events are read, and from where.
type EventOptions struct {
	Task   schemas.TaskID // of one task, to its end; of all if empty
	Follow bool           // go on with what comes; else end with what there is

	After uint64 // begin behind the event with this ID; 0: with all that there is
	Now   bool   // begin with what is still to come, whatever After says

	States    []schemas.State   // any of these; all if empty
	Labels    map[string]string // all of these; not with Task
	HasLabels []string          // all of these, whatever their values; not with Task
	Worker    schemas.WorkerID  // not with Task
}

// Events reads the changes of tasks in the order in which they were written. A
// connection that breaks is made again, with any gateway behind the address, and goes on
// where it broke: no event comes twice and none is left out. To go on later, keep the ID
// of the last event. Reading ends with the first error, which comes with an empty event;
// the caller may stop at any time.
func (c *Client) Events(ctx context.Context, o EventOptions) iter.Seq2[schemas.TaskEvent, error] {
	return func(yield func(schemas.TaskEvent, error) bool) {
		r := &eventReader{client: c, options: o, last: "now"}
		if !o.Now {
			r.last = strconv.FormatUint(o.After, 10)
		}
		if err := r.read(ctx, yield); err != nil && !errors.Is(err, errStopped) {
			yield(schemas.TaskEvent{}, err)
		}
	}
}

type eventReader struct {
	client  *Client
	options EventOptions
	last    string // everything up to this event was handed out
}

func (r *eventReader) read(ctx context.Context, yield func(schemas.TaskEvent, error) bool) error {
	b := backoff{first: r.client.backoffFirst, most: r.client.backoffMost}
	began := time.Now()
	for {
		some, err := r.connection(ctx, yield)
		if err == nil || !transient(err, true) {
			return err
		}
		if some {
			b.n = 0
			began = time.Now()
		}
		pause := b.next(err)
		if time.Since(began)+pause > r.client.limit(err) {
			return err
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// connection reads over one connection; nil says that the events are at their end, some
// that the server was there.
func (r *eventReader) connection(ctx context.Context, yield func(schemas.TaskEvent, error) bool) (some bool, err error) {
	o := r.options
	q := filters(o.States, o.Labels, o.HasLabels, o.Worker)
	q.Set("after", r.last)
	if !o.Follow {
		q.Set("follow", "false")
	}
	path := "/v1/events"
	if o.Task != "" {
		path = taskPath(o.Task, "/events")
	}
	resp, err := r.client.send(ctx, request{method: http.MethodGet, path: path, query: q, accept: "text/event-stream"})
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNoContent {
		return true, nil
	}
	in := bufio.NewScanner(resp.Body)
	in.Buffer(nil, 1<<20)
	in.Split(wholeLines)
	id, kind, data := "", "", ""
	for in.Scan() {
		name, value, _ := strings.Cut(in.Text(), ": ")
		switch name {
		case "id":
			id = value
		case "event":
			kind = value
		case "data":
			data = value
		}
		if in.Text() != "" {
			continue
		}
		if kind == "end" {
			return true, nil
		}
		some = true
		if data != "" {
			var e schemas.TaskEvent
			if err := schemas.Decode([]byte(data), &e); err != nil {
				return true, fmt.Errorf("read events: the server sent one that is none")
			}
			if !yield(e, nil) {
				return true, errStopped
			}
		}
		if id != "" {
			r.last = id
		}
		id, kind, data = "", "", ""
	}
	if err := in.Err(); err != nil {
		return some, r.client.unreachable(ctx, err)
	}
	return some, r.client.unreachable(ctx, io.ErrUnexpectedEOF)
}
