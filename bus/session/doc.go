// Package session carries live byte streams over core NATS: a person's terminal, a copied
// file, a connection to a port, between a process of the core services and one that only
// dials out.
//
//	Mux ── Stream ──▶ dayfly.sessions.down.<address> ──▶ Stream ── Mux
//	       Stream ◀── dayfly.sessions.up.<address>   ◀── Stream
//
// Each process has one Mux on a connection of its own, so that a large copy delays no
// heartbeat. Who opens a stream tells the other side by a request of its own; both then
// call Mux.Open with the same address. A Stream carries frames, in order, each on one of
// 256 channels; Stream.Conn makes a net.Conn of channel 0.
//
// Frames are numbered. A sender has at most a window of bytes under way that the other
// side's reader has not taken, which bounds the memory of both, and keeps what is under
// way: core NATS drops messages while a connection is away, and what is missing then is
// sent again. So a stream outlives the restart of a server, but not that of a process: one
// that does not know the address says so, and one that says nothing is given up after
// Options.Silence.
package session
