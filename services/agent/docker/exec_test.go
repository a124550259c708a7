package docker

import (
	"os"
	"slices"
	"testing"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

// What init gives for a terminal is one, or nothing.
func TestTerminalFromInit(t *testing.T) {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	is := func(fds ...int) error {
		p := &foreground{}
		defer p.closeStreams()
		return p.started(answer{initproto.Reply{Event: initproto.EventStarted}, fds}, agent.StdioTerminal)
	}
	if err := is(master); err != nil {
		t.Error(err)
	}
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var pipe, two [2]int
	for _, p := range []*[2]int{&pipe, &two} {
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
	}
	defer unix.Close(pipe[1])
	for name, fds := range map[string][]int{"another device": {null}, "a pipe": {pipe[0]}, "two": two[:], "nothing": nil} {
		if is(fds...) == nil {
			t.Errorf("%s was taken", name)
		}
		for _, fd := range fds {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
				t.Errorf("%s was left open", name)
			}
		}
	}
}

// An init that was taken over gains nothing by programs that it makes up.
func TestMadeUpPrograms(t *testing.T) {
	a := &attempt{rt: &Runtime{log: zerolog.Nop()}, calls: map[uint64]chan answer{}}
	null := func() int {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	for i := range 1000 {
		fd := null()
		a.kept(initproto.Reply{Event: initproto.EventKept, Name: string(rune('a' + i)), Started: -1, Files: []string{"stdout"}}, []int{fd})
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
			t.Fatal("what is no pipe was kept")
		}
	}
	fd := null()
	a.kept(initproto.Reply{Event: initproto.EventKept, Name: "more", Files: nil}, []int{fd})
	if n := len(a.Backgrounds()); n > 40 {
		t.Errorf("%d programs are remembered", n)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
		t.Error("a descriptor without a name was kept")
	}
	a.tails.Wait()
}

func TestLowestPort(t *testing.T) {
	for _, c := range []struct {
		exposed []string
		want    int
	}{{nil, 0}, {[]string{"8080/tcp"}, 8080}, {[]string{"9000", "443/tcp", "53/udp"}, 443}, {[]string{"53/udp", "0/tcp", "x/tcp", "70000/tcp"}, 0}} {
		for range 2 {
			if got := lowestPort(c.exposed); got != c.want {
				t.Errorf("%v: %d", c.exposed, got)
			}
			slices.Reverse(c.exposed)
		}
	}
}
