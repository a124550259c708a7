package docker_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/rs/zerolog"

	"dayfly.dev/bus/port"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/docker"
	"dayfly.dev/services/agent/guest"
	"dayfly.dev/services/agent/initproto"
)

// helper is an agent in a process of its own, to be killed. It starts one task, says
// so, and does nothing more.
func helper() {
	fail := func(err error) {
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	rt, err := docker.New(docker.Config{
		Cluster: os.Getenv("HELPER_CLUSTER"), Worker: schemas.WorkerID(os.Getenv("HELPER_WORKER")),
		StateDir: os.Getenv("HELPER_STATE"), InitPath: os.Getenv("HELPER_INIT"), Logger: zerolog.Nop(),
	})
	fail(err)
	permit, err := time.ParseDuration(os.Getenv("HELPER_PERMIT"))
	fail(err)
	left, err := time.ParseDuration(os.Getenv("HELPER_LEFT"))
	fail(err)
	fail(rt.Permit(rt.Now() + time.Hour)) // however long the start takes
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command = os.Getenv("HELPER_IMAGE"), strings.Split(os.Getenv("HELPER_COMMAND"), " ")
	img, err := rt.Image(context.Background(), spec, nil, nil)
	fail(err)
	a, err := rt.Start(context.Background(), agent.StartRequest{
		Assignment: schemas.Assignment{Task: schemas.TaskID(os.Getenv("HELPER_TASK")), Attempt: 1, Worker: schemas.WorkerID(os.Getenv("HELPER_WORKER")), Epoch: "e"},
		Spec:       spec, Image: img, TimeLeft: left, Grace: 200 * time.Millisecond, LogLimit: 64 << 20,
	})
	fail(err)
	fail(rt.Permit(rt.Now() + permit))
	fmt.Println("started")
	for {
		c := a.Output().Changed()
		kept, _ := a.Output().Size(schemas.Stdout)
		fmt.Println("kept", kept)
		<-c
	}
}

type doomed struct {
	dir    string
	worker schemas.WorkerID
	task   schemas.TaskID
	cmd    *exec.Cmd
	lines  *bufio.Scanner
}

// doom runs the helper until it says "started".
func doom(t *testing.T, permit, left time.Duration, command string) *doomed {
	t.Helper()
	d := &doomed{dir: t.TempDir(), worker: schemas.WorkerID("w-" + randomID()), task: schemas.TaskID("t-" + randomID())}
	d.cmd = exec.Command(os.Args[0])
	d.cmd.Env = append(os.Environ(), "DAYFLY_TEST_HELPER=1", "HELPER_CLUSTER="+site.cluster, "HELPER_WORKER="+string(d.worker),
		"HELPER_STATE="+d.dir, "HELPER_INIT="+site.initPath, "HELPER_IMAGE="+site.image, "HELPER_TASK="+string(d.task),
		"HELPER_PERMIT="+permit.String(), "HELPER_LEFT="+left.String(), "HELPER_COMMAND="+command)
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.kill)
	d.lines = bufio.NewScanner(out)
	if !d.lines.Scan() || d.lines.Text() != "started" {
		t.Fatalf("helper: %s", d.lines.Text())
	}
	return d
}

func (d *doomed) kill() {
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait()
}

// reopen recovers the one attempt in a new runtime.
func (d *doomed) reopen(t *testing.T) (*docker.Runtime, agent.Attempt) {
	t.Helper()
	rt, err := docker.New(config(t, d.dir, d.worker))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rt.Close() })
	list, err := rt.Recover(t.Context())
	if err != nil || len(list) != 1 || list[0].Assignment().Task != d.task {
		t.Fatalf("recovered %d attempts, %v", len(list), err)
	}
	t.Cleanup(func() { _ = list[0].Remove(context.Background()) })
	return rt, list[0]
}

func (d *doomed) name() string { return "dayfly-" + string(d.task) + "-1" }

func checkSpam(t *testing.T, got string, letter byte, bytes int) {
	t.Helper()
	if len(got) != bytes {
		t.Fatalf("%d bytes, want %d", len(got), bytes)
	}
	for i := 0; i*64 < len(got); i++ {
		if want, line := fmt.Sprintf("%c%062d\n", letter, i), got[i*64:min(i*64+64, len(got))]; line != want[:len(line)] {
			t.Fatalf("line %d is %q: a byte is lost or there twice", i, line)
		}
	}
}

// An agent that is killed in the midst of the output loses no byte and doubles none.
func TestKilledAgentLosesNoLog(t *testing.T) {
	for _, tt := range []struct {
		at    int
		pause string
	}{{1, "1ms"}, {2_500_000, "1ms"}, {1, "0s"}, {400_000, "0s"}, {2_500_000, "0s"}} {
		t.Run(fmt.Sprintf("at %d, pauses of %s", tt.at, tt.pause), func(t *testing.T) {
			const n = 5_000_000
			d := doom(t, time.Hour, time.Hour, fmt.Sprintf("spam %d %s", n, tt.pause))
			for d.lines.Scan() {
				var kept int
				if _, _ = fmt.Sscanf(d.lines.Text(), "kept %d", &kept); kept >= tt.at {
					break
				}
			}
			d.kill()
			rt, a := d.reopen(t)
			before, _ := a.Output().Size(schemas.Stdout)
			if err := rt.Permit(rt.Now() + time.Hour); err != nil {
				t.Fatal(err)
			}
			if o := wait(t, a); o.By != schemas.EndedItself || o.Exit.Code != 0 {
				t.Fatalf("%+v %+v", o, o.Exit)
			}
			checkSpam(t, output(t, a, schemas.Stdout), 'o', n)
			t.Logf("killed with about %d of %d bytes in the spool", before, n)
		})
	}
}

// What a task wrote and how it ended while no agent was there is told to the next one.
func TestEndedWithoutAgent(t *testing.T) {
	d := doom(t, time.Hour, time.Hour, "sleep 300ms 9")
	d.kill()
	pid := inspect(t, d.name()).State.Pid
	waitFor(t, "the task to end", func() bool { return children(pid) == 0 })
	_, a := d.reopen(t)
	if o := wait(t, a); o.By != schemas.EndedItself || o.Exit.Code != 9 {
		t.Fatalf("%+v %+v", o, o.Exit)
	}
	if ran, ok := a.StartedFor(); !ok || ran < 300*time.Millisecond {
		t.Errorf("started for %s, %v", ran, ok)
	}
}

func children(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0
	}
	n := len(strings.Fields(string(b)))
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, task := range tasks { // of Go's other threads
		if task.Name() != fmt.Sprint(pid) {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, task.Name()))
			n += len(strings.Fields(string(b)))
		}
	}
	return n
}

func waitFor(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !f(); {
		if time.Now().After(end) {
			t.Fatalf("waited for %s in vain", what)
		}
		time.Sleep(10 * time.Millisecond) // between two looks
	}
}

func TestDeadlineWithoutAgent(t *testing.T) {
	d := doom(t, time.Hour, 1200*time.Millisecond, "ignore-term 1h")
	d.kill()
	pid := inspect(t, d.name()).State.Pid
	waitFor(t, "init to end the task", func() bool { return children(pid) == 0 })
	_, a := d.reopen(t)
	o := wait(t, a)
	if o.By != schemas.EndedDeadline || o.Exit.Code != 137 || !o.Exit.TimedOut || o.Usage.WallMillis < 1300 {
		t.Fatalf("%+v %+v", o, o.Exit)
	}
}

func TestPermitWithoutAgent(t *testing.T) {
	d := doom(t, 1500*time.Millisecond, time.Hour, "ignore-term 1h")
	d.kill()
	pid := inspect(t, d.name()).State.Pid
	waitFor(t, "init to kill the task", func() bool { return children(pid) == 0 })
	_, a := d.reopen(t)
	if o := wait(t, a); o.By != schemas.EndedPermit {
		t.Fatalf("%+v %+v", o, o.Exit)
	}
}

// An agent that died while it stopped a task has not forgotten it afterwards.
func TestStopSurvivesAgent(t *testing.T) {
	dir, worker := t.TempDir(), schemas.WorkerID("w-"+randomID())
	rt := openIn(t, dir, worker)
	a := start(t, rt, request(t, rt, worker, "ignore-term"))
	waitFor(t, "ready", func() bool { kept, _ := a.Output().Size(schemas.Stdout); return kept > 0 })
	a.Stop(time.Second)
	rt.Close()
	next := openIn(t, dir, worker)
	list, err := next.Recover(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	defer list[0].Remove(context.Background())
	if o := wait(t, list[0]); o.By != schemas.EndedStop {
		t.Fatalf("%+v", o)
	}
}

// The container was killed behind our back: nothing but "lost" can be said.
func TestDockerKillIsLost(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-kill")
	a := start(t, rt, request(t, rt, "w-kill", "sleep", "1h"))
	name := docker.ContainerName(a.Assignment())
	waitFor(t, "docker to call it running", func() bool { return inspect(t, name).State.Running })
	if _, err := site.docker.ContainerKill(t.Context(), name, client.ContainerKillOptions{Signal: "KILL"}); err != nil {
		t.Fatal(err)
	}
	if o := wait(t, a); o.By != schemas.EndedLost || o.Exit != nil || o.Message == "" {
		t.Fatalf("%+v", o)
	}
}

func TestDockerRemoveIsLost(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-rm")
	a := start(t, rt, request(t, rt, "w-rm", "sleep", "1h"))
	if _, err := site.docker.ContainerRemove(t.Context(), docker.ContainerName(a.Assignment()), client.ContainerRemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if o := wait(t, a); o.By != schemas.EndedLost {
		t.Fatalf("%+v", o)
	}
}

func TestDockerStopIsLost(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-stop")
	a := start(t, rt, request(t, rt, "w-stop", "sleep", "1h"))
	name := docker.ContainerName(a.Assignment())
	waitFor(t, "docker to call it running", func() bool { return inspect(t, name).State.Running })
	if _, err := site.docker.ContainerKill(t.Context(), name, client.ContainerKillOptions{Signal: "TERM"}); err != nil {
		t.Fatal(err)
	}
	if o := wait(t, a); o.By != schemas.EndedLost || o.Exit == nil || o.Exit.Code != 143 {
		t.Fatalf("%+v", o)
	}
}

// A folder whose container is gone still has its logs.
func TestRecoverFolderWithoutContainer(t *testing.T) {
	dir, worker := t.TempDir(), schemas.WorkerID("w-"+randomID())
	rt := openIn(t, dir, worker)
	a := start(t, rt, request(t, rt, worker, "term-exit"))
	waitFor(t, "ready", func() bool { kept, _ := a.Output().Size(schemas.Stdout); return kept > 0 })
	rt.Close()
	if _, err := site.docker.ContainerRemove(t.Context(), docker.ContainerName(a.Assignment()), client.ContainerRemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	next := openIn(t, dir, worker)
	list, err := next.Recover(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	if o := wait(t, list[0]); o.By != schemas.EndedLost {
		t.Fatalf("%+v", o)
	}
	if got := output(t, list[0], schemas.Stdout); got != "ready\n" {
		t.Errorf("%q", got)
	}
	if err := list[0].Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// Containers that were created and never started, that have no folder, or that are
// not ours.
func TestRecoverOddOnes(t *testing.T) {
	dir, worker := t.TempDir(), schemas.WorkerID("w-"+randomID())
	rt := openIn(t, dir, worker)
	create := func(name string, labels map[string]string) string {
		t.Helper()
		c, err := site.docker.ContainerCreate(t.Context(), client.ContainerCreateOptions{Name: name, Config: &container.Config{Image: site.imageID, Labels: labels}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_, _ = site.docker.ContainerRemove(context.Background(), c.ID, client.ContainerRemoveOptions{Force: true})
		})
		return c.ID
	}
	labels := func(worker schemas.WorkerID, task string) map[string]string {
		return map[string]string{docker.LabelCluster: site.cluster, docker.LabelWorker: string(worker), docker.LabelEpoch: "e", docker.LabelTask: task, docker.LabelAttempt: "1"}
	}
	orphan := create("dayfly-"+string(worker)+"-1", labels(worker, string(worker)))
	foreign := create("dayfly-other"+string(worker)+"-1", labels("other", "other"+string(worker)))
	accident := create("by-accident-"+string(worker), labels(worker, "x"))

	list, err := rt.Recover(t.Context())
	if err != nil || len(list) != 0 {
		t.Fatal(list, err)
	}
	waitFor(t, "the orphan to be removed", func() bool {
		_, err := site.docker.ContainerInspect(t.Context(), orphan, client.ContainerInspectOptions{})
		return err != nil
	})
	inspect(t, foreign)
	inspect(t, accident)
}

func TestSecondAgentIsRefused(t *testing.T) {
	dir := t.TempDir()
	rt := openIn(t, dir, "w-lock")
	if _, err := docker.New(config(t, dir, "w-lock")); !errors.Is(err, docker.ErrLocked) {
		t.Fatal(err)
	}
	rt.Close()
	openIn(t, dir, "w-lock")
}

// A process of the task that dials the socket while init is away is not taken for it,
// nor is any other.
func TestControlSocketRefusesOthers(t *testing.T) {
	dir, worker := t.TempDir(), schemas.WorkerID("w-"+randomID())
	rt := openIn(t, dir, worker)
	a := start(t, rt, request(t, rt, worker, "term-exit", "3"))
	waitFor(t, "ready", func() bool { kept, _ := a.Output().Size(schemas.Stdout); return kept > 0 })
	name := docker.ContainerName(a.Assignment())
	pid := inspect(t, name).State.Pid
	if err := os.WriteFile(filepath.Join(t.TempDir(), "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	rt.Close()
	// Init is stopped, so that it cannot be the first to dial.
	stopped, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := stopped.Signal(sigStop); err != nil {
		t.Fatal(err)
	}
	next := openIn(t, dir, worker)
	list, err := next.Recover(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	var c *net.UnixConn
	waitFor(t, "the socket", func() bool {
		c, err = net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: filepath.Join(dir, "run", name, "c", "s")})
		return err == nil
	})
	_ = initproto.NewConn(c).Send(initproto.Reply{Event: initproto.EventHello, Version: 1, Phase: initproto.PhaseEnded, Exit: &initproto.Exit{}})
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := c.Read(make([]byte, 10)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the impostor was not hung up on: %d, %v", n, err)
	}
	c.Close()
	if err := stopped.Signal(sigCont); err != nil {
		t.Fatal(err)
	}
	list[0].Stop(10 * time.Second)
	if o := wait(t, list[0]); o.By != schemas.EndedStop || o.Exit.Code != 3 {
		t.Fatalf("%+v %+v", o, o.Exit)
	}
	_ = list[0].Remove(context.Background())
}

// Nothing of a task outlives its main process.
func TestNothingIsLeftBehind(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-left")
	for _, command := range [][]string{{"daemonize"}, {"orphans", "20"}} {
		a := start(t, rt, request(t, rt, "w-left", command...))
		o := wait(t, a)
		if o.By != schemas.EndedItself || o.Exit.Code != 0 {
			t.Fatalf("%v: %+v", command, o)
		}
	}
}

// Several start errors, each with a sentence that says what to do.
func TestStartErrors(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-err")
	for name, tt := range map[string]struct {
		change func(*schemas.Spec)
		reason schemas.Reason
		code   int
		says   string
	}{
		"no such command": {func(s *schemas.Spec) { s.Entrypoint = []string{"nothing-here"} }, schemas.ReasonNotFound, 127, "nothing-here"},
		"not executable":  {func(s *schemas.Spec) { s.Entrypoint = []string{"/bin/noexec"} }, schemas.ReasonNotExec, 126, "/bin/noexec"},
		"a directory":     {func(s *schemas.Spec) { s.Entrypoint = []string{"/etc"} }, schemas.ReasonNotExec, 126, "directory"},
		"bad workdir":     {func(s *schemas.Spec) { s.Workdir = "/etc/passwd" }, schemas.ReasonStart, 126, "/etc/passwd"},
		"no command":      {func(s *schemas.Spec) { s.Entrypoint, s.Command = []string{}, nil }, schemas.ReasonStart, 0, "command"},
	} {
		t.Run(name, func(t *testing.T) {
			req := request(t, rt, "w-err", "exit", "0")
			tt.change(&req.Spec)
			a, err := rt.Start(t.Context(), req)
			if err == nil {
				_ = a.Remove(context.Background())
			}
			fault, ok := errors.AsType[*agent.StartError](err)
			if !ok || fault.Reason != tt.reason || !strings.Contains(fault.Message, tt.says) || tt.code != 0 && (fault.Exit == nil || fault.Exit.Code != tt.code) {
				t.Fatalf("%v", err)
			}
			t.Log(fault.Message)
		})
	}
	waitFor(t, "all to be removed", func() bool { return len(containersOf(t, "w-err")) == 0 })
}

// A start's time is its own: that others are before it is not its fault.
func TestAStartThatWaitsForOthersLosesNoTime(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-wait")
	free := rt.OccupyStarts()
	req := request(t, rt, "w-wait", "exit", "0")
	req.Within = time.Nanosecond
	ended := make(chan error, 1)
	go func() {
		_, err := rt.Start(t.Context(), req)
		ended <- err
	}()
	image, err := rt.Image(t.Context(), req.Spec, nil, nil) // as long as it takes to ask Docker twice
	if err != nil || image.ID != req.Image.ID {
		t.Fatal(image, err)
	}
	select {
	case err := <-ended:
		t.Errorf("it ended while it waited: %v", err)
	default:
	}
	free()
	if fault, ok := errors.AsType[*agent.StartError](<-ended); !ok || fault.Reason != schemas.ReasonStartTimeout {
		t.Errorf("once it had begun: %v", fault)
	}
	waitFor(t, "all to be removed", func() bool { return len(containersOf(t, "w-wait")) == 0 })
}

// The image's own settings hold as with docker run.
func TestImageConfig(t *testing.T) {
	tag := "dayfly-guest-config:" + site.cluster
	_, err := guest.ImportImage(t.Context(), site.docker, site.archive, tag, `ENTRYPOINT ["/bin/guest"]`, `CMD ["env","FROM","GODEBUG","HOME"]`,
		"ENV FROM=image", "ENV GODEBUG=madvdontneed=1", "VOLUME /data", "WORKDIR /home/task")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = site.docker.ImageRemove(context.Background(), tag, client.ImageRemoveOptions{}) })
	rt := openIn(t, t.TempDir(), "w-img")
	run := func(change func(*schemas.Spec)) string {
		t.Helper()
		req := request(t, rt, "w-img")
		req.Spec.Image = tag
		change(&req.Spec)
		if req.Image, err = rt.Image(t.Context(), req.Spec, nil, nil); err != nil {
			t.Fatal(err)
		}
		a := start(t, rt, req)
		wait(t, a)
		for _, m := range inspect(t, docker.ContainerName(req.Assignment)).Mounts {
			if m.Type == "volume" {
				t.Errorf("an anonymous volume on the host's disk at %s", m.Destination)
			}
		}
		return output(t, a, schemas.Stdout)
	}
	for name, tt := range map[string]struct {
		change func(*schemas.Spec)
		want   string
	}{
		"the image's command":              {func(s *schemas.Spec) {}, "FROM=image\nGODEBUG=madvdontneed=1\nHOME=/home/task\n"},
		"a command over it":                {func(s *schemas.Spec) { s.Command = []string{"echo", "x"} }, "x\n"},
		"an entrypoint drops the command":  {func(s *schemas.Spec) { s.Entrypoint = []string{"/bin/echo"} }, "\n"},
		"both":                             {func(s *schemas.Spec) { s.Entrypoint, s.Command = []string{"echo"}, []string{"y"} }, "y\n"},
		"the task's variables over theirs": {func(s *schemas.Spec) { s.Env = map[string]string{"FROM": "task"} }, "FROM=task\nGODEBUG=madvdontneed=1\nHOME=/home/task\n"},
		"the image's workdir":              {func(s *schemas.Spec) { s.Command = []string{"ls", "/proc/self/cwd/../../home"} }, "task\n"},
		"the volume's place can be read":   {func(s *schemas.Spec) { s.Command = []string{"ls", "/data"} }, ""},
		"PATH of the task finds its things": {func(s *schemas.Spec) {
			s.Entrypoint, s.Env = []string{"echo", "p"}, map[string]string{"PATH": "/nope:/bin"}
		}, "p\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := run(tt.change); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}

// A registry that takes connections and never answers holds nobody longer than ctx
// says, and all who wait for one image share one pull.
func TestPullHonoursContext(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	rt := openIn(t, t.TempDir(), "w-pull")
	spec := schemas.DefaultSpec()
	spec.Image = l.Addr().String() + "/never:1"
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(300*(i+1))*time.Millisecond)
			defer cancel()
			_, err := rt.Image(ctx, spec, nil, func(agent.Progress) {})
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
}

func TestPullFaults(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-pull")
	kept, err := port.Keep("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	refused := kept.String()
	spec := schemas.DefaultSpec()
	spec.Image = refused + "/gone:1"
	_, err = rt.Image(t.Context(), spec, nil, nil)
	fault, ok := errors.AsType[*agent.StartError](err)
	if !ok || fault.Reason != schemas.ReasonImagePull || !strings.Contains(fault.Message, spec.Image) {
		t.Fatalf("%v", err)
	}
	t.Log(fault.Message)
}

// A start whose process runs is none that failed, whatever cannot be written down: its
// task would run elsewhere, too.
func TestAStartThatCannotBeNoted(t *testing.T) {
	worker := schemas.WorkerID("w-" + randomID())
	dir := t.TempDir()
	rt := openIn(t, dir, worker)
	req := request(t, rt, worker, "sleep", "1h")
	// A folder under the name of the note stands for a full disk.
	noted := filepath.Join(dir, "run", docker.ContainerName(req.Assignment), "started")
	var obstructing sync.WaitGroup
	obstructing.Go(func() {
		for end := time.Now().Add(time.Minute); os.Mkdir(noted, 0o700) != nil && time.Now().Before(end); {
			time.Sleep(time.Millisecond) // between two looks
		}
	})
	defer obstructing.Wait()
	a := start(t, rt, req)
	if _, ran := a.StartedFor(); !ran {
		t.Error("it was not started")
	}
}

// A dockerd that is killed while it starts a container may have forgotten that it did: the
// container is "created" for ever, and its process runs. Init's word counts.
func TestRecoverWhatDockerHasForgotten(t *testing.T) {
	dir, worker := t.TempDir(), schemas.WorkerID("w-"+randomID())
	rt := openIn(t, dir, worker)
	a := start(t, rt, request(t, rt, worker, "term-exit"))
	waitFor(t, "ready", func() bool { kept, _ := a.Output().Size(schemas.Stdout); return kept > 0 })
	rt.Close()
	// Another one under its name, that was never started, stands for what Docker knows.
	name := docker.ContainerName(a.Assignment())
	labels := inspect(t, name).Config.Labels
	if _, err := site.docker.ContainerRename(t.Context(), name, client.ContainerRenameOptions{NewName: "forgotten-" + name}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = site.docker.ContainerRemove(context.Background(), "forgotten-"+name, client.ContainerRemoveOptions{Force: true})
	})
	if _, err := site.docker.ContainerCreate(t.Context(), client.ContainerCreateOptions{Name: name, Config: &container.Config{Image: site.imageID, Labels: labels}}); err != nil {
		t.Fatal(err)
	}
	next := openIn(t, dir, worker)
	list, err := next.Recover(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	select {
	case <-list[0].Done():
		t.Errorf("it runs, and is said to have ended: %+v", list[0].Outcome())
	default:
		list[0].Stop(5 * time.Second)
		if o := wait(t, list[0]); o.By != schemas.EndedStop {
			t.Errorf("%+v", o)
		}
	}
	if err := list[0].Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// An init whose folder was taken away is told nothing any more, and its word is wanted by
// nobody: it goes.
func TestInitWithoutFolderGoes(t *testing.T) {
	for _, command := range []string{"sleep 1h", "exit 0"} {
		d := doom(t, time.Hour, time.Hour, command)
		d.kill()
		if err := os.RemoveAll(filepath.Join(d.dir, "run", d.name())); err != nil {
			t.Fatal(err)
		}
		waitFor(t, command+": its container ends", func() bool { return !inspect(t, d.name()).State.Running })
	}
}

// More programs than init runs beside a task are refused, and break nothing.
func TestManyExecs(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-execs")
	a := start(t, rt, request(t, rt, "w-execs", "sleep", "1h"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var all sync.WaitGroup
	refused := make(chan error, 3*initproto.MaxExecs)
	for range cap(refused) {
		all.Go(func() {
			_, err := agent.Execute(ctx, a, agent.Command{Argv: []string{"/bin/sleep", "1h"}}, nil, nil)
			refused <- err
		})
	}
	for range cap(refused) - initproto.MaxExecs {
		if err := <-refused; err == nil || errors.Is(err, agent.ErrAway) || errors.Is(err, context.Canceled) {
			t.Errorf("refused with %v", err)
		}
	}
	cancel()
	all.Wait()
	if exit, err := agent.Execute(t.Context(), a, agent.Command{Argv: []string{"/bin/exit", "3"}}, nil, nil); err != nil || exit.Code != 3 {
		t.Errorf("%+v, %v", exit, err)
	}
}

// More dials than init does at a time are refused, and a port that does not answer is
// told from one on which nobody listens.
func TestManyDials(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-dials")
	a := start(t, rt, request(t, rt, "w-dials", "deaf", "80"))
	for kept := int64(0); kept == 0; {
		changed := a.Output().Changed()
		if kept, _ = a.Output().Size(schemas.Stdout); kept == 0 {
			<-changed
		}
	}
	type outcome struct {
		conn agent.Conn
		err  error
	}
	const more = 20
	got := make(chan outcome, initproto.MaxDials+more)
	for range cap(got) {
		go func() {
			c, err := a.Dial(t.Context(), 80)
			got <- outcome{c, err}
		}()
	}
	busy := 0
	for range cap(got) {
		o := <-got
		switch {
		case o.err == nil:
			_ = o.conn.Close()
		case errors.Is(o.err, agent.ErrBusy):
			busy++
		case errors.Is(o.err, agent.ErrAway) || errors.Is(o.err, agent.ErrRefused):
			t.Error(o.err)
		}
	}
	if busy == 0 || busy > more {
		t.Errorf("%d of %d were refused", busy, cap(got))
	}
	if _, err := a.Dial(t.Context(), 81); !errors.Is(err, agent.ErrRefused) {
		t.Errorf("where nobody listens: %v", err)
	}
}
