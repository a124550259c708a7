package schemas

import (
	"crypto/sha256"
	"encoding/hex"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// InstanceOf says of a task that it is the one instance of a template for an owner. It
// holds what the template said when the task was accepted.
type InstanceOf struct {
	Template   string `json:"template"`
	Owner      string `json:"owner,omitzero"`      // "" if it is shared by all owners
	Connection string `json:"connection,omitzero"` // how the template words a connection
	Renewals   int    `json:"renewals,omitzero"`   // so far
	Most       *int   `json:"most,omitzero"`       // renewals that it may have; any number if not given

	Unknown Unknown `json:",embed"`
}

// Key is that of the instance in the bucket "instances".
func (i *InstanceOf) Key() string { return InstanceKey(i.Template, i.Owner) }

// InstanceKey is the key of the instance of a template for an owner, "" for one that all
// owners share: the template's name and a hash of the owner, who may be any text.
func InstanceKey(template, owner string) string { return template + "." + OwnerHash(owner) }

// OwnerHash stands for an owner in keys.
func OwnerHash(owner string) string {
	if owner == "" {
		return "shared"
	}
	sum := sha256.Sum256([]byte(owner))
	return hex.EncodeToString(sum[:16])
}

// MaxOwnerBytes is how long the name of an owner may be.
const MaxOwnerBytes = 128

// CheckOwner says what is wrong with the name of an owner, nil if nothing is.
func CheckOwner(owner string) *Error {
	if owner == "" || len(owner) > MaxOwnerBytes || !utf8.ValidString(owner) || strings.ContainsFunc(owner, unicode.IsControl) {
		return &Error{Status: 422, Code: CodeInvalidValue, Field: "owner",
			Detail: "must be 1 to " + strconv.Itoa(MaxOwnerBytes) + " bytes of UTF-8 without control characters, percent-encoded"}
	}
	return nil
}

// InstanceEntry is a value of the bucket "instances": which task is the instance. It is
// replaced when that task is final, and deleted with its record.
type InstanceEntry struct {
	Template string    `json:"template"`
	Owner    string    `json:"owner,omitzero"`
	Task     TaskID    `json:"task"`
	At       time.Time `json:"at"`
}

// Instance is the one task of a template for an owner, as the API shows it.
type Instance struct {
	Template     string     `json:"template"`
	Owner        string     `json:"owner,omitzero"`
	Shared       bool       `json:"shared,omitzero"` // all owners of the template have this one
	Task         TaskID     `json:"task"`
	State        State      `json:"state"`
	Ready        bool       `json:"ready"` // it runs, and has passed its health check if it has one
	Reason       Reason     `json:"reason,omitzero"`
	Message      string     `json:"message,omitzero"`
	Progress     string     `json:"progress,omitzero"`
	Canceling    bool       `json:"canceling,omitzero"` // it has been told to end
	Endpoints    []Endpoint `json:"endpoints"`          // until it is over
	Connection   string     `json:"connection"`         // such as "nc HOST PORT" or a URL; "" while there is none
	AcceptedAt   time.Time  `json:"accepted_at"`
	ExpiresAt    time.Time  `json:"expires_at,omitzero"` // once it runs
	SecondsLeft  int64      `json:"seconds_left"`
	RenewalsLeft *int       `json:"renewals_left,omitzero"` // any number if not given
}

// AsInstance gives a task as the instance that it is, for the owner who asks.
func (t *Task) AsInstance(owner string) Instance {
	of := t.Instance
	i := Instance{
		Template: of.Template, Owner: owner, Shared: of.Owner == "", Task: t.ID, State: t.State, Ready: t.Ready, Reason: t.Reason, Message: t.Message,
		Progress: t.Progress, Canceling: t.Cancel != nil && !t.State.Final(), Endpoints: t.Endpoints, Connection: connection(of.Connection, t.Endpoints),
		AcceptedAt: t.Timings.Accepted, ExpiresAt: t.ExpiresAt, SecondsLeft: t.SecondsLeft,
	}
	if of.Most != nil && !t.State.Final() {
		left := max(0, *of.Most-of.Renewals)
		i.RenewalsLeft = &left
	}
	return i
}

// connection says how the endpoints are reached: as format says, or else as is usual for
// the first of them. It is empty while they are not known.
func connection(format string, endpoints []Endpoint) string {
	if len(endpoints) == 0 {
		return ""
	}
	if format == "" {
		if e := endpoints[0]; e.Protocol == ProtocolTCP {
			return "nc " + e.Host + " " + strconv.Itoa(e.Port)
		}
		return endpoints[0].URL
	}
	said, _ := fillConnection(format, func(port, what string) (string, bool) {
		for _, e := range endpoints {
			if port != "" && e.Name != port {
				continue
			}
			switch what {
			case "host":
				return e.Host, true
			case "port":
				return strconv.Itoa(e.Port), true
			}
			return e.URL, true
		}
		return "", true
	})
	return said
}

// fillConnection fills {host}, {port} and {url} in, which are of the first endpoint, and
// {NAME.host} and so on, which are of that port. ok says whether value knew all of them.
func fillConnection(format string, value func(port, what string) (string, bool)) (said string, ok bool) {
	var b strings.Builder
	for {
		before, rest, open := strings.Cut(format, "{")
		b.WriteString(before)
		if !open {
			return b.String(), !strings.Contains(before, "}")
		}
		word, after, closed := strings.Cut(rest, "}")
		port, what := "", word
		if i := strings.LastIndexByte(word, '.'); i >= 0 {
			port, what = word[:i], word[i+1:]
		}
		v, known := value(port, what)
		if !closed || !known || what != "host" && what != "port" && what != "url" || strings.Contains(before, "}") {
			return "", false
		}
		b.WriteString(v)
		format = after
	}
}

// InstanceRequest is the body of PUT /v1/instances/{template}/{owner}. All of it may be
// left out.
type InstanceRequest struct {
	Values map[string]string `json:"values,omitzero"` // of this owner, such as a flag, by the names that the template gives them; never shown
	TTL    Duration          `json:"ttl,omitzero"`    // the template's if not given
}

// RenewRequest is the body of PATCH /v1/instances/{template}/{owner}.
type RenewRequest struct {
	Renew bool     `json:"renew,omitzero"` // the deadline becomes the template's ttl from now
	TTL   Duration `json:"ttl,omitzero"`   // from now, instead
}

// InstanceList is a page of instances.
type InstanceList struct {
	Items      []Instance `json:"items"`
	NextCursor string     `json:"next_cursor,omitzero"`
}
