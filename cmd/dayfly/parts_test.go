package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

// Artifacts have a bound that fits the servers, or the one that was asked for, or none.
func TestArtifactsHaveABound(t *testing.T) {
	small := func(c *natsd.Config) { c.MaxStore = 1 << 30 }
	for name, c := range map[string]struct {
		config assetConfig
		want   int64
	}{
		"nobody says": {assetConfig{}, 640 << 20}, // ten, five, two and a half and one and a quarter do not fit
		"asked for":   {assetConfig{store: "100MiB"}, 100 << 20},
		"without":     {assetConfig{store: "0"}, -1},
	} {
		t.Run(name, func(t *testing.T) {
			conn := natstest.Connect(t, natstest.Server(t, small))
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			c.config.logAge = time.Hour
			for range 2 { // as each service does
				if err := c.config.provision(ctx, conn); err != nil {
					t.Fatal(err)
				}
				s, err := conn.JS.Stream(ctx, schemas.StreamArtifacts)
				if err != nil {
					t.Fatal(err)
				}
				if have := s.CachedInfo().Config; have.MaxBytes != c.want || have.MaxMsgs != schemas.MaxArtifactChunks {
					t.Errorf("%d bytes, %d messages", have.MaxBytes, have.MaxMsgs)
				}
			}
		})
	}
	t.Run("too much", func(t *testing.T) {
		conn := natstest.Connect(t, natstest.Server(t, small))
		config := assetConfig{logAge: time.Hour, store: "100GiB"}
		err := config.provision(t.Context(), conn)
		if _, hint := errors.AsType[*hintError](err); !hint || !errors.Is(err, bus.ErrFull) {
			t.Error(err)
		}
	})
}
