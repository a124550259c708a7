package placer

import (
	"bytes"
	"slices"
	"time"
	"unique"

	"github.com/nats-io/nats.go"

	"dayfly.dev/schemas"
)

// seen is what the view of tasks keeps of a record: all that placing it needs while
// it is queued, and hardly anything otherwise.
type seen struct {
	state  schemas.State
	worker schemas.WorkerID // while a worker holds it
	need   need             // while it is not final
	queued *queued          // while it is queued
}

// queued is what matters of a queued record.
type queued struct {
	accepted    time.Time
	priority    int
	image       string // as schemas.ImageName has it; by digest once it was resolved
	credentials string // of its registry
	kind        string
	constraints map[string]string
	labels      string        // constraints as one string
	wait        time.Duration // until it may be placed, from when it was queued
	avoid       []avoid
	note        string // why it is queued again
	attempt     int
	raw         []byte // the record
}

// avoid is a worker to skip, for a time that counts from when the task was queued.
type avoid struct {
	worker schemas.WorkerID
	length time.Duration
}

// sketch decodes the little of a record that placing looks at.
type sketch struct {
	Spec struct {
		Image       string            `json:"image"`
		Resources   schemas.Resources `json:"resources"`
		Priority    int               `json:"priority"`
		Constraints map[string]string `json:"constraints"`
		Kind        string            `json:"kind"`
		Credentials string            `json:"registry_credentials"`
	} `json:"spec"`
	Blobs      []schemas.BlobUse `json:"blobs"`
	State      schemas.State     `json:"state"`
	Message    string            `json:"message"`
	Reason     schemas.Reason    `json:"reason"`
	Worker     schemas.WorkerID  `json:"worker"`
	Attempt    int               `json:"attempt"`
	AcceptedAt time.Time         `json:"accepted_at"`
	QueuedAt   time.Time         `json:"queued_at"`
	BackAt     time.Time         `json:"back_at"`
	NotBefore  time.Time         `json:"not_before"`
	Avoid      []schemas.Avoid   `json:"avoid"`
	Digest     string            `json:"image_digest"`
}

// look reads a record as far as its state asks for. known gives what a task needs
// that has been seen before, which never changes.
func look(h nats.Header, data []byte, known func() (need, bool)) (seen, error) {
	state, worker := stateOf(h), holderOf(h)
	if state.Final() {
		return seen{state: state}, nil
	}
	if state.Held() && worker != "" {
		if need, ok := known(); ok {
			return seen{state: state, worker: worker, need: need}, nil
		}
	}
	var k sketch
	if err := schemas.Decode(data, &k); err != nil {
		return seen{}, err
	}
	s := seen{state: k.State, need: need{resourcesOf(k.Spec.Resources), blobsOf(k.Blobs)}}
	switch {
	case k.State.Final():
		s.need = need{}
	case k.State.Held():
		s.worker = intern(k.Worker)
	default:
		s.queued = k.queued(bytes.Clone(data))
	}
	return s, nil
}

func (k *sketch) queued(raw []byte) *queued {
	q := &queued{
		accepted: k.AcceptedAt, priority: k.Spec.Priority, image: unique.Make(imageOf(k.Spec.Image, k.Digest)).Value(), kind: k.Spec.Kind,
		credentials: unique.Make(k.Spec.Credentials).Value(),
		constraints: k.Spec.Constraints, attempt: k.Attempt, raw: raw,
	}
	if len(q.constraints) > 0 {
		q.labels = canonical(q.constraints)
	}
	// Lengths, both ends by the clock of the reaper that put it back, and not instants:
	// its clock may differ from ours.
	if !k.NotBefore.IsZero() {
		q.wait = k.NotBefore.Sub(k.BackAt)
	}
	for _, a := range k.Avoid {
		if length := a.Until.Sub(k.BackAt); length > 0 {
			q.avoid = append(q.avoid, avoid{intern(a.Worker), length})
		}
	}
	if k.Reason != "" {
		q.note = k.Message
		if q.note == "" {
			q.note = string(k.Reason)
		}
	}
	return q
}

// imageOf is the name by which workers say that they have a task's image.
func imageOf(image, digest string) string {
	if pinned := schemas.PinnedImage(image, digest); pinned != "" {
		image = pinned
	}
	return schemas.ImageName(image)
}

// record decodes all of it, to be changed by schemas.Next.
func (q *queued) record() (r schemas.Record, err error) { return r, schemas.Decode(q.raw, &r) }

func stateOf(h nats.Header) schemas.State {
	return unique.Make(schemas.State(h.Get(schemas.HeaderState))).Value()
}

func holderOf(h nats.Header) schemas.WorkerID {
	holder := h.Get(schemas.HeaderHolder)
	for i := range len(holder) {
		if holder[i] == ' ' {
			return intern(schemas.WorkerID(holder[:i]))
		}
	}
	return ""
}

// intern keeps one copy of a name, rather than the message that each came in.
func intern(w schemas.WorkerID) schemas.WorkerID { return unique.Make(w).Value() }

// phase is where a task stands in the book.
type phase uint8

const (
	waiting phase = iota // in the queue
	resting              // queued, but not to be placed before a time or the next change
	chosen               // promised to a worker; its record is being written, or not seen yet
	held                 // a worker holds it
)

// task is one record that is not final.
type task struct {
	*queued  // while it is queued
	id       schemas.TaskID
	revision uint64 // as the view has it
	state    schemas.State
	need     need
	phase    phase
	worker   schemas.WorkerID // whom it counts on
	since    time.Time        // when it was first seen queued, the last time

	writing bool      // a goroutine writes its assignment
	ordered uint64    // the revision of the assignment that this placer wrote and sent the order of
	until   time.Time // resting: until then; zero: until it changes
	wake    int       // generation of its timer
	shape   *shape
	turn    turn
	hold    *hold
}

func (t *task) shapeKey(now time.Time) shapeKey {
	return shapeKey{
		priority: t.priority, need: t.need.resources, blobs: blobsKey(t.need.blobs), image: t.image, credentials: t.credentials, kind: t.kind, labels: t.labels,
		skipped: joinWorkers(t.avoiding(now)),
	}
}

// avoiding lists the workers that are skipped at now.
func (t *task) avoiding(now time.Time) []schemas.WorkerID {
	var list []schemas.WorkerID
	for _, a := range t.avoid {
		if now.Sub(t.since) < a.length {
			list = append(list, a.worker)
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// rests is until when the task may not be placed, by this placer's clock.
func (t *task) rests() time.Time { return t.since.Add(t.wait) }

// avoidEnds is when the next worker is skipped no longer, the zero time if none is.
func (t *task) avoidEnds(now time.Time) time.Time {
	var next time.Time
	for _, a := range t.avoid {
		if end := t.since.Add(a.length); end.After(now) && (next.IsZero() || end.Before(next)) {
			next = end
		}
	}
	return next
}
