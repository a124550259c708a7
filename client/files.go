package client

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"

	"dayfly.dev/schemas"
)

// PutFile writes the file at path in the task: r's bytes, size of them or -1 if nobody
// knows how many. It is there as a whole or not at all. It is not repeated.
func (c *Client) PutFile(ctx context.Context, id schemas.TaskID, path string, r io.Reader, size int64, mode fs.FileMode) (schemas.FilesDone, error) {
	q := url.Values{"path": {path}}
	if m := mode.Perm(); m != 0 {
		q.Set("mode", fmt.Sprintf("%o", m))
	}
	return c.put(ctx, id, request{query: q, stream: r, kind: "application/octet-stream", size: size})
}

// PutArchive unpacks a tar archive into the folder at path in the task: all of it or
// nothing. It is not repeated.
func (c *Client) PutArchive(ctx context.Context, id schemas.TaskID, path string, archive io.Reader) (schemas.FilesDone, error) {
	return c.put(ctx, id, request{query: url.Values{"path": {path}}, stream: archive, kind: "application/x-tar", size: -1})
}

func (c *Client) put(ctx context.Context, id schemas.TaskID, r request) (done schemas.FilesDone, err error) {
	r.method, r.path = http.MethodPut, taskPath(id, "/files")
	resp, err := c.send(ctx, r)
	if err != nil {
		return done, err
	}
	return done, c.read(ctx, resp, &done)
}

// Download is a file of a task, or a folder.
type Download struct {
	io.ReadCloser       // the file's bytes, or a tar archive; an error other than io.EOF says that it is not whole
	Archive       bool  // it is a folder
	Size          int64 // of a file

	resp *http.Response
}

// Skipped says what a folder's archive lacks, once it was read to its end.
func (d *Download) Skipped() (s schemas.FilesSkipped) {
	_ = schemas.Decode([]byte(d.resp.Trailer.Get("Dayfly-Skipped")), &s)
	return s
}

// GetFiles reads the file or folder at path in the task. Close it.
func (c *Client) GetFiles(ctx context.Context, id schemas.TaskID, path string) (*Download, error) {
	var d *Download
	err := c.retry(ctx, true, func(ctx context.Context) error {
		resp, err := c.send(ctx, request{method: http.MethodGet, path: taskPath(id, "/files"), query: url.Values{"path": {path}}, accept: "*/*"})
		if err == nil {
			d = &Download{ReadCloser: resp.Body, Archive: resp.Header.Get("Content-Type") == "application/x-tar", Size: resp.ContentLength, resp: resp}
		}
		return err
	})
	return d, err
}

// ListFiles says what is in a folder of the task.
func (c *Client) ListFiles(ctx context.Context, id schemas.TaskID, path string) (list schemas.FileList, err error) {
	_, err = c.call(ctx, request{method: http.MethodGet, path: taskPath(id, "/files"), query: url.Values{"path": {path}, "list": {"1"}}, repeatable: true}, &list)
	return list, err
}

// DeleteFiles deletes a file of the task, or a folder: with what is in it if recursive.
func (c *Client) DeleteFiles(ctx context.Context, id schemas.TaskID, path string, recursive bool) (done schemas.FilesDone, err error) {
	q := url.Values{"path": {path}}
	if recursive {
		q.Set("recursive", "1")
	}
	_, err = c.call(ctx, request{method: http.MethodDelete, path: taskPath(id, "/files"), query: q}, &done)
	return done, err
}
