// Package gateway is the HTTP API of dayfly: it accepts tasks, shows them, waits
// for them, ends and extends them, and hands out their logs.
//
//	        POST, DELETE, extend            GET, ?wait=, list             logs
//	             │                              ▲                          ▲
//	             ▼                              │                          │
//	compare-and-set on KV tasks ──▶ view of KV tasks, workers, drains   LOGS stream
//	             │ then, not waited for: dayfly.work
//
// It holds no state of its own: the view is a copy, and any number of gateways may
// run beside each other. A task is accepted when its record is stored; everything
// sent after that is a hint. Start with Run, or New and Handler to embed it.
package gateway
