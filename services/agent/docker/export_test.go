package docker

import "dayfly.dev/services/agent"

// OccupyStarts takes all places of starts until free is called.
func (r *Runtime) OccupyStarts() (free func()) {
	for range cap(r.starts) {
		r.starts <- struct{}{}
	}
	return func() {
		for range cap(r.starts) {
			<-r.starts
		}
	}
}

// Tidy is init's word that nothing of a program is left to be cleaned away.
func Tidy(a agent.Attempt) bool {
	t := a.(*attempt)
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tidy
}

// MemoryLimit is what the container may use.
func MemoryLimit(a agent.Attempt) int64 { return a.(*attempt).memoryLimit() }
