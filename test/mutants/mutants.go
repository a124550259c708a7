// Package mutants is a table of alterations of the services' sources that break one rule
// each. The tests that hunt for broken rules run with them: one that finds nothing may be
// blind.
package mutants

import (
	"path/filepath"

	"dayfly.dev/test/harness"
)

// Edit is one change of a source file; Old stands in it once.
type Edit struct{ File, Old, New string }

// Mutant is a rule, and the edits that break it.
type Mutant struct {
	Rule  string
	Edits []Edit
}

// Apply makes the mutant part of an overlay over the repository at root.
func (m Mutant) Apply(o harness.Overlay, root string) error {
	for _, e := range m.Edits {
		if err := o.Replace(filepath.Join(root, e.File), e.Old, e.New); err != nil {
			return err
		}
	}
	return nil
}

const (
	table    = "bus/table.go"
	next     = "schemas/next.go"
	orders   = "services/agent/order.go"
	attempts = "services/agent/attempt.go"
	beats    = "services/agent/beat.go"
	lease    = "services/placer/lease.go"
	fleet    = "services/reaper/fleet.go"
	settle   = "services/reaper/settle.go"
	sweep    = "services/reaper/sweep.go"
)

// noWord takes away that a report which shows what its worker has not heard brings the
// order again: it would hide what is lost or overtaken on the way.
var noWord = Edit{settle, "if (err == nil || settled(err)) && !after.Value.Heard(rep, e.Revision) {", "if false {"}

// All of them.
var All = []Mutant{
	{"a record is written by compare-and-set", []Edit{{table,
		"hdr.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(expect, 10))", "_ = strconv.Itoa"}}},
	{"after a lost compare-and-set the event is applied to what is there now", []Edit{{table,
		"e = fresh", "e.Revision = fresh.Revision"}}},
	{"a write of unknown outcome is told by its op", []Edit{{table,
		"return t.codec.Wrote(v, op)", "return false"}}},
	{"final is final", []Edit{{next,
		"if !r.State.Final() {\n\t\tswitch", "if true {\n\t\tswitch"}}},
	{"a report counts only for its attempt", []Edit{{next,
		"if !r.State.Held() || rep.Assignment != r.Assignment() {", "if !r.State.Held() {"}}},
	{"a cancel outlives the attempt", []Edit{{next,
		"case r.Cancel != nil:\n\t\tr.finish(Canceled, ReasonCanceled, \"canceled by \"+r.Cancel.By, m)\n\tcase timeOver", "case r.Cancel != nil && end.By == EndedStop:\n\t\tr.finish(Canceled, ReasonCanceled, \"canceled by \"+r.Cancel.By, m)\n\tcase timeOver"}}},
	{"what waits for its worker is not given up", []Edit{{next,
		"if r.Spec.OnLost == OnLostWait && !e.Gone {", "if false {"}}},
	{"an order of another epoch is refused", []Edit{{orders,
		"case o.Epoch != a.epoch:", "case false:"}}},
	{"the journal is written before the start", []Edit{{orders,
		"err := a.journal.put(t)\n", "var err error\n"}}},
	{"what was closed before it came never starts", []Edit{{orders,
		"// A stop or close of what never arrived: it shall never start.\n", "if true {\n\t\treturn\n\t}\n"}}},
	{"an older order does not replace a newer", []Edit{{orders,
		"if o.Revision >= e.Revision {", "if true {"}, {attempts, "if o.Extensions > t.applied || t.found == nil {", "if true {"}, noWord}},
	{"an extension moves the deadline", []Edit{{attempts,
		"err := t.found.SetDeadline(t.deadline.remaining(t.agent.rt.Now(), ran))", "_, err := ran, error(nil)"}}},
	{"a report is repeated until it is settled", []Edit{{attempts,
		"time.AfterFunc(again, func() { t.repeat(this) })", "_ = again"},
		{attempts, "continue\n\t\t\t}\n\t\t\tt.again()", "continue\n\t\t\t}"}, {settle, "_ = m.Nak(retryAfter)", "_ = m.Ack()"}}},
	{"what runs is not given back", []Edit{{attempts,
		"t.watch(found, t.agent.cfg.HoldBack)\n}", "t.giveBack(\"restarted\")\n}"}}},
	{"the permit ends", []Edit{{beats,
		"a.rt.Permit(until)", "a.rt.Permit(until + time.Hour)"}}},
	{"a new leader waits the old one out", []Edit{{lease,
		"now.Sub(since) >= holder.Length.Std()+e.write", "now.Sub(since) >= 0"}}},
	{"a worker is lost only after the fence", []Edit{{fleet,
		"if now.Sub(s.at) >= fence {", "if now.Sub(s.at) >= fence/10 {"}}},
	{"the verdict is about a beat that was watched", []Edit{
		{fleet, "if !ok || seen != revision || beat.Lost() {", "if !ok || beat.Lost() {"},
		{fleet, "Value: beat, Revision: revision}", "Value: beat, Revision: seen}"},
		{fleet, "f.seen[w] = sighting{s.revision, now}\n\t}\n}", "_, _ = w, s\n\t}\n}"}}},
	{"an order of which nothing came is sent again", []Edit{{sweep,
		"r.order(rec, e.Revision, rec.Assignment())\n", ""}, noWord}},
}
