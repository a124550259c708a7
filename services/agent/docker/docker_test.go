package docker_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/client"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/docker"
	"dayfly.dev/services/agent/guest"
)

// site is what all tests of this package share: an image, the init binary, and the
// name of the cluster by which everything that they started is found again.
var site struct {
	docker   *client.Client
	cluster  string
	image    string
	imageID  string
	initPath string
	archive  []byte
}

func TestMain(m *testing.M) {
	if os.Getenv("DAYFLY_TEST_HELPER") != "" {
		helper()
		return
	}
	os.Exit(func() int {
		if err := setUp(); err != nil {
			fmt.Fprintln(os.Stderr, "docker tests need an Engine:", err)
			return 1
		}
		code := m.Run()
		tearDown()
		if err := goleak.Find(); err != nil && code == 0 {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return code
	}())
}

func setUp() (err error) {
	ctx := context.Background()
	if site.docker, err = client.New(client.WithHostFromEnv(), client.WithTLSClientConfigFromEnv()); err != nil {
		return err
	}
	var id [6]byte
	_, _ = rand.Read(id[:])
	site.cluster = "test-" + hex.EncodeToString(id[:])
	dir, err := os.MkdirTemp("", "dayfly-init")
	if err != nil {
		return err
	}
	site.initPath = filepath.Join(dir, "dayfly-init")
	if err := guest.BuildBinary(ctx, "dayfly.dev/services/agent/cmd/dayfly-init", site.initPath); err != nil {
		return err
	}
	if site.archive, err = guest.Build(ctx); err != nil {
		return err
	}
	site.image = "dayfly-guest:" + site.cluster
	site.imageID, err = guest.ImportImage(ctx, site.docker, site.archive, site.image)
	return err
}

// tearDown removes what bears this run's cluster name, and nothing else.
func tearDown() {
	ctx := context.Background()
	_ = os.RemoveAll(filepath.Dir(site.initPath))
	for _, c := range containers(ctx) {
		_, _ = site.docker.ContainerRemove(ctx, c, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
	}
	_, _ = site.docker.ImageRemove(ctx, site.image, client.ImageRemoveOptions{})
	_ = site.docker.Close()
}

func containers(ctx context.Context) (ids []string) {
	list, err := site.docker.ContainerList(ctx, client.ContainerListOptions{
		All: true, Filters: make(client.Filters).Add("label", docker.LabelCluster+"="+site.cluster),
	})
	if err == nil {
		for _, c := range list.Items {
			ids = append(ids, c.ID)
		}
	}
	return ids
}

func config(t testing.TB, dir string, worker schemas.WorkerID) docker.Config {
	t.Helper()
	return docker.Config{
		Cluster: site.cluster, Worker: worker, StateDir: dir, InitPath: site.initPath,
		Logger: zerolog.New(zerolog.NewTestWriter(t)),
	}
}

// openIn makes a runtime with a permit for an hour.
func openIn(t testing.TB, dir string, worker schemas.WorkerID) *docker.Runtime {
	t.Helper()
	rt, err := docker.New(config(t, dir, worker))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rt.Close() })
	if err := rt.Permit(rt.Now() + time.Hour); err != nil {
		t.Fatal(err)
	}
	return rt
}

func randomID() string {
	var b [5]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// request is a task of the guest image.
func request(t testing.TB, rt agent.Runtime, worker schemas.WorkerID, command ...string) agent.StartRequest {
	t.Helper()
	id, err := schemas.NewTaskID(time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command = site.image, command
	img, err := rt.Image(t.Context(), spec, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return agent.StartRequest{
		Assignment: schemas.Assignment{Task: id, Attempt: 1, Worker: worker, Epoch: "e1"},
		Spec:       spec, Image: img, TimeLeft: time.Hour, Grace: time.Second, LogLimit: 16 << 20,
	}
}

func start(t testing.TB, rt agent.Runtime, req agent.StartRequest) agent.Attempt {
	t.Helper()
	a, err := rt.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Remove(context.Background()) })
	return a
}

func wait(t testing.TB, a agent.Attempt) agent.Outcome {
	t.Helper()
	select {
	case <-a.Done():
		return a.Outcome()
	case <-time.After(30 * time.Second):
		t.Fatal("the attempt does not end")
		return agent.Outcome{}
	}
}

func output(t testing.TB, a agent.Attempt, s schemas.Stream) string {
	t.Helper()
	kept, _ := a.Output().Size(s)
	b := make([]byte, kept)
	if kept == 0 {
		return ""
	}
	if n, err := a.Output().ReadAt(s, b, 0); err != nil && err != io.EOF || int64(n) != kept {
		t.Fatalf("read %s: %d of %d bytes, %v", s, n, kept, err)
	}
	return string(b)
}

func TestEcho(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w")
	a := start(t, rt, request(t, rt, "w", "echo", "hi"))
	o := wait(t, a)
	if got := output(t, a, schemas.Stdout); got != "hi\n" || o.By != schemas.EndedItself || o.Exit == nil || o.Exit.Code != 0 {
		t.Fatalf("%q %+v %+v", got, o, o.Exit)
	}
}

// Many at once, of which some are stopped and all removed at once.
func TestBurst(t *testing.T) {
	rt := openIn(t, t.TempDir(), "w-burst")
	var wg sync.WaitGroup
	for i := range 16 {
		req := request(t, rt, "w-burst", "term-exit", fmt.Sprint(i))
		wg.Go(func() {
			a, err := rt.Start(t.Context(), req)
			if err != nil {
				t.Error(err)
				return
			}
			_ = a.SetDeadline(time.Hour)
			for {
				changed := a.Output().Changed() // before the look, or a change is missed
				if kept, _ := a.Output().Size(schemas.Stdout); kept > 0 {
					break
				}
				<-changed
			}
			a.Stop(10 * time.Second)
			<-a.Done()
			if o := a.Outcome(); o.By != schemas.EndedStop || o.Exit.Code != i {
				t.Errorf("%d: %+v %+v", i, o, o.Exit)
			}
			if err := a.Remove(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(containersOf(t, "w-burst")); n > 0 {
		t.Errorf("%d containers are left", n)
	}
}

func containersOf(t testing.TB, worker schemas.WorkerID) []string {
	t.Helper()
	list, err := site.docker.ContainerList(context.Background(), client.ContainerListOptions{
		All: true, Filters: make(client.Filters).Add("label", docker.LabelCluster+"="+site.cluster, docker.LabelWorker+"="+string(worker)),
	})
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, c := range list.Items {
		ids = append(ids, c.ID)
	}
	return ids
}
