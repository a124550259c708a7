package schemas_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

var (
	idA     = "sha256:" + strings.Repeat("a1", 32)
	digestA = "sha256:" + strings.Repeat("a2", 32)
	digestB = "sha256:" + strings.Repeat("b2", 32)
)

func TestImageNames(t *testing.T) {
	for image, want := range map[string]string{
		"busybox":                              "busybox:latest",
		"docker.io/library/busybox:1":          "busybox:1",
		"registry.lan:5000/x/y":                "registry.lan:5000/x/y:latest",
		"registry.lan/x@" + digestA:            "registry.lan/x@sha256:a2a2a2a2a2a2",
		"registry.lan/x:1@" + digestA:          "registry.lan/x@sha256:a2a2a2a2a2a2",
		"https://a/b":                          "",
		"":                                     "",
		"docker.io/library/busybox@" + digestB: "busybox@sha256:b2b2b2b2b2b2",
	} {
		if got := schemas.ImageName(image); got != want {
			t.Errorf("%q is %q, want %q", image, got, want)
		}
	}
	if got := schemas.PinnedImage("registry.lan/x:1", digestA); got != "registry.lan/x@"+digestA {
		t.Errorf("pinned: %q", got)
	}
	if got := schemas.PinnedImage("registry.lan/x:1", ""); got != "" {
		t.Errorf("pinned without a digest: %q", got)
	}
}

// What the first worker resolved holds for all attempts, and its order says so.
func TestTheFirstResolutionOfAnImageHolds(t *testing.T) {
	start := func(image string) schemas.Record {
		r := newRecord(schemas.OnLostRequeue)
		r.Spec.Image = image
		r = must(t, r, schemas.Choose{Meta: meta(t0.Add(1 * time.Second)), Worker: "w1", Epoch: "e1"})
		if o := schemas.NewOrder(r, 2, r.Assignment(), t0); o.Image != nil {
			t.Errorf("the first order names the image %+v", o.Image)
		}
		return r
	}
	resolved := func(r schemas.Record, i *schemas.Resolved) schemas.Settle {
		return schemas.Settle{Meta: meta(t0.Add(2 * time.Second)), Report: schemas.Report{Assignment: r.Assignment(), Phase: schemas.PhaseRunning, Ran: true, Image: i}}
	}
	r := start("registry.lan/x:1")
	r = must(t, r, resolved(r, &schemas.Resolved{ID: idA, Digest: digestA}))
	r = must(t, r, schemas.Lose{Meta: meta(t0.Add(3 * time.Second)), Worker: "w1", Epoch: "e1"})
	r = must(t, r, schemas.Choose{Meta: meta(t0.Add(4 * time.Second)), Worker: "w2", Epoch: "e2"})
	if o := schemas.NewOrder(r, 5, r.Assignment(), t0); o.Image == nil || o.Image.Digest != digestA || o.Image.ID != idA {
		t.Errorf("the second order names the image %+v", o.Image)
	}
	r = must(t, r, resolved(r, &schemas.Resolved{ID: "sha256:" + strings.Repeat("b1", 32), Digest: digestB}))
	if r.ImageDigest != digestA || r.ImageID != idA {
		t.Errorf("the second worker changed the image to %s %s", r.ImageID, r.ImageDigest)
	}

	for name, bad := range map[string]*schemas.Resolved{
		"no id":           {Digest: digestA},
		"a long id":       {ID: "sha256:" + strings.Repeat("a", 1<<20)},
		"not hexadecimal": {ID: "sha256:" + strings.Repeat("zz", 32)},
	} {
		r := start("registry.lan/x:1")
		if r = must(t, r, resolved(r, bad)); r.ImageID != "" || r.ImageDigest != "" {
			t.Errorf("%s: a worker made the image %.80s %.80s", name, r.ImageID, r.ImageDigest)
		}
	}
	r = start("registry.lan/x@" + digestA)
	if r = must(t, r, resolved(r, &schemas.Resolved{ID: idA, Digest: digestB})); r.ImageDigest != digestA {
		t.Errorf("a worker replaced the digest of the spec by %s", r.ImageDigest)
	}
}

func TestPullProgress(t *testing.T) {
	r := must(t, newRecord(schemas.OnLostRequeue), schemas.Choose{Meta: meta(t0.Add(1 * time.Second)), Worker: "w1", Epoch: "e1"})
	say := func(sentence string, p *schemas.Pull) {
		r = must(t, r, schemas.Settle{Meta: meta(t0.Add(2 * time.Second)), Report: schemas.Report{Assignment: r.Assignment(), Phase: schemas.PhaseAccepted, Progress: sentence, Pull: p}})
	}
	say("a", &schemas.Pull{Done: 1, Total: 2, Layers: 1})
	if r.ImagePull == nil || r.ImagePull.Done != 1 || r.View(1, t0).ImagePull == nil {
		t.Errorf("the pull is %+v", r.ImagePull)
	}
	say("b", &schemas.Pull{Done: 3, Total: 2})
	if r.ImagePull != nil {
		t.Errorf("more than all is done: %+v", r.ImagePull)
	}
	say("c", &schemas.Pull{Done: 1, Total: 2, Layers: 1})
	r = must(t, r, schemas.Settle{Meta: meta(t0.Add(3 * time.Second)), Report: schemas.Report{Assignment: r.Assignment(), Phase: schemas.PhaseRunning, Ran: true}})
	if r.ImagePull != nil {
		t.Errorf("it runs, and pulls %+v", r.ImagePull)
	}
}

func TestWantedImages(t *testing.T) {
	image := func(name string, at int) schemas.WantedImage {
		return schemas.WantedImage{Image: name, Since: t0.Add(time.Duration(at) * time.Second)}
	}
	w, err := schemas.WantedImages{}.With("template:a", []schemas.WantedImage{image("x:1", 1), image("y:1", 1), image("x:1", 2)})
	if err != nil || len(w.Items) != 2 {
		t.Fatal(w, err)
	}
	if _, err := w.With("template:a", []schemas.WantedImage{image("y:1", 9), image("x:1", 9)}); !errors.Is(err, schemas.ErrUnchanged) {
		t.Errorf("the same again: %v", err)
	}
	w, err = w.With(schemas.ByOperator, []schemas.WantedImage{image("x:1", 5)})
	if err != nil || len(w.Items) != 3 {
		t.Fatal(w, err)
	}
	w, err = w.With("template:a", []schemas.WantedImage{image("y:1", 9)})
	if err != nil || len(w.Items) != 2 || len(w.Of("template:a")) != 1 || !w.Of("template:a")[0].Since.Equal(t0.Add(time.Second)) {
		t.Fatal(w, err)
	}
	var many []schemas.WantedImage
	for i := range schemas.MaxWanted {
		many = append(many, image(fmt.Sprintf("m:%d", i), 0))
	}
	if _, err := w.With("template:many", many); !errors.Is(err, schemas.ErrTooManyWanted) {
		t.Errorf("too many: %v", err)
	}

	host := schemas.Host{OS: "linux", Arch: "amd64", Labels: map[string]string{"zone": "a"}}
	for name, c := range map[string]struct {
		image schemas.WantedImage
		want  bool
	}{
		"for all":             {schemas.WantedImage{}, true},
		"for this worker":     {schemas.WantedImage{Workers: []schemas.WorkerID{"w2", "w1"}}, true},
		"for another":         {schemas.WantedImage{Workers: []schemas.WorkerID{"w2"}}, false},
		"for its zone":        {schemas.WantedImage{Constraints: map[string]string{"zone": "a", "arch": "amd64"}}, true},
		"for another zone":    {schemas.WantedImage{Constraints: map[string]string{"zone": "b"}}, false},
		"for another machine": {schemas.WantedImage{Constraints: map[string]string{"arch": "arm64"}}, false},
	} {
		if got := c.image.On("w1", host); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestWhatIsAskedOfWorkersIsChecked(t *testing.T) {
	good := schemas.WantImage{Image: "registry.lan:5000/a:1", Workers: []schemas.WorkerID{"w1"}, Credentials: "registry.lan:5000"}
	if faults := good.Validate(); len(faults) > 0 {
		t.Error(faults)
	}
	bad := schemas.WantImage{Image: "https://a", Workers: []schemas.WorkerID{"W 1"}, Credentials: "a b"}
	if faults := bad.Validate(); len(faults) != 3 {
		t.Error(faults)
	}
}
