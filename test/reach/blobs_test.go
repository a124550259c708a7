package reach

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// setting is a number of the environment.
func setting(t testing.TB, name string, otherwise int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("%s must be a number", name)
	}
	return n
}

// One large blob that many tasks want, on workers in network namespaces of their own: it
// goes over the wire once to each worker in use, also where the agent is killed in the
// middle, tasks keep to workers that have it while those have room, and no process takes
// it into memory. `make blobs` does it with 500 MB.
func TestABlobComesOnceToEachWorker(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	size, tasks := setting(t, "BLOB_MB", 48)*1_000_000, setting(t, "BLOB_TASKS", 12)
	const workers = 4
	slots := (tasks + 2) / 3 // three workers are enough
	b := built1(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience+time.Duration(size/1_000_000)*time.Second)
	defer cancel()
	network, err := harness.NewNetwork(ctx, workers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := network.Remove(); err != nil {
			t.Error(err)
		}
	})
	s, err := harness.NewSite(ctx, harness.SiteOptions{Bin: b.bin, Agents: -1, Host: network.Host,
		AgentArgs: []string{"--slots", strconv.Itoa(slots), "--cpus", "64"}})
	if err != nil {
		t.Fatal(err)
	}
	var agents []*harness.Process
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if t.Failed() {
			for _, a := range agents {
				t.Log(a.Tail())
			}
		}
		if err := s.Remove(ctx, agents...); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	names := map[schemas.WorkerID]int{}
	for i, ns := range network.NS {
		if err := ns.OutboundOnly(); err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("away%d", i+1)
		a, err := s.NewAgent(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		a.Under = ns.Enter()
		agents = append(agents, a)
		if err := a.Start(ctx); err != nil {
			t.Fatal(err)
		}
		names[schemas.WorkerID(a.Addrs.Worker)] = i
	}
	cl, err := client.New(s.Gateway[0].Addrs.HTTP)
	if err != nil {
		t.Fatal(err)
	}

	until(t, "all workers are there", func() error {
		list, err := cl.Workers(ctx)
		return errors.Join(err, want(len(list.Items) == workers, "there are %d", len(list.Items)))
	})

	// A small one first, for as many readers: what NATS has for it is the measure below.
	few, _ := randomFile(t, 8, 48_000_000)
	info, _, err := cl.PutBlob(ctx, few, 48_000_000)
	if err != nil {
		t.Fatal(err)
	}
	var readers sync.WaitGroup
	for range workers {
		readers.Go(func() {
			if _, err := cl.GetBlob(ctx, info.Blob, io.Discard); err != nil {
				t.Error(err)
			}
		})
	}
	readers.Wait()
	small := peakMemory(t, s.NATS[0])
	t.Logf("nats with 48 MB: at most %.0f MiB", float64(small)/(1<<20))
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.NATS[0].PID()), []byte("5"), 0); err != nil { // the peak counts anew
		t.Fatal(err)
	}

	// The blob, sent over HTTP.
	file, sum := randomFile(t, 7, size)
	began := time.Now()
	info, made, err := cl.PutBlob(ctx, file, int64(size))
	if err != nil || !made {
		t.Fatal(made, err)
	}
	t.Logf("stored %d MB in %s", size/1_000_000, time.Since(began).Round(time.Millisecond))
	began = time.Now()
	if _, made, err := cl.PutBlob(ctx, file, int64(size)); err != nil || made {
		t.Fatal(made, err)
	}
	t.Logf("sent again: %s", time.Since(began).Round(time.Millisecond))

	before := received(t, network)
	digest := hex.EncodeToString(sum) + "  -\n"
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command = b.shell, []string{"sh", "-c", "md5sum; sleep 1"}
	spec.StdinBlob = info.Blob
	spec.Files = []schemas.File{{Path: "data", Blob: info.Blob}}
	spec.Resources.CPUs, spec.Resources.Memory = 0.5, 32<<20
	// One agent is killed as soon as it has begun to fetch.
	var victim schemas.WorkerID
	killed := make(chan error, 1)
	go func() {
		var err error
		victim, err = killMidway(ctx, s, agents, names, info.Blob, int64(size))
		killed <- err
	}()
	began = time.Now()
	var all sync.WaitGroup
	var mu sync.Mutex
	used := map[schemas.WorkerID]int{}
	for range tasks {
		all.Go(func() {
			task, err := cl.Create(ctx, spec, client.CreateOptions{})
			if err == nil {
				task, err = cl.Wait(ctx, task.ID)
			}
			if err != nil || task.State != schemas.Completed || task.Stdout != digest {
				t.Errorf("%s %s %s: %q, %v", task.State, task.Reason, task.Message, task.Stdout, err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			used[task.Worker]++
		})
	}
	all.Wait()
	took := time.Since(began)
	if err := <-killed; err != nil {
		t.Error(err)
	}
	after := received(t, network)
	in := 0
	for name, i := range names {
		got := after[i] - before[i]
		t.Logf("%s: %d tasks, %.1f MB came", name, used[name], float64(got)/1e6)
		if got > int64(size)/10 {
			in++
		}
		// Headers, beats, logs and reports come on top; what is fetched again after the kill is
		// what was under way.
		if got > int64(size)+int64(size)/20+5_000_000 {
			t.Errorf("%s: %d bytes came for a blob of %d", name, got, size)
		}
	}
	if in > 4 {
		t.Errorf("the blob came to %d workers; 3 have room for all, and one was killed", in)
	}
	t.Logf("%d tasks in %s, the blob came to %d workers", tasks, took.Round(time.Millisecond), in)
	for _, p := range append(slices.Clone(agents), s.Gateway[0], s.NATS[0]) {
		peak := peakMemory(t, p)
		t.Logf("%s: at most %.0f MiB", p.Name, float64(peak)/(1<<20))
		most := int64(100 << 20)
		if p == s.NATS[0] { // what it has does not follow the size of the blob
			most = small + 96<<20
		}
		if peak > most {
			t.Errorf("%s took %d bytes of memory", p.Name, peak)
		}
	}
	// The next task starts at once where the blob is, once that has room again.
	until(t, "the placer knows that all is over", func() error {
		n := metric(t, s.Placer[0].Addrs.Admin, "dayfly_worker_allocated_slots", "")
		return want(n == 0, "%v slots are taken", n)
	})
	began = time.Now()
	task, err := cl.Create(ctx, spec, client.CreateOptions{Wait: client.UntilRunning})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the next one runs after %s", time.Since(began).Round(time.Millisecond))
	if _, err := cl.Wait(ctx, task.ID); err != nil {
		t.Fatal(err)
	}
	if used[task.Worker] == 0 {
		t.Errorf("the next task went to %s, which has not the blob", task.Worker)
	}

	// The worker that was killed goes on where it was, when a task has nowhere else to go.
	for name := range names {
		if name != victim {
			if _, _, err := cl.Drain(ctx, name); err != nil {
				t.Fatal(err)
			}
		}
	}
	if task, err = cl.Create(ctx, spec, client.CreateOptions{}); err == nil {
		task, err = cl.Wait(ctx, task.ID)
	}
	if err != nil || task.State != schemas.Completed || task.Stdout != digest || task.Worker != victim {
		t.Fatalf("%s %s on %s: %v", task.State, task.Message, task.Worker, err)
	}
	i := names[victim]
	got := received(t, network)[i] - before[i]
	t.Logf("%s, killed in the middle: %.1f MB came in all", victim, float64(got)/1e6)
	if got > int64(size)+int64(size)/20+5_000_000 {
		t.Errorf("%s: %d bytes came for a blob of %d", victim, got, size)
	}
}

// randomFile makes a file of size random bytes, whole megabytes, and gives their MD5.
func randomFile(t testing.TB, seed byte, size int) (*os.File, []byte) {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	sum, random, piece := md5.New(), rand.NewChaCha8([32]byte{seed}), make([]byte, 1_000_000)
	for range size / len(piece) {
		_, _ = random.Read(piece)
		sum.Write(piece)
		if _, err := file.Write(piece); err != nil {
			t.Fatal(err)
		}
	}
	return file, sum.Sum(nil)
}

// killMidway kills the first agent that is caught with a tenth of the blob and not all of it,
// and starts it again.
func killMidway(ctx context.Context, s *harness.Site, agents []*harness.Process, names map[schemas.WorkerID]int, id schemas.BlobID, size int64) (schemas.WorkerID, error) {
	for ctx.Err() == nil {
		for name, i := range names {
			part := filepath.Join(s.AgentData(string(name)), "agent", "blobs", id.Hex()+".part")
			caught, err := catch(ctx, agents[i], part, size/10)
			if err != nil {
				return "", err
			}
			if !agents[i].Running() {
				err = agents[i].Start(ctx)
			}
			if caught || err != nil {
				return name, err
			}
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
		}
	}
	return "", fmt.Errorf("no agent was caught in the middle: %w", ctx.Err())
}

// catch kills an agent when so much of a file has come, and says whether that is still a part
// then. It stops it for each look: a fetch is faster than a busy machine looks.
func catch(ctx context.Context, p *harness.Process, part string, least int64) (bool, error) {
	for {
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		if _, err := os.Stat(part); errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err := p.Pause(); err != nil {
			return false, err
		}
		info, err := os.Stat(part)
		if err == nil && info.Size() >= least {
			p.Kill()
			_, err := os.Stat(part)
			return err == nil, nil
		}
		if err := p.Resume(); err != nil {
			return false, err
		}
		time.Sleep(time.Millisecond) // a piece more
	}
}

// received is how many bytes came into each namespace.
func received(t testing.TB, n *harness.Network) (list []int64) {
	t.Helper()
	for _, ns := range n.NS {
		argv := append(ns.Enter(), "cat", "/proc/net/dev")
		out, err := exec.Command(argv[0], argv[1:]...).Output()
		if err != nil {
			t.Fatal(err)
		}
		sum := int64(0)
		for line := range strings.Lines(string(out)) {
			name, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
			if !ok || name == "lo" {
				continue
			}
			bytes, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			sum += bytes
		}
		list = append(list, sum)
	}
	return list
}

// peakMemory is the most that a process has had, in bytes.
func peakMemory(t testing.TB, p *harness.Process) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}
