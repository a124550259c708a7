package session

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
)

// MaxFrame is how many bytes a frame has at the most.
const MaxFrame = 32 << 10

// frameCost is what a frame counts beside its bytes, so that empty ones are bounded too.
const frameCost = 64

// Frame is what a stream carries.
type Frame struct {
	Channel byte
	End     bool // nothing more comes on this channel
	Data    []byte
}

// Code says why a stream was reset.
type Code string

// Codes that every stream may end with; who uses streams may add others.
const (
	CodeUnknown = Code("unknown_session") // the other process does not know it: it was restarted, or gave it up
	CodeClosing = Code("closing")         // the other process goes down
	CodeGone    = Code("gone")            // the other process heard nothing for too long
	CodeBroken  = Code("broken")          // what the stream was joined to broke
	CodeTaken   = Code("taken")           // another session has what it was joined to
	CodeFlood   = Code("flood")           // more came than the window lets through
)

// ResetError is what a stream ends with when the other side resets it.
type ResetError struct {
	Code    Code
	Message string // a sentence for people
}

func (e *ResetError) Error() string { return string(e.Code) + ": " + e.Message }

// Messages begin with a kind. Those of frames go on with the number of the frame, from 1:
//
//	data    number channel bytes…
//	end     number channel
//	close   number
//	status  flags, bytes taken so far, number of the last frame sent, number of the next one expected
//	reset   code NUL message
const (
	kindData = iota + 1
	kindEnd
	kindClose
	kindStatus
	kindReset
)

const (
	flagAsk   = 1 << iota // answer with a status
	flagAgain             // frames are missing from the expected one on
)

const (
	frameHeader = 1 + 8
	statusSize  = 1 + 1 + 3*8
)

// Stream is one side of a session. Send and Receive may each be called from several
// goroutines.
type Stream struct {
	mux     *Mux
	address string

	mu      sync.Mutex
	changed chan struct{} // under mu: closed, and made anew, when a caller may go on
	done    chan struct{} // closed when nothing of the stream is left
	ended   bool          // under mu: done is closed

	sent    uint64    // under mu: number of the last frame
	cost    uint64    // under mu: bytes sent, each frame with frameCost
	credit  uint64    // under mu: of which the other side has taken so many
	kept    []message // under mu: what the other side has not taken
	closing time.Time // under mu: since when we are closed
	moved   time.Time // under mu: when the other side last took anything
	again   time.Time // under mu: when it was last sent again what it lacks
	spoke   time.Time // under mu

	expected uint64    // under mu: number of the next frame
	queue    []Frame   // under mu
	came     uint64    // under mu: bytes received, each frame with frameCost
	taken    uint64    // under mu: of which so many were taken
	told     uint64    // under mu: and of which the other side knows
	over     bool      // under mu: the other side has closed, and the queue has its last frame
	heard    time.Time // under mu
	missed   time.Time // under mu: when missing frames were last asked for

	err error // under mu: why it broke
}

// message is a frame on its way.
type message struct {
	number uint64
	cost   uint64 // of all up to this one
	data   []byte
}

// Address is what the stream was opened with.
func (s *Stream) Address() string { return s.address }

// Done is closed when nothing of the stream is left: both sides have closed it, or it
// broke.
func (s *Stream) Done() <-chan struct{} { return s.done }

// Send sends one frame of at most MaxFrame bytes, which the stream copies. It waits while
// the window is full, until ctx ends. When it returns nil the frame is under way, and it
// arrives unless the stream breaks.
func (s *Stream) Send(ctx context.Context, channel byte, data []byte) error {
	if len(data) > MaxFrame {
		return fmt.Errorf("a frame of %d bytes is too long", len(data))
	}
	return s.put(ctx, kindData, channel, data)
}

// SendEnd says that nothing more comes on the channel.
func (s *Stream) SendEnd(ctx context.Context, channel byte) error {
	return s.put(ctx, kindEnd, channel, nil)
}

func (s *Stream) put(ctx context.Context, kind, channel byte, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.sendable() == nil && s.full(len(data)) {
		if err := s.wait(ctx); err != nil {
			return err
		}
	}
	if err := s.sendable(); err != nil {
		return err
	}
	s.post(kind, channel, data)
	return nil
}

func (s *Stream) sendable() error {
	if s.err == nil && !s.closing.IsZero() {
		return ErrClosed
	}
	return s.err
}

func (s *Stream) full(n int) bool {
	return len(s.kept) > 0 && s.cost-s.credit+uint64(n)+frameCost > uint64(s.mux.o.Window)
}

// wait gives the lock away until something has changed.
func (s *Stream) wait(ctx context.Context) error {
	changed := s.changed
	s.mu.Unlock()
	defer s.mu.Lock()
	select {
	case <-changed:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *Stream) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Stream) post(kind, channel byte, data []byte) {
	s.sent++
	s.cost += uint64(len(data)) + frameCost
	msg := make([]byte, 0, frameHeader+1+len(data))
	msg = binary.BigEndian.AppendUint64(append(msg, kind), s.sent)
	if kind != kindClose {
		msg = append(append(msg, channel), data...)
	}
	s.kept = append(s.kept, message{s.sent, s.cost, msg})
	s.say(msg)
}

// say sends a message now. One that is lost since the connection is away is asked for
// again, or found missing, when it is back.
func (s *Stream) say(msg []byte) {
	s.spoke = time.Now()
	_ = s.mux.send(s.mux.o.Send+s.address, msg)
}

// Receive gives the next frame; the data is the caller's. After the last one it is
// io.EOF, if the other side has closed the stream, or why it broke.
func (s *Stream) Receive(ctx context.Context) (Frame, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case !s.closing.IsZero():
			return Frame{}, ErrClosed
		case len(s.queue) > 0:
			f := s.queue[0]
			s.queue[0] = Frame{}
			s.queue = s.queue[1:]
			s.take(len(f.Data))
			return f, nil
		case s.over:
			return Frame{}, io.EOF
		case s.err != nil:
			return Frame{}, s.err
		}
		if err := s.wait(ctx); err != nil {
			return Frame{}, err
		}
	}
}

// take makes room for the other side, and says so from time to time.
func (s *Stream) take(n int) {
	s.taken += uint64(n) + frameCost
	if s.taken-s.told >= uint64(s.mux.o.Window)/4 || s.over && len(s.queue) == 0 {
		s.status(0)
	}
}

func (s *Stream) status(flags byte) {
	s.told = s.taken
	msg := make([]byte, 0, statusSize)
	msg = append(msg, kindStatus, flags)
	for _, n := range []uint64{s.taken, s.sent, s.expected} {
		msg = binary.BigEndian.AppendUint64(msg, n)
	}
	s.say(msg)
}

// Close says that nothing more comes, and that nothing more is wanted: what the other
// side still sends is dropped. What was sent before arrives. It does not wait.
func (s *Stream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || !s.closing.IsZero() {
		return nil
	}
	s.closing = time.Now()
	s.post(kindClose, 0, nil)
	s.drop()
	s.wake()
	s.end()
	return nil
}

// drop takes what nobody will.
func (s *Stream) drop() {
	for _, f := range s.queue {
		s.taken += uint64(len(f.Data)) + frameCost
	}
	s.queue = nil
	if s.taken != s.told {
		s.status(0)
	}
}

// end ends the stream once both sides have closed it and know of it.
func (s *Stream) end() {
	if !s.ended && (s.err != nil || !s.closing.IsZero() && s.over && len(s.kept) == 0) {
		s.ended = true
		close(s.done)
		s.mux.forget(s.address)
	}
}

// Reset breaks the stream, here and on the other side: what is under way may be lost.
func (s *Stream) Reset(code Code, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.say(resetMessage(code, text))
		s.queue = nil
		s.fail(ErrClosed)
	}
}

func resetMessage(code Code, text string) []byte {
	return append([]byte{kindReset}, string(code)+"\x00"+text...)
}

func (s *Stream) fail(err error) {
	if s.err == nil {
		s.err = err
		s.kept = nil
		s.wake()
		s.end()
	}
}

// ask asks the other side how far it is.
func (s *Stream) ask() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.status(flagAsk)
	}
}

// check asks a side that has been silent, and gives up one that stays so, or that takes
// nothing of what was sent before we closed. One that goes on sending long after we closed is
// told that nobody listens.
func (s *Stream) check(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.ended:
	case now.Sub(s.heard) >= s.mux.o.Silence:
		s.say(resetMessage(CodeGone, "nothing was heard of you"))
		s.fail(ErrGone)
	case !s.closing.IsZero() && now.Sub(s.closing) >= 2*s.mux.o.Silence && now.Sub(s.moved) >= 2*s.mux.o.Silence:
		s.say(resetMessage(CodeGone, "you take nothing of what was sent"))
		s.fail(ErrGone)
	case !s.closing.IsZero() && len(s.kept) == 0 && now.Sub(s.closing) >= s.mux.o.Ping:
		s.say(resetMessage(CodeUnknown, "the session was closed here"))
		s.fail(ErrClosed)
	case now.Sub(s.spoke) >= s.mux.o.Ping || now.Sub(s.heard) >= s.mux.o.Ping && now.Sub(s.spoke) >= s.mux.o.Ping/5:
		s.status(flagAsk)
	}
}

// receive takes one message of the other side.
func (s *Stream) receive(msg []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || len(msg) == 0 {
		return
	}
	s.heard = time.Now()
	switch kind := msg[0]; kind {
	case kindData, kindEnd, kindClose:
		s.frame(kind, msg[1:])
	case kindStatus:
		s.heed(msg)
	case kindReset:
		code, text, _ := strings.Cut(string(msg[1:]), "\x00")
		s.fail(&ResetError{Code(code), text})
	}
}

func (s *Stream) frame(kind byte, body []byte) {
	if len(body) < 8 || kind != kindClose && len(body) < 9 {
		return
	}
	switch number := binary.BigEndian.Uint64(body); {
	case number < s.expected:
		return // it came twice
	case number > s.expected:
		s.askAgain()
		return
	}
	s.expected++
	s.came += frameCost
	if kind != kindClose {
		s.came += uint64(len(body) - 9)
	}
	if s.came-s.taken > uint64(s.mux.o.Window)+MaxFrame+2*frameCost {
		s.say(resetMessage(CodeFlood, "more was sent than the window lets through"))
		s.fail(ErrFlood)
		return
	}
	if kind == kindClose {
		s.over = true
		s.taken += frameCost
		if len(s.queue) == 0 {
			s.status(0)
		}
	} else {
		f := Frame{Channel: body[8], End: kind == kindEnd, Data: body[9:]}
		s.queue = append(s.queue, f)
	}
	if !s.closing.IsZero() {
		s.drop()
	}
	s.wake()
	s.end()
}

// askAgain asks for what is missing, and not for each frame behind it.
func (s *Stream) askAgain() {
	if now := time.Now(); now.Sub(s.missed) >= s.mux.o.Ping/20 {
		s.missed = now
		s.status(flagAgain)
	}
}

// heed takes the other side's status.
func (s *Stream) heed(msg []byte) {
	if len(msg) < statusSize {
		return
	}
	flags, body := msg[1], msg[2:]
	taken, sent, expected := binary.BigEndian.Uint64(body), binary.BigEndian.Uint64(body[8:]), binary.BigEndian.Uint64(body[16:])
	if taken > s.credit && taken <= s.cost {
		s.credit, s.moved = taken, s.heard
		n := 0
		for n < len(s.kept) && s.kept[n].cost <= taken {
			n++
		}
		s.kept = slices.Delete(s.kept, 0, n)
		s.wake()
	}
	if flags&flagAgain != 0 && s.heard.Sub(s.again) >= s.mux.o.Ping/40 { // twice as often as askAgain asks
		s.again = s.heard
		for _, m := range s.kept {
			if m.number >= expected {
				s.say(m.data)
			}
		}
	}
	switch {
	case sent >= s.expected:
		s.askAgain()
	case flags&flagAsk != 0:
		s.status(0)
	}
	s.end()
}
