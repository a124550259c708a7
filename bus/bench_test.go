package bus_test

import (
	"fmt"
	"sync"
	"testing"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

// go test -run '^$' -bench . -benchtime 1000x

func eachSync(b *testing.B, fn func(b *testing.B, opts ...natstest.Option)) {
	b.Run("default", func(b *testing.B) { fn(b) })
	b.Run("sync", func(b *testing.B) { fn(b, natstest.SyncAlways()) })
}

// big is a value of about 1 KiB.
var big = note{Text: fmt.Sprintf("%01000d", 7)}

func BenchmarkCreate(b *testing.B) {
	eachSync(b, func(b *testing.B, opts ...natstest.Option) {
		_, c := setup(b, opts...)
		tasks := bus.NewTable(c, schemas.BucketTasks, noteCodec)
		i := 0
		for b.Loop() {
			i++
			if _, err := tasks.Create(b.Context(), fmt.Sprint(i), big, "op"); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkReplace(b *testing.B) {
	eachSync(b, func(b *testing.B, opts ...natstest.Option) {
		_, c := setup(b, opts...)
		tasks := bus.NewTable(c, schemas.BucketTasks, noteCodec)
		e, err := tasks.Create(b.Context(), "a", big, "op")
		for b.Loop() {
			if err == nil {
				e, err = tasks.Replace(b.Context(), e, big, "op")
			}
		}
		if err != nil {
			b.Fatal(err)
		}
	})
}

func BenchmarkGet(b *testing.B) {
	_, c := setup(b)
	tasks := bus.NewTable(c, schemas.BucketTasks, noteCodec)
	_, err := tasks.Create(b.Context(), "a", big, "op")
	for b.Loop() {
		if err == nil {
			_, err = tasks.Get(b.Context(), "a")
		}
	}
	if err != nil {
		b.Fatal(err)
	}
}

func BenchmarkPublishAsync(b *testing.B) {
	eachSync(b, func(b *testing.B, opts ...natstest.Option) {
		_, c := setup(b, opts...)
		var all sync.WaitGroup
		data := []byte(big.Text)
		for b.Loop() {
			all.Add(1)
			c.PublishAsync("dayfly.logs.w1.t1", nil, data, func(err error) {
				if err != nil {
					b.Error(err)
				}
				all.Done()
			})
		}
		all.Wait()
	})
}
