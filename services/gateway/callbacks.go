package gateway

import (
	"context"
	"errors"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

func newDeliveries(conn *bus.Conn) *bus.Table[schemas.Delivery] {
	return bus.NewTable(conn, schemas.BucketCallbacks, bus.JSON[schemas.Delivery](nil))
}

// delivery says what became of the callback of a final task or batch. It is left out
// where the store is away.
func (g *Gateway) delivery(ctx context.Context, id string) *schemas.CallbackStatus {
	e, err := g.deliveries.Get(ctx, id)
	if err != nil && !errors.Is(err, bus.ErrNotFound) {
		return nil
	}
	return e.Value.View()
}
