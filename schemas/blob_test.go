package schemas_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"dayfly.dev/schemas"
)

func blobOf(text string) schemas.BlobID { return schemas.BlobIDOf(sha256.Sum256([]byte(text))) }

func TestParseBlobID(t *testing.T) {
	hex := strings.Repeat("0a", 32)
	for _, s := range []string{hex, "sha256:" + hex} {
		if id, err := schemas.ParseBlobID(s); err != nil || id != schemas.BlobID("sha256:"+hex) || id.Hex() != hex {
			t.Errorf("%s: %q, %v", s, id, err)
		}
	}
	for _, s := range []string{"", "sha256:", hex[1:], hex + "0", "sha512:" + hex, strings.ToUpper(hex), "sha256:sha256:" + hex, hex[1:] + "/"} {
		if _, err := schemas.ParseBlobID(s); err == nil {
			t.Errorf("%q was taken", s)
		}
	}
	if id := blobOf("a"); schemas.BlobIDOf(id.Sum()) != id {
		t.Error("Sum is not what the name says")
	}
}

// A filter affirms all that it holds, and seldom anything else.
func TestBlobFilter(t *testing.T) {
	if schemas.NewBlobFilter(nil).Has(blobOf("a").Sum()) {
		t.Error("nothing holds something")
	}
	for _, c := range []struct {
		held, wrong int // wrong of 10,000 answers, at most
		bytes       int
	}{{1, 200, 3}, {100, 150, 126}, {5000, 150, 6251}, {20_000, 4400, schemas.MaxBlobFilter}} {
		var held []schemas.BlobID
		for i := range c.held {
			held = append(held, blobOf(fmt.Sprint("held", i)))
		}
		f := schemas.NewBlobFilter(held)
		for _, b := range held {
			if !f.Has(b.Sum()) {
				t.Fatalf("of %d: denies %s", c.held, b)
			}
		}
		wrong := 0
		for i := range 10_000 {
			if f.Has(blobOf(fmt.Sprint("other", i)).Sum()) {
				wrong++
			}
		}
		t.Logf("%d blobs: %d bytes, %d of 10,000 others affirmed", c.held, len(f), wrong)
		if wrong > c.wrong || len(f) != c.bytes {
			t.Errorf("%d blobs: %d bytes, %d of 10,000 others affirmed", c.held, len(f), wrong)
		}
	}
}

// Contents that a record has no room for become blobs, the largest first, and the rest
// stays as it is.
func TestSlim(t *testing.T) {
	binary := bytes.Repeat([]byte{0, 1, 2, 0xff}, 10_000)
	s := schemas.Spec{Image: "a", Stdin: strings.Repeat("x", 30_000), Files: []schemas.File{
		{Path: "small", Content: "print(1)"}, {Path: "big", Base64: base64.StdEncoding.EncodeToString(binary)}, {Path: "middle", Content: strings.Repeat("y", 20_000)}}}
	slim, contents := s.Slim()
	if len(contents) != 2 || !bytes.Equal(contents[0], binary) || string(contents[1]) != s.Stdin {
		t.Fatalf("%d contents became blobs", len(contents))
	}
	if f := slim.Files[1]; f.Blob != schemas.BlobIDOf(sha256.Sum256(binary)) || f.Base64 != "" || f.Path != "big" {
		t.Errorf("%+v", f)
	}
	if slim.Stdin != "" || slim.StdinBlob != blobOf(s.Stdin) || slim.Files[2].Content != s.Files[2].Content || slim.Files[0].Content != "print(1)" {
		t.Errorf("%+v", slim)
	}
	if s.Files[1].Blob != "" || s.Stdin == "" {
		t.Error("the spec itself was changed")
	}
	if again, more := slim.Slim(); len(more) != 0 || len(encode(t, again)) > schemas.MaxSpecBytes {
		t.Error("it is not small yet")
	}
	names, fields := slim.Blobs()
	if len(names) != 2 || fields[0] != "files.1.blob" || fields[1] != "stdin_blob" {
		t.Errorf("%v %v", names, fields)
	}
	if _, contents := (schemas.Spec{Image: "a", Stdin: "short"}).Slim(); contents != nil {
		t.Error("a short spec was changed")
	}
}

// So do the tests of a judge, and a client finds them by the names that it gave.
func TestSlimTests(t *testing.T) {
	s := schemas.Spec{Image: "a", Kind: "judge-c", Judge: &schemas.Judge{Tests: []schemas.JudgeTest{
		{Stdin: "1", Expected: strings.Repeat("x", 30_000)}, {Stdin: strings.Repeat("y", 20_000), Expected: "2"}}}}
	slim, contents := s.Slim()
	want := []schemas.JudgeTest{{Stdin: "1", ExpectedBlob: blobOf(strings.Repeat("x", 30_000))}, s.Judge.Tests[1]}
	if !reflect.DeepEqual(want, slim.Judge.Tests) || len(contents) != 1 {
		t.Errorf("%d contents, %.200v", len(contents), slim.Judge.Tests)
	}
	if s.Judge.Tests[0].ExpectedBlob != "" {
		t.Error("the spec itself was changed")
	}
	if names, fields := slim.Blobs(); len(names) != 1 || fields[0] != "payload.tests.0.expected_blob" {
		t.Errorf("%v %v", names, fields)
	}
}

// Views know which blobs a record names while it can still be run.
func TestBlobsHeader(t *testing.T) {
	r := schemas.Record{State: schemas.Queued, Blobs: []schemas.BlobUse{{Blob: blobOf("a")}, {Blob: blobOf("b")}}}
	sums := schemas.ParseBlobsHeader(r.Headers()[schemas.HeaderBlobs][0])
	if len(sums) != 2 || sums[0] != blobOf("a").Sum() || sums[1] != blobOf("b").Sum() {
		t.Errorf("%x", sums)
	}
	r.State = schemas.Completed
	if h := r.Headers()[schemas.HeaderBlobs]; h != nil {
		t.Errorf("a final record names %v", h)
	}
}

// Who knows the name of a blob reads any part of it, and who does not reads nothing.
func TestBlobCipher(t *testing.T) {
	plain := bytes.Repeat([]byte("abc\n"), schemas.BlobChunk)
	hidden, shown := make([]byte, len(plain)), make([]byte, len(plain))
	schemas.BlobCipher(blobOf("a"), "u", 0).XORKeyStream(hidden, plain)
	schemas.BlobCipher(blobOf("a"), "u", 0).XORKeyStream(shown, hidden)
	if !bytes.Equal(shown, plain) {
		t.Error("it is not what was hidden")
	}
	schemas.BlobCipher(blobOf("a"), "u", 2).XORKeyStream(shown, hidden[2*schemas.BlobChunk:])
	if n := 2 * schemas.BlobChunk; !bytes.Equal(shown[:n], plain[n:2*n]) {
		t.Error("from the third chunk on it is not what was hidden")
	}
	for _, other := range []struct {
		blob   schemas.BlobID
		upload string
	}{{blobOf("b"), "u"}, {blobOf("a"), "v"}} {
		schemas.BlobCipher(other.blob, other.upload, 0).XORKeyStream(shown, hidden)
		if bytes.Contains(shown, []byte("abc\nabc\n")) {
			t.Errorf("%+v shows it", other)
		}
	}
}
