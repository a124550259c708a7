package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"

	"dayfly.dev/schemas"
)

// ConsoleOptions say what a console runs.
type ConsoleOptions struct {
	schemas.ExecRequest                 // without Stdin and Background
	Terminal            *schemas.Window // on a terminal of this size; nil: three streams
	Input               bool            // something will be written; a terminal always has it
	Stderr              io.Writer       // takes what comes on stderr; nil drops it
	// Broken is called when the connection broke, and with nil when it is back. May be nil.
	Broken func(error)
}

// ResumeFor is how long a console tries to come back.
const ResumeFor = time.Minute

// Console is a program beside a task's process and its streams. It survives broken
// connections and restarts of the server: what was written and not taken over is sent
// again, and what the program wrote meanwhile comes then. Close it.
type Console struct {
	client *Client
	task   schemas.TaskID
	main   bool // the task's own process
	o      ConsoleOptions
	cancel context.CancelFunc
	over   chan struct{} // closed when nothing more comes

	mu      sync.Mutex
	changed chan struct{} // under mu: closed, and made anew, at each change
	exec    schemas.ExecID
	out     []byte              // under mu: of stdout, not read yet
	came    schemas.ExecOffsets // under mu
	in      []byte              // under mu: written, and not taken over by the other side
	base    int64               // under mu: offset of in
	from    int64               // under mu: of stdin, where this connection goes on
	has     int64               // under mu: of stdin, the program
	begun   bool                // under mu: the first connection is made
	newest  bool                // under mu: nobody has said where its output begins
	shut    bool                // under mu: nothing more is written
	window  *schemas.Window     // under mu: to be told
	signals []string            // under mu: to be told
	exit    *schemas.ExecExit   // under mu
	err     error               // under mu: why it ended without an exit
}

// ErrLostOutput says that a part of a console's output is gone for good.
var ErrLostOutput = errors.New("a part of the output was lost with the connection")

// errForeign says that what the other side sends is none of a console: a worker may be
// anybody's.
var errForeign = errors.New("the other side does not answer like dayfly")

// maxOffset leaves room to count on from any offset that the other side says.
const maxOffset = 1 << 62

// Console starts a program and gives its streams. ctx is of the whole console.
func (c *Client) Console(ctx context.Context, id schemas.TaskID, o ConsoleOptions) (*Console, error) {
	q := url.Values{"command": o.Command, "acks": {"1"}}
	for _, pair := range o.Environment() {
		q.Add("env", pair)
	}
	if o.Workdir != "" {
		q.Set("workdir", o.Workdir)
	}
	if o.Timeout > 0 {
		q.Set("timeout", o.Timeout.String())
	}
	if o.Input {
		q.Set("stdin", "1")
	}
	if w := o.Terminal; w != nil {
		q.Set("tty", "1")
		q.Set("rows", strconv.Itoa(max(1, int(w.Rows))))
		q.Set("cols", strconv.Itoa(max(1, int(w.Cols))))
	}
	return c.console(ctx, id, o, q)
}

// Attach goes on with a program of an earlier console, with what it wrote since the
// offsets. Its Command and Terminal are known already.
func (c *Client) Attach(ctx context.Context, id schemas.TaskID, exec schemas.ExecID, from schemas.ExecOffsets, o ConsoleOptions) (*Console, error) {
	return c.console(ctx, id, o, resume(exec, from))
}

// AttachMain joins the task's own process, whose spec has TTY or StdinOpen: with all that
// it wrote since the offsets, or if they are nil since the last client left, at most the
// newest 256 KiB. Of the options Stderr and Broken count. Close leaves the task as it is.
func (c *Client) AttachMain(ctx context.Context, id schemas.TaskID, from *schemas.ExecOffsets, o ConsoleOptions) (*Console, error) {
	ctx, cancel := context.WithCancel(ctx)
	s := &Console{client: c, task: id, main: true, o: o, cancel: cancel, over: make(chan struct{}), changed: make(chan struct{}), newest: from == nil}
	q := url.Values{"acks": {"1"}}
	if from != nil {
		s.came = *from
		q = s.where()
	}
	return s.start(ctx, q)
}

// where says how the console is resumed.
func (s *Console) where() url.Values {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := resume(s.exec, s.came)
	if s.main {
		q.Del("exec")
	}
	if s.main && s.newest {
		q.Del("stdout")
		q.Del("stderr")
	}
	return q
}

// Came says how much of both streams has come.
func (s *Console) Came() schemas.ExecOffsets {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.came
}

func resume(exec schemas.ExecID, from schemas.ExecOffsets) url.Values {
	return url.Values{"exec": {string(exec)}, "acks": {"1"}, "stdout": {strconv.FormatInt(from.Stdout, 10)}, "stderr": {strconv.FormatInt(from.Stderr, 10)}}
}

func (c *Client) console(ctx context.Context, id schemas.TaskID, o ConsoleOptions, q url.Values) (*Console, error) {
	ctx, cancel := context.WithCancel(ctx)
	s := &Console{client: c, task: id, o: o, cancel: cancel, over: make(chan struct{}), changed: make(chan struct{})}
	return s.start(ctx, q)
}

// start makes the first connection.
func (s *Console) start(ctx context.Context, q url.Values) (*Console, error) {
	var ws *websocket.Conn
	err := s.client.retry(ctx, s.main, func(ctx context.Context) (err error) {
		ws, err = s.dial(ctx, q)
		return err
	})
	if err != nil {
		s.cancel()
		return nil, err
	}
	go s.run(ctx, ws)
	return s, nil
}

func (s *Console) dial(ctx context.Context, q url.Values) (*websocket.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.client.patience, errSilent)
	defer cancel()
	ws, resp, err := websocket.Dial(ctx, s.client.base+taskPath(s.task, map[bool]string{false: "/exec", true: "/attach"}[s.main])+"?"+q.Encode(),
		&websocket.DialOptions{HTTPClient: s.client.http, HTTPHeader: http.Header{"User-Agent": {s.client.userAgent}}})
	if err != nil {
		if resp != nil && resp.StatusCode != http.StatusSwitchingProtocols && resp.Body != nil {
			defer resp.Body.Close()
			err := problem(resp)
			var e *schemas.Error
			if s.main && errors.As(err, &e) && e.Code == schemas.CodeStateConflict && e.State == "" {
				e.Code = schemas.CodeUnavailable // its agent does not have it at this moment, or the record is about to say its end
			}
			return nil, err
		}
		return nil, s.client.unreachable(ctx, err)
	}
	ws.SetReadLimit(1 << 20)
	s.mu.Lock()
	s.exec = schemas.ExecID(resp.Header.Get("Dayfly-Exec"))
	s.mu.Unlock()
	return ws, nil
}

func (s *Console) wakeLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// run carries the console over as many connections as it takes.
func (s *Console) run(ctx context.Context, ws *websocket.Conn) {
	defer close(s.over)
	defer s.cancel()
	for {
		err := s.carry(ctx, ws)
		if err == nil {
			_ = ws.Close(websocket.StatusNormalClosure, "")
			return
		}
		if ctx.Err() != nil {
			_ = ws.Close(websocket.StatusNormalClosure, "") // the program is hung up on
			s.fail(context.Cause(ctx))
			return
		}
		_ = ws.CloseNow()
		if errors.Is(err, errForeign) { // and would again
			s.fail(err)
			return
		}
		if code := websocket.CloseStatus(err); code == 4001 {
			s.fail(errors.New("another client has taken the console over"))
			return
		}
		if s.o.Broken != nil {
			s.o.Broken(err)
		}
		if ws, err = s.again(ctx); err != nil {
			s.fail(err)
			return
		}
		if s.o.Broken != nil {
			s.o.Broken(nil)
		}
	}
}

func (s *Console) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exit == nil && (s.err == nil || s.err == ErrLostOutput) {
		s.err = err
	}
	s.wakeLocked()
}

// again tries to come back.
func (s *Console) again(ctx context.Context) (ws *websocket.Conn, err error) {
	q := s.where()
	c := s.client.With(WithRetryFor(ResumeFor), WithConnectFor(ResumeFor), WithBackoff(50*time.Millisecond, time.Second))
	err = c.retry(ctx, true, func(ctx context.Context) error {
		ws, err = s.dial(ctx, q)
		return err
	})
	return ws, err
}

// carry serves one connection; nil when the program's last word has come.
func (s *Console) carry(ctx context.Context, ws *websocket.Conn) error {
	// A read that ends by its context breaks the connection; a close is to end it.
	reading, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	began := make(chan struct{})
	failed := make(chan error, 2)
	var both sync.WaitGroup
	both.Go(func() { failed <- s.receive(reading, ws, began) })
	writing, unwrite := context.WithCancel(ctx)
	wire, cut := context.WithCancel(writing)
	if s.main { // what was written before a Close still goes out
		wire, cut = context.WithCancel(reading)
		defer context.AfterFunc(ctx, func() { time.AfterFunc(flushWithin, cut) })()
	}
	defer cut()
	both.Go(func() {
		select {
		case <-began:
			failed <- s.send(writing, wire, ws)
		case <-wire.Done():
			failed <- context.Cause(wire)
		}
	})
	err := <-failed
	if err != nil && ctx.Err() != nil { // closed by its user
		s.lastAck(reading, ws)
		_ = ws.Close(websocket.StatusNormalClosure, "")
	}
	unwrite()
	if err != nil {
		stop(err)
	}
	if err == nil { // receive is through; send ends by now
		<-failed
		both.Wait()
		return nil
	}
	<-failed
	both.Wait()
	return err
}

// lastAck says what has come, so that who attaches next gets what this client has not.
func (s *Console) lastAck(ctx context.Context, ws *websocket.Conn) {
	if !s.main {
		return
	}
	s.mu.Lock()
	taken := s.takenLocked()
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if b, err := schemas.Encode(schemas.ExecControl{Ack: &taken}); err == nil {
		_ = ws.Write(ctx, websocket.MessageText, b)
	}
}

// takenLocked is what of the output was read.
func (s *Console) takenLocked() schemas.ExecOffsets {
	return schemas.ExecOffsets{Stdout: s.came.Stdout - int64(len(s.out)), Stderr: s.came.Stderr}
}

func (s *Console) receive(ctx context.Context, ws *websocket.Conn, began chan struct{}) error {
	started, told := false, int64(0) // of this connection
	for {
		kind, b, err := ws.Read(ctx)
		if err != nil {
			return err
		}
		if kind == websocket.MessageBinary {
			if err := s.output(b); err != nil {
				return err
			}
			continue
		}
		var m schemas.ExecControl
		if err := schemas.Decode(b, &m); err != nil {
			return fmt.Errorf("%w: %w", errForeign, err)
		}
		s.mu.Lock()
		switch {
		case m.Started != nil:
			if err = s.beginLocked(*m.Started, started); err == nil {
				started, told = true, m.Started.Has
				close(began)
			}
		case m.Stdin < told && m.Stdin != 0, m.Stdin > maxOffset:
			err = fmt.Errorf("%w: it has %d bytes of stdin after %d", errForeign, m.Stdin, told)
		case m.Stdin > 0:
			told = m.Stdin
			s.tookLocked(m.Stdin)
			s.has = max(s.has, m.Stdin)
		case m.Exit != nil:
			s.exit = m.Exit
		case m.Lost != "":
			s.err = errors.New(m.Lost)
		}
		s.wakeLocked()
		s.mu.Unlock()
		if err != nil {
			return err
		}
		if m.Exit != nil || m.Lost != "" {
			return nil
		}
	}
}

// beginLocked takes where the streams go on. started says that it came before.
func (s *Console) beginLocked(at schemas.ExecBegin, started bool) error {
	if started {
		return fmt.Errorf("%w: it begins twice", errForeign)
	}
	if lowest := min(at.Stdin, at.Has, at.Stdout, at.Stderr); lowest < 0 || max(at.Stdin, at.Stdout, at.Stderr) > maxOffset || at.Has > at.Stdin {
		return fmt.Errorf("%w: it begins at %+v", errForeign, at)
	}
	from := schemas.ExecOffsets{Stdout: at.Stdout, Stderr: at.Stderr}
	if s.newest {
		s.newest = false
		s.came = from
	} else if at.Stdout > s.came.Stdout || at.Stderr > s.came.Stderr {
		s.err = ErrLostOutput
		s.came = from
	}
	if !s.begun { // an earlier client may have written before
		s.begun, s.base = true, at.Stdin
	}
	s.tookLocked(at.Has) // and no more: the rest is lost if the agent is
	s.from, s.has = at.Stdin, max(s.has, at.Has)
	return nil
}

// tookLocked drops what the other side has taken over.
func (s *Console) tookLocked(to int64) {
	if n := min(to-s.base, int64(len(s.in))); n > 0 {
		s.in = s.in[n:]
		s.base += n
	}
}

func (s *Console) output(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	channel, b := b[0], b[1:]
	if channel == schemas.ChannelStderr {
		if s.o.Stderr != nil {
			if _, err := s.o.Stderr.Write(b); err != nil {
				return err
			}
		}
		s.mu.Lock()
		s.came.Stderr += int64(len(b))

	} else {
		s.mu.Lock()
		s.out = append(s.out, b...)
		s.came.Stdout += int64(len(b))
	}
	s.wakeLocked()
	s.mu.Unlock()
	return nil
}

const (
	ackEvery  = 64 << 10
	maxInputs = schemas.ExecWindow // written, and the program does not have it
)

// flushWithin is how long a Close may take to send what was written before.
const flushWithin = 2 * time.Second

// send sends what is to be sent, from what the other side has on, until ctx ends and
// nothing is left; wire breaks off a message.
func (s *Console) send(ctx, wire context.Context, ws *websocket.Conn) error {
	s.mu.Lock()
	next, acked, shut := max(s.base, s.from), schemas.ExecOffsets{}, false
	s.mu.Unlock()
	for {
		var control schemas.ExecControl
		var input []byte
		s.mu.Lock()
		changed := s.changed
		next = max(next, s.base)
		rest := s.in[min(next-s.base, int64(len(s.in))):]
		taken := s.takenLocked()
		over := s.exit != nil
		switch {
		case s.window != nil:
			control.Resize, s.window = s.window, nil
		case len(s.signals) > 0:
			control.Signal, s.signals = s.signals[0], s.signals[1:]
		case taken.Stdout-acked.Stdout >= ackEvery || taken.Stderr-acked.Stderr >= ackEvery:
			control.Ack = &taken
			acked = taken
		case len(rest) > 0:
			input = append([]byte{schemas.ChannelStdin}, rest[:min(len(rest), maxMessage)]...)
		case s.shut && !shut:
			control.End, shut = true, true
		}
		s.mu.Unlock()
		var err error
		switch {
		case over:
			return nil
		case input != nil:
			next += int64(len(input) - 1)
			err = ws.Write(wire, websocket.MessageBinary, input)
		case control != schemas.ExecControl{}:
			var b []byte
			if b, err = schemas.Encode(control); err == nil {
				err = ws.Write(wire, websocket.MessageText, b)
			}
		default:
			select {
			case <-changed:
			case <-ctx.Done():
				err = context.Cause(ctx)
			}
		}
		if err != nil {
			return err
		}
	}
}

// ID names the program.
func (s *Console) ID() schemas.ExecID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exec
}

// Read gives stdout, or what the terminal shows. It is io.EOF once the program has ended
// and all has come.
func (s *Console) Read(p []byte) (int, error) {
	for {
		s.mu.Lock()
		if len(s.out) > 0 {
			n := copy(p, s.out)
			if s.out = s.out[n:]; len(s.out) == 0 {
				s.out = nil
			}
			s.wakeLocked()
			s.mu.Unlock()
			return n, nil
		}
		changed, exit, err := s.changed, s.exit, s.err
		if err == ErrLostOutput {
			s.err = nil // it is said once
		}
		s.mu.Unlock()
		switch {
		case err != nil:
			return 0, err
		case exit != nil:
			return 0, io.EOF
		}
		<-changed
	}
}

// Write writes to the program's stdin. It waits while much is not taken over.
func (s *Console) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		s.mu.Lock()
		room := maxInputs - int(max(0, s.base+int64(len(s.in))-s.has)) // who says it has more gets no more
		switch {
		case s.exit != nil || s.err != nil && s.err != ErrLostOutput || s.shut:
			s.mu.Unlock()
			return n, io.ErrClosedPipe
		case room > 0:
			k := min(room, len(p))
			s.in = append(s.in, p[:k]...)
			n, p = n+k, p[k:]
			s.wakeLocked()
			s.mu.Unlock()
			continue
		}
		changed := s.changed
		s.mu.Unlock()
		<-changed
	}
	return n, nil
}

// CloseWrite is the end of stdin. A terminal has none but Ctrl-D.
func (s *Console) CloseWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shut = true
	s.wakeLocked()
	return nil
}

// Resize tells the terminal its new size.
func (s *Console) Resize(w schemas.Window) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.window = &w
	s.wakeLocked()
}

// Signal sends the program a signal: "INT", "TERM", "KILL", "HUP"…
func (s *Console) Signal(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.signals = append(s.signals, strings.TrimPrefix(name, "SIG"))
	s.wakeLocked()
}

// Wait waits for the program's end, for which stdout must be read.
func (s *Console) Wait() (schemas.ExecExit, error) {
	<-s.over
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exit != nil {
		return *s.exit, nil
	}
	return schemas.ExecExit{}, s.err
}

// Close ends the program, as the end of a terminal does, and the console.
func (s *Console) Close() error {
	s.cancel()
	<-s.over
	return nil
}
