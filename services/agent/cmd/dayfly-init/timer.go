package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// timer fires at an instant of CLOCK_BOOTTIME, which goes on while the machine
// sleeps; the timers of package time would fire late by that much.
type timer struct {
	f  *os.File
	fd int
	at time.Duration // armed for; 0 is never
	C  chan struct{}
}

func newTimer() (*timer, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make timer: %w", err)
	}
	t := &timer{f: os.NewFile(uintptr(fd), "timer"), fd: fd, C: make(chan struct{}, 1)}
	go func() {
		var b [8]byte
		for {
			if _, err := t.f.Read(b[:]); err != nil {
				return
			}
			_ = binary.NativeEndian.Uint64(b[:]) // how often it fired
			select {
			case t.C <- struct{}{}:
			default:
			}
		}
	}()
	return t, nil
}

// set arms the timer for an instant; 0 disarms it.
func (t *timer) set(at time.Duration) {
	if at == t.at {
		return
	}
	t.at = at
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(max(at, 0)))}
	_ = unix.TimerfdSettime(t.fd, unix.TFD_TIMER_ABSTIME, &spec, nil)
}

// fired says that the timer is no longer armed.
func (t *timer) fired() { t.at = 0 }
