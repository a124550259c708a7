package docker

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent/initproto"
)

const (
	helloWithin = 5 * time.Second // from connect to hello
	sendWithin  = 2 * time.Second
)

// greeting is a connection that is known to be the container's init.
type greeting struct {
	conn  *initproto.Conn
	hello initproto.Reply
	files map[string]int // the hello's descriptors by name
	peer  *unix.Ucred
}

// listen makes the socket that init dials. Its path in the state folder may be longer
// than a socket address takes, so it is named through the folder's descriptor.
func listen(control string) (*net.UnixListener, error) {
	dir, err := os.Open(control)
	if err != nil {
		return nil, fmt.Errorf("listen for init: %w", err)
	}
	defer dir.Close()
	path := filepath.Join(control, initproto.SocketName)
	_ = os.Remove(path)
	addr := &net.UnixAddr{Net: "unixpacket", Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), initproto.SocketName)}
	l, err := net.ListenUnix("unixpacket", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for init: %w", err)
	}
	l.SetUnlinkOnClose(false) // its name is of a descriptor that is closed by then
	if err := os.Chmod(path, 0o666); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("listen for init: %w", err)
	}
	return l, nil
}

// accept waits for init, and takes the socket away once it is there: from then on
// there is nothing in the container to dial. Others that dial are hung up on.
func (a *attempt) accept(l *net.UnixListener) (*greeting, error) {
	defer os.Remove(filepath.Join(a.dir, "c", initproto.SocketName))
	defer l.Close()
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		g, err := a.greet(c)
		if err == nil {
			return g, nil
		}
		a.log().Warn().Err(err).Msg("refused a connection to the control socket")
		_ = c.Close()
	}
}

// greet decides whether the other side is this container's init. Two things say so.
//
// The kernel's word on the peer: where its pid is visible it must be PID 1 of a pid
// namespace below ours, in a cgroup that bears the container's id. An agent in a
// pid namespace of its own sees pid 0 and skips this.
//
// The key: init repeats the one that its run brought. It is in the memory of an
// undumpable process and in a file that only root reads, so no process of the task
// knows it. Before the run there is no process of the task.
func (a *attempt) greet(c *net.UnixConn) (*greeting, error) {
	peer, err := peerOf(c)
	if err != nil {
		return nil, fmt.Errorf("peer credentials: %w", err)
	}
	if id := a.containerID(); peer.Pid > 0 && id != "" && !isInitOf(int(peer.Pid), id) {
		return nil, fmt.Errorf("process %d is not the init of this container", peer.Pid)
	}
	conn := initproto.NewConn(c)
	_ = c.SetReadDeadline(time.Now().Add(helloWithin))
	g := &greeting{conn: conn, files: map[string]int{}, peer: peer}
	fds, err := conn.Receive(make([]byte, initproto.MaxReply), &g.hello)
	if err == nil {
		err = a.checkHello(&g.hello, len(fds))
	}
	if err != nil {
		initproto.CloseAll(fds)
		return nil, err
	}
	_ = c.SetReadDeadline(time.Time{})
	for i, name := range g.hello.Files {
		g.files[name] = fds[i]
	}
	return g, nil
}

func (a *attempt) checkHello(h *initproto.Reply, fds int) error {
	names := slices.Compact(slices.Sorted(slices.Values(h.Files)))
	switch {
	case h.Event != initproto.EventHello || h.Version < 1:
		return errors.New("not a hello")
	case len(h.Files) != fds || len(names) != fds:
		return fmt.Errorf("%d descriptors for %d names", fds, len(names))
	case h.Phase == initproto.PhaseIdle:
		if a.wasRun() {
			return errors.New("says it is idle, but has had its run")
		}
		return nil
	case h.Phase != initproto.PhaseRunning && h.Phase != initproto.PhaseEnded:
		return errors.New("unknown phase")
	case h.Key != a.meta.Key:
		return errors.New("does not know the key")
	case h.Phase == initproto.PhaseEnded && h.Exit == nil:
		return errors.New("ended without an exit")
	}
	return nil
}

func peerOf(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var inner error
	if err := raw.Control(func(fd uintptr) { cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, err
	}
	return cred, inner
}
