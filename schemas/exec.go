package schemas

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Limits of programs that run beside a task's process.
const (
	MaxExecBytes  = 16 << 10 // of a command, its environment and its folder together
	MaxExecOutput = 1 << 20  // of each stream in an ExecResult
	MaxExecTime   = Duration(24 * time.Hour)
)

// ExecID names a program that runs beside a task's process.
type ExecID string

// ParseExecID checks an id: letters and digits.
func ParseExecID(s string) (ExecID, error) {
	if s == "" || len(s) > 64 || strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") != "" {
		return "", fmt.Errorf("an id of an exec is 1 to 64 letters and digits")
	}
	return ExecID(s), nil
}

// ExecRequest asks for a program to run beside a task's process, with the task's rights
// and limits.
type ExecRequest struct {
	Command    []string          `json:"command"`
	Env        map[string]string `json:"env,omitzero"`        // laid over the task's
	Workdir    string            `json:"workdir,omitzero"`    // the task's, if not given
	Stdin      string            `json:"stdin,omitzero"`      // not with background
	Timeout    Duration          `json:"timeout,omitzero"`    // after which it is killed; 0s: none. Not with background
	Background bool              `json:"background,omitzero"` // it goes on after the answer, and nobody reads along
}

// ParseExecRequest reads what a client sent, and checks it.
func ParseExecRequest(b []byte) (ExecRequest, error) {
	var r ExecRequest
	if err := DecodeStrict(b, &r); err != nil {
		return r, err
	}
	c := &checker{}
	r.check(c)
	if err := InvalidSpec(c.errs); err != nil {
		return r, err
	}
	return r, nil
}

// Check gives what is wrong with a request, nil if nothing is.
func (r ExecRequest) Check() error {
	c := &checker{}
	r.check(c)
	if err := InvalidSpec(c.errs); err != nil {
		return err
	}
	return nil
}

func (r ExecRequest) check(c *checker) {
	c.value(len(r.Command) > 0, "command", "must name a program")
	checkArgs(c, "command", r.Command)
	(&Spec{Env: r.Env}).checkEnv(c)
	c.value(!strings.Contains(r.Workdir, "\x00") && len(r.Workdir) <= 4096, "workdir", "must be a path")
	size := len(r.Workdir)
	for _, w := range slices.Concat(r.Command, r.Environment()) {
		size += len(w) + 1
	}
	c.value(size <= MaxExecBytes, "command", "with env and workdir it must be at most %d bytes", MaxExecBytes)
	c.value(r.Timeout >= 0 && r.Timeout <= MaxExecTime, "timeout", "must be 0s to %s", MaxExecTime)
	if r.Background {
		c.value(r.Stdin == "", "stdin", "a program in the background reads nothing")
		c.value(r.Timeout == 0, "timeout", "a program in the background has none; DELETE ends it")
	}
}

// Environment is Env as K=V, by name.
func (r ExecRequest) Environment() (list []string) {
	for k, v := range r.Env {
		list = append(list, k+"="+v)
	}
	slices.Sort(list)
	return list
}

// ExecResult is how a program ended that was waited for. Of each stream there are the
// first MaxExecOutput bytes: as text where they are UTF-8, else Base64 has them.
type ExecResult struct {
	ExitCode     int    `json:"exit_code"`        // 127: not found, 126: it cannot be run
	Signal       int    `json:"signal,omitzero"`  // that ended it
	Message      string `json:"message,omitzero"` // a sentence for people
	Stdout       string `json:"stdout"`
	Stderr       string `json:"stderr"`
	StdoutBase64 string `json:"stdout_base64,omitzero"`
	StderrBase64 string `json:"stderr_base64,omitzero"`
	Truncated    bool   `json:"truncated"` // it wrote more
	TimedOut     bool   `json:"timed_out"` // it was killed at its timeout
}

// Exec is a program beside a task's process: one in the background, or one whose
// streams somebody holds or may come back for. What has ended is known for a while.
type Exec struct {
	ID         ExecID   `json:"id"`
	Command    []string `json:"command"`
	Background bool     `json:"background"`
	Terminal   bool     `json:"terminal,omitzero"`
	Attached   bool     `json:"attached,omitzero"` // somebody holds its streams
	Running    bool     `json:"running"`
	Age        Duration `json:"age"`           // since its start
	Exit       *Exit    `json:"exit,omitzero"` // none of one that has ended: nobody knows it

	// The newest of what it wrote, in a background one's own answer alone.
	Stdout       string `json:"stdout,omitzero"`
	Stderr       string `json:"stderr,omitzero"`
	StdoutBase64 string `json:"stdout_base64,omitzero"`
	StderrBase64 string `json:"stderr_base64,omitzero"`
	StdoutBytes  int64  `json:"stdout_bytes,omitzero"` // it ever wrote, as far as this agent has seen
	StderrBytes  int64  `json:"stderr_bytes,omitzero"`
}

// ExecList lists a task's programs, oldest first.
type ExecList struct {
	Items []Exec `json:"items"`
}

// ExecStarted is the answer to a program in the background.
type ExecStarted struct {
	Exec Exec `json:"exec"`
}

// Channels of the frames of an exec's session, and of the binary messages of its
// WebSocket, each of which begins with one of them.
const (
	ChannelStdin   byte = 0 // to the program
	ChannelStdout  byte = 0 // from the program
	ChannelStderr  byte = 1
	ChannelControl byte = 2 // an ExecControl, which is a text message on the WebSocket
)

// ExecWindow is how many bytes of one stream may be under way that the client has not
// acknowledged; a program that writes more waits. So many are kept for one that comes back.
// A client that acknowledges sends no more than so many bytes that the program does not
// have, or its acknowledgements are stuck behind them.
const ExecWindow = 256 << 10

// ExecControl is a message about the program. One field is set.
type ExecControl struct {
	// To the program.
	End    bool         `json:"end,omitzero"` // nothing more comes on stdin
	Resize *Window      `json:"resize,omitzero"`
	Signal string       `json:"signal,omitzero"` // INT, TERM, KILL…
	Ack    *ExecOffsets `json:"ack,omitzero"`    // the client has so much, and needs it no more

	// From the program.
	Started *ExecBegin `json:"started,omitzero"` // the first message
	Stdin   int64      `json:"stdin,omitzero"`   // so many bytes the program has
	Exit    *ExecExit  `json:"exit,omitzero"`    // the last one
	Lost    string     `json:"lost,omitzero"`    // the last one: a sentence for why nothing more comes
}

// MaxWindow is the most rows and columns of a terminal.
const MaxWindow = 10_000

// Window is the size of a terminal.
type Window struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`

	Unknown Unknown `json:",embed"`
}

// ExecOffsets are places in the two streams of output.
type ExecOffsets struct {
	Stdout int64 `json:"stdout"`
	Stderr int64 `json:"stderr"`
}

// ExecBegin says where each stream goes on. Output is lost that begins behind what the
// client has asked for; input is to be sent from Stdin on.
type ExecBegin struct {
	ID     ExecID `json:"id,omitzero"` // none of the task's own process
	Stdin  int64  `json:"stdin"`
	Has    int64  `json:"has"` // of stdin, the program; the rest waits for it
	Stdout int64  `json:"stdout"`
	Stderr int64  `json:"stderr"`
}

// ExecExit is how a program ended.
type ExecExit struct {
	Code     int    `json:"code"`
	Signal   int    `json:"signal,omitzero"`
	TimedOut bool   `json:"timed_out,omitzero"`
	Message  string `json:"message,omitzero"` // a sentence for people
}
