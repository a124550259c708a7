package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Stored is one key of a bucket as a backup keeps it.
type Stored struct {
	Key      string
	Data     []byte
	Header   nats.Header
	Revision uint64
}

// Snapshot gives what a bucket holds at one sequence of its stream, in the order in
// which it was written, while others go on writing. Nothing is missing that was stored
// before it began.
func (c *Conn) Snapshot(ctx context.Context, bucket string) (list []Stored, sequence uint64, err error) {
	for {
		list, sequence, err = c.snapshot(ctx, bucket)
		if err == nil || !transient(err) && !errors.Is(err, errRestart) {
			break
		}
		if !sleep(ctx, sessionPause) {
			break
		}
	}
	if err != nil {
		return nil, 0, fmt.Errorf("read bucket %s: %w", bucket, err)
	}
	return list, sequence, nil
}

func (c *Conn) snapshot(ctx context.Context, bucket string) ([]Stored, uint64, error) {
	all := keySubject(bucket, ">")
	f := &follower{c: c, stream: StreamOf(bucket), filter: all, next: func() uint64 { return 1 }}
	cons, err := f.make(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer f.drop(cons.CachedInfo().Name)
	have := map[string]Stored{}
	at, expect := uint64(0), uint64(1)
	for {
		batch, err := cons.FetchNoWait(500)
		if err != nil {
			return nil, 0, err
		}
		for m := range batch.Messages() {
			meta, err := m.Metadata()
			if err != nil {
				return nil, 0, err
			}
			if meta.Sequence.Consumer != expect {
				return nil, 0, errRestart // a gap
			}
			expect++
			at = meta.Sequence.Stream
			key := strings.TrimPrefix(m.Subject(), strings.TrimSuffix(all, ">"))
			if isMarker(m.Headers()) {
				delete(have, key)
			} else {
				have[key] = Stored{key, m.Data(), m.Headers(), at}
			}
		}
		if err := batch.Error(); err != nil {
			return nil, 0, err
		}
		// A value that is replaced before it is read comes again later. So this is the whole
		// state of the bucket where the leader knows of nothing behind it. The count of pending
		// messages does not tell: it lags behind the stream.
		last, err := c.lastStored(ctx, f.stream, all)
		switch {
		case err != nil:
			return nil, 0, err
		case last == at:
			return inOrder(have), at, nil
		case last < at, !c.Connected(): // the last has expired, or a replica is ahead of the leader
			return nil, 0, errRestart
		case ctx.Err() != nil:
			return nil, 0, context.Cause(ctx)
		}
	}
}

func inOrder(have map[string]Stored) []Stored {
	return slices.SortedFunc(maps.Values(have), func(a, b Stored) int { return cmp.Compare(a.Revision, b.Revision) })
}

// Exists says whether a bucket was made.
func (c *Conn) Exists(ctx context.Context, bucket string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, OpTimeout)
	defer cancel()
	if err := c.waitConnected(ctx); err != nil {
		return false, err
	}
	_, err := c.look(ctx, StreamOf(bucket))
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return false, nil
	}
	return err == nil, err
}

// Fill writes entries into a bucket that Provision has just made and that nobody else
// writes to. All are stored when it returns nil; after an error some may be.
func (c *Conn) Fill(ctx context.Context, bucket string, entries []Stored) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var under sync.WaitGroup
	slots := make(chan struct{}, 64)
	for _, e := range entries {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			under.Wait()
			return fmt.Errorf("fill bucket %s: %w", bucket, context.Cause(ctx))
		}
		header := nats.Header{jetstream.ExpectedLastSubjSeqHeader: {"0"}}
		maps.Copy(header, e.Header)
		under.Add(1)
		c.PublishAsync(keySubject(bucket, e.Key), header, e.Data, func(err error) {
			if err != nil {
				cancel(fmt.Errorf("%s: %w", e.Key, err))
			}
			<-slots
			under.Done()
		})
	}
	under.Wait()
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("fill bucket %s: %w", bucket, err)
	}
	return nil
}
