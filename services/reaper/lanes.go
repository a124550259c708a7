package reaper

import "sync"

// lanes lets work begin, so much at a time for one host and so much in all. Hosts take
// turns, so that one that is slow or has much to be told keeps no other waiting. An id
// is there once, waiting or at work.
type lanes struct {
	perHost, most int

	mu      sync.Mutex
	hosts   map[string]*lane // under mu
	ids     map[string]*lane // under mu: waiting or at work
	turn    []*lane          // under mu: those that wait and may begin another
	working int              // under mu
}

type lane struct {
	host    string
	waiting []string
	working int
	inTurn  bool
}

func newLanes(perHost, most int) *lanes {
	return &lanes{perHost: perHost, most: most, hosts: map[string]*lane{}, ids: map[string]*lane{}}
}

// add lets id wait for its turn, and gives what may begin now.
func (l *lanes) add(id, host string) (begin []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, there := l.ids[id]; there {
		return nil
	}
	w := l.hosts[host]
	if w == nil {
		w = &lane{host: host}
		l.hosts[host] = w
	}
	l.ids[id] = w
	w.waiting = append(w.waiting, id)
	return l.begin(w)
}

// done ends the work on id, and gives what may begin now.
func (l *lanes) done(id string) (begin []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := l.ids[id]
	delete(l.ids, id)
	l.working--
	w.working--
	if w.working == 0 && len(w.waiting) == 0 {
		delete(l.hosts, w.host)
	}
	return l.begin(w)
}

// begin takes what may begin; w has changed, and mu is held.
func (l *lanes) begin(w *lane) (ids []string) {
	l.queue(w)
	for l.working < l.most && len(l.turn) > 0 {
		w := l.turn[0]
		l.turn = l.turn[1:]
		w.inTurn = false
		ids = append(ids, w.waiting[0])
		w.waiting = w.waiting[1:]
		w.working++
		l.working++
		l.queue(w)
	}
	return ids
}

func (l *lanes) queue(w *lane) {
	if !w.inTurn && len(w.waiting) > 0 && w.working < l.perHost {
		w.inTurn = true
		l.turn = append(l.turn, w)
	}
}
