package gateway_test

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

const (
	stdout = schemas.Stdout
	stderr = schemas.Stderr
)

func (a api) log(id schemas.TaskID, query string, extra ...string) string {
	a.Helper()
	r := a.get("/v1/tasks/"+string(id)+"/logs"+query, extra...)
	if r.status != 200 {
		a.Fatalf("logs%s: %d %s", query, r.status, r.body)
	}
	return string(r.body)
}

// lines reads NDJSON.
func (a api) lines(id schemas.TaskID, query string) (lines []schemas.LogLine) {
	a.Helper()
	for text := range strings.Lines(a.log(id, query, "Accept", "application/x-ndjson")) {
		var l schemas.LogLine
		if err := schemas.Decode([]byte(text), &l); err != nil {
			a.Fatalf("%v: %s", err, text)
		}
		lines = append(lines, l)
	}
	return lines
}

// open starts reading a log and gives what comes, until the test ends.
func (a api) open(id schemas.TaskID, query string, extra ...string) *bufio.Reader {
	a.Helper()
	req, _ := http.NewRequestWithContext(deadline(a), "GET", a.url+"/v1/tasks/"+string(id)+"/logs"+query, nil)
	for i := 0; i+1 < len(extra); i += 2 {
		req.Header.Set(extra[i], extra[i+1])
	}
	res, err := a.client.Do(req)
	if err != nil {
		a.Fatal(err)
	}
	a.Cleanup(func() { res.Body.Close() })
	if res.StatusCode != 200 {
		a.Fatalf("logs%s: %d", query, res.StatusCode)
	}
	return bufio.NewReader(res.Body)
}

// expect reads so many bytes and compares.
func expect(t testing.TB, r io.Reader, want string) {
	t.Helper()
	b := make([]byte, len(want))
	n, err := io.ReadFull(r, b)
	if string(b[:n]) != want {
		t.Fatalf("got %q (%v), want %q", b[:n], err, want)
	}
}

func TestLogsOfATaskThatIsOver(t *testing.T) {
	w := newWorld(t, gateway.Config{LogGap: 10 * time.Millisecond})
	id := w.create(spec).ID
	if got := w.log(id, ""); got != "" {
		t.Errorf("a log before the task ran: %q", got)
	}
	w.run(id)
	w.chunk(id, "w1", 1, stdout, 0, "one\ntwo\n")
	w.chunk(id, "w2", 1, stdout, 8, "FORGED\n") // never held it
	w.chunk(id, "w1", 2, stdout, 0, "FORGED\n") // nor this attempt
	w.chunk(id, "w1", 1, stderr, 0, "oh\n")
	w.chunk(id, "w1", 1, stdout, 4, "two\nthree\n") // sent again, with more
	w.chunk(id, "w1", 1, stdout, 0, "one\n")
	w.chunk(id, "w1", 1, stdout, 18, "five\n") // before what comes before it
	w.chunk(id, "w1", 1, stdout, 14, "four")
	w.chunk(id, "w1", 1, stderr, 3, "\xff\xfe")
	bad := schemas.LogSubject("w1", id)
	if _, err := w.conn.Publish(deadline(t), bad, nil, []byte("FORGED")); err != nil {
		t.Fatal(err)
	}
	w.report(id, schemas.PhaseEnded, ended(0, 23, 5))

	all := "one\ntwo\noh\nthree\nfourfive\n\xff\xfe"
	for _, query := range []string{"", "?follow=1", "?attempt=1", "?tail=100", "?since=1h", "?follow&tail=50"} {
		if got := w.log(id, query); got != all {
			t.Errorf("%s: %q, want %q", query, got, all)
		}
	}
	for query, want := range map[string]string{
		"?stream=stdout": "one\ntwo\nthree\nfourfive\n", "?stream=stderr": "oh\n\xff\xfe",
		"?tail=0": "", "?tail=1": "\xff\xfe", "?tail=2": "fourfive\n\xff\xfe", "?tail=2&stream=stdout": "three\nfourfive\n",
		"?since=2999-01-01T00:00:00Z": "", "?since=0s": "",
	} {
		if got := w.log(id, query); got != want {
			t.Errorf("%s: %q, want %q", query, got, want)
		}
	}
	stamped := regexp.MustCompile(`^\d{4}-\S+Z one\n\d{4}-\S+Z two\n\d{4}-\S+Z oh\n\d{4}-\S+Z three\n\d{4}-\S+Z fourfive\n`)
	if got := w.log(id, "?timestamps"); !stamped.MatchString(got) {
		t.Errorf("%q", got)
	}
	lines := w.lines(id, "")
	next := map[schemas.Stream]int64{}
	for _, l := range lines {
		b := []byte(l.Data)
		if l.Base64 != "" {
			b, _ = base64.StdEncoding.DecodeString(l.Base64)
		}
		if l.Attempt != 1 || l.At.IsZero() || l.Offset != next[l.Stream] {
			t.Errorf("line %+v", l)
		}
		next[l.Stream] += int64(len(b))
	}
	if next[stdout] != 23 || next[stderr] != 5 || lines[len(lines)-1].Base64 == "" {
		t.Errorf("%v", lines)
	}
	if r := w.get("/v1/tasks/" + string(id) + "/logs"); r.header.Get("Content-Type") != "text/plain; charset=utf-8" || r.header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("%v", r.header)
	}
}

func TestFollow(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := w.create(spec).ID
	r := w.open(id, "?follow=1") // before anything has happened
	w.run(id)
	w.chunk(id, "w1", 1, stdout, 0, "hello\n")
	expect(t, r, "hello\n")
	late := w.open(id, "?follow=1&tail=0")
	both := w.open(id, "?follow=1&tail=1")
	expect(t, both, "hello\n")
	w.chunk(id, "w2", 7, stdout, 0, "FORGED\n")
	w.chunk(id, "w1", 1, stdout, 10, "after")
	w.chunk(id, "w1", 1, stdout, 6, "gap\n")
	expect(t, r, "gap\nafter")
	w.chunk(id, "w1", 1, stderr, 0, "last\n")
	w.report(id, schemas.PhaseEnded, ended(0, 15, 5))
	for _, r := range []io.Reader{r, both, late} {
		rest, err := io.ReadAll(r)
		if err != nil || !strings.HasSuffix(string(rest), "last\n") {
			t.Errorf("%q %v", rest, err)
		}
	}
}

func TestFollowWaitsForAllBytesOfAFinalTask(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := w.create(spec).ID
	w.run(id)
	w.chunk(id, "w1", 1, stdout, 0, "a")
	r := w.open(id, "?follow=1")
	expect(t, r, "a")
	for i := 1; i < 300; i++ {
		w.chunk(id, "w1", 1, stdout, i, "b")
	}
	w.report(id, schemas.PhaseEnded, ended(0, 300, 0))
	rest, err := io.ReadAll(r)
	if err != nil || len(rest) != 299 {
		t.Errorf("%d bytes, %v", len(rest), err)
	}
	// Bytes that nobody has any more do not hold it open.
	id = w.create(spec).ID
	w.run(id)
	w.chunk(id, "w1", 1, stdout, 5, "kept")
	w.report(id, schemas.PhaseEnded, ended(0, 1000, 0))
	if got := w.log(id, "?follow=1"); got != "kept" {
		t.Errorf("%q", got)
	}
}

func TestFollowGivesUpAGapInTime(t *testing.T) {
	w := newWorld(t, gateway.Config{LogGap: 20 * time.Millisecond})
	id := w.create(spec).ID
	w.run(id)
	r := w.open(id, "?follow=1")
	w.chunk(id, "w1", 1, stdout, 0, "a")
	expect(t, r, "a")
	w.chunk(id, "w1", 1, stdout, 5, "b")
	expect(t, r, "b")
	w.chunk(id, "w1", 1, stdout, 1, "late") // it was given up
	w.chunk(id, "w1", 1, stdout, 6, "c")
	expect(t, r, "c")
}

func TestFollowGoesOnWithTheNextAttempt(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := w.create(spec).ID
	w.run(id)
	w.chunk(id, "w1", 1, stdout, 0, "first\n")
	r := w.open(id, "?follow=1")
	one := w.open(id, "?follow=1&attempt=1")
	expect(t, r, "first\n")
	w.next(id, func(bus.Entry[schemas.Record]) schemas.Event {
		return schemas.Lose{Meta: meta("reaper"), Worker: "w1", Epoch: "e-w1"}
	})
	w.choose(id, "w2")
	w.chunk(id, "w1", 2, stdout, 0, "FORGED\n")
	w.chunk(id, "w2", 2, stdout, 0, "second\n")
	expect(t, r, "second\n")
	if rest, err := io.ReadAll(one); err != nil || string(rest) != "first\n" {
		t.Errorf("one attempt: %q %v", rest, err)
	}
	if got := w.log(id, ""); got != "second\n" {
		t.Errorf("newest: %q", got)
	}
	w.next(id, func(bus.Entry[schemas.Record]) schemas.Event {
		return schemas.Lose{Meta: meta("reaper"), Worker: "w2", Epoch: "e-w2"}
	})
	w.choose(id, "w3")
	if got := w.log(id, ""); got != "second\n" { // the newest has no logs yet
		t.Errorf("newest that has logs: %q", got)
	}
	if got := w.log(id, "?attempt=1"); got != "first\n" {
		t.Errorf("attempt 1: %q", got)
	}
	w.report(id, schemas.PhaseEnded, ended(0, 0, 0))
	if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
		t.Errorf("%q %v", rest, err)
	}
}

// event is one of an SSE stream.
type event struct{ id, name, data string }

func readEvent(t testing.TB, r *bufio.Reader) (e event, comments int) {
	t.Helper()
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		switch key {
		case "id":
			e.id = value
		case "event":
			e.name = value
		case "data":
			e.data = value
		case "":
			if strings.HasPrefix(line, ":") {
				comments++
			} else if e.name != "" {
				return e, comments
			}
		}
	}
}

func TestServerSentEventsResume(t *testing.T) {
	w := newWorld(t, gateway.Config{KeepAlive: 5 * time.Millisecond})
	const sse = "text/event-stream"
	id := w.create(spec).ID
	w.run(id)
	var want []byte
	offset := 0
	say := func(text string) {
		w.chunk(id, "w1", 1, stdout, offset, text)
		offset += len(text)
		want = append(want, text...)
	}
	for i := range 10 {
		say(fmt.Sprintf("line %d\n", i))
	}
	var got []byte
	last := ""
	for len(got) < len(want) { // each connection breaks after three events
		r := w.open(id, "?follow=1", "Accept", sse, "Last-Event-ID", last)
		for range min(3, 10-len(got)/7) {
			e, _ := readEvent(t, r)
			var l schemas.LogLine
			if err := schemas.Decode([]byte(e.data), &l); err != nil || e.name != "log" || l.Offset != int64(len(got)) {
				t.Fatalf("%v %+v", err, e)
			}
			got, last = append(got, l.Data...), e.id
		}
	}
	if string(got) != string(want) {
		t.Errorf("%q", got)
	}
	quiet := w.open(id, "?follow=1&tail=0", "Accept", sse)
	if head, err := quiet.ReadString('\n'); err != nil || head != "retry: 1000\n" {
		t.Errorf("%q %v", head, err)
	}
	for comments := 0; comments < 2; {
		line, err := quiet.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(line, ":") {
			comments++
		}
	}
	say("end\n")
	e, _ := readEvent(t, quiet)
	var l schemas.LogLine
	if err := schemas.Decode([]byte(e.data), &l); err != nil || l.Data != "end\n" {
		t.Errorf("%v %+v", err, e)
	}
	// Going on from there, after a tail: nothing comes twice.
	again := w.open(id, "?follow=1", "Accept", sse, "Last-Event-ID", e.id)
	w.report(id, schemas.PhaseEnded, ended(0, offset, 0))
	for _, r := range []*bufio.Reader{quiet, again} {
		if e, _ := readEvent(t, r); e.name != "end" || e.data != `{"state":"completed"}` {
			t.Errorf("%+v", e)
		}
	}
	if r := w.get("/v1/tasks/"+string(id)+"/logs?follow=1", "Accept", sse, "Last-Event-ID", e.id); r.status != 204 {
		t.Errorf("%d: an EventSource would come back for ever", r.status)
	}
}

func TestFollowOutlivesARestart(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := w.create(spec).ID
	w.run(id)
	w.chunk(id, "w1", 1, stdout, 0, "before\n")
	r := w.open(id, "?follow=1", "Accept", "application/x-ndjson")
	read := func(want string) {
		t.Helper()
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			if line == "\n" {
				continue
			}
			var l schemas.LogLine
			if err := schemas.Decode([]byte(line), &l); err != nil || l.Data != want {
				t.Fatalf("%v %s", err, line)
			}
			return
		}
	}
	read("before\n")
	natstest.Restart(t, w.nats)
	until(t, "the bus is back", func() bool {
		_, err := w.records.Get(deadline(t), string(id))
		return err == nil
	})
	w.chunk(id, "w1", 1, stdout, 0, "before\n") // it cannot know what is safe
	w.chunk(id, "w1", 1, stdout, 7, "after\n")
	read("after\n")
	w.report(id, schemas.PhaseEnded, ended(0, 13, 0))
	if rest, err := io.ReadAll(r); err != nil || strings.Trim(string(rest), "\n") != "" {
		t.Errorf("%q %v", rest, err)
	}
}

func TestTooManyFollowers(t *testing.T) {
	w := newWorld(t, gateway.Config{MaxFollowers: 1})
	id := w.create(spec).ID
	w.run(id)
	w.chunk(id, "w1", 1, stdout, 0, "x")
	expect(t, w.open(id, "?follow=1"), "x")
	r := w.get("/v1/tasks/" + string(id) + "/logs")
	r.want(t, 429, schemas.CodeTooManyRequests)
	if r.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
}

func TestAReaderThatDoesNotReadIsCutOff(t *testing.T) {
	w := newWorld(t, gateway.Config{WriteStall: 50 * time.Millisecond, MaxFollowers: 1})
	id := w.create(spec).ID
	w.run(id)
	block := strings.Repeat("x", 64<<10)
	for i := range 200 { // more than the kernel's buffers take
		w.chunk(id, "w1", 1, stdout, i*len(block), block)
	}
	w.report(id, schemas.PhaseEnded, ended(0, 200*len(block), 0))
	stuck := w.open(id, "?follow=1")
	until(t, "its place is free again", func() bool {
		return w.get("/v1/tasks/"+string(id)+"/logs?tail=1").status == 200
	})
	if _, err := io.Copy(io.Discard, stuck); err == nil {
		t.Error("the answer that was cut off looks whole")
	}
}

func TestALongLogComesWhole(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := w.create(spec).ID
	w.run(id)
	random := rand.New(rand.NewPCG(1, 2))
	var want []byte
	safe := 0
	for len(want) < 5<<20 {
		piece := make([]byte, 1+random.IntN(64<<10))
		for i := range piece {
			piece[i] = "abcdefghijklmnopqrstuvwxyz\n"[random.IntN(27)]
		}
		start := len(want)
		want = append(want, piece...)
		w.chunk(id, "w1", 1, stdout, start, string(piece))
		if random.IntN(10) == 0 { // after a restart of the server
			for at := safe; at < len(want); at += 60 << 10 {
				w.chunk(id, "w1", 1, stdout, at, string(want[at:min(at+60<<10, len(want))]))
			}
			safe = start
		}
	}
	w.report(id, schemas.PhaseEnded, ended(0, len(want), 0))
	if got := w.log(id, ""); got != string(want) {
		t.Errorf("%d bytes, want %d", len(got), len(want))
	}
}
