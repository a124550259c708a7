package agent

import (
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// A beat whose answer was lost is found again by its name. The verdict "lost" is
// written over the newest beat and bears the same name: an agent that took it for its
// own would beat on under it, declared lost for ever.
func TestAVerdictIsNotTakenForAnOwnBeat(t *testing.T) {
	beat := schemas.Beat{Worker: "w1", Epoch: "e1", Instance: "i", Sequence: 7}
	lost := beat
	lost.LostAt = time.Now()
	later := beat
	later.Sequence++
	for name, tc := range map[string]struct {
		stored schemas.Beat
		want   bool
	}{
		"the beat itself": {beat, true},
		"the verdict":     {lost, false},
		"a later beat":    {later, false},
	} {
		if got := beatCodec.Wrote(tc.stored, beatOp(beat)); got != tc.want {
			t.Errorf("%s: own write %v, want %v", name, got, tc.want)
		}
	}
}
