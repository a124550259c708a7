package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"dayfly.dev/schemas"
)

// Exec runs a program beside the task's process and waits for its end, for which ctx may
// not wait: then the program is killed. It is not repeated.
func (c *Client) Exec(ctx context.Context, id schemas.TaskID, req schemas.ExecRequest) (schemas.ExecResult, error) {
	req.Background = false
	var res schemas.ExecResult
	err := c.execute(ctx, id, req, &res)
	return res, err
}

// Launch starts a program in the background.
func (c *Client) Launch(ctx context.Context, id schemas.TaskID, req schemas.ExecRequest) (schemas.Exec, error) {
	req.Background = true
	var started schemas.ExecStarted
	err := c.execute(ctx, id, req, &started)
	return started.Exec, err
}

func (c *Client) execute(ctx context.Context, id schemas.TaskID, req schemas.ExecRequest, into any) error {
	body, err := schemas.Encode(req)
	if err != nil {
		return fmt.Errorf("encode the program: %w", err)
	}
	return c.retry(ctx, false, func(ctx context.Context) error {
		resp, err := c.send(ctx, request{method: http.MethodPost, path: taskPath(id, "/exec"), body: body})
		if err != nil {
			return err
		}
		return c.read(ctx, resp, into)
	})
}

// read decodes an answer that may take as long as ctx.
func (c *Client) read(ctx context.Context, resp *http.Response, into any) error {
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return c.unreachable(ctx, err)
	}
	if err := schemas.Decode(b, into); err != nil {
		return fmt.Errorf("%s does not answer like dayfly; is the address right?", c.base)
	}
	return nil
}

// Execs lists the programs beside the task's process.
func (c *Client) Execs(ctx context.Context, id schemas.TaskID) (list schemas.ExecList, err error) {
	_, err = c.call(ctx, request{method: http.MethodGet, path: taskPath(id, "/execs"), repeatable: true}, &list)
	return list, err
}

// GetExec gives one of them, with the newest of what it wrote if it is in the background.
func (c *Client) GetExec(ctx context.Context, id schemas.TaskID, exec schemas.ExecID) (x schemas.Exec, err error) {
	_, err = c.call(ctx, request{method: http.MethodGet, path: taskPath(id, "/execs/"+url.PathEscape(string(exec))), repeatable: true}, &x)
	return x, err
}

// EndExec ends one of them: TERM, and KILL after the grace.
func (c *Client) EndExec(ctx context.Context, id schemas.TaskID, exec schemas.ExecID, grace time.Duration) error {
	q := url.Values{"grace": {schemas.Duration(grace).String()}}
	_, err := c.call(ctx, request{method: http.MethodDelete, path: taskPath(id, "/execs/"+url.PathEscape(string(exec))), query: q, repeatable: true}, nil)
	return err
}
