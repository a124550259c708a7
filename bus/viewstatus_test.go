package bus_test

import (
	"fmt"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

func TestViewsSayHowTheyAre(t *testing.T) {
	s, c := setup(t)
	table := bus.NewTable(c, schemas.BucketDrains, noteCodec)
	for i := range 10 {
		if _, err := table.Create(testContext(t), fmt.Sprint("k", i), note{Text: "x"}, ""); err != nil {
			t.Fatal(err)
		}
	}
	if l := c.Views(); len(l) > 0 {
		t.Errorf("%+v before any runs", l)
	}
	held, free := make(chan struct{}), make(chan struct{})
	var once sync.Once
	v := bus.NewView(c, schemas.BucketDrains, func(key string, h nats.Header, data []byte) (string, error) {
		once.Do(func() { close(held); <-free })
		return decodeText(key, h, data)
	}, bus.ViewOptions[string]{})
	stop := run(t, v.Run)

	<-held // in the middle of the first message
	if l := c.Views(); len(l) != 1 || l[0].Bucket != schemas.BucketDrains || l[0].Keys != 0 || l[0].Pending != 10 || l[0].Behind <= 0 {
		t.Errorf("%+v", l)
	}
	close(free)
	has := func(n int) func() bool {
		return func() bool {
			l := c.Views()
			return len(l) == 1 && l[0] == bus.ViewStatus{Bucket: schemas.BucketDrains, Keys: n}
		}
	}
	until(t, "it has all", has(10))
	natstest.Restart(t, s)
	until(t, "another is written", func() bool {
		_, err := table.Create(testContext(t), "more", note{Text: "x"}, "")
		return err == nil
	})
	until(t, "it has all again", has(11))
	stop()
	if l := c.Views(); len(l) > 0 {
		t.Errorf("%+v after its end", l)
	}
}
