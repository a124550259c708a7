package session_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/bus/session"
	"dayfly.dev/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const worker = schemas.WorkerID("w1")

// sides are the two ends: a gateway's, and that of an agent in its own account.
type sides struct {
	server          *natsd.Server
	core, agentConn *bus.Conn
	gateway, agent  *session.Mux
	n               uint64
}

func setup(t testing.TB, o session.Options) *sides {
	t.Helper()
	s := natstest.Server(t)
	x := &sides{server: s, core: natstest.Connect(t, s), agentConn: natstest.ConnectAgent(t, s, worker)}
	up, down := o, o
	up.Receive, up.Filter, up.Send = schemas.SessionsUp, schemas.SessionAddress("*", "g1", "*"), schemas.SessionsDown
	down.Receive, down.Filter, down.Send = schemas.SessionsDown, schemas.SessionAddress(worker, "*", "*"), schemas.SessionsUp
	x.gateway, x.agent = mux(t, x.core, up), mux(t, x.agentConn, down)
	return x
}

func mux(t testing.TB, c *bus.Conn, o session.Options) *session.Mux {
	t.Helper()
	m, err := session.NewMux(c, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	if err := c.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	return m
}

// open gives both sides of a new stream.
func (x *sides) open(t testing.TB) (gateway, agent *session.Stream) {
	t.Helper()
	x.n++
	address := schemas.SessionAddress(worker, "g1", strconv.FormatUint(x.n, 10))
	a, err := x.agent.Open(address)
	if err != nil {
		t.Fatal(err)
	}
	g, err := x.gateway.Open(address)
	if err != nil {
		t.Fatal(err)
	}
	return g, a
}

func noise(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

// exchange sends bytes both ways at once, with half-closes, and compares.
func exchange(t *testing.T, a, b *session.Stream, n int, meanwhile func()) {
	t.Helper()
	one, two := noise(t, n), noise(t, n)
	var all sync.WaitGroup
	carry := func(from, to *session.Conn, what []byte) {
		all.Go(func() {
			if _, err := from.Write(what); err != nil {
				t.Errorf("write: %v", err)
			}
			if err := from.CloseWrite(); err != nil {
				t.Errorf("close write: %v", err)
			}
		})
		all.Go(func() {
			got, err := io.ReadAll(to)
			if err != nil || sha256.Sum256(got) != sha256.Sum256(what) {
				t.Errorf("%d of %d bytes arrived, same so far: %v, error: %v", len(got), len(what), bytes.HasPrefix(what, got), err)
			}
		})
	}
	ca, cb := a.Conn(), b.Conn()
	carry(ca, cb, one)
	carry(cb, ca, two)
	meanwhile()
	all.Wait()
	_ = ca.Close()
	_ = cb.Close()
	<-a.Done()
	<-b.Done()
}

func TestBytesGoBothWaysAcrossAccounts(t *testing.T) {
	x := setup(t, session.Options{})
	g, a := x.open(t)
	exchange(t, g, a, 20<<20, func() {})
	if n := x.gateway.Len() + x.agent.Len(); n != 0 {
		t.Errorf("%d streams are left", n)
	}
}

func TestAStreamOutlivesTheServer(t *testing.T) {
	x := setup(t, session.Options{})
	g, a := x.open(t)
	exchange(t, g, a, 30<<20, func() {
		for range 3 {
			natstest.Restart(t, x.server)
		}
	})
}

func TestAStreamOutlivesTheLossOfOneConnection(t *testing.T) {
	x := setup(t, session.Options{})
	g, a := x.open(t)
	exchange(t, g, a, 30<<20, func() {
		for range 3 {
			again := x.agentConn.Reconnected()
			id, err := x.agentConn.NC.GetClientID()
			if err == nil {
				err = x.server.NATS().DisconnectClientByID(id)
			}
			if err != nil {
				t.Error(err)
				return
			}
			<-again
		}
	})
}

func TestAReaderThatDoesNotReadHoldsUpNobodyElse(t *testing.T) {
	x := setup(t, session.Options{Window: 256 << 10})
	slow, theirs := x.open(t)
	ctx, cancel := context.WithCancel(t.Context())
	sent := make(chan int)
	go func() {
		n := 0
		for theirs.Send(ctx, 0, make([]byte, 32<<10)) == nil {
			n++
		}
		sent <- n
	}()
	g, a := x.open(t)
	exchange(t, g, a, 10<<20, func() {})
	cancel()
	if n := <-sent; n < 1 || n > 8 {
		t.Errorf("%d frames of 32 KiB went into a window of 256 KiB", n)
	}
	slow.Reset("test", "no more")
	<-theirs.Done()
	var reset *session.ResetError
	if err := theirs.Send(t.Context(), 0, nil); !errors.As(err, &reset) || reset.Code != "test" || reset.Message != "no more" {
		t.Errorf("sending after a reset: %v", err)
	}
	if err := slow.Send(t.Context(), 0, nil); !errors.Is(err, session.ErrClosed) {
		t.Errorf("sending after the own reset: %v", err)
	}
}

func TestWhatWasSentBeforeCloseArrives(t *testing.T) {
	x := setup(t, session.Options{})
	g, a := x.open(t)
	for i := range 100 {
		if err := a.Send(t.Context(), byte(i), []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.SendEnd(t.Context(), 100); err != nil {
		t.Fatal(err)
	}
	_ = a.Close()
	if err := a.Send(t.Context(), 0, nil); !errors.Is(err, session.ErrClosed) {
		t.Errorf("sending after Close: %v", err)
	}
	for i := range 101 {
		f, err := g.Receive(t.Context())
		if err != nil || f.Channel != byte(i) || f.End != (i == 100) || !f.End && !bytes.Equal(f.Data, []byte{byte(i)}) {
			t.Fatalf("frame %d: %v, %v", i, f, err)
		}
	}
	if _, err := g.Receive(t.Context()); !errors.Is(err, io.EOF) {
		t.Errorf("after the last frame: %v", err)
	}
	_ = g.Close()
	<-g.Done()
	<-a.Done()
}

func TestAStreamThatTheOtherProcessDoesNotKnowEnds(t *testing.T) {
	x := setup(t, session.Options{})
	g, err := x.gateway.Open(schemas.SessionAddress(worker, "g1", "99"))
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Send(t.Context(), 0, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	<-g.Done()
	var reset *session.ResetError
	if _, err := g.Receive(t.Context()); !errors.As(err, &reset) || reset.Code != session.CodeUnknown {
		t.Errorf("got %v", err)
	}
}

func TestDeadlines(t *testing.T) {
	x := setup(t, session.Options{})
	g, a := x.open(t)
	c := g.Conn()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	_ = c.SetDeadline(time.Now().Add(-time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	_ = c.SetDeadline(time.Time{})
	_ = a.Send(t.Context(), 0, []byte("x"))
	if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("got %d, %v", n, err)
	}
}

func TestAnAgentReachesNoSessionOfAnother(t *testing.T) {
	x := setup(t, session.Options{})
	g, _ := x.open(t)
	other := natstest.ConnectAgent(t, x.server, "w2")
	if err := other.NC.Publish(schemas.SessionsUp+g.Address(), []byte{5, 'x', 0}); err != nil {
		t.Fatal(err)
	}
	sub, err := other.NC.SubscribeSync(schemas.SessionsDown + g.Address())
	if err != nil {
		t.Fatal(err)
	}
	if err := other.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := g.Send(t.Context(), 0, []byte("secret")); err != nil {
		t.Fatal(err)
	}
	if err := x.core.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := other.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := sub.Pending(); n != 0 {
		t.Error("another worker heard it")
	}
	select {
	case <-g.Done():
		t.Error("another worker reset it")
	default:
	}
}

func TestNothingIsLeftOfAThousandStreams(t *testing.T) {
	x := setup(t, session.Options{})
	for range 20 {
		g, a := x.open(t)
		exchange(t, g, a, 10, func() {})
	}
	goroutines, subs := runtime.NumGoroutine(), x.server.NATS().NumSubscriptions()
	for range 1000 {
		g, a := x.open(t)
		if err := g.Send(t.Context(), 0, []byte("x")); err != nil {
			t.Fatal(err)
		}
		if x.n%2 == 0 {
			a.Reset("test", "")
		} else if _, err := a.Receive(t.Context()); err != nil {
			t.Fatal(err)
		}
		_ = g.Close()
		_ = a.Close()
		<-g.Done()
		<-a.Done()
	}
	if n := runtime.NumGoroutine(); n > goroutines+2 {
		t.Errorf("%d goroutines, %d before", n, goroutines)
	}
	if n := x.server.NATS().NumSubscriptions(); n != subs {
		t.Errorf("%d subscriptions, %d before", n, subs)
	}
	if n := x.gateway.Len() + x.agent.Len(); n != 0 {
		t.Errorf("%d streams are left", n)
	}
}

func BenchmarkThroughput(b *testing.B) {
	x := setup(b, session.Options{})
	g, a := x.open(b)
	buf := make([]byte, 1<<20)
	b.SetBytes(int64(len(buf)))
	go func() {
		for range b.N {
			_, _ = a.Conn().Write(buf)
		}
		_ = a.SendEnd(context.Background(), 0)
	}()
	if n, err := io.Copy(io.Discard, g.Conn()); err != nil || n != int64(b.N)<<20 {
		b.Fatal(n, err)
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	x := setup(b, session.Options{})
	g, a := x.open(b)
	gc, ac := g.Conn(), a.Conn()
	go func() { _, _ = io.Copy(ac, ac) }()
	buf := make([]byte, 64)
	for range b.N {
		if _, err := gc.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(gc, buf); err != nil {
			b.Fatal(err)
		}
	}
	_ = g.Close()
	_ = a.Close()
}
