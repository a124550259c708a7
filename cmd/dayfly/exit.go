package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

// Exit codes, besides a container's own.
const (
	exitAmiss   = 1 // doctor or templates check found something amiss, or an item of a batch did not complete
	exitUsage   = 2
	exitTimeout = 124 // a --timeout, or the task's time, was over
	exitDayfly  = 125 // dayfly could not do it, or the task ended without an exit code
	exitSignal  = 128 // plus the signal: 130 for Ctrl-C
)

// exitError ends the program with a code. What there is to say has been said if err
// is nil.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}
func (e *exitError) Unwrap() error { return e.err }

// usageError is a wrong command line.
type usageError struct {
	err     error
	command string
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// hintError is an error with its next step.
type hintError struct {
	err  error
	hint string
}

func (e *hintError) Error() string { return e.err.Error() }
func (e *hintError) Unwrap() error { return e.err }

// fail says what went wrong and what to do next, and gives the exit code.
func (c *cli) fail(err error) int {
	if err == nil {
		return 0
	}
	code := exitDayfly
	var ee *exitError
	if errors.As(err, &ee) {
		if ee.err == nil {
			return ee.code
		}
		code = ee.code
	}
	var in interrupted
	if errors.As(err, &in) {
		return signalCode(in.signal)
	}
	var ue *usageError
	if errors.As(err, &ue) {
		// The second line of cobra's own errors is a list of commands alike.
		c.tell("error: %s", strings.TrimSpace(err.Error()))
		c.tell("  try: %s --help", ue.command)
		return exitUsage
	}
	message, hint := explain(err)
	c.tell("error: %s", message)
	if hint != "" {
		c.tell("  try: %s", hint)
	}
	return code
}

func signalCode(s os.Signal) int {
	if n, ok := s.(syscall.Signal); ok {
		return exitSignal + int(n)
	}
	return exitDayfly
}

// explain puts an error into words for a person, with the next step.
func explain(err error) (message, hint string) {
	var he *hintError
	if errors.As(err, &he) {
		hint = he.hint
	}
	var ue *client.UnreachableError
	if errors.As(err, &ue) {
		if hint == "" {
			hint = "dayfly up, or name a running one with --url or DAYFLY_URL; dayfly doctor looks deeper"
		}
		return err.Error(), hint
	}
	var e *schemas.Error
	if !errors.As(err, &e) {
		return err.Error(), hint
	}
	message = e.Detail
	if message == "" {
		message = strings.ReplaceAll(string(e.Code), "_", " ")
	}
	if e.Field != "" {
		message = fieldName(e.Field) + ": " + message
	}
	if about, ok := strings.CutSuffix(err.Error(), e.Error()); ok { // what the error is wrapped in
		message = about + message
	}
	for _, f := range e.Errors {
		if f.Field != e.Field || f.Message != e.Detail {
			message += fmt.Sprintf("\n       %s: %s", fieldName(f.Field), f.Message)
		}
	}
	if hint == "" {
		hint = nextStep(e)
	}
	if e.RequestID != "" {
		hint += fmt.Sprintf("   (request %s)", e.RequestID)
	}
	return message, hint
}

func nextStep(e *schemas.Error) string {
	switch e.Code {
	case schemas.CodeNotFound:
		if e.RequestID == "" { // of something else than a gateway
			return "--url with the address of the API, such as " + defaultURL
		}
		return "dayfly ps -a shows the tasks that there are"
	case schemas.CodeInUse, schemas.CodeBlobMissing:
		return "dayfly blob ls shows which blobs are stored, and which are needed"
	case schemas.CodeStateConflict, schemas.CodeTooLate:
		if e.Task != "" {
			return "dayfly inspect " + string(e.Task)
		}
		return "dayfly inspect shows what became of it"
	case schemas.CodeDraining:
		return "a new task, or dayfly undrain its worker"
	case schemas.CodeNoCapacity:
		return "ask for less with -m or --cpus; dayfly workers shows what there is"
	case schemas.CodeUnavailable, schemas.CodeTooManyRequests:
		if e.RetryAfter > 0 {
			return fmt.Sprintf("again in %s; nothing was done", e.RetryAfter)
		}
		return "again in a moment; nothing was done"
	case schemas.CodeUnknownOutcome:
		return "dayfly ps shows whether it was done"
	case schemas.CodeKeyReused:
		return "another --idempotency-key, or the same task as the first time"
	case schemas.CodeKeyExpired, schemas.CodeInProgress:
		return "another --idempotency-key"
	case schemas.CodeNotAvailable, schemas.CodeNotAllowed, schemas.CodeInvalidValue, schemas.CodeInvalidType:
		return "dayfly run --help shows what can be asked for"
	case schemas.CodeInternal:
		return "again; if it stays so, report it with the log of the gateway"
	}
	return "dayfly --help"
}

// fieldName says where a field of the spec comes from on the command line.
func fieldName(field string) string {
	for _, f := range specFlags {
		if field == f.field || strings.HasPrefix(field, f.field+".") {
			return fmt.Sprintf("%s (%s)", field, f.flag)
		}
	}
	return field
}

// verdict is the error, with its exit code, that a final task means for a command
// that waits for it; nil if it completed.
func verdict(t schemas.Task) error {
	code := 0
	if t.Exit != nil {
		code = t.Exit.Code
	}
	inspect := "dayfly inspect --timeline " + string(t.ID)
	switch t.State {
	case schemas.Completed:
		return nil
	case schemas.Expired:
		return &exitError{exitTimeout, &hintError{
			fmt.Errorf("its time of %s was over", t.Spec.TTL), "a longer --ttl, or dayfly extend while it runs"}}
	case schemas.Canceled:
		if code == 0 {
			code = exitDayfly // it did not do what it was asked to, whatever its process said
		}
		return &exitError{code, &hintError{fmt.Errorf("%s was canceled%s", t.ID, by(t.Cancel)), inspect}}
	}
	switch t.Reason {
	case schemas.ReasonExit:
		if code != 0 {
			return &exitError{code, nil} // the program has said itself what it had to say
		}
	case schemas.ReasonOOM:
		if code == 0 {
			code = 137
		}
		return &exitError{code, &hintError{
			fmt.Errorf("killed because it needed more memory than %s", t.Spec.Resources.Memory), "more with -m"}}
	case schemas.ReasonSignal:
		if code != 0 {
			return &exitError{code, &hintError{fmt.Errorf("killed by signal %d", t.Exit.Signal), inspect}}
		}
	}
	if code == 0 {
		code = exitDayfly
	}
	return &exitError{code, &hintError{errors.New(sentence(t)), reasonHint(t, inspect)}}
}

func by(m *schemas.CancelMark) string {
	if m == nil || m.By == "" {
		return ""
	}
	return " by " + m.By
}

// sentence says in words why a task is as it is.
func sentence(t schemas.Task) string {
	if t.Message != "" {
		return t.Message
	}
	switch t.Reason {
	case schemas.ReasonImage:
		return "the image does not exist or may not be pulled"
	case schemas.ReasonImageAuth:
		return "the registry refuses the login for the image, or asks for one"
	case schemas.ReasonImagePull:
		return "the registry did not give the image"
	case schemas.ReasonImageArch:
		return "the image is for another kind of machine"
	case schemas.ReasonPullTimeout:
		return "the image was not there in time"
	case schemas.ReasonNotFound:
		return "the command does not exist in the image"
	case schemas.ReasonNotExec:
		return "the command may not be executed"
	case schemas.ReasonStart:
		return "the container could not be started"
	case schemas.ReasonStartTimeout:
		return "the container did not start in time"
	case schemas.ReasonQueueTimeout:
		return "no worker had room in time"
	case schemas.ReasonWorkerLost:
		return "its worker was lost"
	case schemas.ReasonNone:
		return "the task is " + string(t.State)
	}
	return "the task is " + string(t.State) + ": " + string(t.Reason)
}

func reasonHint(t schemas.Task, otherwise string) string {
	switch t.Reason {
	case schemas.ReasonImage, schemas.ReasonImageArch:
		return "another image, or docker pull on the worker to see what the registry says"
	case schemas.ReasonImageAuth:
		return "--registry-credentials with the name of a login, or the login in the worker's own file"
	case schemas.ReasonPullTimeout:
		return "a longer --timeout-pull"
	case schemas.ReasonStartTimeout:
		return "a longer --timeout-start"
	case schemas.ReasonQueueTimeout:
		return "dayfly workers shows what there is; ask for less, or wait longer with --timeout-queue"
	case schemas.ReasonNotFound, schemas.ReasonNotExec:
		return "dayfly run " + t.Spec.Image + " ls -l /bin"
	}
	return otherwise
}
