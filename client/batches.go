package client

import (
	"context"
	"crypto/rand"
	"fmt"
	"iter"
	"net/http"
	"net/url"

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
