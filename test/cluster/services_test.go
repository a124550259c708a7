//go:build cluster

package cluster

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// leads says whether a placer has said last that it leads.
func leads(p *harness.Process) bool {
	leading := false
	for line := range strings.SplitSeq(p.Log(), "\n") {
		var e struct {
			Message string `json:"message"`
		}
		if json.Unmarshal([]byte(line), &e) == nil {
			switch e.Message {
			case "leading":
				leading = true
			case "stopped leading":
				leading = false
			}
		}
	}
	return leading
}

func mark(p *harness.Process) (since func() string) {
	n := len(p.Log())
	return func() string { return p.Log()[n:] }
}

// Each core service is killed and started again, and each is told to stop and replaced,
// while clients go on: nothing is lost, and every task is tried once.
func TestCoreServicesDie(t *testing.T) {
	s := start(t, harness.SiteOptions{Gateways: 2, Placers: 2, Reapers: 2, Agents: 2, Fake: true, Scale: 0.2})
	long := create(t, s, spec("sleep", "10m"))
	until(t, s, long.ID, schemas.Running)
	finish := traffick(t, s, 2)
	var all []*harness.Process
	for _, list := range [][]*harness.Process{s.Gateway, s.Placer, s.Reaper} {
		all = append(all, list...)
	}
	for _, p := range all {
		p.Kill()
		create(t, s, spec("exit", "0"))
		if err := errors.Join(p.Start(within(t, patience)), p.Ready(within(t, patience)), p.Stop(),
			p.Start(within(t, patience)), p.Ready(within(t, patience))); err != nil {
			t.Fatal(err)
		}
	}
	finish()
	if now := get(t, s, long.ID); now.State != schemas.Running || now.Attempt != 1 {
		t.Errorf("the long task is %s in attempt %d", now.State, now.Attempt)
	}
}

// One key, sent to several gateways at once, makes one task.
func TestAKeyMakesOneTaskOnAllGateways(t *testing.T) {
	s := start(t, harness.SiteOptions{Gateways: 3, Fake: true})
	for range 20 {
		key := rand.Text()
		ids := make([]schemas.TaskID, 6)
		var asking sync.WaitGroup
		for i := range ids {
			asking.Go(func() {
				var task schemas.Task
				if err := harness.Call(t.Context(), "POST", s.Gateway[i%3].Addrs.HTTP+"/v1/tasks", key, spec("exit", "0"), &task); err != nil {
					t.Error(err)
				}
				ids[i] = task.ID
			})
		}
		asking.Wait()
		for _, id := range ids {
			if id != ids[0] {
				t.Fatalf("one key made %v", ids)
			}
		}
	}
}

// The leading placer is killed while a thousand tasks wait, and just then there is room
// for them: the other places each of them once.
func TestThePlacerDiesWithALongQueue(t *testing.T) {
	const n = 1000
	s := start(t, harness.SiteOptions{Placers: 2, Agents: 2, Fake: true})
	drain := func(verb string) {
		t.Helper()
		for _, w := range []string{"w1", "w2"} {
			if err := s.Call(within(t, patience), 0, "POST", "/v1/workers/"+w+"/"+verb, "{}", nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	drain("drain")
	var old *harness.Process
	eventually(t, "one leads", func() error {
		for _, p := range s.Placer {
			if leads(p) {
				old = p
				return nil
			}
		}
		return errors.New("none")
	})
	var posting sync.WaitGroup
	for range 20 {
		posting.Go(func() {
			for range n / 20 {
				if err := s.Call(t.Context(), 0, "POST", "/v1/tasks", spec("exit", "0"), nil); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	posting.Wait()
	all := func(state schemas.State) schemas.TaskList {
		t.Helper()
		var list schemas.TaskList
		eventually(t, fmt.Sprintf("all are %s", state), func() error {
			err := s.Call(t.Context(), 0, "GET", "/v1/tasks?limit=1000&state="+string(state), nil, &list)
			if err == nil && len(list.Items) != n {
				err = fmt.Errorf("%d are", len(list.Items))
			}
			return err
		})
		return list
	}
	all(schemas.Queued)
	old.Kill()
	killed := time.Now()
	drain("undrain")
	var first, last time.Time
	for _, task := range all(schemas.Completed).Items {
		if task.Attempt != 1 {
			t.Errorf("%s took %d attempts", task.ID, task.Attempt)
		}
		if at := task.Timings.Assigned; first.IsZero() || at.Before(first) {
			first = at
		}
		if at := task.Timings.Assigned; at.After(last) {
			last = at
		}
	}
	t.Logf("the first was placed %v after the kill, the last %v later", first.Sub(killed).Round(time.Millisecond), last.Sub(first).Round(time.Millisecond))
}

// A gateway is killed while it takes tasks. Each client asks another one again with
// its key, and has one task.
func TestAGatewayDiesAmongKeys(t *testing.T) {
	s := start(t, harness.SiteOptions{Gateways: 2, Fake: true})
	post := func(gateway int, key string) (task schemas.Task, err error) {
		err = harness.Call(t.Context(), "POST", s.Gateway[gateway].Addrs.HTTP+"/v1/tasks", key, spec("sleep", "10m"), &task)
		return task, err
	}
	var kill sync.Once
	var keys atomic.Int64
	var asking sync.WaitGroup
	for range 32 {
		asking.Go(func() {
			for { // until the gateway is gone
				key := rand.Text()
				keys.Add(1)
				if _, err := post(0, key); err == nil {
					kill.Do(s.Gateway[0].Kill)
					continue
				}
				first, err := post(1, key)
				again, err2 := post(1, key)
				if err := errors.Join(err, err2); err != nil || first.ID != again.ID {
					t.Errorf("one key made %q and %q: %v", first.ID, again.ID, err)
				}
				return
			}
		})
	}
	asking.Wait()
	eventually(t, "there is a task for each key", func() error {
		var list schemas.TaskList
		err := s.Call(t.Context(), 1, "GET", "/v1/tasks?limit=1000", nil, &list)
		if err == nil && len(list.Items) != int(keys.Load()) {
			err = fmt.Errorf("%d tasks for %d keys", len(list.Items), keys.Load())
		}
		return err
	})
}

// A leading placer that is stopped for longer than its lease finds another in its
// place when it wakes, and chooses nothing by its old lease.
func TestAStoppedPlacerDoesNotLeadOn(t *testing.T) {
	s := start(t, harness.SiteOptions{Placers: 2, Agents: 2, Fake: true, Scale: 0.2})
	var old, other *harness.Process
	eventually(t, "one leads", func() error {
		for i, p := range s.Placer {
			if leads(p) {
				old, other = p, s.Placer[1-i]
				return nil
			}
		}
		return errors.New("none")
	})
	for range 20 { // it is at work, and has nothing half done when it is stopped
		until(t, s, create(t, s, spec("exit", "0")).ID, schemas.Completed)
	}
	if err := old.Pause(); err != nil {
		t.Fatal(err)
	}
	var waiting []schemas.TaskID // what it would choose for if it could
	for range 20 {
		waiting = append(waiting, create(t, s, spec("exit", "0")).ID)
	}
	eventually(t, "the other leads", func() error {
		if !leads(other) {
			return errors.New("it does not")
		}
		return nil
	})
	later := mark(old)
	if err := old.Resume(); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		waiting = append(waiting, create(t, s, spec("exit", "0")).ID)
	}
	eventually(t, "the old one knows", func() error {
		if leads(old) {
			return errors.New("it does not")
		}
		return nil
	})
	for _, id := range waiting {
		if task := until(t, s, id, schemas.Completed); task.Attempt != 1 {
			t.Errorf("%s took %d attempts", id, task.Attempt)
		}
	}
	if strings.Contains(later(), `"state":"assigned"`) {
		t.Errorf("it chose after it woke:\n%s", later())
	}
}

// A reaper that was stopped for two fences declares nobody lost when it wakes, and
// neither does the other: the workers beat all the time.
func TestAStoppedReaperDeclaresNobodyLost(t *testing.T) {
	s := start(t, harness.SiteOptions{Reapers: 2, Agents: 2, Fake: true, Scale: 0.05})
	fence := time.Duration(0.05 * float64(75*time.Second))
	long := create(t, s, spec("sleep", "10m"))
	until(t, s, long.ID, schemas.Running)
	stopped := s.Reaper[0]
	if err := stopped.Pause(); err != nil {
		t.Fatal(err)
	}
	hold(t, 2*fence)
	later := mark(stopped)
	if err := stopped.Resume(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it knows that it was stopped", func() error {
		if !strings.Contains(later(), "was stopped for a while") && !strings.Contains(later(), "reconnected") {
			return errors.New("it has not said so")
		}
		return nil
	})
	until(t, s, create(t, s, spec("exit", "0")).ID, schemas.Completed)
	for _, r := range s.Reaper {
		if strings.Contains(r.Log(), "declared lost") {
			t.Errorf("%s declared a worker lost:\n%s", r.Name, r.Tail())
		}
	}
	if now := get(t, s, long.ID); now.State != schemas.Running || now.Attempt != 1 {
		t.Errorf("the long task is %s in attempt %d", now.State, now.Attempt)
	}
}

// hold lets a fault last: its length is the fault.
func hold(t testing.TB, d time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	<-ctx.Done()
}

// A drain reaches every gateway and the placers; what runs goes on.
func TestDrainOverSeveralGateways(t *testing.T) {
	s := start(t, harness.SiteOptions{Gateways: 2, Placers: 2, Agents: 2, Fake: true})
	if err := s.Call(within(t, patience), 0, "POST", "/v1/workers/w1/drain", "{}", nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other gateway shows it", func() error {
		var w schemas.Worker
		if err := s.Call(t.Context(), 1, "GET", "/v1/workers/w1", nil, &w); err != nil {
			return err
		}
		if w.State != "draining" {
			return fmt.Errorf("it is %s", w.State)
		}
		return nil
	})
	for range 10 {
		if task := until(t, s, create(t, s, spec("exit", "0")).ID, schemas.Completed); task.Worker != "w2" {
			t.Errorf("%s went to %s", task.ID, task.Worker)
		}
	}
}
