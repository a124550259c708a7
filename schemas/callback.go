package schemas

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Callback is where the end of a task, or of a batch, is announced: by a POST of what
// the API shows of it, at least once.
type Callback struct {
	URL    string `json:"url"`
	Secret string `json:"secret,omitzero"` // signs what is sent; never shown again

	Unknown Unknown `json:",embed"`
}

// Limits of a callback.
const (
	MaxCallbackURL    = 2048
	MinCallbackSecret = 16
	MaxCallbackSecret = 256
)

// check looks at the form only: which addresses may be reached is decided when the
// connection is made.
func (b *Callback) check(c *checker, field string) {
	if b == nil {
		return
	}
	u, err := url.Parse(b.URL)
	ok := err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != "" && u.Opaque == ""
	ok = ok && len(b.URL) <= MaxCallbackURL && !strings.ContainsFunc(b.URL, func(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) })
	if ok && u.Port() != "" {
		port, err := strconv.ParseUint(u.Port(), 10, 16)
		ok = err == nil && port > 0
	}
	c.value(ok, field+".url", "must be an http or https URL of at most %d bytes", MaxCallbackURL)
	c.value(!ok || u.User == nil && u.Fragment == "", field+".url", "must have no user, password or fragment; the signature tells who sends it")
	c.value(b.Secret == "" || len(b.Secret) >= MinCallbackSecret && len(b.Secret) <= MaxCallbackSecret, field+".secret",
		"must be %d to %d bytes", MinCallbackSecret, MaxCallbackSecret)
}

// public is the callback as it may be shown.
func (b *Callback) public() *Callback {
	if b == nil || b.Secret == "" {
		return b
	}
	return &Callback{URL: b.URL}
}

// header is what views keep of a callback that is due: since when, and to which host.
func (b *Callback) header(at time.Time) []string {
	host := ""
	if u, err := url.Parse(b.URL); err == nil {
		host = u.Host
	}
	return []string{strconv.FormatInt(at.Unix(), 10) + " " + host}
}

// ParseCallbackHeader reads a HeaderCallback. ok is false where there is none.
func ParseCallbackHeader(h string) (since time.Time, host string, ok bool) {
	at, host, ok := strings.Cut(h, " ")
	n, err := strconv.ParseInt(at, 10, 64)
	if !ok || err != nil {
		return time.Time{}, "", false
	}
	return time.Unix(n, 0), host, true
}

// Headers of a callback's request.
const (
	CallbackSignature = "Dayfly-Signature" // "t=<unix>,v1=<hex of Sign>", if there is a secret
	CallbackTask      = "Dayfly-Task"
	CallbackBatch     = "Dayfly-Batch"
	CallbackAttempt   = "Dayfly-Attempt"  // of the task
	CallbackDelivery  = "Dayfly-Delivery" // the same whenever this callback is sent again
)

// Signature is the value of CallbackSignature: the HMAC-SHA256 of "<unix>.<body>".
func (b *Callback) Signature(at time.Time, body []byte) string {
	mac := hmac.New(sha256.New, []byte(b.Secret))
	fmt.Fprintf(mac, "%d.", at.Unix())
	mac.Write(body)
	return fmt.Sprintf("t=%d,v1=%s", at.Unix(), hex.EncodeToString(mac.Sum(nil)))
}

// DeliveryState is how far a callback has come.
type DeliveryState string

// The states of a delivery. All but the first are the last.
const (
	DeliveryPending   DeliveryState = "pending"
	DeliveryDelivered DeliveryState = "delivered" // answered with 2xx
	DeliveryRefused   DeliveryState = "refused"   // the receiver does not want it, or it may not be reached
	DeliveryGaveUp    DeliveryState = "gave_up"   // not taken in all the time there was
)

// Delivery says what became of a callback, the value of its task's or batch's key in
// the bucket "callbacks". A reaper writes it by compare-and-set before it sends, so
// that of several one does, and after that.
type Delivery struct {
	State       DeliveryState `json:"state"`
	Tries       int           `json:"tries"`
	Refusals    int           `json:"refusals,omitzero"` // in a row
	LastStatus  int           `json:"last_status,omitzero"`
	LastError   string        `json:"last_error,omitzero"` // a word from a small set, never what the receiver said
	NextAt      time.Time     `json:"next_at,omitzero"`    // pending: not before
	DeliveredAt time.Time     `json:"delivered_at,omitzero"`
	Op          string        `json:"op"` // of this write

	Unknown Unknown `json:",embed"`
}

// Done says whether nothing more is sent.
func (d Delivery) Done() bool { return d.State != "" && d.State != DeliveryPending }

// CallbackStatus is a delivery as the API shows it.
type CallbackStatus struct {
	URL         string        `json:"url,omitzero"`   // of a batch; that of a task stands in its spec
	State       DeliveryState `json:"state,omitzero"` // once it is due
	Tries       int           `json:"tries"`
	LastStatus  int           `json:"last_status,omitzero"`
	LastError   string        `json:"last_error,omitzero"`
	NextAt      time.Time     `json:"next_at,omitzero"`
	DeliveredAt time.Time     `json:"delivered_at,omitzero"`
}

// View is the delivery as the API shows it.
func (d Delivery) View() *CallbackStatus {
	if d.State == "" {
		d.State = DeliveryPending
	}
	return &CallbackStatus{
		State: d.State, Tries: d.Tries, LastStatus: d.LastStatus, LastError: d.LastError, NextAt: d.NextAt, DeliveredAt: d.DeliveredAt,
	}
}
