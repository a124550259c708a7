package agent

import (
	"context"
	"errors"
	"io"
	"math"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/bus/session"
	"dayfly.dev/schemas"
)

// stdinTold is how much of stdin the program takes before the client hears of it.
const stdinTold = 32 << 10

// errTaken ends a session whose program another has taken, errOver one whose program is
// being ended since its client was away for too long, errIdle one whose client takes nothing
// of what is left of a program that is over.
var (
	errTaken = errors.New("another client has taken the program over")
	errOver  = errors.New("the program is being ended")
	errIdle  = errors.New("the client takes nothing")
)

// holder is a session that has a program's streams.
type holder struct {
	e      *execution
	stream *session.Stream
	acks   bool
	next   [2]int64 // under e.mu: of each output, what is sent next
	told   int64    // of stdin
	end    context.CancelCauseFunc
}

// serve gives the program's streams to a session, until one of the two is over.
func (e *execution) serve(ctx context.Context, stream *session.Stream, a schemas.ExecAttach) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-stream.Done(): // also while nobody receives, since the program does not read
			cancel(session.ErrGone)
		case <-ctx.Done():
		}
	})
	defer func() {
		cancel(nil)
		watch.Wait()
	}()
	h := &holder{e: e, stream: stream, acks: a.Acks, end: cancel}
	begin := h.take(a)
	received := make(chan error, 1)
	go func() {
		err := h.receive(ctx)
		received <- err
		cancel(err)
	}()
	err := h.control(ctx, schemas.ExecControl{Started: &begin})
	if err == nil {
		err = h.send(ctx)
	}
	if err == nil { // all is said: it is for the client to say that it has come
		<-ctx.Done()
	}
	cancel(err)
	was := <-received
	switch {
	case context.Cause(ctx) == errTaken:
		stream.Reset(session.CodeTaken, errTaken.Error())
	case was == io.EOF:
		_ = stream.Close()
	default:
		stream.Reset(session.CodeClosing, "the session is over")
	}
	h.leave(was == io.EOF)
}

// take makes the session the one that has the streams, and says where they go on.
func (h *holder) take(a schemas.ExecAttach) schemas.ExecBegin {
	e := h.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.holder != nil {
		e.holder.end(errTaken)
	}
	if e.dropping {
		h.end(errOver)
	}
	e.holder = h
	h.told, e.moved = e.fed, time.Now()
	if e.main != nil {
		if e.read { // it would hear of the end, and not what was written before that
			h.end(errGap)
		}
		e.placeLocked(a)
		a.Stdout, a.Stderr = e.out[0].end, e.out[1].end
	}
	for i, from := range []int64{a.Stdout, a.Stderr} {
		o := &e.out[i]
		h.next[i] = min(max(from, o.begin()), o.end)
		o.acked = h.next[i]
	}
	e.wakeLocked()
	return schemas.ExecBegin{ID: e.id, Stdin: e.taken, Has: e.fed, Stdout: h.next[0], Stderr: h.next[1]}
}

// leave gives the streams back. A client that closed its session will not come back.
func (h *holder) leave(closed bool) {
	e := h.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.holder == h {
		e.holder, e.since = nil, time.Now()
		e.left = closed || !e.open.Keep
		if e.main != nil {
			e.main.Hold(nil)
		}
		e.wakeLocked()
	}
}

func (h *holder) control(ctx context.Context, c schemas.ExecControl) error {
	b, err := schemas.Encode(c)
	if err != nil {
		return err
	}
	return h.stream.Send(ctx, schemas.ChannelControl, b)
}

// send carries what the program writes, to its last word.
func (h *holder) send(ctx context.Context) error {
	e := h.e
	b := make([]byte, session.MaxFrame)
	for {
		e.mu.Lock()
		if e.holder != h || ctx.Err() != nil {
			e.mu.Unlock()
			return context.Cause(ctx)
		}
		changed, fed, i, n := e.changed, e.fed, 0, 0
		if e.deaf { // nor will it ever
			fed = e.taken
		}
		for i = range e.out {
			o := &e.out[i]
			if h.next[i] < o.begin() {
				e.mu.Unlock()
				return errGap
			}
			if h.next[i] < o.end {
				n = copy(b, o.buf[h.next[i]-o.begin():])
				h.next[i] += int64(n) // before the client may acknowledge it
				break
			}
		}
		last := schemas.ExecControl{Exit: e.exit, Lost: e.lost}
		e.mu.Unlock()
		var err error
		switch {
		case n > 0:
			if err = h.stream.Send(ctx, byte(i), b[:n]); err == nil && !h.acks {
				h.acked(schemas.ExecOffsets{Stdout: math.MaxInt64, Stderr: math.MaxInt64})
			}
		case last.Exit != nil || last.Lost != "":
			return h.control(ctx, last)
		case fed-h.told >= stdinTold:
			h.told = fed
			err = h.control(ctx, schemas.ExecControl{Stdin: fed})
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

// acked makes room for what the client has, which is no more than was sent to it. Somebody
// else's word counts no more.
func (h *holder) acked(at schemas.ExecOffsets) {
	e := h.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.holder != h {
		return
	}
	for i, has := range []int64{at.Stdout, at.Stderr} {
		if o := &e.out[i]; min(has, h.next[i]) > o.acked {
			o.acked, e.moved = min(has, h.next[i]), time.Now()
		}
	}
	e.wakeLocked()
}

// receive takes what the client sends. It is io.EOF when the client closes the session.
func (h *holder) receive(ctx context.Context) error {
	for {
		f, err := h.stream.Receive(ctx)
		if err != nil {
			return err
		}
		switch f.Channel {
		case schemas.ChannelStdin:
			err = h.input(ctx, f)
		case schemas.ChannelControl:
			var c schemas.ExecControl
			if err = schemas.Decode(f.Data, &c); err == nil {
				h.obey(c)
			}
		}
		if err != nil {
			return err
		}
	}
}

// input takes over a piece of stdin once there is room.
func (h *holder) input(ctx context.Context, f session.Frame) error {
	e := h.e
	for {
		e.mu.Lock()
		changed := e.changed
		switch {
		case e.holder != h:
			e.mu.Unlock()
			return errTaken
		case e.deaf || len(e.in) < schemas.ExecWindow:
			if !e.deaf {
				e.in = append(e.in, f.Data...)
			}
			e.taken += int64(len(f.Data))
			e.inEnd = e.inEnd || f.End // of a gateway that has all of it
			e.wakeLocked()
			e.mu.Unlock()
			return nil
		}
		e.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// obey does what a client asks of the program. One that has ended is past asking.
func (h *holder) obey(c schemas.ExecControl) {
	if c.Ack != nil && h.acks {
		h.acked(*c.Ack)
	}
	var p interface {
		Resize(Window) error
		Signal(syscall.Signal) error
	}
	switch {
	case h.e.main != nil:
		p = h.e.main
	case h.e.program != nil:
		p = h.e.program
	default:
		return
	}
	if c.End {
		h.e.mu.Lock()
		h.e.inEnd = h.e.inEnd || h.e.holder == h
		h.e.wakeLocked()
		h.e.mu.Unlock()
	}
	if c.Resize != nil {
		_ = p.Resize(Window{c.Resize.Rows, c.Resize.Cols})
	}
	if sig, ok := signalOf(c.Signal); ok {
		_ = p.Signal(sig)
	}
}

// signalOf reads "INT" or "SIGINT".
func signalOf(name string) (syscall.Signal, bool) {
	sig := unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(name), "SIG"))
	return sig, slices.Contains(Signals, sig)
}
