package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/schemas"
)

// wantImages changes the list of wanted images, mostly by WantedImages.With, which lets one
// source want exactly some. It gives the list as it is then.
func (g *Gateway) wantImages(ctx context.Context, change func(schemas.WantedImages) (schemas.WantedImages, error)) (bus.Entry[schemas.WantedImages], error) {
	for {
		e, err := g.wanted.Get(ctx, schemas.KeyWanted)
		fresh := errors.Is(err, bus.ErrNotFound)
		if err != nil && !fresh {
			return e, err
		}
		next, err := change(e.Value)
		if errors.Is(err, schemas.ErrUnchanged) {
			return e, nil
		}
		if err != nil {
			return e, err
		}
		if fresh {
			e, err = g.wanted.Create(ctx, schemas.KeyWanted, next, "")
		} else {
			e, err = g.wanted.Replace(ctx, e, next, "")
		}
		if !errors.Is(err, bus.ErrConflict) || ctx.Err() != nil {
			return e, err
		}
	}
}

// listImages is GET /v1/images.
func (g *Gateway) listImages(w *response, r *http.Request) error {
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	var of schemas.WorkerID
	if name := q.get("worker"); name != "" {
		if of, err = schemas.ParseWorkerID(name); err != nil {
			return badQuery("worker", "is no worker's name")
		}
	}
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	e, err := g.wanted.Get(ctx, schemas.KeyWanted)
	if err != nil && !errors.Is(err, bus.ErrNotFound) {
		return readError(err)
	}
	beats := g.fleet.sorted()
	if of != "" {
		if beats = slices.DeleteFunc(beats, func(b schemas.Beat) bool { return b.Worker != of }); len(beats) == 0 {
			return noWorker()
		}
	}
	list := schemas.ImageList{Items: []schemas.Image{}, Workers: []schemas.WorkerImages{}}
	for _, i := range e.Value.Items {
		list.Items = append(list.Items, g.fleet.image(i, e.Revision, beats))
	}
	for _, b := range beats {
		if !b.Lost() {
			list.Workers = append(list.Workers, schemas.WorkerImages{Worker: b.Worker, Cache: b.Cache, Names: append([]string{}, b.Images...)})
		}
	}
	return answer(w, http.StatusOK, list)
}

// wantImage is POST /v1/images. It takes the place of what was asked for the image before.
func (g *Gateway) wantImage(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	var ask schemas.WantImage
	if err := schemas.DecodeStrict(body, &ask); err != nil {
		return err
	}
	if faults := ask.Validate(); len(faults) > 0 {
		return schemas.InvalidSpec(faults)
	}
	return g.changeWanted(w, r, ask.Image, &schemas.WantedImage{Image: ask.Image, By: schemas.ByOperator, Since: time.Now().UTC(),
		Workers: ask.Workers, Constraints: ask.Constraints, Credentials: ask.Credentials})
}

// releaseImage is DELETE /v1/images.
func (g *Gateway) releaseImage(w *response, r *http.Request) error {
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	image := q.get("image")
	if image == "" {
		return badQuery("image", "is needed: the name as it was asked for")
	}
	return g.changeWanted(w, r, image, nil)
}

// changeWanted puts a wish in the place of what operators asked for an image before, or ends
// that if it is nil, and answers with how the workers stand to it.
func (g *Gateway) changeWanted(w *response, r *http.Request, image string, wish *schemas.WantedImage) error {
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	var shown schemas.WantedImage
	e, err := g.wantImages(ctx, func(all schemas.WantedImages) (schemas.WantedImages, error) {
		own := all.Of(schemas.ByOperator)
		at := slices.IndexFunc(own, func(i schemas.WantedImage) bool { return i.Image == image })
		if wish == nil && at < 0 {
			return all, &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Detail: "nobody has asked for that image; GET /v1/images lists what is wanted, and by whom"}
		}
		if at >= 0 {
			shown = own[at] // by itself: Delete moves what lies behind to this place
			own = slices.Delete(own, at, at+1)
		}
		if wish != nil {
			shown, own = *wish, append(own, *wish)
		}
		return all.With(schemas.ByOperator, own)
	})
	switch _, refused := errors.AsType[*schemas.Error](err); {
	case errors.Is(err, schemas.ErrTooManyWanted):
		return &schemas.Error{Status: http.StatusConflict, Code: schemas.CodeStateConflict,
			Detail: fmt.Sprintf("workers are asked to hold %d images already; release one that is no longer needed", schemas.MaxWanted)}
	case refused:
		return err
	case err != nil:
		return busError(err, "")
	}
	g.log.Info().Str("image", image).Bool("wanted", wish != nil).Msg("wanted images changed")
	for _, i := range e.Value.Of(schemas.ByOperator) {
		if i.Image == image { // with the time of the first wish
			shown = i
		}
	}
	beats := g.fleet.sorted()
	if wish == nil {
		beats = nil
	}
	return answer(w, http.StatusOK, g.fleet.image(shown, e.Revision, beats))
}

// sorted gives the beats by name.
func (f *fleet) sorted() []schemas.Beat {
	var list []schemas.Beat
	f.beats.Range(func(key string, b schemas.Beat, _ uint64) bool {
		b.Worker = schemas.WorkerID(key)
		list = append(list, b)
		return true
	})
	slices.SortFunc(list, func(a, b schemas.Beat) int { return strings.Compare(string(a.Worker), string(b.Worker)) })
	return list
}

// image says how workers stand to a wanted image. revision is that of the list.
func (f *fleet) image(i schemas.WantedImage, revision uint64, beats []schemas.Beat) schemas.Image {
	shown := schemas.Image{WantedImage: i, Status: []schemas.ImageStatus{}}
	now := time.Now()
	for _, b := range beats {
		if b.Lost() || !i.On(b.Worker, b.Host) {
			continue
		}
		s := schemas.ImageStatus{Worker: b.Worker, State: schemas.ImagePresent}
		at := slices.IndexFunc(b.Missing, func(m schemas.MissingImage) bool { return m.Image == i.Image })
		switch {
		case f.silent(b.Worker, now):
			s.State = schemas.ImageAway
		case b.Wanted < revision:
			s.State = schemas.ImageUnheard
		case at >= 0:
			m := b.Missing[at]
			s.State, s.Message, s.Pull = schemas.ImageState(m.State), m.Message, m.Pull
		case b.Unnamed > 0 && !slices.Contains(b.Images, schemas.ImageName(i.Image)):
			s.State = schemas.ImageUnknown
		}
		shown.Status = append(shown.Status, s)
	}
	return shown
}

// silent says whether no beat of a worker has come for a lease.
func (f *fleet) silent(w schemas.WorkerID, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	seen, ok := f.seen[w]
	return ok && now.Sub(seen) > f.lease
}
