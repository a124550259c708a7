package agent_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// want puts the list of wanted images on the bus and gives its revision.
func (b *bench) want(before bus.Entry[schemas.WantedImages], items ...schemas.WantedImage) bus.Entry[schemas.WantedImages] {
	b.t.Helper()
	table := bus.NewTable(b.core, schemas.BucketImages, bus.JSON[schemas.WantedImages](nil))
	list := schemas.WantedImages{Items: items}
	e, err := bus.Entry[schemas.WantedImages]{}, error(nil)
	if before.Revision == 0 {
		e, err = table.Create(b.context(), schemas.KeyWanted, list, "")
	} else {
		e, err = table.Replace(b.context(), before, list, "")
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return e
}

// said waits for a beat.
func (b *bench) said(what string, accept func(schemas.Beat) bool) (beat schemas.Beat) {
	b.t.Helper()
	err := b.beats.Wait(b.context(), string(worker), func(v schemas.Beat, _ uint64, ok bool) bool {
		beat = v
		return ok && accept(v)
	})
	if err != nil {
		b.t.Fatalf("no beat says that %s; the last: %+v", what, beat)
	}
	return beat
}

func missing(b schemas.Beat, image string) schemas.MissingImage {
	at := slices.IndexFunc(b.Missing, func(m schemas.MissingImage) bool { return m.Image == image })
	if at < 0 {
		return schemas.MissingImage{}
	}
	return b.Missing[at]
}

// Wanted images are pulled one at a time, in their order; the beat says what is missing and
// why, and from which list.
func TestWantedImages(t *testing.T) {
	b := newBench(t)
	var at, most atomic.Int32
	goOn, refuse := make(chan struct{}), atomic.Bool{}
	refuse.Store(true)
	b.over = &spy{Runtime: b.rt, image: func(ctx context.Context, progress func(agent.Progress)) error {
		most.Store(max(most.Load(), at.Add(1)))
		defer at.Add(-1)
		progress(agent.Progress{Sentence: "pulling", Pull: &schemas.Pull{Done: 1, Total: 4, Layers: 2, Ready: 1}})
		select {
		case <-goOn:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if refuse.Load() {
			return &agent.StartError{Reason: schemas.ReasonImageAuth, Message: "registry r.lan refuses: " + strings.Repeat("x", 1000)}
		}
		return nil
	}}
	b.start()
	b.registered("")
	e := b.want(bus.Entry[schemas.WantedImages]{}, schemas.WantedImage{Image: "r.lan/a:1", By: "x"}, schemas.WantedImage{Image: "r.lan/a:1", By: "y"},
		schemas.WantedImage{Image: "r.lan/b:1", By: "x"}, schemas.WantedImage{Image: "r.lan/elsewhere:1", By: "x", Workers: []schemas.WorkerID{"other"}})
	beat := b.said("a is pulled", func(v schemas.Beat) bool {
		m := missing(v, "r.lan/a:1")
		return v.Wanted == e.Revision && m.State == schemas.MissingPulling && m.Pull != nil && m.Pull.Done == 1
	})
	if len(beat.Missing) != 2 || missing(beat, "r.lan/b:1").State != schemas.MissingWaits {
		t.Errorf("missing: %+v", beat.Missing)
	}
	goOn <- struct{}{}
	beat = b.said("a has failed", func(v schemas.Beat) bool { return missing(v, "r.lan/a:1").State == schemas.MissingFailed })
	if m := missing(beat, "r.lan/a:1").Message; !strings.HasPrefix(m, "registry r.lan refuses") || len(m) > schemas.MaxMissingText {
		t.Errorf("it says %q", m)
	}
	refuse.Store(false)
	close(goOn)
	beat = b.said("all is there", func(v schemas.Beat) bool { return v.Wanted == e.Revision && len(v.Missing) == 0 })
	if most.Load() != 1 || !slices.Contains(beat.Images, "r.lan/b:1") {
		t.Errorf("%d pulls at a time; it has %q", most.Load(), beat.Images)
	}
	e = b.want(e)
	b.said("the list is empty", func(v schemas.Beat) bool { return v.Wanted == e.Revision })
}

// A beat has no room for the names of all that is wanted: it says how many it leaves out,
// and names what is pulled and what has failed before what waits.
func TestMoreIsWantedThanABeatNames(t *testing.T) {
	b := newBench(t)
	goOn := make(chan struct{})
	b.over = &spy{Runtime: b.rt, image: func(ctx context.Context, progress func(agent.Progress)) error {
		select {
		case <-goOn:
			return &agent.StartError{Reason: schemas.ReasonImage, Message: "no such image"}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}}
	b.start()
	b.registered("")
	var items []schemas.WantedImage
	for n := range schemas.MaxWanted {
		items = append(items, schemas.WantedImage{Image: fmt.Sprintf("r.lan/i:%03d", n), By: "x"})
	}
	b.want(bus.Entry[schemas.WantedImages]{}, items...)
	b.said("the first is pulled", func(v schemas.Beat) bool { return missing(v, items[0].Image).State == schemas.MissingPulling })
	goOn <- struct{}{}
	beat := b.said("the second is pulled", func(v schemas.Beat) bool { return missing(v, items[1].Image).State == schemas.MissingPulling })
	if len(beat.Missing) != schemas.MaxBeatMissing || beat.Unnamed != schemas.MaxWanted-schemas.MaxBeatMissing {
		t.Errorf("%d are named and %d are not", len(beat.Missing), beat.Unnamed)
	}
	if first := beat.Missing[:3]; first[0].Image != items[1].Image || first[1].State != schemas.MissingFailed || first[2].State != schemas.MissingWaits {
		t.Errorf("the first of them: %+v", first)
	}
}

// While a task's image is pulled, no wanted one is begun.
func TestTasksComeBeforeWantedImages(t *testing.T) {
	b := newBench(t)
	pulls, goOn := make(chan string, 100), make(chan struct{})
	b.over = &spy{Runtime: b.rt, image: func(ctx context.Context, progress func(agent.Progress)) error {
		progress(agent.Progress{Sentence: "pulling"})
		pulls <- "pull"
		select {
		case <-goOn:
		case <-ctx.Done():
		}
		return context.Cause(ctx)
	}}
	b.start()
	a := assignment(b.registered("").Epoch, 1)
	b.run(a, "exit", "0")
	<-pulls
	e := b.want(bus.Entry[schemas.WantedImages]{}, schemas.WantedImage{Image: "r.lan/a:1", By: "x"})
	first := b.said("a waits", func(v schemas.Beat) bool {
		return v.Wanted == e.Revision && missing(v, "r.lan/a:1").State == schemas.MissingWaits
	})
	b.said("time has gone by", func(v schemas.Beat) bool { return v.Sequence > first.Sequence+8 })
	if len(pulls) > 0 {
		t.Error("a pull was begun beside the task's")
	}
	close(goOn)
	b.end(a)
	b.said("a is there", func(v schemas.Beat) bool { return len(v.Missing) == 0 })
}

// The report says which image a task runs, and an order that says which is obeyed.
func TestReportsSayWhichImageItIs(t *testing.T) {
	b := newBench(t)
	b.start()
	epoch := b.registered("").Epoch
	a := assignment(epoch, 1)
	b.run(a, "exit", "0")
	if r := b.end(a); r.Image == nil || !strings.HasPrefix(r.Image.ID, "sha256:") {
		t.Errorf("the image is %+v", r.Image)
	}
	pinned := &schemas.Resolved{ID: "sha256:" + strings.Repeat("ab", 32)}
	a = assignment(epoch, 1)
	spec := schemas.DefaultSpec()
	spec.Image, spec.Command = "fake", []string{"exit", "0"}
	b.order(schemas.Order{Assignment: a, Want: schemas.WantRun, Spec: &spec, TimeLeft: spec.TTL, Image: pinned})
	if r := b.end(a); r.Image == nil || r.Image.ID != pinned.ID {
		t.Errorf("the image is %+v, not the one that was ordered", r.Image)
	}
}
