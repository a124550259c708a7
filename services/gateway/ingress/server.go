package ingress

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	stdlog "log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/schemas"
)

// Router knows the tasks.
type Router interface {
	// Find gives the target of the first label of a hostname. Why there is none now is a
	// *schemas.Error.
	Find(ctx context.Context, label string) (Target, error)
	// Enter counts a request to the task until leave is called, or refuses it.
	Enter(task schemas.TaskID) (leave func(), err error)
	// Dial connects to a port of the task.
	Dial(ctx context.Context, task schemas.TaskID, port int) (net.Conn, error)
}

// Target is a port of a task that runs.
type Target struct {
	Task     schemas.TaskID
	Port     int
	Protocol schemas.Protocol // http or h2c
	// Life changes when connections to the task cannot have outlived something: those that
	// are kept for further requests are then not used any more.
	Life string
}

// Config of a Server. The zero value works, for the domain "localhost".
type Config struct {
	Domain            string // of hostnames: LABEL.Domain
	TrustedProxies    []netip.Prefix
	PassAuthorization bool
	PrivateCookies    []string // of the platform; tasks do not get them

	HeaderWithin time.Duration // how long a client may take for the head of a request, 10 s
	Idle         time.Duration // how long a connection may be without a request, 1 min
	Stall        time.Duration // how long one side may let a transfer stand still, 1 min
	MaxHeader    int           // bytes of the head of a request, 64 KiB
	MaxConns     int           // connections of clients at a time, 8192; more wait
}

func (c Config) withDefaults() Config {
	c.Domain = strings.ToLower(cmp.Or(c.Domain, "localhost"))
	c.HeaderWithin = cmp.Or(c.HeaderWithin, 10*time.Second)
	c.Idle = cmp.Or(c.Idle, time.Minute)
	c.Stall = cmp.Or(c.Stall, time.Minute)
	c.MaxHeader = cmp.Or(c.MaxHeader, 64<<10)
	c.MaxConns = cmp.Or(c.MaxConns, 8192)
	return c
}

// Server is the ingress of one gateway.
type Server struct {
	cfg     Config
	router  Router
	log     zerolog.Logger
	metrics *Metrics
	pages   pages
	proxy   *httputil.ReverseProxy
	over    transports
}

// New makes a server. Close it in the end.
func New(cfg Config, router Router, log zerolog.Logger, metrics *Metrics) *Server {
	s := &Server{cfg: cfg.withDefaults(), router: router, log: log, metrics: metrics, pages: newPages()}
	s.over = newTransports(s.dial)
	s.proxy = &httputil.ReverseProxy{
		Rewrite: s.rewrite, Transport: s.over, ModifyResponse: modifyResponse, ErrorHandler: s.failed,
		FlushInterval: -1, BufferPool: buffers{},
		ErrorLog: stdlog.New(debugLog{log}, "", 0),
	}
	return s
}

// Close drops the connections to tasks that are kept for further requests.
func (s *Server) Close() { s.over.close() }

// Serve answers on ln until ctx ends. With a certificate it speaks TLS. Whoever is being
// answered then is cut off.
func (s *Server) Serve(ctx context.Context, ln net.Listener, cert *Certificate) error {
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler: s, Protocols: protocols, ReadHeaderTimeout: s.cfg.HeaderWithin, IdleTimeout: s.cfg.Idle, MaxHeaderBytes: s.cfg.MaxHeader,
		BaseContext: func(net.Listener) context.Context { return base }, DisableGeneralOptionsHandler: true,
		ErrorLog: stdlog.New(debugLog{s.log}, "", 0),
	}
	guarded := s.guard(ln)
	served := make(chan error, 1)
	go func() {
		if cert == nil {
			served <- server.Serve(guarded)
			return
		}
		server.TLSConfig = &tls.Config{GetCertificate: cert.get, MinVersion: tls.VersionTLS12}
		served <- server.ServeTLS(guarded, "", "")
	}()
	var err error
	select {
	case err = <-served:
	case <-ctx.Done():
		cancel()
		err = server.Close()
		<-served
	}
	guarded.wait()
	return err
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	start := time.Now()
	w := &response{ResponseWriter: rw}
	if r.ProtoMajor == 2 {
		w.stall = s.cfg.Stall
	}
	defer func() {
		p := recover()
		class := codeClass(w.status)
		if p != nil && !w.wrote {
			class = "none"
		}
		began := w.began
		if began.IsZero() {
			began = time.Now()
		}
		s.metrics.Requests.WithLabelValues(class).Observe(began.Sub(start).Seconds())
		if p != nil {
			panic(p) // the server cuts the connection
		}
	}()
	if err := s.serve(w, r); err != nil {
		s.refuse(w, r, err)
	}
}

func (s *Server) serve(w *response, r *http.Request) error {
	if r.Method == http.MethodConnect || r.Method == http.MethodTrace || r.URL.User != nil {
		return &schemas.Error{Status: http.StatusBadRequest, Code: schemas.CodeMethod, Detail: "such a request cannot be handed on"}
	}
	label, ok := labelOf(r.Host, s.cfg.Domain)
	if !ok {
		return noSuchHost()
	}
	target, err := s.router.Find(r.Context(), label)
	if err != nil {
		return err
	}
	leave, err := s.router.Enter(target.Task)
	if err != nil {
		return err
	}
	defer leave()
	if r.Body != nil && r.Body != http.NoBody {
		w.body = pace(w, r.Body, s.cfg.Stall)
		defer w.body.leave()
		r.Body = w.body
	}
	s.proxy.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), targetKey{}, target)))
	return nil
}

func noSuchHost() *schemas.Error {
	return &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Detail: "nothing has this address"}
}

// labelOf gives the first label of a host of the domain, "LABEL.domain", in any case, with
// a port or a final dot.
func labelOf(host, domain string) (string, bool) {
	if len(host) > 300 {
		return "", false
	}
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	label, ok := strings.CutSuffix(strings.TrimSuffix(strings.ToLower(host), "."), "."+domain)
	return label, ok && len(label) == schemas.LabelBytes && strings.Trim(label, "abcdefghijklmnopqrstuvwxyz234567") == ""
}

type targetKey struct{}

func targetOf(ctx context.Context) Target {
	t, _ := ctx.Value(targetKey{}).(Target)
	return t
}

// failed answers where the proxy has got no answer from the task.
func (s *Server) failed(rw http.ResponseWriter, r *http.Request, err error) {
	w := rw.(*response)
	var timeout interface{ Timeout() bool }
	switch broken, e := w.bodyError(), (*schemas.Error)(nil); {
	case errors.As(broken, &timeout) && timeout.Timeout():
		err = &schemas.Error{Status: http.StatusRequestTimeout, Code: schemas.CodeBadRequest, Detail: "the request stood still for too long"}
	case broken != nil:
		err = &schemas.Error{Status: http.StatusBadRequest, Code: schemas.CodeBadRequest, Detail: "the request could not be read to its end"}
	case r.Context().Err() != nil: // nobody is there to hear
		panic(http.ErrAbortHandler)
	case errors.As(err, &e):
	default:
		s.log.Debug().Err(err).Str("task", string(targetOf(r.Context()).Task)).Msg("no answer of a task")
		err = &schemas.Error{Status: http.StatusBadGateway, Code: schemas.CodeBadAnswer, Detail: "what runs here broke off, or did not answer as a web server does"}
	}
	s.refuse(w, r, err)
}

// response tells when and with what the answer began.
type response struct {
	http.ResponseWriter
	status int
	wrote  bool
	began  time.Time
	body   *pacedBody // of the request; nil if it has none
	// stall is how long a stream of HTTP/2 may take nothing. Over HTTP/1 it is 0: there
	// guardedConn looks after it, whose connection has many streams here.
	stall time.Duration
}

// bodyError is why the request's body could not be read, nil if it could.
func (w *response) bodyError() error {
	if w.body != nil {
		if err := w.body.failure.Load(); err != nil {
			return *err
		}
	}
	return nil
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *response) WriteHeader(status int) {
	if !w.wrote && (status >= 200 || status == http.StatusSwitchingProtocols) {
		w.wrote, w.status, w.began = true, status, time.Now()
	}
	if status < 200 && status != http.StatusSwitchingProtocols {
		withinHost(w.Header()) // modifyResponse sees the last answer only
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(b []byte) (int, error) {
	if !w.wrote {
		w.wrote, w.status, w.began = true, http.StatusOK, time.Now()
	}
	defer w.watch()()
	return w.ResponseWriter.Write(b)
}

// FlushError is for http.ResponseController.
func (w *response) FlushError() error {
	defer w.watch()()
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// watch resets the stream if what follows stalls, until the function that it gives is called.
func (w *response) watch() (done func()) {
	if w.stall == 0 {
		return func() {}
	}
	c := http.NewResponseController(w.ResponseWriter)
	_ = c.SetWriteDeadline(time.Now().Add(w.stall))
	return func() { _ = c.SetWriteDeadline(time.Time{}) }
}

func codeClass(status int) string {
	if status < 100 || status > 599 {
		return "none"
	}
	return string(rune('0'+status/100)) + "xx"
}

// debugLog takes what net/http says: it is about clients and tasks, and not for anybody
// who runs dayfly, unless he looks for something.
type debugLog struct{ log zerolog.Logger }

func (d debugLog) Write(line []byte) (int, error) {
	d.log.Debug().Str("error", strings.TrimSpace(string(line))).Msg("ingress")
	return len(line), nil
}
