package gateway

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway/ui"
)

// methods are the operations of one path. GET brings HEAD with it.
type methods map[string]*operation

// response is the answer under way.
type response struct {
	http.ResponseWriter
	id     string   // of the request
	route  string   // for metrics: the pattern, never the path
	names  []string // the parameters that the query may have
	trace  string   // W3C traceparent: what is done for the request belongs below it
	status int
	wrote  bool
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *response) WriteHeader(status int) {
	if !w.wrote {
		w.wrote, w.status = true, status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(b []byte) (int, error) {
	if !w.wrote {
		w.wrote, w.status = true, http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// Handler is the API.
func (g *Gateway) Handler() http.Handler {
	return g.guard(g.router(append(operations(), pages()...), g.route("none", nil)))
}

// connecting is the handler while there is no connection yet: whatever is asked for is
// not available, and pages say so in their own way.
func (g *Gateway) connecting() http.Handler {
	var known []operation
	for _, o := range pages() {
		if strings.HasPrefix(o.path, "/ui/") && o.path != assetPath {
			o.handle = drawn(func(*Gateway, *response, *http.Request, ui.Frame) (any, error) { return nil, unavailable() })
		}
		known = append(known, o)
	}
	next := g.router(known, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.fail(w.(*response), r, unavailable())
	}))
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w := newResponse(rw, r)
		if !g.hosts.Ours(r) {
			g.fail(w, r, unknownHost())
			return
		}
		next.ServeHTTP(w, r)
	})
}

// router sends each request to its operation, and what is none to otherwise.
func (g *Gateway) router(all []operation, otherwise http.Handler) http.Handler {
	mux := http.NewServeMux()
	paths := map[string]methods{}
	for _, o := range all {
		if paths[o.path] == nil {
			paths[o.path] = methods{}
		}
		paths[o.path][o.method] = &o
	}
	for path, m := range paths {
		pattern := path
		if strings.HasSuffix(path, "/") {
			pattern += "{$}"
		}
		mux.Handle(pattern, g.route(path, m))
	}
	mux.Handle("/", otherwise)
	return mux
}

// fromElsewhere tells what a browser sends for a page of another site, by Sec-Fetch-Site
// or by Origin, where it could change something. Others than browsers send neither.
var fromElsewhere = http.NewCrossOriginProtection()

// guard does for every request what does not depend on its path, and lets only such
// paths through to next that it takes as they are.
func (g *Gateway) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w := newResponse(rw, r)
		h := w.Header()
		start := time.Now()
		g.metrics.inFlight.Inc()
		defer func() {
			g.metrics.inFlight.Dec()
			p := recover()
			if p != nil {
				p = g.panicked(w, r, p)
			}
			g.metrics.requests.WithLabelValues(w.route, methodLabel(r.Method), codeClass(w.status)).Observe(time.Since(start).Seconds())
			if p != nil {
				panic(p)
			}
		}()
		switch {
		case !g.hosts.Ours(r):
			g.fail(w, r, unknownHost())
		case r.Method == http.MethodOptions && r.URL.Path == "*":
			h.Set("Allow", "DELETE, GET, HEAD, OPTIONS, POST, PUT")
			w.WriteHeader(http.StatusNoContent)
		case !plainPath(r.URL.EscapedPath()):
			g.fail(w, r, noPath())
		case fromElsewhere.Check(r) != nil:
			g.fail(w, r, crossOrigin())
		default:
			next.ServeHTTP(w, r)
		}
	})
}

func unknownHost() *schemas.Error {
	return &schemas.Error{Status: http.StatusMisdirectedRequest, Code: schemas.CodeUnknownHost,
		Detail: "this gateway does not answer under that name; dayfly gateway and dayfly up take more names with --host"}
}

func crossOrigin() *schemas.Error {
	return &schemas.Error{Status: http.StatusForbidden, Code: schemas.CodeCrossOrigin,
		Detail: "a page of another site asked for this; only pages of this one may"}
}

// newResponse begins the answer to a request.
func newResponse(rw http.ResponseWriter, r *http.Request) *response {
	w := &response{ResponseWriter: rw, id: requestID(r), route: "none"}
	h := w.Header()
	h.Set("X-Request-Id", w.id)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	return w
}

// route sends a request to the handler of its method.
func (g *Gateway) route(pattern string, m methods) http.Handler {
	allow := []string{http.MethodOptions}
	for method := range m {
		allow = append(allow, method)
	}
	if m["GET"] != nil {
		allow = append(allow, http.MethodHead)
	}
	slices.Sort(allow)
	allowed := strings.Join(allow, ", ")
	spans := map[string]string{} // their names, by method
	for method, o := range m {
		if o.name != "" {
			spans[method] = method + " " + pattern
		}
	}
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w := rw.(*response)
		w.route = pattern
		method := r.Method
		if method == http.MethodHead {
			method = http.MethodGet
		}
		o := m[method]
		var err error
		switch {
		case m == nil:
			err = noPath()
		case o != nil:
			w.names = o.names()
			if parent := r.Header.Get("Traceparent"); parent != "" {
				w.trace = tracing.Parse(parent)
			}
			if name := spans[method]; name != "" && g.tracer != nil {
				span := g.tracer.Start(w.trace, name, tracing.Server)
				w.trace = span.Traceparent()
				defer func() { w.traced(span) }()
			}
			err = o.handle(g, w, r)
		case method == http.MethodOptions:
			w.Header().Set("Allow", allowed)
			w.WriteHeader(http.StatusNoContent)
		default:
			w.Header().Set("Allow", allowed)
			err = &schemas.Error{Status: http.StatusMethodNotAllowed, Code: schemas.CodeMethod, Detail: "this path takes " + allowed}
		}
		if err != nil {
			g.fail(w, r, err)
		}
	})
}

// traced ends the span of a request. Its parameters are nobody's business.
func (w *response) traced(span tracing.Span) {
	span.Set("dayfly.request", w.id)
	span.SetInt("http.response.status_code", w.status)
	var err error
	if w.status >= http.StatusInternalServerError {
		err = errors.New(http.StatusText(w.status))
	}
	span.End(err)
}

// plainPath refuses what ServeMux would redirect: empty segments, "." and "..".
func plainPath(path string) bool {
	if !strings.HasPrefix(path, "/") {
		return false
	}
	if path == "/" || path == "/docs/" || path == "/ui/" {
		return true
	}
	for segment := range strings.SplitSeq(path[1:], "/") {
		if segment == "" || segment == "." || segment == ".." {
			return false
		}
	}
	return true
}

// requestID takes the client's id, if that is a plain word, or makes one.
func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	if len(id) == 0 || len(id) > 64 || strings.Trim(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") != "" {
		return "r-" + strings.ToLower(rand.Text()[:16])
	}
	return id
}

// panicked turns a panic into a 500, or gives back what must go on to the server so
// that it cuts the connection. The value of the panic may hold what a client sent,
// so only what the runtime itself says is logged.
func (g *Gateway) panicked(w *response, r *http.Request, p any) any {
	if p == http.ErrAbortHandler {
		return p
	}
	what := fmt.Sprintf("%T", p)
	if e, ok := p.(runtime.Error); ok {
		what = e.Error()
	}
	g.metrics.panics.Inc()
	g.log.Error().Str("route", w.route).Str("request", w.id).Str("panic", what).Bytes("stack", debug.Stack()).Msg("request panicked")
	if w.wrote {
		return http.ErrAbortHandler
	}
	g.fail(w, r, &schemas.Error{Status: http.StatusInternalServerError, Code: schemas.CodeInternal,
		Detail: "something went wrong on our side; the request id finds it in the log"})
	return nil
}

func methodLabel(method string) string {
	switch method {
	case "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS":
		return method
	}
	return "other"
}

func codeClass(status int) string {
	if status < 100 || status > 599 {
		return "none"
	}
	return string(rune('0'+status/100)) + "xx"
}

// upToDate waits a moment for the views to be complete after the start.
func (g *Gateway) upToDate(ctx context.Context) error {
	if err := g.reach(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, g.cfg.OpTimeout)
	defer cancel()
	for _, ready := range g.views() {
		select {
		case <-ready:
		case <-ctx.Done():
			return unavailable()
		}
	}
	return nil
}

// readBody takes a JSON body of bounded size within bounded time.
func readBody(w *response, r *http.Request) ([]byte, error) {
	if err := checkContentType(r.Header); err != nil {
		return nil, err
	}
	tooLarge := &schemas.Error{Status: http.StatusRequestEntityTooLarge, Code: schemas.CodeTooLarge,
		Detail: fmt.Sprintf("the body must be at most %s", schemas.Size(schemas.MaxBodyBytes))}
	if r.ContentLength > schemas.MaxBodyBytes {
		return nil, tooLarge
	}
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(bodyTimeout))
	body, err := readAll(http.MaxBytesReader(w, r.Body, schemas.MaxBodyBytes), r.ContentLength)
	_ = control.SetReadDeadline(time.Time{})
	if err != nil {
		return nil, bodyError(err, tooLarge)
	}
	return body, nil
}

// bodyError is what a client hears of a body that could not be read.
func bodyError(err error, tooLarge *schemas.Error) *schemas.Error {
	var over *http.MaxBytesError
	var timeout interface{ Timeout() bool }
	switch {
	case errors.As(err, &over):
		return tooLarge
	case errors.As(err, &timeout) && timeout.Timeout():
		return &schemas.Error{Status: http.StatusRequestTimeout, Code: schemas.CodeInvalidJSON, Detail: "the body did not come in time"}
	}
	return &schemas.Error{Status: http.StatusBadRequest, Code: schemas.CodeInvalidJSON, Detail: "the body could not be read to its end"}
}

const bodyTimeout = 20 * time.Second
