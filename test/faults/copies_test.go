//go:build faults

package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// copied marks a copy, so that no copy is copied.
const copied = "Dayfly-Test-Copy"

// copies publishes some of the orders, reports and guarded writes of records again,
// each after up to two fences, and so in another order, until ctx ends. All that it
// sends, somebody sent before.
func (in *injector) copies(ctx context.Context, c *bus.Conn, rng *rand.Rand) error {
	var mu sync.Mutex
	var pending sync.WaitGroup
	count := map[string]int{} // under mu
	over := false             // under mu
	began := Now()
	again := func(m *nats.Msg, kind string) {
		if m.Header.Get(copied) != "" {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if over || rng.IntN(4) > 0 {
			return
		}
		late := time.Duration(rng.Int64N(int64(2 * in.fence)))
		pending.Go(func() {
			sleep(ctx, late)
			twin := &nats.Msg{Subject: m.Subject, Data: m.Data, Header: nats.Header{copied: {"1"}}}
			for k, v := range m.Header {
				twin.Header[k] = v
			}
			if c.NC.PublishMsg(twin) == nil {
				mu.Lock()
				defer mu.Unlock()
				count[kind]++
			}
		})
	}
	records := "$KV." + schemas.BucketTasks + "."
	var subs []*nats.Subscription
	for subject, kind := range map[string]string{"dayfly.work.>": "orders", "dayfly.reports.>": "reports", records + ">": "writes of records"} {
		sub, err := c.NC.Subscribe(subject, func(m *nats.Msg) {
			if strings.HasPrefix(m.Subject, records) && m.Header.Get(jetstream.ExpectedLastSubjSeqHeader) == "" || strings.HasSuffix(m.Subject, ".keep") {
				return
			}
			again(m, kind)
		})
		if err != nil {
			return err
		}
		subs = append(subs, sub)
	}
	<-ctx.Done()
	for _, sub := range subs {
		_ = sub.Unsubscribe()
	}
	mu.Lock()
	over = true
	mu.Unlock()
	pending.Wait()
	mu.Lock()
	defer mu.Unlock()
	effect := fmt.Sprint(count)[len("map"):]
	in.rec.Add(began, Event{Fault: &Fault{Kind: Copies, Target: "", Until: Now(), Effect: effect}})
	in.log("%s: %s", Copies, effect)
	return nil
}
