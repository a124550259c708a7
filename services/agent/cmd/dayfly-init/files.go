package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"

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

// asked gives the request of a second mode: what is run as PID 1 has no arguments.
func asked(args []string) (request string, ok bool) {
	return args[len(args)-1], len(args) == 3 && args[1] == initproto.FilesMode
}
