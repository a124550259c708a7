package reaper

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"dayfly.dev/schemas"
)

func TestAWorkersWordMakesNoNewLabel(t *testing.T) {
	reg := prometheus.NewRegistry()
	m := newMetrics(reg, func() float64 { return 0 })
	before := testutil.CollectAndCount(m.finished)
	for _, reason := range []schemas.Reason{"mine-1", "mine-2", schemas.ReasonOOM} {
		m.transition(schemas.Record{State: schemas.Running}, schemas.Record{State: schemas.Failed, Reason: reason})
	}
	if n := testutil.CollectAndCount(m.finished); n != before+1 {
		t.Errorf("%d series became %d", before, n)
	}
	for reason, want := range map[string]float64{"other": 2, string(schemas.ReasonOOM): 1} {
		if n := testutil.ToFloat64(m.finished.WithLabelValues("failed", reason)); n != want {
			t.Errorf("%s: %v, want %v", reason, n, want)
		}
	}
	if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
}
