package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"sync"
	"time"

	"dayfly.dev/bus/session"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/files"
)

// fileOps are the sessions with files.
var fileOps = map[schemas.SessionKind]files.Op{
	schemas.SessionPut: files.Put, schemas.SessionGet: files.Get, schemas.SessionList: files.List, schemas.SessionDelete: files.Delete,
}

// files starts what reads and writes the task's files.
func (s *sessions) files(ctx, within context.Context, t Attempt, o schemas.Open, stream *session.Stream) (func(), error) {
	op, ok := fileOps[o.Kind]
	if !ok {
		return nil, refuse(schemas.CodeNotAvailable, "this worker's agent is too old for that; upgrade it")
	}
	if op == files.Put && !o.Files.Archive {
		op = files.Write
	}
	r := files.Request{Op: op, Path: o.Files.Path, Mode: o.Files.Mode, Entries: o.Files.Entries, Bare: !o.Files.Recursive}
	p, err := t.Files(within, r)
	if err != nil {
		return nil, unable(err)
	}
	return func() { serveFiles(ctx, stream, p) }, nil
}

// maxResult is how long the last word of the program may be: it runs with the task's rights.
const maxResult = 64 << 10

// serveFiles carries bytes between a session and the program, and then its last word.
func serveFiles(ctx context.Context, stream *session.Stream, p Foreground) {
	defer p.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { p.Stop(0) })
	defer stop()
	gone := make(chan struct{}) // the client left, or broke off
	var input, output sync.WaitGroup
	input.Go(func() {
		err := fillFiles(ctx, stream, p)
		if err == nil { // only a close may follow
			for err == nil {
				_, err = stream.Receive(ctx)
			}
		}
		if ctx.Err() == nil {
			close(gone)
		}
	})
	var result []byte
	output.Go(func() { result, _ = io.ReadAll(io.LimitReader(p.Stderr(), maxResult)) })
	sent := make(chan error, 1)
	go func() { sent <- drainFiles(ctx, stream, p.Stdout()) }()
	var err error
	select {
	case err = <-sent:
	case <-gone:
		abandonFiles(p)
		cancel()
		err = <-sent
	case <-stream.Done(): // also while nobody receives, since the program does not read
		abandonFiles(p)
		cancel()
		err = <-sent
	}
	if err != nil { // what it still writes is nobody's
		abandonFiles(p)
	}
	<-p.Done()
	output.Wait()
	if err == nil {
		err = endFiles(ctx, stream, result)
	}
	if err == nil {
		_ = stream.Close()
		select { // it has come once the client closes, too
		case <-gone:
		case <-stream.Done():
		case <-ctx.Done():
		}
	} else {
		stream.Reset(session.CodeBroken, "the files cannot be carried on")
	}
	cancel()
	input.Wait()
}

// tidyWithin is how long a program whose input was cut off may take to remove what it has
// gathered.
const tidyWithin = 5 * time.Second

// abandonFiles ends a program that nobody waits for. One that gathers files first removes
// them: it is told, or terminated, and a KILL at once would leave them in the task.
func abandonFiles(p Foreground) {
	if _, gathers := p.(interface{ CutOff() error }); gathers {
		p.Stop(tidyWithin)
		return
	}
	p.Stop(0)
}

// fillFiles gives the program what comes, to its end. Where that does not come, nothing
// is to change.
func fillFiles(ctx context.Context, stream *session.Stream, p Foreground) error {
	in := p.Stdin()
	for {
		f, err := stream.Receive(ctx)
		if err != nil {
			if cut, ok := p.(interface{ CutOff() error }); ok {
				_ = cut.CutOff()
			}
			return err
		}
		if f.Channel != 0 {
			continue
		}
		if len(f.Data) > 0 && in != nil {
			if _, err := in.Write(f.Data); err != nil {
				in = nil // it says why
			}
		}
		if f.End {
			if in != nil {
				_ = in.Close()
			}
			return nil
		}
	}
}

func drainFiles(ctx context.Context, stream *session.Stream, out io.Reader) error {
	b := make([]byte, session.MaxFrame)
	for {
		n, err := out.Read(b)
		if n > 0 {
			if err := stream.Send(ctx, 0, b[:n]); err != nil {
				return err
			}
		}
		if err != nil {
			return nil // whether it was all, its last word says
		}
	}
}

// endFiles says how it ended.
func endFiles(ctx context.Context, stream *session.Stream, result []byte) error {
	var res files.Result
	if err := json.Unmarshal(result, &res); err != nil {
		res = files.Result{Code: files.Failed, Message: "it was broken off: the task ended, or has no memory or process to spare"}
	}
	end := schemas.FilesEnd{Code: filesCode(res.Code), Message: res.Message, Entries: res.Entries, Bytes: res.Bytes, More: res.More}
	for _, k := range res.Skipped {
		end.Skipped = append(end.Skipped, schemas.FileSkipped(k))
	}
	b, err := schemas.Encode(end)
	if err == nil && len(b) > session.MaxFrame {
		err = errors.New("the last word is too long")
	}
	if err == nil {
		err = stream.Send(ctx, schemas.ChannelControl, b)
	}
	return err
}

// filesCode is what the API calls a code of package files.
func filesCode(c files.Code) schemas.Code {
	switch c {
	case "":
		return ""
	case files.NotFound:
		return schemas.CodeNotFound
	case files.ReadOnly, files.Permission:
		return schemas.CodePermission
	case files.NoSpace:
		return schemas.CodeNoSpace
	case files.TooMany, files.TooLarge, files.TooDeep:
		return schemas.CodeTooLarge
	case files.BadArchive:
		return schemas.CodeBadArchive
	case files.CutOff:
		return schemas.CodeCutOff
	}
	return schemas.CodeInvalidValue
}
