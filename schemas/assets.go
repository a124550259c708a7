package schemas

import (
	"fmt"
	"hash/fnv"
	"time"
)

// Asset is one stream or bucket on the bus, as plain data; package bus makes it.
type Asset struct {
	Name     string   // of the stream, or of the bucket (whose stream is "KV_"+Name)
	Bucket   bool     // a KV bucket: subjects "$KV.<Name>.>", one value per key
	Subjects []string // of a stream
	Queue    bool     // work queue: a message goes when it is acknowledged

	// Latest keeps only the newest message of a subject.
	Latest bool
	// Hint marks what is re-driven from the records when lost. On a single server it is
	// stored without waiting for the disk.
	Hint bool
	// DirectGet lets any replica answer reads, by subject. It is off where a read must see
	// the newest write.
	DirectGet bool
	// TTL allows a time to live for a single message.
	TTL bool
	// Agents says that agents write this bucket: it takes no message that takes away others,
	// which a header can ask for, of all keys at once.
	Agents bool
	// KeepDeleted refuses the deletion of messages through the API.
	KeepDeleted bool

	// Keep is a subject with one message that nobody takes. A file store that becomes
	// empty drops its file and makes another; with every order that would cost more than
	// all the rest of placing it.
	Keep string

	// First is the sequence with which it begins, if it is made: a bucket that is restored
	// goes on behind all revisions that services and workers may know.
	First uint64

	MaxAge      time.Duration
	MaxBytes    int64 // which the servers set aside; 0 is what they have
	MaxMessages int64 // 0 is any number
	// Refuse lets a stream that has its most take nothing more; else the oldest goes.
	Refuse     bool
	MaxMessage int32 // bytes of one message; 0 is what the server takes
}

// Names of the buckets.
const (
	BucketTasks       = "tasks"       // <task>: Record
	BucketWorkers     = "workers"     // <worker>: Beat
	BucketDrains      = "drains"      // <worker>: Drain
	BucketIdempotency = "idempotency" // hash of the key: IdempotencyEntry
	BucketLeaders     = "leaders"     // <role>: Leadership
	BucketBatches     = "batches"     // <batch>: Batch
	BucketBatchItems  = "batch-items" // <upload>.<n>: a list of items; <upload>.template
	BucketCallbacks   = "callbacks"   // <task or batch>: Delivery
	BucketKeys        = "keys"        // KeySigning, KeyVerifying, KeyHostnames
	BucketPorts       = "ports"       // <number>: PortLease
	BucketBlobs       = "blobs"       // <sha256>: Blob
	BucketImages      = "images"      // KeyWanted: WantedImages
	BucketInstances   = "instances"   // InstanceKey: InstanceEntry
)

// Names of the streams.
const (
	StreamReports = "REPORTS"
	StreamLogs    = "LOGS"
	StreamBlobs   = "BLOBS"
	streamWork    = "WORK_"
)

// WorkShards is how many streams the workers' queues are spread over. Each
// acknowledgement on a work queue looks at all its consumers, so some hundred
// workers go to a shard.
const WorkShards = 4

// WorkStream is the stream that holds the orders of worker w.
func WorkStream(w WorkerID) string { return fmt.Sprintf("%s%d", streamWork, workShard(w)) }

func workShard(w WorkerID) uint32 {
	h := fnv.New32a()
	h.Write([]byte(w))
	return h.Sum32() % WorkShards
}

// WorkConsumer is the durable consumer through which worker w pulls its orders.
func WorkConsumer(w WorkerID) string { return "agent-" + string(w) }

// Subjects. A wildcard token is passed as "*".
func OrderSubject(w WorkerID, t TaskID) string {
	return fmt.Sprintf("dayfly.work.%d.%s.%s", workShard(w), w, t)
}
func ReportSubject(w WorkerID, t TaskID) string { return fmt.Sprintf("dayfly.reports.%s.%s", w, t) }
func LogSubject(w WorkerID, t TaskID) string    { return fmt.Sprintf("dayfly.logs.%s.%s", w, t) }

// BlobSubject is that of the messages of an upload of a blob, which are numbered from 0.
// What they hold is hidden: see BlobCipher.
func BlobSubject(upload string) string { return "dayfly.blobs." + upload }

// AgentSubject is the core request by which a gateway asks the agent of a worker to do
// something: see Verb.
func AgentSubject(w WorkerID, v Verb) string { return fmt.Sprintf("dayfly.agent.%s.%s", w, v) }

// Sessions: what an agent sends to a gateway, and what a gateway sends to an agent. The
// address of a session follows.
const (
	SessionsUp   = "dayfly.sessions.up."
	SessionsDown = "dayfly.sessions.down."
)

// SessionAddress is that of session n of a process of the gateway. A wildcard token is
// passed as "*".
func SessionAddress(w WorkerID, gateway, n string) string {
	return fmt.Sprintf("%s.%s.%s", w, gateway, n)
}

// PlacerWhySubject is the core request by which a gateway asks the leading placer
// why a queued task waits: the body is the task's id, the answer a Why.
const PlacerWhySubject = "dayfly.placer.why"

// PlacerDrainedSubject is the core request by which a gateway asks the leading placer
// to say when it gives a worker nothing more: the body is the worker's name, the answer
// the same, once every mark of a drain that is stored has been seen and no assignment to
// that worker is being written.
const PlacerDrainedSubject = "dayfly.placer.drained"

// How long things are kept.
const (
	ReportAge      = 24 * time.Hour
	IdempotencyAge = 24 * time.Hour
)

// Assets lists every stream and bucket. logAge is how long task logs are kept.
func Assets(logAge time.Duration) []Asset {
	assets := []Asset{
		{Name: BucketTasks, Bucket: true, TTL: true, KeepDeleted: true},
		{Name: BucketWorkers, Bucket: true, Agents: true, Hint: true, DirectGet: true},
		{Name: BucketDrains, Bucket: true},
		{Name: BucketIdempotency, Bucket: true, MaxAge: IdempotencyAge},
		{Name: BucketLeaders, Bucket: true, Hint: true},
		{Name: BucketCallbacks, Bucket: true, TTL: true},
		{Name: BucketKeys, Bucket: true, DirectGet: true},
		{Name: BucketPorts, Bucket: true},
		{Name: BucketBlobs, Bucket: true, TTL: true},
		{Name: BucketImages, Bucket: true, DirectGet: true},
		{Name: BucketInstances, Bucket: true, TTL: true},
		{Name: BucketBatches, Bucket: true, TTL: true},
		{Name: BucketBatchItems, Bucket: true, MaxAge: BatchAge},
		{Name: StreamReports, Subjects: []string{"dayfly.reports.>"}, Hint: true, Latest: true, MaxAge: ReportAge},
		{Name: StreamBlobs, Subjects: []string{"dayfly.blobs.>"}, DirectGet: true, Latest: true},
		{Name: StreamLogs, Subjects: []string{"dayfly.logs.>"}, Hint: true, MaxAge: logAge},
		{Name: StreamArtifacts, Subjects: []string{ArtifactSubjects + ">"}, Latest: true, DirectGet: true, Refuse: true, MaxMessage: ArtifactChunk + 1<<10, MaxMessages: MaxArtifactChunks},
	}
	for i := range WorkShards {
		assets = append(assets, Asset{
			Name: fmt.Sprintf("%s%d", streamWork, i), Subjects: []string{fmt.Sprintf("dayfly.work.%d.>", i)},
			Queue: true, Hint: true, Latest: true, Keep: fmt.Sprintf("dayfly.work.%d.keep", i),
		})
	}
	return assets
}

// AgentAPIPrefix is where an agent finds the JetStream API: it lives in an account
// of its own, into which the narrow part that it may use is imported.
const AgentAPIPrefix = "dayfly.api"

// Service is a subject of the CORE account that agents may send requests to.
type Service struct {
	Subject  string // in CORE
	As       string // in AGENTS, if another
	Streamed bool   // more than one answer comes back
}

// AgentServices lists what the CORE account exports to the AGENTS account. A reply
// subject escapes subject permissions, so agents live in an account without
// JetStream and reach only these.
func AgentServices() []Service {
	var s []Service
	for i := range WorkShards {
		stream := fmt.Sprintf("%s%d", streamWork, i)
		s = append(s,
			Service{Subject: "$JS.API.CONSUMER.MSG.NEXT." + stream + ".*", As: AgentAPIPrefix + ".CONSUMER.MSG.NEXT." + stream + ".*", Streamed: true},
			Service{Subject: "$JS.API.CONSUMER.INFO." + stream + ".*", As: AgentAPIPrefix + ".CONSUMER.INFO." + stream + ".*"},
			Service{Subject: "$JS.ACK." + stream + ".>"},
		)
	}
	return append(s,
		Service{Subject: "$KV." + BucketWorkers + ".*"},
		Service{Subject: "$JS.API.DIRECT.GET.KV_" + BucketWorkers + ".$KV." + BucketWorkers + ".*",
			As: AgentAPIPrefix + ".DIRECT.GET.KV_" + BucketWorkers + ".$KV." + BucketWorkers + ".*"},
		Service{Subject: "$JS.API.DIRECT.GET.KV_" + BucketKeys + ".$KV." + BucketKeys + "." + KeyVerifying,
			As: AgentAPIPrefix + ".DIRECT.GET.KV_" + BucketKeys + ".$KV." + BucketKeys + "." + KeyVerifying},
		Service{Subject: "$JS.API.DIRECT.GET." + StreamBlobs + "." + BlobSubject("*") + ".*",
			As: AgentAPIPrefix + ".DIRECT.GET." + StreamBlobs + "." + BlobSubject("*") + ".*"},
		Service{Subject: "$JS.API.DIRECT.GET.KV_" + BucketImages + ".$KV." + BucketImages + "." + KeyWanted,
			As: AgentAPIPrefix + ".DIRECT.GET.KV_" + BucketImages + ".$KV." + BucketImages + "." + KeyWanted},
		Service{Subject: "dayfly.reports.*.*"},
		Service{Subject: "dayfly.logs.*.*"},
		Service{Subject: ArtifactSubjects + "*.*.*.*"},
		Service{Subject: SessionsUp + "*.*.*"},
	)
}

// CoreServices lists what the AGENTS account exports to the CORE account: what a gateway
// asks an agent, and what it sends through a session.
func CoreServices() []Service {
	return []Service{
		{Subject: "dayfly.agent.*.*"},
		{Subject: SessionsDown + "*.*.*"},
	}
}

// AgentInbox is the prefix of the reply subjects of worker w.
func AgentInbox(w WorkerID) string { return "_INBOX.agent-" + string(w) }

// AgentPermissions are the subjects that the agent of worker w may publish to and
// subscribe to, in its own account.
func AgentPermissions(w WorkerID) (publish, subscribe []string) {
	stream, durable := WorkStream(w), WorkConsumer(w)
	publish = []string{
		AgentAPIPrefix + ".CONSUMER.MSG.NEXT." + stream + "." + durable,
		AgentAPIPrefix + ".CONSUMER.INFO." + stream + "." + durable,
		"$JS.ACK." + stream + "." + durable + ".>",
		"$KV." + BucketWorkers + "." + string(w),
		AgentAPIPrefix + ".DIRECT.GET.KV_" + BucketWorkers + ".$KV." + BucketWorkers + "." + string(w),
		"dayfly.reports." + string(w) + ".*",
		"dayfly.logs." + string(w) + ".*",
		ArtifactSubjects + string(w) + ".*.*.*",
		AgentAPIPrefix + ".DIRECT.GET.KV_" + BucketKeys + ".$KV." + BucketKeys + "." + KeyVerifying,
		AgentAPIPrefix + ".DIRECT.GET." + StreamBlobs + "." + BlobSubject("*") + ".*",
		AgentAPIPrefix + ".DIRECT.GET.KV_" + BucketImages + ".$KV." + BucketImages + "." + KeyWanted,
		SessionsUp + string(w) + ".*.*",
	}
	return publish, []string{AgentInbox(w) + ".>", AgentSubject(w, "*"), SessionsDown + string(w) + ".*.*"}
}
