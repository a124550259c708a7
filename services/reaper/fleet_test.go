package reaper

import (
	"crypto/rand"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

// A reaper that was itself stopped has not seen the beats of that time, so no worker
// is silent for it until it has watched for a whole fence again.
func TestAStoppedReaperSeesNobodySilent(t *testing.T) {
	const fence = 75 * time.Second
	f, start := newFleet(), time.Now()
	f.saw("w1", 7, start)
	last, now := start, start
	tick := func(d time.Duration) map[string]bool {
		now = last.Add(d)
		f.awake(last, now, fence)
		last = now
		silent := map[string]bool{}
		for w := range f.silent(now, fence) {
			silent[string(w)] = true
		}
		return silent
	}
	for range 3 {
		if s := tick(fence / 20); len(s) > 0 {
			t.Fatalf("silent at once: %v", s)
		}
	}
	if s := tick(2 * fence); len(s) > 0 {
		t.Fatalf("after 2 fences in which this reaper was stopped it holds %v for silent", s)
	}
	for waited := time.Duration(0); waited < fence-fence/20; waited += fence / 20 {
		if s := tick(fence / 20); len(s) > 0 {
			t.Fatalf("silent %v after it woke: %v", waited, s)
		}
	}
	if s := tick(fence / 20); !s["w1"] {
		t.Fatal("a worker that is silent for a whole fence while it was watched is not seen as such")
	}
}

// What a server that was killed may have forgotten has not stood: a verdict counts only
// from when this reaper last came to the bus.
func TestAVerdictStandsFromTheLastReconnect(t *testing.T) {
	f, start := newFleet(), time.Now()
	stood := func(revision uint64, after time.Duration) time.Duration {
		return f.stood("w1", revision, start.Add(after))
	}
	f.saw("w1", 7, start)
	if d := stood(7, 2*time.Second); d != 2*time.Second {
		t.Fatalf("it stood %v", d)
	}
	f.restart(start.Add(3 * time.Second))
	if d := stood(7, 4*time.Second); d != time.Second {
		t.Fatalf("it stood %v since the reconnect", d)
	}
	if d := stood(8, 4*time.Second); d != 0 {
		t.Fatalf("another revision stood %v", d)
	}
}

// A server that was killed just after the verdict has forgotten it, and may be away for so
// long that the verdict seems to have stood.
func TestAVerdictThatTheServerForgotGivesUpNothing(t *testing.T) {
	conn := natstest.Connect(t, natstest.Server(t))
	if err := bus.Provision(t.Context(), conn, schemas.Assets(time.Hour), 1); err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	r := &Reaper{
		cfg: cfg, conn: conn, log: zerolog.Nop(), metrics: newMetrics(nil, nil), due: newTimers[schemas.TaskID](), fleet: newFleet(),
		table:   bus.NewTable(conn, schemas.BucketTasks, bus.JSON(schemas.Record.Wrote)),
		workers: bus.NewTable(conn, schemas.BucketWorkers, bus.JSON[schemas.Beat](nil)),
		tasks:   bus.NewView(conn, schemas.BucketTasks, decodeTask, bus.ViewOptions[task]{}),
		beats:   bus.NewView(conn, schemas.BucketWorkers, decodeBeat, bus.ViewOptions[schemas.Beat]{}),
	}
	beat := schemas.Beat{Worker: "w1", Epoch: "e1"}
	stored, err := r.workers.Create(t.Context(), "w1", beat, "")
	if err != nil {
		t.Fatal(err)
	}
	id, err := schemas.NewTaskID(time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rec, err := schemas.Next(schemas.NewRecord(id, schemas.DefaultSpec(), schemas.DefaultPolicy(), r.meta()),
		schemas.Choose{Meta: r.meta(), Worker: "w1", Epoch: "e1"})
	if err != nil {
		t.Fatal(err)
	}
	e, err := r.table.Create(t.Context(), string(id), rec, "")
	if err != nil {
		t.Fatal(err)
	}
	lost := beat
	lost.LostAt = time.Now()
	r.beats.Observe("w1", lost, stored.Revision+1)
	r.fleet.saw("w1", stored.Revision+1, time.Now().Add(-cfg.Fence))

	if done, err := r.checkHolder(t.Context(), e); done || err != nil {
		t.Errorf("done %v, error %v", done, err)
	}
	if now, err := r.table.Get(t.Context(), string(id)); err != nil || now.Value.State != schemas.Assigned {
		t.Errorf("the task is %s, error %v", now.Value.State, err)
	}
	if _, err := r.workers.Replace(t.Context(), stored, lost, ""); err != nil {
		t.Fatal(err)
	}
	if done, err := r.checkHolder(t.Context(), e); !done || err != nil {
		t.Errorf("a verdict that stands: done %v, error %v", done, err)
	}
}

// Whose first beat comes while it is looked for is silent from then on like any other.
func TestABeatThatComesWhileItIsLookedForIsWatched(t *testing.T) {
	f, start := newFleet(), time.Now()
	f.saw("w1", 7, start)
	if f.absent("w1", start.Add(time.Hour), time.Minute) {
		t.Error("a worker with a beat is absent")
	}
	if list := f.silent(start.Add(time.Hour), time.Minute); list["w1"] != 7 {
		t.Errorf("silent are %v, want the worker at the revision of its beat", list)
	}
	if f.absent("w2", start, time.Minute) || !f.absent("w2", start.Add(time.Minute), time.Minute) {
		t.Error("a worker without a beat is absent after a fence, and not before")
	}
}
