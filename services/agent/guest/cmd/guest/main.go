// Guest is the program inside the test image. Its subcommand is its first argument,
// or argv[0] where it is called by the name of one. Each prints one clear line of
// the outcome. Exit codes: 0 as said below, 1 it could not, 64 bad usage.
//
//	echo WORD…            prints the words
//	exit N [WORD…]        prints the words, if any, and exits with N
//	sleep D [N]           sleeps (a Go duration), then exits with N
//	cat [PATH]            prints stdin or a file
//	env [NAME…]           prints the environment, or the variables
//	count N [INTERVAL]    prints 1 to N, a line each
//	spam [--err] BYTES [INTERVAL]
//	                      prints so many bytes: 64-byte lines with their number,
//	                      a pause after each 128
//	ignore-term [D]       prints "ready", ignores TERM, sleeps
//	term-exit [N]         prints "ready", exits with N on TERM
//	daemonize             leaves a process in a session of its own behind, exits 0
//	flaky N [CODE [D]]    counts its runs in /tmp and prints "run K"; exits with CODE (1) in
//	                      the first N, later prints "ready" and sleeps for D (0)
//	http PORT [AFTER]     listens on 127.0.0.1, or on ADDR:PORT, after a while, prints "ready"; answers any
//	                      path with "hello", /status/N with that code, /slow never, and
//	                      /until/D with 200 for that long, then with 500
//	tcp PORT              listens on 127.0.0.1, prints "ready", sends back what comes
//	deaf PORT             listens on 127.0.0.1 and takes nobody, once its queue is full
//	as UID SUBCOMMAND…    becomes another user first
//	orphans N             leaves N sleeping children behind, exits 0
//	signal N              kills itself by signal N
//	eat BYTES             touches so much memory, holds it until it is killed
//	child-oom BYTES       a child eats; exits 0 once it was killed
//	fork-bomb             starts children until it cannot; prints how many
//	fill PATH             writes until it cannot; prints how much
//	inodes PATH           makes files until it cannot; prints how many
//	id                    prints uid, gid, pid
//	ls PATH               prints names
//	write PATH [TEXT]     writes a file
//	status                prints /proc/self/status
//	fds                   prints its open descriptors, less those that its Go runtime opens
//	reopen                writes to /dev/stdout and /dev/stderr by opening them
//	read-dayfly           tries to write, dial and read what is of dayfly
//	suid                  prints its effective uid (call /bin/suid)
//	terminal              tells of its terminal, its new sizes and lines; ends at Ctrl-C
//	family                starts a child, one in another session, and a daemon; all sleep
//	processes             prints how many there are beside init and this one
//	things PATH           makes one of each kind of file in a folder
//	leave N BYTES [D]     leaves N files of so many bytes in the output folder, prints "ready", sleeps
//	litter                leaves in the output folder what nobody should take
//	try NAME              a hostile system call: exits 0 if the kernel DENIED it, 1 if not
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	args := os.Args
	name := filepath.Base(args[0])
	if name == "guest" || name == "suid" && len(args) > 1 {
		args = args[1:]
		if len(args) == 0 {
			fmt.Fprintln(os.Stderr, "guest: which subcommand?")
			os.Exit(64)
		}
		name = args[0]
	}
	cmd, ok := commands()[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "guest: no subcommand %q\n", name)
		os.Exit(64)
	}
	os.Exit(cmd(args[1:]))
}

func commands() map[string]func([]string) int {
	return map[string]func([]string) int{
		"echo": func(a []string) int { fmt.Println(strings.Join(a, " ")); return 0 },
		"exit": func(a []string) int {
			if len(a) > 1 {
				fmt.Println(strings.Join(a[1:], " "))
			}
			return num(a, 0, 0)
		},
		"sleep":       func(a []string) int { time.Sleep(dur(a, 0, time.Second)); return num(a, 1, 0) },
		"cat":         cat,
		"env":         env,
		"count":       count,
		"spam":        spam,
		"ignore-term": ignoreTerm,
		"term-exit":   termExit,
		"daemonize":   func([]string) int { return leave(1) },
		"orphans":     func(a []string) int { return leave(num(a, 0, 3)) },
		"signal":      kill,
		"flaky":       flaky,
		"http":        serveHTTP,
		"tcp":         serveTCP,
		"eat":         eat,
		"child-oom":   childOOM,
		"fork-bomb":   forkBomb,
		"fill":        fill,
		"inodes":      inodes,
		"id": func([]string) int {
			fmt.Printf("uid=%d gid=%d pid=%d\n", os.Getuid(), os.Getgid(), os.Getpid())
			return 0
		},
		"suid":        func([]string) int { fmt.Printf("euid=%d\n", os.Geteuid()); return 0 },
		"ls":          ls,
		"write":       write,
		"chmod":       func(a []string) int { return report("chmod", os.Chmod(arg(a, 0, ""), 0o777)) },
		"status":      func([]string) int { return cat([]string{"/proc/self/status"}) },
		"fds":         fds,
		"reopen":      reopen,
		"read-dayfly": readDayfly,
		"try":         try,
		"as":          as,
		"deaf":        deaf,
		"terminal":    terminal,
		"family":      family,
		"processes":   processes,
		"things":      things,
		"leave":       leaveFiles,
		"litter":      litter,
	}
}

func arg(a []string, i int, def string) string {
	if i < len(a) {
		return a[i]
	}
	return def
}

func num(a []string, i, def int) int {
	if i >= len(a) {
		return def
	}
	n, err := strconv.Atoi(a[i])
	if err != nil {
		fmt.Fprintf(os.Stderr, "guest: %q is not a number\n", a[i])
		os.Exit(64)
	}
	return n
}

func dur(a []string, i int, def time.Duration) time.Duration {
	if i >= len(a) {
		return def
	}
	if d, err := time.ParseDuration(a[i]); err == nil {
		return d
	}
	n, err := strconv.ParseFloat(a[i], 64)
	if err != nil {
		fmt.Fprintf(os.Stderr, "guest: %q is not a duration\n", a[i])
		os.Exit(64)
	}
	return time.Duration(n * float64(time.Second))
}

func report(what string, err error) int {
	if err != nil {
		fmt.Printf("%s: %v\n", what, err)
		return 1
	}
	fmt.Printf("%s: ok\n", what)
	return 0
}

func cat(a []string) int {
	in := os.Stdin
	if len(a) > 0 {
		f, err := os.Open(a[0])
		if err != nil {
			return report("cat", err)
		}
		in = f
	}
	if _, err := io.Copy(os.Stdout, in); err != nil {
		return report("cat", err)
	}
	return 0
}

func env(a []string) int {
	if len(a) == 0 {
		for _, e := range os.Environ() {
			fmt.Println(e)
		}
	}
	for _, k := range a {
		fmt.Printf("%s=%s\n", k, os.Getenv(k))
	}
	return 0
}

func count(a []string) int {
	for i := range num(a, 0, 10) {
		fmt.Println(i + 1)
		time.Sleep(dur(a, 1, 0))
	}
	return 0
}

// spam's line n is "n" in 62 places after a letter, and a newline.
func spam(a []string) int {
	out, letter := os.Stdout, "o"
	if len(a) > 0 && a[0] == "--err" {
		out, letter, a = os.Stderr, "e", a[1:]
	}
	left, pause := num(a, 0, 64), dur(a, 1, 0)
	w := bufio.NewWriterSize(out, 64<<10)
	for i := 0; left > 0; i++ {
		line := fmt.Sprintf("%s%062d\n", letter, i)
		line = line[:min(left, len(line))]
		left -= len(line)
		if _, err := w.WriteString(line); err != nil {
			return 1
		}
		if pause > 0 && i%128 == 127 {
			_ = w.Flush()
			time.Sleep(pause)
		}
	}
	if w.Flush() != nil {
		return 1
	}
	return 0
}

func ignoreTerm(a []string) int {
	signal.Ignore(syscall.SIGTERM)
	fmt.Println("ready")
	time.Sleep(dur(a, 0, time.Hour))
	return 0
}

func as(a []string) int {
	uid := num(a, 0, 0)
	f, ok := commands()[arg(a, 1, "")]
	if !ok {
		return 64
	}
	if err := syscall.Setresuid(uid, uid, uid); err != nil {
		fmt.Println(err)
		return 1
	}
	return f(a[2:])
}

func termExit(a []string) int {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	fmt.Println("ready")
	<-c
	fmt.Println("term")
	return num(a, 0, 0)
}

func self(args ...string) *exec.Cmd {
	c := exec.Command("/proc/self/exe", args...)
	c.Args[0] = "guest"
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	return c
}

func leave(n int) int {
	for range n {
		c := self("ignore-term", "1h")
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := c.Start(); err != nil {
			return report("leave", err)
		}
	}
	fmt.Printf("left %d\n", n)
	return 0
}

func kill(a []string) int {
	_ = syscall.Kill(os.Getpid(), syscall.Signal(num(a, 0, 15)))
	time.Sleep(time.Minute)
	return 1
}

func eat(a []string) int {
	b := make([]byte, num(a, 0, 1<<30))
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	fmt.Printf("ate %d\n", len(b))
	time.Sleep(time.Hour)
	return len(b) & 1
}

func childOOM(a []string) int {
	err := self("eat", arg(a, 0, "1073741824")).Run()
	fmt.Printf("child: %v\n", err)
	return 0
}

func forkBomb([]string) int {
	spareThreads(8)
	n := 0
	for ; n < 100000; n++ {
		if err := self("sleep", "1h").Start(); err != nil {
			fmt.Printf("forked %d, then: %v\n", n, err)
			return 0
		}
	}
	fmt.Printf("forked %d without end\n", n)
	return 1
}

// spareThreads makes threads that the Go runtime can take when the task may have no more.
func spareThreads(n int) {
	var have, gone sync.WaitGroup
	enough := make(chan struct{})
	for range n {
		have.Add(1)
		gone.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread() // it stays, for others
			have.Done()
			<-enough
		})
	}
	have.Wait()
	close(enough)
	gone.Wait()
}

func fill(a []string) int {
	f, err := os.Create(arg(a, 0, "/tmp/fill"))
	if err != nil {
		return report("fill", err)
	}
	b := make([]byte, 64<<10)
	total := 0
	for {
		n, err := f.Write(b)
		total += n
		if err != nil {
			fmt.Printf("wrote %d, then: %v\n", total, err)
			return 0
		}
	}
}

func inodes(a []string) int {
	dir := arg(a, 0, "/tmp")
	for n := 0; ; n++ {
		f, err := os.Create(filepath.Join(dir, "i"+strconv.Itoa(n)))
		if err != nil {
			fmt.Printf("made %d files, then: %v\n", n, err)
			return 0
		}
		_ = f.Close()
	}
}

func ls(a []string) int {
	list, err := os.ReadDir(arg(a, 0, "."))
	if err != nil {
		return report("ls", err)
	}
	for _, e := range list {
		fmt.Println(e.Name())
	}
	return 0
}

func write(a []string) int {
	return report("write "+arg(a, 0, ""), os.WriteFile(arg(a, 0, ""), []byte(arg(a, 1, "text")), 0o644))
}

func fds([]string) int {
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return report("fds", err)
	}
	var names []string
	for _, e := range list {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.Contains(to, "anon_inode") && !strings.Contains(to, "/proc/") && !strings.Contains(to, "/cgroup/") {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	fmt.Println(strings.Join(names, " "))
	return 0
}

func reopen([]string) int {
	for i, p := range []string{"/proc/self/fd/1", "/proc/self/fd/2"} {
		f, err := os.OpenFile(p, os.O_WRONLY, 0)
		if err != nil {
			return report("reopen", err)
		}
		fmt.Fprintf(f, "again %d\n", i+1)
	}
	return 0
}

// readDayfly does what a task must not be able to. It exits with 1 if any worked.
func readDayfly([]string) int {
	bad := 0
	deny := func(what string, err error) {
		if err == nil {
			bad = 1
			fmt.Printf("%s: ALLOWED\n", what)
			return
		}
		fmt.Printf("%s: denied (%v)\n", what, err)
	}
	for _, p := range []string{"/.dayfly/c/deadline", "/.dayfly/permit/until", "/.dayfly/init", "/.dayfly/c/new", "/task/input/new"} {
		f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE, 0o644)
		if err == nil {
			_ = f.Close()
		}
		deny("write "+p, err)
	}
	c, err := net.Dial("unixpacket", "/.dayfly/c/s")
	if err == nil {
		_ = c.Close()
	}
	deny("dial", err)
	list, err := os.ReadDir("/proc/1/fd") // root sees the numbers
	for _, e := range list {
		var to string
		if to, err = os.Readlink("/proc/1/fd/" + e.Name()); err == nil {
			fmt.Println(to)
			break
		}
	}
	deny("read /proc/1/fd", err)
	_, err = os.ReadFile("/proc/1/environ")
	deny("read /proc/1/environ", err)
	f, err := os.OpenFile("/proc/1/mem", os.O_RDWR, 0)
	if err == nil {
		_ = f.Close()
	}
	deny("open /proc/1/mem", err)
	return bad
}

func try(a []string) int {
	f, ok := hostile()[arg(a, 0, "")]
	if !ok {
		fmt.Fprintf(os.Stderr, "guest: no such call %q\n", arg(a, 0, ""))
		return 64
	}
	err := f()
	if err == nil {
		fmt.Printf("%s: ALLOWED\n", a[0])
		return 1
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		fmt.Printf("%s: denied (%s)\n", a[0], errno)
	} else {
		fmt.Printf("%s: denied (%v)\n", a[0], err)
	}
	return 0
}
