package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// terminal tells of its terminal, of each new size and line, and ends at Ctrl-C.
func terminal([]string) int {
	name, err := os.Readlink("/proc/self/fd/0")
	if err != nil {
		return report("terminal", err)
	}
	own, err := os.OpenFile("/dev/tty", os.O_RDWR, 0) // there is one only in a session with a terminal
	if err != nil {
		return report("terminal", err)
	}
	_ = own.Close()
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGWINCH, syscall.SIGINT)
	size := func() string {
		w, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err != nil {
			return err.Error()
		}
		return fmt.Sprintf("%dx%d", w.Row, w.Col)
	}
	fmt.Printf("on %s %s TERM=%s\n", name, size(), os.Getenv("TERM"))
	lines := make(chan string)
	go func() {
		in := bufio.NewScanner(os.Stdin)
		for in.Scan() {
			lines <- in.Text()
		}
		close(lines)
	}()
	for {
		select {
		case s := <-signals:
			if s == syscall.SIGINT {
				fmt.Println("interrupted")
				return 130
			}
			fmt.Printf("now %s\n", size())
		case line, ok := <-lines:
			if !ok {
				fmt.Println("end")
				return 0
			}
			fmt.Printf("got %s\n", line)
		}
	}
}

// deaf listens on a port of 127.0.0.1 and takes nobody, once its queue is full.
func deaf(a []string) int {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: num(a, 0, 80), Addr: [4]byte{127, 0, 0, 1}})
	}
	if err == nil {
		err = unix.Listen(fd, 0)
	}
	if err != nil {
		return report("deaf", err)
	}
	fmt.Println("ready")
	time.Sleep(time.Hour)
	return 0
}

// family starts a child, one in a session of its own, and one whose parent is gone, and
// sleeps. All ignore TERM.
func family(a []string) int {
	signal.Ignore(syscall.SIGTERM)
	switch arg(a, 0, "") {
	case "sleep":
		time.Sleep(time.Hour)
		return 0
	case "daemon":
		c := self("family", "sleep")
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		return report("daemon", c.Start())
	}
	daemon := self("family", "daemon")
	daemon.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	apart := self("family", "sleep")
	apart.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	for _, start := range []func() error{daemon.Run, apart.Start, self("family", "sleep").Start} {
		if err := start(); err != nil {
			return report("family", err)
		}
	}
	fmt.Println("ready")
	time.Sleep(time.Hour)
	return 0
}

// processes prints how many there are beside init and this one.
func processes([]string) int {
	list, err := os.ReadDir("/proc")
	if err != nil {
		return report("processes", err)
	}
	n := 0
	for _, e := range list {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid != 1 && pid != os.Getpid() {
			n++
		}
	}
	fmt.Println(n)
	return 0
}

// things makes one of each kind of file in a folder.
func things(a []string) int {
	dir := arg(a, 0, "/tmp/things")
	in := func(name string) string { return filepath.Join(dir, name) }
	socket := func() error {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: in("socket"), Net: "unix"})
		if err == nil {
			l.SetUnlinkOnClose(false)
			err = l.Close()
		}
		return err
	}
	for _, make := range []func() error{
		func() error { return os.MkdirAll(in("folder/deeper"), 0o755) },
		func() error { return os.WriteFile(in("folder/deeper/file"), []byte("inside\n"), 0o640) },
		func() error { return os.Symlink("deeper/file", in("folder/link")) },
		func() error { return os.Symlink("../folder", in("within")) },
		func() error { return os.Symlink("/etc/passwd", in("out")) },
		func() error { return os.Symlink("../../etc", in("up")) },
		func() error { return unix.Mkfifo(in("fifo"), 0o600) },
		socket,
		func() error { return os.WriteFile(in("secret"), []byte("x"), 0) },
		func() error { return os.WriteFile(in("sparse"), nil, 0o600) },
		func() error { return os.Truncate(in("sparse"), 1<<20) },
	} {
		if err := make(); err != nil {
			return report("things", err)
		}
	}
	return report("things", nil)
}
