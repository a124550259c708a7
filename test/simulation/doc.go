// Package simulation runs the real agents, placers and reapers in virtual time, on a
// NATS server in memory (bus/natssim) and hosts without containers (fakeruntime), breaks
// things by a seed and checks what came of it with the checker of package faults.
//
//	director ── faults ──▶ processes: placer ×2, reaper ×2, agent ×3, clients ×2
//	    │                       │ bus, nats.go
//	    └── faults ──────▶ natssim.Server ── each record ──▶ history ──▶ faults.Check
//	                       hosts ── each start and end ──────────┘
//
// A seed gives the tasks, the faults and the delays of all messages. Goroutines that
// are ready at one instant, and the order of maps, are Go's to choose, so a seed that
// fails does not always fail again: the trace of the failure is the evidence.
package simulation
