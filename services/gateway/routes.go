package gateway

import (
	"net/http"

	"dayfly.dev/schemas"
)

// operation is one thing that the API does. The router, the parameters that a handler
// takes and openapi.json are all made from the table of operations, so none of them can
// say more or less than the others.
type operation struct {
	method, path string
	name         string // operationId
	about        string
	handle       func(*Gateway, *response, *http.Request) error
	params       []param
	body         any      // of this type, as JSON
	bodyOptional bool     // it may be left out
	kinds        []string // other media types of the body
	answers      []reply
	fails        []failure
}

// param is a parameter in the query or a header. schema is JSON Schema.
type param struct {
	name, in string
	about    string
	schema   string
	many     bool // it may come more than once
	required bool
}

// reply is an answer of success.
type reply struct {
	status int
	about  string
	value  any      // of this type, as JSON
	kinds  []string // other media types, of text
	header []string
}

// failure is a status with the codes of the problems that come with it.
type failure struct {
	status int
	codes  []schemas.Code
}

// names gives the query's parameters as parseQuery takes them.
func (o *operation) names() (names []string) {
	for _, p := range o.params {
		switch {
		case p.in == "query" && p.many:
			names = append(names, p.name+"*")
		case p.in == "query":
			names = append(names, p.name)
		}
	}
	return names
}

const (
	aDuration = `{"$ref": "#/components/schemas/Duration"}`
	aSwitch   = `{"type": "string", "enum": ["", "1", "true", "0", "false"]}`
	aState    = `{"type": "string", "pattern": "^(queued|assigned|starting|running|completed|failed|canceled|expired)(,(queued|assigned|starting|running|completed|failed|canceled|expired))*$"}`
	aLabel    = `{"type": "string", "pattern": "^[A-Za-z0-9_./-]{1,63}(=[\\s\\S]*)?$", "examples": ["owner=litmus", "owner"]}`
)

var (
	waitParams = []param{
		{name: "wait", in: "query", about: "Hold the answer back until the task runs, is ready (has passed its health check; runs, if it has none), or is done. A task that is over is waited for no longer. Where the time is over first, the task comes as it is then.", schema: `{"type": "string", "enum": ["running", "ready", "done"]}`},
		{name: "timeout", in: "query", about: "How long to wait: 30s if not given, and at most what the site allows (60s). Goes with wait.", schema: aDuration},
	}
	instanceWait = []param{
		{name: "wait", in: "query", about: "Hold the answer back until the instance runs, or is ready (has passed its health check; runs, if it has none). One that is over is waited for no longer.", schema: `{"type": "string", "enum": ["running", "ready"]}`},
		waitParams[1],
	}
	idempotencyKeyParam = param{name: "Idempotency-Key", in: "header", about: "Any word of the client's choice, 1 to 255 visible ASCII characters.", schema: `{"type": "string", "minLength": 1, "maxLength": 255}`}
	ifMatch             = param{name: "If-Match", in: "header", about: "Only if the task is still at this revision: the ETag of an earlier answer. Checked in the write itself.", schema: `{"type": "string", "examples": ["\"1234\""]}`}
	ifNoneMatch         = param{name: "If-None-Match", in: "header", about: "Answer 304 if the task is still at this revision.", schema: `{"type": "string", "examples": ["\"1234\""]}`}
	ifNoneMatchHash     = param{name: "If-None-Match", in: "header", about: "Answer 304 if the file has this hash.", schema: `{"type": "string"}`}
	lastEvent           = param{name: "Last-Event-ID", in: "header", about: "Go on behind the event with this id. An EventSource sends it by itself.", schema: `{"type": "string"}`}
	states              = param{name: "state", in: "query", many: true, about: "In one of these states: comma between, or several times.", schema: aState}
	labels              = param{name: "label", in: "query", many: true, about: "With this label: name=value, or a name alone for any value. Several: all of them.", schema: aLabel}
	worker              = param{name: "worker", in: "query", about: "Of this worker.", schema: `{"$ref": "#/components/schemas/WorkerID"}`}
	eventParams         = []param{
		{name: "follow", in: "query", about: "0 ends the answer with what there is; otherwise it goes on with what comes.", schema: aSwitch},
		{name: "after", in: "query", about: "Begin behind the event with this id, or with what is still to come: now. All that there is, if not given.", schema: `{"type": "string", "pattern": "^([0-9]{1,19}|now)$"}`},
		lastEvent, states,
	}
	page = []string{"ETag"}

	always       = []failure{{400, []schemas.Code{schemas.CodeInvalidQuery}}, {421, []schemas.Code{schemas.CodeUnknownHost}}, {500, []schemas.Code{schemas.CodeInternal}}, {503, []schemas.Code{schemas.CodeUnavailable}}}
	ofOne        = failure{404, []schemas.Code{schemas.CodeNotFound}}
	badHeaders   = failure{400, []schemas.Code{schemas.CodeInvalidHeader}}
	changed      = failure{412, []schemas.Code{schemas.CodePrecondition}}
	unknown      = failure{503, []schemas.Code{schemas.CodeUnknownOutcome}}
	tooMany      = failure{429, []schemas.Code{schemas.CodeTooManyRequests}}
	elsewhere    = failure{403, []schemas.Code{schemas.CodeCrossOrigin}}
	ofState      = failure{409, []schemas.Code{schemas.CodeStateConflict}}
	badValue     = failure{422, []schemas.Code{schemas.CodeInvalidValue, schemas.CodeNotAvailable}}
	away         = failure{503, []schemas.Code{schemas.CodeWorkerAway}}
	lostArtifact = failure{410, []schemas.Code{schemas.CodeArtifactLost}}
	aPath        = param{name: "path", in: "query", required: true, about: "Of the file or folder in the task; relative to its working directory if it does not begin with a slash.", schema: `{"type": "string", "minLength": 1, "maxLength": 4096}`}
	bodyFails    = []failure{
		elsewhere,
		{400, []schemas.Code{schemas.CodeInvalidJSON, schemas.CodeDuplicateField}}, {408, []schemas.Code{schemas.CodeInvalidJSON}},
		{413, []schemas.Code{schemas.CodeTooLarge}}, {415, []schemas.Code{schemas.CodeContentType}},
		{422, []schemas.Code{schemas.CodeUnknownField, schemas.CodeInvalidType}},
	}
)

func fails(groups ...any) (all []failure) {
	all = append(all, always...)
	for _, g := range groups {
		switch g := g.(type) {
		case failure:
			all = append(all, g)
		case []failure:
			all = append(all, g...)
		}
	}
	return all
}

func params(groups ...any) (all []param) {
	for _, g := range groups {
		switch g := g.(type) {
		case param:
			all = append(all, g)
		case []param:
			all = append(all, g...)
		}
	}
	return all
}

// operations is the API.
func operations() []operation {
	return []operation{
		{method: "POST", path: "/v1/tasks", name: "createTask", handle: (*Gateway).create,
			about:  "Asks for a task. It is accepted once its record is stored; with an Idempotency-Key the same request may be sent again for a day and makes no second task. Fields that are left out get the site's defaults; unknown ones are refused.",
			params: params(idempotencyKeyParam, waitParams),
			body:   schemas.Spec{},
			answers: []reply{{status: 201, about: "The task. Idempotency-Replayed says that an earlier request made it.", value: schemas.Task{},
				header: []string{"ETag", "Location", "Idempotency-Replayed"}}},
			fails: fails(bodyFails, badHeaders, unknown, failure{503, []schemas.Code{schemas.CodeNoPorts}}, failure{507, []schemas.Code{schemas.CodeNoSpace}},
				failure{410, []schemas.Code{schemas.CodeKeyExpired}}, failure{422, []schemas.Code{
					schemas.CodeInvalidValue, schemas.CodeNotAvailable, schemas.CodeNotAllowed, schemas.CodeNoCapacity, schemas.CodeKeyReused, schemas.CodeBlobMissing}})},
		{method: "GET", path: "/v1/tasks", name: "listTasks", handle: (*Gateway).list,
			about: "Lists tasks, newest first, without history and output, and without the stdin, files, env and callback of their specs. One request looks at 10,000 tasks at the most, so with a filter that takes few of them a page may be short, even empty, and have a next_cursor all the same: the list is over where there is none. Tasks that come meanwhile neither repeat nor skip others.",
			params: params(states, labels, worker,
				param{name: "created_after", in: "query", about: "Created since then: a time, or a duration before now.", schema: `{"type": "string", "examples": ["10m", "2026-01-31T12:00:00Z"]}`},
				param{name: "limit", in: "query", about: "How many at the most; 100 if not given.", schema: `{"type": "integer", "minimum": 1, "maximum": 1000}`},
				param{name: "cursor", in: "query", about: "next_cursor of the page before, with the same filters.", schema: `{"type": "string"}`}),
			answers: []reply{{status: 200, about: "One page.", value: schemas.TaskList{}}}, fails: fails()},
		{method: "GET", path: "/v1/tasks/{id}", name: "getTask", handle: (*Gateway).get,
			about:   "Shows a task, or waits for it. While it is queued, why says what it waits for.",
			params:  params(waitParams, ifNoneMatch),
			answers: []reply{{status: 200, about: "The task.", value: schemas.Task{}, header: page}, {status: 304, about: "It is still at the revision of If-None-Match.", header: page}},
			fails:   fails(ofOne)},
		{method: "DELETE", path: "/v1/tasks/{id}", name: "cancelTask", handle: (*Gateway).cancel,
			about:   "Cancels a task: TERM to its processes, KILL after the grace. It does not wait for the end. A task that is over stays as it is.",
			params:  params(param{name: "grace", in: "query", about: "Between TERM and KILL; the spec's timeouts.stop if not given.", schema: aDuration}, ifMatch),
			answers: []reply{{status: 200, about: "The task, canceled or being canceled.", value: schemas.Task{}, header: page}},
			fails:   fails(elsewhere, ofOne, badHeaders, changed, unknown)},
		{method: "POST", path: "/v1/tasks/{id}/extend", name: "extendTask", handle: (*Gateway).extend,
			about:  "Moves the task's deadline to ttl from now, never back and never beyond the longest lifetime.",
			params: params(ifMatch), body: schemas.ExtendRequest{},
			answers: []reply{{status: 200, about: "Done: the worker has the new deadline, or none needs to.", value: schemas.Task{}, header: page},
				{status: 202, about: "The record has the new deadline; the worker has not confirmed it yet.", value: schemas.Task{}, header: page}},
			fails: fails(bodyFails, ofOne, badHeaders, changed, unknown, failure{409, []schemas.Code{schemas.CodeStateConflict, schemas.CodeTooLate, schemas.CodeDraining}},
				failure{422, []schemas.Code{schemas.CodeInvalidValue, schemas.CodeNotAllowed}})},
		{method: "POST", path: "/v1/tasks/{id}/restart", name: "restartTask", handle: (*Gateway).restart,
			about:  "Runs the command of a running task again in the same container: TERM to its processes, KILL after the spec's timeouts.stop. Its files and its deadline stay as they are, its log goes on, and restarts grows by one. While a restart is on its way, asking again asks for nothing more.",
			params: params(ifMatch), body: struct{}{},
			answers: []reply{{status: 200, about: "Done: the command runs again.", value: schemas.Task{}, header: page},
				{status: 202, about: "The worker has not confirmed it yet.", value: schemas.Task{}, header: page}},
			fails: fails(bodyFails, ofOne, badHeaders, changed, unknown, failure{409, []schemas.Code{schemas.CodeStateConflict, schemas.CodeTooLate}})},
		{method: "GET", path: "/v1/tasks/{id}/logs", name: "readLogs", handle: (*Gateway).logs,
			about: "Hands out what the task wrote, in order: as text, as NDJSON or as SSE (of LogLine), by Accept. An SSE id is a place from which reading goes on.",
			params: []param{
				{name: "follow", in: "query", about: "Go on until the task is over.", schema: aSwitch},
				{name: "tail", in: "query", about: "Only about the last so many lines of what there is.", schema: `{"type": "integer", "minimum": 0, "maximum": 100000}`},
				{name: "since", in: "query", about: "Only what was written since then: a time, or a duration before now.", schema: `{"type": "string"}`},
				{name: "stream", in: "query", about: "One of the two.", schema: `{"$ref": "#/components/schemas/Stream"}`},
				{name: "attempt", in: "query", about: "One attempt; the newest that has logs, and followed those after it, if not given.", schema: `{"type": "integer", "minimum": 1}`},
				{name: "timestamps", in: "query", about: "The time before each line, in text.", schema: aSwitch},
				lastEvent},
			answers: []reply{{status: 200, about: "The log.", kinds: []string{"text/plain", "application/x-ndjson", "text/event-stream"}},
				{status: 204, about: "There is nothing behind Last-Event-ID, and nothing will come."}},
			fails: fails(ofOne, badHeaders, tooMany)},
		{method: "GET", path: "/v1/tasks/{id}/events", name: "taskEvents", handle: (*Gateway).taskEvents,
			about: "The changes of one task as SSE or NDJSON (of TaskEvent), by Accept, until it is over.", params: eventParams,
			answers: eventAnswers, fails: fails(ofOne, badHeaders, tooMany)},
		{method: "GET", path: "/v1/tasks/{id}/tunnel/{port}", name: "openTunnel", handle: (*Gateway).tunnel,
			about:   "A WebSocket that is a connection to a port of the task's own loopback interface, whether its spec names it or not. Binary messages of any length are bytes; the text message eof says that no more come from that side; closing it closes the connection. Refusals come before the upgrade.",
			answers: []reply{{status: 101, about: "The connection is open."}},
			fails: fails(elsewhere, ofOne, badHeaders, failure{409, []schemas.Code{schemas.CodeStateConflict}}, failure{422, []schemas.Code{schemas.CodeInvalidValue}},
				tooMany, failure{502, []schemas.Code{schemas.CodeNoListener}}, failure{503, []schemas.Code{schemas.CodeWorkerAway}})},
		{method: "POST", path: "/v1/tasks/{id}/exec", name: "exec", handle: (*Gateway).exec,
			about: "Runs a program beside the task's process, with its rights and its environment, and waits for its end; a client that leaves ends it. A program that is not there has the exit code 127. One in the background goes on by itself, through restarts of the worker's agent too, until it ends, is ended, or the task's run is over.",
			body:  schemas.ExecRequest{},
			answers: []reply{{status: 200, about: "It has ended.", value: schemas.ExecResult{}},
				{status: 201, about: "It runs in the background.", value: schemas.ExecStarted{}, header: []string{"Location"}}},
			fails: fails(bodyFails, ofOne, ofState, tooMany, badValue, unknown, away)},
		{method: "GET", path: "/v1/tasks/{id}/exec", name: "openConsole", handle: (*Gateway).console,
			about: "A WebSocket that is the streams of a program beside the task's process, on a terminal or not. A binary message is a channel and bytes: 0 is stdin and stdout, 1 stderr. A text message is an ExecControl. The answer's Dayfly-Exec names the program: with exec it is resumed, for a minute after the connection broke, and nothing is lost where the client acknowledges. Refusals come before the upgrade.",
			params: []param{
				{name: "command", in: "query", many: true, about: "The program and its arguments, a parameter for each.", schema: `{"type": "string"}`},
				{name: "env", in: "query", many: true, about: "NAME=value, laid over the task's environment.", schema: `{"type": "string", "pattern": "^[A-Za-z_]"}`},
				{name: "workdir", in: "query", about: "Where it begins; the task's, if not given.", schema: `{"type": "string"}`},
				{name: "tty", in: "query", about: "On a terminal of its own; all it writes is then stdout.", schema: aSwitch},
				{name: "rows", in: "query", about: "Of the terminal; 24 if not given.", schema: `{"type": "integer", "minimum": 1, "maximum": 10000}`},
				{name: "cols", in: "query", about: "Of the terminal; 80 if not given.", schema: `{"type": "integer", "minimum": 1, "maximum": 10000}`},
				{name: "stdin", in: "query", about: "Something comes; else stdin is at its end. A terminal always has it.", schema: aSwitch},
				{name: "timeout", in: "query", about: "After which it is killed; none if not given.", schema: aDuration},
				{name: "exec", in: "query", about: "Go on with this program, which is taken from who has it.", schema: `{"$ref": "#/components/schemas/ExecID"}`},
				{name: "stdout", in: "query", about: "With exec: so many bytes of stdout have come.", schema: `{"type": "integer", "minimum": 0}`},
				{name: "stderr", in: "query", about: "With exec: so many bytes of stderr have come.", schema: `{"type": "integer", "minimum": 0}`},
				{name: "acks", in: "query", about: "The client acknowledges output, at least every 128 KiB, and closes the WebSocket when the program has ended. Else what was sent counts as come.", schema: aSwitch}},
			answers: []reply{{status: 101, about: "The connection is open.", header: []string{headerExec}}},
			fails:   fails(elsewhere, ofOne, badHeaders, ofState, tooMany, badValue, away)},
		{method: "GET", path: "/v1/tasks/{id}/attach", name: "attachTask", handle: (*Gateway).attach,
			about: "A WebSocket that is the streams of the task's own process, whose spec has tty or stdin_open. The messages are those of openConsole; end is the end of stdin for good. What the process writes stands in its log too. Closing leaves the task as it is, and any time later it is attached to again, also after a restart of the worker's agent; with stdout and stderr nothing is lost. Refusals come before the upgrade.",
			params: []param{
				{name: "stdout", in: "query", about: "So many bytes of stdout have come; 0 for all from the start. Without both: from where the last client left, and at most the newest 256 KiB.", schema: `{"type": "integer", "minimum": 0}`},
				{name: "stderr", in: "query", about: "So many bytes of stderr have come.", schema: `{"type": "integer", "minimum": 0}`},
				{name: "acks", in: "query", about: "As of openConsole.", schema: aSwitch}},
			answers: []reply{{status: 101, about: "The connection is open."}},
			fails:   fails(elsewhere, ofOne, badHeaders, ofState, tooMany, badValue, away)},
		{method: "GET", path: "/v1/tasks/{id}/execs", name: "listExecs", handle: (*Gateway).listExecs,
			about:   "Lists the programs beside the task's process, oldest first: those in the background, the last 16 of them that have ended, and consoles.",
			answers: []reply{{status: 200, about: "All of them.", value: schemas.ExecList{}}}, fails: fails(ofOne, ofState, tooMany, unknown, away)},
		{method: "GET", path: "/v1/tasks/{id}/execs/{exec}", name: "getExec", handle: (*Gateway).getExec,
			about:   "Shows a program, and of one in the background the newest 128 KiB that it wrote to each stream.",
			answers: []reply{{status: 200, about: "The program.", value: schemas.Exec{}}}, fails: fails(ofOne, ofState, tooMany, unknown, away)},
		{method: "DELETE", path: "/v1/tasks/{id}/execs/{exec}", name: "endExec", handle: (*Gateway).endExec,
			about:   "Ends a program: TERM to it and all that it has started, KILL after the grace. It does not wait for the end.",
			params:  []param{{name: "grace", in: "query", about: "Between TERM and KILL; 10s if not given.", schema: aDuration}},
			answers: []reply{{status: 204, about: "It is being ended, or has ended."}}, fails: fails(elsewhere, ofOne, ofState, tooMany, away)},
		{method: "GET", path: "/v1/tasks/{id}/files", name: "getFiles", handle: (*Gateway).getFiles,
			about:   "Gives a file of the task as its bytes, or a folder as a tar archive, or lists it. Links are not followed. An answer that breaks off has not come whole; what a folder's archive lacks is in the trailer Dayfly-Skipped.",
			params:  []param{aPath, {name: "list", in: "query", about: "Say what is in a folder instead: the first 10,000 names.", schema: aSwitch}},
			answers: []reply{{status: 200, about: "The file, the folder, or the list.", value: schemas.FileList{}, kinds: []string{kindBytes, kindTar}}},
			fails:   fails(ofOne, ofState, tooMany, unknown, away, failure{403, []schemas.Code{schemas.CodePermission}}, failure{413, []schemas.Code{schemas.CodeTooLarge}}, badValue)},
		{method: "PUT", path: "/v1/tasks/{id}/files", name: "putFiles", handle: (*Gateway).putFiles,
			about:   "Writes one file, or unpacks a tar archive into a folder, which is made if it is not there: all of it or nothing.",
			params:  []param{aPath, {name: "mode", in: "query", about: "Of one file, octal; 644 if not given.", schema: `{"type": "string", "pattern": "^0*[0-7]{1,3}$"}`}},
			kinds:   []string{kindBytes, kindTar},
			answers: []reply{{status: 200, about: "It is there.", value: schemas.FilesDone{}}},
			fails: fails(elsewhere, ofOne, ofState, tooMany, unknown, away, failure{400, []schemas.Code{schemas.CodeCutOff}}, failure{403, []schemas.Code{schemas.CodePermission}},
				failure{413, []schemas.Code{schemas.CodeTooLarge}}, failure{415, []schemas.Code{schemas.CodeContentType}},
				failure{422, []schemas.Code{schemas.CodeInvalidValue, schemas.CodeBadArchive}}, failure{507, []schemas.Code{schemas.CodeNoSpace}})},
		{method: "DELETE", path: "/v1/tasks/{id}/files", name: "deleteFiles", handle: (*Gateway).deleteFiles,
			about:   "Deletes a file, or a folder.",
			params:  []param{aPath, {name: "recursive", in: "query", about: "A folder with all that is in it; else it must be empty.", schema: aSwitch}},
			answers: []reply{{status: 200, about: "It is gone.", value: schemas.FilesDone{}}},
			fails:   fails(elsewhere, ofOne, ofState, tooMany, unknown, away, failure{403, []schemas.Code{schemas.CodePermission}}, failure{413, []schemas.Code{schemas.CodeTooLarge}}, badValue)},
		{method: "GET", path: "/v1/tasks/{id}/artifacts", name: "listArtifacts", handle: (*Gateway).listArtifacts,
			about:   "Lists the files that a final task left in its output folder, by path, or gives them all as a tar archive: with archive, or by Accept. An archive that breaks off has not come whole.",
			params:  []param{{name: "archive", in: "query", about: "Give the archive.", schema: aSwitch}},
			answers: []reply{{status: 200, about: "All of them.", value: schemas.ArtifactList{}, kinds: []string{kindTar}}},
			fails:   fails(ofOne, ofState, tooMany, lostArtifact)},
		{method: "GET", path: "/v1/tasks/{id}/artifacts/{name...}", name: "getArtifact", handle: (*Gateway).getArtifact,
			about:   "Gives one of them, by its path in the folder. All of it has the SHA-256 that its worker reported, or the answer breaks off; so there are no ranges. The ETag is that hash.",
			params:  []param{ifNoneMatchHash},
			answers: []reply{{status: 200, about: "The file.", kinds: []string{kindBytes}, header: page}, {status: 304, about: "It is the file of If-None-Match."}},
			fails:   fails(ofOne, ofState, tooMany, lostArtifact)},
		{method: "GET", path: "/v1/events", name: "events", handle: (*Gateway).events,
			about:   "The changes of all tasks in the order of their writes, as SSE or NDJSON (of TaskEvent), by Accept. An id is a place from which any gateway goes on; nothing is lost and nothing comes twice while records are kept, and truncated says where a record no longer has it all.",
			params:  params(eventParams, labels, worker),
			answers: eventAnswers, fails: fails(badHeaders, tooMany)},
		{method: "PUT", path: "/v1/blobs/{sha256}", name: "putBlob", handle: (*Gateway).putBlob,
			about: "Stores a blob: bytes of any number, named by their SHA-256. It is verified, and stored whole or not at all. One that is there is answered at once, and its body is not read: send Expect: 100-continue. It stays while tasks that are not over name it, and for 24 h after.",
			kinds: []string{kindBytes},
			answers: []reply{{status: 200, about: "It was there.", value: schemas.BlobInfo{}},
				{status: 201, about: "It is stored.", value: schemas.BlobInfo{}, header: []string{"Location"}}},
			fails: fails(elsewhere, tooMany, unknown, failure{400, []schemas.Code{schemas.CodeCutOff}}, failure{413, []schemas.Code{schemas.CodeTooLarge}},
				failure{415, []schemas.Code{schemas.CodeContentType}}, failure{422, []schemas.Code{schemas.CodeInvalidValue, schemas.CodeDigestMismatch}},
				failure{507, []schemas.Code{schemas.CodeNoSpace}})},
		{method: "GET", path: "/v1/blobs/{sha256}", name: "getBlob", handle: (*Gateway).getBlob,
			about:  "Gives a blob, or a part of it. HEAD says whether it is there, and its size.",
			params: []param{{name: "Range", in: "header", about: "Only these bytes.", schema: `{"type": "string", "examples": ["bytes=0-1023"]}`}},
			answers: []reply{{status: 200, about: "The bytes.", kinds: []string{kindBytes}, header: page}, {status: 206, about: "The part that Range asks for.", kinds: []string{kindBytes}, header: page},
				{status: 304, about: "It is what If-None-Match names."}, {status: 416, about: "It has no such part."}},
			fails: fails(ofOne, failure{422, []schemas.Code{schemas.CodeInvalidValue}})},
		{method: "GET", path: "/v1/blobs", name: "listBlobs", handle: (*Gateway).listBlobs,
			about: "Lists the blobs, those first that were not used for longest. One that is used meanwhile may come twice; none is left out.",
			params: []param{{name: "limit", in: "query", about: "How many at the most; 100 if not given.", schema: `{"type": "integer", "minimum": 1, "maximum": 1000}`},
				{name: "cursor", in: "query", about: "next_cursor of the page before.", schema: `{"type": "string"}`}},
			answers: []reply{{status: 200, about: "One page.", value: schemas.BlobList{}}}, fails: fails()},
		{method: "DELETE", path: "/v1/blobs/{sha256}", name: "removeBlob", handle: (*Gateway).removeBlob,
			about:   "Removes a blob that no task needs which is not over, and no batch that is not done; else the answer names them. From then on it is not found, and its room is free some ten minutes later. To send it again makes it be there again.",
			answers: []reply{{status: 200, about: "It was removed.", value: schemas.BlobInfo{}}},
			fails:   fails(elsewhere, ofOne, unknown, failure{409, []schemas.Code{schemas.CodeInUse}}, failure{422, []schemas.Code{schemas.CodeInvalidValue}})},
		{method: "POST", path: "/v1/batches", name: "createBatch", handle: (*Gateway).createBatch,
			about:  "Asks for many tasks at once: a template and up to 10,000 items that differ from it. It is accepted, whole or not at all, once it is stored; its tasks follow.",
			params: params(idempotencyKeyParam), body: schemas.BatchSpec{},
			answers: []reply{{status: 201, about: "The batch.", value: schemas.BatchStatus{}, header: []string{"Location"}}},
			fails: fails(bodyFails, badHeaders, unknown, tooMany, failure{410, []schemas.Code{schemas.CodeKeyExpired}}, failure{422, []schemas.Code{
				schemas.CodeInvalidValue, schemas.CodeNotAvailable, schemas.CodeNotAllowed, schemas.CodeKeyReused, schemas.CodeBlobMissing}}, failure{507, []schemas.Code{schemas.CodeNoSpace}})},
		{method: "GET", path: "/v1/batches", name: "listBatches", handle: (*Gateway).listBatches,
			about: "Lists batches, newest first, without what became of their callbacks. Batches that come meanwhile neither repeat nor skip others.",
			params: []param{{name: "limit", in: "query", about: "How many at the most; 100 if not given.", schema: `{"type": "integer", "minimum": 1, "maximum": 1000}`},
				{name: "cursor", in: "query", about: "next_cursor of the page before.", schema: `{"type": "string"}`}},
			answers: []reply{{status: 200, about: "One page.", value: schemas.BatchList{}}}, fails: fails()},
		{method: "GET", path: "/v1/batches/{id}", name: "getBatch", handle: (*Gateway).getBatch,
			about:   "Shows a batch: how many of its tasks are in which state.",
			answers: []reply{{status: 200, about: "The batch.", value: schemas.BatchStatus{}}}, fails: fails(ofOne)},
		{method: "DELETE", path: "/v1/batches/{id}", name: "cancelBatch", handle: (*Gateway).cancelBatch,
			about:   "Cancels all tasks of a batch that are not over, and makes no more.",
			answers: []reply{{status: 200, about: "The batch.", value: schemas.BatchStatus{}}}, fails: fails(elsewhere, ofOne, unknown)},
		{method: "GET", path: "/v1/batches/{id}/items", name: "listItems", handle: (*Gateway).listItems,
			about: "Lists what became of each item, by index.",
			params: []param{{name: "limit", in: "query", about: "How many at the most; 100 if not given.", schema: `{"type": "integer", "minimum": 1, "maximum": 1000}`},
				{name: "cursor", in: "query", about: "next_cursor of the page before.", schema: `{"type": "string"}`}},
			answers: []reply{{status: 200, about: "One page.", value: schemas.BatchItemList{}}}, fails: fails(ofOne)},
		{method: "GET", path: "/v1/templates", name: "listTemplates", handle: (*Gateway).listTemplates,
			about: "Lists the operator's templates, by name, and what is wrong with their files: what such a file said before holds. The values of secrets are left out. Gateways that have read the same give the same digest.", answers: []reply{{status: 200, about: "All of them.", value: schemas.TemplateList{}}}, fails: fails()},
		{method: "GET", path: "/v1/templates/{template}", name: "getTemplate", handle: (*Gateway).getTemplate,
			about: "Shows a template.", answers: []reply{{status: 200, about: "The template.", value: schemas.TemplateView{}}}, fails: fails(ofOne)},
		{method: "GET", path: "/v1/instances", name: "listInstances", handle: (*Gateway).listInstances,
			about: "Lists the instances whose tasks are still known, in an order of their own. A page may be short and have a next_cursor all the same.",
			params: []param{{name: "template", in: "query", about: "Of this template.", schema: `{"type": "string"}`},
				{name: "owner", in: "query", about: "Of this owner; instances that all owners share have none.", schema: `{"type": "string", "minLength": 1, "maxLength": 128}`},
				{name: "limit", in: "query", about: "How many at the most; 100 if not given.", schema: `{"type": "integer", "minimum": 1, "maximum": 1000}`},
				{name: "cursor", in: "query", about: "next_cursor of the page before.", schema: `{"type": "string"}`}},
			answers: []reply{{status: 200, about: "One page.", value: schemas.InstanceList{}}}, fails: fails()},
		{method: "PUT", path: "/v1/instances/{template}/{owner}", name: "startInstance", handle: (*Gateway).putInstance,
			about:  "Gives the one instance of the template that the owner has, and makes it if there is none or the one before is over. However many ask at the same time, there is one. While the one before is ending, its end is waited for, 15 s or the timeout. Values and ttl are those of a new instance; they change nothing where there is one. The owner is any text, percent-encoded.",
			params: params(instanceWait), body: schemas.InstanceRequest{}, bodyOptional: true,
			answers: []reply{{status: 200, about: "The instance that there was.", value: schemas.Instance{}},
				{status: 201, about: "The instance, just made.", value: schemas.Instance{}, header: []string{"Location"}}},
			fails: fails(bodyFails, ofOne, unknown, failure{409, []schemas.Code{schemas.CodeEnding, schemas.CodeOwnerLimit}}, failure{503, []schemas.Code{schemas.CodeNoPorts}},
				failure{422, []schemas.Code{schemas.CodeInvalidValue, schemas.CodeNoCapacity, schemas.CodeBlobMissing}}, failure{507, []schemas.Code{schemas.CodeNoSpace}})},
		{method: "GET", path: "/v1/instances/{template}/{owner}", name: "getInstance", handle: (*Gateway).getInstance,
			about: "Shows the owner's instance, or waits for it; also one that is over, as long as its task is known.", params: params(instanceWait),
			answers: []reply{{status: 200, about: "The instance.", value: schemas.Instance{}}}, fails: fails(ofOne, failure{422, []schemas.Code{schemas.CodeInvalidValue}})},
		{method: "PATCH", path: "/v1/instances/{template}/{owner}", name: "renewInstance", handle: (*Gateway).renewInstance,
			about: "Moves the instance's deadline: to its ttl from now (renew), or to another ttl. It never moves back, and never beyond the template's max_ttl; one that does not move is no renewal and costs none.",
			body:  schemas.RenewRequest{},
			answers: []reply{{status: 200, about: "Done: the worker has the new deadline, or none needs to.", value: schemas.Instance{}},
				{status: 202, about: "The record has the new deadline; the worker has not confirmed it yet.", value: schemas.Instance{}}},
			fails: fails(bodyFails, ofOne, unknown, failure{409, []schemas.Code{schemas.CodeStateConflict, schemas.CodeTooLate, schemas.CodeDraining, schemas.CodeRenewals}},
				failure{422, []schemas.Code{schemas.CodeInvalidValue, schemas.CodeNotAllowed}})},
		{method: "DELETE", path: "/v1/instances/{template}/{owner}", name: "endInstance", handle: (*Gateway).endInstance,
			about:   "Ends the owner's instance: TERM to its processes, KILL after the grace. It does not wait for the end; a PUT does. One that all owners share is not ended so.",
			params:  params(param{name: "grace", in: "query", about: "Between TERM and KILL; the template's timeouts.stop if not given.", schema: aDuration}),
			answers: []reply{{status: 200, about: "The instance, over or ending.", value: schemas.Instance{}}},
			fails:   fails(elsewhere, ofOne, unknown, failure{409, []schemas.Code{schemas.CodeShared}}, failure{422, []schemas.Code{schemas.CodeInvalidValue}})},
		{method: "GET", path: "/v1/workers", name: "listWorkers", handle: (*Gateway).listWorkers,
			about: "Lists the workers, by name.", answers: []reply{{status: 200, about: "All of them.", value: schemas.WorkerList{}}}, fails: fails()},
		{method: "GET", path: "/v1/workers/{id}", name: "getWorker", handle: (*Gateway).getWorker,
			about: "Shows a worker.", answers: []reply{{status: 200, about: "The worker.", value: schemas.Worker{}}}, fails: fails(ofOne)},
		{method: "POST", path: "/v1/workers/{id}/drain", name: "drainWorker", handle: (*Gateway).drain,
			about: "Lets a worker take nothing new; its tasks go on to their ends and get no more time. It stays so until undrain.", body: struct{}{},
			answers: []reply{{status: 200, about: "The worker: it is given nothing more from here on.", value: schemas.Worker{}},
				{status: 202, about: "The worker: it is drained, but no leading placer has said so within 2 s, and a task may still be given to it.", value: schemas.Worker{}}}, fails: fails(bodyFails, ofOne, unknown)},
		{method: "POST", path: "/v1/workers/{id}/undrain", name: "undrainWorker", handle: (*Gateway).undrain,
			about: "Lets a drained worker take tasks again.", body: struct{}{},
			answers: []reply{{status: 200, about: "The worker.", value: schemas.Worker{}}}, fails: fails(bodyFails, ofOne, unknown)},
		{method: "GET", path: "/v1/kinds", name: "listKinds", handle: (*Gateway).listKinds,
			about:   "Lists the kinds of tasks that this site has, by name: what a task of each is made from, and the JSON Schema of its payload.",
			answers: []reply{{status: 200, about: "All of them.", value: schemas.KindList{}}}, fails: fails()},
		{method: "GET", path: "/v1/images", name: "listImages", handle: (*Gateway).listImages,
			about:   "Lists the images that workers shall hold before a task asks for them, with how each worker stands to them, and the images that workers have.",
			params:  params(param{name: "worker", in: "query", about: "Of this worker alone.", schema: `{"$ref": "#/components/schemas/WorkerID"}`}),
			answers: []reply{{status: 200, about: "All of them.", value: schemas.ImageList{}}}, fails: fails(ofOne)},
		{method: "POST", path: "/v1/images", name: "wantImage", handle: (*Gateway).wantImage,
			about: "Lets workers hold an image: those that lack it pull it, one image at a time and after what tasks wait for. It takes the place of what was asked for the image before.", body: schemas.WantImage{},
			answers: []reply{{status: 200, about: "The image. The workers have not heard of it yet.", value: schemas.Image{}}},
			fails:   fails(bodyFails, ofState, unknown, failure{422, []schemas.Code{schemas.CodeInvalidValue}})},
		{method: "DELETE", path: "/v1/images", name: "releaseImage", handle: (*Gateway).releaseImage,
			about:   "Ends what was asked for an image. Workers keep it until they need the room.",
			params:  params(param{name: "image", in: "query", required: true, about: "Its name, as it was asked for.", schema: `{"type": "string", "minLength": 1, "maxLength": 512}`}),
			answers: []reply{{status: 200, about: "What was asked for.", value: schemas.Image{}}}, fails: fails(elsewhere, ofOne, unknown)},
		{method: "GET", path: "/v1/ingress/traefik", name: "traefikConfig", handle: (*Gateway).traefik,
			about:   "The dynamic configuration for Traefik's HTTP provider: a router for the hostname of each port of a task that is not over, to the ingresses of this site.",
			answers: []reply{{status: 200, about: "As Traefik reads it.", value: TraefikConfig{}}}, fails: fails()},
		{method: "GET", path: "/openapi.json", name: "openapi", handle: (*Gateway).openapi,
			about: "This document.", answers: []reply{{status: 200, about: "OpenAPI 3.1.", value: map[string]any{}}}, fails: fails()},
		{method: "GET", path: "/docs/", name: "docs", handle: (*Gateway).docs,
			about: "This document for people.", answers: []reply{{status: 200, about: "A page without scripts.", kinds: []string{"text/html"}}}, fails: fails()},
	}
}

var eventAnswers = []reply{{status: 200, about: "The events.", kinds: []string{"text/event-stream", "application/x-ndjson"}},
	{status: 204, about: "There is nothing behind Last-Event-ID, and nothing will come."}}
