package natssim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Link is the way of one client to the server. Give it to bus.Config.InProcess.
type Link struct {
	s    *Server
	name string

	conn    *conn    // under s.mu: nil while there is none
	refused bool     // under s.mu
	held    bool     // under s.mu
	waiting []func() // under s.mu: what came, in either direction, while it was held

	slowMost  time.Duration // under s.mu: what a message takes at most
	slowUntil time.Time     // under s.mu
}

// Link makes the way for one more client.
func (s *Server) Link(name string) *Link { return &Link{s: s, name: name} }

// InProcessConn implements nats.InProcessConnProvider.
func (l *Link) InProcessConn() (net.Conn, error) {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if l.refused || l.held || l.s.down {
		return nil, errors.New("natssim: no way to the server")
	}
	l.hangUp()
	c := &conn{l: l, subs: map[string]*sub{}, lanes: map[laneKey]time.Time{}, lostAfter: forever}
	c.readable = sync.NewCond(&l.s.mu)
	c.in = fmt.Appendf(nil, `INFO {"server_id":"sim","version":"2.15.2","proto":1,"headers":true,"jetstream":true,"max_payload":1048576}`+"\r\n")
	l.conn = c
	l.s.conns = append(l.s.conns, c)
	return c, nil
}

// Cut breaks the connection. Of what was under way to the server some may still
// arrive; what was under way to the client is gone. Until Heal there is no other.
func (l *Link) Cut() {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.refused = true
	l.hangUp()
}

// Heal ends Cut.
func (l *Link) Heal() {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.refused = false
}

// Hold keeps everything back, in both directions, until Release: nobody notices at
// first.
func (l *Link) Hold() {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.held = true
}

// Release ends Hold: all that was kept back arrives, in order.
func (l *Link) Release() {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.held = false
	waiting := l.waiting
	l.waiting = nil
	for _, do := range waiting {
		do()
	}
}

// Slow lets half of the messages, in both directions, take up to most, for a while.
func (l *Link) Slow(most, long time.Duration) {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.slowMost, l.slowUntil = most, time.Now().Add(long)
}

// hangUp ends the connection; s.mu is held.
func (l *Link) hangUp() {
	c := l.conn
	if c == nil {
		return
	}
	l.conn = nil
	c.end()
	switch l.s.rng.IntN(3) {
	case 0:
		c.lostAfter = time.Time{}
	case 1:
		c.lostAfter = time.Now().Add(time.Duration(l.s.rng.Int64N(int64(20 * time.Millisecond))))
	}
}

// arrive does what a message that has come over the link does, unless the link is held.
func (l *Link) arrive(do func()) {
	if l.held {
		l.waiting = append(l.waiting, do)
		return
	}
	do()
}

var forever = time.Unix(math.MaxInt32, 0)

// conn is a connection, as the client sees it. The server's side of it needs no
// goroutine: it acts in Write and in events.
type conn struct {
	l *Link

	readable  *sync.Cond            // of s.mu
	in        []byte                // under s.mu: to be read by the client
	out       []byte                // under s.mu: written, and not a whole command yet
	ended     bool                  // under s.mu
	subs      map[string]*sub       // under s.mu: by sid
	lanes     map[laneKey]time.Time // under s.mu: when the last message of each arrives
	lostAfter time.Time             // under s.mu: what would reach the server later does not
}

// laneKey names messages that stay in order among themselves: those to one stream, and
// those to one subscription from one source.
type laneKey struct{ to, from string }

type sub struct {
	c       *conn
	sid     string
	pattern string
}

func (c *conn) end() {
	c.ended = true
	for _, x := range c.subs {
		c.l.s.unsubscribe(x)
	}
	c.readable.Broadcast()
	for i, other := range c.l.s.conns {
		if other == c {
			c.l.s.conns = append(c.l.s.conns[:i], c.l.s.conns[i+1:]...)
			break
		}
	}
}

func (c *conn) Read(b []byte) (int, error) {
	s := c.l.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(c.in) == 0 && !c.ended {
		c.readable.Wait()
	}
	if c.ended {
		return 0, io.EOF
	}
	n := copy(b, c.in)
	c.in = c.in[n:]
	return n, nil
}

func (c *conn) Write(b []byte) (int, error) {
	s := c.l.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.ended {
		return 0, io.ErrClosedPipe
	}
	c.out = append(c.out, b...)
	for {
		n := c.command(c.out)
		if n == 0 {
			return len(b), nil
		}
		c.out = c.out[n:]
	}
}

func (c *conn) Close() error {
	s := c.l.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.ended {
		c.end()
		if c.l.conn == c {
			c.l.conn = nil
		}
	}
	return nil
}

func (c *conn) LocalAddr() net.Addr              { return &net.UnixAddr{Name: c.l.name} }
func (c *conn) RemoteAddr() net.Addr             { return &net.UnixAddr{Name: "natssim"} }
func (c *conn) SetDeadline(time.Time) error      { return nil }
func (c *conn) SetReadDeadline(time.Time) error  { return nil }
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

// command takes one command from b and says how long it is, 0 if it is not whole.
func (c *conn) command(b []byte) int {
	line, _, whole := bytes.Cut(b, []byte("\r\n"))
	if !whole {
		return 0
	}
	n := len(line) + 2
	word, rest, _ := strings.Cut(string(line), " ")
	args := strings.Fields(rest)
	switch word {
	case "PING":
		c.l.arrive(func() { c.give([]byte("PONG\r\n")) })
	case "SUB":
		c.l.s.subscribe(&sub{c: c, sid: args[len(args)-1], pattern: args[0]})
	case "UNSUB":
		c.l.s.unsubscribe(c.subs[args[0]])
	case "PUB", "HPUB":
		header, total := 0, number(args[len(args)-1])
		args = args[:len(args)-1]
		if word == "HPUB" {
			header = number(args[len(args)-1])
			args = args[:len(args)-1]
		}
		if len(b) < n+total+2 {
			return 0
		}
		body := bytes.Clone(b[n : n+total])
		m := &packet{from: c, subject: args[0], header: body[:header], data: body[header:]}
		if len(args) > 1 {
			m.reply = args[1]
		}
		c.send(m)
		n += total + 2
	}
	return n
}

func number(s string) int {
	n, _ := strconv.Atoi(s)
	return n
}

// packet is a message on its way.
type packet struct {
	from           *conn
	subject, reply string
	header, data   []byte
}

// send brings a message of the client to the server.
func (c *conn) send(m *packet) {
	s := c.l.s
	if rest, ok := strings.CutPrefix(m.subject, s.alias); ok && s.alias != "" {
		m.subject = "$JS.API." + rest
	}
	st := s.streamFor(m.subject)
	lane := laneKey{to: "core"}
	switch {
	case st != nil:
		lane.to = st.name
	case strings.HasPrefix(m.subject, "$JS.ACK."):
		lane.to = "ack"
	}
	s.later(c, lane, func() {
		c.l.arrive(func() {
			if !time.Now().After(c.lostAfter) {
				s.take(m, st)
			}
		})
	})
}

// deliver brings a message of the server to a subscription.
func (s *Server) deliver(to *sub, source string, m *packet) {
	c := to.c
	s.later(c, laneKey{to.sid, source}, func() {
		c.l.arrive(func() {
			if c.subs[to.sid] != to {
				return
			}
			frame := make([]byte, 0, 64+len(m.subject)+len(m.reply)+len(m.header)+len(m.data))
			if len(m.header) > 0 {
				frame = append(frame, 'H')
			}
			frame = append(append(frame, "MSG "...), m.subject...)
			frame = append(append(frame, ' '), to.sid...)
			if m.reply != "" {
				frame = append(append(frame, ' '), m.reply...)
			}
			if len(m.header) > 0 {
				frame = strconv.AppendInt(append(frame, ' '), int64(len(m.header)), 10)
			}
			frame = strconv.AppendInt(append(frame, ' '), int64(len(m.header)+len(m.data)), 10)
			frame = append(append(append(append(frame, "\r\n"...), m.header...), m.data...), "\r\n"...)
			c.give(frame)
		})
	})
}

func (c *conn) give(b []byte) {
	if !c.ended {
		c.in = append(c.in, b...)
		c.readable.Signal()
	}
}

// later does something when a message of a lane arrives that is sent now.
func (s *Server) later(c *conn, lane laneKey, do func()) {
	now := time.Now()
	at := now.Add(s.delay())
	if now.Before(c.l.slowUntil) && s.chance(0.5) {
		at = at.Add(time.Duration(s.rng.Int64N(int64(c.l.slowMost))))
	}
	if last := c.lanes[lane]; !at.After(last) {
		at = last.Add(1)
	}
	c.lanes[lane] = at
	s.at(at, do)
}

// head is a subject or pattern without its last token. A client's patterns have
// wildcards only in that.
func head(subject string) string { return subject[:strings.LastIndexByte(subject, '.')+1] }

func (s *Server) subscribe(x *sub) {
	x.c.subs[x.sid] = x
	h := head(x.pattern)
	s.subs[h] = append(s.subs[h], x)
}

func (s *Server) unsubscribe(x *sub) {
	if x == nil {
		return
	}
	delete(x.c.subs, x.sid)
	h := head(x.pattern)
	s.subs[h] = slices.DeleteFunc(s.subs[h], func(other *sub) bool { return other == x })
	if len(s.subs[h]) == 0 {
		delete(s.subs, h)
	}
}

// subscribed lists who listens to a subject.
func (s *Server) subscribed(subject string) (list []*sub) {
	h := head(subject)
	for _, x := range s.subs[h] {
		if last := x.pattern[len(h):]; last == "*" || last == subject[len(h):] {
			list = append(list, x)
		}
	}
	return list
}

func match(pattern, subject []string) bool {
	for i, p := range pattern {
		switch {
		case p == ">":
			return len(subject) > i
		case i >= len(subject), p != "*" && p != subject[i]:
			return false
		}
	}
	return len(pattern) == len(subject)
}
