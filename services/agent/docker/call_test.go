package docker

import (
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A descriptor from init is a connection to the port that was asked for, or nothing.
func TestConnectionFromInit(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	dial := func() int {
		c, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		f, err := c.(*net.TCPConn).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		fd, err := unix.Dup(int(f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	must := func(fd int, err error) int {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	c, err := connection(dial(), port)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	for name, fd := range map[string]int{
		"a file":                         must(unix.Open(os.DevNull, unix.O_RDWR, 0)),
		"a unix socket":                  pair[0],
		"UDP":                            must(unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)),
		"a socket that is not connected": must(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)),
		"TCP over IPv6":                  must(unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)),
	} {
		if c, err := connection(fd, port); err == nil {
			c.Close()
			t.Errorf("%s was taken", name)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
			t.Errorf("%s was left open", name)
		}
	}
	if c, err := connection(dial(), port+1); err == nil {
		c.Close()
		t.Error("a connection to another port was taken")
	}
}
