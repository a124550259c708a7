package simulation

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"
)

// A lane is a process that runs seeds, one after the other: a run's random numbers are
// those of its whole process. It reads seeds and writes verdicts.

const laneEnv = "SIMULATION_LANE"

func isLane() bool { return os.Getenv(laneEnv) != "" }

// serveLane is a lane's own side.
func serveLane(t *testing.T) {
	out := json.NewEncoder(os.Stdout)
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var seed uint64
		if _, err := fmt.Sscan(in.Text(), &seed); err != nil {
			t.Fatal(err)
		}
		if err := out.Encode(runSeed(t, seed)); err != nil {
			t.Fatal(err)
		}
	}
}

// runLanes runs n seeds from first on in so many lanes. take gets each verdict, one at a
// time, until it has enough.
func runLanes(t *testing.T, lanes int, first, n uint64, take func(verdict) bool) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	seeds := make(chan uint64)
	var mu sync.Mutex
	var all errgroup.Group
	for range lanes {
		all.Go(func() error {
			err := runLane(t.Context(), seeds, func(v verdict) {
				mu.Lock()
				defer mu.Unlock()
				if ctx.Err() == nil && take(v) {
					stop()
				}
			})
			if err != nil {
				stop()
			}
			return err
		})
	}
	for seed := first; seed < first+n && ctx.Err() == nil; seed++ {
		select {
		case seeds <- seed:
		case <-ctx.Done():
		}
	}
	close(seeds)
	if err := all.Wait(); err != nil {
		t.Error(err)
	}
}

// runLane keeps one process busy with seeds.
func runLane(ctx context.Context, seeds <-chan uint64, take func(verdict)) error {
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run", "^TestSimulation$")
	cmd.Env = append(os.Environ(), laneEnv+"=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	verdicts := json.NewDecoder(out)
	for seed := range seeds {
		var v verdict
		if _, err = fmt.Fprintln(in, seed); err == nil {
			err = verdicts.Decode(&v)
		}
		if err != nil {
			rest, _ := io.ReadAll(io.MultiReader(verdicts.Buffered(), out))
			_ = cmd.Wait()
			return fmt.Errorf("seed %d ended its process: %w\n%s\n%.10000s", seed, err, rest, stderr.Bytes())
		}
		take(v)
	}
	in.Close()
	_, _ = io.Copy(io.Discard, out) // what go test says of itself
	return cmd.Wait()
}
