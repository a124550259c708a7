package gateway_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"strings"
	"testing"

	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

// leave stores files as the agent of w1 does and gives the sum. chunks may change what is
// stored.
func (w *world) leave(id schemas.TaskID, files map[string]string, order []string, chunks func([][]byte) [][]byte) *schemas.ArtifactSum {
	w.Helper()
	hash := func(b []byte) string {
		sum := sha256.Sum256(b)
		return hex.EncodeToString(sum[:])
	}
	var run, list bytes.Buffer
	s := &schemas.ArtifactSum{}
	for _, name := range order {
		body := files[name]
		line, err := schemas.Encode(schemas.ArtifactLine{Name: name, Offset: int64(run.Len()), Size: int64(len(body)), SHA256: hash([]byte(body))})
		if err != nil {
			w.Fatal(err)
		}
		list.Write(append(line, '\n'))
		run.WriteString(body)
		s.Count++
	}
	list.WriteString(`{"name":"fifo","skipped":"a pipe"}` + "\n")
	s.Bytes, s.Stored, s.Skipped = int64(run.Len()), int64(run.Len()), 1
	s.ListBytes, s.ListSHA256 = int64(list.Len()), hash(list.Bytes())
	run.Write(list.Bytes())
	var pieces [][]byte
	for all := run.Bytes(); len(all) > 0; {
		n := min(len(all), schemas.ArtifactChunk)
		pieces, all = append(pieces, bytes.Clone(all[:n])), all[n:]
	}
	if chunks != nil {
		pieces = chunks(pieces)
	}
	for i, p := range pieces {
		if _, err := w.conn.Publish(deadline(w), schemas.ArtifactSubject("w1", id, 1, int64(i)), nil, p); err != nil {
			w.Fatal(err)
		}
	}
	return s
}

func left(s *schemas.ArtifactSum) *schemas.End {
	return &schemas.End{By: schemas.EndedItself, Exit: &schemas.Exit{}, ArtifactSum: s}
}

var (
	someFiles = map[string]string{"a.txt": "hello\n", "dir/größe 1%.bin": strings.Repeat("0123456789", 70_000), "empty": "", "z": "last"}
	inOrder   = []string{"a.txt", "dir/größe 1%.bin", "empty", "z"}
)

func TestArtifacts(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := w.create(spec).ID
	path := "/v1/tasks/" + string(id) + "/artifacts"
	w.run(id)
	if e := w.get(path).want(t, 409, schemas.CodeStateConflict); e.State != schemas.Running {
		t.Errorf("%+v", e)
	}
	w.report(id, schemas.PhaseEnded, left(w.leave(id, someFiles, inOrder, nil)))
	until(t, "it is over", func() bool { return w.task(id).State.Final() })

	var list schemas.ArtifactList
	if r := w.get(path); r.status != 200 || schemas.Decode(r.body, &list) != nil {
		t.Fatalf("%d %s", r.status, r.body)
	}
	if len(list.Items) != 4 || list.Items[1].Name != inOrder[1] || list.Items[1].Size != 700_000 || len(list.Skipped) != 1 || list.Sum.ListBytes != 0 {
		t.Errorf("%+v", list)
	}
	for name, at := range map[string]string{"a.txt": "a.txt", "dir/größe 1%.bin": "dir/gr%C3%B6%C3%9Fe%201%25.bin", "empty": "empty", "z": "z"} {
		r := w.get(path + "/" + at)
		if r.status != 200 || string(r.body) != someFiles[name] || r.header.Get("Content-Type") != "application/octet-stream" {
			t.Errorf("%s: %d, %d bytes, %v", name, r.status, len(r.body), r.header)
		}
		if again := w.get(path+"/"+at, "If-None-Match", r.header.Get("ETag")); again.status != 304 || len(again.body) > 0 {
			t.Errorf("%s again: %d", name, again.status)
		}
		if head := w.do("HEAD", path+"/"+at, ""); head.status != 200 || head.header.Get("ETag") != r.header.Get("ETag") || head.header.Get("Content-Length") != r.header.Get("Content-Length") {
			t.Errorf("HEAD of %s: %d %v", name, head.status, head.header)
		}
	}
	for _, name := range []string{"fifo", "dir", "none", "a.txt%00", "%2e%2e"} {
		w.get(path+"/"+name).want(t, 404, schemas.CodeNotFound)
	}
	for _, r := range []reply{w.get(path + "?archive=1"), w.get(path, "Accept", "application/x-tar")} {
		if r.header.Get("Content-Type") != "application/x-tar" {
			t.Fatalf("%d %v", r.status, r.header)
		}
		got := map[string]string{}
		archive := tar.NewReader(bytes.NewReader(r.body))
		for h, err := archive.Next(); err != io.EOF; h, err = archive.Next() {
			if err != nil {
				t.Fatal(err)
			}
			if b, _ := io.ReadAll(archive); h.Typeflag == tar.TypeReg {
				got[strings.TrimPrefix(h.Name, "output/")] = string(b)
			}
		}
		for name, body := range someFiles {
			if got[name] != body {
				t.Errorf("the archive has %d bytes of %s", len(got[name]), name)
			}
		}
	}
	if r := w.get(path + "/a.txt?archive=1"); r.status != 400 {
		t.Errorf("%d", r.status)
	}
}

func TestATaskThatLeftNothing(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	id := w.create(spec).ID
	w.run(id)
	w.report(id, schemas.PhaseEnded, left(nil))
	until(t, "it is over", func() bool { return w.task(id).State.Final() })
	path := "/v1/tasks/" + string(id) + "/artifacts"
	var list schemas.ArtifactList
	if r := w.get(path); r.status != 200 || schemas.Decode(r.body, &list) != nil || len(list.Items) > 0 {
		t.Errorf("%d %s", r.status, r.body)
	}
	w.get(path+"/a").want(t, 404, schemas.CodeNotFound)
}

// What a worker stores and did not report, or stores anew, is never handed out whole.
func TestForgedArtifacts(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	for name, c := range map[string]struct {
		change func([][]byte) [][]byte
		lost   bool // the list too
	}{
		"a byte of a file":        {func(c [][]byte) [][]byte { c[0][len(c[0])-1] ^= 1; return c }, false},
		"the last byte of a file": {func(c [][]byte) [][]byte { c[2][700_005-2*schemas.ArtifactChunk] ^= 1; return c }, false},
		"a chunk is short":        {func(c [][]byte) [][]byte { c[1] = c[1][:100]; return c }, false},
		"a chunk is missing":      {func(c [][]byte) [][]byte { return append(c[:1], nil, c[2]) }, false},
		"the list":                {func(c [][]byte) [][]byte { c[2][len(c[2])-5] ^= 1; return c }, true},
		"the list is longer":      {func(c [][]byte) [][]byte { c[2] = append(c[2], "{}\n"...); return c }, true},
		"the list is missing":     {func(c [][]byte) [][]byte { return c[:2] }, true},
		"nothing is stored":       {func([][]byte) [][]byte { return nil }, true},
	} {
		t.Run(name, func(t *testing.T) {
			id := w.create(spec).ID
			w.run(id)
			w.report(id, schemas.PhaseEnded, left(w.leave(id, someFiles, inOrder, c.change)))
			until(t, "it is over", func() bool { return w.task(id).State.Final() })
			path := "/v1/tasks/" + string(id) + "/artifacts"
			if c.lost {
				for _, at := range []string{"", "?archive=1", "/a.txt"} {
					w.get(path+at).want(t, 410, schemas.CodeArtifactLost)
				}
				return
			}
			r, err := w.try("GET", path+"/dir/gr%C3%B6%C3%9Fe%201%25.bin", "")
			if err == nil && r.status == http.StatusOK {
				t.Errorf("%d bytes were handed out as whole", len(r.body))
			}
			if r, err := w.try("GET", path+"?archive=1", ""); err == nil && r.status == http.StatusOK {
				t.Errorf("an archive of %d bytes was handed out as whole", len(r.body))
			}
			if r := w.get(path + "/z"); r.status != 200 || string(r.body) != "last" {
				t.Errorf("the others: %d %s", r.status, r.body)
			}
		})
	}
}
