package client

import (
	"context"
	"crypto/rand"
	"fmt"
	"iter"
	"maps"
	"net/http"
	"net/url"
	"strconv"

	"dayfly.dev/schemas"
)

// Batch is many tasks asked for at once.
type Batch = schemas.BatchSpec

// BatchItem is what a task of a batch differs in from the template.
type BatchItem = schemas.BatchSpecItem

// CreateBatch asks for all tasks of a batch, or none if one of them is wrong. The key
// is that of CreateOptions.
func (c *Client) CreateBatch(ctx context.Context, b Batch, idempotencyKey string) (schemas.BatchStatus, error) {
	body, err := schemas.Encode(b)
	if err != nil {
		return schemas.BatchStatus{}, fmt.Errorf("encode batch: %w", err)
	}
	return c.CreateBatchRaw(ctx, body, idempotencyKey)
}

// CreateBatchRaw is CreateBatch with the JSON as it shall be sent.
func (c *Client) CreateBatchRaw(ctx context.Context, body []byte, idempotencyKey string) (s schemas.BatchStatus, err error) {
	if idempotencyKey == "" {
		idempotencyKey = "auto-" + rand.Text()
	}
	_, err = c.call(ctx, request{
		method: http.MethodPost, path: "/v1/batches", body: body, key: idempotencyKey, repeatable: true, wait: c.patience,
	}, &s)
	return s, err
}

// Batch gives a batch as it is.
func (c *Client) Batch(ctx context.Context, id schemas.BatchID) (s schemas.BatchStatus, err error) {
	_, err = c.call(ctx, request{method: http.MethodGet, path: batchPath(id, ""), repeatable: true}, &s)
	return s, err
}

// WatchBatch gives a batch as it is, and again whenever it has changed, until it is done
// or the caller stops. It asks again and again, at the longest pause of WithBackoff. It
// ends at the first error.
func (c *Client) WatchBatch(ctx context.Context, id schemas.BatchID) iter.Seq2[schemas.BatchStatus, error] {
	return func(yield func(schemas.BatchStatus, error) bool) {
		b := backoff{first: c.backoffFirst, most: c.backoffMost}
		var last schemas.BatchStatus
		for {
			s, err := c.Batch(ctx, id)
			if err != nil {
				yield(s, err)
				return
			}
			done := s.State == schemas.BatchDone
			if done || s.State != last.State || !maps.Equal(s.Counts, last.Counts) {
				last = s
				if !yield(s, nil) || done {
					return
				}
			}
			if err := sleep(ctx, b.next(nil)); err != nil {
				yield(s, err)
				return
			}
		}
	}
}

// WaitBatch waits until every item of a batch has its result, however long that takes.
func (c *Client) WaitBatch(ctx context.Context, id schemas.BatchID) (s schemas.BatchStatus, err error) {
	for s, err = range c.WatchBatch(ctx, id) {
		if err != nil {
			return s, err
		}
	}
	return s, nil
}

// BatchListOptions choose a page of batches.
type BatchListOptions struct {
	Limit  int    // of a page; the server's default if 0
	Cursor string // of the page before
}

// Batches gives one page of batches, newest first. Only the last page has no NextCursor.
func (c *Client) Batches(ctx context.Context, o BatchListOptions) (l schemas.BatchList, err error) {
	_, err = c.call(ctx, request{method: http.MethodGet, path: "/v1/batches", query: pageQuery(o.Limit, o.Cursor), repeatable: true}, &l)
	return l, err
}

// pageQuery asks for a page.
func pageQuery(limit int, cursor string) url.Values {
	q := url.Values{}
	if limit > 0 {
		q.Set("limit", strconv.Itoa(limit))
	}
	if cursor != "" {
		q.Set("cursor", cursor)
	}
	return q
}

// AllBatches gives the batches of all pages, newest first, fetching a page when it is
// needed. It ends at the first error.
func (c *Client) AllBatches(ctx context.Context, o BatchListOptions) iter.Seq2[schemas.BatchStatus, error] {
	return func(yield func(schemas.BatchStatus, error) bool) {
		for {
			l, err := c.Batches(ctx, o)
			if err != nil {
				yield(schemas.BatchStatus{}, err)
				return
			}
			for _, b := range l.Items {
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

// CancelBatch asks for the end of all tasks of a batch. It does not wait for the end.
func (c *Client) CancelBatch(ctx context.Context, id schemas.BatchID) (s schemas.BatchStatus, err error) {
	_, err = c.call(ctx, request{method: http.MethodDelete, path: batchPath(id, ""), repeatable: true}, &s)
	return s, err
}

// BatchItems gives the items of a batch by index, fetching a page when it is needed.
// It ends at the first error.
func (c *Client) BatchItems(ctx context.Context, id schemas.BatchID) iter.Seq2[schemas.BatchItem, error] {
	return func(yield func(schemas.BatchItem, error) bool) {
		q := url.Values{"limit": {"1000"}}
		for {
			var page schemas.BatchItemList
			_, err := c.call(ctx, request{method: http.MethodGet, path: batchPath(id, "/items"), query: q, repeatable: true}, &page)
			if err != nil {
				yield(schemas.BatchItem{}, err)
				return
			}
			for _, item := range page.Items {
				if !yield(item, nil) {
					return
				}
			}
			if page.NextCursor == "" {
				return
			}
			q.Set("cursor", page.NextCursor)
		}
	}
}

func batchPath(id schemas.BatchID, rest string) string {
	return "/v1/batches/" + url.PathEscape(string(id)) + rest
}
