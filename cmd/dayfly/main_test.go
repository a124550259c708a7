package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"

	"dayfly.dev/client/clienttest"
	"dayfly.dev/schemas"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"dayfly": main}) }

// TestScripts runs testdata/script, each script against a server of its own. Beside
// testscript's commands there are
//
//	code N COMMAND…       runs the command, which must exit with N
//	await STATE           waits until the newest task is in the state
//	newest VAR            puts the newest task's id into $VAR, its first 12 characters into $VAR_SHORT
//	newestbatch VAR       the same of the newest batch
//	release, expire       let the newest task go on, or end as by its deadline
//	seed ID STATE         puts a task there
//	cutlogs N…            breaks log connections (see clienttest)
//	cmpspec FILE          compares the newest task's spec with the JSON in the file
//	fail N STATUS CODE    answers the next N requests with a problem
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			s := clienttest.Start(t)
			e.Values["server"] = s
			e.Setenv("DAYFLY_URL", s.URL)
			e.Setenv("HOME", e.WorkDir)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code":   cmdCode,
			"await":  cmdAwait,
			"newest": cmdNewest,

			"newestbatch": cmdNewestBatch,
			"release":     func(ts *testscript.TestScript, _ bool, _ []string) { server(ts).Release(newest(ts).ID) },
			"expire":      func(ts *testscript.TestScript, _ bool, _ []string) { server(ts).Expire(newest(ts).ID) },
			"seed":        cmdSeed,
			"cutlogs":     func(ts *testscript.TestScript, _ bool, args []string) { server(ts).CutLogs(numbers(ts, args)...) },
			"fail":        cmdFail,
			"cmpspec":     cmdSpec,
		},
	})
}

func server(ts *testscript.TestScript) *clienttest.Server {
	return ts.Value("server").(*clienttest.Server)
}

func newest(ts *testscript.TestScript) schemas.Task {
	l := server(ts).Tasks()
	if len(l) == 0 {
		ts.Fatalf("there is no task")
	}
	return l[0]
}

func numbers(ts *testscript.TestScript, args []string) []int {
	var list []int
	for _, a := range args {
		n, err := strconv.Atoi(a)
		ts.Check(err)
		list = append(list, n)
	}
	return list
}

func cmdCode(ts *testscript.TestScript, _ bool, args []string) {
	want := numbers(ts, args[:1])[0]
	err := ts.Exec(args[1], args[2:]...)
	got := 0
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		got = ee.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func awaitState(s *clienttest.Server, state schemas.State) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if !s.Await(ctx.Done(), func(l []schemas.Task) bool { return len(l) > 0 && l[0].State == state }) {
		return fmt.Errorf("no task became %s", state)
	}
	return nil
}

func cmdAwait(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(awaitState(server(ts), schemas.State(args[0])))
}

func cmdNewest(ts *testscript.TestScript, _ bool, args []string) {
	id := string(newest(ts).ID)
	ts.Setenv(args[0], id)
	ts.Setenv(args[0]+"_SHORT", id[:12])
}

func cmdNewestBatch(ts *testscript.TestScript, _ bool, args []string) {
	l := server(ts).Batches()
	if len(l) == 0 {
		ts.Fatalf("there is no batch")
	}
	id := string(l[0].ID)
	ts.Setenv(args[0], id)
	ts.Setenv(args[0]+"_SHORT", id[:12])
}

func cmdSeed(ts *testscript.TestScript, _ bool, args []string) {
	at := time.Now().Add(-90 * time.Minute).UTC()
	spec := schemas.DefaultSpec()
	spec.Image = "busybox"
	r := schemas.NewRecord(schemas.TaskID(args[0]), spec, schemas.DefaultPolicy(), schemas.Meta{At: at, By: "gateway"})
	r.State = schemas.State(args[1])
	server(ts).Seed(r)
}

func cmdFail(ts *testscript.TestScript, _ bool, args []string) {
	n := numbers(ts, args[:2])
	var left atomic.Int64
	left.Store(int64(n[0]))
	server(ts).Intercept(func(w http.ResponseWriter, _ *http.Request) bool {
		if left.Add(-1) < 0 {
			return false
		}
		clienttest.Fail(w, schemas.Error{Status: n[1], Code: schemas.Code(args[2]), Detail: "as the test wants it", RequestID: "r-7"})
		return true
	})
}

func cmdSpec(ts *testscript.TestScript, _ bool, args []string) {
	var want schemas.Spec
	ts.Check(schemas.Decode([]byte(ts.ReadFile(args[0])), &want))
	if diff := cmp.Diff(want, newest(ts).Spec); diff != "" {
		ts.Fatalf("spec (-want +got):\n%s", diff)
	}
}

// started is a dayfly run as a process of its own.
type started struct {
	cmd      *exec.Cmd
	out, err *lines
}

func start(t *testing.T, s *clienttest.Server, args ...string) *started {
	t.Helper()
	p := &started{cmd: exec.Command("dayfly", args...), out: newLines(), err: newLines()}
	p.cmd.Env = append(os.Environ(), "DAYFLY_URL="+s.URL)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.err
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.cmd.Process.Kill() })
	return p
}

func (p *started) signal(t *testing.T, sig os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

func (p *started) code(t *testing.T) int {
	t.Helper()
	err := p.cmd.Wait()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		t.Fatal(err)
	}
	return p.cmd.ProcessState.ExitCode()
}

func TestInterruptCancelsTheTask(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		signal os.Signal
		code   int
	}{
		"Ctrl-C":  {os.Interrupt, 130},
		"SIGTERM": {sigTERM, 143},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := clienttest.Start(t)
			p := start(t, s, "run", "busybox", "out:up", "hold")
			p.out.await(t, "up")
			p.signal(t, c.signal)
			if got := p.code(t); got != c.code {
				t.Errorf("exit code %d, want %d", got, c.code)
			}
			p.err.await(t, "canceling t-")
			if got := s.Tasks()[0].State; got != schemas.Canceled {
				t.Errorf("the task is %s", got)
			}
		})
	}
}

func TestSecondInterruptLeavesAtOnce(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	p := start(t, s, "run", "busybox", "out:up", "hold")
	p.out.await(t, "up")
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodDelete {
			<-r.Context().Done() // the task does not end
		}
		return r.Method == http.MethodDelete
	})
	p.signal(t, os.Interrupt)
	p.err.await(t, "canceling t-")
	p.signal(t, os.Interrupt)
	if got := p.code(t); got != 130 {
		t.Errorf("exit code %d", got)
	}
	p.err.await(t, "dayfly logs -f t-")
}

func TestInterruptWhileTheTaskIsBeingMade(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	asked, interrupted := make(chan bool), make(chan bool)
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPost {
			close(asked)
			<-interrupted
		}
		return false
	})
	p := start(t, s, "run", "busybox", "hold")
	<-asked
	p.signal(t, os.Interrupt)
	close(interrupted)
	if got := p.code(t); got != 130 {
		t.Errorf("exit code %d", got)
	}
	if l := s.Tasks(); len(l) != 1 || l[0].State != schemas.Canceled {
		t.Errorf("tasks: %+v", l)
	}
}

func TestInterruptedWaitLeavesTheTask(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	p := start(t, s, "run", "-d", "busybox", "hold")
	if p.code(t) != 0 {
		t.Fatal(p.err.text())
	}
	waited := make(chan bool, 10)
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Has("wait") {
			waited <- true
		}
		return false
	})
	p = start(t, s, "wait", string(s.Tasks()[0].ID))
	<-waited
	p.signal(t, os.Interrupt)
	if got := p.code(t); got != 130 {
		t.Errorf("exit code %d", got)
	}
	if got := s.Tasks()[0].State; got.Final() {
		t.Errorf("the task is %s", got)
	}
}

func TestRunSaysWhyItWaits(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	p := start(t, s, "run", "--constraint", "zone=moon", "busybox")
	p.err.await(t, "waits: no worker has the labels that it asks for")
	p.signal(t, os.Interrupt)
	if got := p.code(t); got != 130 {
		t.Errorf("exit code %d", got)
	}
}

// Whoever waits for a task to run says what it waits for.
func TestWaitingIsExplained(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	id := start(t, s, "run", "-d", "--constraint", "zone=moon", "busybox")
	if got := id.code(t); got != 0 {
		t.Fatalf("exit code %d", got)
	}
	task := string(s.Tasks()[0].ID)
	for _, args := range [][]string{
		{"port-forward", task, "0:80"}, {"attach", task}, {"run", "-d", "--wait", "running", "--constraint", "zone=moon", "busybox"},
	} {
		t.Run(args[0], func(t *testing.T) {
			t.Parallel()
			p := start(t, s, args...)
			p.err.await(t, "waits: no worker has the labels that it asks for")
			p.signal(t, os.Interrupt)
			if got := p.code(t); got != 130 {
				t.Errorf("exit code %d", got)
			}
		})
	}
}

// A drain that no placer has confirmed is noted, and is not taken for one that holds.
func TestDrainThatNobodyConfirms(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/v1/workers/w1/drain" {
			return false
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusAccepted)
		fmt.Fprint(w, `{"id": "w1", "state": "draining"}`)
		return true
	})
	p := start(t, s, "drain", "w1")
	p.out.await(t, "w1\tdraining\t0 tasks left")
	p.err.await(t, "w1: it is noted, but no placer has confirmed it yet")
	p.err.await(t, "try: dayfly drain w1 again")
	if got := p.code(t); got != 125 {
		t.Errorf("exit code %d", got)
	}
}

// A task whose output nobody reads any more is not left behind.
func TestRunIntoABrokenPipe(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dayfly", "run", "busybox", "out:hi", "hold")
	cmd.Env, cmd.Stdout = append(os.Environ(), "DAYFLY_URL="+s.URL), w
	_ = r.Close()
	err = cmd.Run()
	_ = w.Close()
	var ee *exec.ExitError
	if !errors.As(err, &ee) || ee.ExitCode() != 128+int(syscall.SIGPIPE) {
		t.Error(err)
	}
	if got := s.Tasks()[0].State; got != schemas.Canceled {
		t.Errorf("the task is %s", got)
	}
}

// A terminal that is not raw puts a CR before each LF itself.
func TestNewlines(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	w := &newlines{w: &b}
	for _, part := range []string{"a\r\nb\r", "\nc\r", "d\r\r\n", "e\n"} {
		if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatal(n, err)
		}
	}
	if got, want := b.String(), "a\nb\nc\rd\r\ne\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestShortIDs(t *testing.T) {
	t.Parallel()
	l := []schemas.TaskID{"t-01jd0000000000000000000000", "t-01jd0000001000000000000000", "t-01jd9999990000000000000000"}
	l = append(l, l[2]) // the same twice is cut nowhere
	got := shortIDs(l)
	want := []string{"t-01jd0000000", "t-01jd0000001", "t-01jd9999990000000000000000"}
	for i, w := range want {
		if got[l[i]] != w {
			t.Errorf("%s became %s, want %s", l[i], got[l[i]], w)
		}
	}
}

func TestAtLeast(t *testing.T) {
	t.Parallel()
	for have, want := range map[string]bool{
		"1.1.12": true, "1.1.5+ds1": false, "1.2": true, "1.1": true, "2.0.0-rc1": true, "1.0.9": false, "v1.1.13": true, "dev": true,
	} {
		if atLeast(have, safeRunc) != want {
			t.Errorf("%s: not %v", have, want)
		}
	}
}

func TestUpConfig(t *testing.T) {
	t.Parallel()
	good := upConfig{
		processConfig: processConfig{admin: "[::1]:1", scale: 1}, gateway: gatewayConfig{http: defaultHTTP, maxTTL: time.Hour, ingress: "localhost:0", blobMax: "1GiB"},
		agent: agentConfig{worker: "w", runtime: "docker", blobCache: "1GiB"}, assets: assetConfig{logAge: time.Hour, blobs: "1GiB"},
		sync: "always", retention: time.Hour,
	}
	if err := good.check(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*upConfig){
		"the API for all":           func(u *upConfig) { u.gateway.http = "0.0.0.0:8080" },
		"the ingress for all":       func(u *upConfig) { u.gateway.ingress = "0.0.0.0:8081" },
		"a URL without *":           func(u *upConfig) { u.gateway.endpointURL = "https://tasks.example" },
		"a URL with a path":         func(u *upConfig) { u.gateway.endpointURL = "https://*.tasks.example/x" },
		"ports backwards":           func(u *upConfig) { u.gateway.tcpPorts = "20-10" },
		"one port":                  func(u *upConfig) { u.gateway.tcpPorts = "20000" },
		"a key alone":               func(u *upConfig) { u.gateway.key = "key.pem" },
		"a proxy's name":            func(u *upConfig) { u.gateway.trusted = []string{"proxy.lan"} },
		"no cookie's name":          func(u *upConfig) { u.gateway.private = []string{"a=b"} },
		"every address":             func(u *upConfig) { u.gateway.http = ":8080" },
		"NATS for all":              func(u *upConfig) { u.nats = "192.168.1.4:4222" },
		"no port":                   func(u *upConfig) { u.admin = "127.0.0.1" },
		"a name with a dot":         func(u *upConfig) { u.agent.worker = "a.b" },
		"sync sometimes":            func(u *upConfig) { u.sync = "sometimes" },
		"an unknown allow":          func(u *upConfig) { u.gateway.allow = []string{"tmpfs", "root"} },
		"a capability that is none": func(u *upConfig) { u.gateway.allow = []string{"cap:SYS_ADMIN"} },
		"a lifetime of zero":        func(u *upConfig) { u.gateway.maxTTL = 0 },
		"a negative capacity":       func(u *upConfig) { u.agent.slots = -1 },
		"negative CPUs":             func(u *upConfig) { u.agent.cpus = -1 },
		"a memory that is no size":  func(u *upConfig) { u.agent.memory = "much" },
		"NATS for all, unencrypted": func(u *upConfig) { u.nats = "0.0.0.0:4222" },
		"a certificate without key": func(u *upConfig) { u.nats, u.tls.cert = "127.0.0.1:4222", "c" },
	} {
		u := good
		change(&u)
		if u.check() == nil {
			t.Errorf("%s was taken", name)
		}
	}
	encrypted := good
	encrypted.nats, encrypted.tls = "0.0.0.0:4222", natsTLS{cert: "c", key: "k"}
	if err := encrypted.check(); err != nil {
		t.Error(err)
	}
	open := good
	open.gateway.http, open.insecure = "0.0.0.0:8080", true
	if err := open.check(); err != nil {
		t.Error(err)
	}
	if w := defaultWorker(); slices.Contains([]string{"", "-"}, w) {
		t.Errorf("default worker %q", w)
	}
}
