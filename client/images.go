package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"

	"dayfly.dev/schemas"
)

// Images lists the images that workers shall hold and those that they have: of one worker
// if it is not "".
func (c *Client) Images(ctx context.Context, of schemas.WorkerID) (schemas.ImageList, error) {
	q := url.Values{}
	if of != "" {
		q.Set("worker", string(of))
	}
	var l schemas.ImageList
	_, err := c.call(ctx, request{method: http.MethodGet, path: "/v1/images", query: q, repeatable: true}, &l)
	return l, err
}

// WantImage lets workers hold an image before a task asks for it. It takes the place of what
// was asked for the image before, and does not wait until the workers have it.
func (c *Client) WantImage(ctx context.Context, w schemas.WantImage) (schemas.Image, error) {
	var i schemas.Image
	body, err := schemas.Encode(w)
	if err != nil {
		return i, fmt.Errorf("encode image: %w", err)
	}
	_, err = c.call(ctx, request{method: http.MethodPost, path: "/v1/images", body: body, repeatable: true}, &i)
	return i, err
}

// ReleaseImage ends what was asked for an image. Workers keep it until they need the room.
func (c *Client) ReleaseImage(ctx context.Context, image string) (schemas.Image, error) {
	var i schemas.Image
	_, err := c.call(ctx, request{method: http.MethodDelete, path: "/v1/images", query: url.Values{"image": {image}}}, &i)
	return i, err
}
