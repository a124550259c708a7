package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/session"
	"dayfly.dev/schemas"
)

// openMay is how long the first step of a session may take, such as connecting to a port.
const openMay = 10 * time.Second

// errOtherInstance says that the request was for another process than this.
var errOtherInstance = errors.New("the agent of this worker was started anew")

// sessions serves what gateways ask of this worker's tasks, over a connection of its own.
type sessions struct {
	agent *Agent
	conn  *bus.Conn
	mux   *session.Mux
	log   zerolog.Logger
	keys  *bus.Table[schemas.VerifyingKey]

	serving sync.WaitGroup

	reading sync.Mutex
	asked   time.Time // under reading: when the key was last read

	mu       sync.Mutex
	key      schemas.VerifyingKey          // under mu: zero until one was read
	gateways map[string]*schemas.Numbers   // under mu
	open     int                           // under mu: sessions
	execs    map[schemas.ExecID]*execution // under mu
	mains    map[Attempt]*execution        // under mu: of the tasks' own processes
}

// serveSessions answers gateways until ctx ends.
func (a *Agent) serveSessions(ctx context.Context) error {
	conn, err := a.conn.Sibling(ctx, "sessions")
	if err != nil {
		return err
	}
	defer conn.Close()
	mux, err := session.NewMux(conn, session.Options{
		Receive: schemas.SessionsDown, Filter: schemas.SessionAddress(a.cfg.Worker, "*", "*"), Send: schemas.SessionsUp,
	})
	if err != nil {
		return err
	}
	defer mux.Close()
	s := &sessions{
		agent: a, conn: conn, mux: mux, log: a.log,
		keys:     bus.NewTable(conn, schemas.BucketKeys, bus.JSON[schemas.VerifyingKey](nil)),
		gateways: map[string]*schemas.Numbers{},
		execs:    map[schemas.ExecID]*execution{},
		mains:    map[Attempt]*execution{},
	}
	defer s.serving.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	requests := make(chan *nats.Msg, a.cfg.MaxSessions)
	sub, err := conn.NC.ChanSubscribe(schemas.AgentSubject(a.cfg.Worker, schemas.VerbOpen), requests)
	if err != nil {
		return fmt.Errorf("listen for gateways: %w", err)
	}
	defer sub.Unsubscribe()
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-requests:
			s.serving.Go(func() { s.request(ctx, m) })
		}
	}
}

// request answers one request for a session, and then serves the session.
func (s *sessions) request(ctx context.Context, m *nats.Msg) {
	answer := schemas.Opened{}
	serve, err := s.begin(ctx, m, &answer)
	var refused *schemas.Error
	switch {
	case err == nil:
	case errors.Is(err, errOtherInstance):
		_, answer.Instance = s.agent.running("", "")
	default:
		if !errors.As(err, &refused) {
			s.log.Warn().Err(err).Msg("open a session")
			refused = &schemas.Error{Code: schemas.CodeInternal, Detail: "the worker could not do it"}
		}
		answer.Code, answer.Message = refused.Code, refused.Detail
		s.agent.metrics.refused.WithLabelValues(string(refused.Code)).Inc()
	}
	b, err := schemas.Encode(answer)
	if err == nil {
		err = m.Respond(b)
	}
	if err != nil {
		s.log.Warn().Err(err).Msg("answer a gateway")
	}
	if serve != nil {
		serve()
		s.done()
	}
}

// begin checks a request and takes the first step of what it asks for. What it returns
// serves the session; its stream is there already.
func (s *sessions) begin(ctx context.Context, m *nats.Msg, answer *schemas.Opened) (func(), error) {
	var o schemas.Open
	if err := s.verify(ctx, m); err != nil {
		return nil, err
	}
	if err := schemas.Decode(m.Data, &o); err != nil {
		return nil, fmt.Errorf("read the request: %w", err)
	}
	t, err := s.admit(o)
	if err != nil {
		return nil, err
	}
	var serve func()
	stream, err := s.mux.Open(o.Address()) // before the gateway may ask after it
	if err == nil {
		serve, err = s.step(ctx, t, o, stream, answer)
		if err != nil {
			stream.Reset(session.CodeUnknown, "the session was refused")
		}
	}
	if err != nil {
		s.done()
		return nil, err
	}
	s.agent.metrics.begun.WithLabelValues(string(o.Kind)).Inc()
	open := s.agent.metrics.sessions.WithLabelValues(string(o.Kind))
	open.Inc()
	return func() {
		defer open.Dec()
		serve()
	}, nil
}

// step takes the first step of a session.
func (s *sessions) step(ctx context.Context, t Attempt, o schemas.Open, stream *session.Stream, answer *schemas.Opened) (serve func(), err error) {
	within, cancel := context.WithTimeout(ctx, openMay)
	defer cancel()
	attach := schemas.ExecAttach{}
	if o.Attach != nil {
		attach = *o.Attach
	}
	switch {
	case o.Kind == schemas.SessionDial:
		return s.dial(ctx, t, o, stream)
	case o.Kind == schemas.SessionExec && o.Exec != nil && o.Exec.Background:
		answer.Exec, err = s.launch(within, t, *o.Exec)
		return func() { _ = stream.Close() }, err
	case o.Kind == schemas.SessionExec && o.Exec != nil:
		e, err := s.exec(ctx, within, t, *o.Exec)
		if err != nil {
			return nil, err
		}
		answer.Exec = e.id
		return func() { e.serve(ctx, stream, attach) }, nil
	case o.Kind == schemas.SessionAttach:
		e, err := s.find(t, attach.ID)
		if err != nil {
			return nil, err
		}
		answer.Exec = e.id
		return func() { e.serve(ctx, stream, attach) }, nil
	case o.Kind == schemas.SessionMain:
		e, err := s.main(ctx, t)
		if err != nil {
			return nil, err
		}
		return func() { e.serve(ctx, stream, attach) }, nil
	case o.Kind == schemas.SessionExecs:
		list, err := s.list(t, attach.ID)
		return func() { s.send(ctx, stream, list) }, err
	case o.Kind == schemas.SessionEnd:
		err := s.end(t, attach.ID, o.Grace.Std())
		return func() { _ = stream.Close() }, err
	case o.Files != nil:
		return s.files(ctx, within, t, o, stream)
	}
	return nil, refuse(schemas.CodeNotAvailable, "this worker's agent is too old for that; upgrade it")
}

// send sends a value in as many frames as it takes, and closes the stream.
func (s *sessions) send(ctx context.Context, stream *session.Stream, v any) {
	b, err := schemas.Encode(v)
	for err == nil && len(b) > 0 {
		n := min(len(b), session.MaxFrame)
		err = stream.Send(ctx, 0, b[:n])
		b = b[n:]
	}
	if err != nil {
		stream.Reset(session.CodeBroken, "the answer could not be sent")
		return
	}
	_ = stream.Close()
}

// unable is what a gateway hears of an error of an Attempt.
func unable(err error) error {
	var fault *StartError
	switch {
	case errors.Is(err, ErrAway):
		return refuse(schemas.CodeStateConflict, "%s", err)
	case errors.Is(err, ErrBusy):
		return refuse(schemas.CodeTooManyRequests, "%s", err)
	case errors.As(err, &fault):
		return refuse(schemas.CodeInvalidValue, "%s", fault.Message)
	}
	return err
}

func (s *sessions) done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
}

// verify checks the signature. A key that does not fit may be of a store that was made
// anew, so it is read again, but not more often than each second. Whoever comes meanwhile
// waits for it.
func (s *sessions) verify(ctx context.Context, m *nats.Msg) error {
	signature := m.Header.Get(schemas.HeaderSignature)
	fits := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.key.Verify(schemas.VerbOpen, m.Data, signature) == nil
	}
	if fits() {
		return nil
	}
	s.reading.Lock()
	defer s.reading.Unlock()
	if fits() {
		return nil
	}
	if time.Since(s.asked) <= time.Second {
		return refuse(schemas.CodeNotAllowed, "%s", schemas.ErrSignature)
	}
	e, err := s.keys.Get(ctx, schemas.KeyVerifying)
	if err != nil {
		return fmt.Errorf("read the key of the gateways: %w", err)
	}
	s.asked = time.Now()
	s.mu.Lock()
	s.key = e.Value
	s.mu.Unlock()
	if !fits() {
		return refuse(schemas.CodeNotAllowed, "%s", schemas.ErrSignature)
	}
	return nil
}

func refuse(code schemas.Code, format string, args ...any) error {
	return &schemas.Error{Code: code, Detail: fmt.Sprintf(format, args...)}
}

// admit lets a request through once, for a task whose process runs here. It counts it.
func (s *sessions) admit(o schemas.Open) (Attempt, error) {
	t, instance := s.agent.running(o.Task, o.Epoch)
	s.mu.Lock()
	defer s.mu.Unlock()
	if o.Worker != s.agent.cfg.Worker || o.Instance != instance {
		return nil, errOtherInstance
	}
	seen := s.gateways[o.Gateway]
	if seen == nil {
		seen = &schemas.Numbers{}
		s.gateways[o.Gateway] = seen
	}
	switch {
	case !seen.First(o.Number):
		return nil, refuse(schemas.CodeNotAllowed, "this request came before")
	case t == nil:
		return nil, refuse(schemas.CodeStateConflict, "the task's process does not run")
	case s.open >= s.agent.cfg.MaxSessions:
		return nil, refuse(schemas.CodeTooManyRequests, "%d sessions are open on this worker", s.open)
	}
	s.open++
	return t, nil
}

// running gives the attempt if its process was started and is not known to have ended,
// and the instance of this agent.
func (a *Agent) running(id schemas.TaskID, epoch schemas.Epoch) (Attempt, string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	instance := a.beat.Value.Instance
	t := a.live[id]
	if t == nil || t.Epoch != epoch {
		return nil, instance
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.found == nil {
		return nil, instance
	}
	select {
	case <-t.found.Done():
		return nil, instance
	default:
		return t.found, instance
	}
}

// dial joins the session to a port of the task.
func (s *sessions) dial(ctx context.Context, t Attempt, o schemas.Open, stream *session.Stream) (func(), error) {
	if o.Port < 1 || o.Port > 65535 {
		return nil, refuse(schemas.CodeInvalidValue, "a port is 1 to 65535")
	}
	within, cancel := context.WithTimeout(ctx, openMay)
	defer cancel()
	c, err := t.Dial(within, o.Port)
	switch {
	case errors.Is(err, ErrAway):
		return nil, refuse(schemas.CodeStateConflict, "%s", err)
	case err != nil:
		return nil, refuse(schemas.CodeNoListener, "nobody listens on port %d in the task, or it does not answer", o.Port)
	}
	return func() { session.Join(ctx, stream, c) }, nil
}
