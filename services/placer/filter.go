package placer

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// trial is a shape that is tried on workers at one moment.
type trial struct {
	shape *shape
	now   time.Time
	alive time.Time // whose newest beat is older is silent
	lease time.Duration
}

func (f *fleet) trial(s *shape, now time.Time) *trial {
	return &trial{shape: s, now: now, alive: now.Add(-f.lease), lease: f.lease}
}

// filter is one reason for which a worker cannot take a task. refuses decides;
// explain says it in a sentence and is asked only of a worker that was refused.
type filter struct {
	name    string
	refuses func(*trial, *worker) bool
	explain func(*trial, *worker) string
}

// Constraints on these keys are about the host itself, not about its labels.
const (
	constraintArch = "arch"
	constraintOS   = "os"
)

// filters are asked in this order, and the first that refuses explains: what is
// wrong with the worker first, then what can never fit, then what may change.
var filters = []filter{
	{"lost", isLost, func(*trial, *worker) string { return "is lost: its agent has to register again" }},
	{"silent", isSilent, func(x *trial, w *worker) string {
		return fmt.Sprintf("no beat for %s, the limit is %s", ago(x.now.Sub(w.seen)), ago(x.lease))
	}},
	{"draining", isDraining, func(*trial, *worker) string { return "is draining and takes nothing new" }},
	{"arch", otherPlatform, func(x *trial, w *worker) string {
		for _, c := range []struct{ key, have string }{{constraintArch, w.host.Arch}, {constraintOS, w.host.OS}} {
			if want, ok := x.shape.constraints[c.key]; ok && want != c.have {
				return fmt.Sprintf("asks for %s, it is %s", want, c.have)
			}
		}
		return ""
	}},
	{"constraints", otherLabels, func(x *trial, w *worker) string {
		k := labelMissed(x, w)
		want := x.shape.constraints[k]
		if have, ok := w.host.Labels[k]; ok {
			return fmt.Sprintf("asks the label %s=%s, it has %s=%s", k, want, k, have)
		}
		return fmt.Sprintf("asks the label %s=%s, it has no such label", k, want)
	}},
	{"kind", otherKind, func(x *trial, _ *worker) string {
		if x.shape.kind == "" {
			return "takes only tasks of its kinds"
		}
		return "does not run the kind " + x.shape.kind
	}},
	{"blobs", lacksCache, func(x *trial, w *worker) string {
		return fmt.Sprintf("asks %s of blobs, its cache takes %s", size(total(x.shape.names)), w.host.Cache)
	}},
	{"credentials", lacksCredentials, func(x *trial, _ *worker) string {
		return fmt.Sprintf("has no registry credentials %q", x.shape.credentials)
	}},
	{"avoid", isAvoided, func(*trial, *worker) string { return "gave the task back and is skipped for a while" }},
	{"gpus", lacksGPUs, func(x *trial, w *worker) string {
		return fmt.Sprintf("asks %d GPUs, %d of %d are free", x.shape.need.gpus, max(0, w.free().gpus), w.total.gpus)
	}},
	{"slots", lacksSlots, func(_ *trial, w *worker) string { return fmt.Sprintf("all %d slots are taken", w.host.Slots) }},
	{"cpus", lacksCPUs, func(x *trial, w *worker) string {
		return fmt.Sprintf("asks %s CPUs, %s of %s are free", cpus(x.shape.need.cpus), cpus(w.free().cpus), cpus(w.total.cpus))
	}},
	{"memory", lacksMemory, func(x *trial, w *worker) string {
		return fmt.Sprintf("asks %s memory, %s of %s is free", size(x.shape.need.memory), size(w.free().memory), size(w.total.memory))
	}},
	{"held back", isHeldBack, func(x *trial, w *worker) string {
		return fmt.Sprintf("is kept free for %s, which has waited %s", w.hold.task.id, ago(x.now.Sub(w.hold.task.since)))
	}},
}

// takes says whether no filter refuses the worker. It is the list above once more,
// spelled out, since this is where a placer of a thousand workers spends its time.
func (x *trial) takes(w *worker) bool {
	return !isLost(x, w) && !isSilent(x, w) && !isDraining(x, w) &&
		!lacksGPUs(x, w) && !lacksSlots(x, w) && !lacksCPUs(x, w) && !lacksMemory(x, w) &&
		(len(x.shape.constraints) == 0 || !otherPlatform(x, w) && !otherLabels(x, w)) &&
		!otherKind(x, w) && (x.shape.credentials == "" || !lacksCredentials(x, w)) && (len(x.shape.names) == 0 || !lacksCache(x, w)) && (len(x.shape.avoid) == 0 || !isAvoided(x, w)) &&
		(w.hold == nil || !isHeldBack(x, w))
}

func isLost(_ *trial, w *worker) bool     { return w.lost }
func isSilent(x *trial, w *worker) bool   { return w.seen.Before(x.alive) }
func isDraining(_ *trial, w *worker) bool { return w.draining }
func lacksGPUs(x *trial, w *worker) bool {
	return x.shape.need.gpus > 0 && x.shape.need.gpus > w.total.gpus-w.used.gpus
}
func lacksSlots(_ *trial, w *worker) bool  { return w.host.Slots > 0 && w.tasks >= w.host.Slots }
func lacksCPUs(x *trial, w *worker) bool   { return x.shape.need.cpus > w.total.cpus-w.used.cpus }
func lacksMemory(x *trial, w *worker) bool { return x.shape.need.memory > w.total.memory-w.used.memory }
func isHeldBack(x *trial, w *worker) bool  { return w.hold != nil && !w.hold.lets(x.shape) }
func isAvoided(x *trial, w *worker) bool   { return slices.Contains(x.shape.avoid, w.id) }
func otherKind(x *trial, w *worker) bool {
	return len(w.host.Kinds) > 0 && !slices.Contains(w.host.Kinds, x.shape.kind)
}
func lacksCredentials(x *trial, w *worker) bool {
	return x.shape.credentials != "" && !slices.Contains(w.host.Credentials, x.shape.credentials)
}
func otherLabels(x *trial, w *worker) bool { return labelMissed(x, w) != "" }

func otherPlatform(x *trial, w *worker) bool {
	arch, a := x.shape.constraints[constraintArch]
	os, o := x.shape.constraints[constraintOS]
	return a && arch != w.host.Arch || o && os != w.host.OS
}

// labelMissed names the first constraint that the worker's labels do not meet.
func labelMissed(x *trial, w *worker) string {
	first := ""
	for k, want := range x.shape.constraints {
		if have, ok := w.host.Labels[k]; k != constraintArch && k != constraintOS && (!ok || have != want) && (first == "" || k < first) {
			first = k
		}
	}
	return first
}

// refusal is the filter that keeps the shape from the worker, nil if none does.
func (x *trial) refusal(w *worker) *filter {
	for i := range filters {
		if filters[i].refuses(x, w) {
			return &filters[i]
		}
	}
	return nil
}

// whyNot lists every worker that refuses the shape, each with its filter, by name.
func (f *fleet) whyNot(s *shape, now time.Time) []schemas.WhyNotWorker {
	var list []schemas.WhyNotWorker
	x := f.trial(s, now)
	for _, w := range f.list {
		if r := x.refusal(w); r != nil {
			list = append(list, schemas.WhyNotWorker{Worker: w.id, Filter: r.name, Detail: r.explain(x, w)})
		}
	}
	return list
}

// couldHold says whether the worker would take the shape if it were empty.
func (f *fleet) couldHold(w *worker, s *shape, now time.Time) bool {
	empty := *w
	empty.used, empty.tasks, empty.hold = resources{}, 0, nil
	return f.trial(s, now).takes(&empty)
}

// canonical is a map of pairs as one comparable string.
func canonical(m map[string]string) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(m)) {
		b.WriteString(k)
		b.WriteByte(0)
		b.WriteString(m[k])
		b.WriteByte(0)
	}
	return b.String()
}

func cpus(nano int64) string  { return schemas.CPUs(float64(max(0, nano)) / 1e9).String() }
func size(bytes int64) string { return schemas.Size(max(0, bytes)).String() }
func ago(d time.Duration) string {
	if d < 10*time.Second {
		return schemas.Duration(d.Round(100 * time.Millisecond)).String()
	}
	return schemas.Duration(d.Round(time.Second)).String()
}
