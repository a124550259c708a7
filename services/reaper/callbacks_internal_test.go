package reaper

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

// Another reaper may say that a callback is delivered between this one's look at that and
// its taking the callback for due.
func TestACallbackThatAnotherReaperDeliveredIsForgotten(t *testing.T) {
	conn := natstest.Connect(t, natstest.Server(t))
	if err := bus.Provision(t.Context(), conn, schemas.Assets(time.Hour), 1); err != nil {
		t.Fatal(err)
	}
	const id = "t-01jd0000000000000000000000"
	c := newCourier(conn, bus.NewTable(conn, schemas.BucketTasks, bus.JSON(schemas.Record.Wrote)), zerolog.Nop(), DefaultConfig())
	c.metrics = newMetrics(prometheus.NewRegistry(), func() float64 { return 0 })
	c.marks.Observe(id, schemas.Delivery{State: schemas.DeliveryDelivered}, 1)
	c.pending[id] = announcement{since: time.Now().Add(-time.Minute), host: "a.example"}
	if again := c.deliver(t.Context(), id); !again.IsZero() {
		t.Errorf("looks again at %s", again)
	}
	if _, ok := c.look(id); ok || c.oldest() != 0 {
		t.Errorf("it counts as due, since %v s", c.oldest())
	}
}
