package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

// Calls are requests to init that have answers. The connection is hostile once the task
// runs: an answer that nobody waits for is dropped, and what comes with one is looked
// at before it is used.

const (
	firstCall  = 1 // the run's id
	callWithin = 10 * time.Second
	// killWithin is how long init may take to end a process that is no longer wanted.
	killWithin = 2 * time.Second
	// restWithin is for the output of processes that a program has left behind.
	restWithin = time.Second
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
		case m.Event == initproto.EventError && m.Fault == initproto.FaultStopped:
			initproto.CloseAll(m.fds)
			return answer{}, fmt.Errorf("%w: %s", agent.ErrAway, clip(m.Message))
		}
		return m, nil
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	}
}

// Dial implements agent.Attempt.
func (a *attempt) Dial(ctx context.Context, port int) (net.Conn, error) {
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
		return nil, errors.New(clip(m.Message))
	}
	return connection(m.fds[0], port)
}

// connection makes a connection of a descriptor from init, if that is one to the port.
func connection(fd, port int) (net.Conn, error) {
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
	if to, ok := c.RemoteAddr().(*net.TCPAddr); !ok || !to.IP.IsLoopback() || to.Port != port {
		_ = c.Close()
		return nil, errors.New("descriptor from init is connected to somewhere else")
	}
	return c, nil
}

// Exec implements agent.Attempt.
func (a *attempt) Exec(ctx context.Context, c agent.Command) (schemas.Exit, error) {
	stdio, err := a.stdio(c)
	if err != nil {
		return schemas.Exit{}, err
	}
	defer stdio.close()
	id, answers, err := a.call(initproto.Request{Op: initproto.OpExec, Argv: c.Argv, Env: c.Env, Dir: c.Dir}, stdio.fds[:]...)
	stdio.passed()
	if err != nil {
		return schemas.Exit{}, err
	}
	defer a.end(id, answers)
	m, err := next(ctx, answers)
	for err == nil && m.Event == initproto.EventStarted {
		initproto.CloseAll(m.fds)
		m, err = next(ctx, answers)
	}
	if err != nil {
		a.send(initproto.Request{Op: initproto.OpKill, ID: id})
		if ctx.Err() != nil { // let its last output come
			late, cancel := context.WithTimeout(context.WithoutCancel(ctx), killWithin)
			defer cancel()
			for e := error(nil); e == nil && m.Event != initproto.EventExited; {
				m, e = next(late, answers)
				initproto.CloseAll(m.fds)
			}
		}
		return schemas.Exit{}, err
	}
	initproto.CloseAll(m.fds)
	switch {
	case m.Event == initproto.EventExited && m.Exit != nil:
		return *exitOf(*m.Exit), nil
	case m.Event == initproto.EventError && (m.Code == 126 || m.Code == 127):
		return schemas.Exit{Code: m.Code}, nil
	}
	return schemas.Exit{}, fmt.Errorf("init refuses: %s (%s)", clip(m.Message), m.Fault)
}

// stdio is the three descriptors of an exec, and the goroutines that copy its output.
type stdio struct {
	fds    [3]int
	files  []*os.File // to be closed once they are passed
	reads  []*os.File
	copies sync.WaitGroup
}

func (a *attempt) stdio(c agent.Command) (*stdio, error) {
	a.mu.Lock()
	uid, gid := a.uid, a.gid
	a.mu.Unlock()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	s := &stdio{files: []*os.File{null}}
	for i := range s.fds {
		s.fds[i] = int(null.Fd())
	}
	for i, w := range []io.Writer{c.Stdout, c.Stderr} {
		if w == nil {
			continue
		}
		p, err := newPipe(uid, gid)
		if err != nil {
			s.passed()
			s.close()
			return nil, err
		}
		s.fds[i+1] = int(p.write.Fd())
		s.files, s.reads = append(s.files, p.write), append(s.reads, p.read)
		s.copies.Go(func() { // a writer that fails takes the pipe's end away
			_, _ = io.Copy(w, p.read)
			_ = p.read.Close()
		})
	}
	return s, nil
}

// passed closes our copies of what init was given.
func (s *stdio) passed() {
	for _, f := range s.files {
		_ = f.Close()
	}
	s.files = nil
}

// close waits for the rest of the output.
func (s *stdio) close() {
	for _, p := range s.reads {
		_ = p.SetReadDeadline(time.Now().Add(restWithin))
	}
	s.copies.Wait()
}
