package runtimetest

import (
	"slices"
	"testing"
	"time"

	"dayfly.dev/services/agent"
)

// leftBehind gives the names in the output folder of an ended attempt.
func leftBehind(t *testing.T, a agent.Attempt) []string {
	t.Helper()
	dir, err := a.OutputFolder(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if dir == nil {
		return nil
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

var twoFiles = []string{"file-00000", "file-00001"}

func leaves(t *testing.T, b *bench) {
	a := b.run(t, "leave", "2", "10")
	done(t, a)
	if got := leftBehind(t, a); !slices.Equal(got, twoFiles) {
		t.Errorf("left %q", got)
	}
	a = b.run(t, "exit", "0")
	done(t, a)
	if got := leftBehind(t, a); len(got) > 0 {
		t.Errorf("left %q", got)
	}
}

// leavesRecovered: an agent that comes after the end, and one that comes before, get the
// folder.
func leavesRecovered(t *testing.T, b *bench) {
	if b.Reopen == nil {
		t.Skip("cannot be reopened")
	}
	before, after := b.run(t, "leave", "2", "10"), b.run(t, "leave", "2", "10", "1s")
	done(t, before)
	ready(t, after)
	b.Runtime = b.Reopen(t)
	list, err := b.Runtime.Recover(t.Context())
	if err != nil || len(list) != 2 {
		t.Fatalf("recovered %d: %v", len(list), err)
	}
	b.permit(t, time.Hour)
	for _, a := range list {
		done(t, a)
		if got := leftBehind(t, a); !slices.Equal(got, twoFiles) {
			t.Errorf("%s left %q", a.Assignment(), got)
		}
		if err := a.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
