package session_test

import (
	"io"
	"net"
	"testing"
	"time"

	"dayfly.dev/bus/session"
)

// What a task listens with may never close its own end. When the other side has gone for
// good, Join lets go of it, after all that was sent has arrived.
func TestJoinLetsGoOfAConnectionThatNobodyHears(t *testing.T) {
	x := setup(t, session.Options{Ping: 20 * time.Millisecond})
	visitor, agent := x.open(t)
	near, task := tcpPair(t)
	joined := make(chan struct{})
	go func() {
		session.Join(t.Context(), agent, near)
		close(joined)
	}()
	c := visitor.Conn()
	if _, err := io.WriteString(c, "bye"); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	got, err := io.ReadAll(task) // the task hears the end, and says nothing
	if string(got) != "bye" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	<-joined
	<-visitor.Done()
}

// tcpPair gives both ends of a connection.
func tcpPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}
