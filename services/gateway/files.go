package gateway

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/bus/session"
	"dayfly.dev/schemas"
)

// Media types of files.
const (
	kindBytes = "application/octet-stream"
	kindTar   = "application/x-tar"
)

// trailerSkipped is a trailer with a schemas.FilesSkipped: what a folder's archive lacks.
const trailerSkipped = "Dayfly-Skipped"

// filesPath is what all requests for files have.
func filesPath(w *response, r *http.Request) (id schemas.TaskID, q query, path string, err error) {
	if id, err = taskID(r); err != nil {
		return id, q, "", err
	}
	if q, err = parseQuery(w, r); err != nil {
		return id, q, "", err
	}
	path = q.get("path")
	if path == "" || len(path) > 4096 || strings.ContainsRune(path, 0) {
		return id, q, "", badQuery("path", "must name a file or folder of the task, with at most 4096 bytes")
	}
	return id, q, path, nil
}

// putFiles is PUT /v1/tasks/{id}/files.
func (g *Gateway) putFiles(w *response, r *http.Request) error {
	id, q, path, err := filesPath(w, r)
	if err != nil {
		return err
	}
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || kind != kindBytes && kind != kindTar || r.Header.Get("Content-Encoding") != "" {
		return &schemas.Error{Status: http.StatusUnsupportedMediaType, Code: schemas.CodeContentType,
			Detail: "send one file as " + kindBytes + ", or a tar archive as " + kindTar + ", without a Content-Encoding"}
	}
	o := schemas.FilesOpen{Path: path, Archive: kind == kindTar}
	if q.has("mode") {
		mode, err := strconv.ParseUint(q.get("mode"), 8, 32)
		if err != nil || mode > 0o777 || mode == 0 {
			return badQuery("mode", "must be octal, such as 755")
		}
		if o.Archive {
			return badQuery("mode", "goes with one file; an archive has modes of its own")
		}
		o.Mode = uint32(mode)
	}
	v, err := g.visit(r, id, visitFiles, schemas.Open{Kind: schemas.SessionPut, Files: &o})
	if err != nil {
		return err
	}
	defer v.end()
	_ = http.NewResponseController(w).EnableFullDuplex()
	end, err := g.upload(w, r, v)
	if err == nil {
		err = v.done(w, path, end)
	}
	if err != nil {
		g.early(w, r, true, func() { g.fail(w, r, err) })
	}
	return nil
}

// early answers a request whose body is perhaps still on its way. A connection that is
// closed with bytes in it is reset, and takes the answer with it: so what the client sends
// until it has read the answer is taken, for a while. begun says that some of the body was
// read: a client that expects our word on it first has had it then.
func (g *Gateway) early(w *response, r *http.Request, begun bool, answer func()) {
	control := http.NewResponseController(w)
	w.Header().Set("Connection", "close")
	answer()
	if control.Flush() != nil {
		return
	}
	if !begun && r.Header.Get("Expect") != "" { // it waits for our word, and the server would wait for the body
		_ = control.SetReadDeadline(time.Unix(1, 0))
		return
	}
	if control.SetReadDeadline(time.Now().Add(5*time.Second)) != nil {
		return
	}
	_, _ = io.Copy(io.Discard, r.Body)
}

// upload carries the body to the task, until it is there or the task says why not.
func (g *Gateway) upload(w *response, r *http.Request, v *visit) (schemas.FilesEnd, error) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	control := http.NewResponseController(w)
	sent := make(chan error, 1)
	go func() {
		err := v.body(ctx, r.Body, func() { _ = control.SetReadDeadline(time.Now().Add(g.cfg.WriteStall)) })
		if err != nil {
			v.stream.Reset(session.CodeBroken, "the body broke off")
		}
		sent <- err
	}()
	_, end, err := v.filesEnd(ctx, io.Discard)
	cancel()
	// A client that sends on is not to be cut off before it has read the answer, as a read
	// that fails would do; one that sends nothing holds the answer up no longer than this.
	slow := time.AfterFunc(time.Second, func() { _ = control.SetReadDeadline(time.Unix(1, 0)) })
	failed := <-sent
	slow.Stop()
	_ = control.SetReadDeadline(time.Time{})
	var cut bodyCutOff
	if err != nil && errors.As(failed, &cut) {
		return end, &schemas.Error{Status: http.StatusBadRequest, Code: schemas.CodeCutOff, Task: v.task, Detail: "the body did not come to its end; nothing was changed"}
	}
	return end, err
}

// bodyCutOff is an error of a request's body.
type bodyCutOff struct{ error }

// body sends what r gives. beat is called before each read.
func (v *visit) body(ctx context.Context, r io.Reader, beat func()) error {
	b := make([]byte, session.MaxFrame)
	for {
		beat()
		n, err := r.Read(b)
		if failed := v.send(ctx, 0, b[:n]); failed != nil {
			return failed
		}
		if err == io.EOF {
			return v.stream.SendEnd(ctx, 0)
		}
		if err != nil {
			return bodyCutOff{err}
		}
	}
}

// filesEnd writes what comes to w, up to the last word.
func (v *visit) filesEnd(ctx context.Context, w io.Writer) (n int64, end schemas.FilesEnd, err error) {
	in := &filesReader{visit: v, ctx: ctx}
	if n, err = io.CopyBuffer(struct{ io.Writer }{w}, in, make([]byte, session.MaxFrame)); err == nil {
		end = *in.end
	}
	return n, end, err
}

// filesReader reads what comes from a task's files. After the last word it is io.EOF.
type filesReader struct {
	visit *visit
	ctx   context.Context
	rest  []byte
	end   *schemas.FilesEnd
}

func (r *filesReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.end != nil {
			return 0, io.EOF
		}
		f, err := r.visit.stream.Receive(r.ctx)
		switch {
		case err == io.EOF:
			return 0, r.visit.broken(io.ErrUnexpectedEOF)
		case err != nil:
			return 0, r.visit.broken(err)
		case f.Channel == schemas.ChannelControl:
			r.end = &schemas.FilesEnd{}
			if err := schemas.Decode(f.Data, r.end); err != nil {
				return 0, fmt.Errorf("read an agent's answer: %w", err)
			}
		default:
			r.rest = f.Data
			r.visit.out.Add(float64(len(f.Data)))
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// done answers with what was done.
func (v *visit) done(w *response, path string, end schemas.FilesEnd) error {
	if err := v.refused(end); err != nil {
		return err
	}
	v.result = resultOK
	return answer(w, http.StatusOK, schemas.FilesDone{Path: path, Entries: end.Entries, Bytes: end.Bytes})
}

// refused is the problem that a last word means.
func (v *visit) refused(end schemas.FilesEnd) error {
	if end.Code == "" {
		return nil
	}
	v.result = resultFailed
	e := &schemas.Error{Status: http.StatusUnprocessableEntity, Code: end.Code, Detail: end.Message, Task: v.task}
	switch end.Code {
	case schemas.CodeNotFound:
		e.Status = http.StatusNotFound
	case schemas.CodePermission:
		e.Status = http.StatusForbidden
	case schemas.CodeNoSpace:
		e.Status = http.StatusInsufficientStorage
	case schemas.CodeTooLarge:
		e.Status = http.StatusRequestEntityTooLarge
	case schemas.CodeCutOff:
		e.Status = http.StatusBadRequest
	case schemas.CodeInvalidValue:
		e.Field = "path"
	}
	return e
}

// getFiles is GET /v1/tasks/{id}/files.
func (g *Gateway) getFiles(w *response, r *http.Request) error {
	id, q, path, err := filesPath(w, r)
	if err != nil {
		return err
	}
	list, err := q.flag("list")
	if err != nil {
		return err
	}
	o := schemas.Open{Kind: schemas.SessionGet, Files: &schemas.FilesOpen{Path: path}}
	if list {
		o.Kind, o.Files.Entries = schemas.SessionList, schemas.MaxFileList
	}
	v, err := g.visit(r, id, visitFiles, o)
	if err != nil {
		return err
	}
	defer v.end()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	if list {
		return v.list(ctx, w, path)
	}
	control := http.NewResponseController(w)
	out := stalling{w, func() { _ = control.SetWriteDeadline(time.Now().Add(g.cfg.WriteStall)) }}
	err = v.download(ctx, w, out, r.Method == http.MethodHead)
	_ = control.SetWriteDeadline(time.Time{})
	return err
}

// stalling writes with a deadline for each piece: a client that reads nothing is cut off.
type stalling struct {
	io.Writer
	beat func()
}

func (s stalling) Write(p []byte) (int, error) {
	s.beat()
	return s.Writer.Write(p)
}

// download answers with a file's bytes or a folder's archive. An answer is whole, or it
// is seen not to be.
func (v *visit) download(ctx context.Context, w *response, out io.Writer, head bool) error {
	in := &filesReader{visit: v, ctx: ctx}
	var begin bytes.Buffer
	gathered := &gathering{in, &begin}
	archive := tar.NewReader(gathered)
	h, err := archive.Next()
	gathered.to = nil
	if in.end != nil {
		if err := v.refused(*in.end); err != nil {
			return err
		}
	}
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeReg {
		return v.file(w, out, h, archive, in, head)
	}
	w.Header().Set("Content-Type", kindTar)
	w.Header().Set("Trailer", trailerSkipped)
	if head {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	b := make([]byte, session.MaxFrame)
	if _, err := io.CopyBuffer(struct{ io.Writer }{out}, struct{ io.Reader }{io.MultiReader(&begin, in)}, b); err != nil {
		return err
	}
	if err := v.refused(*in.end); err != nil {
		return err
	}
	if len(in.end.Skipped) > 0 {
		text, err := schemas.Encode(schemas.FilesSkipped{Skipped: in.end.Skipped, More: in.end.More})
		if err != nil {
			return err
		}
		w.Header().Set(trailerSkipped, asciiJSON(text))
	}
	v.result = resultOK
	return nil
}

// asciiJSON writes JSON so that it can be a header.
func asciiJSON(text []byte) string {
	var b strings.Builder
	for _, r := range string(text) {
		switch {
		case r < 0x7f:
			b.WriteRune(r)
		case r > 0xffff:
			r -= 0x10000
			fmt.Fprintf(&b, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

// gathering reads, and keeps what it reads for as long as there is a place for it.
type gathering struct {
	io.Reader
	to *bytes.Buffer
}

func (g *gathering) Read(p []byte) (int, error) {
	n, err := g.Reader.Read(p)
	if g.to != nil {
		g.to.Write(p[:n])
	}
	return n, err
}

// file answers with one file. Its last byte goes out when the task has said that all was
// right.
func (v *visit) file(w *response, out io.Writer, h *tar.Header, body io.Reader, in *filesReader, head bool) error {
	header := func() {
		w.Header().Set("Content-Type", kindBytes)
		w.Header().Set("Content-Length", strconv.FormatInt(h.Size, 10))
		w.Header().Set("Last-Modified", h.ModTime.UTC().Format(http.TimeFormat))
		w.WriteHeader(http.StatusOK)
	}
	if head {
		header()
		return nil
	}
	var last []byte
	if h.Size > 1 {
		header()
		if _, err := io.CopyBuffer(struct{ io.Writer }{out}, io.LimitReader(body, h.Size-1), make([]byte, session.MaxFrame)); err != nil {
			return err
		}
	}
	last, err := io.ReadAll(body)
	if err == nil {
		_, err = io.Copy(io.Discard, in)
	}
	if err != nil {
		return err
	}
	if err := v.refused(*in.end); err != nil {
		return err
	}
	if len(in.end.Skipped) > 0 {
		v.result = resultFailed
		return &schemas.Error{Status: http.StatusConflict, Code: schemas.CodeStateConflict, Task: v.task, Detail: "the file: " + in.end.Skipped[0].Why}
	}
	if !w.wrote {
		header()
	}
	if _, err := out.Write(last); err != nil {
		return err
	}
	v.result = resultOK
	return nil
}

// list answers with what is in a folder.
func (v *visit) list(ctx context.Context, w *response, path string) error {
	var lines bytes.Buffer
	_, end, err := v.filesEnd(ctx, &bounded{&lines, maxAnswer})
	if err != nil {
		return err
	}
	if err := v.refused(end); err != nil {
		return err
	}
	list := schemas.FileList{Path: path, Items: []schemas.FileInfo{}, More: end.More > 0}
	for line := range bytes.Lines(lines.Bytes()) {
		var f struct {
			schemas.FileInfo
			Mode uint32 `json:"mode"`
		}
		if err := schemas.Decode(line, &f); err != nil {
			return fmt.Errorf("read a list of files: %w", err)
		}
		f.FileInfo.Mode = fmt.Sprintf("%04o", f.Mode)
		list.Items = append(list.Items, f.FileInfo)
	}
	slices.SortFunc(list.Items, func(a, b schemas.FileInfo) int { return strings.Compare(a.Name, b.Name) })
	v.result = resultOK
	return answer(w, http.StatusOK, list)
}

// bounded takes no more than so many bytes.
type bounded struct {
	*bytes.Buffer
	most int
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.Len()+len(p) > b.most {
		return 0, errors.New("an agent tells too much")
	}
	return b.Buffer.Write(p)
}

// deleteFiles is DELETE /v1/tasks/{id}/files.
func (g *Gateway) deleteFiles(w *response, r *http.Request) error {
	id, q, path, err := filesPath(w, r)
	if err != nil {
		return err
	}
	recursive, err := q.flag("recursive")
	if err != nil {
		return err
	}
	v, err := g.visit(r, id, visitFiles, schemas.Open{Kind: schemas.SessionDelete, Files: &schemas.FilesOpen{Path: path, Recursive: recursive}})
	if err != nil {
		return err
	}
	defer v.end()
	_, end, err := v.filesEnd(r.Context(), io.Discard)
	if err != nil {
		return err
	}
	return v.done(w, path, end)
}
