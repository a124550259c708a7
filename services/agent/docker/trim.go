package docker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
)

// Mark is a level of the images: bytes of those that the agent pulled, or a share of the
// disk that Docker's data is on, whatever fills it. The zero value is no mark.
type Mark struct {
	Bytes   schemas.Size
	Percent float64
}

// ParseMark reads "40GiB" or "85%"; "" is no mark.
func ParseMark(s string) (Mark, error) {
	if s == "" {
		return Mark{}, nil
	}
	if p, ok := strings.CutSuffix(s, "%"); ok {
		v, err := strconv.ParseFloat(p, 64)
		if err != nil || math.IsNaN(v) || v <= 0 || v >= 100 {
			return Mark{}, errors.New(`must be above 0% and below 100%, such as "85%"`)
		}
		return Mark{Percent: v}, nil
	}
	size, err := schemas.ParseSize(s)
	if err != nil || size <= 0 {
		return Mark{}, errors.New(`must be a size such as "40GiB", or a share of the disk such as "85%"`)
	}
	return Mark{Bytes: size}, nil
}

// ParseMarks reads the two marks of a cache. A low one alone is refused, and both are of
// one kind. Without a low one it is nine tenths of the high.
func ParseMarks(high, low string) (h, l Mark, err error) {
	if h, err = ParseMark(high); err != nil {
		return h, l, fmt.Errorf("the high mark of the image cache %w", err)
	}
	if l, err = ParseMark(low); err != nil {
		return h, l, fmt.Errorf("the low mark of the image cache %w", err)
	}
	switch {
	case h == (Mark{}) && l != (Mark{}):
		err = errors.New("the image cache has a low mark and no high one")
	case l == (Mark{}):
		l = Mark{Bytes: h.Bytes / 10 * 9, Percent: h.Percent * 0.9}
	case (h.Bytes > 0) != (l.Bytes > 0):
		err = errors.New("the marks of the image cache must both be sizes, or both shares of the disk")
	case l.Bytes > h.Bytes || l.Percent > h.Percent:
		err = errors.New("the low mark of the image cache is above the high one")
	}
	return h, l, err
}

// trim removes images that this agent pulled while there is more than the high mark, those
// not used for longest first, until there is no more than the low one. What is used, kept,
// or was used a moment ago stays, and so does what somebody else gave a name.
func (s *stock) trim(ctx context.Context) error {
	s.mu.Lock()
	known := s.kept != nil
	s.mu.Unlock()
	if !known {
		return nil
	}
	high, low := s.r.cfg.CacheHigh, s.r.cfg.CacheLow
	if over, err := s.above(high); err != nil || !over {
		return err
	}
	inUse, err := s.inUse(ctx)
	if err != nil {
		return err
	}
	for _, id := range s.victims(inUse) {
		if over, err := s.above(low); err != nil || !over {
			return err
		}
		if err := s.remove(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// above says whether there is more than a mark.
func (s *stock) above(m Mark) (bool, error) {
	switch {
	case m.Bytes > 0:
		s.mu.Lock()
		defer s.mu.Unlock()
		var sum int64
		for id := range s.own {
			sum += s.listed[id].bytes
		}
		return sum > int64(m.Bytes), nil
	case m.Percent > 0:
		var fs unix.Statfs_t
		if err := unix.Statfs(s.r.dockerRoot, &fs); err != nil {
			return false, fmt.Errorf("ask how full the disk of Docker's data is (%s): %w; give the marks of the image cache as sizes", s.r.dockerRoot, err)
		}
		// As df has it: of what others than root may use.
		used, free := float64(fs.Blocks-fs.Bfree), float64(fs.Bavail)
		return used+free > 0 && 100*used/(used+free) > m.Percent, nil
	}
	return false, nil
}

// inUse gives the images of all containers, whoever made them. Those count as used now.
func (s *stock) inUse(ctx context.Context) (map[string]bool, error) {
	list, err := s.r.docker.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	used := map[string]bool{}
	for _, c := range list.Items {
		used[c.ImageID] = true
	}
	now := time.Now().UTC()
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range used {
		if _, own := s.own[id]; own {
			s.used[id], s.unsaved = now, true
		}
	}
	return used, nil
}

// victims are the images that may go, in the order in which they should.
func (s *stock) victims(inUse map[string]bool) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids := slices.Collect(maps.Keys(s.own))
	ids = slices.DeleteFunc(ids, func(id string) bool {
		l, there := s.listed[id]
		return !there || inUse[id] || s.spared(id, l)
	})
	slices.SortFunc(ids, func(a, b string) int {
		return cmp.Or(s.used[a].Compare(s.used[b]), cmp.Compare(a, b))
	})
	return ids
}

// spared says whether an image that no container has stays all the same. It runs under
// s.mu.
func (s *stock) spared(id string, l listed) bool {
	if time.Since(s.used[id]) < s.r.cfg.CacheRest {
		return true
	}
	for _, n := range slices.Concat(l.tags, l.digests) {
		if s.kept[schemas.ImageName(n)] {
			return true
		}
	}
	own := s.own[id].Names
	return slices.ContainsFunc(l.tags, func(tag string) bool { return !slices.Contains(own, schemas.ImageName(tag)) })
}

// remove takes one image away, unless it is used after all.
func (s *stock) remove(ctx context.Context, id string) error {
	s.mu.Lock()
	l := s.listed[id]
	if s.spared(id, l) {
		s.mu.Unlock()
		return nil
	}
	gone := make(chan struct{})
	s.removing[id] = gone
	s.mu.Unlock()
	began := time.Now()
	err := s.untag(ctx, id, l)
	s.r.metrics.done(ctx, "image_remove", began, err)

	s.mu.Lock()
	delete(s.removing, id)
	close(gone)
	if err == nil || cerrdefs.IsNotFound(err) {
		delete(s.own, id)
		delete(s.listed, id)
		s.images, s.unsaved = nil, true
	}
	s.mu.Unlock()
	s.r.mu.Lock()
	delete(s.r.images, id)
	s.r.mu.Unlock()
	switch {
	case err == nil:
		s.r.metrics.removed.Inc()
		s.r.metrics.removedBytes.Add(float64(l.bytes))
		s.r.log.Info().Str("image", short(id)).Int64("bytes", l.bytes).Msg("removed an image that was not used for long")
	case cerrdefs.IsConflict(err), cerrdefs.IsNotFound(err): // somebody uses it since
	default:
		return fmt.Errorf("remove image %s: %w", short(id), err)
	}
	return nil
}

// untag removes each name that is still the image's; the layers go with the last. One that
// has lost its names meanwhile goes by its id.
func (s *stock) untag(ctx context.Context, id string, l listed) error {
	names := l.tags
	if len(names) == 0 {
		names = l.digests
	}
	var own []string
	for _, n := range names { // one may have been pulled, or tagged, anew since the list was made
		got, err := s.r.docker.ImageInspect(ctx, n)
		if err != nil && !cerrdefs.IsNotFound(err) {
			return err
		}
		if err == nil && got.ID == id {
			own = append(own, n)
		}
	}
	if len(own) == 0 {
		own = []string{id}
	}
	for _, n := range own {
		if _, err := s.r.docker.ImageRemove(ctx, n, client.ImageRemoveOptions{PruneChildren: true}); err != nil {
			return err
		}
	}
	return nil
}
