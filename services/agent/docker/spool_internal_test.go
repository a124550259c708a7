package docker

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
)

// A disk that is full and has room again leaves no gap in a log, and the reason is
// known to the next agent.
func TestAFullDiskCutsTheLog(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("needs the right to mount: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	open := func() *spool {
		t.Helper()
		s, err := openSpool(dir, 1<<20, null)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.close)
		return s
	}
	write := func(s *spool, b []byte) {
		t.Helper()
		p, err := newPipe(os.Getuid(), os.Getgid())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.write.Write(b); err != nil {
			t.Fatal(err)
		}
		p.write.Close()
		s.pump(p.read, 0)
		p.read.Close()
	}
	s := open()
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 128<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	all := bytes.Repeat([]byte("0123456789abcdef"), 200<<10/16)
	write(s, all)
	kept, dropped := s.Size(schemas.Stdout)
	if kept+dropped != int64(len(all)) || dropped == 0 || !s.Full() {
		t.Fatalf("kept %d, dropped %d, full %t", kept, dropped, s.Full())
	}
	s.close()
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	next := open()
	write(next, all[:100])
	again, more := next.Size(schemas.Stdout)
	if again != kept || more != dropped+100 || !next.Full() {
		t.Errorf("the next agent kept %d, dropped %d, full %t", again, more, next.Full())
	}
}

func TestTheLimitIsNoFullDisk(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	s, err := openSpool(t.TempDir(), 10, null)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	p, err := newPipe(os.Getuid(), os.Getgid())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.write.Write(make([]byte, 30)); err != nil {
		t.Fatal(err)
	}
	p.write.Close()
	s.pump(p.read, 0)
	p.read.Close()
	if kept, dropped := s.Size(schemas.Stdout); kept != 10 || dropped != 20 || s.Full() {
		t.Errorf("kept %d, dropped %d, full %t", kept, dropped, s.Full())
	}
}
