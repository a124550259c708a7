package client

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"

	"dayfly.dev/schemas"
)

// PutBlob stores the first size bytes of r as a blob. They are read for its name first, and
// again unless the server has it. made says that it was not there before. It is repeated.
func (c *Client) PutBlob(ctx context.Context, r io.ReaderAt, size int64) (info schemas.BlobInfo, made bool, err error) {
	sum := sha256.New()
	n, err := io.Copy(sum, io.NewSectionReader(r, 0, size))
	if err == nil && n < size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return info, false, fmt.Errorf("read a blob: %w", err)
	}
	id := schemas.BlobIDOf([sha256.Size]byte(sum.Sum(nil)))
	header := http.Header{}
	if size > 64<<10 { // a server that has it says so before anything is sent
		header.Set("Expect", "100-continue")
	}
	err = c.retry(ctx, true, func(ctx context.Context) error {
		resp, err := c.send(ctx, request{method: http.MethodPut, path: blobPath(id), stream: io.NewSectionReader(r, 0, size), kind: "application/octet-stream", size: size, header: header})
		if err != nil {
			return err
		}
		made = resp.StatusCode == http.StatusCreated
		return c.read(ctx, resp, &info)
	})
	return info, made, err
}

// HasBlob says whether the server has a blob.
func (c *Client) HasBlob(ctx context.Context, id schemas.BlobID) (has bool, err error) {
	err = c.retry(ctx, true, func(ctx context.Context) error {
		resp, err := c.send(ctx, request{method: http.MethodHead, path: blobPath(id), accept: "*/*"})
		var answer *schemas.Error
		if errors.As(err, &answer) && answer.Status == http.StatusNotFound {
			has = false
			return nil
		}
		if err == nil {
			has = true
			err = resp.Body.Close()
		}
		return err
	})
	return has, err
}

// GetBlob writes a blob to w, and verifies it. What was written before an error is not to
// be used.
func (c *Client) GetBlob(ctx context.Context, id schemas.BlobID, w io.Writer) (n int64, err error) {
	var body io.ReadCloser
	var size int64
	err = c.retry(ctx, true, func(ctx context.Context) error {
		resp, err := c.send(ctx, request{method: http.MethodGet, path: blobPath(id), accept: "*/*"})
		if err == nil {
			body, size = resp.Body, resp.ContentLength
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	defer body.Close()
	sum := sha256.New()
	n, err = io.Copy(io.MultiWriter(w, sum), body)
	switch {
	case err != nil:
		return n, fmt.Errorf("after %d of %d bytes: %w", n, size, err)
	case schemas.BlobIDOf([sha256.Size]byte(sum.Sum(nil))) != id:
		return n, fmt.Errorf("what came is not blob %s", id)
	}
	return n, nil
}

// BlobListOptions choose a page of blobs.
type BlobListOptions struct {
	Limit  int    // of a page; the server's default if 0
	Cursor string // of the page before
}

// Blobs gives one page of blobs, those first that were not used for longest. Only the last
// page has no NextCursor.
func (c *Client) Blobs(ctx context.Context, o BlobListOptions) (l schemas.BlobList, err error) {
	_, err = c.call(ctx, request{method: http.MethodGet, path: "/v1/blobs", query: pageQuery(o.Limit, o.Cursor), repeatable: true}, &l)
	return l, err
}

// AllBlobs gives the blobs of all pages, each once, fetching a page when it is needed. It
// ends at the first error.
func (c *Client) AllBlobs(ctx context.Context) iter.Seq2[schemas.BlobInfo, error] {
	return func(yield func(schemas.BlobInfo, error) bool) {
		seen := map[schemas.BlobID]struct{}{} // one that is used meanwhile comes again
		for o := (BlobListOptions{Limit: 1000}); ; {
			l, err := c.Blobs(ctx, o)
			if err != nil {
				yield(schemas.BlobInfo{}, err)
				return
			}
			for _, b := range l.Items {
				if _, known := seen[b.Blob]; known {
					continue
				}
				seen[b.Blob] = struct{}{}
				if !yield(b, nil) {
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

// RemoveBlob removes a blob that nothing needs; schemas.CodeInUse says that something does.
func (c *Client) RemoveBlob(ctx context.Context, id schemas.BlobID) (info schemas.BlobInfo, err error) {
	_, err = c.call(ctx, request{method: http.MethodDelete, path: blobPath(id), repeatable: true}, &info)
	return info, err
}

func blobPath(id schemas.BlobID) string { return "/v1/blobs/" + string(id) }
