package gateway

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
	"dayfly.dev/bus/session"
	"dayfly.dev/schemas"
)

// errOtherInstance says that the agent was started anew. The request has its instance now.
var errOtherInstance = errors.New("the agent was started anew")

// openMay is how long an agent may take to answer a request for a session.
const openMay = 15 * time.Second

// sessions opens sessions to tasks, over a connection of their own.
type sessions struct {
	id    string // of this process of the gateway
	last  atomic.Uint64
	ready chan struct{} // closed once the rest is there
	conn  *bus.Conn
	mux   *session.Mux
	key   schemas.SigningKey
}

func newSessions() *sessions {
	return &sessions{ready: make(chan struct{}), id: strings.ToLower(rand.Text())}
}

// run makes sessions possible until ctx ends. main is the connection of all else.
func (s *sessions) run(ctx context.Context, main *bus.Conn) error {
	var err error
	if s.conn, err = main.Sibling(ctx, "sessions"); err != nil {
		return err
	}
	defer s.conn.Close()
	if s.key, err = signingKey(ctx, s.conn); err != nil {
		return err
	}
	s.mux, err = session.NewMux(s.conn, session.Options{
		Receive: schemas.SessionsUp, Filter: schemas.SessionAddress("*", s.id, "*"), Send: schemas.SessionsDown,
	})
	if err != nil {
		return err
	}
	defer s.mux.Close()
	close(s.ready)
	<-ctx.Done()
	return nil
}

// signingKey gives the key of the site, and makes it if there is none.
func signingKey(ctx context.Context, conn *bus.Conn) (schemas.SigningKey, error) {
	seed := make([]byte, ed25519.SeedSize)
	_, _ = rand.Read(seed)
	private, err := firstOf(ctx, bus.NewTable(conn, schemas.BucketKeys, bus.JSON[schemas.SigningKey](nil)), schemas.KeySigning, schemas.SigningKey{Seed: seed})
	if err != nil {
		return private, err
	}
	public, err := private.Verifying()
	if err == nil {
		_, err = firstOf(ctx, bus.NewTable(conn, schemas.BucketKeys, bus.JSON[schemas.VerifyingKey](nil)), schemas.KeyVerifying, public)
	}
	return private, err
}

// firstOf gives what is at the key, which is v if nothing was. It tries until ctx ends.
func firstOf[T any](ctx context.Context, table *bus.Table[T], key string, v T) (T, error) {
	for {
		e, err := table.Create(ctx, key, v, rand.Text())
		if errors.Is(err, bus.ErrConflict) {
			e, err = table.Get(ctx, key)
		}
		if err == nil {
			return e.Value, nil
		}
		select {
		case <-ctx.Done():
			return e.Value, fmt.Errorf("keys of the site: %w", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// openSession asks the agent that runs the task for a session. It is the caller's to close.
func (g *Gateway) openSession(ctx context.Context, id schemas.TaskID, o schemas.Open) (*session.Stream, error) {
	stream, _, err := g.openExec(ctx, id, o)
	return stream, err
}

// openExec is openSession, and says which program the session is with. The view says where
// to ask. It may be behind: where the agent knows better the record is read, and what it says
// is tried once.
func (g *Gateway) openExec(ctx context.Context, id schemas.TaskID, o schemas.Open) (*session.Stream, schemas.ExecID, error) {
	if err := g.awaited(ctx, g.sessions.ready); err != nil {
		return nil, "", err
	}
	if err := g.locate(id, &o); err != nil {
		return nil, "", err
	}
	asked := o
	stream, exec, err := g.openAt(ctx, &o)
	if e, ok := err.(*schemas.Error); ok && e.Code == schemas.CodeStateConflict {
		within, cancel := context.WithTimeout(ctx, g.cfg.OpTimeout)
		_, failed := g.fetch(within, id)
		cancel()
		if failed == nil {
			failed = g.locate(id, &o)
		}
		if failed != nil {
			return nil, "", failed
		}
		if o.Worker != asked.Worker || o.Epoch != asked.Epoch {
			stream, exec, err = g.openAt(ctx, &o)
		}
	}
	return stream, exec, err
}

// openAt asks the agent that o names, which may have been started anew since.
func (g *Gateway) openAt(ctx context.Context, o *schemas.Open) (*session.Stream, schemas.ExecID, error) {
	stream, exec, err := g.sessions.open(ctx, o)
	if errors.Is(err, errOtherInstance) {
		if stream, exec, err = g.sessions.open(ctx, o); errors.Is(err, errOtherInstance) {
			err = workerAway(o.Task)
		}
	}
	return stream, exec, err
}

// locate says whom to ask for a session of the task.
func (g *Gateway) locate(id schemas.TaskID, o *schemas.Open) error {
	it, _, ok := g.tasks.Get(string(id))
	if !ok {
		return noTask()
	}
	if it.state != schemas.Running {
		return notRunning(id, it.state)
	}
	worker, epoch, _ := strings.Cut(it.holder, " ")
	beat, _, ok := g.fleet.beats.Get(worker)
	if !ok {
		return workerAway(id)
	}
	o.Task, o.Epoch, o.Worker, o.Instance = id, schemas.Epoch(epoch), schemas.WorkerID(worker), beat.Instance
	return nil
}

func notRunning(id schemas.TaskID, s schemas.State) *schemas.Error {
	return &schemas.Error{Status: http.StatusConflict, Code: schemas.CodeStateConflict, Task: id, State: s,
		Detail: fmt.Sprintf("the task is %s; only one that runs can be reached", s)}
}

func workerAway(id schemas.TaskID) *schemas.Error {
	return &schemas.Error{Status: http.StatusServiceUnavailable, Code: schemas.CodeWorkerAway, Task: id,
		Detail: "the task's worker cannot be reached at the moment; the task may run on, try again", RetryAfter: schemas.Duration(2 * time.Second)}
}

func (s *sessions) open(ctx context.Context, o *schemas.Open) (*session.Stream, schemas.ExecID, error) {
	o.Gateway, o.Number = s.id, s.last.Add(1)
	stream, err := s.mux.Open(o.Address()) // before the agent may send
	if err != nil {
		return nil, "", err
	}
	exec, err := s.ask(ctx, o)
	if err != nil {
		stream.Reset(session.CodeUnknown, "the session was not opened")
		return nil, "", err
	}
	return stream, exec, nil
}

// ask sends the request and waits for the answer.
func (s *sessions) ask(ctx context.Context, o *schemas.Open) (schemas.ExecID, error) {
	body, err := schemas.Encode(o)
	if err != nil {
		return "", err
	}
	signature, err := s.key.Sign(schemas.VerbOpen, body)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, openMay)
	defer cancel()
	m, err := s.conn.NC.RequestMsgWithContext(ctx, &nats.Msg{
		Subject: schemas.AgentSubject(o.Worker, schemas.VerbOpen), Header: nats.Header{schemas.HeaderSignature: {signature}}, Data: body,
	})
	if err != nil {
		if context.Cause(ctx) == context.Canceled {
			return "", context.Canceled
		}
		return "", workerAway(o.Task)
	}
	var answer schemas.Opened
	if err := schemas.Decode(m.Data, &answer); err != nil {
		return "", workerAway(o.Task)
	}
	if answer.Instance != "" {
		o.Instance = answer.Instance
		return "", errOtherInstance
	}
	if err := refusal(o.Task, answer); err != nil || answer.Exec == "" {
		return "", err
	}
	return schemas.ParseExecID(string(answer.Exec)) // a worker's word
}

// refusal is what a client hears of an agent's no.
func refusal(id schemas.TaskID, a schemas.Opened) error {
	e := &schemas.Error{Code: a.Code, Detail: a.Message, Task: id}
	switch a.Code {
	case "":
		return nil
	case schemas.CodeStateConflict:
		e.Status = http.StatusConflict
	case schemas.CodeNotFound:
		e.Status = http.StatusNotFound
	case schemas.CodeNoListener:
		e.Status = http.StatusBadGateway
	case schemas.CodeTooManyRequests:
		e.Status = http.StatusTooManyRequests
	case schemas.CodeInvalidValue, schemas.CodeNotAvailable:
		e.Status = http.StatusUnprocessableEntity
	default:
		return fmt.Errorf("the worker refused a session: %s", a.Code)
	}
	return e
}

// dial connects to a port of the task's own loopback interface.
func (g *Gateway) dial(ctx context.Context, id schemas.TaskID, port int) (net.Conn, error) {
	stream, err := g.openSession(ctx, id, schemas.Open{Kind: schemas.SessionDial, Port: port})
	if err != nil {
		return nil, err
	}
	return stream.Conn(), nil
}
