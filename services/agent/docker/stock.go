package docker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// stock is what the worker has in images: what Docker says that it has, who of them was
// used when, and which of them this agent has pulled. Only those are ever removed.
//
//	Docker's events ──▶ follow ──▶ list ──▶ Images, for the beat
//	pulls, minutes  ──────┘          └────▶ trim: above the high mark, down to the low one
type stock struct {
	r    *Runtime
	path string // of the file that remembers own

	nudge chan struct{} // something changed: list again

	saving   sync.Mutex // the file
	mu       sync.Mutex
	listed   map[string]listed        // under mu: by id
	own      map[string]ownImage      // under mu: by id
	used     map[string]time.Time     // under mu: by id, by tasks and programs of this worker
	kept     map[string]bool          // under mu: names that are never removed; nil until they are known
	removing map[string]chan struct{} // under mu: closed when it is done
	images   *agent.Images            // under mu: nil where it must be made anew
	unsaved  bool                     // under mu: own, or used of one, is not in the file yet
}

// listed is an image as Docker lists it.
type listed struct {
	tags, digests []string
	bytes         int64
}

// ownImage is one that this agent pulled, which was not there before.
type ownImage struct {
	Names    []string  `json:"names"` // by which it was pulled
	PulledAt time.Time `json:"pulled_at"`
	UsedAt   time.Time `json:"used_at"`
}

// How often the stock looks.
const (
	stockSettle = 300 * time.Millisecond // events come in crowds
	stockEvery  = time.Minute
	stockAgain  = 5 * time.Second // after Docker could not say
)

func newStock(r *Runtime) *stock {
	s := &stock{r: r, path: filepath.Join(r.cfg.StateDir, "images.json"), nudge: make(chan struct{}, 1),
		listed: map[string]listed{}, own: map[string]ownImage{}, used: map[string]time.Time{}, removing: map[string]chan struct{}{}}
	if err := s.load(); err != nil {
		r.log.Warn().Err(err).Msg("what this worker pulled before is not known: none of it is removed")
	}
	return s
}

func (s *stock) load() error {
	b, err := os.ReadFile(s.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var file struct {
		Images map[string]ownImage `json:"images"`
	}
	if err == nil {
		err = json.Unmarshal(b, &file)
	}
	if err != nil {
		return fmt.Errorf("read the list of own images: %w", err)
	}
	for id, o := range file.Images {
		s.own[id], s.used[id] = o, o.UsedAt
	}
	return nil
}

// save writes the file if it would say anything new.
func (s *stock) save() error {
	s.saving.Lock()
	defer s.saving.Unlock()
	s.mu.Lock()
	if !s.unsaved {
		s.mu.Unlock()
		return nil
	}
	own := maps.Clone(s.own)
	for id, o := range own {
		o.UsedAt = s.used[id]
		own[id] = o
	}
	s.unsaved = false
	s.mu.Unlock()
	b, err := json.Marshal(map[string]any{"images": own})
	if err == nil {
		err = os.WriteFile(s.path+".new", b, 0o600)
	}
	if err == nil {
		err = os.Rename(s.path+".new", s.path)
	}
	if err != nil {
		s.mu.Lock()
		s.unsaved = true
		s.mu.Unlock()
		return fmt.Errorf("write the list of own images: %w", err)
	}
	return nil
}

// look asks for a new list soon.
func (s *stock) look() {
	select {
	case s.nudge <- struct{}{}:
	default:
	}
}

// follow keeps the stock as Docker has it until ctx ends. Events say that something
// changed; what it is says the list alone, so that none can be missed for good.
func (s *stock) follow(ctx context.Context) {
	every := time.NewTicker(stockEvery)
	defer every.Stop()
	for {
		stream, end := context.WithCancel(ctx)
		events := s.r.docker.Events(stream, client.EventsListOptions{Filters: make(client.Filters).Add("type", "image")})
		broken := false
		for !broken {
			wait := stockSettle
			if err := s.pass(ctx); err != nil {
				if ctx.Err() == nil {
					s.r.log.Warn().Err(err).Msg("images")
				}
				wait = stockAgain
				s.look()
			}
			select { // what comes meanwhile is in the next list
			case <-time.After(wait):
			case <-ctx.Done():
			}
			select {
			case <-ctx.Done():
				end()
				_ = s.save()
				return
			case _, ok := <-events.Messages:
				broken = !ok
			case <-events.Err:
				broken = true
			case <-s.nudge:
			case <-every.C:
			}
			for more := !broken; more; {
				select {
				case _, ok := <-events.Messages:
					broken, more = !ok, ok
				default:
					more = false
				}
			}
		}
		end()
		select {
		case <-time.After(stockAgain):
		case <-ctx.Done():
			return
		}
	}
}

// pass lists, removes what is too much, and remembers.
func (s *stock) pass(ctx context.Context) error {
	if err := s.list(ctx); err != nil {
		return err
	}
	if err := s.trim(ctx); err != nil {
		return err
	}
	return s.save()
}

// list asks Docker what it has.
func (s *stock) list(ctx context.Context) error {
	before := time.Now()
	list, err := s.r.docker.ImageList(ctx, client.ImageListOptions{})
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	now := make(map[string]listed, len(list.Items))
	for _, i := range list.Items {
		now[i.ID] = listed{tags: realNames(i.RepoTags), digests: realNames(i.RepoDigests), bytes: i.Size}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed, s.images = now, nil
	for id, at := range s.used {
		if _, there := now[id]; !there && at.Before(before) {
			delete(s.used, id)
		}
	}
	for id, o := range s.own {
		if _, there := now[id]; !there && o.PulledAt.Before(before) {
			delete(s.own, id)
			s.unsaved = true
		}
	}
	return nil
}

// realNames leaves out what Docker writes for none.
func realNames(all []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(n string) bool { return strings.Contains(n, "<none>") })
}

// ids gives the ids of the images that are here now.
func (s *stock) ids(ctx context.Context) (map[string]bool, error) {
	list, err := s.r.docker.ImageList(ctx, client.ImageListOptions{})
	if err != nil {
		return nil, err
	}
	ids := make(map[string]bool, len(list.Items))
	for _, i := range list.Items {
		ids[i.ID] = true
	}
	return ids, nil
}

// pulled notes what a pull has brought, unless it was here before.
func (s *stock) pulled(ctx context.Context, name string, before map[string]bool) {
	defer s.look()
	got, err := s.r.docker.ImageInspect(ctx, name)
	if err != nil {
		return
	}
	now := time.Now().UTC()
	s.mu.Lock()
	o, own := s.own[got.ID]
	if own = own || !before[got.ID]; own {
		if name = schemas.ImageName(name); !slices.Contains(o.Names, name) && len(o.Names) < 64 {
			o.Names = append(slices.Clone(o.Names), name)
		}
		o.PulledAt = now
		s.own[got.ID], s.used[got.ID], s.unsaved = o, now, true
	}
	s.mu.Unlock()
	if !own {
		return
	}
	if err := s.save(); err != nil {
		s.r.log.Warn().Err(err).Msg("images")
	}
}

// use notes that an image is used now. If it is just being removed that is refused, with a
// channel that is closed when it is done.
func (s *stock) use(id string) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if gone := s.removing[id]; gone != nil {
		return gone
	}
	s.used[id], s.images = time.Now().UTC(), nil
	if _, own := s.own[id]; own {
		s.unsaved = true
	}
	return nil
}

// Keep implements agent.Runtime.
func (r *Runtime) Keep(images []string) {
	kept := make(map[string]bool, len(images))
	for _, i := range images {
		kept[schemas.ImageName(i)] = true
	}
	r.stock.mu.Lock()
	defer r.stock.mu.Unlock()
	if r.stock.kept == nil { // nothing was removed so far
		r.stock.look()
	}
	r.stock.kept = kept
}

// Images implements agent.Runtime.
func (r *Runtime) Images() *agent.Images {
	s := r.stock
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.images != nil {
		return s.images
	}
	ids := slices.SortedFunc(maps.Keys(s.listed), func(a, b string) int {
		return cmp.Or(s.used[b].Compare(s.used[a]), cmp.Compare(a, b))
	})
	var names []string
	var cache schemas.ImageCache
	for _, id := range ids {
		l := s.listed[id]
		for _, name := range slices.Concat(l.tags, l.digests) {
			names = append(names, schemas.ImageName(name))
		}
		cache.Images++
		cache.Bytes += schemas.Size(l.bytes)
		if _, own := s.own[id]; own {
			cache.Own++
			cache.OwnAll += schemas.Size(l.bytes)
		}
	}
	s.images = agent.NewImages(names, cache)
	return s.images
}
