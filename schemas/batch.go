package schemas

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/oklog/ulid/v2"
)

// BatchID names a batch: "b-" and a lower-case ULID that ends in three zeros. The items
// of a batch become the tasks whose ids have their index there instead, so that who
// makes a task twice makes the same one.
type BatchID string

const batchDigits = 3 // of base 32, so up to 32,768 items

// NewBatchID makes an id from the time and 10 bytes of entropy.
func NewBatchID(now time.Time, entropy io.Reader) (BatchID, error) {
	id, err := NewTaskID(now, entropy)
	if err != nil {
		return "", err
	}
	b, _ := BatchOf(id)
	return b, nil
}

// ParseBatchID checks s, which comes from outside. The error never repeats s.
func ParseBatchID(s string) (BatchID, error) {
	rest, ok := strings.CutPrefix(s, "b-")
	if _, err := ParseTaskID("t-" + rest); !ok || err != nil || !strings.HasSuffix(rest, "000") {
		return "", fmt.Errorf("batch id: %w", ErrBadID)
	}
	return BatchID(s), nil
}

// Task is the id of the task of an item.
func (b BatchID) Task(index int) TaskID {
	digits := [batchDigits]byte{ulidAlphabet[index>>10&31], ulidAlphabet[index>>5&31], ulidAlphabet[index&31]}
	return TaskID("t-" + string(b[2:2+ulid.EncodedSize-batchDigits]) + string(digits[:]))
}

// BatchOf gives the batch and the index that a well-formed task id would have: whether
// there is such a batch is another question.
func BatchOf(id TaskID) (BatchID, int) {
	cut := len(id) - batchDigits
	index := 0
	for _, c := range []byte(id[cut:]) {
		index = index<<5 | strings.IndexByte(ulidAlphabet, c)
	}
	return BatchID("b-" + string(id[2:cut]) + "000"), index
}

// Limits of a batch.
const (
	MaxBatchItems = 10_000
	MaxBatchBytes = 32 << 20 // of its body
	MaxItemBytes  = 64 << 10 // of one item, and of the template, as they were sent
	BatchAge      = 7 * 24 * time.Hour
)

// Batch is the truth about one batch, the value of its key in the bucket "batches". It
// changes by compare-and-set through Next and AskCancel. The items themselves lie in the
// bucket "batch-items" until each has become a task.
type Batch struct {
	Version    int               `json:"v"`
	ID         BatchID           `json:"id"`
	AcceptedAt time.Time         `json:"accepted_at"`
	Items      int               `json:"items"`
	Labels     map[string]string `json:"labels,omitzero"`
	Callback   *Callback         `json:"callback,omitzero"`

	// Blobs are those that its items name: they stay while it is not done.
	Blobs []BlobID `json:"blobs,omitzero"`

	Upload string `json:"upload"` // its part n is the key "<upload>.<n>", its template "<upload>.template"
	Parts  []int  `json:"parts"`  // index of the first item of each part

	// Items below Made have become tasks; those from Begun on have surely not. Begun is
	// written before the tasks are made.
	Begun int `json:"begun"`
	Made  int `json:"made"`
	// Results has a letter for each item, once its task is final: it outlives the task's
	// record.
	Results string `json:"results"`

	Cancel  *CancelMark `json:"cancel,omitzero"`
	DoneAt  time.Time   `json:"done_at,omitzero"`
	LastOps []string    `json:"last_ops,omitzero"`

	Unknown Unknown `json:",embed"`
}

// States of items that have no record.
const (
	ItemPending State = "pending" // not a task yet
	ItemGone    State = "gone"    // its record went before anybody looked at it
)

// The letters of Results, and what they say.
const (
	itemOpen    = '.'
	itemLetters = "cfxeg"
)

var itemStates = [len(itemLetters)]State{Completed, Failed, Canceled, Expired, ItemGone}

// ItemResults lists the states in which items end.
func ItemResults() []State { return slices.Clone(itemStates[:]) }

// ItemLetter is how a result stands in Results; a dot for one that is none.
func ItemLetter(s State) byte {
	if i := slices.Index(itemStates[:], s); i >= 0 {
		return itemLetters[i]
	}
	return itemOpen
}

// ItemDone says whether a letter is a result.
func ItemDone(letter byte) bool { return strings.IndexByte(itemLetters, letter) >= 0 }

// NewBatch is the record of a batch that was just accepted.
func NewBatch(id BatchID, r BatchRequest, upload string, parts []int, m Meta) Batch {
	m = m.tidy()
	return Batch{
		Version: 1, ID: id, AcceptedAt: m.At, Items: r.Items, Labels: r.Labels, Callback: r.Callback,
		Upload: upload, Parts: parts, Results: strings.Repeat(string(itemOpen), r.Items), LastOps: []string{m.Op},
	}
}

// Done says whether every item has its result.
func (b Batch) Done() bool { return !b.DoneAt.IsZero() }

// Wrote says whether the record carries the write op.
func (b Batch) Wrote(op string) bool { return op != "" && slices.Contains(b.LastOps, op) }

// BatchStep is what a gateway that works on a batch has done and seen.
type BatchStep struct {
	Meta
	Begun, Made int
	Results     []byte
}

// Next joins a step into the batch. Nothing in it goes back, and once it is canceled no
// further item begins. The step that brings the last result makes it done.
func (b Batch) Next(s BatchStep) (Batch, error) {
	if b.Done() {
		return b, ErrFinal
	}
	results := []byte(b.Results)
	for i := range min(len(results), len(s.Results)) {
		if results[i] == itemOpen {
			results[i] = s.Results[i]
		}
	}
	b.Made = max(b.Made, min(s.Made, b.Items))
	if b.Cancel == nil {
		b.Begun = max(b.Begun, min(s.Begun, b.Items))
	}
	b.Made = min(b.Made, b.Begun)
	if b.Cancel != nil {
		for i := b.Begun; i < b.Items; i++ {
			results[i] = ItemLetter(Canceled)
		}
	}
	b.Results = string(results)
	if !strings.ContainsRune(b.Results, itemOpen) {
		b.DoneAt = s.tidy().At
	}
	return b.wrote(s.Meta), nil
}

// AskCancel marks that no further item shall begin and those that have shall end.
func (b Batch) AskCancel(m Meta) (Batch, error) {
	switch {
	case b.Done():
		return b, ErrFinal
	case b.Cancel != nil:
		return b, ErrUnchanged
	}
	m = m.tidy()
	b.Cancel = &CancelMark{At: m.At, By: m.By}
	return b.wrote(m), nil
}

func (b Batch) wrote(m Meta) Batch {
	ops := append(slices.Clone(b.LastOps), m.tidy().Op)
	b.LastOps = ops[max(0, len(ops)-MaxLastOps):]
	return b
}

// Part says in which part an item lies, and which items that has.
func (b Batch) Part(index int) (part, first, end int) {
	part, found := slices.BinarySearch(b.Parts, index)
	if !found {
		part--
	}
	end = b.Items
	if part+1 < len(b.Parts) {
		end = b.Parts[part+1]
	}
	return part, b.Parts[part], end
}

// Headers go with the record on the bus.
func (b Batch) Headers() map[string][]string {
	if b.Done() && b.Callback != nil {
		return map[string][]string{HeaderCallback: b.Callback.header(b.DoneAt)}
	}
	if !b.Done() && len(b.Blobs) > 0 {
		return map[string][]string{HeaderBlobs: {joinBlobs(b.Blobs)}}
	}
	return nil
}

// BatchState says how far a batch is.
type BatchState string

// The states of a batch. The last one stays.
const (
	BatchRunning   BatchState = "running"
	BatchCanceling BatchState = "canceling" // no item begins any more, and those that have are to end
	BatchDone      BatchState = "done"      // every item has its result
)

// BatchStatus is a batch as the API shows it.
type BatchStatus struct {
	ID         BatchID           `json:"id"`
	State      BatchState        `json:"state"`
	Items      int               `json:"items"`
	Counts     map[State]int     `json:"counts"` // of items, by state; those that are none are left out
	Labels     map[string]string `json:"labels,omitzero"`
	AcceptedAt time.Time         `json:"accepted_at"`
	CanceledAt time.Time         `json:"canceled_at,omitzero"`
	DoneAt     time.Time         `json:"done_at,omitzero"`
	Callback   *CallbackStatus   `json:"callback,omitzero"`
	Revision   uint64            `json:"revision"`
}

// View is the batch as the API shows it. live gives the state of an item that has no
// result yet.
func (b Batch) View(revision uint64, live func(index int) State) BatchStatus {
	v := BatchStatus{
		ID: b.ID, State: BatchRunning, Items: b.Items, Counts: map[State]int{}, Labels: b.Labels,
		AcceptedAt: b.AcceptedAt, DoneAt: b.DoneAt, Revision: revision,
	}
	for i := range b.Items {
		v.Counts[b.Item(i, live)]++
	}
	if b.Cancel != nil {
		v.State, v.CanceledAt = BatchCanceling, b.Cancel.At
	}
	if b.Done() {
		v.State = BatchDone
	}
	if b.Callback != nil {
		v.Callback = &CallbackStatus{URL: b.Callback.URL}
	}
	return v
}

// Item is the state of an item; live is that of View.
func (b Batch) Item(index int, live func(index int) State) State {
	if i := strings.IndexByte(itemLetters, b.Results[index]); i >= 0 {
		return itemStates[i]
	}
	if index >= b.Begun || live == nil {
		return ItemPending
	}
	return live(index)
}

// BatchList is a page of batches, newest first.
type BatchList struct {
	Items      []BatchStatus `json:"items"`
	NextCursor string        `json:"next_cursor,omitzero"`
}

// BatchItem is an item of a batch as the API shows it.
type BatchItem struct {
	Index  int    `json:"index"`
	Name   string `json:"name,omitzero"`
	Task   TaskID `json:"task"`
	State  State  `json:"state"`
	Reason Reason `json:"reason,omitzero"`
	Exit   *Exit  `json:"exit,omitzero"`
}

// BatchItemList is a page of items, by index.
type BatchItemList struct {
	Items      []BatchItem `json:"items"`
	NextCursor string      `json:"next_cursor,omitzero"`
}

// BatchPart is some items of a batch as they are stored: what they differ in from the
// template.
type BatchPart []jsontext.Value
