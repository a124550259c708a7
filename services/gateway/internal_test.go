package gateway

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/ops"
	"dayfly.dev/schemas"
)

func TestAPanicIsAnAnswerWithoutItsValue(t *testing.T) {
	var log bytes.Buffer
	g := &Gateway{log: zerolog.New(&log), metrics: newMetrics(nil, nil, nil), hosts: ops.NewHosts(nil)}
	h := g.guard(g.route("/x", methods{"GET": {handle: func(*Gateway, *response, *http.Request) error { panic("hunter2") }}}))
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest("GET", "http://localhost/x", nil))
	if rec.Code != 500 || !strings.Contains(rec.Body.String(), `"internal"`) || strings.Contains(rec.Body.String(), "goroutine") {
		t.Errorf("%d %s", rec.Code, rec.Body)
	}
	if !strings.Contains(log.String(), "panicked") || !strings.Contains(log.String(), rec.Header().Get("X-Request-Id")) {
		t.Errorf("log %s", &log)
	}
	if strings.Contains(rec.Body.String()+log.String(), "hunter2") {
		t.Error("the value of the panic is shown")
	}
}

func TestSequencerGivesEachByteOnceAndInOrder(t *testing.T) {
	for seed := range uint64(200) {
		random := rand.New(rand.NewPCG(seed, 1))
		want := map[lane][]byte{}
		var pieces []piece
		for _, k := range []lane{{1, schemas.Stdout}, {1, schemas.Stderr}, {2, schemas.Stdout}} {
			text := make([]byte, 200+random.IntN(200))
			for i := range text {
				text[i] = byte(random.IntN(256))
			}
			want[k] = text
			for at := 0; at < len(text); { // covers all, with overlaps
				n := min(1+random.IntN(40), len(text)-at)
				back := random.IntN(at + 1)
				pieces = append(pieces, piece{lane: k, offset: int64(at), data: text[at : at+n]},
					piece{lane: k, offset: int64(back), data: text[back : back+random.IntN(len(text)-back)+1]})
				at += n
			}
		}
		random.Shuffle(len(pieces), func(i, j int) { pieces[i], pieces[j] = pieces[j], pieces[i] })
		var s sequencer
		got := map[lane][]byte{}
		for _, p := range pieces {
			for _, out := range s.take(p) {
				if out.offset != int64(len(got[out.lane])) {
					t.Fatalf("seed %d: offset %d, want %d", seed, out.offset, len(got[out.lane]))
				}
				got[out.lane] = append(got[out.lane], out.data...)
			}
		}
		if len(s.held) > 0 || s.size != 0 {
			t.Fatalf("seed %d: %d held", seed, len(s.held))
		}
		for k := range want {
			if !bytes.Equal(got[k], want[k]) {
				t.Fatalf("seed %d: %v differs", seed, k)
			}
		}
	}
}

func TestSequencerHoldsNoMoreThanItMay(t *testing.T) {
	var s sequencer
	block := make([]byte, 64<<10)
	given := 0
	for i := range int64(100) {
		for _, p := range s.take(piece{offset: 1 + i*int64(len(block)), data: block}) {
			given += len(p.data)
		}
		if s.size > maxHeld {
			t.Fatal(s.size)
		}
	}
	if given != 100*len(block) {
		t.Errorf("%d bytes", given)
	}
	for i := range int64(4 * maxHeldPieces) { // single bytes, none beside the one before
		s.take(piece{offset: 1<<30 + 2*i, data: block[:1]})
		if n := len(s.held); n > maxHeldPieces {
			t.Fatalf("%d pieces", n)
		}
	}
}

// A chunk comes from a worker, which may say anything.
func TestAChunkThatNobodyCouldShowIsNone(t *testing.T) {
	stored := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	chunk := func(at string, size int) bus.Msg {
		return bus.Msg{Subject: schemas.LogSubject("w1", "t-01jd0000000000000000000000"), Time: stored, Data: make([]byte, size), Header: nats.Header{
			schemas.HeaderAttempt: {"1"}, schemas.HeaderStream: {"stdout"}, schemas.HeaderOffset: {"0"}, schemas.HeaderTime: {at}}}
	}
	for _, at := range []string{"9999-12-31T23:59:59-23:00", "0000-01-01T00:00:00+23:00", "yesterday"} {
		p, _, ok := parseChunk(chunk(at, 1))
		if !ok || !p.at.Equal(stored) {
			t.Errorf("%s: ok %v, at %s", at, ok, p.at)
		}
		if _, err := schemas.Encode(schemas.LogLine{At: p.at}); err != nil {
			t.Error(at, err)
		}
	}
	for size, want := range map[int]bool{0: false, 1: true, schemas.MaxLogChunk: true, schemas.MaxLogChunk + 1: false} {
		if _, _, ok := parseChunk(chunk("2026-03-01T11:59:59Z", size)); ok != want {
			t.Errorf("%d bytes: ok %v", size, ok)
		}
	}
}

func TestTailKeepsTheLastLines(t *testing.T) {
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 2))
		var all []byte
		keep := &tail{lines: random.IntN(6)}
		for range random.IntN(20) {
			data := make([]byte, 1+random.IntN(10))
			for i := range data {
				data[i] = "ab\n"[random.IntN(3)]
			}
			all = append(all, data...)
			keep.add(piece{offset: int64(len(all) - len(data)), data: slices.Clone(data)})
		}
		lines := slices.Collect(bytes.Lines(all))
		want := bytes.Join(lines[max(0, len(lines)-keep.lines):], nil)
		var got []byte
		for _, p := range keep.pieces {
			if !bytes.HasPrefix(all[p.offset:], p.data) {
				t.Fatalf("seed %d: offset", seed)
			}
			got = append(got, p.data...)
		}
		if !bytes.Equal(got, want) || keep.size != len(got) || keep.breaks != bytes.Count(got, newline) {
			t.Fatalf("seed %d: %q, want %q", seed, got, want)
		}
	}
	long := &tail{lines: 3}
	for range 100 {
		long.add(piece{data: make([]byte, 64<<10)})
	}
	if long.size != maxTail {
		t.Error(long.size)
	}
	bytewise := &tail{lines: 3}
	for range 2 * maxTailPieces {
		bytewise.add(piece{data: []byte("x")})
	}
	if n := len(bytewise.pieces); n != maxTailPieces || bytewise.size != n {
		t.Errorf("%d pieces, %d bytes", n, bytewise.size)
	}
}

func TestIndexKeepsIdsInOrder(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 3))
	var x index
	set := map[string]bool{}
	for i := range 20_000 {
		id := fmt.Sprintf("t-%08d", i+random.IntN(50))
		if random.IntN(4) == 0 {
			id = fmt.Sprintf("t-%08d", random.IntN(i+1))
			x.remove(id)
			delete(set, id)
			continue
		}
		x.add(id)
		set[id] = true
	}
	want := make([]string, 0, len(set))
	for id := range set {
		want = append(want, id)
	}
	slices.Sort(want)
	slices.Reverse(want)
	var got []string
	for after := ""; ; {
		ids := x.before(after, 1+random.IntN(700))
		if len(ids) == 0 {
			break
		}
		got, after = append(got, ids...), ids[len(ids)-1]
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d ids, want %d", len(got), len(want))
	}
	for _, id := range want {
		x.remove(id)
	}
	if len(x.blocks) != 0 || x.before("", 5) != nil {
		t.Error("not empty")
	}
}

// finalRecord is a usual task at its end.
func finalRecord(t testing.TB, i int) record {
	t.Helper()
	spec, err := schemas.ParseSpec([]byte(`{"image":"registry.lan/judge:py","command":["python","main.py"],"labels":{"owner":"someone","challenge":"first"},
		"files":[{"path":"main.py","content":"print('hello, world')"}],"env":{"LANG":"C.UTF-8"}}`), schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	m := schemas.Meta{At: now, By: "test", Op: "abcdefghijklmnopqrst"}
	r := schemas.NewRecord(schemas.TaskID(fmt.Sprintf("t-01jd%022d", i)), spec, schemas.DefaultPolicy(), m)
	for _, event := range []schemas.Event{
		schemas.Choose{Meta: m, Worker: "w1", Epoch: "epoch1"},
		schemas.Settle{Meta: m, Report: schemas.Report{Assignment: schemas.Assignment{Task: r.ID, Attempt: 1, Worker: "w1", Epoch: "epoch1"}, Phase: schemas.PhaseEnded,
			Ran: true, End: &schemas.End{By: schemas.EndedItself, Exit: &schemas.Exit{}, Stdout: strings.Repeat("hello, world\n", 40), Logs: schemas.LogSum{StdoutBytes: 520}}}},
	} {
		if r, err = schemas.Next(r, event); err != nil {
			t.Fatal(err)
		}
	}
	sealed, err := sealRecord(r)
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

func TestRecentBoundsItsBytes(t *testing.T) {
	c := newRecent(100_000)
	var items []*item
	for i := range 1000 {
		r := finalRecord(t, i)
		queued, final := newItem(of(schemas.Queued), r.raw), newItem(of(schemas.Completed), r.raw)
		c.changed(nil, queued)
		c.changed(queued, final)
		items = append(items, final)
		if c.bytes > c.limit+len(r.raw) {
			t.Fatal(c.bytes)
		}
	}
	if _, ok := items[999].whole(); !ok {
		t.Error("the newest is not whole")
	}
	if _, ok := items[0].whole(); ok {
		t.Error("the oldest is whole")
	}
	short, long := items[0].body.Load().raw, items[999].body.Load().raw
	t.Logf("a record of %d bytes takes %d when short", len(long), len(short))
	r, err := items[0].body.Load().listed()
	if err != nil || r.Spec.Labels["owner"] != "someone" || r.Exit == nil || r.Stdout != "" || r.Spec.Files != nil {
		t.Errorf("%v %+v", err, r)
	}
	for _, it := range items {
		c.changed(it, nil)
	}
	if c.bytes != 0 || c.live != 0 {
		t.Errorf("%d bytes of %d items are left", c.bytes, c.live)
	}
	// What comes and goes leaves nothing behind.
	c = newRecent(1 << 30)
	for range 100_000 {
		it := newItem(of(schemas.Queued), []byte("x"))
		c.changed(nil, it)
		c.changed(it, nil)
	}
	if len(c.items) > 2000 {
		t.Errorf("%d items", len(c.items))
	}
}

// BenchmarkMemoryOfFinalTasks tells what a final task costs the view.
func BenchmarkMemoryOfFinalTasks(b *testing.B) {
	raw := finalRecord(b, 1).raw
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	c := newRecent(1)
	view := map[string]*item{}
	var x index
	n := max(b.N, 1000)
	for i := range n {
		key := fmt.Sprintf("$KV.tasks.t-01jd%022d", i)[len("$KV.tasks."):]
		it := newItem(of(schemas.Completed), bytes.Clone(raw))
		c.changed(nil, it)
		view[key] = it
		x.add(key)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n), "bytes/task")
	runtime.KeepAlive(view)
	runtime.KeepAlive(c)
	runtime.KeepAlive(&x)
}

// A record that changes while others are read comes twice.
func TestARecordThatComesTwiceTellsItsEventsOnce(t *testing.T) {
	const id = "t-01jd0000000000000000000000"
	at := func(by string, on uint64) schemas.Meta { return schemas.Meta{At: time.Now(), By: by, Op: by, On: on} }
	rec := schemas.NewRecord(id, schemas.Spec{Image: "busybox"}, schemas.DefaultPolicy(), at("gateway", 0))
	for _, window := range []int{100, 2} {
		e := &eventReader{g: &Gateway{cfg: Config{EventWindow: window}}}
		read := func(r schemas.Record, revision uint64) {
			t.Helper()
			data, err := schemas.Encode(r)
			if err == nil {
				err = e.take(bus.Msg{Sequence: revision, Data: data})
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		next := func(r schemas.Record, event schemas.Event) schemas.Record {
			t.Helper()
			r, err := schemas.Next(r, event)
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		assigned := next(rec, schemas.Choose{Meta: at("placer", 1), Worker: "w1", Epoch: "e1"})
		ended := next(assigned, schemas.Settle{Meta: at("reaper", 2), Report: schemas.Report{Assignment: assigned.Assignment(), Phase: schemas.PhaseEnded, Ran: true,
			End: &schemas.End{By: schemas.EndedItself, Exit: &schemas.Exit{}}}})
		read(rec, 1)
		read(assigned, 2)
		read(ended, 4)
		e.sort()
		var got []uint64
		for _, v := range e.held {
			got = append(got, v.ID)
		}
		want := []uint64{1, 2}
		for range len(ended.History) - 2 {
			want = append(want, 4)
		}
		if window == 2 && e.cut != 0 {
			want = slices.DeleteFunc(want, func(id uint64) bool { return id >= e.cut })
		}
		if !slices.Equal(got, want) || len(want) < 2 {
			t.Errorf("window %d: %v, want %v", window, got, want)
		}
	}
}

// of is the header of a record in a state.
func of(s schemas.State) nats.Header { return nats.Header{schemas.HeaderState: {string(s)}} }

// The server forgets a record that has changed before it counts the new revision: for a
// moment nothing more is there, and what the old revision told is nowhere that was read.
func TestWhatWentWhileOthersWereReadIsToldInItsPlace(t *testing.T) {
	at := func(by string, on uint64) schemas.Meta { return schemas.Meta{At: time.Now(), By: by, Op: by, On: on} }
	accepted := func(n int) schemas.Record {
		id := schemas.TaskID(fmt.Sprintf("t-01jd%022d", n))
		return schemas.NewRecord(id, schemas.Spec{Image: "busybox"}, schemas.DefaultPolicy(), at("gateway", 0))
	}
	changed, err := schemas.Next(accepted(1), schemas.Choose{Meta: at("placer", 10), Worker: "w1", Epoch: "e1"})
	if err != nil {
		t.Fatal(err)
	}
	answer := httptest.NewRecorder()
	last := uint64(12)
	g := &Gateway{cfg: Config{EventWindow: 100, WriteStall: time.Minute}, newest: newest{look: func() (uint64, error) { return last, nil }}}
	e := &eventReader{g: g, out: g.newStream(&response{ResponseWriter: answer}, formatJSON), given: 9, next: 10}
	read := func(r schemas.Record, revision uint64, want bool) {
		t.Helper()
		data, err := schemas.Encode(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := e.take(bus.Msg{Sequence: revision, Data: data}); err != nil {
			t.Fatal(err)
		}
		if sure, err := e.complete(t.Context()); sure != want || err != nil {
			t.Fatalf("after %d: sure %v, error %v", revision, sure, err)
		}
	}
	read(accepted(2), 11, false) // 10 is gone, and 12 did not come yet
	if answer.Body.Len() > 0 {
		t.Errorf("given too soon: %s", answer.Body)
	}
	last = 13
	read(changed, 12, false) // who is behind is given what is known
	last = 13
	read(accepted(3), 13, true)
	var got []uint64
	for line := range strings.Lines(answer.Body.String()) {
		var v schemas.TaskEvent
		if err := schemas.Decode([]byte(line), &v); err != nil {
			t.Fatal(err)
		}
		got = append(got, v.ID)
	}
	if !slices.Equal(got, []uint64{10, 11, 12, 13}) || e.given != 13 {
		t.Errorf("%v, given %d", got, e.given)
	}
}
