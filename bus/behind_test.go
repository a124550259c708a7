package bus

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"dayfly.dev/bus/natsd"
)

// lagging plays the leader of a bucket with one key, whose newest revision a replica has
// and the leader takes only after some more requests.
type lagging struct {
	mu       sync.Mutex
	last     uint64 // of the stream
	revision uint64 // of the key; 0: there is none
	value    string
	next     func() // takes what is on its way
	after    int    // so many requests
	asked    []string
}

func (l *lagging) answer(kind string, m *nats.Msg) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.after--; l.after == 0 {
		l.next()
	}
	l.asked = append(l.asked, kind)
	refuse := func(code, errCode int) any {
		return map[string]any{"error": map[string]any{"code": code, "err_code": errCode}}
	}
	var body any
	switch expect, _ := strconv.ParseUint(m.Header.Get(jetstream.ExpectedLastSubjSeqHeader), 10, 64); {
	case kind == "info":
		body = map[string]any{"config": map[string]any{"name": "KV_b"}, "state": map[string]any{"last_seq": l.last}}
	case kind == "read" && l.revision == 0:
		body = refuse(404, codeNoMessageFound)
	case kind == "read":
		body = map[string]any{"message": map[string]any{"seq": l.revision, "data": []byte(l.value)}}
	case expect != l.revision:
		body = refuse(400, codeWrongLastSequence)
	default:
		l.last++
		l.revision, l.value = l.last, string(m.Data)
		body = map[string]any{"stream": "KV_b", "seq": l.last}
	}
	b, _ := json.Marshal(body)
	_ = m.Respond(b)
}

// clustered connects to a server of a cluster and lets l answer in its place.
func clustered(t *testing.T, l *lagging) *Conn {
	t.Helper()
	route, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	route.Close()
	s, err := natsd.Start(t.Context(), natsd.Config{Name: "n1", Dir: t.TempDir(), Port: -1, CorePassword: "p", Logger: zerolog.Nop(),
		Cluster: &natsd.Cluster{Name: "c", Port: -1, Routes: []string{route.Addr().String()}, Secret: "s"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	c, err := Connect(t.Context(), Config{URL: s.URL(), User: natsd.CoreUser, Password: "p", Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	c.apiPrefix = "leader."
	c.JS, err = jetstream.NewWithAPIPrefix(c.NC, "leader")
	if err != nil {
		t.Fatal(err)
	}
	for subject, kind := range map[string]string{"leader.STREAM.INFO.KV_b": "info", "leader.STREAM.MSG.GET.KV_b": "read", "$KV.b.k": "write"} {
		if _, err := c.NC.Subscribe(subject, func(m *nats.Msg) { l.answer(kind, m) }); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// A replica may be ahead of the leader: what a view has shown can be written although
// the leader does not know it yet, and is not taken for gone or for changed.
func TestAWriteWaitsForALeaderThatIsBehindTheView(t *testing.T) {
	codec := Codec[string]{
		Encode: func(s string) ([]byte, nats.Header, error) { return []byte(s), nil, nil },
		Decode: func(b []byte) (string, error) { return string(b), nil },
	}
	for name, old := range map[string]uint64{"it has an older revision": 3, "it has none": 0} {
		for _, after := range []int{1, 2, 3, 4, 5, 6, 7, 8, 40} {
			t.Run(fmt.Sprint(name, " for ", after), func(t *testing.T) {
				l := &lagging{last: 6, revision: old, value: "old", after: after}
				l.next = func() { l.last, l.revision, l.value = 7, 7, "shown" }
				table := NewTable(clustered(t, l), "b", codec)
				var read []string
				e, err := table.UpdateFrom(t.Context(), Entry[string]{Key: "k", Value: "shown", Revision: 7}, "", func(e Entry[string]) (string, []WriteOption, error) {
					read = append(read, e.Value)
					return e.Value + " and more", nil, nil
				})
				if err != nil || e.Value != "shown and more" || e.Revision != 8 || len(read) > 2 || strings.Contains(strings.Join(read, " "), "old") {
					t.Errorf("%+v, %v; it was made of %q; the leader was asked for %v", e, err, read, l.asked)
				}
			})
		}
	}
	t.Run("it is really gone", func(t *testing.T) {
		table := NewTable(clustered(t, &lagging{last: 9}), "b", codec)
		_, err := table.UpdateFrom(t.Context(), Entry[string]{Key: "k", Value: "shown", Revision: 7}, "", func(e Entry[string]) (string, []WriteOption, error) { return e.Value, nil, nil })
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v", err)
		}
	})
}
