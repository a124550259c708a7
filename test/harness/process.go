package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"dayfly.dev/bus/port"
	"dayfly.dev/schemas"
)

// Process is one service of dayfly as a process of its own. It may be killed, stopped
// and started again; it keeps its addresses.
type Process struct {
	Name string   // unique in its site
	Bin  string   // the dayfly binary; another one upgrades it at the next Start
	Dir  string   // for its log and its addresses
	Args []string // the subcommand and its flags, without the addresses
	Env  []string
	// Under is a command that becomes the process, such as Namespace.Enter.
	Under []string
	// Listen has the flags that say where it listens. Port 0 becomes the one it got.
	Listen map[string]string
	Addrs  Addrs // where it listens, once started

	cmd    *exec.Cmd
	exited chan struct{}
	err    error // of its end, once exited is closed
	ports  []*port.Port
}

// Addrs is what --print-addrs writes.
type Addrs struct {
	HTTP    string `json:"http"`
	Ingress string `json:"ingress"`
	Admin   string `json:"admin"`
	NATS    string `json:"nats"`
	Routes  string `json:"routes"`
	Worker  string `json:"worker"`
	PID     int    `json:"pid"`

	Shims map[string]string `json:"shims"` // URLs by name
}

// Start starts the process and returns once it has said where it listens. It may
// not be ready yet: see Ready.
func (p *Process) Start(ctx context.Context) error {
	file := filepath.Join(p.Dir, p.Name+".json")
	_ = os.Remove(file)
	args := append([]string{}, p.Args...)
	for flag, addr := range p.Listen {
		host, number, err := net.SplitHostPort(addr)
		if err != nil {
			return err
		}
		if number == "0" && p.Under == nil { // a network namespace has no strangers
			kept, err := port.Keep(host)
			if err != nil {
				return err
			}
			p.ports = append(p.ports, kept)
			addr = kept.String()
			p.Listen[flag] = addr
		}
		args = append(args, flag, addr)
	}
	if err := p.run(append(args, "--print-addrs", file)); err != nil {
		return err
	}
	err := Poll(ctx, func() error {
		if !p.Running() {
			return Fatal(fmt.Errorf("it ended: %v", p.err))
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		return json.Unmarshal(b, &p.Addrs)
	})
	if err != nil {
		return fmt.Errorf("start %s: %w\n%s", p.Name, err, p.Tail())
	}
	for flag, url := range map[string]string{"--http": p.Addrs.HTTP, "--ingress": p.Addrs.Ingress, "--admin": p.Addrs.Admin, "--listen": p.Addrs.NATS} {
		if _, ok := p.Listen[flag]; ok {
			_, p.Listen[flag], _ = strings.Cut(url, "://")
		}
	}
	return nil
}

// run starts the process.
func (p *Process) run(args []string) error {
	log, err := os.OpenFile(p.logName(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	argv := append(append(append([]string{}, p.Under...), p.Bin), args...)
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Env = append(os.Environ(), p.Env...)
	if err := p.cmd.Start(); err != nil {
		p.cmd = nil
		return err
	}
	cmd, exited := p.cmd, make(chan struct{})
	p.exited = exited
	go func() {
		p.err = cmd.Wait()
		close(exited)
	}()
	return nil
}

// Ready waits until every check of /readyz passes.
func (p *Process) Ready(ctx context.Context) error {
	err := Poll(ctx, func() error {
		if !p.Running() {
			return Fatal(fmt.Errorf("it ended: %v", p.err))
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.Addrs.Admin+"/readyz", nil)
		if err != nil {
			return err
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err == nil && res.StatusCode != http.StatusOK {
			err = fmt.Errorf("not ready: %s", b)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", p.Name, err, p.Tail())
	}
	return nil
}

// Running says whether the process is there; one that is paused is.
func (p *Process) Running() bool {
	if p.cmd == nil {
		return false
	}
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// PID is the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Kill ends it by SIGKILL and waits for that.
func (p *Process) Kill() { _ = p.end(syscall.SIGKILL) }

// Stop ends it by SIGTERM and waits for it.
func (p *Process) Stop() error { return p.end(syscall.SIGTERM) }

func (p *Process) end(sig syscall.Signal) error {
	if !p.Running() {
		return nil
	}
	_ = p.cmd.Process.Signal(sig)
	select {
	case <-p.exited:
	case <-time.After(40 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.exited
		return fmt.Errorf("%s did not end in time\n%s", p.Name, p.Tail())
	}
	if sig == syscall.SIGTERM && p.err != nil {
		return fmt.Errorf("%s: %w\n%s", p.Name, p.err, p.Tail())
	}
	return nil
}

// Pause stops the process where it stands (SIGSTOP); Resume lets it go on.
func (p *Process) Pause() error { return p.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume lets a paused process go on.
func (p *Process) Resume() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

func (p *Process) logName() string { return filepath.Join(p.Dir, p.Name+".log") }

// Log is all that it has written.
func (p *Process) Log() string {
	b, _ := os.ReadFile(p.logName())
	return string(b)
}

// Tail is the end of its log.
func (p *Process) Tail() string {
	b := p.Log()
	return b[max(0, len(b)-4000):]
}

// Call does one request of the API at url, with JSON in and out. A problem comes back
// as *schemas.Error; key is the Idempotency-Key, "" for none.
func Call(ctx context.Context, method, url, key string, in, out any) error {
	_, err := Request(ctx, http.DefaultTransport, method, url, key, in, out)
	return err
}

// Request is Call over a transport, with the status; 0 if there was no answer.
func Request(ctx context.Context, over http.RoundTripper, method, url, key string, in, out any) (status int, err error) {
	var body io.Reader
	switch v := in.(type) {
	case nil:
	case string:
		body = strings.NewReader(v)
	default:
		b, err := schemas.Encode(v)
		if err != nil {
			return 0, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return 0, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	res, err := (&http.Client{Transport: over}).Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, err
	}
	if res.StatusCode >= 400 {
		e := &schemas.Error{Status: res.StatusCode}
		if schemas.Decode(b, e) != nil {
			return res.StatusCode, fmt.Errorf("%s %s: %s", method, url, res.Status)
		}
		return res.StatusCode, e
	}
	switch out := out.(type) {
	case nil:
		return res.StatusCode, nil
	case *string:
		*out = string(b)
		return res.StatusCode, nil
	}
	return res.StatusCode, schemas.Decode(b, out)
}

// errAll joins what several at a time ended with.
func errAll(n int, do func(i int) error) error {
	errs := make(chan error, n)
	for i := range n {
		go func() { errs <- do(i) }()
	}
	var all error
	for range n {
		all = errors.Join(all, <-errs)
	}
	return all
}
