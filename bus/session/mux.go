package session

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
)

// Options of a Mux. Zero values mean the defaults.
type Options struct {
	Receive string // subject of what comes, up to the address: "dayfly.sessions.up."
	Filter  string // of addresses that this process takes: "*.g1.*"
	Send    string // subject of what goes, up to the address

	Window  int           // bytes of one stream and direction under way; 1 MiB
	Ping    time.Duration // how long nothing is said before the other side is asked; 5 s
	Silence time.Duration // how long nothing is heard before it is given up; 30 s

}

// Mux carries the streams of one process over one connection.
type Mux struct {
	o           Options
	send        func(subject string, data []byte) error
	reconnected func() <-chan struct{} // closed when what was sent may have been lost
	stop        func()                 // listening
	quit        chan struct{}
	ends        sync.WaitGroup

	mu      sync.Mutex
	streams map[string]*Stream // under mu: by address
	closed  bool               // under mu
}

// Errors of streams. An error of the other side's Reset is a *ResetError.
var (
	ErrClosed = errors.New("the session is closed")
	ErrGone   = errors.New("the other side of the session is gone")
	ErrFlood  = errors.New("the other side of the session sends more than its window")
	ErrTaken  = errors.New("a session with this address exists")
)

// NewMux listens for the messages of streams. Close it before the connection.
func NewMux(conn *bus.Conn, o Options) (*Mux, error) {
	m := newMux(o, conn.NC.Publish, conn.Reconnected)
	sub, err := conn.NC.Subscribe(o.Receive+o.Filter, func(msg *nats.Msg) {
		m.receive(strings.TrimPrefix(msg.Subject, o.Receive), msg.Data)
	})
	if err != nil {
		return nil, fmt.Errorf("listen for sessions: %w", err)
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil { // bounded by the windows
		return nil, fmt.Errorf("listen for sessions: %w", err)
	}
	m.stop = func() {
		_ = sub.Unsubscribe()
		_ = conn.NC.Flush() // the resets
	}
	m.ends.Go(m.run)
	return m, nil
}

func newMux(o Options, send func(subject string, data []byte) error, reconnected func() <-chan struct{}) *Mux {
	if o.Window == 0 {
		o.Window = 1 << 20
	}
	if o.Ping == 0 {
		o.Ping = 5 * time.Second
	}
	if o.Silence == 0 {
		o.Silence = 30 * time.Second
	}
	return &Mux{o: o, send: send, reconnected: reconnected, stop: func() {}, quit: make(chan struct{}), streams: map[string]*Stream{}}
}

// Open makes this side of the stream with the address, which is that of no other. The
// stream is to be closed or reset in the end.
func (m *Mux) Open(address string) (*Stream, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return nil, ErrClosed
	case m.streams[address] != nil:
		return nil, ErrTaken
	}
	now := time.Now()
	s := &Stream{mux: m, address: address, heard: now, spoke: now, expected: 1, changed: make(chan struct{}), done: make(chan struct{})}
	m.streams[address] = s
	return s, nil
}

// Len is how many streams there are.
func (m *Mux) Len() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.streams)
}

// Close resets what is open and waits until nothing of the Mux runs any more.
func (m *Mux) Close() {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return
	}
	m.closed = true
	m.mu.Unlock()
	close(m.quit)
	m.ends.Wait()
	for _, s := range m.all() {
		s.Reset(CodeClosing, "the service is going down")
	}
	m.stop()
}

func (m *Mux) all() []*Stream {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]*Stream, 0, len(m.streams))
	for _, s := range m.streams {
		list = append(list, s)
	}
	return list
}

func (m *Mux) forget(address string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.streams, address)
}

// receive takes one message of the stream with the address. It never blocks for long:
// all streams share the goroutine that calls it.
func (m *Mux) receive(address string, msg []byte) {
	m.mu.Lock()
	s := m.streams[address]
	m.mu.Unlock()
	if s != nil {
		s.receive(msg)
		return
	}
	if len(msg) > 0 && msg[0] != kindReset {
		_ = m.send(m.o.Send+address, resetMessage(CodeUnknown, "no such session here"))
	}
}

// run asks after the other sides, gives up those that are silent, and asks all of them
// at once when the connection is back.
func (m *Mux) run() {
	tick := time.NewTicker(m.o.Ping / 5)
	defer tick.Stop()
	for {
		again := m.reconnected()
		select {
		case <-m.quit:
			return
		case <-again:
			for _, s := range m.all() {
				s.ask()
			}
		case <-tick.C:
			m.check(time.Now())
		}
	}
}

func (m *Mux) check(now time.Time) {
	for _, s := range m.all() {
		s.check(now)
	}
}
