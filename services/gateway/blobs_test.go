package gateway_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

// someBlob is bytes without a pattern, and their name.
func someBlob(seed byte, n int) ([]byte, schemas.BlobID) {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b, schemas.BlobIDOf(sha256.Sum256(b))
}

func (a api) put(id schemas.BlobID, body io.Reader, extra ...string) reply {
	a.Helper()
	req, err := http.NewRequest("PUT", a.url+"/v1/blobs/"+string(id), body)
	if err != nil {
		a.Fatal(err)
	}
	for i := 0; i+1 < len(extra); i += 2 {
		req.Header.Set(extra[i], extra[i+1])
	}
	res, err := a.client.Do(req)
	if err != nil {
		a.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		a.Fatal(err)
	}
	return reply{res.StatusCode, res.Header, b}
}

// blobMessages says how many messages the store of blobs has.
func (w *world) blobMessages() int {
	w.Helper()
	all, err := w.conn.Subjects(deadline(w), schemas.StreamBlobs, schemas.BlobSubject(">"))
	if err != nil {
		w.Fatal(err)
	}
	return len(all)
}

func TestABlobIsStoredOnceAndComesBack(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	for _, n := range []int{0, 1, schemas.BlobChunk, 3*schemas.BlobChunk + 7} {
		b, id := someBlob(1, n)
		if r := w.get("/v1/blobs/" + string(id)); r.status != 404 {
			t.Fatalf("%d before it is there: %s", r.status, r.body)
		}
		r := w.put(id, bytes.NewReader(b))
		var info schemas.BlobInfo
		if err := schemas.Decode(r.body, &info); err != nil || r.status != 201 || info.Blob != id || int(info.Size) != n || r.header.Get("Location") != "/v1/blobs/"+string(id) {
			t.Fatalf("%d bytes: %d %v %s", n, r.status, err, r.body)
		}
		messages := w.blobMessages()
		// A name without its prefix is as good; nobody's bytes are read for what is there.
		if r := w.put(schemas.BlobID(id.Hex()), io.MultiReader(strings.NewReader("something else"))); r.status != 200 || w.blobMessages() != messages {
			t.Fatalf("again: %d %s", r.status, r.body)
		}
		got := w.get("/v1/blobs/" + string(id))
		if got.status != 200 || !bytes.Equal(got.body, b) || got.header.Get("Content-Type") != "application/octet-stream" || got.header.Get("ETag") == "" {
			t.Fatalf("%d bytes: %d, %d bytes came", n, got.status, len(got.body))
		}
		if r := w.do("HEAD", "/v1/blobs/"+string(id), ""); r.status != 200 || r.header.Get("Content-Length") != strconv.Itoa(n) {
			t.Fatalf("HEAD: %d %v", r.status, r.header)
		}
		if r := w.get("/v1/blobs/"+string(id), "If-None-Match", got.header.Get("ETag")); r.status != 304 {
			t.Errorf("If-None-Match: %d", r.status)
		}
	}
}

func TestPartsOfABlob(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	b, id := someBlob(1, 3*schemas.BlobChunk+7)
	if r := w.put(id, bytes.NewReader(b)); r.status != 201 {
		t.Fatal(r.status)
	}
	for want, part := range map[string][2]int{
		"bytes=0-9": {0, 10}, "bytes=-5": {len(b) - 5, len(b)}, "bytes=786432-": {3 * schemas.BlobChunk, len(b)},
		fmt.Sprintf("bytes=%d-%d", schemas.BlobChunk-3, 2*schemas.BlobChunk+3): {schemas.BlobChunk - 3, 2*schemas.BlobChunk + 4},
	} {
		r := w.get("/v1/blobs/"+string(id), "Range", want)
		if r.status != 206 || !bytes.Equal(r.body, b[part[0]:part[1]]) {
			t.Errorf("%s: %d, %d bytes", want, r.status, len(r.body))
		}
	}
	if r := w.get("/v1/blobs/"+string(id), "Range", "bytes=9999999-"); r.status != 416 {
		t.Errorf("behind the end: %d", r.status)
	}
	if r := w.get("/v1/blobs/"+string(id), "Range", "bytes=0-1,5-6"); r.status != 206 || !bytes.Contains(r.body, b[5:7]) {
		t.Errorf("two parts: %d", r.status)
	}
}

// What is not what its name says, or not whole, or too much, leaves nothing behind.
func TestBadBlobsLeaveNothing(t *testing.T) {
	w := newWorld(t, gateway.Config{BlobMaxSize: 2 * schemas.BlobChunk, BlobBytes: 5 * schemas.BlobChunk})
	b, id := someBlob(1, schemas.BlobChunk+9)
	other, _ := someBlob(2, schemas.BlobChunk+9)
	w.put(id, bytes.NewReader(other)).want(t, 422, schemas.CodeDigestMismatch)
	w.put(id, io.MultiReader(bytes.NewReader(b[1:]))).want(t, 422, schemas.CodeDigestMismatch)
	large, largeID := someBlob(3, 2*schemas.BlobChunk+1)
	w.put(largeID, bytes.NewReader(large)).want(t, 413, schemas.CodeTooLarge)
	w.put(largeID, io.MultiReader(bytes.NewReader(large))).want(t, 413, schemas.CodeTooLarge)
	w.put("sha256:xyz", bytes.NewReader(b)).want(t, 422, schemas.CodeInvalidValue)
	w.put(id, bytes.NewReader(b), "Content-Encoding", "gzip").want(t, 415, schemas.CodeContentType)
	w.get("/v1/blobs/abc").want(t, 422, schemas.CodeInvalidValue)

	// Shorter than announced, and one that stops coming.
	hasty := newAPI(t, natstest.Connect(t, w.nats), gateway.Config{WriteStall: 300 * time.Millisecond})
	for _, leave := range []bool{true, false} {
		c, err := net.Dial("tcp", strings.TrimPrefix(hasty.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "PUT /v1/blobs/%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n", id, len(b))
		_, _ = c.Write(b[:len(b)/2])
		if leave {
			_ = c.(*net.TCPConn).CloseWrite()
		}
		answer, _ := io.ReadAll(c)
		c.Close()
		if !strings.Contains(string(answer), `"code":"cut_off"`) && !leave {
			t.Errorf("%s", answer)
		}
	}
	until(t, "nothing is left of them", func() bool { return w.blobMessages() == 0 })

	for seed := byte(10); ; seed++ {
		b, id := someBlob(seed, 2*schemas.BlobChunk)
		r := w.put(id, bytes.NewReader(b))
		if r.status == 201 {
			continue
		}
		if e := r.want(t, 507, schemas.CodeNoSpace); seed != 12 || e.RetryAfter == 0 || !strings.Contains(e.Detail, "1.25MiB") {
			t.Errorf("blob %d: %+v", seed, e)
		}
		break
	}
}

// A client that waits for 100 Continue sends nothing that is not wanted.
func TestABlobThatIsThereIsNotSent(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	b, id := someBlob(1, 100_000)
	for i, want := range []string{"100 Continue", "200 OK"} {
		c, err := net.Dial("tcp", strings.TrimPrefix(w.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprintf(c, "PUT /v1/blobs/%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", id, len(b))
		first := make([]byte, len("HTTP/1.1 100 Continue"))
		if _, err := io.ReadFull(c, first); err != nil || !strings.Contains(string(first), want) {
			t.Fatalf("%q, %v", first, err)
		}
		if i == 0 {
			_, _ = c.Write(b)
			for in := bufio.NewReader(c); ; {
				line, err := in.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				if strings.Contains(line, "201 Created") {
					break
				}
			}
		} else if _, err := io.ReadAll(c); err != nil {
			t.Fatal(err)
		}
	}
}

func TestBlobsOfMany(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	b, id := someBlob(1, 2*schemas.BlobChunk)
	var all sync.WaitGroup
	made := make(chan int, 12)
	for range 12 {
		all.Go(func() { made <- w.put(id, bytes.NewReader(b)).status })
	}
	all.Wait()
	close(made)
	count := map[int]int{}
	for s := range made {
		count[s]++
	}
	if count[201] != 1 || count[200] != 11 {
		t.Errorf("%v", count)
	}
	until(t, "one of them is stored", func() bool { return w.blobMessages() == 2 })
	if r := w.get("/v1/blobs/" + string(id)); !bytes.Equal(r.body, b) {
		t.Error("other bytes came back")
	}
}

// A record has the size of each blob that its spec names, and a task whose blob is not
// there is not accepted.
func TestTasksNameBlobs(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	b, id := someBlob(1, 1000)
	body := fmt.Sprintf(`{"image":"busybox","files":[{"path":"a","blob":%q},{"path":"b","blob":%q}],"stdin_blob":%q}`, id, id, id)
	e := w.do("POST", "/v1/tasks", body).want(t, 422, schemas.CodeBlobMissing)
	if len(e.Errors) != 1 || e.Field != "files.0.blob" || !strings.Contains(e.Detail, "PUT /v1/blobs/") {
		t.Errorf("%+v", e)
	}
	w.put(id, bytes.NewReader(b))
	task := w.create(body)
	rec, err := w.records.Get(deadline(t), string(task.ID))
	if err != nil {
		t.Fatal(err)
	}
	if u := rec.Value.Blobs; len(u) != 1 || u[0].Blob != id || u[0].Size != 1000 || u[0].Upload == "" {
		t.Errorf("%+v", u)
	}
	e = w.do("POST", "/v1/batches", fmt.Sprintf(`{"template":{"image":"a"},"items":[{},{"files":[{"path":"a","blob":"sha256:%064x"}]}]}`, 7)).want(t, 422, schemas.CodeBlobMissing)
	if e.Field != "items.1.files.0.blob" {
		t.Errorf("%+v", e)
	}
	r := w.do("POST", "/v1/batches", fmt.Sprintf(`{"template":{"image":"a","stdin_blob":%q},"items":[{},{}]}`, id))
	var batch schemas.BatchStatus
	if err := schemas.Decode(r.body, &batch); err != nil || r.status != 201 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	stored, err := bus.NewTable(w.conn, schemas.BucketBatches, bus.JSON[schemas.Batch](nil)).Get(deadline(t), string(batch.ID))
	if err != nil || len(stored.Value.Blobs) != 1 || stored.Value.Blobs[0] != id {
		t.Errorf("%v %v", stored.Value.Blobs, err)
	}
}

// What a test of a judge expects may be no longer than a right answer could be: single, and as
// an item. Its input may.
func TestLongAnswersAreRefused(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	b, id := someBlob(1, 3<<20)
	w.put(id, bytes.NewReader(b))
	body := func(output, stdin, expected string) string {
		return fmt.Sprintf(`{"image":"a","judge":{"run":{"command":["cat"]%s},"tests":[{},{"stdin_blob":%q%s}]}}`, output, stdin, expected)
	}
	long := fmt.Sprintf(`,"expected_blob":%q`, id)
	e := w.do("POST", "/v1/tasks", body("", string(id), long)).want(t, 422, schemas.CodeInvalidValue)
	if e.Field != "judge.tests.1.expected_blob" || !strings.Contains(e.Detail, "2MiB") {
		t.Errorf("%+v", e)
	}
	e = w.do("POST", "/v1/batches", `{"template":{},"items":[`+body("", string(id), "")+`,`+body("", string(id), long)+`]}`).want(t, 422, schemas.CodeInvalidValue)
	if e.Field != "items.1.judge.tests.1.expected_blob" {
		t.Errorf("%+v", e)
	}
	w.create(body(`,"output":"2MiB"`, string(id), long))
}

// Contents that a record has no room for are stored as blobs.
func TestLargeContentsBecomeBlobs(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	b, id := someBlob(1, 200_000)
	body := fmt.Sprintf(`{"image":"busybox","stdin":"short","files":[{"path":"a","base64":%q},{"path":"b","content":"c"}]}`, base64.StdEncoding.EncodeToString(b))
	for range 2 { // the second finds it there
		task := w.create(body)
		if f := task.Spec.Files; f[0].Blob != id || f[0].Base64 != "" || f[1].Content != "c" || task.Spec.Stdin != "short" {
			t.Errorf("%+v", f)
		}
	}
	if r := w.get("/v1/blobs/" + string(id)); !bytes.Equal(r.body, b) {
		t.Errorf("%d", r.status)
	}
	if w.blobMessages() != 1 {
		t.Error("it is stored twice")
	}
	// The same key asks for the same task, though its spec is another now.
	first := w.create(body, "Idempotency-Key", "k")
	if again := w.create(body, "Idempotency-Key", "k"); again.ID != first.ID {
		t.Error("another task was made")
	}
}

// Where the bytes of a blob were lost, HEAD says so, and a PUT takes them again: a task that
// is asked for after that has them.
func TestABlobWhoseBytesAreGoneIsSentAgain(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	b, id := someBlob(1, 2*schemas.BlobChunk+7)
	path := "/v1/blobs/" + string(id)
	if r := w.put(id, bytes.NewReader(b)); r.status != 201 {
		t.Fatal(r.status)
	}
	all, err := w.conn.Subjects(deadline(t), schemas.StreamBlobs, schemas.BlobSubject(">"))
	if err != nil {
		t.Fatal(err)
	}
	for subject := range all {
		if strings.HasSuffix(subject, ".1") {
			if err := w.conn.Purge(deadline(t), schemas.StreamBlobs, subject); err != nil {
				t.Fatal(err)
			}
		}
	}
	head := func() int {
		res, err := w.client.Head(w.url + path)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res.StatusCode
	}
	if got := head(); got != 404 {
		t.Errorf("HEAD: %d", got)
	}
	other, _ := someBlob(2, 10)
	w.put(id, bytes.NewReader(other)).want(t, 422, schemas.CodeDigestMismatch)
	if n := w.blobMessages(); n != 2 {
		t.Errorf("%d pieces are stored", n)
	}
	if r := w.put(id, bytes.NewReader(b)); r.status != 201 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	w.put(id, bytes.NewReader(other)).want(t, 422, schemas.CodeDigestMismatch)
	if r := w.put(id, bytes.NewReader(b)); r.status != 200 || head() != 200 {
		t.Errorf("%d %s", r.status, r.body)
	}
	if r := w.get(path); r.status != 200 || !bytes.Equal(r.body, b) {
		t.Errorf("%d, %d bytes", r.status, len(r.body))
	}
}

// A blob that nothing needs is removed at once for all who look, and is there again when it
// is sent again. One that something needs stays, and the answer names that.
func TestRemoveABlob(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	b, id := someBlob(1, 2*schemas.BlobChunk+7)
	path := "/v1/blobs/" + string(id)
	remove := func() reply { return w.do("DELETE", path, "") }
	remove().want(t, 404, schemas.CodeNotFound)
	w.do("DELETE", "/v1/blobs/abc", "").want(t, 422, schemas.CodeInvalidValue)
	w.put(id, bytes.NewReader(b))
	body := fmt.Sprintf(`{"image":"busybox","stdin_blob":%q}`, id)
	task := w.create(body)
	r := w.do("POST", "/v1/batches", fmt.Sprintf(`{"template":{"image":"a"},"items":[{"stdin_blob":%q}]}`, id))
	var batch schemas.BatchStatus
	if err := schemas.Decode(r.body, &batch); err != nil || r.status != 201 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	if e := remove().want(t, 409, schemas.CodeInUse); !strings.Contains(e.Detail, string(task.ID)) || !strings.Contains(e.Detail, string(batch.ID)) {
		t.Errorf("%+v", e)
	}
	if l := w.blobs("").Items; len(l) != 1 || !l[0].InUse {
		t.Errorf("%+v", l)
	}
	w.do("DELETE", "/v1/tasks/"+string(task.ID), "")
	w.do("DELETE", "/v1/batches/"+string(batch.ID), "")
	until(t, "nothing needs it", func() bool { l := w.blobs("").Items; return len(l) == 1 && !l[0].InUse })
	// It has made no item of the batch, and so has not just used the blob itself.
	other := newAPI(t, natstest.Connect(t, w.nats), gateway.Config{})
	for range 2 { // twice is as once
		var info schemas.BlobInfo
		if err := schemas.Decode(remove().body, &info); err != nil || info.Blob != id || int(info.Size) != len(b) {
			t.Fatalf("%+v, %v", info, err)
		}
	}
	gone := func(a api) {
		t.Helper()
		a.get(path).want(t, 404, schemas.CodeNotFound)
		if r := a.do("HEAD", path, ""); r.status != 404 {
			t.Errorf("HEAD: %d", r.status)
		}
		a.do("POST", "/v1/tasks", body).want(t, 422, schemas.CodeBlobMissing)
	}
	gone(w.api)
	gone(other)
	if l := w.blobs("").Items; len(l) != 0 {
		t.Errorf("%+v", l)
	}
	if r := w.put(id, bytes.NewReader(b)); r.status != 200 {
		t.Errorf("sent again: %d %s", r.status, r.body)
	}
	if r := other.get(path); !bytes.Equal(r.body, b) {
		t.Errorf("%d, %d bytes", r.status, len(r.body))
	}
	// Another gateway removes what this one has just used; whoever sends it here has it again.
	if r := other.do("DELETE", path, ""); r.status != 200 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	if r := w.put(id, bytes.NewReader(b)); r.status != 200 {
		t.Errorf("sent again: %d %s", r.status, r.body)
	}
	if r := other.get(path); r.status != 200 {
		t.Errorf("%d %s", r.status, r.body)
	}
}

// A gateway that removes a blob may not know yet of a batch that another has just accepted:
// all of its items have the blob.
func TestABatchKeepsABlobThatIsRemoved(t *testing.T) {
	w := newWorld(t, gateway.Config{BlobGrace: 1}) // so each item looks at the entry
	b, id := someBlob(1, 100)
	w.put(id, bytes.NewReader(b))
	const items = 200
	if r := w.do("POST", "/v1/batches", fmt.Sprintf(`{"template":{"image":"a","stdin_blob":%q},"items":[{}%s]}`, id, strings.Repeat(",{}", items-1))); r.status != 201 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	entries := bus.NewTable(w.conn, schemas.BucketBlobs, bus.JSON[schemas.Blob](nil))
	if _, err := entries.Update(deadline(t), id.Hex(), "", func(e bus.Entry[schemas.Blob]) (schemas.Blob, []bus.WriteOption, error) {
		e.Value.RemovedAt = time.Now().UTC()
		return e.Value, nil, nil
	}); err != nil {
		t.Fatal(err)
	}
	records := bus.NewTable(w.conn, schemas.BucketTasks, bus.JSON[schemas.Record](nil))
	var made []bus.Stored
	until(t, "all items are tasks", func() bool {
		var err error
		made, _, err = w.conn.Snapshot(deadline(t), schemas.BucketTasks)
		return err == nil && len(made) == items
	})
	for _, m := range made {
		e, err := records.Get(deadline(t), m.Key)
		if err != nil {
			t.Fatal(err)
		}
		if u := e.Value.Blobs; len(u) != 1 || u[0].Upload == "" || int(u[0].Size) != len(b) {
			t.Fatalf("%s: %+v", m.Key, u)
		}
	}
}

func (a api) blobs(query string) (l schemas.BlobList) {
	a.Helper()
	a.ok(a.get("/v1/blobs"+query), &l)
	return l
}

// A list has all blobs, in the order of their last use, page by page; one that is used
// meanwhile comes once more.
func TestListOfBlobs(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	if l := w.blobs("").Items; l == nil || len(l) != 0 {
		t.Errorf("%+v", l)
	}
	var all []schemas.BlobID
	for seed := range byte(5) {
		b, id := someBlob(seed, 10+int(seed))
		if r := w.put(id, bytes.NewReader(b)); r.status != 201 {
			t.Fatal(r.status)
		}
		all = append(all, id)
	}
	var got []schemas.BlobID
	cursor := ""
	for {
		l := w.blobs("?limit=2" + cursor)
		for _, b := range l.Items {
			if int(b.Size) != 10+slices.Index(all, b.Blob) || b.StoredAt.IsZero() || b.UsedAt.IsZero() || b.InUse {
				t.Errorf("%+v", b)
			}
			got = append(got, b.Blob)
		}
		if l.NextCursor == "" {
			break
		}
		cursor = "&cursor=" + l.NextCursor
	}
	if !slices.Equal(got, all) {
		t.Errorf("%v, want %v", got, all)
	}
	w.get("/v1/blobs?limit=0").want(t, 400, schemas.CodeInvalidQuery)
	w.get("/v1/blobs?cursor=x").want(t, 400, schemas.CodeInvalidQuery)
}
