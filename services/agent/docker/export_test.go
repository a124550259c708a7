package docker

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
