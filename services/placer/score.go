package placer

import (
	"fmt"
	"iter"
	"math"
	"time"
)

// Policy is how the placer chooses among the workers that a task fits on.
type Policy string

// The policies.
const (
	// Weighted spreads: the worker whose shares are lowest once it has the task wins.
	Weighted Policy = "weighted"
	// RoundRobin takes the workers in turn, by name.
	RoundRobin Policy = "roundrobin"
	// EPVM is the opportunity cost of Amir et al., "An Opportunity Cost Approach for Job
	// Assignment in a Scalable Computing Cluster", IEEE TPDS 11(7), 2000: each resource of
	// a machine costs N to the power of its utilisation, N being the number of machines,
	// and the machine wins whose sum grows least.
	EPVM Policy = "epvm"
)

// ParsePolicy checks the name of a policy.
func ParsePolicy(s string) (Policy, error) {
	if p := Policy(s); scores[p] != nil {
		return p, nil
	}
	return "", fmt.Errorf("no such placement policy; there are %s, %s and %s", Weighted, RoundRobin, EPVM)
}

// imageBonus is what having the image is worth: a twentieth of an empty machine.
const imageBonus = 0.05

// score of a worker that the shape fits on; the lowest wins.
type score func(f *fleet, w *worker, s *shape) float64

var scores = map[Policy]score{Weighted: weighted, RoundRobin: roundRobin, EPVM: epvm}

func weighted(_ *fleet, w *worker, s *shape) float64 {
	v := 0.5*share(w.used.cpus+s.need.cpus, w.total.cpus) +
		0.3*share(w.used.memory+s.need.memory, w.total.memory) +
		0.2*share(int64(w.tasks)+1, int64(w.host.Slots))
	if w.hasImage(s.image) {
		v -= imageBonus
	}
	return v + w.fetching(s)
}

func roundRobin(f *fleet, w *worker, _ *shape) float64 {
	n := len(f.list)
	return float64((w.index - f.last - 1 + n) % n)
}

func epvm(f *fleet, w *worker, s *shape) float64 {
	n := math.Log(float64(max(2, len(f.list)))) // with one machine every cost would be 1
	cost := func(used, need, total int64) float64 {
		return math.Exp(n*share(used+need, total)) - math.Exp(n*share(used, total))
	}
	v := cost(w.used.cpus, s.need.cpus, w.total.cpus) +
		cost(w.used.memory, s.need.memory, w.total.memory) +
		cost(int64(w.tasks), 1, int64(w.host.Slots))
	if w.hasImage(s.image) {
		v *= 1 - imageBonus // costs have no fixed range
	}
	return v + float64(len(f.list))*w.fetching(s) // as much as a whole resource costs at the most
}

// share is how much of total is used; what has no limit is not used at all.
func share(used, total int64) float64 {
	if total <= 0 {
		return 0
	}
	return float64(used) / float64(total)
}

func (w *worker) hasImage(image string) bool { _, ok := w.imageSet[image]; return ok }

// choose gives the worker that takes the shape, of those in among, nil if none does.
// Of equal scores the first name wins, so that the same state gives the same choice.
func (f *fleet) choose(s *shape, by score, now time.Time, among iter.Seq[*worker]) *worker {
	var best *worker
	var lowest float64
	x := f.trial(s, now)
	for w := range among {
		if !w.known || !x.takes(w) {
			continue
		}
		if v := by(f, w, s); best == nil || v < lowest || v == lowest && w.index < best.index {
			best, lowest = w, v
		}
	}
	return best
}
