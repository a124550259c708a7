// Package schemas is dayfly's contract: what a task is, how its record may
// change, and every message, subject, bucket and error that the services share.
//
// It is pure. It opens no connection and reads no clock; whoever calls it brings
// the time. A service that wants to change a record makes an Event, asks Next for
// the record that follows, and writes that with compare-and-set. Nothing else
// changes a record, so the table in README.md is the whole life of a task.
//
// Start with Record (record.go) and Next (next.go); assets.go lists what lives on
// the bus and who may touch it.
package schemas
