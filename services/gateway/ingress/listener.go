package ingress

import (
	"net"
	"sync"
	"time"
)

// guard bounds how many connections there are, and how long a client may take nothing of
// what is sent to it. It counts what passes.
func (s *Server) guard(ln net.Listener) *guarded {
	return &guarded{Listener: ln, server: s, room: make(chan struct{}, s.cfg.MaxConns), closed: make(chan struct{})}
}

type guarded struct {
	net.Listener
	server *Server
	room   chan struct{}
	conns  sync.WaitGroup

	once   sync.Once
	closed chan struct{}
}

func (g *guarded) Accept() (net.Conn, error) {
	select {
	case g.room <- struct{}{}:
	case <-g.closed:
		return nil, net.ErrClosed
	}
	c, err := g.Listener.Accept()
	if err != nil {
		<-g.room
		return nil, err
	}
	g.conns.Add(1)
	g.server.metrics.Open.WithLabelValues(KindHTTP).Inc()
	return &guardedConn{Conn: g.server.metrics.Outside(c, KindHTTP), stall: g.server.cfg.Stall, done: sync.OnceFunc(func() {
		g.server.metrics.Open.WithLabelValues(KindHTTP).Dec()
		<-g.room
		g.conns.Done()
	})}, nil
}

func (g *guarded) Close() error {
	g.once.Do(func() { close(g.closed) })
	return g.Listener.Close()
}

// wait waits until every connection is closed.
func (g *guarded) wait() { g.conns.Wait() }

type guardedConn struct {
	net.Conn
	stall time.Duration
	done  func()
}

func (c *guardedConn) Write(p []byte) (n int, err error) {
	for len(p) > 0 { // in pieces: one that goes on may be slow
		part := p[:min(len(p), copyBuffer)]
		if err = c.SetWriteDeadline(time.Now().Add(c.stall)); err != nil {
			return n, err
		}
		m, err := c.Conn.Write(part)
		n += m
		if err != nil {
			return n, err
		}
		p = p[len(part):]
	}
	return n, nil
}

func (c *guardedConn) Close() error {
	c.done()
	return c.Conn.Close()
}

// CloseWrite lets net/http end a connection without a reset of what is under way.
func (c *guardedConn) CloseWrite() error {
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite()
}
