package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

// Calls are requests to init that have answers. The connection is hostile once the task
// runs: an answer that nobody waits for is dropped, and what comes with one is looked
// at before it is used.

const (
	firstCall  = 1 // the run's id
	callWithin = 10 * time.Second
)

// answer is one reply to a call.
type answer struct {
	initproto.Reply
	fds []int
}

// call sends a request that has answers. They come until end is called; the channel is
// closed when the connection is gone.
func (a *attempt) call(req initproto.Request, fds ...int) (id uint64, answers <-chan answer, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn == nil || a.finishing || !a.current.Up {
		return 0, nil, agent.ErrAway
	}
	if a.version < 2 && (req.Tty != nil || req.Name != "" || req.Bare) {
		return 0, nil, errors.New("the task was started by an agent that could not do this yet")
	}
	a.lastCall++
	req.ID = a.lastCall
	if b, err := json.Marshal(req); err != nil || len(b) > initproto.MaxExec {
		return 0, nil, fmt.Errorf("a request of more than %d bytes", initproto.MaxExec)
	}
	_ = a.conn.SetWriteDeadline(time.Now().Add(sendWithin))
	if err := a.conn.Send(req, fds...); err != nil {
		return 0, nil, fmt.Errorf("%w: %w", agent.ErrAway, err)
	}
	c := make(chan answer, 2) // no call has more answers: started and exited
	a.calls[req.ID] = c
	return req.ID, c, nil
}

// answer passes a reply on to the call that waits for it.
func (a *attempt) answer(m initproto.Reply, fds []int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.calls[m.ID]; c != nil {
		select {
		case c <- answer{m, fds}:
			return
		default:
		}
	}
	initproto.CloseAll(fds)
}

// end ends a call. What has come and was not taken is dropped.
func (a *attempt) end(id uint64, answers <-chan answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.calls, id)
	for {
		select {
		case m, ok := <-answers:
			if !ok {
				return
			}
			initproto.CloseAll(m.fds)
		default:
			return
		}
	}
}

func (a *attempt) failCallsLocked() {
	for id, c := range a.calls {
		delete(a.calls, id)
		close(c)
	}
}

// next waits for an answer. One that says no is an error.
func next(ctx context.Context, answers <-chan answer) (answer, error) {
	select {
	case m, ok := <-answers:
		switch {
		case !ok:
			return answer{}, agent.ErrAway
		case m.Event == initproto.EventError:
			initproto.CloseAll(m.fds)
			return answer{}, refused(m.Reply)
		}
		return m, nil
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	}
}

// Dial implements agent.Attempt.
func (a *attempt) Dial(ctx context.Context, port int) (agent.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, callWithin)
	defer cancel()
	id, answers, err := a.call(initproto.Request{Op: initproto.OpDial, Port: port})
	if err != nil {
		return nil, err
	}
	defer a.end(id, answers)
	m, err := next(ctx, answers)
	if err != nil {
		return nil, err
	}
	if m.Event != initproto.EventConnected || len(m.fds) != 1 {
		initproto.CloseAll(m.fds)
		return nil, errors.New("init answers a dial with something else")
	}
	return connection(m.fds[0], port)
}

// connection makes a connection of a descriptor from init, if that is one to the port.
func connection(fd, port int) (agent.Conn, error) {
	f := os.NewFile(uintptr(fd), "dialed")
	defer f.Close() // the connection has a duplicate
	for opt, want := range map[int]int{unix.SO_DOMAIN: unix.AF_INET, unix.SO_TYPE: unix.SOCK_STREAM, unix.SO_PROTOCOL: unix.IPPROTO_TCP} {
		if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, opt); err != nil || got != want {
			return nil, errors.New("descriptor from init is not a TCP socket")
		}
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor from init: %w", err)
	}
	tcp, ok := c.(*net.TCPConn)
	if to, known := c.RemoteAddr().(*net.TCPAddr); !ok || !known || !to.IP.IsLoopback() || to.Port != port {
		_ = c.Close()
		return nil, errors.New("descriptor from init is connected to somewhere else")
	}
	return tcp, nil
}
