package session

import (
	"context"
	"io"
	"net"
	"sync"
	"time"
)

// lingers is how long a connection may take for what is left of a stream, which is a window
// at the most.
const lingers = 30 * time.Second

// Join carries bytes between a connection and channel 0 of the stream, both ways and
// with half-closes where the connection knows them, until both ways are over, one of the
// two breaks or ctx ends. Then both are closed. What has come through the stream before that
// ended is written still, if the connection takes it within lingers.
func Join(ctx context.Context, s *Stream, c net.Conn) {
	far := s.Conn()
	defer far.Close()
	defer c.Close()
	broken := make(chan struct{})
	var once sync.Once
	var ways sync.WaitGroup
	carry := func(to, from net.Conn, done chan<- struct{}) {
		ways.Go(func() {
			if done != nil {
				defer close(done)
			}
			_, err := io.CopyBuffer(onlyWriter{to}, onlyReader{from}, make([]byte, MaxFrame))
			if half, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
				err = half.CloseWrite()
			} else if err == nil {
				err = to.Close()
			}
			if err != nil {
				once.Do(func() { close(broken) })
			}
		})
	}
	over := make(chan struct{})
	arrived := make(chan struct{}) // all that came through the stream
	carry(far, c, nil)
	carry(c, far, arrived)
	go func() {
		ways.Wait()
		close(over)
	}()
	select {
	case <-over:
		return
	case <-broken:
	case <-ctx.Done():
	case <-s.Done(): // nobody is there to hear what the connection may still say
		_ = c.SetWriteDeadline(time.Now().Add(lingers))
		select {
		case <-arrived:
		case <-broken:
		case <-ctx.Done():
		}
	}
	s.Reset(CodeBroken, "the connection was broken")
	_ = c.Close()
	<-over
}

// The copies are to go through buffers of one frame, not through what else the two can.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)
