package docker

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// What an init that was taken over does to its duplicate of a stdin that is full does not
// make the agent wait: not where it opened its own end, and where it cannot, as of a
// terminal, the one write alone.
func TestAStdinThatIsMadeToWait(t *testing.T) {
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	for n, err := 1, error(nil); err == nil && n > 0; n, err = unix.Write(ends[1], make([]byte, 4096)) {
	}
	theirs, err := unix.Dup(ends[1])
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(theirs)
	handed, err := unix.Dup(ends[1])
	if err != nil {
		t.Fatal(err)
	}
	own, err := adoptInput(handed)
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	shared := os.NewFile(uintptr(ends[1]), "stdin")
	defer shared.Close()
	if err := unix.SetNonblock(theirs, false); err != nil {
		t.Fatal(err)
	}
	if raw, err := own.SyscallConn(); err != nil {
		t.Fatal(err)
	} else if err := raw.Control(func(fd uintptr) {
		if _, err := unix.Write(int(fd), make([]byte, 4096)); err != unix.EAGAIN {
			t.Errorf("a write to the agent's own end: %v", err)
		}
	}); err != nil {
		t.Fatal(err)
	}

	note, err := os.Create(filepath.Join(t.TempDir(), "stdin"))
	if err != nil {
		t.Fatal(err)
	}
	a := &attempt{done: make(chan struct{})}
	a.meta.Input = true
	c := &console{a: a, note: note, ready: make(chan struct{})}
	defer note.Close()
	c.opens(shared)
	ended := make(chan error, 1)
	go func() {
		_, err := c.Write(t.Context(), make([]byte, 4096))
		ended <- err
	}()
	began := func() bool {
		var b [16]byte
		n, _ := note.ReadAt(b[:], 0)
		return n == len(b)
	}
	for !began() {
		if t.Context().Err() != nil {
			t.Fatal("it did not begin")
		}
	}
	c.interrupt() // returns
	if fed, err := c.Fed(); fed != 0 || err != nil {
		t.Errorf("%d bytes are there: %v", fed, err)
	}
	_ = unix.Close(ends[0])
	if err := <-ended; err == nil {
		t.Error("the write came through")
	}
}
