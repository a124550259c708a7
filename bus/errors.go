package bus

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Facts that callers act on.
var (
	// ErrNotFound: there is no such key, or it was deleted or has expired.
	ErrNotFound = errors.New("not found")
	// ErrConflict: the record is no longer at the revision that the write expected.
	ErrConflict = errors.New("changed by someone else")
	// ErrUnavailable: surely not done; the server was not reached or did not take it.
	ErrUnavailable = errors.New("bus unavailable")
	// ErrUnknownOutcome: it was sent, and whether it was done is not known.
	ErrUnknownOutcome = errors.New("outcome unknown")
	// ErrFull: the stream, or the server, takes no more.
	ErrFull = errors.New("no room left")
)

// Codes of the JetStream API.
const (
	codeWrongLastSequence = 10071
	codeSpuriousConflict  = 10164 // also comes to a sole writer with the right revision
	codeNoMessageFound    = 10037
	codeNoPeers           = 10005
	codeNotLeader         = 10009
	codeNoResources       = 10023 // "insufficient resources"
	codeNoStorage         = 10047 // "insufficient storage resources available"
	codeStoreFailed       = 10077 // such as "no space left on device", or the limit of the stream
)

// sendError maps what came of handing a message to the client library.
func sendError(err error) error {
	switch {
	case errors.Is(err, nats.ErrReconnectBufExceeded), errors.Is(err, nats.ErrConnectionClosed),
		errors.Is(err, nats.ErrConnectionReconnecting), errors.Is(err, nats.ErrConnectionDraining),
		errors.Is(err, nats.ErrDisconnected):
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	case errors.Is(err, nats.ErrMaxPayload), errors.Is(err, nats.ErrBadSubject), errors.Is(err, nats.ErrHeadersNotSupported):
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
}

// apiError maps an error that the JetStream API answered.
func apiError(e *jetstream.APIError) error {
	switch {
	case e.ErrorCode == codeWrongLastSequence, e.ErrorCode == codeSpuriousConflict:
		return fmt.Errorf("%w: %w", ErrConflict, e)
	case e.ErrorCode == codeNoMessageFound, e.Code == 404:
		return fmt.Errorf("%w: %w", ErrNotFound, e)
	case e.ErrorCode == codeNoStorage, e.ErrorCode == codeNoResources,
		e.ErrorCode == codeStoreFailed && (strings.Contains(e.Description, "maximum bytes") || strings.Contains(e.Description, "maximum messages") || strings.Contains(e.Description, "no space left")):
		return fmt.Errorf("%w: %w: %w", ErrUnavailable, ErrFull, e)
	case e.Code == 503:
		return fmt.Errorf("%w: %w", ErrUnavailable, e)
	}
	return e
}

// transient tells whether asking again later may help.
func transient(err error) bool {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return api.Code == 503
	}
	return errors.Is(err, ErrUnavailable) || errors.Is(err, ErrUnknownOutcome) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout) ||
		errors.Is(err, nats.ErrNoResponders) || errors.Is(err, jetstream.ErrJetStreamNotEnabled) ||
		errors.Is(err, nats.ErrConnectionReconnecting) || errors.Is(err, nats.ErrReconnectBufExceeded) ||
		errors.Is(err, nats.ErrDisconnected)
}
