package ops

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	stdlog "log"
	"net"
	"net/http"
	"net/http/pprof"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"
)

// Health holds named checks. A process is ready when all of them pass.
type Health struct {
	mu     sync.Mutex
	names  []string                               // under mu, in the order they came
	checks map[string]func(context.Context) error // under mu
}

// NewHealth makes an empty set of checks, which passes.
func NewHealth() *Health { return &Health{checks: map[string]func(context.Context) error{}} }

// Add registers a check. It must be quick and heed its context; another of the
// same name is replaced.
func (h *Health) Add(name string, check func(context.Context) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.checks[name] == nil {
		h.names = append(h.names, name)
	}
	h.checks[name] = check
}

// Check is one line of /readyz.
type Check struct {
	Name  string `json:"name"`
	OK    bool   `json:"ok"`
	Error string `json:"error,omitempty"`
	Note  string `json:"note,omitempty"` // of a check that passes
}

// Note is what a check gives that passes and has something to say all the same.
type Note string

// Error implements error.
func (n Note) Error() string { return string(n) }

// Run asks every check.
func (h *Health) Run(ctx context.Context) (ready bool, list []Check) {
	h.mu.Lock()
	names, checks := append([]string(nil), h.names...), map[string]func(context.Context) error{}
	for n, c := range h.checks {
		checks[n] = c
	}
	h.mu.Unlock()
	ready = true
	for _, n := range names {
		c := Check{Name: n, OK: true}
		var note Note
		if err := checks[n](ctx); errors.As(err, &note) {
			c.Note = string(note)
		} else if err != nil {
			c.OK, c.Error, ready = false, err.Error(), false
		}
		list = append(list, c)
	}
	return ready, list
}

// Admin serves /metrics, /healthz (the process lives), /readyz (each check with its
// reason; 503 if one fails) and /debug/pprof, to who asks for one of hosts. It is for
// operators' eyes only.
func Admin(reg *prometheus.Registry, health *Health, hosts Hosts) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		ready, checks := health.Run(ctx)
		w.Header().Set("Content-Type", "application/json")
		if !ready {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(map[string]any{"ready": ready, "checks": checks})
	})
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !hosts.Ours(r) {
			http.Error(w, "this process does not answer under that name; --admin-host takes more names", http.StatusMisdirectedRequest)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// warnings makes a log event of each line.
type warnings struct{ log zerolog.Logger }

func (w warnings) Write(line []byte) (int, error) {
	w.log.Warn().Bytes("error", bytes.TrimSpace(line)).Msg("http server")
	return len(line), nil
}

// shutdownGrace is how long open requests may take once the server is to end.
const shutdownGrace = 5 * time.Second

// Serve answers on ln until ctx ends, and then lets open requests finish for a few
// seconds. Requests see ctx end at once through their own context. What the server
// itself has to complain about goes to log.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, log zerolog.Logger) error {
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return base }, DisableGeneralOptionsHandler: true,
		ErrorLog: stdlog.New(warnings{log}, "", 0),
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	cancel()
	grace, done := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer done()
	err := s.Shutdown(grace)
	if err != nil {
		err = errors.Join(err, s.Close())
	}
	<-served
	if errors.Is(err, context.DeadlineExceeded) {
		return nil // it was cut off, as said
	}
	return err
}
