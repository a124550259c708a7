package placer

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// maxWhyWorkers bounds the answer; the summary counts all.
const maxWhyWorkers = 1000

// why says why a task waits.
func (b *book) why(id schemas.TaskID, now time.Time) schemas.Why {
	y := schemas.Why{Task: id}
	t := b.tasks[id]
	switch {
	case t == nil:
		y.Summary = "is not in the queue: it is final, or not known here yet"
		return y
	case t.phase == held:
		y.Summary = fmt.Sprintf("is not in the queue: it is %s on %s", t.state, t.worker)
		return y
	case t.phase == chosen:
		y.Summary = fmt.Sprintf("is being given to %s", t.worker)
		return y
	}
	if t.phase == waiting {
		y.Position = b.queue.position(t)
	}
	s := t.shape
	if s == nil { // as it would stand in the queue
		s = &shape{shapeKey: t.shapeKey(now), constraints: t.constraints, avoid: t.avoiding(now), names: t.need.blobs}
		s.tasks.root = &task{id: t.id, queued: t.queued, since: t.since}
		s.tasks.root.turn.count = 1
	}
	y.Workers = b.fleet.whyNot(s, now)
	y.Summary = b.summary(t, s, y, now)
	if len(y.Workers) > maxWhyWorkers {
		y.Workers = y.Workers[:maxWhyWorkers]
	}
	return y
}

func (b *book) summary(t *task, s *shape, y schemas.Why, now time.Time) string {
	var text string
	switch {
	case len(b.fleet.list) == 0:
		text = "no worker is there yet: start an agent"
	case t.phase == resting && t.until.After(now):
		text = fmt.Sprintf("is tried again in %s", ago(t.until.Sub(now)))
	case len(y.Workers) < len(b.fleet.list):
		text = "is about to be placed"
		if y.Position > 1 {
			text = fmt.Sprintf("waits for its turn: %s before it", tasks(y.Position-1))
		}
	default:
		text = b.refused(s, y.Workers, now)
	}
	if t.note != "" {
		text += "; tried before: " + t.note
	}
	return text
}

// closeness orders the filters by how near a worker is to taking the task: a sentence
// about memory helps more than one about a worker that is gone.
var closeness = []string{"held back", "memory", "cpus", "slots", "gpus", "avoid", "blobs", "kind", "constraints", "arch", "draining", "silent", "lost"}

// refused is the sentence for a task that every worker refuses: what the nearest
// workers lack, and in brackets what is wrong with the others.
func (b *book) refused(s *shape, list []schemas.WhyNotWorker, now time.Time) string {
	by := map[string]int{}
	for _, n := range list {
		by[n.Filter]++
	}
	main := ""
	for _, name := range closeness {
		if by[name] > 0 {
			main = name
			break
		}
	}
	text := b.lack(main, b.fleet.trial(s, now), list)
	var others []string
	for _, name := range closeness {
		if n := by[name]; n > 0 && name != main {
			others = append(others, fmt.Sprintf("%d of %d %s", n, len(list), verb(name, n)))
		}
	}
	if len(others) > 0 {
		text += " (" + strings.Join(others, ", ") + ")"
	}
	return text
}

// lack says what the workers that are nearest lack.
func (b *book) lack(name string, x *trial, list []schemas.WhyNotWorker) string {
	s := x.shape
	var near []*worker
	for _, n := range list {
		if n.Filter == name {
			near = append(near, b.fleet.byID[n.Worker])
		}
	}
	amount := func(word string, need int64, free, total func(*worker) int64, show func(int64) string) string {
		most := slices.MaxFunc(near, func(a, b *worker) int { return int(min(1, max(-1, free(a)-free(b)))) })
		largest := slices.MaxFunc(near, func(a, b *worker) int { return int(min(1, max(-1, total(a)-total(b)))) })
		if need > total(largest) {
			return fmt.Sprintf("no worker is large enough: asks %s %s, the largest has %s (%s)", show(need), word, show(total(largest)), largest.id)
		}
		return fmt.Sprintf("waits for %s: asks %s, the most free is %s on %s", word, show(need), show(free(most)), most.id)
	}
	switch name {
	case "held back":
		w := near[0]
		return fmt.Sprintf("waits: %s %s", w.id, x.refusal(w).explain(x, w))
	case "memory":
		return amount("memory", s.need.memory, func(w *worker) int64 { return w.free().memory }, func(w *worker) int64 { return w.total.memory }, size)
	case "cpus":
		return amount("CPUs", s.need.cpus, func(w *worker) int64 { return w.free().cpus }, func(w *worker) int64 { return w.total.cpus }, cpus)
	case "gpus":
		return amount("GPUs", int64(s.need.gpus), func(w *worker) int64 { return int64(w.free().gpus) }, func(w *worker) int64 { return int64(w.total.gpus) },
			func(n int64) string { return fmt.Sprint(max(0, n)) })
	case "slots":
		return "waits for a slot: every worker that could take it has all its slots taken"
	case "avoid":
		return "waits: every worker that could take it has just given it back"
	case "blobs":
		return "no worker's cache of blobs is large enough: asks " + size(total(s.names)) + " (--blob-cache-bytes)"
	case "constraints", "arch", "kind":
		w := near[0]
		return fmt.Sprintf("no worker meets its constraints: %s on %s", x.refusal(w).explain(x, w), w.id)
	case "draining":
		return "waits: every worker is draining"
	case "silent":
		return "waits: no worker has been heard of lately; look at the agents"
	default:
		return "waits: every worker is lost; look at the agents"
	}
}

func verb(filter string, n int) string {
	are := "are"
	if n == 1 {
		are = "is"
	}
	switch filter {
	case "memory", "cpus", "slots", "gpus":
		return map[bool]string{true: "has", false: "have"}[n == 1] + " too few " + strings.Replace(filter, "memory", "bytes of memory", 1)
	case "avoid":
		return "gave it back"
	case "blobs":
		return map[bool]string{true: "has", false: "have"}[n == 1] + " too small a cache of blobs"
	case "kind", "constraints", "arch":
		return map[bool]string{true: "does", false: "do"}[n == 1] + " not meet its " + filter
	default:
		return are + " " + filter
	}
}

func tasks(n int) string {
	if n == 1 {
		return "1 task is"
	}
	return fmt.Sprintf("%d tasks are", n)
}
