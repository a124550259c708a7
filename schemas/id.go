package schemas

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
)

// TaskID names a task: "t-" and a lower-case ULID. It is a valid KV key, NATS
// token, DNS label and container name, and ids sort by the time of their making.
type TaskID string

// WorkerID names a Docker host with an agent: 1 to 63 of a-z, 0-9 and "-".
type WorkerID string

// Epoch is an id for one registration of a worker. A worker that was declared lost,
// or whose host rebooted, comes back under a new one, which sorts after it.
type Epoch string

// NewEpoch makes the epoch that follows former ("" if there is none) from the time
// and some random text.
func NewEpoch(former Epoch, now time.Time, random string) Epoch {
	n := now.UnixMilli()
	var last int64
	if _, err := fmt.Sscanf(string(former), "e%013d-", &last); err == nil {
		n = max(n, last+1) // a clock that was set back must not set an epoch back
	}
	return Epoch(fmt.Sprintf("e%013d-%.8s", n, strings.ToLower(random)))
}

// Before says whether e is surely over, since the same worker has registered under
// other.
func (e Epoch) Before(other Epoch) bool { return e < other }

// Valid says whether e can be one: 1 to 64 of a-z, 0-9 and "-". It is a worker's word.
func (e Epoch) Valid() bool {
	return len(e) >= 1 && len(e) <= maxWordBytes && strings.Trim(string(e), "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// Assignment is what names one container: this try at this task, on this
// registration of this worker.
type Assignment struct {
	Task    TaskID   `json:"task"`
	Attempt int      `json:"attempt"`
	Worker  WorkerID `json:"worker"`
	Epoch   Epoch    `json:"epoch"`
}

// String gives the assignment as it stands in logs and error messages.
func (a Assignment) String() string {
	return fmt.Sprintf("%s/%d on %s(%s)", a.Task, a.Attempt, a.Worker, a.Epoch)
}

// ErrBadID is wrapped by the Parse functions of ids.
var ErrBadID = errors.New("not a valid id")

// NewTaskID makes an id from the time and 10 bytes of entropy.
func NewTaskID(now time.Time, entropy io.Reader) (TaskID, error) {
	id, err := ulid.New(ulid.Timestamp(now), entropy)
	if err != nil {
		return "", fmt.Errorf("make task id: %w", err)
	}
	return TaskID("t-" + strings.ToLower(id.String())), nil
}

// NewTaskIDAfter makes an id that is greater than before, which may be of a machine whose
// clock is ahead.
func NewTaskIDAfter(before TaskID, now time.Time, entropy io.Reader) (TaskID, error) {
	if former, err := ulid.ParseStrict(strings.ToUpper(strings.TrimPrefix(string(before), "t-"))); err == nil {
		if next := ulid.Time(former.Time() + 1); next.After(now) {
			now = next
		}
	}
	return NewTaskID(now, entropy)
}

// FirstTaskID is the least id that may be made at t: ids of later tasks are greater.
func FirstTaskID(t time.Time) TaskID {
	var id ulid.ULID
	_ = id.SetTime(uint64(max(0, min(t.UnixMilli(), int64(ulid.MaxTime())))))
	return TaskID("t-" + strings.ToLower(id.String()))
}

const ulidAlphabet = "0123456789abcdefghjkmnpqrstvwxyz" // Crockford's base 32

// ParseTaskID checks s, which comes from outside. The error never repeats s.
func ParseTaskID(s string) (TaskID, error) {
	rest, ok := strings.CutPrefix(s, "t-")
	if !ok || len(rest) != ulid.EncodedSize || rest[0] > '7' || strings.Trim(rest, ulidAlphabet) != "" {
		return "", fmt.Errorf("task id: %w", ErrBadID)
	}
	return TaskID(s), nil
}

// ParseWorkerID checks s, which comes from outside. The error never repeats s.
func ParseWorkerID(s string) (WorkerID, error) {
	if len(s) == 0 || len(s) > 63 || strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return "", fmt.Errorf("worker id: %w (1 to 63 of a-z, 0-9, -)", ErrBadID)
	}
	return WorkerID(s), nil
}
