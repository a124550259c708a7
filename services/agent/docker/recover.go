package docker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

const (
	// meetWithin is how long Recover waits for the init of a container of which it is
	// not known whether its process was ever started.
	meetWithin = 3 * time.Second
	// watchAfter is how long init has to dial before Docker is asked about it.
	watchAfter = 2 * time.Second
)

// assignmentOf reads a container's labels. Name and labels must agree: an image may
// carry labels of its own.
func (r *Runtime) assignmentOf(labels map[string]string, name string) (schemas.Assignment, bool) {
	if labels[LabelCluster] != r.cfg.Cluster || labels[LabelWorker] != string(r.cfg.Worker) {
		return schemas.Assignment{}, false
	}
	n, err := strconv.Atoi(labels[LabelAttempt])
	a := schemas.Assignment{
		Task: schemas.TaskID(labels[LabelTask]), Attempt: n,
		Worker: r.cfg.Worker, Epoch: schemas.Epoch(labels[LabelEpoch]),
	}
	return a, err == nil && ContainerName(a) == name
}

// Recover implements agent.Runtime. It lists the containers once, whatever their
// number, and inspects only those that have ended without an outcome.
func (r *Runtime) Recover(ctx context.Context) ([]agent.Attempt, error) {
	list, err := r.docker.ContainerList(ctx, client.ContainerListOptions{
		All:     true,
		Filters: make(client.Filters).Add("label", LabelCluster+"="+r.cfg.Cluster, LabelWorker+"="+string(r.cfg.Worker)),
	})
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	containers := map[string]container.Summary{}
	for _, c := range list.Items {
		if len(c.Names) == 0 {
			continue
		}
		if name := strings.TrimPrefix(c.Names[0], "/"); strings.HasPrefix(name, "dayfly-") {
			containers[name] = c
		}
	}
	folders, err := os.ReadDir(filepath.Join(r.cfg.StateDir, "run"))
	if err != nil {
		return nil, fmt.Errorf("read state folder: %w", err)
	}
	var out []agent.Attempt
	var unmet []*attempt
	for _, f := range folders {
		c, there := containers[f.Name()]
		a, err := r.recoverOne(ctx, f.Name(), c, there)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, errDocker) { // what Docker does not say now is not lost
				return nil, fmt.Errorf("recover %s: %w", f.Name(), err)
			}
			r.metrics.leaks.WithLabelValues("folder").Inc()
			r.log.Warn().Err(err).Str("folder", f.Name()).Msg("nothing can be made of a state folder, removing it")
			if !there {
				_ = os.RemoveAll(r.folder(f.Name()))
			}
			continue // its container, if any, is removed below; its folder by the next Recover
		}
		delete(containers, f.Name())
		out = append(out, a)
		if _, ran := a.StartedFor(); !ran && !a.over() {
			unmet = append(unmet, a)
		}
	}
	for name, c := range containers {
		if _, ok := r.assignmentOf(c.Labels, name); !ok {
			continue // bears our labels by accident
		}
		r.metrics.leaks.WithLabelValues("container").Inc()
		r.log.Warn().Str("container", name).Msg("nothing can be made of a container of this worker, removing it")
		r.goDo(func() {
			ctx, cancel := context.WithTimeout(r.ctx, dockerWithin)
			defer cancel()
			if err := r.removeContainer(ctx, c.ID); err != nil {
				r.log.Error().Err(err).Str("container", name).Msg("cannot remove a container")
			}
		})
	}
	late := time.NewTimer(meetWithin)
	defer late.Stop()
	for _, a := range unmet {
		select {
		case <-a.met:
		case <-late.C:
			late.Reset(0)
		case <-ctx.Done():
			return nil, fmt.Errorf("recover: %w", context.Cause(ctx))
		}
	}
	return out, nil
}

// errDocker says that Docker could not be asked how a container is.
var errDocker = errors.New("docker does not answer")

// recoverOne makes an attempt of a folder and its container.
func (r *Runtime) recoverOne(ctx context.Context, name string, c container.Summary, there bool) (*attempt, error) {
	var m meta
	if err := readJSON(filepath.Join(r.folder(name), "meta.json"), &m); err != nil {
		return nil, err
	}
	if m.Assignment.Worker != r.cfg.Worker || ContainerName(m.Assignment) != name {
		return nil, fmt.Errorf("folder %s is of %s", name, m.Assignment)
	}
	if there {
		if as, ok := r.assignmentOf(c.Labels, name); !ok || as != m.Assignment {
			return nil, fmt.Errorf("container %s is not of %s", name, m.Assignment)
		}
	}
	a, err := r.newAttempt(m)
	if err != nil {
		return nil, err
	}
	a.container = c.ID
	if at, err := initproto.ReadInstant(filepath.Join(a.dir, "started")); err == nil {
		a.ran, a.asked = true, true
		if m.BootID == r.boot {
			a.startedAt = at
		}
	}
	if n, err := initproto.ReadInstant(filepath.Join(a.dir, "restarts")); err == nil {
		a.current.Restarts = int(n)
	}
	if n, err := initproto.ReadInstant(filepath.Join(a.dir, "restart_to")); err == nil {
		a.restartTo = int(n)
	}
	a.stopBy, _ = initproto.ReadInstant(filepath.Join(a.dir, "stopped"))
	a.deadline, _ = initproto.ReadInstant(filepath.Join(a.dir, "c", initproto.DeadlineName))

	var state *container.State
	running := there && (c.State == container.StateRunning || c.State == container.StatePaused || c.State == container.StateRestarting)
	o, known := readOutcome(a.dir)
	if there && !running && !known {
		if state, err = r.state(ctx, c.ID); err != nil {
			a.discard()
			if client.IsErrConnectionFailed(err) || errors.Is(err, context.DeadlineExceeded) { // it will say so later
				err = fmt.Errorf("%w: %w", errDocker, err)
			}
			return nil, err
		}
		running = state != nil && state.Running
	}
	if !r.keep(a) {
		a.discard()
		return nil, fmt.Errorf("%s is there already", name)
	}
	switch {
	case known:
		a.finish(o)
	case running:
	case there && state != nil && state.Status == container.StateCreated:
		// Either its start was broken off, or a dockerd that was killed has forgotten that it
		// had started it: init dials then.
		running = true
	default:
		a.settle(state)
	}
	if running && !known && a.stopBy != 0 {
		a.mu.Lock()
		a.killAfterLocked(max(0, a.stopBy-initproto.Now()) + stopSlack)
		a.mu.Unlock()
	}
	if running { // also an ended one: its init lingers, and brings the output folder
		if r.goDo(func() { a.serve(nil, watchAfter) }) {
			return a, nil
		}
	}
	close(a.served)
	return a, nil
}
