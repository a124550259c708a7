//go:build !race

package harness

// race says that the tests run with the race detector. Then what they start has it too.
const race = false
