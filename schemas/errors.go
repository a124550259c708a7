package schemas

import (
	"fmt"
	"strings"
)

// Code is the stable, machine-readable name of an error of the API. It is an error
// itself, so that errors.Is(err, CodeNotFound) tells an *Error by its code.
type Code string

// Error implements error.
func (c Code) Error() string { return string(c) }

// The codes of the API. They are never renamed or reused.
const (
	CodeInvalidJSON     Code = "invalid_json"        // 400: the body is not one JSON value in UTF-8
	CodeDuplicateField  Code = "duplicate_field"     // 400
	CodeTooLarge        Code = "too_large"           // 413: body above MaxBodyBytes, or spec above MaxSpecBytes
	CodeContentType     Code = "content_type"        // 415: not application/json
	CodeInvalidHeader   Code = "invalid_header"      // 400: a header such as Idempotency-Key
	CodeInvalidQuery    Code = "invalid_query"       // 400: a query parameter
	CodeUnknownField    Code = "unknown_field"       // 422
	CodeInvalidType     Code = "invalid_type"        // 422: right field, wrong JSON type or form
	CodeInvalidValue    Code = "invalid_value"       // 422: right type, value out of its range
	CodeNotAvailable    Code = "not_available"       // 422: a known field whose feature is not there yet
	CodeNotAllowed      Code = "not_allowed"         // 422: the operator's policy forbids it
	CodeNoCapacity      Code = "no_capacity"         // 422: no worker could ever hold it
	CodeKeyReused       Code = "idempotency_reused"  // 422: same key, another body
	CodeKeyExpired      Code = "idempotency_gone"    // 410: the key's task was never made, or is gone
	CodeInProgress      Code = "in_progress"         // 409: the first request with this key still runs
	CodeCrossOrigin     Code = "cross_origin"        // 403: a browser asked for a page of another site
	CodeUnknownHost     Code = "unknown_host"        // 421: the gateway does not answer under the name in Host
	CodeNotFound        Code = "not_found"           // 404
	CodeMethod          Code = "method_not_allowed"  // 405
	CodePrecondition    Code = "precondition_failed" // 412: the task is not at the revision of If-Match
	CodeStateConflict   Code = "state_conflict"      // 409: the task's state forbids it
	CodeTooLate         Code = "too_late"            // 409: less than two seconds of the task's time are left
	CodeDraining        Code = "draining"            // 409: the task's worker is being drained, so it gets no more time
	CodeEnding          Code = "ending"              // 409: the owner's instance before is still ending
	CodeShared          Code = "shared"              // 409: the instance is that of all owners
	CodeOwnerLimit      Code = "owner_limit"         // 409: the owner has as many instances as one may
	CodeInUse           Code = "in_use"              // 409: a task that is not over, or a batch that is not done, names the blob
	CodeRenewals        Code = "no_renewals"         // 409: the instance has had all its renewals
	CodeNoListener      Code = "no_listener"         // 502: nobody listens on that port in the task
	CodeStarting        Code = "starting"            // 503: the task does not run yet
	CodeEnded           Code = "ended"               // 410: the task is over
	CodeBadAnswer       Code = "bad_answer"          // 502: the task broke off, or did not answer as it should
	CodeBadRequest      Code = "bad_request"         // 400, 408: the request to a task could not be read
	CodeWorkerAway      Code = "worker_away"         // 503: the task's worker cannot be reached at the moment
	CodeNoPorts         Code = "no_ports"            // 503: all TCP ports of the site are taken
	CodeBadArchive      Code = "bad_archive"         // 422: the archive cannot be unpacked: its form, a name, a link
	CodeCutOff          Code = "cut_off"             // 400: the body broke off; nothing was changed
	CodePermission      Code = "permission_denied"   // 403: the task's own user may not do that there
	CodeArtifactLost    Code = "artifact_lost"       // 410: what is stored of it is not what its worker reported
	CodeNoSpace         Code = "no_space"            // 507: the task has no room for it, or the store of blobs
	CodeDigestMismatch  Code = "digest_mismatch"     // 422: the body is not what its SHA-256 says
	CodeBlobMissing     Code = "blob_missing"        // 422: a blob that the spec names is not stored
	CodeUnavailable     Code = "unavailable"         // 503: the bus is away; nothing was done
	CodeUnknownOutcome  Code = "unknown_outcome"     // 503: it may have been done; ask again with the same Idempotency-Key
	CodeTooManyRequests Code = "too_many"            // 429
	CodeInternal        Code = "internal"            // 500
)

// FieldError is one thing wrong with one field of a request. Message never
// repeats the value: it may be a secret.
type FieldError struct {
	Field   string `json:"field"`
	Code    Code   `json:"code"`
	Message string `json:"message"`
}

// Error is an error as the API answers it, an RFC 9457 problem. Services return
// it where the client shall see the reason; any other error is a 500.
type Error struct {
	Status     int          `json:"status"`
	Code       Code         `json:"code"`
	Title      string       `json:"title,omitzero"`
	Detail     string       `json:"detail,omitzero"`
	Field      string       `json:"field,omitzero"`
	Errors     []FieldError `json:"errors,omitzero"`
	RequestID  string       `json:"request_id,omitzero"`
	Task       TaskID       `json:"task,omitzero"`
	State      State        `json:"state,omitzero"` // with state_conflict: the task's state
	RetryAfter Duration     `json:"retry_after,omitzero"`
}

// Error implements error.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s", e.Code)
	if e.Field != "" {
		fmt.Fprintf(&b, " (%s)", e.Field)
	}
	if e.Detail != "" {
		fmt.Fprintf(&b, ": %s", e.Detail)
	}
	return b.String()
}

// Is says whether target is the error's code.
func (e *Error) Is(target error) bool {
	c, ok := target.(Code)
	return ok && c == e.Code
}

// InvalidSpec wraps field errors into the one answer that carries them all.
func InvalidSpec(errs []FieldError) *Error {
	if len(errs) == 0 {
		return nil
	}
	first, status := errs[0], 422
	if first.Code == CodeTooLarge {
		status = 413
	}
	return &Error{Status: status, Code: first.Code, Field: first.Field, Detail: first.Message, Errors: errs}
}
