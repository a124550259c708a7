// Command bench measures dayfly beside a baseline in the same run.
//
//	bench control    the control plane with the fake runtime: latency, tasks/s, flushes
//	bench cold       POST to running beside create+start through the raw Docker API
//	bench hop        one process beside one for each service
//	bench scale      50 and 1,000 agents: many tasks through, then many that sleep
//	bench reach      programs, consoles and files in a task among others, beside docker's own
//	bench beats      what copies of 500 MB do to heartbeats and short tasks
//	bench ingress    requests, connections and tunnels to a task beside a bridged container
//	bench judge      submissions in C and Python beside the same programs run bare
//	bench rest       what up takes while it has little to do: 300 real containers, 1,000 followers
//	bench            control and cold
//
// It prints medians and ratios; single figures of a shared machine mean little.
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	n := flag.Int("n", 0, "samples of each kind (0: the command's own default)")
	bin := flag.String("bin", "bin/dayfly", "the dayfly binary, for all but control")
	profile := flag.String("cpuprofile", "", "write a CPU profile to this file")
	agents := flag.String("agents", "50,1000", "numbers of agents, for scale")
	live := flag.Int("live", 100_000, "tasks that sleep at a time, for scale")
	sleepers := flag.Int("sleepers", 300, "real containers that sleep, for rest")
	followers := flag.Int("followers", 1000, "readers of all events, for rest")
	containers := flag.String("containers", "1,100,300", "numbers of real containers, for reach")
	syncs := flag.String("sync", "default", "when NATS syncs its files, for scale: default or always")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: bench [-n N] [beats|control|cold|hop|ingress|judge|reach|scale|rest]")
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *profile != "" {
		f, err := os.Create(*profile)
		if err == nil {
			err = pprof.StartCPUProfile(f)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		defer pprof.StopCPUProfile()
	}
	var err error
	switch flag.Arg(0) {
	case "control":
		err = control(ctx, *n)
	case "cold":
		err = cold(ctx, *bin, *n)
	case "hop":
		err = hop(ctx, *bin, *n)
	case "beats":
		err = beats(ctx, *bin, *n)
	case "ingress":
		err = ingress(ctx, *bin, *n)
	case "scale":
		o := scaleOptions{bin: *bin, sync: *syncs, through: cmp.Or(*n, 20_000), live: *live}
		for f := range strings.SplitSeq(*agents, ",") {
			count, perr := strconv.Atoi(f)
			if perr != nil || count < 1 {
				flag.Usage()
				os.Exit(2)
			}
			o.agents = append(o.agents, count)
		}
		err = scale(ctx, o)
	case "reach":
		var counts []int
		for f := range strings.SplitSeq(*containers, ",") {
			count, perr := strconv.Atoi(f)
			if perr != nil || count < 1 {
				flag.Usage()
				os.Exit(2)
			}
			counts = append(counts, count)
		}
		err = reach(ctx, *bin, *n, counts)
	case "judge":
		err = judge(ctx, *bin, *n)
	case "rest":
		err = rest(ctx, restOptions{bin: *bin, sleepers: *sleepers, followers: *followers})
	case "":
		if err = control(ctx, *n); err == nil {
			err = cold(ctx, *bin, *n)
		}
	default:
		flag.Usage()
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// sample is a set of measured times.
type sample []time.Duration

// at gives the quantile q of the sample, in milliseconds.
func (s sample) at(q float64) float64 {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	return float64(sorted[min(len(sorted)-1, int(q*float64(len(sorted))))].Microseconds()) / 1000
}

func (s sample) String() string {
	return fmt.Sprintf("p50 %7.2f  p90 %7.2f  p99 %7.2f ms (n=%d)", s.at(.5), s.at(.9), s.at(.99), len(s))
}
