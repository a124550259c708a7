package bus

import (
	"fmt"
	"testing"
)

func TestGravesAreDroppedOnceTheConsumerHasPassed(t *testing.T) {
	v := NewView[string](nil, "b", nil, ViewOptions[string]{})
	most := 0
	for r := uint64(1); r <= 100*fewGraves; r++ {
		v.Forget(fmt.Sprint("k", r), r)
		if r > 100 {
			v.applied = r - 100 // their messages never came: others took their place
		}
		most = max(most, len(v.forgotten))
	}
	if most > 2*fewGraves {
		t.Errorf("%d graves at a time", most)
	}
}

// While a view reads everything again it has passed nothing, yet what it had
// forgotten stays so.
func TestNothingOldIsObservedDuringARebuild(t *testing.T) {
	v := NewView[string](nil, "b", nil, ViewOptions[string]{})
	v.clustered = func() bool { return false }
	v.started(v.next0())
	v.applied = 10
	v.Forget("a", 20)
	v.started(v.next0())
	for _, x := range []struct {
		key      string
		revision uint64
		taken    bool
	}{{"a", 15, false}, {"a", 20, false}, {"b", 10, false}, {"b", 11, true}, {"a", 21, true}} {
		v.Observe(x.key, "x", x.revision)
		if _, r, ok := v.Get(x.key); (ok && r == x.revision) != x.taken {
			t.Errorf("%s at %d is there: %v", x.key, x.revision, ok)
		}
	}
	v.applied = 30
	v.catchUp()
	if len(v.forgotten) != 0 || v.floor != 0 {
		t.Errorf("%d graves, floor %d", len(v.forgotten), v.floor)
	}
}

// next0 begins a session that reads everything again, of which nothing has come yet.
func (v *View[V]) next0() uint64 { v.next(); return 100 }
