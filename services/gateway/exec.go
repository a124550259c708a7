package gateway

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"
	"unicode/utf8"

	"dayfly.dev/schemas"
)

// exec is POST /v1/tasks/{id}/exec.
func (g *Gateway) exec(w *response, r *http.Request) error {
	began := time.Now()
	id, err := taskID(r)
	if err != nil {
		return err
	}
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	req, err := schemas.ParseExecRequest(body)
	if err != nil {
		return err
	}
	v, err := g.visit(r, id, visitExec, schemas.Open{Kind: schemas.SessionExec, Exec: execOpen(req)})
	if err != nil {
		return err
	}
	defer v.end()
	if req.Background {
		v.result = resultOK
		w.Header().Set("Location", "/v1/tasks/"+string(id)+"/execs/"+string(v.exec))
		return answer(w, http.StatusCreated, schemas.ExecStarted{Exec: schemas.Exec{ID: v.exec, Command: req.Command, Background: true, Running: true}})
	}
	res, err := v.runExec(r.Context(), req.Stdin)
	if err != nil {
		return err
	}
	v.result = resultOK
	g.metrics.execs.Observe(time.Since(began).Seconds())
	return answer(w, http.StatusOK, res)
}

func execOpen(req schemas.ExecRequest) *schemas.ExecOpen {
	return &schemas.ExecOpen{Argv: req.Command, Env: req.Environment(), Workdir: req.Workdir, Timeout: req.Timeout, Background: req.Background, Stdin: req.Stdin != ""}
}

// runExec carries a program's streams to its end.
func (v *visit) runExec(ctx context.Context, stdin string) (res schemas.ExecResult, err error) {
	ctx, cancel := context.WithCancel(ctx)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		if stdin != "" && v.send(ctx, schemas.ChannelStdin, []byte(stdin)) == nil {
			_ = v.stream.SendEnd(ctx, schemas.ChannelStdin)
		}
	}()
	defer func() {
		cancel()
		<-sent
	}()
	var out [2]output
	for {
		f, err := v.stream.Receive(ctx)
		if err != nil {
			return res, v.broken(err)
		}
		if int(f.Channel) < len(out) {
			v.out.Add(float64(len(f.Data)))
			out[f.Channel].add(f.Data)
			continue
		}
		var c schemas.ExecControl
		if err := schemas.Decode(f.Data, &c); err != nil {
			return res, err
		}
		switch {
		case c.Lost != "":
			return res, &schemas.Error{Status: http.StatusConflict, Code: schemas.CodeStateConflict, Task: v.task, Detail: c.Lost}
		case c.Exit != nil:
			res = schemas.ExecResult{ExitCode: c.Exit.Code, Signal: c.Exit.Signal, TimedOut: c.Exit.TimedOut, Message: c.Exit.Message, Truncated: out[0].cut || out[1].cut}
			res.Stdout, res.StdoutBase64 = out[0].text()
			res.Stderr, res.StderrBase64 = out[1].text()
			return res, nil
		}
	}
}

// output is the beginning of what a program writes.
type output struct {
	buf []byte
	cut bool
}

func (o *output) add(p []byte) {
	n := min(len(p), schemas.MaxExecOutput-len(o.buf))
	o.buf = append(o.buf, p[:n]...)
	o.cut = o.cut || n < len(p)
}

func (o *output) text() (text, base64ed string) {
	b := o.buf
	if o.cut { // in the middle of a character, perhaps
		for i := 1; i < utf8.UTFMax && i <= len(b); i++ {
			if utf8.RuneStart(b[len(b)-i]) {
				if !utf8.FullRune(b[len(b)-i:]) {
					b = b[:len(b)-i]
				}
				break
			}
		}
	}
	return schemas.Text(b)
}

// execID takes the id of a program from the path.
func execID(r *http.Request) (schemas.ExecID, error) {
	id, err := schemas.ParseExecID(r.PathValue("exec"))
	if err != nil {
		return "", &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Detail: "there is no such program in this task"}
	}
	return id, nil
}

// listExecs is GET /v1/tasks/{id}/execs.
func (g *Gateway) listExecs(w *response, r *http.Request) error {
	list, err := g.execsOf(w, r, "")
	if err != nil {
		return err
	}
	return answer(w, http.StatusOK, list)
}

// getExec is GET /v1/tasks/{id}/execs/{exec}.
func (g *Gateway) getExec(w *response, r *http.Request) error {
	exec, err := execID(r)
	if err != nil {
		return err
	}
	list, err := g.execsOf(w, r, exec)
	if err != nil {
		return err
	}
	if len(list.Items) != 1 {
		return &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Detail: "there is no such program in this task"}
	}
	return answer(w, http.StatusOK, list.Items[0])
}

func (g *Gateway) execsOf(w *response, r *http.Request, exec schemas.ExecID) (list schemas.ExecList, err error) {
	id, err := taskID(r)
	if err != nil {
		return list, err
	}
	if _, err := parseQuery(w, r); err != nil {
		return list, err
	}
	v, err := g.visit(r, id, visitExec, schemas.Open{Kind: schemas.SessionExecs, Attach: &schemas.ExecAttach{ID: exec}})
	if err != nil {
		return list, err
	}
	defer v.end()
	ctx, cancel := g.onBus(r)
	defer cancel()
	b, err := v.all(ctx)
	if err != nil {
		return list, v.broken(err)
	}
	v.result = resultOK
	return list, schemas.Decode(b, &list)
}

// endExec is DELETE /v1/tasks/{id}/execs/{exec}.
func (g *Gateway) endExec(w *response, r *http.Request) error {
	id, err := taskID(r)
	if err != nil {
		return err
	}
	exec, err := execID(r)
	if err != nil {
		return err
	}
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	grace, err := q.duration("grace", execGrace, time.Hour)
	if err != nil {
		return err
	}
	v, err := g.visit(r, id, visitExec, schemas.Open{Kind: schemas.SessionEnd, Attach: &schemas.ExecAttach{ID: exec}, Grace: schemas.Duration(grace)})
	if err != nil {
		return err
	}
	defer v.end()
	v.result = resultOK
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// execGrace is between TERM and KILL.
const execGrace = 10 * time.Second

// maxAnswer is how long what an agent tells may be.
const maxAnswer = 8 << 20

// all reads channel 0 to the end of the stream.
func (v *visit) all(ctx context.Context) (b []byte, err error) {
	for {
		f, err := v.stream.Receive(ctx)
		switch {
		case err == io.EOF:
			return b, nil
		case err != nil:
			return nil, err
		case len(b)+len(f.Data) > maxAnswer:
			return nil, errors.New("an agent tells too much")
		}
		b = append(b, f.Data...)
	}
}
