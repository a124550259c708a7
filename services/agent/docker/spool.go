package docker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// pipeBytes is the room of each pipe. Its pages count only while they hold bytes.
const pipeBytes = 256 << 10

// spool is the Output of one attempt: two files into which the kernel moves what
// the pipes hold. A byte is in the pipe, which init keeps open, or in the file, at
// any moment: an agent that is killed loses none, and the next one goes on at the
// file's end.
type spool struct {
	limit int64
	null  *os.File

	mu      sync.Mutex
	files   [2]*os.File // guarded: nil once closed
	counts  *os.File
	kept    [2]int64
	dropped [2]int64
	full    bool // the host's disk did not take more: nothing is kept from then on
	changed chan struct{}

	tail *agent.Tail   // of an interactive attempt: the newest of what the log has no room for
	cut  [2]int64      // bytes of the streams that were dropped before there was a tail
	held *[2]int64     // what who reads along has of both streams; nil: nobody does
	free bool          // nobody is waited for any more
	room chan struct{} // closed, and made anew, when held changes
}

var streamNames = [2]string{string(schemas.Stdout), string(schemas.Stderr)}

func streamIndex(s schemas.Stream) int {
	if s == schemas.Stderr {
		return 1
	}
	return 0
}

// openSpool opens or makes the files in dir.
func openSpool(dir string, limit int64, null *os.File) (*spool, error) {
	s := &spool{limit: limit, null: null}
	for i, name := range streamNames {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			s.close()
			return nil, fmt.Errorf("open spool: %w", err)
		}
		s.files[i] = f
		if st, err := f.Stat(); err == nil {
			s.kept[i] = st.Size()
		}
	}
	f, err := os.OpenFile(filepath.Join(dir, "dropped"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		s.close()
		return nil, fmt.Errorf("open spool: %w", err)
	}
	s.counts = f
	var b [16]byte
	if n, _ := f.ReadAt(b[:], 0); n == len(b) {
		s.dropped = [2]int64{int64(binary.LittleEndian.Uint64(b[:8])), int64(binary.LittleEndian.Uint64(b[8:]))}
	} else if _, err := f.WriteAt(b[:], 0); err != nil && s.kept == [2]int64{} { // its place is taken before the disk may be full
		s.close()
		return nil, fmt.Errorf("open spool: %w", err)
	}
	s.cut = s.dropped // an earlier agent's tail is gone with it
	s.full = s.dropped != [2]int64{} && s.kept[0]+s.kept[1] < limit
	return s, nil
}

// pump moves everything from the pipe into stream i until all write ends are
// closed, or the pipe's read deadline passes. It costs nothing while no byte comes.
func (s *spool) pump(pipe *os.File, i int) {
	raw, err := pipe.SyscallConn()
	if err != nil {
		return
	}
	for {
		var wait <-chan struct{}
		_ = raw.Read(func(fd uintptr) bool {
			for {
				n, err := s.take(int(fd), i)
				switch {
				case err == errHeld:
					wait = s.waits(i)
					return true
				case err == unix.EAGAIN:
					return false
				case err == unix.EINTR:
				case err != nil || n == 0:
					return true
				}
			}
		})
		if wait == nil {
			return
		}
		<-wait
	}
}

// errHeld says that who reads along has not taken enough yet.
var errHeld = errors.New("the reader is behind")

// heldBytes is how much more than who reads along has is taken from the pipe once the log
// is full: what the tail keeps.
const heldBytes = 128 << 10

// roomLocked is how much may be taken of a stream whose log is full.
func (s *spool) roomLocked(i int) int64 {
	if s.held == nil || s.free {
		return heldBytes
	}
	return heldBytes - (s.kept[i] + s.dropped[i] - s.held[i])
}

// waits gives a channel that is closed once there may be room.
func (s *spool) waits(i int) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.roomLocked(i) > 0 || s.room == nil {
		done := make(chan struct{})
		close(done)
		return done
	}
	return s.room
}

// hold says what who reads along has of both streams, nil if nobody does.
func (s *spool) hold(at *[2]int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = at
	s.wakeHeldLocked()
}

// letGo waits for nobody any more.
func (s *spool) letGo() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free = true
	s.wakeHeldLocked()
}

func (s *spool) wakeHeldLocked() {
	if s.room != nil {
		close(s.room)
	}
	s.room = make(chan struct{})
}

// tailBegin is where the first byte that the tail ever had stands in its stream.
func (s *spool) tailBegin(stream schemas.Stream) int64 {
	i := streamIndex(stream)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kept[i] + s.cut[i]
}

// take moves what the pipe holds now: into the file as long as there is room, and
// to nowhere beyond the limit, for the task shall not notice.
func (s *spool) take(pipe int, i int) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files[i] == nil {
		return 0, os.ErrClosed
	}
	const flags = unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE
	if room := s.limit - s.kept[0] - s.kept[1]; room > 0 && !s.full {
		off := s.kept[i]
		n, err := unix.Splice(pipe, nil, int(s.files[i].Fd()), &off, int(min(room, pipeBytes)), flags)
		if n > 0 {
			s.kept[i] += n
			s.notify()
		}
		if err == nil || err == unix.EAGAIN || err == unix.EINTR {
			return n, err
		}
		s.full = true // ENOSPC, EIO: drop and count
	}
	var n int64
	var err error
	if s.tail != nil {
		n, err = s.takeTail(pipe, i)
	} else {
		n, err = unix.Splice(pipe, nil, int(s.null.Fd()), nil, pipeBytes, flags)
	}
	if n > 0 {
		s.dropped[i] += n
		var b [16]byte
		binary.LittleEndian.PutUint64(b[:8], uint64(s.dropped[0]))
		binary.LittleEndian.PutUint64(b[8:], uint64(s.dropped[1]))
		_, _ = s.counts.WriteAt(b[:], 0)
		s.notify()
	}
	return n, err
}

// takeTail takes what the log has no room for. It is called with mu held.
func (s *spool) takeTail(pipe int, i int) (int64, error) {
	room := s.roomLocked(i)
	if room <= 0 {
		return 0, errHeld
	}
	b := make([]byte, min(room, 32<<10))
	n, err := unix.Read(pipe, b)
	if n > 0 {
		s.tail.Append(schemas.Stream(streamNames[i]), b[:n])
	}
	return int64(n), err
}

// notify is called with mu held.
func (s *spool) notify() {
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// wake tells those who wait that the attempt is done.
func (s *spool) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notify()
}

// ReadAt implements agent.Output.
func (s *spool) ReadAt(stream schemas.Stream, p []byte, off int64) (int, error) {
	i := streamIndex(stream)
	s.mu.Lock()
	f, kept := s.files[i], s.kept[i]
	s.mu.Unlock()
	if f == nil {
		return 0, os.ErrClosed
	}
	if off >= kept {
		return 0, io.EOF
	}
	if int64(len(p)) > kept-off {
		p = p[:kept-off]
	}
	n, err := f.ReadAt(p, off)
	if errors.Is(err, io.EOF) && n > 0 {
		err = nil
	}
	return n, err
}

// Size implements agent.Output.
func (s *spool) Size(stream schemas.Stream) (kept, dropped int64) {
	i := streamIndex(stream)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kept[i], s.dropped[i]
}

// Full implements agent.Output.
func (s *spool) Full() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.full
}

// Changed implements agent.Output.
func (s *spool) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.changed
}

func (s *spool) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, f := range s.files {
		if f != nil {
			_ = f.Close()
			s.files[i] = nil
		}
	}
	if s.counts != nil {
		_ = s.counts.Close()
		s.counts = nil
	}
	s.notify()
}

// pipe is one of the two pipes of an attempt, as it is made for a run.
type pipe struct{ read, write *os.File }

// newPipe makes a pipe whose write end the task's user may open again by
// /dev/stdout: programs that log to that path as a plain user need it.
func newPipe(uid, gid int) (pipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return pipe{}, fmt.Errorf("make pipe: %w", err)
	}
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeBytes)
	_ = unix.Fchown(fds[1], uid, gid)
	// Each end has its own file status flags: the task's end stays blocking.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0])
		_ = unix.Close(fds[1])
		return pipe{}, fmt.Errorf("make pipe: %w", err)
	}
	return pipe{os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe")}, nil
}

// newInput makes a pipe whose read end a program gets as stdin, and may open again.
func newInput(uid, gid int) (pipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return pipe{}, fmt.Errorf("make pipe: %w", err)
	}
	_ = unix.Fchown(fds[0], uid, gid)
	if err := unix.SetNonblock(fds[1], true); err != nil {
		_ = unix.Close(fds[0])
		_ = unix.Close(fds[1])
		return pipe{}, fmt.Errorf("make pipe: %w", err)
	}
	return pipe{os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe")}, nil
}

// adoptPipe takes a read end that init handed back, after a look at what it is.
func adoptPipe(fd int) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("descriptor from init is not a pipe")
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_ACCMODE != unix.O_RDONLY {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("descriptor from init is not a read end")
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "pipe"), nil
}

// interrupt ends the pumps of these pipes.
func interrupt(pipes [2]*os.File) {
	for _, p := range pipes {
		if p != nil {
			_ = p.SetReadDeadline(time.Unix(1, 0))
		}
	}
}
