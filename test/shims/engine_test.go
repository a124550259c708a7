package shims

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"testing"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	engine "github.com/moby/moby/client"
)

// What every container has for dayfly-init, beside its task's own.
const (
	initMemory = 8 << 20
	initPids   = 16
)

// engineChecks look at the containers of tasks:
//
//	limits TASK NANOCPUS BYTES   it has these limits, and the memory of dayfly-init
//	sandbox TASK CPUS BYTES      it is in the sandbox of gridx's document
//	gone TASK                    it has no running container
//	differ A B                   two values that were kept
func engineChecks(t *testing.T, ctx context.Context) map[string]func([]string) error {
	docker, err := engine.New(engine.FromEnv)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { docker.Close() })
	inspect := func(task string) (container.InspectResponse, error) {
		seen, err := docker.ContainerInspect(ctx, "dayfly-"+task+"-1", engine.ContainerInspectOptions{})
		return seen.Container, err
	}
	return map[string]func([]string) error{
		"limits": func(args []string) error {
			c, err := inspect(args[0])
			if err != nil {
				return err
			}
			cpus := c.HostConfig.NanoCPUs
			if cpus == 0 && c.HostConfig.CPUPeriod > 0 {
				cpus = c.HostConfig.CPUQuota * 1e9 / c.HostConfig.CPUPeriod
			}
			if have := []string{strconv.FormatInt(cpus, 10), strconv.FormatInt(c.HostConfig.Memory-initMemory, 10)}; have[0] != args[1] || have[1] != args[2] {
				return fmt.Errorf("its limits are %v, not %v", have, args[1:])
			}
			return nil
		},
		"gone": func(args []string) error {
			c, err := inspect(args[0])
			if cerrdefs.IsNotFound(err) || err == nil && !c.State.Running {
				return nil
			}
			return errors.Join(err, fmt.Errorf("the container of %s runs", args[0]))
		},
		"sandbox": func(args []string) error {
			c, err := inspect(args[0])
			if err != nil {
				return err
			}
			return sandbox(c, args[1:])
		},
		"differ": func(args []string) error {
			if args[0] == args[1] {
				return fmt.Errorf("both are %s", args[0])
			}
			return nil
		},
	}
}
