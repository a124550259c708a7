package natssim

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

type consumer struct {
	st      *stream
	name    string
	cfg     jetstream.ConsumerConfig
	filter  []string
	created time.Time

	next    uint64 // the stream's sequence from which nothing was delivered yet
	seq     uint64 // deliveries
	pulls   []*pull
	pending map[uint64]*delivery // by the stream's sequence: not acknowledged
	pulled  time.Time            // last
	alarm   time.Time            // when it is looked at next; zero: not planned
}

type pull struct {
	inbox string
	batch int
	beat  time.Duration
	until time.Time
	said  time.Time
}

type delivery struct {
	count uint64
	due   time.Time // to be delivered again
}

func (s *Server) createConsumer(m *packet, st *stream) {
	var ask struct {
		Config jetstream.ConsumerConfig `json:"config"`
	}
	if err := json.Unmarshal(m.data, &ask); err != nil {
		s.refuse(m, "api", apiError(400, 10025, err.Error()))
		return
	}
	name := ask.Config.Durable
	if name == "" {
		name = ask.Config.Name
	}
	c := st.consumer(name)
	if c == nil {
		c = &consumer{st: st, name: name, created: time.Now().UTC(), next: max(1, ask.Config.OptStartSeq),
			pending: map[uint64]*delivery{}, pulled: time.Now()}
		st.consumers = append(st.consumers, c)
	}
	c.cfg, c.filter = ask.Config, []string{">"}
	if ask.Config.FilterSubject != "" {
		c.filter = strings.Split(ask.Config.FilterSubject, ".")
	}
	s.answer(m, c.info())
	c.pump()
}

func (st *stream) consumer(name string) *consumer {
	for _, c := range st.consumers {
		if c.name == name {
			return c
		}
	}
	return nil
}

func (s *Server) consumerAPI(m *packet, st *stream, verb, name string) {
	c := st.consumer(name)
	if c == nil {
		if verb == "CONSUMER MSG NEXT" {
			s.status(m.reply, "core", "503")
		} else {
			s.refuse(m, "api", apiError(404, 10014, "consumer not found"))
		}
		return
	}
	switch verb {
	case "CONSUMER INFO":
		s.answer(m, c.info())
	case "CONSUMER DELETE":
		c.remove()
		s.answer(m, map[string]any{"success": true})
	case "CONSUMER MSG NEXT":
		var ask struct {
			Batch   int           `json:"batch"`
			Expires time.Duration `json:"expires"`
			Beat    time.Duration `json:"idle_heartbeat"`
		}
		_ = json.Unmarshal(m.data, &ask)
		now := time.Now()
		c.pulled = now
		c.pulls = append(c.pulls, &pull{inbox: m.reply, batch: ask.Batch, beat: ask.Beat, until: now.Add(ask.Expires), said: now})
		c.pump()
	}
}

func (c *consumer) info() jetstream.ConsumerInfo {
	return jetstream.ConsumerInfo{Stream: c.st.name, Name: c.name, Created: c.created, Config: c.cfg,
		NumPending: uint64(c.left()), NumAckPending: len(c.pending)}
}

// left is how many messages were not delivered yet.
func (c *consumer) left() (n int) {
	for _, m := range c.st.msgs {
		if m.seq >= c.next && match(c.filter, m.tokens) {
			n++
		}
	}
	return n
}

func (c *consumer) remove() {
	c.st.consumers = slices.DeleteFunc(c.st.consumers, func(other *consumer) bool { return other == c })
	for _, p := range c.pulls {
		c.st.s.status(p.inbox, c.name, "409 Consumer Deleted")
	}
	c.pulls = nil
}

// crash is what is left of the consumer when the server was killed: nothing if it lived
// in memory, and the acknowledgements of the last moment may not be known.
func (c *consumer) crash() {
	c.pulls = nil
	if c.cfg.MemoryStorage {
		c.remove()
		return
	}
	c.next = min(c.next, c.st.last+1)
	for _, d := range c.pending {
		d.due = time.Now()
	}
	c.pump()
}

// pump delivers what can be delivered, says what is due to the pulls, and plans the next look.
func (c *consumer) pump() {
	now := time.Now()
	for {
		p := c.asking(now)
		if p == nil {
			break
		}
		m, d := c.choose(now)
		if m == nil {
			break
		}
		c.deliver(p, m, d, now)
	}
	wake := now.Add(time.Hour)
	for _, d := range c.pending {
		if len(c.pulls) > 0 && d.due.Before(wake) {
			wake = d.due
		}
	}
	for _, p := range c.pulls {
		if p.beat > 0 {
			if !now.Before(p.said.Add(p.beat)) {
				c.st.s.status(p.inbox, c.name, "100 Idle Heartbeat")
				p.said = now
			}
			if at := p.said.Add(p.beat); at.Before(wake) {
				wake = at
			}
		}
		if p.until.Before(wake) {
			wake = p.until
		}
	}
	if t := c.cfg.InactiveThreshold; t > 0 && len(c.pulls) == 0 {
		if now.Sub(c.pulled) >= t {
			c.remove()
			return
		}
		wake = c.pulled.Add(t)
	}
	if c.alarm.IsZero() || wake.Before(c.alarm) {
		c.wake(wake)
	}
}

// wake plans the next look at the consumer.
func (c *consumer) wake(at time.Time) {
	c.alarm = at
	c.st.s.at(at, func() {
		if c.alarm.Equal(at) && c.st.consumer(c.name) == c {
			c.alarm = time.Time{}
			c.pump()
		}
	})
}

// asking is the first pull that somebody still waits for.
func (c *consumer) asking(now time.Time) *pull {
	for len(c.pulls) > 0 {
		p := c.pulls[0]
		switch {
		case p.batch == 0 || len(c.st.s.subscribed(p.inbox)) == 0:
		case !now.Before(p.until):
			c.st.s.status(p.inbox, c.name, "408 Request Timeout", fmt.Sprintf("Nats-Pending-Messages: %d\r\n", p.batch))
		default:
			return p
		}
		c.pulls = c.pulls[1:]
		c.pulled = now
	}
	return nil
}

// choose gives the next message to deliver: again, or for the first time.
func (c *consumer) choose(now time.Time) (*message, *delivery) {
	for _, seq := range slices.Sorted(maps.Keys(c.pending)) {
		d := c.pending[seq]
		i, there := slices.BinarySearchFunc(c.st.msgs, seq, func(m *message, seq uint64) int { return int(m.seq) - int(seq) })
		if !there {
			delete(c.pending, seq) // a newer one of its subject came
			continue
		}
		if !now.Before(d.due) {
			return c.st.msgs[i], d
		}
	}
	for _, m := range c.st.msgs {
		if m.seq >= c.next && match(c.filter, m.tokens) {
			c.next = m.seq + 1
			return m, &delivery{}
		}
	}
	return nil, nil
}

func (c *consumer) deliver(p *pull, m *message, d *delivery, now time.Time) {
	c.seq++
	d.count++
	if c.cfg.AckPolicy != jetstream.AckNonePolicy {
		d.due = now.Add(c.cfg.AckWait)
		c.pending[m.seq] = d
	}
	p.batch--
	p.said = now
	ack := fmt.Sprintf("$JS.ACK.%s.%s.%d.%d.%d.%d.%d", c.st.name, c.name, d.count, m.seq, c.seq, m.at.UnixNano(), c.left())
	for _, to := range c.st.s.subscribed(p.inbox) {
		c.st.s.deliver(to, c.name, &packet{subject: m.subject, reply: ack, header: m.header, data: m.data})
	}
}

// acked takes an acknowledgement: $JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.…
func (s *Server) acked(w []string, word []byte) {
	st := s.stream(w[2])
	if st == nil {
		return
	}
	c := st.consumer(w[3])
	if c == nil || s.chance(s.faults.LostAck) {
		return
	}
	seq, _ := strconv.ParseUint(w[5], 10, 64)
	d := c.pending[seq]
	if d == nil {
		return
	}
	switch text := string(word); {
	case strings.HasPrefix(text, "-NAK"):
		var say struct {
			Delay time.Duration `json:"delay"`
		}
		_ = json.Unmarshal(word[len("-NAK"):], &say)
		d.due = time.Now().Add(say.Delay)
	case text == "+WPI":
		d.due = time.Now().Add(c.cfg.AckWait)
	default:
		delete(c.pending, seq)
		if st.cfg.Retention == jetstream.WorkQueuePolicy {
			for _, m := range st.msgs {
				if m.seq == seq {
					st.drop(m)
					st.note(change{went: m})
					break
				}
			}
		}
	}
	c.pump()
}
