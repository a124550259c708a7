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
	"testing"
	"time"

	"dayfly.dev/test/harness"
	"dayfly.dev/test/mutants"
)

const (
	batches = 20
	seeds   = 40
	patient = 5 * time.Minute // for one batch
)

var caught = regexp.MustCompile(`make simulate SEED=(\d+) SEEDS=1\s+([a-z ,]+):`)

func TestMutants(t *testing.T) {
	root, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutants.All {
		t.Run(m.Rule, func(t *testing.T) {
			binary := build(t, root, m)
			for batch := range batches {
				out, err := simulate(t, root, binary, batch*seeds+1)
				if err == nil {
					continue
				}
				if found := caught.FindStringSubmatch(out); found != nil {
					t.Logf("caught at seed %s: %s", found[1], found[2])
				} else {
					t.Logf("caught in batch %d:\n%.1500s", batch, out)
				}
				return
			}
			t.Errorf("it survives %d seeds", batches*seeds)
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

// simulate runs one batch of seeds.
func simulate(t *testing.T, root, binary string, seed int) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patient)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-test.run", "^TestSimulation$")
	cmd.Dir = filepath.Join(root, "test", "simulation")
	cmd.Env = append(os.Environ(), fmt.Sprintf("SEED=%d", seed), fmt.Sprintf("SEEDS=%d", seeds), "FAILURES=1")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), err
}
