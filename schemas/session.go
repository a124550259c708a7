package schemas

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
)

// Keys of the bucket "keys".
const (
	KeySigning   = "signing"   // SigningKey: by which gateways sign what they ask of agents
	KeyVerifying = "verifying" // VerifyingKey: its public half, which agents may read
	KeyHostnames = "hostnames" // HostnameKey: from which the hostnames of tasks follow
)

// Verb is what a gateway asks of an agent.
type Verb string

// VerbOpen opens a session.
const VerbOpen Verb = "open"

// HeaderSignature is the header of a request to an agent with the signature over its
// body, in base64. An agent in its account could be made to receive what another client
// there sends, so a request proves itself.
const HeaderSignature = "Dayfly-Signature"

// SessionKind is what a session is for.
type SessionKind string

// The kinds.
const (
	SessionExec   SessionKind = "exec"   // runs a program: a command, a terminal, a background one
	SessionAttach SessionKind = "attach" // goes on with one that runs
	SessionMain   SessionKind = "main"   // takes the streams of the task's own process
	SessionDial   SessionKind = "dial"   // a connection to a port of the task
	SessionPut    SessionKind = "put"    // a tar, to be unpacked in the task
	SessionGet    SessionKind = "get"    // a file or a folder of the task, as a tar
	SessionList   SessionKind = "list"   // of files
	SessionDelete SessionKind = "delete" // of files
	SessionExecs  SessionKind = "execs"  // lists programs: an ExecList on channel 0
	SessionEnd    SessionKind = "end"    // ends a program
)

// SessionKinds gives all of them.
func SessionKinds() []SessionKind {
	return []SessionKind{SessionExec, SessionAttach, SessionMain, SessionDial, SessionPut, SessionGet, SessionList, SessionDelete, SessionExecs, SessionEnd}
}

// Open asks the agent of Worker for a session with the task that it holds under Epoch.
// Instance is that of the agent's process, and Gateway and Number never come twice: so a
// request counts once, and no clock is asked.
type Open struct {
	Worker   WorkerID    `json:"worker"`
	Instance string      `json:"instance"`
	Gateway  string      `json:"gateway"` // a random id of the gateway's process
	Number   uint64      `json:"number"`
	Kind     SessionKind `json:"kind"`
	Task     TaskID      `json:"task"`
	Epoch    Epoch       `json:"epoch"`

	Port   int         `json:"port,omitzero"`   // dial
	Exec   *ExecOpen   `json:"exec,omitzero"`   // exec
	Attach *ExecAttach `json:"attach,omitzero"` // exec in the foreground, attach, main; execs, end: of one program
	Grace  Duration    `json:"grace,omitzero"`  // end: between TERM and KILL
	Files  *FilesOpen  `json:"files,omitzero"`  // put, get, list, delete

	Unknown Unknown `json:",embed"`
}

// ExecOpen is the program of a session.
type ExecOpen struct {
	Argv       []string `json:"argv"`
	Env        []string `json:"env,omitzero"` // K=V
	Workdir    string   `json:"workdir,omitzero"`
	Timeout    Duration `json:"timeout,omitzero"`
	Background bool     `json:"background,omitzero"`
	Terminal   *Window  `json:"terminal,omitzero"`
	Stdin      bool     `json:"stdin,omitzero"` // something comes; a terminal always has it
	Keep       bool     `json:"keep,omitzero"`  // it waits a while for a client that is gone
}

// ExecAttach says how somebody takes the streams of a program. Who had them before has
// them no more.
type ExecAttach struct {
	ID     ExecID `json:"id,omitzero"`     // attach, execs, end
	Stdout int64  `json:"stdout,omitzero"` // output from there on
	Stderr int64  `json:"stderr,omitzero"`
	Newest bool   `json:"newest,omitzero"` // main: from where the last client left, or at the most ExecWindow before the end
	Acks   bool   `json:"acks,omitzero"`   // the client acknowledges output; else what is sent counts as taken
}

// Address is that of the session's streams.
func (o Open) Address() string {
	return SessionAddress(o.Worker, o.Gateway, strconv.FormatUint(o.Number, 10))
}

// Opened is the answer to Open: nothing if it is open, or a code and a message, or the
// instance of the agent that answers, if it is another than was asked.
type Opened struct {
	Code     Code   `json:"code,omitzero"`
	Message  string `json:"message,omitzero"` // a sentence for people
	Instance string `json:"instance,omitzero"`
	Exec     ExecID `json:"exec,omitzero"` // that was started, or taken

	Unknown Unknown `json:",embed"`
}

// SigningKey is an Ed25519 key pair: the seed of 32 bytes.
type SigningKey struct {
	Seed []byte `json:"seed"`
}

// VerifyingKey is the public half of a SigningKey, 32 bytes.
type VerifyingKey struct {
	Public []byte `json:"public"`
}

// signed is what a signature is over: the verb, and the body of the request.
func signed(v Verb, body []byte) []byte {
	return append([]byte("dayfly.agent."+string(v)+"\n"), body...)
}

func (k SigningKey) private() (ed25519.PrivateKey, error) {
	if len(k.Seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("a signing key has %d bytes, not %d", ed25519.SeedSize, len(k.Seed))
	}
	return ed25519.NewKeyFromSeed(k.Seed), nil
}

// Verifying is the public half.
func (k SigningKey) Verifying() (VerifyingKey, error) {
	private, err := k.private()
	if err != nil {
		return VerifyingKey{}, err
	}
	return VerifyingKey{private.Public().(ed25519.PublicKey)}, nil
}

// Sign makes the value of HeaderSignature for a request to an agent.
func (k SigningKey) Sign(v Verb, body []byte) (string, error) {
	private, err := k.private()
	if err != nil {
		return "", err
	}
	return base64.StdEncoding.EncodeToString(ed25519.Sign(private, signed(v, body))), nil
}

// ErrSignature says that a request to an agent does not prove that a gateway made it.
var ErrSignature = errors.New("the signature is not that of a gateway")

// Verify checks the value of HeaderSignature.
func (k VerifyingKey) Verify(v Verb, body []byte, signature string) error {
	given, err := base64.StdEncoding.DecodeString(signature)
	if err != nil || len(k.Public) != ed25519.PublicKeySize || !ed25519.Verify(k.Public, signed(v, body), given) {
		return ErrSignature
	}
	return nil
}

// Numbers tells which numbers of one counter have come before, in about their order:
// what is more than 64 behind the highest counts as one that has. The zero value has
// seen none; numbers begin at 1.
type Numbers struct{ highest, seen uint64 }

// First says whether n comes for the first time, and remembers it.
func (r *Numbers) First(n uint64) bool {
	switch {
	case n > r.highest:
		if n-r.highest >= 64 {
			r.seen = 0
		} else {
			r.seen <<= n - r.highest
		}
		r.highest = n
	case n == 0 || r.highest-n >= 64 || r.seen&(1<<(r.highest-n)) != 0:
		return false
	}
	r.seen |= 1 << (r.highest - n)
	return true
}
