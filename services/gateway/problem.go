package gateway

import (
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"

	"dayfly.dev/schemas"
)

// problem is an error as RFC 9457 has it.
type problem struct {
	Type string `json:"type"`
	schemas.Error
}

// fail answers with a problem. An error that is not meant for clients becomes a 500
// and goes to the log; it must not hold what a client sent.
func (g *Gateway) fail(w *response, r *http.Request, err error) {
	var e *schemas.Error
	if !errors.As(err, &e) {
		g.log.Error().Err(err).Str("route", w.route).Str("request", w.id).Msg("request failed")
		e = &schemas.Error{Status: http.StatusInternalServerError, Code: schemas.CodeInternal, Detail: "something went wrong on our side; the request id finds it in the log"}
	}
	if w.wrote {
		panic(http.ErrAbortHandler) // the client shall see that the answer is not whole
	}
	if e.Code == schemas.CodeUnknownOutcome {
		g.log.Warn().Str("task", string(e.Task)).Str("request", w.id).Msg("outcome unknown")
	}
	p := problem{Type: "urn:dayfly:problem:" + string(e.Code), Error: *e}
	p.Title, p.RequestID = http.StatusText(e.Status), w.id
	h := w.Header()
	for _, name := range []string{"ETag", "Location", "Idempotency-Replayed"} {
		h.Del(name)
	}
	h.Set("Content-Type", "application/problem+json")
	if e.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(e.RetryAfter.Std().Seconds()))))
	}
	body, err := schemas.Encode(p)
	if err != nil {
		g.log.Error().Err(err).Str("request", w.id).Msg("encode problem")
		body = []byte(`{"status":500,"code":"internal"}`)
	}
	w.send(e.Status, body)
}

// answer sends a value as JSON.
func answer(w *response, status int, v any) error {
	body, err := schemas.Encode(v)
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.send(status, body)
	return nil
}

func (w *response) send(status int, body []byte) {
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

func badQuery(field, detail string) *schemas.Error {
	return &schemas.Error{Status: http.StatusBadRequest, Code: schemas.CodeInvalidQuery, Field: field, Detail: detail}
}

func badHeader(field, detail string) *schemas.Error {
	return &schemas.Error{Status: http.StatusBadRequest, Code: schemas.CodeInvalidHeader, Field: field, Detail: detail}
}

func noPath() *schemas.Error {
	return &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Detail: "there is nothing at this path; the API is below /v1/"}
}
