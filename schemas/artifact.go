package schemas

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// The artifacts of an attempt stand on the bus as one run of bytes, cut into chunks: the
// files one after the other, and behind them the list of all as JSON lines, each an
// ArtifactLine. The record has the list's place and SHA-256, the list those of the files:
// so nothing that a worker writes later is taken for what it reported.

// Bounds of the artifacts of one attempt.
const (
	// ArtifactChunk is how long each chunk is but the last. It never changes: it says which
	// chunk a byte is in.
	ArtifactChunk = 256 << 10

	// MaxArtifactChunks is how many chunks there may be of all tasks together: servers and
	// reapers keep the name of each in memory, and a worker may make small ones.
	MaxArtifactChunks = 1_000_000

	MaxArtifacts       = 10_000
	MaxArtifactBytes   = 1 << 30 // of all together
	MaxArtifactName    = 1024    // bytes of a path
	MaxArtifactDepth   = 64      // folders above a file
	MaxArtifactList    = 16 << 20
	MaxArtifactSkipped = 1000 // that the list names
	MaxInlineArtifacts = 16   // that the record has
	maxInlineBytes     = 4 << 10
)

// StreamArtifacts holds the chunks.
const StreamArtifacts = "ARTIFACTS"

// ArtifactSubjects begins the subjects of chunks; a worker follows.
const ArtifactSubjects = "dayfly.artifacts."

// ArtifactRun is the subject below which the chunks of an attempt are, by their numbers.
func ArtifactRun(w WorkerID, t TaskID, attempt int) string {
	return fmt.Sprintf("%s%s.%s.%d", ArtifactSubjects, w, t, attempt)
}

// ArtifactSubject is that of a chunk, counted from 0.
func ArtifactSubject(w WorkerID, t TaskID, attempt int, chunk int64) string {
	return fmt.Sprintf("%s.%d", ArtifactRun(w, t, attempt), chunk)
}

// ArtifactFilter is that of all chunks of an attempt. A wildcard token is passed as "*".
func ArtifactFilter(w WorkerID, t TaskID, attempt string) string {
	return fmt.Sprintf("%s%s.%s.%s.*", ArtifactSubjects, w, t, attempt)
}

// ParseArtifactSubject gives whose chunk it is. What is no such subject is not ok: a worker
// can put anything in place of all but its name, also what a filter takes for a wildcard.
func ParseArtifactSubject(subject string) (w WorkerID, t TaskID, attempt int, ok bool) {
	rest, ok := strings.CutPrefix(subject, ArtifactSubjects)
	parts := strings.Split(rest, ".")
	if !ok || len(parts) != 4 {
		return "", "", 0, false
	}
	w, err := ParseWorkerID(parts[0])
	t, err2 := ParseTaskID(parts[1])
	attempt, err3 := strconv.Atoi(parts[2])
	chunk, err4 := strconv.ParseInt(parts[3], 10, 64)
	if err != nil || err2 != nil || err3 != nil || err4 != nil || attempt < 1 || chunk < 0 || subject != ArtifactSubject(w, t, attempt, chunk) {
		return "", "", 0, false
	}
	return w, t, attempt, true
}

// Artifact is a file that a task left in its output folder.
type Artifact struct {
	Name   string `json:"name"` // its path in the folder, with slashes
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // in hexadecimal

	Unknown Unknown `json:",embed"`
}

// ArtifactSum says how much a task left, and whether all of it is kept.
type ArtifactSum struct {
	Count     int    `json:"count"`
	Bytes     int64  `json:"bytes"`
	Skipped   int    `json:"skipped,omitzero"` // what was there and is no artifact: links, devices, and what a limit left out
	Truncated bool   `json:"truncated"`        // files were left out
	Why       string `json:"why,omitzero"`     // the first reason for that

	Stored     int64  `json:"stored_bytes,omitzero"` // before the list
	ListBytes  int64  `json:"list_bytes,omitzero"`
	ListSHA256 string `json:"list_sha256,omitzero"`

	Unknown Unknown `json:",embed"`
}

// Why the artifacts of a task are not complete.
const (
	ArtifactsLimit      = "limit"       // together they were longer than they may be
	ArtifactsCount      = "count"       // they were more than may be
	ArtifactsDepth      = "depth"       // some were below too many folders
	ArtifactsName       = "name"        // some had a name that no archive or address can carry
	ArtifactsUnreadable = "unreadable"  // some could not be read
	ArtifactsTimeout    = "timeout"     // they could not be stored in time
	ArtifactsStoreFull  = "store_full"  // the store takes no more
	ArtifactsWorkerLost = "worker_lost" // they went with their worker
	ArtifactsGone       = "gone"        // the container was gone before they were taken
)

// ArtifactLine is a line of the stored list: a file, or with Skipped what is none.
type ArtifactLine struct {
	Name   string `json:"name"`
	Offset int64  `json:"offset,omitzero"` // in the run of bytes
	Size   int64  `json:"size,omitzero"`
	SHA256 string `json:"sha256,omitzero"`

	Skipped string `json:"skipped,omitzero"` // why
}

// ArtifactSkipped is one thing in the output folder that is no artifact. A name with
// bytes that are no text is quoted as in Go.
type ArtifactSkipped struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// ArtifactList is the answer of GET /v1/tasks/{id}/artifacts, by name.
type ArtifactList struct {
	Task    TaskID            `json:"task"`
	Items   []Artifact        `json:"items"`
	Skipped []ArtifactSkipped `json:"skipped,omitzero"` // the first of them
	Sum     ArtifactSum       `json:"sum"`
}

// ArtifactName says whether a name may be that of an artifact: a plain relative path of
// printable text, which leads nowhere but down.
func ArtifactName(name string) bool {
	if name == "" || len(name) > MaxArtifactName || !utf8.ValidString(name) || strings.ContainsFunc(name, func(r rune) bool { return unicode.IsControl(r) || r == utf8.RuneError }) {
		return false
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." {
			return false
		}
	}
	return true
}

// tidy gives the worker's word as far as it can be true; what cannot be is no sum of any use.
func (s *ArtifactSum) tidy() *ArtifactSum {
	if s == nil {
		return nil
	}
	ok := s.Count >= 0 && s.Count <= MaxArtifacts && s.Bytes >= 0 && s.Bytes <= MaxArtifactBytes && s.Skipped >= 0 &&
		s.Stored >= s.Bytes && s.Stored <= 2*MaxArtifactBytes && s.ListBytes >= 0 && s.ListBytes <= MaxArtifactList
	if ok && s.ListBytes > 0 {
		ok = isSHA256(s.ListSHA256)
	} else if ok {
		ok = s.Count == 0 && s.ListSHA256 == ""
	}
	if !ok {
		return &ArtifactSum{Truncated: true, Why: ArtifactsUnreadable}
	}
	n := *s
	n.Why, n.Unknown = line(n.Why, maxWordBytes), n.Unknown.few()
	return &n
}

// public is the sum without what only the reader of the list needs.
func (s *ArtifactSum) public() *ArtifactSum {
	if s == nil {
		return nil
	}
	n := *s
	n.Stored, n.ListBytes, n.ListSHA256 = 0, 0, ""
	return &n
}

// inlineArtifacts are those of a worker's list that a record takes.
func inlineArtifacts(list []Artifact, s *ArtifactSum) (out []Artifact) {
	if s == nil {
		return nil
	}
	bytes := 0
	for _, a := range list {
		if bytes += len(a.Name) + 128; len(out) == min(MaxInlineArtifacts, s.Count) || bytes > maxInlineBytes {
			break
		}
		if !ArtifactName(a.Name) || a.Size < 0 || a.Size > s.Bytes || !isSHA256(a.SHA256) {
			break
		}
		out = append(out, Artifact{Name: a.Name, Size: a.Size, SHA256: a.SHA256})
	}
	return out
}

func isSHA256(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// Check says whether a line of the list can be true of the sum.
func (l ArtifactLine) Check(s ArtifactSum) bool {
	if l.Skipped != "" {
		return len(l.Name) <= 4*MaxArtifactName
	}
	return ArtifactName(l.Name) && isSHA256(l.SHA256) && l.Size >= 0 && l.Offset >= 0 && l.Offset <= s.Stored && l.Size <= s.Stored-l.Offset
}
