// Package natssim is a NATS server with JetStream in memory, for simulations: as much
// of one as package bus uses, with one goroutine and without clocks of its own, so that
// everything above it can run in virtual time (testing/synctest) at the speed of the
// processor. Package bus and the client library run on it as they are.
//
//	bus.Conn ─ nats.go ─ Link ─▶ Server: streams, buckets, consumers
//
// It misbehaves as a NATS server and a network may, by a seed: messages take their time
// and overtake each other where they are of different streams, answers get lost, what
// was acknowledged comes again, connections break with messages under way, and a server
// that restarts has lost its memory, of streams that do not wait for the disk also the
// last milliseconds. What a real one never loses it keeps.
package natssim

import (
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// Faults are what goes wrong, as probabilities for each message. The zero value is a
// good network.
type Faults struct {
	Slow       float64 // it takes up to SlowMost
	SlowMost   time.Duration
	LostAnswer float64 // the answer to a write never comes
	LostAck    float64 // the acknowledgement of a delivery never comes
	Spurious   float64 // a compare-and-set is refused although it is right
}

// Config of a server.
type Config struct {
	Seed uint64
	// Alias is a second prefix of the JetStream API, for agents: schemas.AgentAPIPrefix.
	Alias string
	// Stored is told of each message that a stream takes. It must not use the server.
	Stored func(Stored)
}

// Stored is a message that a stream has taken.
type Stored struct {
	Subject  string
	Sequence uint64
	Data     []byte
	Guarded  bool // by an expected sequence
}

// Server is one server.
type Server struct {
	alias  string
	stored func(Stored)

	timer *time.Timer // of run
	ended chan struct{}

	mu      sync.Mutex
	rng     *rand.Rand        // under mu
	faults  Faults            // under mu
	down    bool              // under mu
	stopped bool              // under mu
	conns   []*conn           // under mu
	subs    map[string][]*sub // under mu: by the pattern without its last token
	streams []*stream         // under mu
	queue   events            // under mu: what is to come
	events  uint64            // under mu: how many there were
}

// New makes an empty server. Stop ends it.
func New(c Config) *Server {
	s := &Server{alias: c.Alias, stored: c.Stored, rng: rand.New(rand.NewPCG(c.Seed, 1)),
		subs: map[string][]*sub{}, timer: time.NewTimer(time.Hour), ended: make(chan struct{})}
	if s.alias != "" {
		s.alias += "."
	}
	go s.run()
	return s
}

// SetFaults changes what goes wrong from now on.
func (s *Server) SetFaults(f Faults) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = f
}

// Kill ends the server as kill -9 does: all connections break, what was under way is
// gone. Start brings it back.
func (s *Server) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = true
	for _, c := range slices.Clone(s.conns) {
		c.l.hangUp()
		c.lostAfter = time.Time{}
	}
	for _, st := range s.streams {
		st.crash()
	}
}

// Start ends Kill.
func (s *Server) Start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = false
}

// Stop ends the server for good: nothing of it wakes up any more.
func (s *Server) Stop() {
	s.Kill()
	s.mu.Lock()
	s.stopped = true
	s.timer.Reset(0)
	s.mu.Unlock()
	<-s.ended
}

func (s *Server) chance(p float64) bool { return p > 0 && s.rng.Float64() < p }

// delay is how long a message takes.
func (s *Server) delay() time.Duration {
	d := 20*time.Microsecond + time.Duration(s.rng.Int64N(int64(400*time.Microsecond)))
	if s.chance(s.faults.Slow) {
		f := s.rng.Float64()
		d += time.Duration(f * f * float64(s.faults.SlowMost))
	}
	return d
}
