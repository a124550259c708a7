package tracing_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/ops/tracing"
)

const parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

// All that stands on the way of a task costs nothing where there is no tracer.
func TestWithoutATracerNothingIsAllocated(t *testing.T) {
	var none *tracing.Tracer
	log, ctx, began := zerolog.Nop(), t.Context(), time.Now()
	for name, fn := range map[string]func(){
		"spans": func() {
			s := none.Start("", "order", tracing.Producer)
			s.Task("t-1", 1)
			s.Set("k", "v")
			s.SetInt("k", 1)
			tracing.Step(s.In(ctx), "create", began, nil)
			if tracing.Header(s.Traceparent()) != nil {
				t.Error("a header out of nowhere")
			}
			s.End(nil)
		},
		"parents that are handed on": func() {
			if none.StartAt(parent, "order", tracing.Inner, began).Traceparent() != parent {
				t.Error("the parent is lost")
			}
		},
		"lines": func() { tracing.Log(log.Info(), "").Msg("task") },
	} {
		if n := testing.AllocsPerRun(100, fn); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	none.Start(parent, "x", tracing.Inner).End(errors.New("nobody hears it"))
	if s := none.Start(parent, "x", tracing.Inner); s.In(ctx) != context.Context(ctx) {
		t.Error("a span that is none is in the context")
	}
}

func TestTraceparents(t *testing.T) {
	const unsampled, later = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00", "01" + "-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	for s, want := range map[string]string{
		parent: parent, unsampled: unsampled, later: parent, later + "-what else it says": parent,
		"": "", "x": "", "00-00000000000000000000000000000000-00f067aa0ba902b7-01": "", "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01": "",
		"00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01": "", parent + "\r\nx": "", parent + "-00": "",
	} {
		if got := tracing.Parse(s); got != want {
			t.Errorf("%q became %q", s, got)
		}
	}
	if id := tracing.ID(parent); id != "4bf92f3577b34da6a3ce929d0e0e4736" {
		t.Error(id)
	}
	if tracing.ID("") != "" || tracing.Of(nil) != "" || tracing.Of(tracing.Header(parent)) != parent {
		t.Error("headers")
	}
}
