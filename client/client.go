// Package client is the Go client of dayfly's HTTP API.
//
//	c, err := client.New("http://127.0.0.1:8080")
//	task, err := c.Create(ctx, schemas.Spec{Image: "busybox", Command: []string{"echo", "hi"}}, client.CreateOptions{})
//	for line, err := range c.Logs(ctx, task.ID, client.LogOptions{Follow: true}) { … }
//	task, err = c.Wait(ctx, task.ID)
//
// What the API refuses comes back as a *schemas.Error (errors.As), told apart by its
// code: errors.Is(err, schemas.CodePrecondition). A server that cannot be reached as an *UnreachableError. Calls that may
// be repeated without harm are repeated, with growing pauses, for as long as
// WithRetryFor says and the context allows.
package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// Client speaks to one dayfly gateway, or to several behind one address. It may be
// used from several goroutines.
type Client struct {
	base      string // without a slash at its end
	http      *http.Client
	userAgent string

	retryFor     time.Duration // how long a call is repeated; 0: never
	connectFor   time.Duration // the same for calls that never got there, if shorter
	backoffFirst time.Duration
	backoffMost  time.Duration
	patience     time.Duration // how long an answer may take, beyond what the call asks the server to wait
}

// Option changes how a Client works.
type Option func(*Client)

// WithHTTPClient replaces the HTTP client. It must have no Timeout of its own: logs
// are followed for as long as a task lives.
func WithHTTPClient(h *http.Client) Option { return func(c *Client) { c.http = h } }

// WithUserAgent names the program to the server.
func WithUserAgent(name string) Option { return func(c *Client) { c.userAgent = name } }

// WithRetryFor says how long a call is repeated while the server is away; 0 means
// that it is tried once. The default is 15 s. The context bounds it too.
func WithRetryFor(d time.Duration) Option { return func(c *Client) { c.retryFor = d } }

// WithConnectFor says how long a call is repeated while nothing listens at the
// server's address, if that is shorter: a person at a terminal rather hears soon that
// the address is wrong.
func WithConnectFor(d time.Duration) Option { return func(c *Client) { c.connectFor = d } }

// WithBackoff sets the first and the longest pause between two tries.
func WithBackoff(first, most time.Duration) Option {
	return func(c *Client) { c.backoffFirst, c.backoffMost = first, most }
}

// New makes a client of the API at baseURL, such as "http://127.0.0.1:8080". It
// does not connect yet.
func New(baseURL string, opts ...Option) (*Client, error) {
	u, err := url.Parse(baseURL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("the address of dayfly must look like http://127.0.0.1:8080, not %q", baseURL)
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("the address of dayfly must end with its path, but %q has more", baseURL)
	}
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.DialContext = (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 10 * time.Second}).DialContext
	t.MaxIdleConnsPerHost = 64
	c := &Client{
		base: strings.TrimRight(u.String(), "/"), http: &http.Client{Transport: t}, userAgent: "dayfly-client",
		retryFor: 15 * time.Second, connectFor: math.MaxInt64, backoffFirst: 100 * time.Millisecond, backoffMost: 3 * time.Second,
		patience: 20 * time.Second,
	}
	return c.With(opts...), nil
}

// With gives a client that shares the connections of c and differs by opts.
func (c *Client) With(opts ...Option) *Client {
	d := *c
	for _, o := range opts {
		o(&d)
	}
	return &d
}

// URL is the address that the client speaks to.
func (c *Client) URL() string { return c.base }

// UnreachableError says that no answer came from the server.
type UnreachableError struct {
	URL string
	Err error
}

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("cannot reach dayfly at %s: %v", e.URL, e.Err)
}

// Unwrap gives the connection's error.
func (e *UnreachableError) Unwrap() error { return e.Err }

// request is one call of the API.
type request struct {
	method string
	path   string
	query  url.Values
	body   []byte
	stream io.Reader // the body instead, of the media type kind; size is -1 if nobody knows it
	kind   string
	size   int64
	accept string
	header http.Header // beside the usual ones
	key    string      // Idempotency-Key
	// repeatable: doing it twice is the same as doing it once.
	repeatable bool
	// wait is how long the server was asked to hold the answer back.
	wait time.Duration
	// status takes that of the answer. May be nil.
	status *int
}

// call does a request, repeating it where that is safe, and decodes its answer.
func (c *Client) call(ctx context.Context, r request, into any) (http.Header, error) {
	var header http.Header
	err := c.retry(ctx, r.repeatable, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeoutCause(ctx, r.wait+c.patience, errSilent)
		defer cancel()
		resp, err := c.send(ctx, r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return c.unreachable(ctx, err)
		}
		header = resp.Header
		if r.status != nil {
			*r.status = resp.StatusCode
		}
		if into == nil {
			return nil
		}
		if err := schemas.Decode(body, into); err != nil {
			return fmt.Errorf("%s does not answer like dayfly (%s %s); is the address right?", c.base, r.method, r.path)
		}
		return nil
	})
	return header, err
}

var errSilent = errors.New("no answer in time")

// send does a request once. The caller closes the body of the answer, which is one
// of success; any other is an error.
func (c *Client) send(ctx context.Context, r request) (*http.Response, error) {
	u := c.base + r.path
	if len(r.query) > 0 {
		u += "?" + r.query.Encode()
	}
	var body io.Reader = bytes.NewReader(r.body)
	if r.stream != nil {
		body = io.NopCloser(r.stream) // whoever gave it closes it
	}
	req, err := http.NewRequestWithContext(ctx, r.method, u, body)
	if err != nil {
		return nil, err
	}
	if r.stream != nil {
		req.ContentLength = r.size
		if r.size == 0 {
			req.Body = http.NoBody
		}
		req.Header.Set("Content-Type", r.kind)
		req.Header.Set("Expect", "100-continue") // it may be refused unread
	}
	maps.Copy(req.Header, r.header)
	req.Header.Set("User-Agent", c.userAgent)
	if r.accept == "" {
		r.accept = "application/json"
	}
	req.Header.Set("Accept", r.accept)
	if r.body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if r.key != "" {
		req.Header.Set("Idempotency-Key", r.key)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, problem(resp)
}

// unreachable wraps what went wrong below HTTP, unless the caller's own context did.
func (c *Client) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		if cause := context.Cause(ctx); cause != errSilent {
			return cause
		}
		err = errSilent
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // without method and address, which the caller says
	}
	return &UnreachableError{URL: c.base, Err: err}
}

// problem reads an answer that is not one of success.
func problem(resp *http.Response) *schemas.Error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 256<<10))
	e := new(schemas.Error)
	if err := schemas.Decode(body, e); err != nil || e.Code == "" {
		code := schemas.CodeInternal
		switch resp.StatusCode {
		case http.StatusNotFound:
			code = schemas.CodeNotFound
		case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			code = schemas.CodeUnknownOutcome // of a proxy before dayfly: who knows
		case http.StatusTooManyRequests:
			code = schemas.CodeTooManyRequests
		}
		e = &schemas.Error{Code: code, Detail: "the server answered " + resp.Status}
	}
	e.Status = resp.StatusCode
	if e.RetryAfter == 0 {
		if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n >= 0 {
			e.RetryAfter = schemas.Duration(time.Duration(n) * time.Second)
		}
	}
	if e.RequestID == "" {
		e.RequestID = resp.Header.Get("X-Request-Id")
	}
	return e
}

// retry calls try until it succeeds, fails for good, or retryFor is over.
func (c *Client) retry(ctx context.Context, repeatable bool, try func(context.Context) error) error {
	b := backoff{first: c.backoffFirst, most: c.backoffMost}
	began := time.Now()
	for {
		err := try(ctx)
		if err == nil || !transient(err, repeatable) {
			return err
		}
		pause := b.next(err)
		if time.Since(began)+pause > c.limit(err) {
			return err
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// limit is how long a call that ends with err is repeated.
func (c *Client) limit(err error) time.Duration {
	if neverSent(err) {
		return min(c.connectFor, c.retryFor)
	}
	return c.retryFor
}

// neverSent says whether no connection was made at all.
func neverSent(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}

// transient says whether trying again may help and cannot do the same thing twice.
func transient(err error, repeatable bool) bool {
	var u *UnreachableError
	if errors.As(err, &u) {
		return repeatable || neverSent(err)
	}
	var e *schemas.Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Code {
	case schemas.CodeUnavailable, schemas.CodeTooManyRequests: // nothing was done
		return true
	case schemas.CodeUnknownOutcome, schemas.CodeInProgress:
		return repeatable
	}
	return repeatable && (e.Status == 502 || e.Status == 503 || e.Status == 504)
}

// backoff gives growing, jittered pauses, and at least what the server asks for.
type backoff struct {
	first, most time.Duration
	n           int
}

func (b *backoff) next(err error) time.Duration {
	d := min(b.most, b.first<<min(b.n, 16))
	b.n++
	d = d/2 + rand.N(d/2+1)
	var e *schemas.Error
	if errors.As(err, &e) {
		d = max(d, e.RetryAfter.Std())
	}
	return d
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
