package shim

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

// One is the one live task of a name, such as that of a user's challenge. The name is a
// set of labels: its tasks, one after the other, all carry them.
type One struct {
	*Shim
	Labels map[string]string
}

// One names a task of this shim. A label's value that no label can have is refused.
func (s *Shim) One(labels map[string]string) (One, error) {
	for k, v := range labels {
		if v == "" || len(v) > 256 || strings.ContainsFunc(v, unicode.IsControl) {
			_, name, _ := strings.Cut(k, ".")
			return One{}, Refuse(http.StatusUnprocessableEntity, "%s: must be 1 to 256 bytes without control characters", name)
		}
	}
	all := maps.Clone(labels)
	all[Label] = s.Name
	return One{s, all}, nil
}

// Newest gives the newest task of the name, as its record is now; false if there is none.
func (o One) Newest(ctx context.Context) (t schemas.Task, ok bool, err error) {
	for {
		ok, err = false, nil
		for t, err = range o.Client.All(ctx, client.ListOptions{Labels: o.Labels, Limit: 1}) {
			if ok = err == nil; ok {
				t, err = o.Client.Get(ctx, t.ID, client.GetOptions{})
			}
			break
		}
		if !errors.Is(err, schemas.CodeNotFound) {
			return t, ok && err == nil, err
		}
		if err := pause(ctx, leastPause); err != nil { // its record has just gone, and there may be a newer one
			return t, false, err
		}
	}
}

// How long Ensure waits before it asks again for a task that somebody else is making.
const (
	leastPause = 20 * time.Millisecond
	mostPause  = 500 * time.Millisecond
)

// Ensure gives the live task of the name, making one of spec if there is none; made says
// whether it did. Of any number of calls at a time, through any gateways, one makes it:
// the Idempotency-Key of each task follows from the one before it. What a key stands for
// is asked until it is known: where a gateway died with it, that is a minute.
func (o One) Ensure(ctx context.Context, spec schemas.Spec) (t schemas.Task, made bool, err error) {
	before := "" // the newest that is over
	over := map[schemas.TaskID]bool{}
	wait := leastPause
	t, ok, err := o.Newest(ctx)
	for {
		if ok && err == nil && !t.State.Final() && t.Cancel != nil { // as good as over
			t, err = o.Client.Wait(ctx, t.ID)
		}
		if err != nil || ok && !t.State.Final() {
			return t, false, err
		}
		if ok {
			before = string(t.ID)
			over[t.ID] = true
		}
		var again bool
		var taken *schemas.Error
		t, again, err = o.Client.CreateOnce(ctx, spec, o.key(before))
		switch {
		case errors.Is(err, schemas.CodeKeyExpired): // that one is over, and forgotten
			before += "+"
			t, ok, err = o.Newest(ctx)
			ok = ok && !over[t.ID] // the newest by its id may be older than what a key gave
		case errors.Is(err, schemas.CodeKeyReused) && errors.As(err, &taken): // somebody makes another of it, or did
			t, err = o.Client.Get(ctx, taken.Task, client.GetOptions{})
			if ok = !errors.Is(err, schemas.CodeNotFound); !ok {
				err = pause(ctx, wait)
				wait = min(2*wait, mostPause)
			}
		case err == nil && !again:
			return t, true, nil
		default:
			ok = true
		}
	}
}

// key is that of the task after the one that is named.
func (o One) key(before string) string {
	h := sha256.New()
	for _, k := range slices.Sorted(maps.Keys(o.Labels)) {
		h.Write([]byte(k + "\x00" + o.Labels[k] + "\x00"))
	}
	h.Write([]byte(before))
	return "shim-" + base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

// End cancels the live task of the name and waits until it is over; false if there is
// none.
func (o One) End(ctx context.Context) (schemas.Task, bool, error) {
	t, ok, err := o.Newest(ctx)
	if err != nil || !ok || t.State.Final() {
		return t, false, err
	}
	if t, err = o.Client.Cancel(ctx, t.ID, nil); err == nil {
		t, err = o.Client.Wait(ctx, t.ID)
	}
	return t, true, err
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
