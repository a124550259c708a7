package gateway

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// archiveFolder is the folder that all is in, in an archive of a task's artifacts.
const archiveFolder = "output/"

// shelf is where the artifacts of one final task are stored. A worker wrote what is there,
// and could write again: nothing counts that does not have the hash which the record, or
// the list that the record vouches for, has.
type shelf struct {
	g   *Gateway
	rec schemas.Record
	sum schemas.ArtifactSum
}

// errLost says that what is stored is not what was reported.
var errLost = errors.New("what is stored is not what the worker reported")

// shelf finds the artifacts of the task that a request names.
func (g *Gateway) shelf(r *http.Request) (*shelf, error) {
	id, err := taskID(r)
	if err != nil {
		return nil, err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	e, err := g.fetch(ctx, id)
	if err != nil {
		return nil, err
	}
	rec := e.Value.Record
	if !rec.State.Final() {
		return nil, &schemas.Error{Status: http.StatusConflict, Code: schemas.CodeStateConflict, Task: id, State: rec.State,
			Detail: "the task is not over; its artifacts are there with its end, and until then its files are at …/files?path=" + rec.Spec.OutputPath()}
	}
	s := &shelf{g: g, rec: rec}
	if rec.ArtifactSum != nil {
		s.sum = *rec.ArtifactSum
	}
	return s, nil
}

// problem words what went wrong with reading.
func (s *shelf) problem(err error) error {
	switch {
	case errors.Is(err, errLost):
		s.g.metrics.artifactsLost.Inc()
		return &schemas.Error{Status: http.StatusGone, Code: schemas.CodeArtifactLost, Task: s.rec.ID,
			Detail: "what is stored is not what the task's worker reported, or nothing is, as after a restore from a backup; so nothing is handed out"}
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, bus.ErrUnavailable), errors.Is(err, bus.ErrUnknownOutcome):
		return unavailable()
	}
	return err
}

// listArtifacts is GET /v1/tasks/{id}/artifacts.
func (g *Gateway) listArtifacts(w *response, r *http.Request) error {
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	archive, err := q.flag("archive")
	if err != nil {
		return err
	}
	if !q.has("archive") {
		archive = prefersTar(r.Header)
	}
	done, err := g.follower("artifacts")
	if err != nil {
		return err
	}
	defer done()
	s, err := g.shelf(r)
	if err != nil {
		return err
	}
	list := schemas.ArtifactList{Task: s.rec.ID, Items: []schemas.Artifact{}, Sum: s.sum}
	list.Sum.Stored, list.Sum.ListBytes, list.Sum.ListSHA256 = 0, 0, ""
	var lines []schemas.ArtifactLine
	err = s.list(r.Context(), func(l schemas.ArtifactLine) {
		switch {
		case l.Skipped != "":
			list.Skipped = append(list.Skipped, schemas.ArtifactSkipped{Name: l.Name, Why: l.Skipped})
		case archive:
			lines = append(lines, l)
		default:
			list.Items = append(list.Items, schemas.Artifact{Name: l.Name, Size: l.Size, SHA256: l.SHA256})
		}
	})
	w.Header().Set("Vary", "Accept")
	switch {
	case err != nil:
		return s.problem(err)
	case archive:
		return s.archive(w, r, lines)
	}
	return answer(w, http.StatusOK, list)
}

// prefersTar says whether an Accept asks for an archive.
func prefersTar(h http.Header) bool {
	for part := range strings.SplitSeq(h.Get("Accept"), ",") {
		kind, _, _ := strings.Cut(part, ";")
		switch strings.TrimSpace(kind) {
		case kindTar:
			return true
		case "application/json", "*/*", "application/*":
			return false
		}
	}
	return false
}

// getArtifact is GET /v1/tasks/{id}/artifacts/{name}.
func (g *Gateway) getArtifact(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	done, err := g.follower("artifacts")
	if err != nil {
		return err
	}
	defer done()
	s, err := g.shelf(r)
	if err != nil {
		return err
	}
	name := r.PathValue("name")
	var line *schemas.ArtifactLine
	err = s.list(r.Context(), func(l schemas.ArtifactLine) {
		if l.Skipped == "" && l.Name == name && line == nil {
			line = &l
		}
	})
	if err != nil {
		return s.problem(err)
	}
	if line == nil {
		detail := "the task has left no such artifact"
		if s.sum.Truncated {
			detail += ", or it was left out (" + s.sum.Why + ")"
		}
		return &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Task: s.rec.ID, Field: "name", Detail: detail}
	}
	h := w.Header()
	h.Set("ETag", `"`+line.SHA256+`"`)
	if matches(r.Header, h.Get("ETag")) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	header := func() {
		h.Set("Content-Type", kindBytes)
		h.Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": path.Base(line.Name)}))
		h.Set("Content-Length", strconv.FormatInt(line.Size, 10))
		h.Set("Accept-Ranges", "none")
		h.Set("Last-Modified", s.rec.EndedAt.UTC().Format(http.TimeFormat))
		w.WriteHeader(http.StatusOK)
	}
	if r.Method == http.MethodHead {
		header()
		return nil
	}
	out, calm := s.g.out(w)
	defer calm()
	return s.problem(s.copy(r.Context(), lazily{out, w, header}, *line))
}

// lazily sends the header with the first byte.
type lazily struct {
	io.Writer
	w      *response
	header func()
}

func (l lazily) Write(p []byte) (int, error) {
	if !l.w.wrote {
		l.header()
	}
	return l.Writer.Write(p)
}

// out writes to a client that must go on reading. calm ends that.
func (g *Gateway) out(w *response) (out io.Writer, calm func()) {
	control := http.NewResponseController(w)
	return stalling{w, func() { _ = control.SetWriteDeadline(time.Now().Add(g.cfg.WriteStall)) }},
		func() { _ = control.SetWriteDeadline(time.Time{}) }
}

// archive answers with all of them. An answer that breaks off is not whole.
func (s *shelf) archive(w *response, r *http.Request, lines []schemas.ArtifactLine) error {
	h := w.Header()
	h.Set("Content-Type", kindTar)
	h.Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": string(s.rec.ID) + ".tar"}))
	if r.Method == http.MethodHead {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	raw, calm := s.g.out(w)
	defer calm()
	buffered := bufio.NewWriterSize(raw, 64<<10)
	to := tar.NewWriter(buffered)
	err := to.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: archiveFolder, Mode: 0o755, ModTime: s.rec.EndedAt})
	for _, l := range lines {
		if err == nil {
			err = to.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: archiveFolder + l.Name, Size: l.Size, Mode: 0o644, ModTime: s.rec.EndedAt})
		}
		if err == nil {
			err = s.copy(r.Context(), to, l)
		}
	}
	if err == nil {
		err = to.Close()
	}
	if err == nil {
		err = buffered.Flush()
	}
	return s.problem(err)
}

// longestLine bounds a line of the list: a name of which each byte is escaped, and more.
const longestLine = 16 << 10

// list gives each line of the stored list to fn. Only if it returns nil was all of that true.
func (s *shelf) list(ctx context.Context, fn func(schemas.ArtifactLine)) error {
	if s.sum.ListBytes == 0 {
		return nil
	}
	sum := sha256.New()
	lines := bufio.NewScanner(io.TeeReader(s.run(ctx, s.sum.Stored, s.sum.ListBytes), sum))
	lines.Buffer(nil, longestLine)
	count := 0
	for lines.Scan() {
		var l schemas.ArtifactLine
		if err := schemas.Decode(lines.Bytes(), &l); err != nil || !l.Check(s.sum) {
			return errLost
		}
		if count++; count > schemas.MaxArtifacts+schemas.MaxArtifactSkipped {
			return errLost
		}
		fn(l)
	}
	if err := lines.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			return errLost
		}
		return err
	}
	if hex.EncodeToString(sum.Sum(nil)) != s.sum.ListSHA256 {
		return errLost
	}
	return nil
}

// copy writes one artifact to w. The last piece goes out once all of it was seen to have
// the right hash: what is not right is never whole.
func (s *shelf) copy(ctx context.Context, w io.Writer, l schemas.ArtifactLine) error {
	v := &verified{from: s.run(ctx, l.Offset, l.Size), left: l.Size, hash: sha256.New(), want: l.SHA256}
	var held, next bytes.Buffer
	for {
		next.Reset()
		n, err := io.CopyN(&next, v, 128<<10)
		s.g.metrics.artifactBytes.Add(float64(n))
		if err != nil && err != io.EOF {
			return err
		}
		if held.Len() > 0 || err == io.EOF {
			if _, err := w.Write(held.Bytes()); err != nil {
				return err
			}
		}
		if err == io.EOF {
			_, err := w.Write(next.Bytes())
			return err
		}
		held, next = next, held
	}
}

// verified reads so many bytes, and has io.EOF only for those with the hash.
type verified struct {
	from io.Reader
	left int64
	hash hash.Hash
	want string
}

func (v *verified) Read(p []byte) (int, error) {
	if v.left == 0 {
		if hex.EncodeToString(v.hash.Sum(nil)) != v.want {
			return 0, errLost
		}
		return 0, io.EOF
	}
	n, err := v.from.Read(p[:min(int64(len(p)), v.left)])
	v.hash.Write(p[:n])
	v.left -= int64(n)
	if err == io.EOF && v.left == 0 {
		err = nil
	}
	return n, err
}

// run reads n bytes of the run, from an offset on.
func (s *shelf) run(ctx context.Context, from, n int64) io.Reader {
	return &runReader{s: s, ctx: ctx, at: from, end: from + n}
}

type runReader struct {
	s       *shelf
	ctx     context.Context
	at, end int64
	chunk   []byte // what is left of the present one
}

func (r *runReader) Read(p []byte) (int, error) {
	if r.at >= r.end {
		return 0, io.EOF
	}
	if len(r.chunk) == 0 {
		if err := r.fetch(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.chunk[:min(int64(len(r.chunk)), r.end-r.at)])
	r.chunk, r.at = r.chunk[n:], r.at+int64(n)
	return n, nil
}

func (r *runReader) fetch() error {
	number := r.at / schemas.ArtifactChunk
	begins := number * schemas.ArtifactChunk
	rec := r.s.rec
	ctx, cancel := context.WithTimeout(r.ctx, r.s.g.cfg.OpTimeout)
	defer cancel()
	b, err := r.s.g.conn.Stored(ctx, schemas.StreamArtifacts, schemas.ArtifactSubject(rec.Worker, rec.ID, rec.Attempt, number))
	if errors.Is(err, bus.ErrNotFound) {
		return errLost
	}
	if err != nil {
		return fmt.Errorf("read artifacts: %w", err)
	}
	if int64(len(b)) != min(schemas.ArtifactChunk, r.s.sum.Stored+r.s.sum.ListBytes-begins) {
		return errLost
	}
	r.chunk = b[r.at-begins:]
	return nil
}
