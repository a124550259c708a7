package schemas

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
)

// Resolved says which image a reference meant on a worker.
type Resolved struct {
	ID     string `json:"id"`              // content address: "sha256:…"
	Digest string `json:"digest,omitzero"` // by which its repository knows it; "" if it was never in one

	Unknown Unknown `json:",embed"`
}

// Pull is how far a pull is. It never goes back, save where a registry breaks off and a layer
// begins anew.
type Pull struct {
	Done   int64 `json:"done_bytes"`
	Total  int64 `json:"total_bytes,omitzero"` // of the layers that have begun: it grows; 0 if no size is known yet
	Layers int   `json:"layers,omitzero"`      // that this worker lacked
	Ready  int   `json:"layers_done,omitzero"` // of those: here, and perhaps still to be unpacked

	Unknown Unknown `json:",embed"`
}

// sane gives the numbers if a pull can have such: a worker says them.
func (p *Pull) sane() *Pull {
	if p == nil || p.Done < 0 || p.Total < p.Done || p.Total > maxBytes || p.Ready < 0 || p.Layers < p.Ready || p.Layers > 1<<16 {
		return nil
	}
	return &Pull{Done: p.Done, Total: p.Total, Layers: p.Layers, Ready: p.Ready}
}

// ImageName is the one form of an image's name that workers, placers and people compare:
// "busybox" is "busybox:latest", and a digest is cut to 12 digits: "busybox@sha256:0123456789ab".
// What has both a tag and a digest goes by its digest. "" is no name of an image.
func ImageName(image string) string {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return ""
	}
	if d, ok := named.(reference.Digested); ok {
		algorithm, hex, _ := strings.Cut(d.Digest().String(), ":")
		return reference.FamiliarName(named) + "@" + algorithm + ":" + hex[:min(12, len(hex))]
	}
	return reference.FamiliarString(reference.TagNameOnly(named))
}

// PinnedImage is the reference by which every attempt after the first names a task's image:
// by digest, "" if there is none.
func PinnedImage(image, digest string) string {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil || digest == "" {
		return ""
	}
	return reference.FamiliarName(named) + "@" + digest
}

// digestOf is the digest that a reference carries, "" if none.
func digestOf(image string) string {
	_, digest, _ := strings.Cut(image, "@")
	return digest
}

// isDigest says whether s is a SHA-256 as images are named by.
func isDigest(s string) bool {
	hex, ok := strings.CutPrefix(s, "sha256:")
	return ok && len(hex) == 64 && strings.Trim(hex, "0123456789abcdef") == ""
}

// pin keeps what the name in the spec meant to the first worker that resolved it. It says
// whether that is news. A worker is believed as far as the spec does not say it itself.
func (r *Record) pin(i *Resolved) bool {
	if i == nil || r.ImageID != "" || !isDigest(i.ID) {
		return false
	}
	r.ImageID = i.ID
	if own := digestOf(r.Spec.Image); own != "" {
		r.ImageDigest = own
	} else if isDigest(i.Digest) {
		r.ImageDigest = i.Digest
	}
	return true
}

// KeyWanted is the one key of the bucket "images": a WantedImages.
const KeyWanted = "wanted"

// Bounds of what workers are asked to hold, and of what a beat says of images.
const (
	MaxWanted        = 128
	MaxWantedWorkers = 64
	MaxBeatImages    = 256
	MaxBeatImageText = 12 << 10 // bytes of all names together
	MaxBeatMissing   = 64
	MaxMissingText   = 160 // bytes of one reason
)

// ByOperator is who wants what was asked for over the API. A template says "template:NAME".
const ByOperator = "operator"

// WantedImages are the images that workers shall hold before a task asks for them. All
// agents read it.
type WantedImages struct {
	Items []WantedImage `json:"items"`

	Unknown Unknown `json:",embed"`
}

// WantedImage is one image, as one source wants it.
type WantedImage struct {
	Image       string            `json:"image"`
	By          string            `json:"by"`
	Since       time.Time         `json:"since"`
	Workers     []WorkerID        `json:"workers,omitzero"`     // only these; none: all
	Constraints map[string]string `json:"constraints,omitzero"` // and only workers that meet these
	Credentials string            `json:"registry_credentials,omitzero"`

	Unknown Unknown `json:",embed"`
}

// ErrTooManyWanted says that workers are asked to hold MaxWanted images already.
var ErrTooManyWanted = errors.New("too many images are wanted")

// Meets says whether a host has what constraints ask for.
func (h Host) Meets(constraints map[string]string) bool {
	for k, want := range constraints {
		have, ok := h.Labels[k]
		switch k {
		case "arch":
			have, ok = h.Arch, true
		case "os":
			have, ok = h.OS, true
		}
		if !ok || have != want {
			return false
		}
	}
	return true
}

// On says whether a worker is one of those that shall hold the image.
func (i WantedImage) On(w WorkerID, h Host) bool {
	return (len(i.Workers) == 0 || slices.Contains(i.Workers, w)) && h.Meets(i.Constraints)
}

func (i WantedImage) same(o WantedImage) bool {
	return i.Image == o.Image && i.By == o.By && i.Credentials == o.Credentials && slices.Equal(i.Workers, o.Workers) && maps.Equal(i.Constraints, o.Constraints)
}

// With gives the list after one source wants exactly these; what it wanted already keeps its
// time. ErrUnchanged says that the list says so already.
func (w WantedImages) With(by string, images []WantedImage) (WantedImages, error) {
	next := WantedImages{Unknown: w.Unknown}
	before := map[string]WantedImage{}
	for _, i := range w.Items {
		if i.By == by {
			before[i.Image] = i
		} else {
			next.Items = append(next.Items, i)
		}
	}
	changed, added := len(before) != len(images), map[string]bool{}
	for _, i := range images {
		i.By = by
		was, ok := before[i.Image]
		if ok {
			i.Since = was.Since
		}
		if added[i.Image] {
			continue // named twice: the first counts
		}
		added[i.Image] = true
		changed = changed || !ok || !was.same(i)
		next.Items = append(next.Items, i)
	}
	switch {
	case !changed:
		return w, ErrUnchanged
	case len(next.Items) > MaxWanted && len(next.Items) > len(w.Items):
		return w, fmt.Errorf("%w: at most %d", ErrTooManyWanted, MaxWanted)
	}
	slices.SortFunc(next.Items, func(a, b WantedImage) int {
		return cmp.Or(cmp.Compare(a.Image, b.Image), cmp.Compare(a.By, b.By))
	})
	return next, nil
}

// Of lists what one source wants.
func (w WantedImages) Of(by string) (list []WantedImage) {
	for _, i := range w.Items {
		if i.By == by {
			list = append(list, i)
		}
	}
	return list
}

// MissingState says why a wanted image is not on a worker yet.
type MissingState string

// The states.
const (
	MissingWaits   MissingState = "waiting" // its turn has not come, or the next try
	MissingPulling MissingState = "pulling"
	MissingFailed  MissingState = "failed" // it is tried again later
)

// MissingImage is a wanted image that a worker does not have.
type MissingImage struct {
	Image   string       `json:"image"`
	State   MissingState `json:"state"`
	Message string       `json:"message,omitzero"` // failed: why, for people
	Pull    *Pull        `json:"pull,omitzero"`    // pulling

	Unknown Unknown `json:",embed"`
}

// ImageCache is what a worker holds in images, for people.
type ImageCache struct {
	Images int  `json:"images"`              // on the host
	Bytes  Size `json:"bytes"`               // of all of them; a layer counts for each image that has it
	Own    int  `json:"own_images,omitzero"` // that its agent pulled: only these are ever removed
	OwnAll Size `json:"own_bytes,omitzero"`

	Unknown Unknown `json:",embed"`
}

// WantImage is the body of POST /v1/images.
type WantImage struct {
	Image       string            `json:"image"`
	Workers     []WorkerID        `json:"workers,omitzero"`
	Constraints map[string]string `json:"constraints,omitzero"`
	Credentials string            `json:"registry_credentials,omitzero"`
}

// Validate gives every fault.
func (w *WantImage) Validate() []FieldError {
	c := &checker{}
	(&Spec{Image: w.Image}).checkImage(c)
	c.value(len(w.Workers) <= MaxWantedWorkers, "workers", "must be at most %d", MaxWantedWorkers)
	for i, id := range w.Workers {
		_, err := ParseWorkerID(string(id))
		c.value(err == nil, fmt.Sprintf("workers.%d", i), "is no worker's name")
	}
	checkPairs(c, "constraints", w.Constraints)
	checkCredentials(c, "registry_credentials", w.Credentials)
	return c.errs
}

// ValidCredentials says whether this can be a name of registry credentials.
func ValidCredentials(name string) bool {
	return name != "" && len(name) <= 128 && strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:-") == ""
}

// checkCredentials checks a name of registry credentials: a word, or the host of a registry.
func checkCredentials(c *checker, field, name string) {
	c.value(name == "" || ValidCredentials(name), field, "must be a name such as \"team-a\" or \"registry.lan:5000\": at most 128 letters, digits, dots, colons, dashes and underscores")
}

// Image is a wanted image as the API shows it, with how each worker stands to it.
type Image struct {
	WantedImage
	Status []ImageStatus `json:"status"` // of the workers that shall hold it, by name
}

// ImageState is how a worker stands to an image that it shall hold.
type ImageState string

// The states; the others are those of MissingImage.
const (
	ImagePresent ImageState = "present"
	ImageUnheard ImageState = "unheard" // the worker has not read the wish yet
	ImageUnknown ImageState = "unknown" // the worker lacks more than it can name: perhaps this one too
	ImageAway    ImageState = "away"    // the worker is silent or lost
)

// ImageStatus is how one worker stands to an image.
type ImageStatus struct {
	Worker  WorkerID   `json:"worker"`
	State   ImageState `json:"state"`
	Message string     `json:"message,omitzero"`
	Pull    *Pull      `json:"pull,omitzero"`
}

// WorkerImages are the images of one worker.
type WorkerImages struct {
	Worker WorkerID   `json:"worker"`
	Cache  ImageCache `json:"cache"`
	// Names are those of the images used last, the last first; digests are cut to 12 digits.
	Names []string `json:"names"`
}

// ImageList is the answer of GET /v1/images.
type ImageList struct {
	Items   []Image        `json:"items"`   // wanted, by name
	Workers []WorkerImages `json:"workers"` // by name
}
