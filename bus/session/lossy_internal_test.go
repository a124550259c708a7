package session

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// wire joins two Muxes in virtual time, in order, and loses what it is told to lose.
type wire struct {
	mu    sync.Mutex
	other *Mux
	lose  func() bool // under mu
	queue chan func()
	again chan struct{}
}

// pair gives two Muxes that talk over wires; stop ends all of it.
func pair(o Options, lose func() bool) (a, b *Mux, stop func()) {
	o.Send, o.Receive = "s.", "s."
	var ends sync.WaitGroup
	quit := make(chan struct{})
	make1 := func() (*wire, *Mux) {
		w := &wire{lose: lose, queue: make(chan func(), 1<<16), again: make(chan struct{})}
		m := newMux(o, w.send, func() <-chan struct{} { return w.again })
		ends.Go(func() {
			for {
				select {
				case deliver := <-w.queue:
					deliver()
				case <-quit:
					return
				}
			}
		})
		return w, m
	}
	wa, a := make1()
	wb, b := make1()
	wa.other, wb.other = b, a
	a.ends.Go(a.run)
	b.ends.Go(b.run)
	return a, b, func() {
		a.Close()
		b.Close()
		close(quit)
		ends.Wait()
	}
}

func (w *wire) send(subject string, data []byte) error {
	w.mu.Lock()
	lost := w.lose()
	w.mu.Unlock()
	if lost {
		return errors.New("lost")
	}
	data = bytes.Clone(data)
	w.queue <- func() { w.other.receive(strings.TrimPrefix(subject, "s."), data) }
	return nil
}

func open(t *testing.T, a, b *Mux) (*Stream, *Stream) {
	t.Helper()
	x, err := a.Open("1")
	if err != nil {
		t.Fatal(err)
	}
	y, err := b.Open("1")
	if err != nil {
		t.Fatal(err)
	}
	return x, y
}

func TestNothingIsLostOnALossyWire(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(seed, 0))
				var mu sync.Mutex
				bad := 0 // messages in a row that are lost, as with a connection that is away
				a, b, stop := pair(Options{Window: 100 << 10}, func() bool {
					mu.Lock()
					defer mu.Unlock()
					if bad == 0 && r.IntN(30) == 0 {
						bad = r.IntN(12)
					}
					bad = max(bad-1, 0)
					return bad > 0
				})
				defer stop()
				x, y := open(t, a, b)
				var all sync.WaitGroup
				text := rand.New(rand.NewPCG(seed, 1))
				for _, way := range [][2]*Conn{{x.Conn(), y.Conn()}, {y.Conn(), x.Conn()}} {
					what := make([]byte, 1+text.IntN(2<<20))
					for i := range what {
						what[i] = byte(text.Uint32())
					}
					all.Go(func() {
						for rest := what; len(rest) > 0; {
							n := min(len(rest), 1+len(what)/17)
							if _, err := way[0].Write(rest[:n]); err != nil {
								t.Error(err)
							}
							rest = rest[n:]
						}
						if err := way[0].CloseWrite(); err != nil {
							t.Error(err)
						}
					})
					all.Go(func() {
						got, err := io.ReadAll(way[1])
						if err != nil || !bytes.Equal(got, what) {
							t.Errorf("%d of %d bytes arrived, same so far: %v, error: %v", len(got), len(what), bytes.HasPrefix(what, got), err)
						}
					})
				}
				all.Wait()
				_ = x.Close()
				_ = y.Close()
				<-x.Done()
				<-y.Done()
			})
		})
	}
}

func TestIdleStreamsStayAndASilentSideIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		away := false
		a, b, stop := pair(Options{}, func() bool {
			mu.Lock()
			defer mu.Unlock()
			return away
		})
		defer stop()
		x, y := open(t, a, b)
		time.Sleep(time.Hour)
		if err := y.Send(t.Context(), 7, []byte("last words")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		mu.Lock()
		away = true
		mu.Unlock()
		began := time.Now()
		<-x.Done()
		if took := time.Since(began); took < 30*time.Second || took > 36*time.Second {
			t.Errorf("given up after %v", took)
		}
		if f, err := x.Receive(t.Context()); err != nil || string(f.Data) != "last words" || f.Channel != 7 {
			t.Errorf("what had come is %v, %v", f, err)
		}
		if _, err := x.Receive(t.Context()); !errors.Is(err, ErrGone) {
			t.Errorf("got %v", err)
		}
		<-y.Done()
	})
}

func TestASideThatGoesOnAfterTheOtherClosedIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, stop := pair(Options{}, func() bool { return false })
		defer stop()
		x, y := open(t, a, b)
		_ = x.Close()
		var err error
		for err == nil {
			err = y.Send(context.Background(), 0, make([]byte, MaxFrame))
			time.Sleep(10 * time.Millisecond)
		}
		var reset *ResetError
		if !errors.As(err, &reset) || reset.Code != CodeUnknown {
			t.Errorf("got %v", err)
		}
		<-x.Done()
	})
}

func TestASenderThatHeedsNoWindowIsCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, stop := pair(Options{Window: 64 << 10}, func() bool { return false })
		defer stop()
		x, y := open(t, a, b)
		y.mux.o.Window = 1 << 30
		for y.Send(t.Context(), 0, make([]byte, MaxFrame)) == nil {
			synctest.Wait()
		}
		<-x.Done()
		for {
			if _, err := x.Receive(t.Context()); err != nil {
				if !errors.Is(err, ErrFlood) {
					t.Errorf("got %v", err)
				}
				return
			}
		}
	})
}

// A side that takes nothing of what was sent before the stream was closed is given up, however
// politely it answers; one that is slow is not.
func TestASideThatTakesNothingAfterTheCloseIsGivenUp(t *testing.T) {
	for name, takes := range map[string]bool{"nothing": false, "slowly": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b, stop := pair(Options{}, func() bool { return false })
				defer stop()
				x, y := open(t, a, b)
				for range 20 {
					if err := x.Send(t.Context(), 0, make([]byte, MaxFrame)); err != nil {
						t.Fatal(err)
					}
				}
				_ = x.Close()
				began, got := time.Now(), 0
				for takes && got < 20 {
					time.Sleep(45 * time.Second)
					if _, err := y.Receive(t.Context()); err != nil {
						t.Fatalf("after %v: %v", time.Since(began), err)
					}
					got++
				}
				if takes {
					_ = y.Close()
				}
				<-x.Done()
				if took := time.Since(began); !takes && (took < time.Minute || took > 70*time.Second) {
					t.Errorf("given up after %v", took)
				}
				<-y.Done()
			})
		})
	}
}

// What is missing is sent again, but not as often as a hostile side asks for it.
func TestNobodyMakesUsSendAgainAndAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, stop := pair(Options{}, func() bool { return false })
		defer stop()
		x, y := open(t, a, b)
		if err := x.Send(t.Context(), 0, make([]byte, MaxFrame)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		sent := 0
		send := x.mux.send
		x.mux.send = func(subject string, data []byte) error { sent++; return send(subject, data) }
		for range 1000 {
			y.mu.Lock()
			y.expected = 1
			y.status(flagAgain)
			y.mu.Unlock()
			synctest.Wait()
		}
		if sent != 1 {
			t.Errorf("sent %d times", sent)
		}
	})
}

// A connection that takes nothing holds up its session no longer than the other side waits.
func TestJoinLetsGoOfAConnectionThatTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, stop := pair(Options{}, func() bool { return false })
		defer stop()
		x, y := open(t, a, b)
		ours, theirs := net.Pipe()
		defer theirs.Close()
		joined := make(chan struct{})
		go func() {
			defer close(joined)
			Join(t.Context(), y, ours)
		}()
		if err := x.Send(t.Context(), 0, []byte("nobody reads this")); err != nil {
			t.Fatal(err)
		}
		if _, err := x.Conn().Write(make([]byte, 4*MaxFrame)); err != nil {
			t.Fatal(err)
		}
		_ = x.Close()
		<-x.Done()
		<-joined
	})
}
