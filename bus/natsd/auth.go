package natsd

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"strings"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"dayfly.dev/schemas"
)

// WorkerToken is the password of a worker's agent, whose user is the worker's id. It
// follows from the join secret, so a server lets a new agent in without having heard
// of it before, and a token says nothing about those of other workers.
func WorkerToken(joinSecret string, w schemas.WorkerID) string {
	mac := hmac.New(sha256.New, []byte(joinSecret))
	mac.Write([]byte(w))
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(mac.Sum(nil)))
}

// gate lets clients in: the core services by their password, and agents by the token
// of their worker, each into its account. It is asked instead of the users of the
// configuration text, which only a standalone server reads; so agents come and go
// without a change of the configuration on any server of a cluster.
type gate struct {
	cfg          Config
	core, agents *server.Account
}

var _ server.Authentication = (*gate)(nil)

// Check implements server.Authentication. It is called for several clients at a time.
func (g *gate) Check(c server.ClientAuthentication) bool {
	if g.core == nil || g.agents == nil {
		return false // the server has not started yet
	}
	o := c.GetOpts()
	if o.Username == CoreUser {
		if !same(o.Password, g.cfg.CorePassword) {
			return false
		}
		c.RegisterUser(&server.User{Username: CoreUser, Account: g.core})
		return true
	}
	w, err := schemas.ParseWorkerID(o.Username)
	if err != nil {
		return false
	}
	password, known := g.cfg.Workers[w]
	ok := known && same(o.Password, password)
	if g.cfg.JoinSecret != "" {
		ok = same(o.Password, WorkerToken(g.cfg.JoinSecret, w)) || ok
	}
	if !ok {
		return false
	}
	publish, subscribe := schemas.AgentPermissions(w)
	c.RegisterUser(&server.User{Username: string(w), Account: g.agents, Permissions: &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: publish},
		Subscribe: &server.SubjectPermission{Allow: subscribe},
		Response:  &server.ResponsePermission{MaxMsgs: maxResponses, Expires: responsesFor},
	}})
	return true
}

// An agent may answer so often, and so long, whoever asks it something.
const (
	maxResponses = 1000
	responsesFor = time.Minute
)

// same compares in constant time, whatever the lengths are.
func same(given, want string) bool {
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(want))
	return want != "" && subtle.ConstantTimeCompare(a[:], b[:]) == 1
}
