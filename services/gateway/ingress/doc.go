// Package ingress hands requests for the hostnames of tasks on to them, over connections
// that a Router opens. It knows no records and no bus.
//
//	browser ── LABEL.domain ──▶ Server ── Router.Find ──▶ a target, or why there is none: a page
//	                              │
//	                              └── Router.Dial ──▶ a port of the task
//
// What a task says is not trusted, nor is who asks: hop-by-hop headers, what claims to
// come from proxies, Authorization, the platform's cookies and the Domain of a task's
// cookies do not pass. Bodies are passed on as they come, and at the pace of the slower
// side.
package ingress
