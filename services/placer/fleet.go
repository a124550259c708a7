package placer

import (
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// resources are what placement counts. Processors are in billionths, so that sums
// stay exact however often tasks come and go.
type resources struct {
	cpus   int64
	memory int64
	gpus   int
}

func resourcesOf(r schemas.Resources) resources {
	return resources{cpus: r.CPUs.Nano(), memory: int64(r.Memory), gpus: r.GPUs}
}

// worker is a worker with what its tasks were promised. It may be here without a
// beat while a record still says that it holds a task.
type worker struct {
	id    schemas.WorkerID
	index int // in fleet.list

	known    bool // it has a beat
	epoch    schemas.Epoch
	lost     bool
	seen     time.Time // when its newest beat was first seen here
	draining bool
	host     schemas.Host
	total    resources
	images   []string // names, as schemas.ImageName has them
	imageSet map[string]struct{}

	used   resources
	tasks  int
	blobs  schemas.BlobFilter
	coming map[blobSum]int      // blobs that its tasks name, and of how many: it has them, or fetches them
	came   map[blobSum]struct{} // those of tasks that ran and are over since its last beat
	better bool                 // it is in fleet.better
	hold   *hold                // it is kept free for a task that has waited long
}

// free is what is left, possibly less than nothing.
func (w *worker) free() resources {
	return resources{w.total.cpus - w.used.cpus, w.total.memory - w.used.memory, w.total.gpus - w.used.gpus}
}

// fleet is all workers, and those that may have room now for what had none.
type fleet struct {
	byID  map[schemas.WorkerID]*worker
	list  []*worker // by id; those with a beat
	lease time.Duration

	// better are the workers that can take more than they could when the blocked
	// shapes were last tried on them.
	better []*worker
	last   int // round robin: index of the worker chosen last
}

func newFleet(lease time.Duration) *fleet {
	return &fleet{byID: map[schemas.WorkerID]*worker{}, lease: lease, last: -1}
}

func (f *fleet) get(id schemas.WorkerID) *worker {
	w := f.byID[id]
	if w == nil {
		w = &worker{id: id}
		f.byID[id] = w
	}
	return w
}

// beat takes a worker's beat, seen here at now. It says whether this is a
// registration that was not there before.
func (f *fleet) beat(b schemas.Beat, now time.Time) (registered bool) {
	w := f.get(b.Worker)
	was := *w
	if !w.known {
		w.known = true
		at, _ := slices.BinarySearchFunc(f.list, w.id, func(w *worker, id schemas.WorkerID) int {
			return strings.Compare(string(w.id), string(id))
		})
		f.list = slices.Insert(f.list, at, w)
		f.reindex()
	}
	w.epoch, w.lost, w.seen, w.host = b.Epoch, b.Lost(), now, b.Host
	w.blobs, w.came = b.Blobs, nil
	w.total = resources{cpus: b.Host.CPUs.Nano(), memory: int64(b.Host.Memory), gpus: b.Host.GPUs}
	if images := b.Images[:min(len(b.Images), schemas.MaxBeatImages)]; !slices.Equal(w.images, images) {
		w.images, w.imageSet = images, make(map[string]struct{}, len(images))
		for _, image := range images {
			w.imageSet[image] = struct{}{}
		}
	}
	registered = !w.lost && (!was.known || was.epoch != w.epoch || was.lost)
	if registered || f.silence(&was, now) > f.lease || !sameHost(was.host, w.host) {
		f.improved(w)
	}
	return registered
}

func sameHost(a, b schemas.Host) bool {
	return a.CPUs == b.CPUs && a.Memory == b.Memory && a.Slots == b.Slots && a.GPUs == b.GPUs &&
		a.Arch == b.Arch && a.Cache == b.Cache && a.OS == b.OS && maps.Equal(a.Labels, b.Labels) && slices.Equal(a.Kinds, b.Kinds) && slices.Equal(a.Credentials, b.Credentials)
}

// gone forgets a worker's beat; what its tasks were promised stays.
func (f *fleet) gone(id schemas.WorkerID) {
	w := f.byID[id]
	if w == nil || !w.known {
		return
	}
	w.known = false
	f.list = slices.Delete(f.list, w.index, w.index+1)
	f.reindex()
	f.tidy(w)
}

func (f *fleet) reindex() {
	for i, w := range f.list {
		w.index = i
	}
	f.last = -1
}

// awake counts the silence of all workers anew: while this placer was away from the
// bus it could not have seen their beats.
func (f *fleet) awake(now time.Time) {
	for _, w := range f.list {
		if f.silence(w, now) > f.lease {
			f.improved(w)
		}
		w.seen = now
	}
}

func (f *fleet) drain(id schemas.WorkerID, draining bool) {
	w := f.get(id)
	if w.draining && !draining {
		f.improved(w)
	}
	w.draining = draining
	f.tidy(w)
}

// take promises need to a worker.
func (f *fleet) take(id schemas.WorkerID, need need) {
	w := f.get(id)
	w.expect(need.blobs, 1)
	w.used.cpus += need.cpus
	w.used.memory += need.memory
	w.used.gpus += need.gpus
	w.tasks++
}

// give takes the promise back.
func (f *fleet) give(id schemas.WorkerID, need need) {
	w := f.get(id)
	w.expect(need.blobs, -1)
	w.used.cpus -= need.cpus
	w.used.memory -= need.memory
	w.used.gpus -= need.gpus
	w.tasks--
	f.improved(w)
	f.tidy(w)
}

func (f *fleet) improved(w *worker) {
	if w.known && !w.better {
		w.better = true
		f.better = append(f.better, w)
	}
}

// tried ends what improved began.
func (f *fleet) tried() {
	for i, w := range f.better {
		w.better, f.better[i] = false, nil
	}
	f.better = f.better[:0]
}

// tidy drops a worker of which nothing is left to know.
func (f *fleet) tidy(w *worker) {
	if !w.known && w.tasks == 0 && !w.draining {
		delete(f.byID, w.id)
	}
}

// silence is how long no beat of the worker has been seen.
func (f *fleet) silence(w *worker, now time.Time) time.Duration {
	if !w.known {
		return math.MaxInt64
	}
	return now.Sub(w.seen)
}
