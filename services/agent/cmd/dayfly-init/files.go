package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"

	"golang.org/x/sys/unix"

	"dayfly.dev/services/agent/files"
	"dayfly.dev/services/agent/initproto"
)

// serveFiles is the program that reads and writes files for an agent, with the rights of
// the task. It counts in the task's memory and pids, so it stays small.
func serveFiles(argument string) int {
	runtime.GOMAXPROCS(2)
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(24 << 20)
	// A put whose agent is gone tidies up when its input breaks off; a file that may not
	// grow any more is an error of its write.
	signal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGXFSZ)
	unix.Umask(0)
	var r files.Request
	if err := json.Unmarshal([]byte(argument), &r); err != nil {
		fail(fmt.Errorf("files: not a request: %w", err))
	}
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	}
	if err != nil {
		fail(err)
	}
	dir, err := os.Getwd()
	if err != nil {
		dir = "/"
	}
	res := files.Serve(root, dir, r, os.Stdin, os.Stdout)
	_ = res.Write(os.Stderr)
	return res.ExitCode()
}

// asked gives the request of a second mode.
func asked(args []string) (request string, ok bool) {
	return args[len(args)-1], len(args) == 3 && args[1] == initproto.FilesMode
}

// tidies gives the command that tidies up after a put that was killed, by its grace or for
// want of memory; nil where there is nothing to tidy.
func tidies(argv []string) []string {
	text, ok := asked(argv)
	var r files.Request
	if !ok || json.Unmarshal([]byte(text), &r) != nil || !r.Framed() || r.Tidy {
		return nil
	}
	r.Tidy = true
	b, err := json.Marshal(r)
	if err != nil {
		return nil
	}
	return []string{argv[0], argv[1], string(b)}
}

// tidy runs such a command, of which nobody hears.
func (s *supervisor) tidy(argv []string) {
	if s.pid == 0 || s.by != "" {
		return // all of the task ends
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer null.Close()
	fd := int(null.Fd())
	s.marks++
	p := &program{reads: [2]int{-1, -1}, mark: initproto.Marker + "=" + strconv.Itoa(s.marks), alive: true, started: initproto.Now()}
	var f *fault
	if p.pid, f = s.spawn(argv, []string{p.mark}, "", []int{fd, fd, fd}, false); f == nil {
		s.programs = append(s.programs, p)
	}
}
