package natssim

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

type message struct {
	seq          uint64
	subject      string
	tokens       []string
	header, data []byte
	at           time.Time
}

type stream struct {
	s         *Server
	name      string
	cfg       jetstream.StreamConfig
	patterns  [][]string
	created   time.Time
	msgs      []*message // by sequence
	last      uint64
	consumers []*consumer
	recent    []change // of a stream that does not wait for the disk: what a crash may undo
}

// change is a message that came or went.
type change struct {
	at         time.Time
	came, went *message
}

// unsynced is how long a stream that does not wait for the disk may forget a change.
const unsynced = 8 * time.Millisecond

func (s *Server) streamFor(subject string) *stream {
	tokens := strings.Split(subject, ".")
	for _, st := range s.streams {
		for _, p := range st.patterns {
			if match(p, tokens) {
				return st
			}
		}
	}
	return nil
}

func (s *Server) stream(name string) *stream {
	for _, st := range s.streams {
		if st.name == name {
			return st
		}
	}
	return nil
}

func (st *stream) configure(cfg jetstream.StreamConfig) {
	st.cfg, st.patterns = cfg, nil
	for _, subject := range cfg.Subjects {
		st.patterns = append(st.patterns, strings.Split(subject, "."))
	}
}

// lastOf is the newest message that a filter lets through.
func (st *stream) lastOf(filter []string) *message {
	for _, m := range slices.Backward(st.msgs) {
		if match(filter, m.tokens) {
			return m
		}
	}
	return nil
}

func (st *stream) note(c change) {
	if st.cfg.PersistMode != jetstream.AsyncPersistMode {
		return
	}
	now := time.Now()
	c.at = now
	for len(st.recent) > 0 && now.Sub(st.recent[0].at) > unsynced {
		st.recent = st.recent[1:]
	}
	st.recent = append(st.recent, c)
}

// crash makes of the stream what a restarted server finds.
func (st *stream) crash() {
	since := time.Now().Add(-time.Duration(st.s.rng.Int64N(int64(unsynced))))
	for _, c := range slices.Backward(st.recent) {
		if !c.at.After(since) {
			break
		}
		if c.came != nil {
			st.drop(c.came)
			st.last = c.came.seq - 1
		}
		if c.went != nil {
			i, _ := slices.BinarySearchFunc(st.msgs, c.went.seq, func(m *message, seq uint64) int { return int(m.seq) - int(seq) })
			st.msgs = slices.Insert(st.msgs, i, c.went)
		}
	}
	st.recent = nil
	for _, c := range slices.Clone(st.consumers) {
		c.crash()
	}
}

func (st *stream) drop(m *message) {
	if i := slices.Index(st.msgs, m); i >= 0 {
		st.msgs = slices.Delete(st.msgs, i, i+1)
	}
}

// wrongSequence is the error of a lost compare-and-set.
func wrongSequence(seq uint64) *jetstream.APIError {
	return apiError(400, 10071, fmt.Sprintf("wrong last sequence: %d", seq))
}

// store takes a message and gives its sequence.
func (st *stream) store(p *packet) (uint64, *jetstream.APIError) {
	tokens := strings.Split(p.subject, ".")
	guarded := bytes.Contains(p.header, []byte(jetstream.ExpectedLastSubjSeqHeader))
	old := st.lastOf(tokens)
	if guarded {
		h, err := nats.DecodeHeadersMsg(p.header)
		if err != nil {
			return 0, &jetstream.APIError{Code: 400, Description: err.Error()}
		}
		var is uint64
		if old != nil {
			is = old.seq
		}
		if want, _ := strconv.ParseUint(h.Get(jetstream.ExpectedLastSubjSeqHeader), 10, 64); want != is {
			return 0, wrongSequence(is)
		}
		if st.s.chance(st.s.faults.Spurious) {
			return 0, apiError(400, 10164, "expected last sequence not yet confirmed")
		}
	}
	st.last++
	m := &message{seq: st.last, subject: p.subject, tokens: tokens, header: p.header, data: p.data, at: time.Now().UTC()}
	c := change{came: m}
	if st.cfg.MaxMsgsPerSubject == 1 && old != nil {
		st.drop(old)
		c.went = old
	}
	st.msgs = append(st.msgs, m)
	st.note(c)
	if st.s.stored != nil {
		st.s.stored(Stored{Subject: m.subject, Sequence: m.seq, Data: m.data, Guarded: guarded})
	}
	for _, c := range slices.Clone(st.consumers) {
		c.pump()
	}
	return m.seq, nil
}

// take does what a message that has reached the server asks.
func (s *Server) take(m *packet, st *stream) {
	switch rest, api := strings.CutPrefix(m.subject, "$JS.API."); {
	case st != nil:
		seq, err := st.store(m)
		if m.reply == "" || s.chance(s.faults.LostAnswer) {
			return
		}
		if err != nil {
			s.refuse(m, st.name, err)
			return
		}
		s.reply(m, st.name, fmt.Appendf(nil, `{"stream":%q,"seq":%d}`, st.name, seq))
	case api:
		s.api(m, rest)
	case strings.HasPrefix(m.subject, "$JS.ACK."):
		s.acked(strings.Split(m.subject, "."), m.data)
	default:
		list := s.subscribed(m.subject)
		for _, to := range list {
			s.deliver(to, "core", m)
		}
		if len(list) == 0 && m.reply != "" {
			s.status(m.reply, "core", "503")
		}
	}
}

// status sends a message that is only a status and headers.
func (s *Server) status(subject, source, status string, headers ...string) (heard bool) {
	for _, to := range s.subscribed(subject) {
		s.deliver(to, source, &packet{subject: subject, header: []byte("NATS/1.0 " + status + "\r\n" + strings.Join(headers, "") + "\r\n")})
		heard = true
	}
	return heard
}

func (s *Server) answer(m *packet, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	s.reply(m, "api", body)
}

// reply answers with a body. Those that are sent often are not made by reflection.
func (s *Server) reply(m *packet, source string, body []byte) {
	for _, to := range s.subscribed(m.reply) {
		s.deliver(to, source, &packet{subject: m.reply, data: body})
	}
}

func (s *Server) refuse(m *packet, source string, err *jetstream.APIError) {
	s.reply(m, source, fmt.Appendf(nil, `{"error":{"code":%d,"err_code":%d,"description":%q}}`, err.Code, err.ErrorCode, err.Description))
}

func apiError(code int, number jetstream.ErrorCode, what string) *jetstream.APIError {
	return &jetstream.APIError{Code: code, ErrorCode: number, Description: what}
}

// api answers a request to JetStream.
func (s *Server) api(m *packet, subject string) {
	w := strings.Split(subject, ".")
	if w[0] == "DIRECT" {
		s.directGet(m, w[2], w[3:])
		return
	}
	verb, name := w[0]+" "+w[1], w[2]
	if w[1] == "MSG" {
		verb, name = verb+" "+w[2], w[3]
	}
	st := s.stream(name)
	switch verb {
	case "STREAM CREATE", "STREAM UPDATE":
		var cfg jetstream.StreamConfig
		if err := json.Unmarshal(m.data, &cfg); err != nil {
			s.refuse(m, "api", apiError(400, 10025, err.Error()))
			return
		}
		if st == nil {
			st = &stream{s: s, name: name, created: time.Now().UTC()}
			s.streams = append(s.streams, st)
		}
		st.configure(cfg)
		s.answer(m, st.info(nil))
		return
	}
	if st == nil {
		s.refuse(m, "api", apiError(404, 10059, "stream not found"))
		return
	}
	switch verb {
	case "STREAM INFO":
		var ask struct {
			Filter string `json:"subjects_filter"`
		}
		_ = json.Unmarshal(m.data, &ask)
		var filter []string
		if ask.Filter != "" {
			filter = strings.Split(ask.Filter, ".")
		}
		s.answer(m, st.info(filter))
	case "STREAM MSG GET":
		var ask struct {
			Last string `json:"last_by_subj"`
		}
		_ = json.Unmarshal(m.data, &ask)
		found := st.lastOf(strings.Split(ask.Last, "."))
		if found == nil {
			s.refuse(m, "api", apiError(404, 10037, "no message found"))
			return
		}
		body := fmt.Appendf(nil, `{"message":{"subject":%q,"seq":%d,"time":%q,"hdrs":"`, found.subject, found.seq, found.at.Format(time.RFC3339Nano))
		body = append(base64.StdEncoding.AppendEncode(body, found.header), `","data":"`...)
		body = append(base64.StdEncoding.AppendEncode(body, found.data), `"}}`...)
		s.reply(m, "api", body)
	case "CONSUMER CREATE":
		s.createConsumer(m, st)
	default:
		s.consumerAPI(m, st, verb, w[len(w)-1])
	}
}

func (st *stream) info(filter []string) any {
	subjects := map[string]uint64{}
	listed := map[string]uint64{}
	for _, m := range st.msgs {
		subjects[m.subject]++
		if filter != nil && match(filter, m.tokens) {
			listed[m.subject]++
		}
	}
	info := jetstream.StreamInfo{Config: st.cfg, Created: st.created, State: jetstream.StreamState{
		Msgs: uint64(len(st.msgs)), LastSeq: st.last, NumSubjects: uint64(len(subjects)), Consumers: len(st.consumers), Subjects: listed}}
	if len(st.msgs) > 0 {
		info.State.FirstSeq = st.msgs[0].seq
	}
	return struct {
		jetstream.StreamInfo
		Total int `json:"total"`
	}{info, len(listed)}
}

func (s *Server) directGet(m *packet, name string, subject []string) {
	st := s.stream(name)
	var found *message
	if st != nil {
		found = st.lastOf(subject)
	}
	if found == nil {
		s.status(m.reply, "api", "404 Message Not Found")
		return
	}
	header := []byte("NATS/1.0\r\n")
	if len(found.header) > 0 {
		header = bytes.TrimSuffix(bytes.Clone(found.header), []byte("\r\n"))
	}
	header = fmt.Appendf(header, "Nats-Stream: %s\r\nNats-Subject: %s\r\nNats-Sequence: %d\r\nNats-Time-Stamp: %s\r\n\r\n",
		name, found.subject, found.seq, found.at.Format(time.RFC3339Nano))
	for _, to := range s.subscribed(m.reply) {
		s.deliver(to, "api", &packet{subject: m.reply, header: header, data: found.data})
	}
}
