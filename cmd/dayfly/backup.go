package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/ops"
	"dayfly.dev/schemas"
	"dayfly.dev/services/reaper"
)

// A backup is a file of JSON lines: a head, one line for each key, and a foot by which
// one sees that nothing is missing.
type backupLine struct {
	Head  *backupHead    `json:"head,omitempty"`
	Entry *backupEntry   `json:"entry,omitempty"`
	Foot  map[string]int `json:"foot,omitempty"` // entries of each bucket
}

type backupHead struct {
	Format   int       `json:"format"`
	At       time.Time `json:"at"`
	Version  string    `json:"version"`
	Sequence uint64    `json:"sequence"` // of the records
}

type backupEntry struct {
	Bucket   string          `json:"bucket"`
	Key      string          `json:"key"`
	Revision uint64          `json:"revision"`
	Header   nats.Header     `json:"header,omitempty"`
	Value    json.RawMessage `json:"value"`
}

const backupFormat = 1

// backedUp are the buckets of a backup, in their order: the records first, the keys of
// clients last, so that a key is there for every record that has one; a key without its
// record names a task that came too late. Beats and leaders are left out: after a
// restore every worker registers anew.
func backedUp() []schemas.Asset {
	var list []schemas.Asset
	var keys schemas.Asset
	for _, a := range schemas.Assets(time.Hour) {
		switch {
		case a.Name == schemas.BucketIdempotency:
			keys = a
		case a.Name == schemas.BucketBlobs: // what they name is not in a backup
		case a.Bucket && !a.Hint:
			list = append(list, a)
		}
	}
	return append(list, keys)
}

// kept are the headers that a value is restored with.
func kept(h nats.Header) nats.Header {
	k := nats.Header{}
	for name, values := range h {
		if name == jetstream.MsgTTLHeader || !strings.HasPrefix(name, "Nats-") {
			k[name] = values
		}
	}
	return k
}

// storeConfig says where the records are: in the folder of an `up` that does not run, or
// in NATS.
type storeConfig struct {
	bus  busConfig
	nats *pflag.FlagSet // of bus: the environment may set them, as it does for services
	data string
}

func (s *storeConfig) flags(f *pflag.FlagSet) {
	f.StringVar(&s.data, "data", "", "data folder of a dayfly up that does not run, instead of --nats")
	s.nats = pflag.NewFlagSet("", pflag.ContinueOnError)
	s.bus.flags(s.nats)
	ops.BindEnv(s.nats, "DAYFLY")
	f.AddFlagSet(s.nats)
}

// open connects to the records. close must be called.
func (s *storeConfig) open(ctx context.Context) (conn *bus.Conn, stop func(), err error) {
	if s.data == "" {
		err := ops.ApplyEnv(s.nats, "DAYFLY")
		if err == nil {
			err = s.bus.check()
		}
		if err != nil {
			return nil, nil, &hintError{err, "--data FOLDER of a dayfly up that does not run, or --nats and --credentials"}
		}
		secrets, err := readCore(s.bus.credentials)
		if err != nil {
			return nil, nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, longPatience)
		defer cancel()
		conn, err := bus.Connect(ctx, bus.Config{Name: "backup", URL: s.bus.nats, CA: s.bus.ca, User: natsd.CoreUser, Password: secrets.Core, Logger: zerolog.Nop()})
		if err != nil {
			return nil, nil, refused(err)
		}
		return conn, conn.Close, nil
	}
	unlock, err := takeFolder(s.data)
	if err != nil {
		return nil, nil, err
	}
	secrets, err := ownCredentials(filepath.Join(s.data, "credentials.json"))
	if err != nil {
		unlock()
		return nil, nil, err
	}
	server, err := natsd.Start(ctx, natsd.Config{Dir: filepath.Join(s.data, "nats"), SyncAlways: true,
		CorePassword: secrets.Core, JoinSecret: secrets.Join, Logger: zerolog.Nop()})
	if err != nil {
		unlock()
		return nil, nil, err
	}
	conn, err = bus.Connect(ctx, bus.Config{Name: "backup", InProcess: provider{server}, User: natsd.CoreUser, Password: secrets.Core, Logger: zerolog.Nop()})
	if err != nil {
		server.Shutdown()
		unlock()
		return nil, nil, err
	}
	return conn, func() { conn.Close(); server.Shutdown(); unlock() }, nil
}

func (c *cli) backupCommand() *cobra.Command {
	var s storeConfig
	cmd := &cobra.Command{
		Use:   "backup FILE",
		Short: "Write all records to a file",
		Long: `backup writes the records of all tasks, batches, callbacks, instances, wanted images, drains,
the cluster's keys and the clients' idempotency keys to FILE, while dayfly runs. The records
are those of one moment. FILE holds what tasks were given, secrets too.

Blobs, artifacts and logs are not in it, save the first 16 KiB of a finished task's output.`,
		Example: `  dayfly backup /srv/backup/dayfly.jsonl --nats nats://10.0.0.1:4222 --credentials core.json
  dayfly backup dayfly.jsonl --data /var/lib/dayfly/up     # of a dayfly up that is stopped`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := c.interruptible(cmd.Context())
			defer stop()
			conn, closeStore, err := s.open(ctx)
			if err != nil {
				return err
			}
			defer closeStore()
			return c.backup(ctx, conn, args[0])
		},
	}
	s.flags(cmd.Flags())
	return cmd
}

// backup writes FILE as a whole or not at all.
func (c *cli) backup(ctx context.Context, conn *bus.Conn, path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".backup-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	w := bufio.NewWriter(f)
	out := json.NewEncoder(w)
	foot := map[string]int{}
	for _, asset := range backedUp() {
		bucket := asset.Name
		list, sequence, err := conn.Snapshot(ctx, bucket)
		if err != nil {
			return err
		}
		if bucket == schemas.BucketTasks {
			err = out.Encode(backupLine{Head: &backupHead{Format: backupFormat, At: time.Now().UTC(), Version: version, Sequence: sequence}})
		}
		foot[bucket] = len(list)
		for _, e := range list {
			err = errors.Join(err, out.Encode(backupLine{Entry: &backupEntry{
				Bucket: bucket, Key: e.Key, Revision: e.Revision, Header: kept(e.Header), Value: e.Data}}))
		}
		if err != nil {
			return err
		}
	}
	if err := errors.Join(out.Encode(backupLine{Foot: foot}), w.Flush(), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	c.say("%d tasks in %s", foot[schemas.BucketTasks], path)
	return nil
}

// readBackup reads a whole file, or says what it lacks.
func readBackup(path string) (head backupHead, entries map[string][]backupEntry, err error) {
	f, err := os.Open(path)
	if err != nil {
		return head, nil, err
	}
	defer f.Close()
	in := json.NewDecoder(bufio.NewReader(f))
	entries = map[string][]backupEntry{}
	for {
		var l backupLine
		err := in.Decode(&l)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return head, nil, fmt.Errorf("%s is cut off", path)
		case err != nil:
			return head, nil, fmt.Errorf("%s is no backup: %w", path, err)
		case l.Head != nil:
			head = *l.Head
		case head.Format != backupFormat:
			return head, nil, fmt.Errorf("%s is no backup that this version knows", path)
		case l.Entry != nil:
			entries[l.Entry.Bucket] = append(entries[l.Entry.Bucket], *l.Entry)
		default:
			for bucket, n := range l.Foot {
				if len(entries[bucket]) != n {
					return head, nil, fmt.Errorf("%s has %d of %d entries of %s", path, len(entries[bucket]), n, bucket)
				}
			}
			return head, entries, nil
		}
	}
}

// restored says what became of one task that was not final in the backup, or of which
// the backup has only the client's key.
type restored struct {
	Task   schemas.TaskID `json:"task"`
	Before schemas.State  `json:"before,omitzero"`
	After  schemas.State  `json:"after"`
	Reason schemas.Reason `json:"reason,omitzero"`
}

// lostTask is the state that is shown for a task whose record is not in the backup.
const lostTask schemas.State = "lost"

func (c *cli) restoreCommand() *cobra.Command {
	var s storeConfig
	var replicas int
	var scale float64
	var retention time.Duration
	cmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Bring the records of a backup into an empty NATS",
		Long: `restore brings the records of FILE back after NATS has lost its disk. Before it: end
every gateway, placer and reaper, and make sure that the old NATS servers stay dead.
Agents may go on. NATS must be empty: new servers, or dayfly nats on a new folder.

It first waits 75 seconds (a fence), after which every container that needs a permit
is dead. Then it decides about each task that was not finished in the backup, since it
may have run on:

  on_lost requeue   queued again, if max_attempts leaves it a try
  on_lost fail      failed: restored
  on_lost wait      stays with its worker, which takes it back; one that was queued
                    fails, since it may run on a worker that nobody knows of

It lists these tasks, and those that only an idempotency key or an instance names, as
lost. An owner keeps the instance that is brought back. Blobs and artifacts are not: a
task whose blobs no worker's cache has fails with blob_missing. Start the services afterwards: tasks that were accepted after the backup and
that a worker still has are closed, and named in the reapers' logs.`,
		Example: `  dayfly restore /srv/backup/dayfly.jsonl --nats nats://10.0.0.1:4222 --credentials core.json
  dayfly restore dayfly.jsonl --data /var/lib/dayfly/up    # for dayfly up, which is stopped`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := errors.Join(checkRetention(retention), checkScale(scale)); err != nil {
				return &usageError{err, cmd.CommandPath()}
			}
			ctx, stop := c.interruptible(cmd.Context())
			defer stop()
			head, entries, err := readBackup(args[0])
			if err != nil {
				return &hintError{err, "an older backup"}
			}
			conn, closeStore, err := s.open(ctx)
			if err != nil {
				return err
			}
			defer closeStore()
			if err := checkEmpty(ctx, conn); err != nil {
				return err
			}
			// No beat is acknowledged from here on: there is no bucket for it.
			fence := time.Duration(float64(reaper.DefaultConfig().Fence) * scale)
			c.say("wait %s, until no container has a permit", fence)
			select {
			case <-time.After(fence):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if err := checkEmpty(ctx, conn); err != nil {
				return err
			}
			list, err := restore(ctx, conn, head, entries, replicas, retention)
			if err != nil {
				return &hintError{err, "empty NATS again, and begin anew"}
			}
			return c.printRestored(list)
		},
	}
	f := cmd.Flags()
	s.flags(f)
	f.IntVar(&replicas, "replicas", 0, "how many NATS servers keep each record: 1 or 3 (0: 3 on a cluster)")
	f.Float64Var(&scale, "scale", 1, "that of the services")
	f.DurationVar(&retention, "retention", 24*time.Hour, "how long a task is kept that ends by the restore")
	return cmd
}

// checkEmpty refuses NATS servers that dayfly has used.
func checkEmpty(ctx context.Context, conn *bus.Conn) error {
	for _, asset := range append(backedUp(), schemas.Asset{Name: schemas.BucketWorkers}) {
		there, err := conn.Exists(ctx, asset.Name)
		if err != nil {
			return fmt.Errorf("look for bucket %s: %w", asset.Name, err)
		}
		if there {
			return &hintError{fmt.Errorf("NATS is not empty: it has the bucket %s", asset.Name),
				"end all services, and give NATS an empty folder"}
		}
	}
	return nil
}

// sequenceLeap is how far the revisions of restored records lie behind those of the
// backup: workers ignore orders of older revisions than they have seen.
const sequenceLeap = 1_000_000_000_000

func restore(ctx context.Context, conn *bus.Conn, head backupHead, entries map[string][]backupEntry, replicas int, retention time.Duration) ([]restored, error) {
	m := schemas.Meta{At: time.Now().UTC(), By: "restore"}
	var list []restored
	var records []bus.Stored
	known := map[schemas.TaskID]bool{}
	live := map[string]schemas.InstanceEntry{} // by key: instances that are not over
	for _, e := range entries[schemas.BucketTasks] {
		var r schemas.Record
		if err := schemas.Decode(e.Value, &r); err != nil {
			return nil, fmt.Errorf("record %s: %w", e.Key, err)
		}
		known[r.ID] = true
		if r.State.Final() {
			records = append(records, bus.Stored{Key: e.Key, Data: e.Value, Header: e.Header})
			continue
		}
		m.On = e.Revision
		next, err := schemas.Next(r, schemas.Restore{Meta: m})
		if err != nil {
			return nil, err
		}
		data, err := schemas.Encode(next)
		if err != nil {
			return nil, err
		}
		header := nats.Header(next.Headers())
		if next.State.Final() {
			header.Set(jetstream.MsgTTLHeader, retention.String())
		}
		records = append(records, bus.Stored{Key: e.Key, Data: data, Header: header})
		list = append(list, restored{r.ID, r.State, next.State, next.Reason})
		if of := next.Instance; of != nil && !next.State.Final() {
			if key := of.Key(); live[key].Task < r.ID {
				live[key] = schemas.InstanceEntry{Template: of.Template, Owner: of.Owner, Task: r.ID, At: m.At}
			}
		}
	}
	instances, lost, err := restoredInstances(entries[schemas.BucketInstances], known, live)
	if err != nil {
		return nil, err
	}
	list = append(list, lost...)
	for _, e := range entries[schemas.BucketIdempotency] {
		var entry schemas.IdempotencyEntry
		if err := schemas.Decode(e.Value, &entry); err != nil {
			return nil, fmt.Errorf("idempotency key %s: %w", e.Key, err)
		}
		if entry.Task != "" && !known[entry.Task] && entry.At.After(head.At.Add(-time.Minute)) {
			list = append(list, restored{Task: entry.Task, After: lostTask})
		}
	}
	// The records come last: without them nothing happens.
	assets := backedUp()
	slices.Reverse(assets)
	for _, a := range assets {
		var stored []bus.Stored
		switch a.Name {
		case schemas.BucketTasks:
			a.First, stored = head.Sequence+sequenceLeap, records
		case schemas.BucketInstances:
			stored = instances
		default:
			for _, e := range entries[a.Name] {
				stored = append(stored, bus.Stored{Key: e.Key, Data: e.Value, Header: e.Header})
			}
		}
		if err := bus.Provision(ctx, conn, []schemas.Asset{a}, replicas); err != nil {
			return nil, err
		}
		if err := conn.Fill(ctx, a.Name, stored); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// restoredInstances are the entries of the bucket of instances. The backup has them as they
// were a moment after the records, when one may have named a newer task already: an owner
// whose instance is brought back keeps that one. An entry whose task is not in the backup
// is left out, since a request would make that task again, while it may run somewhere;
// these tasks are listed as lost.
func restoredInstances(entries []backupEntry, known map[schemas.TaskID]bool, live map[string]schemas.InstanceEntry) (stored []bus.Stored, lost []restored, err error) {
	named := maps.Clone(live)
	for _, e := range entries {
		var entry schemas.InstanceEntry
		if err := schemas.Decode(e.Value, &entry); err != nil {
			return nil, nil, fmt.Errorf("instance %s: %w", e.Key, err)
		}
		if !known[entry.Task] {
			lost = append(lost, restored{Task: entry.Task, After: lostTask})
		} else if _, ok := live[e.Key]; !ok {
			named[e.Key] = entry
		}
	}
	for _, key := range slices.Sorted(maps.Keys(named)) {
		data, err := schemas.Encode(named[key])
		if err != nil {
			return nil, nil, err
		}
		stored = append(stored, bus.Stored{Key: key, Data: data})
	}
	return stored, lost, nil
}

func (c *cli) printRestored(list []restored) error {
	rows := [][]string{{"TASK", "IN THE BACKUP", "NOW", "REASON"}}
	for _, r := range list {
		switch {
		case c.data():
			if err := c.printLine(r); err != nil {
				return err
			}
		case c.names():
			fmt.Fprintln(c.out, r.Task)
		default:
			rows = append(rows, []string{string(r.Task), string(r.Before), string(r.After), string(r.Reason)})
		}
	}
	if c.data() || c.names() {
		return nil
	}
	return c.table(rows)
}
