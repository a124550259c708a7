package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"
	"unicode/utf8"

	"dayfly.dev/schemas"
)

// LogOptions choose what of a task's logs is read.
type LogOptions struct {
	Follow  bool           // go on until the task is final
	Tail    int            // only about the last so many lines of what there is; all if negative or 0
	Since   time.Time      // only what was written since then
	Stream  schemas.Stream // one of the two; both if empty
	Attempt int            // one attempt; the newest, and with Follow those after it, if 0
}

// maxLogLine bounds one line of NDJSON: a chunk of 64 KiB, escaped, has room in it.
const maxLogLine = 4 << 20

// Logs reads the task's logs. Each piece carries bytes of one stream of one attempt,
// at its offset there; LineBytes gives them. A connection that breaks is made again
// and goes on where it broke: no byte comes twice and none is left out. Reading ends
// with the first error, which comes with an empty LogLine (ErrLogsIncomplete comes
// after all that there is); the caller may stop at any time.
//
// A client with a long WithRetryFor rides out longer absences of the server; each
// piece that arrives starts the time anew.
func (c *Client) Logs(ctx context.Context, id schemas.TaskID, o LogOptions) iter.Seq2[schemas.LogLine, error] {
	return func(yield func(schemas.LogLine, error) bool) {
		r := &logReader{client: c, id: id, options: o, next: map[logKey]int64{}}
		if err := r.read(ctx, yield); err != nil && !errors.Is(err, errStopped) {
			yield(schemas.LogLine{}, err)
		}
	}
}

// LineBytes gives the bytes that l carries.
func LineBytes(l schemas.LogLine) ([]byte, error) {
	if l.Base64 == "" {
		return []byte(l.Data), nil
	}
	b, err := base64.StdEncoding.DecodeString(l.Base64)
	if err != nil {
		return nil, fmt.Errorf("log of attempt %d at %d: not base64", l.Attempt, l.Offset)
	}
	return b, nil
}

// setBytes is the inverse of LineBytes.
func setBytes(l *schemas.LogLine, b []byte) {
	l.Data, l.Base64 = "", ""
	if utf8.Valid(b) {
		l.Data = string(b)
	} else {
		l.Base64 = base64.StdEncoding.EncodeToString(b)
	}
}

// ErrLogsIncomplete ends a followed log of which the server has less than the task
// wrote: it is older than logs are kept.
var ErrLogsIncomplete = errors.New("some of the log is no longer kept")

var errStopped = errors.New("the caller has had enough")

type logKey struct {
	attempt int
	stream  schemas.Stream
}

// logReader remembers how far each stream was handed out, whatever connection it
// came over.
type logReader struct {
	client  *Client
	id      schemas.TaskID
	options LogOptions
	next    map[logKey]int64 // offset of the next byte to hand out
	began   time.Time        // when the first piece handed out was written
	first   int              // attempt of the first piece
	last    int              // attempt of the last piece
}

func (r *logReader) read(ctx context.Context, yield func(schemas.LogLine, error) bool) error {
	b := backoff{first: r.client.backoffFirst, most: r.client.backoffMost}
	began := time.Now()
	for resumed := false; ; resumed = true {
		some, err := r.round(ctx, resumed, yield)
		if err == nil {
			var complete bool
			if complete, err = r.complete(ctx); complete {
				return nil
			}
			switch {
			case err == nil:
				err = &UnreachableError{URL: r.client.base, Err: errors.New("the log ended before the task did")}
			case errors.Is(err, ErrLogsIncomplete) && (some || !resumed):
				// It was final only after this connection ended, perhaps: look once more.
				continue
			}
		}
		if !transient(err, true) {
			return err
		}
		if some {
			b.n = 0
			began = time.Now()
		}
		pause := b.next(err)
		if time.Since(began)+pause > r.client.limit(err) {
			return err
		}
		if serr := sleep(ctx, pause); serr != nil {
			return serr
		}
	}
}

// round reads until a connection ends. The server begins with the newest attempt, so
// what is left of the one that broke off, and of those since, is read first. some
// says whether anything new came.
func (r *logReader) round(ctx context.Context, resumed bool, yield func(schemas.LogLine, error) bool) (some bool, err error) {
	if resumed && r.options.Attempt == 0 && r.last > 0 {
		t, err := r.client.With(WithRetryFor(0)).Get(ctx, r.id, GetOptions{})
		if err != nil {
			return false, err
		}
		for r.last < t.Attempt {
			earlier := r.options
			earlier.Attempt, earlier.Follow = r.last, false
			more, err := r.connection(ctx, earlier, true, yield)
			some = some || more
			if err != nil {
				return some, err
			}
			r.last++
		}
	}
	more, err := r.connection(ctx, r.options, resumed, yield)
	return some || more, err
}

// connection reads over one connection until it ends.
func (r *logReader) connection(ctx context.Context, o LogOptions, resumed bool, yield func(schemas.LogLine, error) bool) (some bool, err error) {
	q := url.Values{}
	if o.Follow {
		q.Set("follow", "true")
	}
	if o.Tail > 0 && !(resumed && len(r.next) > 0) { // later, what came before is told apart by its offset
		q.Set("tail", strconv.Itoa(o.Tail))
	}
	if !o.Since.IsZero() {
		q.Set("since", o.Since.UTC().Format(time.RFC3339Nano))
	}
	if o.Stream != "" {
		q.Set("stream", string(o.Stream))
	}
	if o.Attempt > 0 {
		q.Set("attempt", strconv.Itoa(o.Attempt))
	}
	resp, err := r.client.send(ctx, request{
		method: http.MethodGet, path: taskPath(r.id, "/logs"), query: q, accept: "application/x-ndjson",
	})
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	in := bufio.NewScanner(resp.Body)
	in.Buffer(make([]byte, 0, 64<<10), maxLogLine)
	in.Split(wholeLines)
	for in.Scan() {
		if len(bytes.TrimSpace(in.Bytes())) == 0 {
			continue // a sign of life
		}
		var l schemas.LogLine
		if err := schemas.Decode(in.Bytes(), &l); err != nil {
			return some, fmt.Errorf("read log of %s: the server sent a line that is not a log line", r.id)
		}
		fresh, err := r.take(&l, resumed)
		if err != nil {
			return some, err
		}
		if !fresh {
			continue
		}
		some = true
		if !yield(l, nil) {
			return some, errStopped
		}
	}
	if err := in.Err(); err != nil {
		return some, r.client.unreachable(ctx, err)
	}
	return some, nil
}

// wholeLines splits at newlines and takes a last line without one for a broken
// connection.
func wholeLines(data []byte, atEOF bool) (int, []byte, error) {
	if i := bytes.IndexByte(data, '\n'); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF && len(data) > 0 {
		return 0, nil, io.ErrUnexpectedEOF
	}
	return 0, nil, nil
}

// take cuts off what was handed out already and says whether anything is left.
func (r *logReader) take(l *schemas.LogLine, resumed bool) (bool, error) {
	b, err := LineBytes(*l)
	if err != nil {
		return false, err
	}
	if len(b) == 0 {
		return false, nil
	}
	k := logKey{l.Attempt, l.Stream}
	next, seen := r.next[k]
	if !seen && resumed && r.options.Tail > 0 && len(r.next) > 0 && (l.Attempt < r.first || l.At.Before(r.began)) {
		return false, nil // the first connection left it out for the tail
	}
	if seen && l.Offset < next {
		if l.Offset+int64(len(b)) <= next {
			return false, nil
		}
		b = b[next-l.Offset:]
		l.Offset = next
		setBytes(l, b)
	}
	if len(r.next) == 0 {
		r.began, r.first = l.At, l.Attempt
	}
	r.next[k] = l.Offset + int64(len(b))
	r.last = max(r.last, l.Attempt)
	return true, nil
}

// complete says whether a log that ended in good order has all that there is. A
// gateway that shuts down ends the answers that it follows in good order too.
func (r *logReader) complete(ctx context.Context) (bool, error) {
	if !r.options.Follow {
		return true, nil
	}
	t, err := r.client.Get(ctx, r.id, GetOptions{})
	if err != nil {
		var e *schemas.Error
		if errors.As(err, &e) && e.Code == schemas.CodeNotFound {
			return true, nil // its record has been swept since
		}
		return false, err
	}
	if r.options.Attempt > 0 && r.options.Attempt < t.Attempt {
		return true, nil
	}
	if !t.State.Final() {
		return false, nil
	}
	if t.Logs == nil || t.Logs.Truncated {
		return true, nil
	}
	partial := r.options.Tail > 0 || !r.options.Since.IsZero()
	for s, size := range map[schemas.Stream]int64{schemas.Stdout: t.Logs.StdoutBytes, schemas.Stderr: t.Logs.StderrBytes} {
		next, seen := r.next[logKey{t.Attempt, s}]
		if r.options.Stream != "" && r.options.Stream != s || partial && !seen {
			continue
		}
		if next < size {
			return false, ErrLogsIncomplete
		}
	}
	return true, nil
}
