package client

import (
	"context"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// Instance is the one task of a template for an owner.
type Instance = schemas.Instance

// StartOptions say what a new instance gets, and what the call waits for, as in
// CreateOptions.
type StartOptions struct {
	Values  map[string]string // by the names that the template gives them
	TTL     time.Duration     // the template's if 0
	Wait    Until             // UntilRunning or UntilReady
	Timeout time.Duration
}

// StartInstance gives the instance of the template that the owner has. created says that
// it was made just now; else it is the one that there was, and values and TTL changed
// nothing. It may be called again and again.
func (c *Client) StartInstance(ctx context.Context, template, owner string, o StartOptions) (i Instance, created bool, err error) {
	body, err := schemas.Encode(schemas.InstanceRequest{Values: o.Values, TTL: schemas.Duration(o.TTL)})
	if err != nil {
		return i, false, fmt.Errorf("encode request: %w", err)
	}
	q := url.Values{}
	wait(q, o.Wait, o.Timeout)
	h, err := c.call(ctx, request{method: http.MethodPut, path: instancePath(template, owner), query: q, body: body, repeatable: true,
		wait: max(hold(o.Wait, o.Timeout), endingHold)}, &i)
	return i, err == nil && h.Get("Location") != "", err
}

// endingHold is how long a server may wait for the end of the instance before.
const endingHold = 15 * time.Second

// Instance gives an owner's instance as it is, or as it has become while waiting.
func (c *Client) Instance(ctx context.Context, template, owner string, o GetOptions) (i Instance, err error) {
	q := url.Values{}
	wait(q, o.Wait, o.Timeout)
	_, err = c.call(ctx, request{method: http.MethodGet, path: instancePath(template, owner), query: q, repeatable: true, wait: hold(o.Wait, o.Timeout)}, &i)
	return i, err
}

// RenewInstance moves the deadline of an instance to ttl from now, to its own ttl if that
// is 0. It is not repeated where its outcome is unknown: it may have cost a renewal.
func (c *Client) RenewInstance(ctx context.Context, template, owner string, ttl time.Duration) (i Instance, err error) {
	body, err := schemas.Encode(schemas.RenewRequest{Renew: ttl == 0, TTL: schemas.Duration(ttl)})
	if err != nil {
		return i, fmt.Errorf("encode request: %w", err)
	}
	_, err = c.call(ctx, request{method: http.MethodPatch, path: instancePath(template, owner), body: body}, &i)
	return i, err
}

// EndInstance ends an owner's instance; grace is that of Cancel. It does not wait for the
// end.
func (c *Client) EndInstance(ctx context.Context, template, owner string, grace *time.Duration) (i Instance, err error) {
	q := url.Values{}
	if grace != nil {
		q.Set("grace", schemas.Duration(*grace).String())
	}
	_, err = c.call(ctx, request{method: http.MethodDelete, path: instancePath(template, owner), query: q, repeatable: true}, &i)
	return i, err
}

// InstanceListOptions choose instances.
type InstanceListOptions struct {
	Template, Owner string // "": any
	Limit           int    // of a page; the server's default if 0
	Cursor          string // of the page before
}

// Instances gives a page of instances.
func (c *Client) Instances(ctx context.Context, o InstanceListOptions) (l schemas.InstanceList, err error) {
	q := url.Values{}
	for name, v := range map[string]string{"template": o.Template, "owner": o.Owner, "cursor": o.Cursor} {
		if v != "" {
			q.Set(name, v)
		}
	}
	if o.Limit > 0 {
		q.Set("limit", strconv.Itoa(o.Limit))
	}
	_, err = c.call(ctx, request{method: http.MethodGet, path: "/v1/instances", query: q, repeatable: true}, &l)
	return l, err
}

// AllInstances gives all instances, page by page. It ends at the first error.
func (c *Client) AllInstances(ctx context.Context, o InstanceListOptions) iter.Seq2[Instance, error] {
	return func(yield func(Instance, error) bool) {
		for {
			page, err := c.Instances(ctx, o)
			if err != nil {
				yield(Instance{}, err)
				return
			}
			for _, i := range page.Items {
				if !yield(i, nil) {
					return
				}
			}
			if o.Cursor = page.NextCursor; o.Cursor == "" {
				return
			}
		}
	}
}

// Templates gives the operator's templates, and what is wrong with their files.
func (c *Client) Templates(ctx context.Context) (l schemas.TemplateList, err error) {
	_, err = c.call(ctx, request{method: http.MethodGet, path: "/v1/templates", repeatable: true}, &l)
	return l, err
}

// Template gives one of them.
func (c *Client) Template(ctx context.Context, name string) (t schemas.TemplateView, err error) {
	_, err = c.call(ctx, request{method: http.MethodGet, path: "/v1/templates/" + url.PathEscape(name), repeatable: true}, &t)
	return t, err
}

// instancePath is where an instance is. A name of dots alone would mean a folder.
func instancePath(template, owner string) string {
	escape := func(s string) string {
		if strings.Trim(s, ".") == "" {
			return strings.ReplaceAll(s, ".", "%2E")
		}
		return url.PathEscape(s)
	}
	return "/v1/instances/" + escape(template) + "/" + escape(owner)
}
