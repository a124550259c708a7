package placer

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// filter is one reason for which a worker cannot take a task. refuses decides;
// explain says it in a sentence and is asked only of a worker that was refused.
type filter struct {
	name    string
	refuses func(f *fleet, w *worker, s *shape, now time.Time) bool
	explain func(f *fleet, w *worker, s *shape, now time.Time) string
}

// Constraints on these keys are about the host itself, not about its labels.
const (
	constraintArch = "arch"
	constraintOS   = "os"
)

// filters are asked in this order, and the first that refuses explains: what is
// wrong with the worker first, then what can never fit, then what may change.
var filters = []filter{
	{
		name:    "lost",
		refuses: func(_ *fleet, w *worker, _ *shape, _ time.Time) bool { return w.lost },
		explain: func(*fleet, *worker, *shape, time.Time) string { return "is lost: its agent has to register again" },
	},
	{
		name:    "silent",
		refuses: func(f *fleet, w *worker, _ *shape, now time.Time) bool { return f.silence(w, now) > f.lease },
		explain: func(f *fleet, w *worker, _ *shape, now time.Time) string {
			return fmt.Sprintf("no beat for %s, the limit is %s", ago(now.Sub(w.seen)), ago(f.lease))
		},
	},
	{
		name:    "draining",
		refuses: func(_ *fleet, w *worker, _ *shape, _ time.Time) bool { return w.draining },
		explain: func(*fleet, *worker, *shape, time.Time) string { return "is draining and takes nothing new" },
	},
	{
		name:    "arch",
		refuses: func(_ *fleet, w *worker, s *shape, _ time.Time) bool { return platformRefused(w, s) != "" },
		explain: func(_ *fleet, w *worker, s *shape, _ time.Time) string { return platformRefused(w, s) },
	},
	{
		name:    "constraints",
		refuses: func(_ *fleet, w *worker, s *shape, _ time.Time) bool { return labelRefused(w, s) != "" },
		explain: func(_ *fleet, w *worker, s *shape, _ time.Time) string {
			k := labelRefused(w, s)
			if have, ok := w.host.Labels[k]; ok {
				return fmt.Sprintf("asks the label %s=%s, it has %s=%s", k, s.constraints[k], k, have)
			}
			return fmt.Sprintf("asks the label %s=%s, it has no such label", k, s.constraints[k])
		},
	},
	{
		name: "kind",
		refuses: func(_ *fleet, w *worker, s *shape, _ time.Time) bool {
			return s.kind != "" && !slices.Contains(w.host.Kinds, s.kind)
		},
		explain: func(_ *fleet, _ *worker, s *shape, _ time.Time) string { return "does not run the kind " + s.kind },
	},
	{
		name:    "avoid",
		refuses: func(_ *fleet, w *worker, s *shape, _ time.Time) bool { return slices.Contains(s.avoid, w.id) },
		explain: func(*fleet, *worker, *shape, time.Time) string {
			return "gave the task back and is skipped for a while"
		},
	},
	{
		name: "gpus",
		refuses: func(_ *fleet, w *worker, s *shape, _ time.Time) bool {
			return s.need.gpus > 0 && s.need.gpus > w.free().gpus
		},
		explain: func(_ *fleet, w *worker, s *shape, _ time.Time) string {
			return fmt.Sprintf("asks %d GPUs, %d of %d are free", s.need.gpus, max(0, w.free().gpus), w.total.gpus)
		},
	},
	{
		name: "slots",
		refuses: func(_ *fleet, w *worker, _ *shape, _ time.Time) bool {
			return w.host.Slots > 0 && w.tasks >= w.host.Slots
		},
		explain: func(_ *fleet, w *worker, _ *shape, _ time.Time) string {
			return fmt.Sprintf("all %d slots are taken", w.host.Slots)
		},
	},
	{
		name:    "cpus",
		refuses: func(_ *fleet, w *worker, s *shape, _ time.Time) bool { return s.need.cpus > w.free().cpus },
		explain: func(_ *fleet, w *worker, s *shape, _ time.Time) string {
			return fmt.Sprintf("asks %s CPUs, %s of %s are free", cpus(s.need.cpus), cpus(w.free().cpus), cpus(w.total.cpus))
		},
	},
	{
		name:    "memory",
		refuses: func(_ *fleet, w *worker, s *shape, _ time.Time) bool { return s.need.memory > w.free().memory },
		explain: func(_ *fleet, w *worker, s *shape, _ time.Time) string {
			return fmt.Sprintf("asks %s memory, %s of %s is free", size(s.need.memory), size(w.free().memory), size(w.total.memory))
		},
	},
	{
		name:    "held back",
		refuses: func(_ *fleet, w *worker, s *shape, _ time.Time) bool { return w.hold != nil && !w.hold.lets(s) },
		explain: func(_ *fleet, w *worker, _ *shape, now time.Time) string {
			return fmt.Sprintf("is kept free for %s, which has waited %s", w.hold.task.id, ago(now.Sub(w.hold.task.since)))
		},
	},
}

// refusal is the filter that keeps the shape from the worker, nil if none does.
func (f *fleet) refusal(w *worker, s *shape, now time.Time) *filter {
	for i := range filters {
		if filters[i].refuses(f, w, s, now) {
			return &filters[i]
		}
	}
	return nil
}

// whyNot lists every worker that refuses the shape, each with its filter, by name.
func (f *fleet) whyNot(s *shape, now time.Time) []schemas.WhyNotWorker {
	var list []schemas.WhyNotWorker
	for _, w := range f.list {
		if r := f.refusal(w, s, now); r != nil {
			list = append(list, schemas.WhyNotWorker{Worker: w.id, Filter: r.name, Detail: r.explain(f, w, s, now)})
		}
	}
	return list
}

// couldHold says whether the worker would take the shape if it were empty.
func (f *fleet) couldHold(w *worker, s *shape, now time.Time) bool {
	empty := *w
	empty.used, empty.tasks, empty.hold = resources{}, 0, nil
	return f.refusal(&empty, s, now) == nil
}

func platformRefused(w *worker, s *shape) string {
	if want, ok := s.constraints[constraintArch]; ok && want != w.host.Arch {
		return fmt.Sprintf("asks for %s, it is %s", want, w.host.Arch)
	}
	if want, ok := s.constraints[constraintOS]; ok && want != w.host.OS {
		return fmt.Sprintf("asks for %s, it is %s", want, w.host.OS)
	}
	return ""
}

// labelRefused names the first constraint that the worker's labels do not meet.
func labelRefused(w *worker, s *shape) string {
	first := ""
	for k, want := range s.constraints {
		if have, ok := w.host.Labels[k]; k != constraintArch && k != constraintOS && (!ok || have != want) && (first == "" || k < first) {
			first = k
		}
	}
	return first
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
