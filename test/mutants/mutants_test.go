package mutants_test

import (
	"testing"

	"dayfly.dev/test/harness"
	"dayfly.dev/test/mutants"
)

// Whoever changes a line that a mutant alters makes the mutant anew.
func TestEditsFit(t *testing.T) {
	for _, m := range mutants.All {
		if err := m.Apply(harness.Overlay{}, "../.."); err != nil {
			t.Errorf("%s: %v", m.Rule, err)
		}
	}
}
