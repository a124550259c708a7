//go:build faults

package faults

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"dayfly.dev/test/harness"
	"dayfly.dev/test/mutants"
)

var violation = regexp.MustCompile(`(?m)^\s+\w+_test\.go:\d+: (` + strings.Join(names(), "|") + `): .*`)

func names() (list []string) {
	for _, r := range rules {
		list = append(list, string(r))
	}
	return list
}

// TestMutants runs the fault test with each mutant, by the seeds from SEED to at most
// MUTANT_SEEDS of them, until the checker finds something. MUTANT chooses by a word of the
// rule that is broken.
func TestMutants(t *testing.T) {
	seeds := int(number(t, "MUTANT_SEEDS", 0))
	if seeds == 0 {
		t.Skip("it takes hours: make faults-mutants")
	}
	for _, m := range mutants.All {
		if !strings.Contains(m.Rule, os.Getenv("MUTANT")) {
			continue
		}
		t.Run(m.Rule, func(t *testing.T) {
			o, root := harness.Overlay{}, ""
			binary, err := harness.Binaries(t.Context(), t.TempDir())
			if err == nil {
				root, err = filepath.Abs("../..")
			}
			if err := errors.Join(err, o.Clock(t.Context()), m.Apply(o, root), o.Build(t.Context(), binary)); err != nil {
				t.Fatal(err)
			}
			first := int(number(t, "SEED", 1))
			for seed := first; seed < first+seeds; seed++ {
				cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestFaults$", "-test.v")
				cmd.Env = append(os.Environ(), fmt.Sprint("SEED=", seed), "SEEDS=1", "MUTANT_BINARY="+binary)
				out, err := cmd.CombinedOutput()
				if err == nil {
					continue
				}
				found := violation.FindAllString(string(out), 3)
				if found == nil {
					t.Fatalf("seed %d failed, but not by the checker:\n%s", seed, out)
				}
				t.Logf("caught at seed %d: %s", seed, strings.Join(found, "\n"))
				return
			}
			t.Errorf("it survives %d seeds", seeds)
		})
	}
}
