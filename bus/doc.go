// Package bus is dayfly's way to NATS: one connection per service, records that
// change only by compare-and-set (Table), in-memory copies of buckets that keep
// themselves up to date (View), work taken from durable consumers (Consume) and
// streams read in order (Read). It knows NATS and knows no task.
//
//	            ┌─ Table ──▶ $KV.<bucket>.<key>   compare-and-set, leader reads
//	service ─ Conn ─ View ◀── KV_<bucket>         ordered consumer, survives restarts
//	            ├─ Consume ◀─ durable consumer    in order per key
//	            └─ Publish ─▶ stream              with or without waiting
//
// Start with Connect; a core service calls Provision before it uses an asset. All
// types are safe for concurrent use. Errors are one of ErrNotFound, ErrConflict,
// ErrUnavailable and ErrUnknownOutcome where a caller can act on them.
package bus
