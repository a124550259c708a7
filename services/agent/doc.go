// Package agent runs tasks on one Docker host. It pulls the orders of its worker,
// makes them true through a Runtime, and says what is true in reports, logs and a
// heartbeat. It never writes a task's record, and only dials out.
//
//	orders ──▶ handle ──▶ journal ──▶ attempt (one goroutine each) ──▶ Runtime
//	              │                       │  │
//	            beat ──▶ lease ──▶ permit │  └──▶ logs
//	                                      └─────▶ reports, until an order closes it
//
// An attempt is journalled before its order is acknowledged. A trace of it in the
// journal means that it is never started again, only reported. An agent that ends,
// however it ends, leaves its containers running; the next one recovers them.
package agent
