package bus

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"dayfly.dev/schemas"
)

// Codec turns values of a bucket into bytes and back.
type Codec[T any] struct {
	Encode func(T) (data []byte, header nats.Header, err error)
	Decode func(data []byte) (T, error)
	// Wrote tells whether v carries op, the name of one write: that settles writes of
	// unknown outcome. Without it equal bytes count as one's own write.
	Wrote func(v T, op string) bool
}

// JSON is the codec of values as package schemas writes them. wrote is Codec.Wrote and may
// be nil. A value that has Headers is written with them.
func JSON[T any](wrote func(v T, op string) bool) Codec[T] {
	return Codec[T]{
		Encode: func(v T) (data []byte, header nats.Header, err error) {
			if h, ok := any(v).(interface{ Headers() map[string][]string }); ok {
				header = h.Headers()
			}
			data, err = schemas.Encode(v)
			return data, header, err
		},
		Decode: func(data []byte) (v T, err error) { return v, schemas.Decode(data, &v) },
		Wrote:  wrote,
	}
}

// Entry is one key at one revision. Created is the server's clock at the write; it
// is zero in an entry that an own write returned. Gone comes with ErrNotFound alone: the
// key was there, and the mark of its deletion or expiry still is.
type Entry[T any] struct {
	Key      string
	Value    T
	Revision uint64
	Created  time.Time
	Gone     bool
}

// Table is a typed KV bucket whose values change only by compare-and-set. There is
// no plain put.
//
// Reads of core services are answered by the leader of the stream, so they see the
// newest write; an agent reads through the direct API, which may lag on a cluster.
type Table[T any] struct {
	c      *Conn
	bucket string
	codec  Codec[T]
}

// NewTable gives access to a bucket that Provision has made. It does not ask the server.
func NewTable[T any](c *Conn, bucket string, codec Codec[T]) *Table[T] {
	return &Table[T]{c: c, bucket: bucket, codec: codec}
}

type writeOptions struct{ ttl time.Duration }

// WriteOption changes one write.
type WriteOption func(*writeOptions)

// TTL lets the value expire after d, in whole seconds rounded up, at least one. A
// later write without it clears it. The bucket must allow TTLs.
func TTL(d time.Duration) WriteOption {
	d = max(time.Second, (d + time.Second - 1).Truncate(time.Second))
	return func(o *writeOptions) { o.ttl = d }
}

// Get reads one key. ErrNotFound also stands for a deleted or expired one.
func (t *Table[T]) Get(ctx context.Context, key string) (e Entry[T], err error) {
	defer t.observe("get", time.Now(), &err)
	ctx, cancel := context.WithTimeout(ctx, OpTimeout)
	defer cancel()
	raw, err := t.read(ctx, key)
	if err == nil && raw.marker {
		err = ErrNotFound
	}
	if err == nil {
		e, err = t.entry(key, raw)
	}
	if err != nil {
		return Entry[T]{Key: key, Gone: raw.marker}, fmt.Errorf("get %s/%s: %w", t.bucket, key, err)
	}
	return e, nil
}

// Create writes a key that must not exist; a deleted or expired one does not. It is
// ErrConflict when the key exists, unless it holds the first copy of this very write.
func (t *Table[T]) Create(ctx context.Context, key string, v T, op string, opts ...WriteOption) (e Entry[T], err error) {
	defer t.observe("create", time.Now(), &err)
	e, err = t.write(ctx, Entry[T]{Key: key}, v, op, opts)
	if err != nil {
		return e, fmt.Errorf("create %s/%s: %w", t.bucket, key, err)
	}
	return e, nil
}

// Replace writes v over the entry e, if that is still the newest. On a mismatch it
// looks: its own write there is a success, its own revision still there is tried
// again, anything else is ErrConflict. ErrUnknownOutcome comes back only when the
// record could not be read afterwards.
func (t *Table[T]) Replace(ctx context.Context, e Entry[T], v T, op string, opts ...WriteOption) (next Entry[T], err error) {
	defer t.observe("replace", time.Now(), &err)
	if e.Revision == 0 {
		return e, fmt.Errorf("replace %s/%s: the entry has no revision", t.bucket, e.Key)
	}
	next, err = t.write(ctx, e, v, op, opts)
	if err != nil {
		return next, fmt.Errorf("replace %s/%s: %w", t.bucket, e.Key, err)
	}
	return next, nil
}

// Update reads the entry of key, applies fn, writes, and repeats on conflict until
// ctx ends. fn may run several times and only looks at its argument, the entry that
// its result replaces. An error of fn
// comes back as it is, with the entry that fn saw.
func (t *Table[T]) Update(ctx context.Context, key, op string, fn func(Entry[T]) (T, []WriteOption, error)) (Entry[T], error) {
	e, err := t.Get(ctx, key)
	if err != nil {
		return e, err
	}
	return t.UpdateFrom(ctx, e, op, fn)
}

// UpdateFrom is Update that starts from an entry which the caller has, and saves a
// read when that is the newest.
func (t *Table[T]) UpdateFrom(ctx context.Context, e Entry[T], op string, fn func(Entry[T]) (T, []WriteOption, error)) (Entry[T], error) {
	for try := 0; ; try++ {
		v, opts, err := fn(e)
		if err != nil {
			return e, err
		}
		next, err := t.Replace(ctx, e, v, op, opts...)
		if err == nil || !errors.Is(err, ErrConflict) {
			return next, err
		}
		if !sleep(ctx, rand.N(min(time.Duration(try+1)*2*time.Millisecond, 50*time.Millisecond))) {
			return e, err
		}
		fresh, err := t.Get(ctx, e.Key)
		switch {
		case (errors.Is(err, ErrNotFound) || err == nil && fresh.Revision < e.Revision) && t.behind(ctx, e.Revision):
		case err != nil:
			return e, err
		default:
			e = fresh
		}
	}
}

// Delete marks the key as deleted if it is still at revision. Deleting what is gone
// is no error. It is for buckets that may forget. With a TTL the mark goes too, after
// that; without one a mark stays for each key that ever was.
func (t *Table[T]) Delete(ctx context.Context, key string, revision uint64, opts ...WriteOption) (err error) {
	defer t.observe("delete", time.Now(), &err)
	ctx, cancel := context.WithTimeout(ctx, OpTimeout)
	defer cancel()
	hdr := nats.Header{"KV-Operation": {"PURGE"}, jetstream.MsgRollup: {jetstream.MsgRollupSubject}}
	var o writeOptions
	for _, opt := range opts {
		opt(&o)
	}
	if o.ttl > 0 {
		hdr.Set(jetstream.MsgTTLHeader, o.ttl.String())
	}
	for {
		_, err = t.publish(ctx, key, revision, hdr, nil)
		if err == nil {
			return nil
		}
		if !errors.Is(err, ErrConflict) && !errors.Is(err, ErrUnknownOutcome) {
			return fmt.Errorf("delete %s/%s: %w", t.bucket, key, err)
		}
		raw, readErr := t.read(ctx, key)
		switch {
		case errors.Is(readErr, ErrNotFound), readErr == nil && raw.marker:
			return nil
		case readErr != nil:
			return fmt.Errorf("delete %s/%s: %w", t.bucket, key, ErrUnknownOutcome)
		case raw.seq != revision:
			return fmt.Errorf("delete %s/%s: %w", t.bucket, key, ErrConflict)
		}
		if !sleep(ctx, pause()) {
			return fmt.Errorf("delete %s/%s: %w", t.bucket, key, err)
		}
	}
}

// spuriousTries bounds how often a write is repeated whose revision is still right.
const spuriousTries = 20

// write is one compare-and-set at e.Revision (0: the key must not exist), settled.
func (t *Table[T]) write(ctx context.Context, e Entry[T], v T, op string, opts []WriteOption) (Entry[T], error) {
	data, hdr, err := t.codec.Encode(v)
	if err != nil {
		return e, err
	}
	if len(data) == 0 {
		return e, errors.New("an empty value would read as deleted")
	}
	var o writeOptions
	for _, opt := range opts {
		opt(&o)
	}
	hdr = maps.Clone(hdr)
	if hdr == nil {
		hdr = nats.Header{}
	}
	if o.ttl > 0 {
		hdr.Set(jetstream.MsgTTLHeader, o.ttl.String())
	}
	ctx, cancel := context.WithTimeout(ctx, OpTimeout)
	defer cancel()
	expect, sent := e.Revision, false
	for try := 1; ; try++ {
		seq, err := t.publish(ctx, e.Key, expect, hdr, data)
		if err == nil {
			return Entry[T]{Key: e.Key, Value: v, Revision: seq}, nil
		}
		if sent && (errors.Is(err, ErrUnavailable) || errors.Is(err, ErrConflict)) { // perhaps with the first copy of this very write
			err = fmt.Errorf("%w: an earlier try: %v", ErrUnknownOutcome, err)
		}
		if !errors.Is(err, ErrConflict) && !errors.Is(err, ErrUnknownOutcome) {
			return e, err
		}
		sent = sent || errors.Is(err, ErrUnknownOutcome)
		raw, readErr := t.read(ctx, e.Key)
		switch {
		case readErr == nil && !raw.marker && raw.seq > expect:
			now, decodeErr := t.entry(e.Key, raw)
			if decodeErr != nil {
				return e, decodeErr
			}
			if t.wrote(now.Value, op, raw.data, data) {
				return now, nil
			}
			return e, t.lost(err)
		case readErr == nil && raw.marker && e.Revision == 0:
			expect = raw.seq // over the mark of a deletion
		case readErr == nil && raw.seq == expect, errors.Is(readErr, ErrNotFound) && e.Revision == 0:
			// Ours is still the newest: a spurious conflict, or a write that never came.
			expect = raw.seq
		case readErr == nil && raw.seq < expect, errors.Is(readErr, ErrNotFound):
			if !t.behind(ctx, expect) {
				return e, t.lost(err)
			}
			try--
		case readErr == nil: // gone
			return e, t.lost(err)
		default: // could not look
			if errors.Is(err, ErrConflict) && !sent {
				return e, t.lost(err)
			}
			// Not ErrUnavailable, which would say that it was surely not done.
			return e, fmt.Errorf("%w: %v: %v", ErrUnknownOutcome, err, readErr)
		}
		if try == spuriousTries || !sleep(ctx, pause()) {
			if sent { // what is in the way may be an earlier try that no quorum has taken yet
				err = fmt.Errorf("%w: %v", ErrUnknownOutcome, err)
			}
			return e, err
		}
	}
}

// behind says that the leader of the stream has not come to a revision that is there
// already. A replica may be ahead of it and show a view what the leader does not know
// yet; then it says of a fresh key that there is none.
func (t *Table[T]) behind(ctx context.Context, revision uint64) bool {
	if !t.c.core || !t.c.Clustered() {
		return false
	}
	s, err := t.c.look(ctx, StreamOf(t.bucket))
	return err == nil && s.CachedInfo().State.LastSeq < revision
}

// lost makes a settled loss of err, and counts it.
func (t *Table[T]) lost(err error) error {
	if t.c.Observe != nil {
		t.c.Observe(t.bucket, "conflict", 0, ErrConflict)
	}
	if errors.Is(err, ErrConflict) {
		return err
	}
	return fmt.Errorf("%w (after: %v)", ErrConflict, err)
}

func (t *Table[T]) wrote(v T, op string, stored, sent []byte) bool {
	if t.codec.Wrote != nil {
		return t.codec.Wrote(v, op)
	}
	return bytes.Equal(stored, sent)
}

// pause before a write is repeated at the same revision.
func pause() time.Duration { return time.Millisecond + rand.N(4*time.Millisecond) }

// How long one try of a write or read waits for its answer. On a cluster a server may
// die with the request in its hands, and nobody says so; asking anew tells what came
// of it as soon as another leads.
const (
	writeTry = 2 * time.Second
	readTry  = time.Second
)

func (t *Table[T]) publish(ctx context.Context, key string, expect uint64, hdr nats.Header, data []byte) (uint64, error) {
	hdr = maps.Clone(hdr)
	hdr.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(expect, 10))
	return t.c.publishTry(ctx, writeTry, keySubject(t.bucket, key), hdr, data)
}

func (t *Table[T]) entry(key string, raw rawEntry) (Entry[T], error) {
	v, err := t.codec.Decode(raw.data)
	if err != nil {
		return Entry[T]{Key: key, Revision: raw.seq}, fmt.Errorf("decode revision %d: %w", raw.seq, err)
	}
	return Entry[T]{Key: key, Value: v, Revision: raw.seq, Created: raw.created}, nil
}

func (t *Table[T]) observe(op string, start time.Time, err *error) {
	if t.c.Observe != nil {
		t.c.Observe(t.bucket, op, time.Since(start), *err)
	}
}

// rawEntry is the newest message of a key.
type rawEntry struct {
	seq     uint64
	created time.Time
	data    []byte
	marker  bool // of a deletion or expiry
}

func (t *Table[T]) read(ctx context.Context, key string) (rawEntry, error) {
	subject := keySubject(t.bucket, key)
	for {
		var raw rawEntry
		var err error
		if t.c.core {
			raw, err = t.c.leaderGet(ctx, StreamOf(t.bucket), subject)
		} else {
			raw, err = t.c.directGet(ctx, StreamOf(t.bucket), subject)
		}
		// A read may be repeated for ever.
		if !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrUnknownOutcome) || !sleep(ctx, pause()) {
			return raw, err
		}
	}
}

func (c *Conn) leaderGet(ctx context.Context, stream, subject string) (rawEntry, error) {
	body, err := json.Marshal(map[string]string{"last_by_subj": subject})
	if err != nil {
		return rawEntry{}, err
	}
	m, err := c.request(ctx, readTry, c.apiPrefix+"STREAM.MSG.GET."+stream, nil, body)
	if err != nil {
		return rawEntry{}, err
	}
	var resp struct {
		Error   *jetstream.APIError `json:"error"`
		Message *struct {
			Seq  uint64    `json:"seq"`
			Hdrs string    `json:"hdrs"`
			Data []byte    `json:"data"`
			Time time.Time `json:"time"`
		} `json:"message"`
	}
	if err := json.Unmarshal(m.Data, &resp); err != nil {
		return rawEntry{}, fmt.Errorf("read %s: %w", subject, err)
	}
	if resp.Error != nil {
		return rawEntry{}, apiError(resp.Error)
	}
	if resp.Message == nil {
		return rawEntry{}, ErrNotFound
	}
	raw := rawEntry{seq: resp.Message.Seq, created: resp.Message.Time, data: resp.Message.Data}
	if resp.Message.Hdrs != "" {
		text, err := base64.StdEncoding.DecodeString(resp.Message.Hdrs)
		if err != nil {
			return rawEntry{}, fmt.Errorf("read %s: %w", subject, err)
		}
		hdr, err := nats.DecodeHeadersMsg(text)
		if err != nil {
			return rawEntry{}, fmt.Errorf("read %s: %w", subject, err)
		}
		raw.marker = isMarker(hdr)
	}
	return raw, nil
}

func (c *Conn) directGet(ctx context.Context, stream, subject string) (rawEntry, error) {
	return c.directMsg(ctx, readTry, stream, subject)
}

func (c *Conn) directMsg(ctx context.Context, try time.Duration, stream, subject string) (rawEntry, error) {
	m, err := c.request(ctx, try, c.apiPrefix+"DIRECT.GET."+stream+"."+subject, nil, nil)
	if err != nil {
		return rawEntry{}, err
	}
	switch status := m.Header.Get("Status"); status {
	case "":
	case "404":
		return rawEntry{}, ErrNotFound
	default:
		return rawEntry{}, fmt.Errorf("%w: %s %s", ErrUnavailable, status, m.Header.Get("Description"))
	}
	seq, err := strconv.ParseUint(m.Header.Get(jetstream.SequenceHeader), 10, 64)
	if err != nil {
		return rawEntry{}, fmt.Errorf("read %s: no sequence: %w", subject, err)
	}
	created, _ := time.Parse(time.RFC3339Nano, m.Header.Get(jetstream.TimeStampHeaer))
	return rawEntry{seq: seq, created: created, data: m.Data, marker: isMarker(m.Header)}, nil
}

// isMarker tells the marks of deletions, purges and expiries from values.
func isMarker(h nats.Header) bool {
	if len(h) == 0 {
		return false
	}
	op := h.Get("KV-Operation")
	return strings.EqualFold(op, "DEL") || strings.EqualFold(op, "PURGE") || h.Get(jetstream.MarkerReasonHeader) != ""
}
