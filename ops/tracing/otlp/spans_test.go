package otlp_test

import (
	"strings"
	"testing"

	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"dayfly.dev/ops/tracing"
)

// A value may be a worker's word. What is no whole character would spoil the message to the
// collector, with all that is in it.
func TestAnAttributeIsShort(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	s := tracing.New(sdk.NewTracerProvider(sdk.WithSpanProcessor(spans))).Start("", "settle", tracing.Consumer)
	s.Set("k", strings.Repeat("x", 255)+strings.Repeat("\u00e9", 1<<20))
	s.End(nil)
	if got := spans.Ended()[0].Attributes()[0].Value.AsString(); got != strings.Repeat("x", 255) {
		t.Errorf("%d bytes: %q", len(got), got[:min(len(got), 300)])
	}
}
