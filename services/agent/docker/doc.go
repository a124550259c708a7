// Package docker runs attempts as containers of a Docker Engine, 20.10 and later.
//
// Docker makes the container and takes it away; everything between goes through
// dayfly-init, PID 1 of each container (package initproto):
//
//	Start ──▶ create ──▶ start ──▶ init dials ──▶ run request ──▶ started
//	             │                     │  stdout, stderr: pipe ─splice─▶ spool file ──▶ Output
//	             │                     └─ exited ──▶ pipes drained, cgroup read ──▶ Done
//	             └── a folder:  <StateDir>/run/<container>/
//	                   meta.json      what this attempt is; written before the create
//	                   c/             mounted read-only: socket "s", file "deadline"
//	                   input/         mounted read-only as /task/input
//	                   stdout stderr  the spool
//	                   dropped        bytes that were not kept, two numbers
//	                   started        boot time at which the process was started
//	                   stopped        boot time by which a stop's grace is over
//	                   outcome.json   written before Done is closed
//
// A folder outlives the agent, and so does the container: Recover puts them
// together again by name and labels. Remove takes first the container, then the
// folder, so that a container never stands without its folder for longer than a
// broken Start takes.
//
// The control channel is hostile once the task runs. Its messages are bounded, its
// descriptors are checked for what they are, and the worst that a taken-over init
// can do is to lie about its own task.
package docker
