package gateway

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"dayfly.dev/schemas"
)

// streamFormat is how an answer that comes piece by piece is written.
type streamFormat string

const (
	formatText streamFormat = "text/plain; charset=utf-8"
	formatJSON streamFormat = "application/x-ndjson"
	formatSSE  streamFormat = "text/event-stream"
)

// streamFormatOf reads the Accept header: the first of formats that it names counts, the
// first of all is for everybody else.
func streamFormatOf(h http.Header, formats ...streamFormat) streamFormat {
	for _, line := range h.Values("Accept") {
		for kind := range strings.SplitSeq(line, ",") {
			kind, _, _ = strings.Cut(kind, ";")
			kind = strings.ToLower(strings.TrimSpace(kind))
			if kind == "application/ndjson" || kind == "application/jsonl" {
				kind = string(formatJSON)
			}
			for _, f := range formats {
				name, _, _ := strings.Cut(string(f), ";")
				if kind == name || kind == name[:strings.Index(name, "/")]+"/*" {
					return f
				}
			}
			if kind == "*/*" {
				return formats[0]
			}
		}
	}
	return formats[0]
}

// streamWriter writes to one client what comes over time. Each write has a deadline, so
// that a client that reads nothing is cut off.
type streamWriter struct {
	w       *response
	control *http.ResponseController
	format  streamFormat
	stall   time.Duration
	quiet   time.Duration

	mu    sync.Mutex
	alive *time.Timer // under mu: the next sign of life
	begun bool        // under mu: the header is written
	ended bool        // under mu
	live  bool        // under mu: each piece goes out at once
	place string      // under mu: SSE: where a client may go on from, said with each sign of life
	buf   bytes.Buffer
}

func (g *Gateway) newStream(w *response, format streamFormat) *streamWriter {
	return &streamWriter{w: w, control: http.NewResponseController(w), format: format, stall: g.cfg.WriteStall, quiet: g.cfg.KeepAlive}
}

// begin writes the header; from then on errors can only cut the answer off. s.mu is held.
func (s *streamWriter) begin() {
	if s.begun {
		return
	}
	s.begun = true
	s.w.Header().Set("Content-Type", string(s.format))
	s.w.Header().Set("X-Accel-Buffering", "no")
	s.w.WriteHeader(http.StatusOK)
	if s.format == formatSSE {
		s.buf.WriteString("retry: 1000\n\n")
	}
}

// goLive sends what there is and from now on each piece as it comes, with signs of
// life between.
func (s *streamWriter) goLive(place string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.place = place
	if s.live {
		return nil
	}
	s.begin()
	s.live = true
	if s.place != "" {
		s.sign()
	}
	if s.format != formatText {
		s.alive = time.AfterFunc(s.quiet, s.keepAlive)
	}
	return s.out()
}

func (s *streamWriter) keepAlive() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	s.sign()
	if s.out() == nil { // else the next piece finds out
		s.alive.Reset(s.quiet)
	}
}

// sign is a sign of life; s.mu is held. An event without data only moves the place.
func (s *streamWriter) sign() {
	switch {
	case s.format != formatSSE:
		s.buf.WriteByte('\n')
	case s.place != "":
		fmt.Fprintf(&s.buf, ": still here\nid: %s\n\n", s.place)
	default:
		s.buf.WriteString(": still here\n\n")
	}
}

// piece begins a piece; s.mu is held.
func (s *streamWriter) piece() {
	s.begin()
	if s.alive != nil {
		s.alive.Reset(s.quiet)
	}
}

// value appends v as JSON; s.mu is held. id, if any, is where a client may go on from.
func (s *streamWriter) value(event, id string, v any) error {
	body, err := schemas.Encode(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", event, err)
	}
	if s.format != formatSSE {
		s.buf.Write(body)
		s.buf.WriteByte('\n')
		return nil
	}
	if id != "" {
		fmt.Fprintf(&s.buf, "id: %s\n", id)
	}
	fmt.Fprintf(&s.buf, "event: %s\ndata: %s\n\n", event, body)
	return nil
}

// out hands the buffer over; s.mu is held.
func (s *streamWriter) out() error {
	_ = s.control.SetWriteDeadline(time.Now().Add(s.stall))
	_, err := s.w.Write(s.buf.Bytes())
	if s.buf.Cap() > 256<<10 {
		s.buf = bytes.Buffer{}
	}
	s.buf.Reset()
	if err == nil && s.live {
		err = s.control.Flush()
	}
	return err
}

// end writes the last words of an answer that has come to its end.
func (s *streamWriter) end(words any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.begin()
	if s.format == formatSSE {
		if err := s.value("end", "", words); err != nil {
			return err
		}
	}
	return s.out()
}

// close ends the signs of life and leaves the connection as it was.
func (s *streamWriter) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	if s.alive != nil {
		s.alive.Stop()
	}
	_ = s.control.SetWriteDeadline(time.Time{})
}

// follower lets one more client read what comes over time, or refuses it.
func (g *Gateway) follower(kind string) (done func(), err error) {
	select {
	case g.followers <- struct{}{}:
	default:
		return nil, &schemas.Error{Status: http.StatusTooManyRequests, Code: schemas.CodeTooManyRequests,
			Detail: "too many logs and events are being read here; try again", RetryAfter: schemas.Duration(time.Second)}
	}
	open := g.metrics.streams.WithLabelValues(kind)
	open.Inc()
	return func() { open.Dec(); <-g.followers }, nil
}
