package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"dayfly.dev/schemas"
)

const (
	// quickCheck is the first pause between two checks of a run that is not ready yet.
	quickCheck = 100 * time.Millisecond
	// answerBytes bounds what is read of an HTTP answer's head.
	answerBytes = 16 << 10
)

// checkHealth checks each run of the attempt until ctx ends or the attempt does. A run
// that an earlier agent has seen start has its start period again.
func (t *attempt) checkHealth(ctx context.Context, found Attempt, h schemas.Health) {
	for {
		run, changed := found.Run()
		if run.Up {
			t.checkRun(ctx, found, run.Restarts, changed, h)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
		if t.over(found) {
			return
		}
	}
}

func (t *attempt) over(found Attempt) bool {
	select {
	case <-found.Done():
		return true
	default:
		return false
	}
}

// checkRun checks one run until changed is closed. A failure counts at the pace of the
// interval; the further checks before the first success only may find it sooner.
func (t *attempt) checkRun(ctx context.Context, found Attempt, restarts int, changed <-chan struct{}, h schemas.Health) {
	counts := time.Now().Add(max(h.Interval.Std(), h.StartPeriod.Std()))
	failures, ready, quick := 0, false, quickCheck
	for {
		err := probe(ctx, found, h)
		now := time.Now()
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			failures = 0
			if !ready {
				ready = true
				t.isReady(restarts)
			}
		case errors.Is(err, ErrAway) || now.Before(counts):
		default:
			if failures++; failures >= h.Retries {
				t.isUnhealthy(found, restarts, fmt.Sprintf("its health check failed %d times in a row: %s", failures, text(err.Error(), 256)))
			}
		}
		if !now.Before(counts) {
			counts = now.Add(h.Interval.Std())
		}
		pause := h.Interval.Std()
		if !ready {
			pause, quick = min(pause, quick), min(2*quick, pause)
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-changed:
		case <-ctx.Done():
		}
		timer.Stop()
		if run, _ := found.Run(); !run.Up || run.Restarts != restarts {
			return
		}
	}
}

// probe makes one check. Nil says that it passed.
func probe(ctx context.Context, found Attempt, h schemas.Health) error {
	ctx, cancel := context.WithTimeoutCause(ctx, h.Timeout.Std(), fmt.Errorf("no answer within %s", h.Timeout))
	defer cancel()
	switch {
	case h.HTTP != nil:
		return because(ctx, probeHTTP(ctx, found, *h.HTTP))
	case h.TCP != nil:
		c, err := found.Dial(ctx, h.TCP.Port)
		if err != nil {
			return because(ctx, err)
		}
		return c.Close()
	}
	exit, err := Execute(ctx, found, Command{Argv: h.Exec}, nil, nil)
	if err == nil && exit.Code != 0 {
		err = fmt.Errorf("exit code %d", exit.Code)
	}
	return because(ctx, err)
}

func probeHTTP(ctx context.Context, found Attempt, h schemas.HTTPCheck) error {
	c, err := found.Dial(ctx, h.Port)
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	// By hand, since a http.Client would keep goroutines for the connection.
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: localhost\r\nUser-Agent: dayfly\r\nConnection: close\r\n\r\n", h.Path); err != nil {
		return err
	}
	answer, err := http.ReadResponse(bufio.NewReader(io.LimitReader(c, answerBytes)), nil)
	if err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	defer answer.Body.Close()
	if answer.StatusCode < 200 || answer.StatusCode > 399 {
		return fmt.Errorf("GET %s: %s", h.Path, text(answer.Status, 64))
	}
	return nil
}

// isReady reports that a run has passed its check.
func (t *attempt) isReady(restarts int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.readyRun = restarts + 1
	if t.report.Phase == schemas.PhaseRunning {
		t.send()
	}
}

// isUnhealthy stops a run as a failure; why is for people, if it is the last.
func (t *attempt) isUnhealthy(found Attempt, restarts int, why string) {
	t.log.Info().Int("restarts", restarts).Str("why", why).Msg("unhealthy")
	t.mu.Lock()
	t.unhealthy = why
	t.mu.Unlock()
	found.Fail(restarts)
}
