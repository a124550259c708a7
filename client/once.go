package client

import (
	"context"
	"fmt"
	"net/http"

	"dayfly.dev/schemas"
)

// CreateOnce is Create with a key of the caller's; again says that the task was there
// before: the key had made it within the last 24 h, or this very call did before its
// answer was lost.
func (c *Client) CreateOnce(ctx context.Context, spec schemas.Spec, key string) (t schemas.Task, again bool, err error) {
	body, err := schemas.Encode(spec)
	if err != nil {
		return t, false, fmt.Errorf("encode spec: %w", err)
	}
	h, err := c.call(ctx, request{method: http.MethodPost, path: "/v1/tasks", body: body, key: key, repeatable: true}, &t)
	return t, h.Get("Idempotency-Replayed") == "true", err
}
