package clienttest

import (
	"crypto/rand"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// batch is a batch all of whose items became tasks when it was accepted.
type batch struct {
	record   schemas.Batch
	revision uint64
	key      string // its Idempotency-Key
	sum      string // fingerprint of the request
}

// settle folds in what has become of the tasks; the server's mu is held.
func (s *Server) settle(b *batch) {
	results := make([]byte, b.record.Items)
	for i := range results {
		results[i] = schemas.ItemLetter(s.live(b.record.ID)(i))
	}
	next, err := b.record.Next(schemas.BatchStep{Meta: meta("gateway"), Begun: b.record.Items, Made: b.record.Items, Results: results})
	if err == nil && next.Results != b.record.Results {
		s.putBatch(b, next)
	}
}

// putBatch makes v the newest revision; mu is held.
func (s *Server) putBatch(b *batch, v schemas.Batch) {
	s.revision++
	b.record, b.revision = v, s.revision
}

func (s *Server) live(id schemas.BatchID) func(int) schemas.State {
	return func(i int) schemas.State { return s.tasks[id.Task(i)].record.State }
}

func (s *Server) batchView(b *batch) schemas.BatchStatus {
	s.settle(b)
	return b.record.View(b.revision, s.live(b.record.ID))
}

func (s *Server) createBatch(w http.ResponseWriter, r *http.Request) {
	var items [][]byte
	req, err := schemas.ReadBatch(http.MaxBytesReader(w, r.Body, schemas.MaxBatchBytes), func(_ int, raw []byte) error {
		items = append(items, raw)
		return nil
	})
	if err != nil {
		fail(w, err)
		return
	}
	specs := make([]schemas.Spec, len(items))
	for i, raw := range items {
		spec, err := req.ParseItem(raw, schemas.DefaultPolicy())
		if e, ok := err.(*schemas.Error); ok {
			at := "items." + strconv.Itoa(i) + "." + e.Field
			if strings.HasPrefix(e.Field, "template") {
				at = e.Field
			}
			Fail(w, schemas.Error{Status: e.Status, Code: e.Code, Field: at, Detail: e.Detail,
				Errors: []schemas.FieldError{{Field: at, Code: e.Code, Message: e.Detail}}})
			return
		}
		specs[i] = spec
	}
	key := r.Header.Get("Idempotency-Key")
	var made *batch
	var id schemas.BatchID
	known := false
	s.change(func() {
		for _, b := range s.batches {
			if known = key != "" && b.key == key; known {
				made, id = b, b.record.ID
				return
			}
		}
		id, _ = schemas.NewBatchID(time.Now(), rand.Reader)
		made = &batch{key: key, sum: req.Fingerprint}
		s.putBatch(made, schemas.NewBatch(id, req, "upload", []int{0}, meta("gateway")))
		s.batches[id] = made
		for i, spec := range specs {
			rec := schemas.NewRecord(id.Task(i), spec, schemas.DefaultPolicy(), meta("gateway"))
			rec.Batch = id
			s.add(rec)
		}
	})
	switch {
	case known && made.sum != req.Fingerprint:
		Fail(w, schemas.Error{Status: 422, Code: schemas.CodeKeyReused, Field: "Idempotency-Key", Detail: "this key came before with another batch"})
		return
	case !known:
		for i := range specs {
			go s.act(id.Task(i))
		}
	}
	w.Header().Set("Location", "/v1/batches/"+string(id))
	s.answerBatch(w, made, http.StatusCreated)
}

func (s *Server) answerBatch(w http.ResponseWriter, b *batch, status int) {
	s.mu.Lock()
	v := s.batchView(b)
	s.mu.Unlock()
	write(w, status, v)
}

// knownBatch gives the path's batch, or answers that there is none.
func (s *Server) knownBatch(w http.ResponseWriter, r *http.Request) *batch {
	s.mu.Lock()
	b := s.batches[schemas.BatchID(r.PathValue("id"))]
	s.mu.Unlock()
	if b == nil {
		Fail(w, schemas.Error{Status: 404, Code: schemas.CodeNotFound, Detail: "there is no such batch"})
	}
	return b
}

func (s *Server) getBatch(w http.ResponseWriter, r *http.Request) {
	if b := s.knownBatch(w, r); b != nil {
		s.answerBatch(w, b, http.StatusOK)
	}
}

// Batches gives all batches, newest first.
func (s *Server) Batches() []schemas.BatchStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := []schemas.BatchStatus{}
	ids := slices.Sorted(maps.Keys(s.batches))
	for _, id := range slices.Backward(ids) {
		list = append(list, s.batchView(s.batches[id]))
	}
	return list
}

func (s *Server) listBatches(w http.ResponseWriter, r *http.Request) {
	limit, cursor := limitOf(r), schemas.BatchID(r.URL.Query().Get("cursor"))
	l := schemas.BatchList{Items: []schemas.BatchStatus{}}
	for _, b := range s.Batches() {
		if cursor != "" && b.ID >= cursor {
			continue
		}
		if len(l.Items) == limit {
			l.NextCursor = string(l.Items[limit-1].ID)
			break
		}
		b.Callback = nil
		l.Items = append(l.Items, b)
	}
	write(w, http.StatusOK, l)
}

func (s *Server) batchItems(w http.ResponseWriter, r *http.Request) {
	b := s.knownBatch(w, r)
	if b == nil {
		return
	}
	first, _ := strconv.Atoi(r.URL.Query().Get("cursor"))
	page := schemas.BatchItemList{Items: []schemas.BatchItem{}}
	s.mu.Lock()
	end := min(b.record.Items, first+limitOf(r))
	for i := first; i < end; i++ {
		rec := s.tasks[b.record.ID.Task(i)].view()
		page.Items = append(page.Items, schemas.BatchItem{Index: i, Name: rec.Spec.Labels[schemas.ItemLabel], Task: rec.ID,
			State: rec.State, Reason: rec.Reason, Exit: rec.Exit})
	}
	s.mu.Unlock()
	if end < b.record.Items {
		page.NextCursor = strconv.Itoa(end)
	}
	write(w, http.StatusOK, page)
}

func (s *Server) cancelBatch(w http.ResponseWriter, r *http.Request) {
	b := s.knownBatch(w, r)
	if b == nil {
		return
	}
	s.change(func() {
		s.settle(b)
		if v, err := b.record.AskCancel(meta("client")); err == nil {
			s.putBatch(b, v)
			for i := range v.Items {
				_ = s.tasks[v.ID.Task(i)].next(schemas.AskCancel{Meta: meta("gateway")}) // those that have ended stay as they are
			}
		}
	})
	s.answerBatch(w, b, http.StatusOK)
}

// limitOf is how many a page shows.
func limitOf(r *http.Request) int {
	if n, err := strconv.Atoi(r.URL.Query().Get("limit")); err == nil {
		return n
	}
	return 100
}
