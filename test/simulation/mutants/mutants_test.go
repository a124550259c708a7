//go:build mutants

// Package mutants breaks one rule of the services at a time and checks that the
// simulation notices: a checker that finds nothing may be blind. The source stays as it
// is (go test -overlay).
package mutants

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"dayfly.dev/test/harness"
	"dayfly.dev/test/mutants"
)

const (
	seeds   = 20
	patient = 10 * time.Minute // for all of them
)

var caught = regexp.MustCompile(`make simulate HARD=1 SEED=(\d+) SEEDS=1\s+(.+)`)

// TestMutants runs each mutant by hard seeds until one shows it. MUTANT chooses by a word
// of the rule that is broken.
func TestMutants(t *testing.T) {
	root, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutants.All {
		if !strings.Contains(m.Rule, os.Getenv("MUTANT")) {
			continue
		}
		t.Run(m.Rule, func(t *testing.T) {
			t.Parallel()
			out, failed := simulate(t, root, build(t, root, m))
			if !failed {
				t.Fatalf("it survives %d seeds", seeds)
			}
			found := caught.FindStringSubmatch(out)
			if found == nil {
				t.Fatalf("it failed, but not by the checker:\n%.3000s", out)
			}
			t.Logf("caught at seed %s by %s", found[1], found[2])
		})
	}
}

// build makes the simulation with the mutant in it.
func build(t *testing.T, root string, m mutants.Mutant) string {
	t.Helper()
	o, binary := harness.Overlay{}, filepath.Join(t.TempDir(), "simulation.test")
	if err := errors.Join(m.Apply(o, root), o.Go(t.Context(), "test", "-c", "-o", binary, "dayfly.dev/test/simulation")); err != nil {
		t.Fatal(err)
	}
	return binary
}

// simulate runs the seeds until one fails.
func simulate(t *testing.T, root, binary string) (out string, failed bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patient)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-test.run", "^TestSimulation$")
	cmd.Dir = filepath.Join(root, "test", "simulation")
	cmd.Env = append(os.Environ(), "HARD=1", "SEED=1", fmt.Sprintf("SEEDS=%d", seeds), "FAILURES=1")
	b, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || ctx.Err() != nil) {
		t.Fatalf("%v\n%.3000s", err, b)
	}
	return string(b), err != nil
}
