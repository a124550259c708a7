package docker

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"os"
	"slices"
	"syscall"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

// background implements agent.Background. Init keeps the program and the read ends of
// its pipes; this is what the present agent knows of it.
type background struct {
	a       *attempt
	id      string
	command agent.Command
	started time.Duration
	tail    agent.Tail
	pipes   [2]*os.File
	reading int           // under a.mu: pipes that are still read
	done    chan struct{} // closed under a.mu
	exit    schemas.Exit  // once done is closed
	err     error         // once done is closed
}

// Launch implements agent.Attempt.
func (a *attempt) Launch(ctx context.Context, c agent.Command) (agent.Background, error) {
	a.mu.Lock()
	uid, gid := a.uid, a.gid
	a.mu.Unlock()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	b := a.newBackground(newName())
	b.command = agent.Command{Argv: c.Argv, Env: c.Env, Dir: c.Dir}
	fds := []int{int(null.Fd())}
	for i := range b.pipes {
		p, err := newPipe(uid, gid)
		if err != nil {
			b.closePipes()
			return nil, err
		}
		defer p.write.Close()
		b.pipes[i] = p.read
		fds = append(fds, int(p.write.Fd()))
	}
	for _, f := range b.pipes { // not Fd, which would make them blocking
		raw, err := f.SyscallConn()
		if err != nil {
			b.closePipes()
			return nil, err
		}
		_ = raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) })
	}
	id, answers, err := a.call(initproto.Request{Op: initproto.OpExec, Name: b.id, Argv: c.Argv, Env: c.Env, Dir: c.Dir}, fds...)
	if err != nil {
		b.closePipes()
		return nil, err
	}
	defer a.end(id, answers)
	// Known before it can end: its end comes as news of a name.
	a.mu.Lock()
	a.backgrounds = append(a.backgrounds, b)
	a.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, callWithin)
	defer cancel()
	m, err := next(ctx, answers)
	initproto.CloseAll(m.fds)
	a.mu.Lock()
	if err == nil && a.hungUp {
		err = errClosed
	}
	if err != nil {
		a.backgrounds = slices.DeleteFunc(a.backgrounds, func(o *background) bool { return o == b })
		a.sendLocked(initproto.Request{Op: initproto.OpEnd, Name: b.id}) // it may have begun
		a.mu.Unlock()
		b.closePipes()
		return nil, err
	}
	b.readLocked()
	a.mu.Unlock()
	return b, nil
}

func newName() string {
	var n [8]byte
	_, _ = rand.Read(n[:]) // never fails
	return hex.EncodeToString(n[:])
}

func (a *attempt) newBackground(id string) *background {
	return &background{a: a, id: id, started: initproto.Now(), done: make(chan struct{})}
}

// readLocked reads the pipes for as long as there is somebody who could write.
func (b *background) readLocked() {
	for i, f := range b.pipes {
		if f == nil {
			continue
		}
		stream := [2]schemas.Stream{schemas.Stdout, schemas.Stderr}[i]
		b.reading++
		b.a.tails.Go(func() {
			buf := make([]byte, 32<<10)
			for {
				n, err := f.Read(buf)
				b.tail.Append(stream, buf[:n])
				if err != nil {
					break // its end, or the agent's
				}
			}
			_ = f.Close()
			b.a.mu.Lock()
			defer b.a.mu.Unlock()
			b.reading--
			b.drainedLocked()
		})
	}
}

// drainedLocked tells init once all has been read that there will ever be.
func (b *background) drainedLocked() {
	select {
	case <-b.done:
		if b.reading == 0 && !b.a.hungUp && b.err == nil {
			b.a.sendLocked(initproto.Request{Op: initproto.OpTaken, Name: b.id})
		}
	default:
	}
}

// kept takes init's word on a program with a name: each after a hello, and later its end.
func (a *attempt) kept(m initproto.Reply, fds []int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := slices.IndexFunc(a.backgrounds, func(b *background) bool { return b.id == m.Name })
	var b *background
	switch {
	case i >= 0:
		b = a.backgrounds[i]
		initproto.CloseAll(fds) // they are being read
	case a.hungUp || len(m.Name) > 64 || len(fds) != len(m.Files) || len(a.backgrounds) >= initproto.MaxKept+initproto.MaxEnded+1:
		initproto.CloseAll(fds)
		return
	default:
		b = a.newBackground(m.Name)
		b.started = min(max(m.Started, 0), initproto.Now())
		b.command.Argv = m.Argv
		for n, name := range m.Files {
			k := slices.Index(streamNames[:], name)
			if p, err := adoptPipe(fds[n]); err != nil {
				a.log().Warn().Err(err).Msg("the output of a background program is lost")
			} else if k < 0 || b.pipes[k] != nil {
				_ = p.Close()
			} else {
				b.pipes[k] = p
			}
		}
		a.backgrounds = append(a.backgrounds, b)
		b.readLocked()
	}
	if m.Exit != nil {
		b.endLocked(*exitOf(*m.Exit), nil)
		a.forgetEndedLocked()
	}
}

func (b *background) endLocked(exit schemas.Exit, err error) {
	select {
	case <-b.done:
	default:
		b.exit, b.err = exit, err
		close(b.done)
		b.tail.Wake()
		b.drainedLocked()
	}
}

// forgetEndedLocked keeps as many that have ended as init does.
func (a *attempt) forgetEndedLocked() {
	ended := 0
	for i := len(a.backgrounds) - 1; i >= 0; i-- {
		select {
		case <-a.backgrounds[i].done:
			if ended++; ended > initproto.MaxEnded {
				interrupt(a.backgrounds[i].pipes)
				a.backgrounds = slices.Delete(a.backgrounds, i, i+1)
			}
		default:
		}
	}
}

// loseLocked is the end of what can be said of background programs: those that run are
// ended by init with the run, or are the next agent's.
func (a *attempt) loseLocked() {
	for _, b := range a.backgrounds {
		b.endLocked(schemas.Exit{}, agent.ErrAway)
		if a.hungUp {
			interrupt(b.pipes)
		}
	}
}

// Backgrounds implements agent.Attempt.
func (a *attempt) Backgrounds() []agent.Background {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := make([]agent.Background, len(a.backgrounds))
	for i, b := range a.backgrounds {
		list[i] = b
	}
	return list
}

func (b *background) ID() string { return b.id }

func (b *background) Command() agent.Command { return b.command }

func (b *background) StartedFor() time.Duration { return max(0, initproto.Now()-b.started) }

func (b *background) Tail() *agent.Tail { return &b.tail }

func (b *background) Done() <-chan struct{} { return b.done }

func (b *background) Exit() (schemas.Exit, error) { return b.exit, b.err }

func (b *background) Signal(sig syscall.Signal) error {
	select {
	case <-b.done:
		return os.ErrProcessDone
	default:
	}
	b.a.send(initproto.Request{Op: initproto.OpSignal, Name: b.id, Signal: int(sig)})
	return nil
}

func (b *background) Stop(grace time.Duration) {
	b.a.send(initproto.Request{Op: initproto.OpEnd, Name: b.id, Grace: grace})
}

func (b *background) closePipes() {
	for _, p := range b.pipes {
		if p != nil {
			_ = p.Close()
		}
	}
}
