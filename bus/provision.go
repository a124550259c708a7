package bus

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"dayfly.dev/schemas"
)

const (
	// markerAge is how long the mark of an expired key stays to be seen.
	markerAge = time.Hour
	// maxConsumers stands in every stream: -1 counts as unset there and falls back to
	// the server's default of 1,000, which views and agents exceed.
	maxConsumers = 20_000
)

// Provision makes the streams and buckets that are missing and updates those whose
// configuration changed; what a stream cannot change (persist mode, retention) stays
// and is logged. replicas is 1 or 3; 0 is 3 on a cluster and 1 on a single server. It
// is idempotent, several services may call it at once, and it waits for JetStream, and
// for as many servers as there shall be replicas, until ctx ends. ErrFull says that the
// servers cannot set aside what MaxBytes of an asset says.
func Provision(ctx context.Context, c *Conn, assets []schemas.Asset, replicas int) error {
	if replicas != 0 && replicas != 1 && replicas != 3 {
		return fmt.Errorf("provision: replicas is 1 or 3, not %d", replicas)
	}
	if replicas == 0 {
		if err := c.waitConnected(ctx); err != nil {
			return fmt.Errorf("provision: %w", err)
		}
		replicas = 1
		if c.Clustered() {
			replicas = 3
		}
	}
	for _, a := range assets {
		want := streamConfig(a, replicas)
		if err := c.patiently(ctx, want.Name, func() error { return c.provision(ctx, want) }); err != nil {
			return fmt.Errorf("provision %s: %w", want.Name, err)
		}
		if a.Keep == "" {
			continue
		}
		err := c.patiently(ctx, want.Name, func() error {
			_, err := c.Publish(ctx, a.Keep, nil, []byte("keep"))
			return err
		})
		if err != nil {
			return fmt.Errorf("provision %s: %w", want.Name, err)
		}
	}
	return nil
}

// patiently does what may fail while a cluster forms, again and again.
func (c *Conn) patiently(ctx context.Context, stream string, do func() error) error {
	const sayAfter = 5 * time.Second
	began, said := time.Now(), false
	for {
		err := do()
		switch {
		case noRoom(err) && (!forming(err) || time.Since(began) > sayAfter): // those that form do not know it yet
			return fmt.Errorf("%w: %w", ErrFull, err)
		case err == nil || !transient(err) && !forming(err):
			return err
		}
		if !said && time.Since(began) > sayAfter {
			c.log.Warn().Err(err).Str("stream", stream).Msg("waiting for JetStream")
			said = true
		}
		if !sleep(ctx, 50*time.Millisecond) {
			return err
		}
	}
}

// forming says that a cluster has too few servers yet, or is just choosing who leads.
func forming(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && (api.ErrorCode == codeNoPeers || api.ErrorCode == codeNotLeader)
}

// noRoom says that the servers cannot set aside what a stream may take.
func noRoom(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && (api.ErrorCode == codeNoStorage || api.ErrorCode == codeNoPeers && strings.Contains(api.Description, "insufficient storage"))
}

func (c *Conn) provision(ctx context.Context, want jetstream.StreamConfig) error {
	ctx, cancel := context.WithTimeout(ctx, OpTimeout)
	defer cancel()
	if err := c.waitConnected(ctx); err != nil {
		return err
	}
	s, err := c.look(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		_, err = c.JS.CreateStream(ctx, want)
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // someone else was quicker
			s, err = c.look(ctx, want.Name)
		} else {
			return err
		}
	}
	if err != nil {
		return err
	}
	have := s.CachedInfo().Config
	next, fixed := merge(have, want)
	if fixed {
		c.log.Warn().Str("stream", want.Name).Msg("persist mode or retention of a stream cannot change; make it anew to change it")
	}
	if sameStream(have, next) {
		return nil
	}
	_, err = c.JS.UpdateStream(ctx, next)
	return err
}

// look asks for a stream. A cluster that has no leader yet says nothing, so it is not
// waited for long.
func (c *Conn) look(ctx context.Context, stream string) (jetstream.Stream, error) {
	ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	return c.JS.Stream(ctx, stream)
}

// StreamOf names the stream behind a bucket.
func StreamOf(bucket string) string { return "KV_" + bucket }

func keySubject(bucket, key string) string { return "$KV." + bucket + "." + key }

// streamConfig is asset a as JetStream sees it. Buckets are made by hand because
// the KV API turns AllowDirect on and has no MaxConsumers; they have one value per
// key because a TTL needs that to be exact.
func streamConfig(a schemas.Asset, replicas int) jetstream.StreamConfig {
	sc := jetstream.StreamConfig{
		Name: a.Name, Subjects: a.Subjects, Storage: jetstream.FileStorage, Replicas: replicas,
		MaxAge: a.MaxAge, MaxBytes: a.MaxBytes, MaxMsgs: -1, MaxMsgsPerSubject: -1, MaxConsumers: maxConsumers,
		AllowDirect: a.DirectGet, DenyDelete: a.KeepDeleted, Discard: jetstream.DiscardOld,
		FirstSeq: a.First,
	}
	if sc.MaxBytes == 0 {
		sc.MaxBytes = -1
	}
	if a.MaxMessages > 0 {
		sc.MaxMsgs = a.MaxMessages
	}
	if a.Bucket {
		sc.Name, sc.Subjects = StreamOf(a.Name), []string{keySubject(a.Name, ">")}
		sc.Discard, sc.AllowRollup = jetstream.DiscardNew, !a.Agents
	}
	if a.Bucket || a.Latest {
		sc.MaxMsgsPerSubject = 1
	}
	if a.Queue {
		sc.Retention = jetstream.WorkQueuePolicy
	}
	if a.TTL {
		sc.AllowMsgTTL = true
		if a.Bucket {
			sc.SubjectDeleteMarkerTTL = markerAge
		}
	}
	if a.Refuse {
		sc.Discard = jetstream.DiscardNew
	}
	if a.MaxMessage > 0 {
		sc.MaxMsgSize = a.MaxMessage
	}
	if a.Hint && replicas == 1 { // refused on replicated streams
		sc.PersistMode = jetstream.AsyncPersistMode
	}
	return sc
}

// merge lays what an asset decides over the stream that is there, save what a
// stream cannot change.
func merge(have, want jetstream.StreamConfig) (next jetstream.StreamConfig, fixed bool) {
	next = have
	next.Subjects, next.Replicas = want.Subjects, want.Replicas
	next.MaxAge, next.MaxBytes, next.MaxMsgs = want.MaxAge, want.MaxBytes, want.MaxMsgs
	next.MaxMsgsPerSubject = want.MaxMsgsPerSubject
	if want.MaxMsgSize > 0 {
		next.MaxMsgSize = want.MaxMsgSize
	}
	next.AllowDirect, next.AllowRollup, next.Discard = want.AllowDirect, want.AllowRollup, want.Discard
	next.AllowMsgTTL = have.AllowMsgTTL || want.AllowMsgTTL // cannot be turned off
	next.SubjectDeleteMarkerTTL = want.SubjectDeleteMarkerTTL
	next.DenyDelete = have.DenyDelete || want.DenyDelete
	return next, have.PersistMode != want.PersistMode || have.Retention != want.Retention
}

func sameStream(a, b jetstream.StreamConfig) bool {
	return fmt.Sprint(a.Subjects) == fmt.Sprint(b.Subjects) && a.Replicas == b.Replicas &&
		a.MaxAge == b.MaxAge && a.MaxBytes == b.MaxBytes && a.MaxMsgs == b.MaxMsgs && a.MaxMsgsPerSubject == b.MaxMsgsPerSubject &&
		a.MaxMsgSize == b.MaxMsgSize && a.AllowDirect == b.AllowDirect && a.AllowRollup == b.AllowRollup && a.Discard == b.Discard &&
		a.AllowMsgTTL == b.AllowMsgTTL && a.SubjectDeleteMarkerTTL == b.SubjectDeleteMarkerTTL && a.DenyDelete == b.DenyDelete
}
