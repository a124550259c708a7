package gateway

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"dayfly.dev/schemas"
)

// logFormat is how a log is written.
type logFormat string

const (
	formatText logFormat = "text/plain; charset=utf-8"
	formatJSON logFormat = "application/x-ndjson"
	formatSSE  logFormat = "text/event-stream"
)

// logFormatOf reads the Accept header: the first that we know counts, text is for
// everybody else.
func logFormatOf(h http.Header) logFormat {
	for _, line := range h.Values("Accept") {
		for kind := range strings.SplitSeq(line, ",") {
			kind, _, _ = strings.Cut(kind, ";")
			switch strings.ToLower(strings.TrimSpace(kind)) {
			case "text/event-stream":
				return formatSSE
			case "application/x-ndjson", "application/ndjson", "application/jsonl":
				return formatJSON
			case "text/plain", "text/*", "*/*":
				return formatText
			}
		}
	}
	return formatText
}

// logWriter writes pieces to one client. Each write has a deadline, so that a client
// that reads nothing is cut off.
type logWriter struct {
	w       *response
	control *http.ResponseController
	format  logFormat
	stamps  bool // text: the time before each line
	stall   time.Duration
	quiet   time.Duration

	mu    sync.Mutex
	alive *time.Timer // under mu: the next sign of life
	begun bool        // under mu: the header is written
	ended bool        // under mu
	live  bool        // under mu: each piece goes out at once
	mid   map[lane]bool
	buf   bytes.Buffer
}

func newLogWriter(w *response, format logFormat, stamps bool, stall, quiet time.Duration) *logWriter {
	return &logWriter{w: w, control: http.NewResponseController(w), format: format, stamps: stamps,
		stall: stall, quiet: quiet, mid: map[lane]bool{}}
}

// begin writes the header; from then on errors can only cut the answer off.
func (l *logWriter) begin() {
	if l.begun {
		return
	}
	l.begun = true
	l.w.Header().Set("Content-Type", string(l.format))
	l.w.Header().Set("X-Accel-Buffering", "no")
	l.w.WriteHeader(http.StatusOK)
	if l.format == formatSSE {
		l.buf.WriteString("retry: 1000\n\n")
	}
}

// goLive sends what there is and from now on each piece as it comes, with signs of
// life between.
func (l *logWriter) goLive() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.begin()
	l.live = true
	if l.format != formatText && l.alive == nil {
		l.alive = time.AfterFunc(l.quiet, l.keepAlive)
	}
	return l.out()
}

func (l *logWriter) keepAlive() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return
	}
	if l.format == formatSSE {
		l.buf.WriteString(": still here\n\n")
	} else {
		l.buf.WriteByte('\n')
	}
	if l.out() == nil { // else the next piece finds out
		l.alive.Reset(l.quiet)
	}
}

// write writes one piece. id is where a client may go on from.
func (l *logWriter) write(p piece, id string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.begin()
	if l.alive != nil {
		l.alive.Reset(l.quiet)
	}
	if l.format == formatText {
		l.text(p)
		return l.out()
	}
	line := schemas.LogLine{Attempt: p.attempt, Stream: p.stream, Offset: p.offset, At: p.at}
	if utf8.Valid(p.data) {
		line.Data = string(p.data)
	} else {
		line.Base64 = base64.StdEncoding.EncodeToString(p.data)
	}
	body, err := schemas.Encode(line)
	if err != nil {
		return fmt.Errorf("encode log line: %w", err)
	}
	if l.format == formatSSE {
		fmt.Fprintf(&l.buf, "id: %s\nevent: log\ndata: %s\n\n", id, body)
	} else {
		l.buf.Write(body)
		l.buf.WriteByte('\n')
	}
	return l.out()
}

func (l *logWriter) text(p piece) {
	if !l.stamps {
		l.buf.Write(p.data)
		return
	}
	for line := range bytes.Lines(p.data) {
		if !l.mid[p.lane] {
			l.buf.WriteString(p.at.UTC().Format(time.RFC3339Nano) + " ")
		}
		l.buf.Write(line)
		l.mid[p.lane] = line[len(line)-1] != '\n'
	}
}

// out hands the buffer over; l.mu is held.
func (l *logWriter) out() error {
	_ = l.control.SetWriteDeadline(time.Now().Add(l.stall))
	_, err := l.w.Write(l.buf.Bytes())
	if l.buf.Cap() > 256<<10 {
		l.buf = bytes.Buffer{}
	}
	l.buf.Reset()
	if err == nil && l.live {
		err = l.control.Flush()
	}
	return err
}

// end writes the last words of a log that has come to its end.
func (l *logWriter) end(state schemas.State) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.begin()
	if l.format == formatSSE {
		fmt.Fprintf(&l.buf, "event: end\ndata: {\"state\":%s}\n\n", strconv.Quote(string(state)))
	}
	return l.out()
}

// close ends the signs of life and leaves the connection as it was.
func (l *logWriter) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	if l.alive != nil {
		l.alive.Stop()
	}
	_ = l.control.SetWriteDeadline(time.Time{})
}
