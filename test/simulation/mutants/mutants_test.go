//go:build mutants

// Package mutants breaks one rule of the services at a time and checks that the
// simulation notices: a checker that finds nothing may be blind. The source stays as it
// is (go test -overlay).
package mutants

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"dayfly.dev/test/harness"
	"dayfly.dev/test/mutants"
)

<<<<<<< HEAD
=======
// edit is one change of a source file; old stands in it once.
type edit struct{ file, old, new string }

// mutant is a rule, and the edits that break it.
type mutant struct {
	rule  string
	edits []edit
}

const (
	table    = "bus/table.go"
	next     = "schemas/next.go"
	orders   = "services/agent/order.go"
	attempts = "services/agent/attempt.go"
	beats    = "services/agent/beat.go"
	lease    = "services/placer/lease.go"
	lead     = "services/placer/lead.go"
	fleet    = "services/reaper/fleet.go"
	settle   = "services/reaper/settle.go"
	sweep    = "services/reaper/sweep.go"
)

var mutants = []mutant{
	{"a record is written by compare-and-set", []edit{{table,
		"hdr.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(expect, 10))", "_ = strconv.Itoa"}}},
	{"after a lost compare-and-set the event is applied to what is there now", []edit{{table,
		"e = fresh", "e.Revision = fresh.Revision"}}},
	{"a write of unknown outcome is told by its op", []edit{{table,
		"return t.codec.Wrote(v, op)", "return false"}}},
	{"final is final", []edit{{next,
		"if !r.State.Final() {\n\t\tswitch", "if true {\n\t\tswitch"}}},
	{"a report counts only for its attempt", []edit{{next,
		"if !r.State.Held() || rep.Assignment != r.Assignment() {", "if !r.State.Held() {"}}},
	{"a cancel outlives the attempt", []edit{{next,
		"case r.Cancel != nil:\n\t\tr.finish", "case r.Cancel != nil && end.By == EndedStop:\n\t\tr.finish"}}},
	{"what waits for its worker is not given up", []edit{{next,
		"if r.Spec.OnLost == OnLostWait && !e.Gone {", "if false {"}}},
	{"an order of another epoch is refused", []edit{{orders,
		"case o.Epoch != a.epoch:", "case false:"}}},
	{"the journal is written before the start", []edit{{orders,
		"err := a.journal.put(t)\n", "var err error\n"}}},
	{"what was closed before it came never starts", []edit{{orders,
		"// A stop or close of what never arrived: it shall never start.\n", "if true {\n\t\treturn\n\t}\n"}}},
	{"an older order does not replace a newer", []edit{{orders,
		"if o.Revision >= e.Revision {", "if true {"}, {attempts, "if o.Extensions > t.applied || t.found == nil {", "if true {"}}},
	{"an extension moves the deadline", []edit{{attempts,
		"if err := t.found.SetDeadline(o.TimeLeft.Std()); err != nil {", "if err := error(nil); err != nil {"}}},
	{"a report is repeated until it is settled", []edit{{attempts,
		"time.AfterFunc(again, func() { t.repeat(this) })", "_ = again"}, {settle, "_ = m.Nak(retryAfter)", "_ = m.Ack()"}}},
	{"what runs is not given back", []edit{{attempts,
		"t.watch(found, t.agent.cfg.HoldBack)\n}", "t.giveBack(\"restarted\")\n}"}}},
	{"the permit ends", []edit{{beats,
		"a.rt.Permit(until)", "a.rt.Permit(until + time.Hour)"}}},
	{"a new leader waits the old one out", []edit{{lease,
		"now.Sub(since) >= holder.Length.Std()+e.write", "now.Sub(since) >= 0"}}},
	{"a new leader knows what was there before it leads", []edit{{lead,
		"if err := p.catchUp(gctx); err != nil {", "if err := error(nil); err != nil {"}}},
	{"a worker is lost only after the fence", []edit{{fleet,
		"if now.Sub(s.at) >= fence {", "if now.Sub(s.at) >= fence/10 {"}}},
	{"the verdict is about a beat that was watched", []edit{
		{fleet, "if !ok || seen != revision || beat.Lost() {", "if !ok || beat.Lost() {"},
		{fleet, "Value: beat, Revision: revision}", "Value: beat, Revision: seen}"},
		{fleet, "f.seen[w] = sighting{s.revision, now}\n\t}\n}", "_, _ = w, s\n\t}\n}"}}},
	{"an order of which nothing came is sent again", []edit{{sweep,
		"r.order(rec, e.Revision, rec.Assignment())\n", ""}}},
}

>>>>>>> sim
const (
	batches = 20
	seeds   = 40
	patient = 5 * time.Minute // for one batch
)

var caught = regexp.MustCompile(`make simulate SEED=(\d+) SEEDS=1\s+([a-z ,]+):`)

func TestMutants(t *testing.T) {
	root, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutants.All {
		t.Run(m.Rule, func(t *testing.T) {
			binary := build(t, root, m)
			for batch := range batches {
				out, err := simulate(t, root, binary, batch*seeds+1)
				if err == nil {
					continue
				}
				if found := caught.FindStringSubmatch(out); found != nil {
					t.Logf("caught at seed %s: %s", found[1], found[2])
				} else {
					t.Logf("caught in batch %d:\n%.1500s", batch, out)
				}
				return
			}
			t.Errorf("it survives %d seeds", batches*seeds)
		})
	}
}

// build makes the simulation with the mutant in it.
func build(t *testing.T, root string, m mutants.Mutant) string {
	t.Helper()
	o, binary := harness.Overlay{}, filepath.Join(t.TempDir(), "simulation.test")
	if err := errors.Join(m.Apply(o, root), o.Go(t.Context(), "test", "-c", "-o", binary, "dayfly.dev/test/simulation")); err != nil {
		t.Fatal(err)
	}
	return binary
}

// simulate runs one batch of seeds.
func simulate(t *testing.T, root, binary string, seed int) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patient)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-test.run", "^TestSimulation$")
	cmd.Dir = filepath.Join(root, "test", "simulation")
	cmd.Env = append(os.Environ(), fmt.Sprintf("SEED=%d", seed), fmt.Sprintf("SEEDS=%d", seeds), "FAILURES=1")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), err
}
