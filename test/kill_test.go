package test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// job is one task of the kill test: what it does, and which ends are allowed. Both
// are settled before anything runs.
type job struct {
	class   string
	spec    map[string]any
	cancel  bool // once it runs
	allowed func(schemas.Task) error
	log     string // the whole of stdout, "" if it does not matter

	id   schemas.TaskID
	last schemas.Task
}

func ends(state schemas.State, reason schemas.Reason, code int) func(schemas.Task) error {
	return func(t schemas.Task) error {
		switch {
		case t.State != state || reason != "" && t.Reason != reason:
			return fmt.Errorf("ended %s (%s: %s), want %s (%s)", t.State, t.Reason, t.Message, state, reason)
		case code >= 0 && (t.Exit == nil || t.Exit.Code != code):
			return fmt.Errorf("exit %+v, want code %d", t.Exit, code)
		}
		return nil
	}
}

// jobs are the forty tasks, made from the seed.
func jobs(image string, rng *rand.Rand) []*job {
	base := func(ttl string, command ...string) map[string]any {
		return map[string]any{"image": image, "command": command, "ttl": ttl,
			"resources": map[string]any{"memory": "48MiB", "cpus": 0.2, "disk": "1MiB"}, "timeouts": map[string]any{"stop": "500ms"}}
	}
	var list []*job
	for i := range 40 {
		switch i % 8 {
		case 0:
			n := 5 + rng.IntN(20)
			list = append(list, &job{class: "exit 0", spec: base("5m", "count", fmt.Sprint(n), "50ms"),
				allowed: ends(schemas.Completed, schemas.ReasonExit, 0), log: countLog(n)})
		case 1:
			list = append(list, &job{class: "exit 7", spec: base("5m", "exit", "7", "done"),
				allowed: ends(schemas.Failed, schemas.ReasonExit, 7), log: "done\n"})
		case 2:
			list = append(list, &job{class: "OOM", spec: base("5m", "eat", "268435456"),
				allowed: ends(schemas.Failed, schemas.ReasonOOM, 137)})
		case 3:
			list = append(list, &job{class: "ignores TERM, expires", spec: base("3s", "ignore-term"),
				allowed: ends(schemas.Expired, schemas.ReasonExpired, -1)})
		case 4:
			list = append(list, &job{class: "5 MB of log", spec: base("5m", "spam", "5000000"),
				allowed: ends(schemas.Completed, schemas.ReasonExit, 0), log: spamLog(5_000_000)})
		case 5:
			list = append(list, &job{class: "short TTL", spec: base("2s", "sleep", "1h"),
				allowed: ends(schemas.Expired, schemas.ReasonExpired, -1)})
		case 6:
			list = append(list, &job{class: "canceled", spec: base("5m", "sleep", "1h"), cancel: true,
				allowed: ends(schemas.Canceled, schemas.ReasonCanceled, -1)})
		case 7:
			n := 40 + rng.IntN(100)
			list = append(list, &job{class: "long count", spec: base("5m", "count", fmt.Sprint(n), "50ms"),
				allowed: ends(schemas.Completed, schemas.ReasonExit, 0), log: countLog(n)})
		}
	}
	rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

// TestKilledTwentyTimes kills `dayfly up` with -9 at random moments while forty
// tasks come and go, and checks that each ends as it must.
func TestKilledTwentyTimes(t *testing.T) {
	const kills = 20
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		fmt.Sscan(s, &seed)
	}
	t.Logf("SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	image := testImage(t)
	up := newUp(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	lives := watchContainers(t, up.Cluster)
	list := jobs(image, rng)
	if err := up.Start(ctx); err != nil {
		t.Fatal(err)
	}

	var clients sync.WaitGroup
	work := make(chan *job)
	for range 6 {
		clients.Go(func() {
			for j := range work {
				if err := j.run(ctx, up); err != nil {
					t.Errorf("%s: %v", j.class, err)
				}
			}
		})
	}
	killed := 0
	var pauses []time.Duration
	for range kills {
		pauses = append(pauses, 200*time.Millisecond+time.Duration(rng.Int64N(int64(3*time.Second))))
	}
	clients.Go(func() {
		for _, j := range list {
			work <- j
		}
		close(work)
	})
	for _, pause := range pauses { // the moments of the kills: not a wait for a fact
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		if err := up.Kill(); err != nil {
			t.Fatal(err)
		}
		killed++
		if err := up.Start(ctx); err != nil {
			t.Fatal(err)
		}
	}
	clients.Wait()

	table := map[string][4]int{}
	var overlaps []string
	for _, j := range list {
		row := table[j.class]
		row[0]++
		if j.id == "" {
			t.Errorf("%s: never accepted", j.class)
			continue
		}
		if err := j.judge(ctx, up); err != nil {
			t.Errorf("%s: task %s: %v\n%s", j.class, j.id, err, history(j.last))
		} else {
			row[1]++
		}
		row[2] = max(row[2], j.last.Attempt)
		if j.log != "" {
			row[3] += len(j.log)
		}
		table[j.class] = row
	}
	err := harness.Poll(ctx, func() error {
		ids, err := up.Containers(ctx)
		if err == nil && len(ids) > 0 {
			err = fmt.Errorf("%d containers are left: %v", len(ids), ids)
		}
		return err
	})
	if err != nil {
		t.Error("orphans: ", err)
	}
	if err := up.Stop(); err != nil {
		t.Error(err)
	}
	overlaps = lives.overlaps()
	for _, o := range overlaps {
		t.Error("overlap: ", o)
	}

	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "CLASS\tTASKS\tAS ALLOWED\tMOST ATTEMPTS\tLOG BYTES CHECKED")
	classes := make([]string, 0, len(table))
	for c := range table {
		classes = append(classes, c)
	}
	slices.Sort(classes)
	for _, c := range classes {
		r := table[c]
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\n", c, r[0], r[1], r[2], r[3])
	}
	w.Flush()
	t.Logf("killed %d times; containers started %d; overlapping attempts %d\n%s", killed, lives.count(), len(overlaps), b.String())
}

// run creates the task, however often dayfly is away, cancels it if that is its
// class, and waits for its end.
func (j *job) run(ctx context.Context, up *harness.Up) error {
	key := "kill-" + randomName()
	var task schemas.Task
	err := harness.Poll(ctx, func() error {
		return up.CallKey(ctx, "POST", "/v1/tasks", key, j.spec, &task)
	})
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	j.id = task.ID
	get := func(wait string) error {
		return harness.Poll(ctx, func() error {
			err := up.Call(ctx, "GET", "/v1/tasks/"+string(j.id)+"?wait="+wait+"&timeout=5s", nil, &task)
			var e *schemas.Error
			if errors.As(err, &e) && e.Status == 404 {
				return harness.Fatal(fmt.Errorf("task %s is lost", j.id))
			}
			if err == nil && !task.State.Final() && (wait == "done" || task.State != schemas.Running) {
				err = fmt.Errorf("task %s is still %s", j.id, task.State)
			}
			j.last = task
			return err
		})
	}
	if j.cancel {
		if err := get("running"); err != nil {
			return err
		}
		err := harness.Poll(ctx, func() error {
			return up.Call(ctx, "DELETE", "/v1/tasks/"+string(j.id)+"?grace=100ms", nil, nil)
		})
		if err != nil {
			return err
		}
	}
	return get("done")
}

// judge compares the end with what was allowed beforehand.
func (j *job) judge(ctx context.Context, up *harness.Up) error {
	if err := j.allowed(j.last); err != nil {
		return err
	}
	if j.log == "" {
		return nil
	}
	var log string
	if err := up.Call(ctx, "GET", "/v1/tasks/"+string(j.id)+"/logs?stream=stdout", nil, &log); err != nil {
		return err
	}
	if log != j.log {
		at := 0
		for at < min(len(log), len(j.log)) && log[at] == j.log[at] {
			at++
		}
		return fmt.Errorf("log of %d bytes, want %d; they differ at byte %d", len(log), len(j.log), at)
	}
	return nil
}
