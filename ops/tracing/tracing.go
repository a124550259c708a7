// Package tracing says where the time of a task goes, in spans of OpenTelemetry that all
// services add to one trace. What goes between them is a W3C traceparent: in the request, in
// the record, and in the headers of orders and reports. A Tracer that is nil makes no spans,
// costs nothing, and hands on the traceparent that it was given. Package otlp makes one that
// sends spans.
package tracing

import (
	"context"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// Tracer makes the spans of one service.
type Tracer struct{ tracer trace.Tracer }

// New makes a tracer of a provider.
func New(p trace.TracerProvider) *Tracer { return &Tracer{p.Tracer("dayfly.dev")} }

// Kind says how a span and the one above it belong together.
type Kind = trace.SpanKind

// The kinds.
const (
	Inner    = trace.SpanKindInternal
	Server   = trace.SpanKindServer
	Client   = trace.SpanKindClient
	Producer = trace.SpanKindProducer // a message on the bus
	Consumer = trace.SpanKindConsumer
)

// Span is one piece of work. The zero value is none.
type Span struct {
	span   trace.Span
	tracer trace.Tracer
	parent string
}

// Start begins a span now, below a parent or, if that is empty, a trace of its own.
func (t *Tracer) Start(parent, name string, kind Kind) Span {
	if t == nil {
		return Span{parent: parent}
	}
	return t.StartAt(parent, name, kind, time.Now())
}

// StartAt is Start of a span that began before.
func (t *Tracer) StartAt(parent, name string, kind Kind, at time.Time) Span {
	if t == nil {
		return Span{parent: parent}
	}
	_, span := t.tracer.Start(extract(parent), name, trace.WithSpanKind(kind), trace.WithTimestamp(at))
	return Span{span: span, tracer: t.tracer, parent: parent}
}

// Traceparent is what belongs below the span gets as its parent.
func (s Span) Traceparent() string {
	if s.span == nil {
		return s.parent
	}
	return write(trace.ContextWithSpan(context.Background(), s.span))
}

// maxValue bounds an attribute. It may be a worker's word, and thousands of spans wait in
// memory for the collector.
const maxValue = 256

// Set adds an attribute.
func (s Span) Set(key, value string) {
	if s.span == nil {
		return
	}
	if len(value) > maxValue {
		value = strings.ToValidUTF8(value[:maxValue], "")
	}
	s.span.SetAttributes(attribute.String(key, value))
}

// SetInt adds an attribute.
func (s Span) SetInt(key string, value int) {
	if s.span != nil {
		s.span.SetAttributes(attribute.Int(key, value))
	}
}

// Task says whose attempt the span is about; 0 is none.
func (s Span) Task(id string, attempt int) {
	s.Set("dayfly.task", id)
	if attempt > 0 {
		s.SetInt("dayfly.attempt", attempt)
	}
}

// End ends the span; err says what went wrong, if anything did.
func (s Span) End(err error) {
	if s.span == nil {
		return
	}
	if err != nil {
		s.span.SetStatus(codes.Error, err.Error())
	}
	s.span.End()
}

// In lets Step find the span.
func (s Span) In(ctx context.Context) context.Context {
	if s.span == nil {
		return ctx
	}
	return context.WithValue(ctx, key{}, s)
}

type key struct{}

// Step records a piece of work that is over, below the span in ctx if there is one.
func Step(ctx context.Context, name string, began time.Time, err error) {
	s, ok := ctx.Value(key{}).(Span)
	if !ok {
		return
	}
	(&Tracer{s.tracer}).StartAt(s.Traceparent(), name, Inner, began).End(err)
}

const header = "traceparent"

// extract gives a context with the parent; without one if it is not well formed.
func extract(parent string) context.Context {
	return propagation.TraceContext{}.Extract(context.Background(), propagation.MapCarrier{header: parent})
}

// Parse takes a traceparent that a client sent, in its one form; it is empty if it is not
// well formed. That of a later version may say more, which is dropped.
func Parse(traceparent string) string {
	return write(extract(traceparent))
}

func write(ctx context.Context) string {
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier[header]
}

// Header is that of a message that belongs below a traceparent, nil if there is none.
func Header(traceparent string) map[string][]string {
	if traceparent == "" {
		return nil
	}
	return map[string][]string{header: {traceparent}}
}

// Of is the traceparent in the header of a message.
func Of(h map[string][]string) string {
	if v := h[header]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// Log adds the id of the trace to a line, if there is one.
func Log(e *zerolog.Event, traceparent string) *zerolog.Event {
	if id := ID(traceparent); id != "" {
		e.Str("trace_id", id)
	}
	return e
}

// ID is that of the trace, "" if there is none.
func ID(traceparent string) string {
	if len(traceparent) < len("00-")+32 {
		return ""
	}
	return traceparent[3 : 3+32]
}
