// Package port keeps a port for a server that a test ends and starts again, or that
// cannot say which one it took. A port that was only looked for, or that is free while
// its server is down, goes to whoever asks the kernel for any.
package port

import (
	"fmt"
	"net/netip"
	"os"
	"syscall"
)

// Port is bound and nobody listens on it: the kernel gives it to none who ask for any
// port, and to those who ask for this one, one at a time. Connections are refused
// meanwhile.
type Port struct {
	netip.AddrPort
	socket *os.File
}

// Keep takes a free TCP port of an IPv4 address of this machine, until Close or until
// the Port is garbage.
func Keep(host string) (*Port, error) {
	ip, err := netip.ParseAddr(host)
	if err != nil || !ip.Is4() {
		return nil, fmt.Errorf("keep a port: %q is no IPv4 address", host)
	}
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("keep a port: %w", os.NewSyscallError("socket", err))
	}
	p := &Port{socket: os.NewFile(uintptr(fd), "port")}
	// It lets the others bind too, who have it by net.Listen.
	err = os.NewSyscallError("setsockopt", syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1))
	if err == nil {
		err = os.NewSyscallError("bind", syscall.Bind(fd, &syscall.SockaddrInet4{Addr: ip.As4()}))
	}
	var bound syscall.Sockaddr
	if err == nil {
		bound, err = syscall.Getsockname(fd)
	}
	if err != nil {
		p.Close()
		return nil, fmt.Errorf("keep a port: %w", err)
	}
	p.AddrPort = netip.AddrPortFrom(ip, uint16(bound.(*syscall.SockaddrInet4).Port))
	return p, nil
}

// Close gives the port back.
func (p *Port) Close() { _ = p.socket.Close() }
