package fakeruntime

import (
	"context"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// stage is a program that runs alone. What it uses is not played.
type stage struct{ agent.Foreground }

func (stage) Used() agent.StageUse { return agent.StageUse{} }

// Stage implements agent.Attempt.
func (a *attempt) Stage(ctx context.Context, c agent.Command, _ schemas.Size) (agent.Stage, error) {
	a.r.mu.Lock()
	before := a.stage
	a.r.mu.Unlock()
	if before != nil {
		select {
		case <-before.Done():
		default:
			return nil, agent.ErrBusy
		}
	}
	p, err := a.Exec(ctx, c)
	if err != nil {
		return nil, err
	}
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	a.stage = p
	return stage{p}, nil
}

// Build implements agent.Attempt. The programs that are played leave nothing.
func (a *attempt) Build(context.Context) error { return nil }
