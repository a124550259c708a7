package initproto

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrMessage is wrapped by Receive's error when the other side sent what is too
// long, not JSON, or more descriptors than MaxFiles. The connection is of no more use.
var ErrMessage = errors.New("not a message of the protocol")

// Conn is one connection between init and agent. Send may be called from several
// goroutines, Receive from one.
type Conn struct {
	*net.UnixConn
	oob []byte
}

// NewConn wraps a seqpacket connection.
func NewConn(c *net.UnixConn) *Conn {
	return &Conn{UnixConn: c, oob: make([]byte, unix.CmsgSpace(MaxFiles*4))}
}

// Send sends one message. The descriptors stay the caller's.
func (c *Conn) Send(v any, fds ...int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(b) > MaxRequest {
		return fmt.Errorf("message of %d bytes: %w", len(b), unix.EMSGSIZE)
	}
	if len(b) > 64<<10 {
		c.growSendBuffer()
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, oob, nil)
	return err
}

// growSendBuffer makes room for a large run request: a datagram must fit the send
// buffer whole, and the system's default is about 200 KiB.
func (c *Conn) growSendBuffer() {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2*MaxRequest) != nil {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, 2*MaxRequest)
		}
	})
}

// Receive reads one message into v, with buf as its room. The descriptors are
// close-on-exec and become the caller's, also with an error.
func (c *Conn) Receive(buf []byte, v any) ([]int, error) {
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, c.oob)
	if err != nil {
		return nil, err
	}
	fds, err := rights(c.oob[:oobn])
	if err != nil {
		return fds, err
	}
	if n == 0 {
		return fds, net.ErrClosed // seqpacket: the end of the connection
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return fds, fmt.Errorf("too long: %w", ErrMessage)
	}
	if err := json.Unmarshal(buf[:n], v); err != nil {
		return fds, fmt.Errorf("not JSON: %w", ErrMessage)
	}
	return fds, nil
}

func rights(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", ErrMessage)
	}
	for i := range msgs {
		got, err := syscall.ParseUnixRights(&msgs[i])
		if err == nil {
			fds = append(fds, got...)
		}
	}
	return fds, nil
}

// CloseAll closes descriptors that nobody wants.
func CloseAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
