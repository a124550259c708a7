package schemas

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Port is a port that the task listens on and that others than its owner shall reach.
// One without a name is named after its number.
type Port struct {
	Name     string   `json:"name,omitzero"` // a DNS label
	Port     int      `json:"port"`
	Protocol Protocol `json:"protocol,omitzero"` // "" is http

	Unknown Unknown `json:",embed"`
}

// Protocol is what is spoken on a port.
type Protocol string

// The protocols.
const (
	ProtocolHTTP Protocol = "http" // HTTP/1.1, WebSocket and all else that begins as such
	ProtocolH2C  Protocol = "h2c"  // HTTP/2 without TLS, such as gRPC
	ProtocolTCP  Protocol = "tcp"  // anything: it gets a port of its own
)

// MaxPorts is how many ports a spec may name.
const MaxPorts = 16

func (s *Spec) checkPorts(c *checker) {
	if len(s.Ports) > MaxPorts {
		c.add("ports", CodeInvalidValue, "must be at most %d", MaxPorts)
		return
	}
	seen := map[string]bool{}
	for i, p := range s.Ports {
		at := fmt.Sprintf("ports.%d.", i)
		c.value(dnsLabel(p.Name), at+"name", "must be 1 to 63 of a-z, 0-9 and -, and neither begin nor end with -")
		c.value(!seen[p.Name], at+"name", "stands there twice")
		seen[p.Name] = true
		c.value(p.Port >= 1 && p.Port <= 65535, at+"port", "must be 1 to 65535")
		c.value(slices.Contains([]Protocol{ProtocolHTTP, ProtocolH2C, ProtocolTCP}, p.Protocol), at+"protocol", `must be "http", "h2c" or "tcp"`)
	}
}

// completePorts fills in what a client may leave out.
func (s *Spec) completePorts() {
	for i := range s.Ports {
		p := &s.Ports[i]
		p.Name = cmp.Or(p.Name, strconv.Itoa(p.Port))
		p.Protocol = cmp.Or(p.Protocol, ProtocolHTTP)
	}
}

func dnsLabel(s string) bool {
	return s != "" && len(s) <= 63 && s[0] != '-' && s[len(s)-1] != '-' && !strings.ContainsFunc(s, func(r rune) bool {
		return r != '-' && (r < 'a' || r > 'z') && (r < '0' || r > '9')
	})
}

// Endpoint is where a port of a task is reached from outside.
type Endpoint struct {
	Name     string   `json:"name"`
	URL      string   `json:"url"`  // such as "http://LABEL.tasks.example" or "tcp://tasks.example:20007"
	Host     string   `json:"host"` // its host name
	Port     int      `json:"port"` // at that host; not the port in the task
	Protocol Protocol `json:"protocol"`
}

// HostnameKey is the secret of a site from which the hostnames of its tasks follow, and the
// digests of what may hold secrets.
type HostnameKey struct {
	Secret []byte `json:"secret"`
}

// HostnameKeyBytes is how long the secret is.
const HostnameKeyBytes = 32

// Label is the first label of the hostname of a task's port: the same at every gateway
// and at all times, and nobody without the key can tell it.
func (k HostnameKey) Label(id TaskID, port string) string {
	return k.label(string(id) + "\x00" + port)
}

// InstanceLabel is the first label of the hostname of a port of an instance, by its key:
// the same for each task that comes to be it.
func (k HostnameKey) InstanceLabel(instance, port string) string {
	return k.label("instance\x00" + instance + "\x00" + port)
}

func (k HostnameKey) label(of string) string {
	return strings.ToLower(base32.StdEncoding.EncodeToString(k.mac(of)))[:LabelBytes]
}

// Digest tells what differs in words that begin with what they are. It is the same at every
// gateway, and nobody without the key can tell by it whether a guess is right.
func (k HostnameKey) Digest(words ...string) string {
	of := "digest"
	for _, w := range words {
		of += fmt.Sprintf("\x00%d:%s", len(w), w)
	}
	return hex.EncodeToString(k.mac(of))
}

func (k HostnameKey) mac(of string) []byte {
	h := hmac.New(sha256.New, k.Secret)
	h.Write([]byte(of))
	return h.Sum(nil)
}

// LabelBytes is the length of a Label: 130 bits.
const LabelBytes = 26

// OpenPort is a port of a task as the header of its record says it.
type OpenPort struct {
	Name     string
	Port     int
	Protocol Protocol
	Public   int // with tcp: the port at the gateways
}

// DefaultPort is the name of a port that only the image names.
const DefaultPort = "default"

// Ports are those of the spec or, where it names none, the one that the image exposes,
// once a worker has said which.
func (r *Record) Ports() []Port {
	if len(r.Spec.Ports) == 0 && r.Exposed != 0 {
		return []Port{{Name: DefaultPort, Port: r.Exposed, Protocol: ProtocolHTTP}}
	}
	return r.Spec.Ports
}

// portsHeader is the value of HeaderPorts: "web:8080:http db:6379:tcp:20007".
func (r *Record) portsHeader() string {
	var words []string
	for _, p := range r.Ports() {
		word := fmt.Sprintf("%s:%d:%s", p.Name, p.Port, p.Protocol)
		if public := r.Public[p.Name]; public != 0 {
			word += ":" + strconv.Itoa(public)
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

// ParsePortsHeader reads a HeaderPorts. What it does not understand it leaves out: a
// newer service may have written it.
func ParsePortsHeader(header string) (ports []OpenPort) {
	for word := range strings.FieldsSeq(header) {
		parts := strings.Split(word, ":")
		if len(parts) < 3 {
			continue
		}
		p := OpenPort{Name: parts[0], Protocol: Protocol(parts[2])}
		var err error
		if p.Port, err = strconv.Atoi(parts[1]); err != nil {
			continue
		}
		if len(parts) > 3 {
			if p.Public, err = strconv.Atoi(parts[3]); err != nil {
				continue
			}
		}
		ports = append(ports, p)
	}
	return ports
}

// PortLease says to which task a TCP port of the gateways belongs. It is held until the
// task is final.
type PortLease struct {
	Task TaskID `json:"task"`
	Name string `json:"name"`        // of the port in its spec
	Op   string `json:"op,omitzero"` // names the write: two gateways may want one port for one task

	Unknown Unknown `json:",embed"`
}
