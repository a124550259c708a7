package faults

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Add makes r the sum of itself and another run.
func (r *Result) Add(o Result) {
	for _, p := range []struct{ to, from *map[string]int }{
		{&r.Ops, &o.Ops}, {&r.Finals, &o.Finals}, {&r.Requeues, &o.Requeues}, {&r.Truncated, &o.Truncated},
		{&r.ByClock, &o.ByClock}, {&r.Lives, &o.Lives},
	} {
		*p.to = sum(*p.to, *p.from)
	}
	r.Attempts = sum(r.Attempts, o.Attempts)
	r.Violations = append(r.Violations, o.Violations...)
	r.Accepted += o.Accepted
	r.Records += o.Records
	r.Logs += o.Logs
	r.IdleLeft += o.IdleLeft
	r.Faults = append(r.Faults, o.Faults...)
	r.FaultsAt = append(r.FaultsAt, o.FaultsAt...)
	r.Recovery = append(r.Recovery, o.Recovery...)
	r.Settled = max(r.Settled, o.Settled)
	r.ShownLate = append(r.ShownLate, o.ShownLate...)
	r.Overshoot = append(r.Overshoot, o.Overshoot...)
}

func sum[K comparable](a, b map[K]int) map[K]int {
	all := maps.Clone(a)
	if all == nil {
		all = map[K]int{}
	}
	for k, n := range b {
		all[k] += n
	}
	return all
}

// Print writes the table.
func (r Result) Print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name string, v any) { fmt.Fprintf(w, "%s\t%v\n", name, v) }
	row("tasks accepted", r.Accepted)
	row("records", r.Records)
	for _, rule := range rules {
		row(string(rule), r.Count(rule))
	}
	group := func(name string, m map[string]int) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			row(name+": "+k, m[k])
		}
	}
	group("final", r.Finals)
	group("requeued", r.Requeues)
	group("attempt ended by", r.Lives)
	for _, n := range slices.Sorted(maps.Keys(r.Attempts)) {
		row(fmt.Sprintf("tasks with %d attempts", n), r.Attempts[n])
	}
	row("logs read whole", r.Logs)
	group("logs truncated", r.Truncated)
	group("for a clock that was off", r.ByClock)
	group("op", r.Ops)
	row("idle inits left", r.IdleLeft)
	row("all final after healing", r.Settled.Round(time.Millisecond))
	if len(r.Overshoot) > 0 {
		row("TTL overshoot p50, p99", spread(r.Overshoot))
	}
	if n := len(r.ShownLate); n > 0 {
		row("deadline shown too late", fmt.Sprintf("%d times, by %v at most", n, slices.Max(r.ShownLate).Round(time.Millisecond)))
	}
	r.printFaults(w)
	w.Flush()
}

// printFaults writes one line for each kind of fault and of what it hurt.
func (r Result) printFaults(w io.Writer) {
	type kind struct{ fault, part string }
	type row struct {
		times, unseen, open int
		took                []time.Duration
	}
	rows := map[kind]*row{}
	for i, f := range r.Faults {
		k := kind{f.Kind, part(f.Target)}
		n := rows[k]
		if n == nil {
			n = &row{}
			rows[k] = n
		}
		n.times++
		if f.Effect == "" {
			n.unseen++
		}
		if r.Recovery[i] < 0 {
			n.open++
		} else {
			n.took = append(n.took, r.Recovery[i])
		}
	}
	fmt.Fprintln(w, "\nfault\thurt\ttimes\tno effect seen\tat work again after, p50, p99\tnot before the end")
	order := func(a, b kind) int {
		return cmp.Or(cmp.Compare(a.part, b.part), cmp.Compare(a.fault, b.fault))
	}
	for _, k := range slices.SortedFunc(maps.Keys(rows), order) {
		n := rows[k]
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%d\n", k.fault, k.part, n.times, n.unseen, spread(n.took), n.open)
	}
}

// spread gives the median and the 99th percentile.
func spread(list []time.Duration) string {
	if len(list) == 0 {
		return "-"
	}
	list = slices.Sorted(slices.Values(list))
	n := len(list)
	return fmt.Sprint(list[n/2].Round(time.Millisecond), " ", list[n*99/100].Round(time.Millisecond))
}

// part names the service of a target; several have one name if they are of one kind.
func part(target string) (name string) {
	for _, one := range strings.Fields(target) {
		service, _, _ := strings.Cut(strings.TrimRight(one, "0123456789"), "-")
		if name != "" && name != service {
			return "several"
		}
		name = service
	}
	return name
}
