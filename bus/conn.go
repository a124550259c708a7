package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
)

// Config of one connection. Each service has its own.
type Config struct {
	Name           string                     // shown by the server
	URL            string                     // nats://…, several with commas between; empty with InProcess
	InProcess      nats.InProcessConnProvider // of an embedded server
	User, Password string
	InboxPrefix    string // agents: schemas.AgentInbox(w)
	APIPrefix      string // agents: schemas.AgentAPIPrefix; "" for core services
	CA             string // file in PEM with who may have signed the server's certificate; then it must have one
	Logger         zerolog.Logger
}

// OpTimeout bounds one try of an operation whose context has no earlier deadline.
const OpTimeout = 5 * time.Second

// Conn is one service's connection. It reconnects for ever; what is sent while it
// is away fails with ErrUnavailable and is never stored up to be sent later.
type Conn struct {
	NC *nats.Conn
	JS jetstream.JetStream

	// Observe, when set before the connection is used, is told of each operation on a
	// bucket: get, create, replace, delete, and conflict for each lost compare-and-set.
	Observe func(bucket, op string, d time.Duration, err error)

	config    Config
	log       zerolog.Logger
	apiPrefix string // "$JS.API." or that of the agents
	core      bool   // not an agent
	replies   *replies
	clustered atomic.Bool
	closed    chan struct{}
	close     sync.Once

	mu           sync.Mutex
	lostAt       time.Time     // under mu: zero while connected
	away         time.Duration // under mu: in all, up to the last reconnect
	reconnected  chan struct{}
	onDisconnect map[*func()]struct{}
	views        map[*func() ViewStatus]struct{} // those that run
}

// Connect dials and waits for the server until ctx ends. Only a refused login is
// an error at once.
func Connect(ctx context.Context, c Config) (*Conn, error) {
	conn := &Conn{
		config: c, log: c.Logger, apiPrefix: c.APIPrefix + ".", core: c.APIPrefix == "",
		closed: make(chan struct{}), reconnected: make(chan struct{}),
		onDisconnect: map[*func()]struct{}{}, views: map[*func() ViewStatus]struct{}{},
	}
	if conn.core {
		conn.apiPrefix = jetstream.DefaultAPIPrefix
	}
	conn.replies = newReplies()
	opts := []nats.Option{
		nats.Name(c.Name),
		nats.MaxReconnects(-1),
		nats.ReconnectBufSize(-1), // a beat that is sent late is a lie
		nats.PingInterval(10 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.Timeout(2 * time.Second),
		nats.CustomReconnectDelay(func(int) time.Duration {
			return 30*time.Millisecond + rand.N(60*time.Millisecond)
		}),
		nats.IgnoreAuthErrorAbort(),
		nats.ErrorHandler(conn.onError),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			conn.replies.failAll(fmt.Errorf("%w: connection lost", ErrUnknownOutcome))
			conn.mu.Lock()
			conn.lostAt = time.Now()
			conn.mu.Unlock()
			conn.tellDisconnected()
			if err != nil { // nil: we closed it
				conn.log.Warn().Err(err).Msg("nats disconnected")
			}
		}),
		nats.ReconnectHandler(func(*nats.Conn) {
			conn.mu.Lock()
			conn.away, conn.lostAt = conn.awayLocked(), time.Time{}
			close(conn.reconnected)
			conn.reconnected = make(chan struct{})
			conn.mu.Unlock()
			conn.log.Info().Msg("nats reconnected")
		}),
		nats.ClosedHandler(func(*nats.Conn) {
			conn.replies.failAll(fmt.Errorf("%w: connection closed", ErrUnknownOutcome))
			close(conn.closed)
		}),
	}
	if c.User != "" {
		opts = append(opts, nats.UserInfo(c.User, c.Password))
	}
	if c.InboxPrefix != "" {
		opts = append(opts, nats.CustomInboxPrefix(c.InboxPrefix))
	}
	if c.CA != "" {
		opts = append(opts, nats.RootCAs(c.CA))
	}
	if c.InProcess != nil {
		opts = append(opts, nats.InProcessServer(c.InProcess))
	}
	waiting := false
	for {
		nc, err := nats.Connect(c.URL, opts...)
		if err == nil {
			conn.NC = nc
			break
		}
		if errors.Is(err, nats.ErrAuthorization) {
			return nil, fmt.Errorf("connect to nats as %q: %w", c.User, err)
		}
		if !waiting {
			waiting = true
			conn.log.Warn().Err(err).Msg("waiting for nats")
		}
		if !sleep(ctx, 30*time.Millisecond+rand.N(60*time.Millisecond)) {
			return nil, fmt.Errorf("connect to nats: %w: %w (last: %w)", ErrUnavailable, context.Cause(ctx), err)
		}
	}
	if err := conn.start(c.APIPrefix); err != nil {
		conn.NC.Close()
		<-conn.closed
		return nil, fmt.Errorf("connect to nats: %w", err)
	}
	return conn, nil
}

// Sibling makes another connection of the same user, for what shall not stand in the way
// of this one: what is much, or slow. It is the caller's to close.
func (c *Conn) Sibling(ctx context.Context, name string) (*Conn, error) {
	config := c.config
	config.Name += " " + name
	return Connect(ctx, config)
}

// Aside is a Sibling that is made when it is first needed.
type Aside struct {
	main *Conn
	name string
	turn chan struct{} // full while somebody looks at conn
	conn *Conn
}

// NewAside makes no connection yet. Call Close at the end.
func NewAside(main *Conn, name string) *Aside {
	return &Aside{main: main, name: name, turn: make(chan struct{}, 1)}
}

// Conn gives the connection. The first who asks makes it, and the others wait for that,
// each until its own ctx ends.
func (a *Aside) Conn(ctx context.Context) (*Conn, error) {
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if a.conn == nil {
		conn, err := a.main.Sibling(ctx, a.name)
		if err != nil {
			return nil, err
		}
		a.conn = conn
	}
	return a.conn, nil
}

// Close closes the connection if it was made. Stop what uses it first.
func (a *Aside) Close() {
	a.turn <- struct{}{}
	defer func() { <-a.turn }()
	if a.conn != nil {
		a.conn.Close()
	}
}

func (c *Conn) start(apiPrefix string) error {
	var err error
	if apiPrefix == "" {
		c.JS, err = jetstream.New(c.NC)
	} else {
		c.JS, err = jetstream.NewWithAPIPrefix(c.NC, apiPrefix)
	}
	if err != nil {
		return err
	}
	return c.replies.start(c.NC)
}

func (c *Conn) onError(_ *nats.Conn, sub *nats.Subscription, err error) {
	e := c.log.Warn().Err(err)
	if sub != nil {
		e = e.Str("subject", sub.Subject)
	}
	if errors.Is(err, nats.ErrPermissionViolation) {
		c.replies.failDenied(err)
		e.Msg("nats permission denied")
		return
	}
	e.Msg("nats error")
}

// Connected tells whether the server is there now.
func (c *Conn) Connected() bool { return c.NC.IsConnected() }

// Away is for how long in all the server was not there since Connect.
func (c *Conn) Away() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.awayLocked()
}

func (c *Conn) awayLocked() time.Duration {
	if c.lostAt.IsZero() {
		return c.away
	}
	return c.away + time.Since(c.lostAt)
}

// Clustered tells whether the server is one of several: then a replica that answers
// may be behind the leader of its stream, or ahead of it.
func (c *Conn) Clustered() bool {
	if c.NC.ConnectedClusterName() != "" { // which is not known while the server is away
		c.clustered.Store(true)
	}
	return c.clustered.Load()
}

// Reconnected gives a channel that is closed at the next reconnect. Take it before
// the work that a reconnect would undo.
func (c *Conn) Reconnected() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reconnected
}

// Reconnects is how often it has reconnected, or tried to. It counts before anything goes
// over the new connection, while Reconnected is closed some time later.
func (c *Conn) Reconnects() uint64 { return c.NC.Stats().Reconnects }

// Close drains the connection and waits until it is closed. Stop what uses it first.
// It may be called again.
func (c *Conn) Close() {
	c.close.Do(func() {
		if !c.NC.IsConnected() || c.NC.Drain() != nil {
			c.NC.Close()
		}
		<-c.closed
		c.replies.stop()
	})
}

// generation tells one connection to the server from the next.
func (c *Conn) generation() uint64 { return c.NC.Stats().Reconnects }

// still tells whether the connection of that generation is there. The client library tells
// of a loss and of a reconnect when it comes to it, which may be after the next connection
// is in use already.
func (c *Conn) still(generation uint64) bool {
	return c.generation() == generation && c.Connected()
}

// whenDisconnected calls fn, which must be quick, at each disconnect, until forget is
// called. It may come late: see still.
func (c *Conn) whenDisconnected(fn func()) (forget func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.onDisconnect[&fn] = struct{}{}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.onDisconnect, &fn)
	}
}

// ThisConnection gives a context that ends when the connection is lost, and has ended if
// it is away now: for what was concluded from what this connection showed, and may be
// untrue on the next one. Call cancel.
func (c *Conn) ThisConnection(ctx context.Context) (here context.Context, cancel context.CancelFunc) {
	here, end := context.WithCancelCause(ctx)
	lost := func() { end(fmt.Errorf("%w: connection lost", ErrUnavailable)) }
	forget := c.whenDisconnected(lost)
	if !c.NC.IsConnected() {
		lost()
	}
	return here, func() {
		forget()
		end(nil)
	}
}

func (c *Conn) tellDisconnected() {
	c.mu.Lock()
	fns := slices.Collect(maps.Keys(c.onDisconnect))
	c.mu.Unlock()
	for _, fn := range fns {
		(*fn)()
	}
}

// waitConnected returns at once while connected.
func (c *Conn) waitConnected(ctx context.Context) error {
	for {
		again := c.Reconnected()
		if c.NC.IsConnected() {
			return nil
		}
		select {
		case <-again:
		case <-c.closed:
			return fmt.Errorf("%w: connection closed", ErrUnavailable)
		case <-ctx.Done():
			return fmt.Errorf("%w: not connected: %w", ErrUnavailable, context.Cause(ctx))
		}
	}
}

// Publish stores one message in the stream that listens to subject and waits for
// the server's word. It waits for a server that is away and asks again where
// nobody took the message, until ctx or OpTimeout ends: ErrUnavailable then means
// that it was not stored. After ErrUnknownOutcome it may have been.
func (c *Conn) Publish(ctx context.Context, subject string, hdr nats.Header, data []byte) (seq uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, OpTimeout)
	defer cancel()
	seq, err = c.publish(ctx, subject, hdr, data)
	if err != nil {
		return 0, fmt.Errorf("publish %s: %w", subject, err)
	}
	return seq, nil
}

func (c *Conn) publish(ctx context.Context, subject string, hdr nats.Header, data []byte) (uint64, error) {
	return c.publishTry(ctx, OpTimeout, subject, hdr, data)
}

func (c *Conn) publishTry(ctx context.Context, try time.Duration, subject string, hdr nats.Header, data []byte) (uint64, error) {
	m, err := c.request(ctx, try, subject, hdr, data)
	if err != nil {
		return 0, err
	}
	return parsePubAck(m)
}

// PublishAsync stores one message without waiting. done, which may be nil, is called
// exactly once with nil or the mapped error: from the goroutine that receives the
// answers, so it must be quick, or before PublishAsync returns where the message
// could not be sent. When too many are under way it waits for a fifth of a second
// and then gives up with ErrUnavailable. data and hdr must not change afterwards.
func (c *Conn) PublishAsync(subject string, hdr nats.Header, data []byte, done func(error)) {
	if done == nil {
		done = func(error) {}
	}
	if !c.replies.acquire() {
		done(fmt.Errorf("publish %s: %w: too many under way", subject, ErrUnavailable))
		return
	}
	c.replies.send(subject, hdr, data, time.Now().Add(OpTimeout), func(m *nats.Msg, err error) {
		c.replies.release()
		if err == nil {
			_, err = parsePubAck(m)
		}
		if err != nil {
			err = fmt.Errorf("publish %s: %w", subject, err)
		}
		done(err)
	})
}

// request sends one message and waits for one answer. It waits for the connection
// and repeats while nobody listens, until ctx ends. An answer is waited for no longer
// than try.
func (c *Conn) request(ctx context.Context, try time.Duration, subject string, hdr nats.Header, data []byte) (*nats.Msg, error) {
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		if err := c.waitConnected(ctx); err != nil {
			return nil, err
		}
		askCtx, cancel := context.WithTimeout(ctx, try)
		m, err := c.replies.ask(askCtx, subject, hdr, data)
		cancel()
		if !errors.Is(err, ErrUnavailable) || c.NC.IsClosed() {
			return m, err
		}
		if !sleep(ctx, pause) {
			return nil, err
		}
	}
}

func parsePubAck(m *nats.Msg) (uint64, error) {
	var ack struct {
		Error  *jetstream.APIError `json:"error"`
		Stream string              `json:"stream"`
		Seq    uint64              `json:"seq"`
	}
	if err := json.Unmarshal(m.Data, &ack); err != nil {
		return 0, fmt.Errorf("%w: not an acknowledgement: %w", ErrUnknownOutcome, err)
	}
	if ack.Error != nil {
		return 0, apiError(ack.Error)
	}
	if ack.Stream == "" {
		return 0, fmt.Errorf("%w: not an acknowledgement", ErrUnknownOutcome)
	}
	return ack.Seq, nil
}

// sleep reports whether d passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
