package agent

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/artifacts"
)

// uploadsAtOnce is how many attempts of a worker store their artifacts at a time.
const uploadsAtOnce = 2

// uploadGrace is which part of the time for an upload what was begun has beyond it.
const uploadGrace = 10

// keepArtifacts stores what an ended attempt left in its output folder, before its end is
// reported: so all of it is there when the record says so. An error is the end of the
// attempt's ctx. Of an attempt that left nothing it costs a look into the folder.
func (t *attempt) keepArtifacts(found Attempt, end *schemas.End) error {
	most := t.agent.cfg.ArtifactLimit
	if disk := int64(t.needs.Disk); disk > 0 {
		most = min(most, disk) // more are only holes, and names that are one file's
	}
	if most <= 0 {
		return nil
	}
	dir, err := found.OutputFolder(t.ctx)
	switch {
	case t.ctx.Err() != nil:
		return context.Cause(t.ctx)
	case err != nil:
		if !errors.Is(err, ErrGone) {
			t.log.Error().Err(err).Msg("open output folder")
		}
		end.ArtifactSum = &schemas.ArtifactSum{Truncated: true, Why: schemas.ArtifactsGone}
		return nil
	case dir == nil:
		return nil
	}
	defer dir.Close()
	if empty, err := artifacts.Empty(dir); empty && err == nil {
		return nil
	}
	select {
	case t.agent.uploads <- struct{}{}:
		defer func() { <-t.agent.uploads }()
	case <-t.ctx.Done():
		return context.Cause(t.ctx)
	}
	began := time.Now()
	got, err := t.upload(dir, most)
	if t.ctx.Err() != nil {
		return context.Cause(t.ctx)
	}
	m := t.agent.metrics
	m.artifactSeconds.Observe(time.Since(began).Seconds())
	if err != nil {
		why := schemas.ArtifactsTimeout
		if errors.Is(err, bus.ErrFull) {
			why = schemas.ArtifactsStoreFull
		}
		t.log.Error().Err(err).Msg("store artifacts")
		got = artifacts.Found{Sum: schemas.ArtifactSum{Truncated: true, Why: why}}
	}
	m.artifacts.WithLabelValues("stored").Add(float64(got.Sum.Count))
	m.artifacts.WithLabelValues("skipped").Add(float64(got.Sum.Skipped))
	m.artifactBytes.Add(float64(got.Sum.Bytes))
	end.Artifacts, end.ArtifactSum = got.Artifacts, &got.Sum
	return nil
}

// errLate says that artifacts took too long.
var errLate = errors.New("no time is left to store more")

// upload stores what is in the folder. Each chunk has a subject of its own and replaces what
// an earlier agent stored there, so an upload that was broken off is simply done again.
func (t *attempt) upload(dir *os.File, most int64) (artifacts.Found, error) {
	conn, err := t.agent.bulk.Conn(t.ctx)
	if err != nil {
		return artifacts.Found{}, err
	}
	may, spent := t.agent.cfg.ArtifactTime, clock(conn)
	ctx, cancel := context.WithCancelCause(t.ctx)
	from, to := io.Pipe()
	var work sync.WaitGroup
	work.Go(func() { // the end of what was begun
		for left := may + may/uploadGrace; left > 0; left = may + may/uploadGrace - spent() {
			select {
			case <-time.After(left):
			case <-ctx.Done():
				return
			}
		}
		cancel(errLate)
	})
	var failed error
	work.Go(func() {
		defer cancel(nil)
		_, failed = conn.WriteChunks(ctx, schemas.ArtifactRun(t.Worker, t.Task, t.Attempt), schemas.ArtifactChunk, 0, from)
		from.CloseWithError(failed) // whoever writes hears it
	})
	got, err := artifacts.Collect(dir, artifacts.Limits{Bytes: most, Files: schemas.MaxArtifacts, Enough: func() bool { return spent() > may }}, to)
	to.CloseWithError(err)
	work.Wait()
	if failed != nil {
		err = failed
	}
	return got, err
}

// clock says how long it is since now, without the time for which the bus was away.
func clock(conn *bus.Conn) func() time.Duration {
	began, away := time.Now(), conn.Away()
	return func() time.Duration { return time.Since(began) - (conn.Away() - away) }
}
