package port_test

import (
	"errors"
	"net"
	"syscall"
	"testing"

	"dayfly.dev/bus/port"
)

func TestKeep(t *testing.T) {
	p, err := port.Keep("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	addr := p.String()
	for range 3 { // a server that is ended and started again
		if _, err := net.Dial("tcp", addr); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		served, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := net.Listen("tcp", addr); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("two at a time: %v", err)
		}
		served.Close() // first: the port keeps the end of the connection
		c.Close()
		l.Close()
	}
	// Whoever takes any port of those that are left gets another.
	for range 1000 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if l.Addr().String() == addr {
			t.Fatal("it was given to somebody else")
		}
	}
}
