package client

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strings"

	"dayfly.dev/schemas"
)

// Artifacts lists what a final task left in its output folder. While the task is not
// over it is CodeStateConflict.
func (c *Client) Artifacts(ctx context.Context, id schemas.TaskID) (list schemas.ArtifactList, err error) {
	_, err = c.call(ctx, request{method: http.MethodGet, path: taskPath(id, "/artifacts"), repeatable: true}, &list)
	return list, err
}

// Artifact reads one of them, by its path in the folder. An error other than io.EOF says
// that it is not whole. Close it. CodeArtifactLost: what is stored is not what was reported.
func (c *Client) Artifact(ctx context.Context, id schemas.TaskID, name string) (io.ReadCloser, error) {
	parts := strings.Split(name, "/")
	for i, p := range parts {
		parts[i] = url.PathEscape(p)
	}
	return c.download(ctx, request{method: http.MethodGet, path: taskPath(id, "/artifacts/"+strings.Join(parts, "/")), accept: "*/*"})
}

// ArtifactArchive reads all of them as a tar archive, in the folder "output". An archive
// without its end is not whole. Close it.
func (c *Client) ArtifactArchive(ctx context.Context, id schemas.TaskID) (io.ReadCloser, error) {
	return c.download(ctx, request{method: http.MethodGet, path: taskPath(id, "/artifacts"), query: url.Values{"archive": {"1"}}, accept: "*/*"})
}

func (c *Client) download(ctx context.Context, r request) (body io.ReadCloser, err error) {
	err = c.retry(ctx, true, func(ctx context.Context) error {
		resp, err := c.send(ctx, r)
		if err == nil {
			body = resp.Body
		}
		return err
	})
	return body, err
}
