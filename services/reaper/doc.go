// Package reaper ends what is over. It folds the workers' reports into the records,
// lets the time of tasks run out, declares workers lost, and sends again the orders
// that nothing came of.
//
// Any number of reapers may run. They share the reports, and each sweeps all
// records: two that do the same thing meet at the record's compare-and-set.
package reaper
