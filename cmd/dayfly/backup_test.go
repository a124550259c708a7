package main

import (
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
)

// What is not a task that may still run comes back as it was, and a key without a record
// names a task that came too late for the backup.
func TestBackupAndRestore(t *testing.T) {
	from := natstest.Connect(t, natstest.Server(t))
	if err := bus.Provision(t.Context(), from, schemas.Assets(time.Hour), 1); err != nil {
		t.Fatal(err)
	}
	encode := func(v any) []byte {
		b, err := schemas.Encode(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	fill := func(bucket, key string, v any, h nats.Header) {
		if err := from.Fill(t.Context(), bucket, []bus.Stored{{Key: key, Data: encode(v), Header: h}}); err != nil {
			t.Fatal(err)
		}
	}
	spec := schemas.DefaultSpec()
	spec.Image, spec.OnLost = "busybox", schemas.OnLostRequeue
	now := time.Now()
	record := func(id schemas.TaskID) schemas.Record {
		return schemas.NewRecord(id, spec, schemas.DefaultPolicy(), schemas.Meta{At: now, By: "gateway"})
	}
	const done, queued, late = "t-01jd6q0t000000000000000001", "t-01jd6q0t000000000000000002", "t-01jd6q0t000000000000000003"
	final, err := schemas.Next(record(done), schemas.AskCancel{Meta: schemas.Meta{At: now, By: "client"}})
	if err != nil {
		t.Fatal(err)
	}
	h := nats.Header(final.Headers())
	h.Set(jetstream.MsgTTLHeader, "24h")
	fill(schemas.BucketTasks, done, final, h)
	fill(schemas.BucketTasks, queued, record(queued), record(queued).Headers())
	fill(schemas.BucketIdempotency, "k1", schemas.IdempotencyEntry{Task: queued, At: now}, nil)
	fill(schemas.BucketIdempotency, "k2", schemas.IdempotencyEntry{Task: late, At: now}, nil)
	fill(schemas.BucketDrains, "w1", schemas.Drain{By: "me", Since: now}, nil)
	fill(schemas.BucketWorkers, "w1", schemas.Beat{Worker: "w1"}, nil)

	path := filepath.Join(t.TempDir(), "backup")
	c := &cli{out: io.Discard, err: io.Discard}
	if err := c.backup(t.Context(), from, path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: others may read the tasks' environment", info.Mode(), err)
	}
	head, entries, err := readBackup(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(b), "\n")
	for what, damaged := range map[string]string{
		"cut off":           string(b[:len(b)-20]),
		"without a line":    strings.Join(slices.Delete(slices.Clone(lines), 1, 2), ""),
		"without its foot":  strings.Join(lines[:len(lines)-2], ""),
		"without its head":  strings.Join(lines[1:], ""),
		"something else":    "hello\n",
		"of another format": strings.Replace(string(b), `"format":1`, `"format":2`, 1),
	} {
		other := path + ".damaged"
		if err := os.WriteFile(other, []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := readBackup(other); err == nil {
			t.Errorf("a backup %s was read", what)
		}
	}

	to := natstest.Connect(t, natstest.Server(t))
	if err := checkEmpty(t.Context(), to); err != nil {
		t.Fatal(err)
	}
	list, err := restore(t.Context(), to, head, entries, 1, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	want := []restored{{queued, schemas.Queued, schemas.Queued, schemas.ReasonRestored}, {Task: late, After: lostTask}}
	if !slices.Equal(list, want) {
		t.Errorf("%+v, want %+v", list, want)
	}
	if err := checkEmpty(t.Context(), to); err == nil {
		t.Error("restored NATS passes for an empty one")
	}
	tasks, sequence, err := to.Snapshot(t.Context(), schemas.BucketTasks)
	if err != nil || len(tasks) != 2 || sequence < sequenceLeap {
		t.Fatalf("%d tasks at %d, %v", len(tasks), sequence, err)
	}
	if got := tasks[0]; string(got.Data) != string(encode(final)) || got.Header.Get(jetstream.MsgTTLHeader) != "24h" || got.Header.Get(schemas.HeaderState) != string(schemas.Canceled) {
		t.Errorf("what had ended came back as %s %v", got.Data, got.Header)
	}
	for bucket, n := range map[string]int{schemas.BucketIdempotency: 2, schemas.BucketDrains: 1} {
		if list, _, err := to.Snapshot(t.Context(), bucket); err != nil || len(list) != n {
			t.Errorf("%s: %d, %v", bucket, len(list), err)
		}
	}
	if there, err := to.Exists(t.Context(), schemas.BucketWorkers); err != nil || there {
		t.Errorf("beats came back: %v", err)
	}
}

// An owner whose instance is brought back keeps it, also where the instances were looked
// at a moment after the records, and no entry names a task that is not there.
func TestRestoreLeavesAnOwnerOneInstance(t *testing.T) {
	encode := func(v any) []byte {
		b, err := schemas.Encode(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	now := time.Now()
	spec := schemas.DefaultSpec()
	spec.Image, spec.OnLost = "busybox", schemas.OnLostRequeue
	const mine, over, later, latest, never = "t-01jd6q0t000000000000000001", "t-01jd6q0t000000000000000002",
		"t-01jd6q0t000000000000000003", "t-01jd6q0t000000000000000004", "t-01jd6q0t000000000000000005"
	record := func(id schemas.TaskID, owner string) schemas.Record {
		r := schemas.NewRecord(id, spec, schemas.DefaultPolicy(), schemas.Meta{At: now, By: "gateway"})
		r.Instance = &schemas.InstanceOf{Template: "web", Owner: owner}
		return r
	}
	canceled, err := schemas.Next(record(over, "b"), schemas.AskCancel{Meta: schemas.Meta{At: now, By: "client"}})
	if err != nil {
		t.Fatal(err)
	}
	entries := map[string][]backupEntry{}
	for _, r := range []schemas.Record{record(mine, "a"), canceled, record(later, "d")} {
		entries[schemas.BucketTasks] = append(entries[schemas.BucketTasks], backupEntry{Key: string(r.ID), Revision: 1, Header: r.Headers(), Value: encode(r)})
	}
	for owner, id := range map[string]schemas.TaskID{"a": latest, "b": over, "c": never} { // and none of "d"
		entries[schemas.BucketInstances] = append(entries[schemas.BucketInstances], backupEntry{Key: schemas.InstanceKey("web", owner),
			Value: encode(schemas.InstanceEntry{Template: "web", Owner: owner, Task: id, At: now})})
	}

	to := natstest.Connect(t, natstest.Server(t))
	list, err := restore(t.Context(), to, backupHead{At: now, Sequence: 3}, entries, 1, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []schemas.TaskID{latest, never} {
		if !slices.Contains(list, restored{Task: id, After: lostTask}) {
			t.Errorf("%s is lost, and the list does not say it: %+v", id, list)
		}
	}
	stored, _, err := to.Snapshot(t.Context(), schemas.BucketInstances)
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]schemas.TaskID{}
	for _, e := range stored {
		var entry schemas.InstanceEntry
		if err := schemas.Decode(e.Data, &entry); err != nil || schemas.InstanceKey(entry.Template, entry.Owner) != e.Key {
			t.Errorf("%s: %s, %v", e.Key, e.Data, err)
		}
		names[entry.Owner] = entry.Task
	}
	if want := map[string]schemas.TaskID{"a": mine, "b": over, "d": later}; !maps.Equal(names, want) {
		t.Errorf("the entries name %v, want %v", names, want)
	}
}
