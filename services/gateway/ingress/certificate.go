package ingress

import (
	"crypto/tls"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// Certificate is one in two files, which is read again when they change.
type Certificate struct {
	certFile, keyFile string
	every             time.Duration // how often the files are looked at
	log               zerolog.Logger
	metrics           *Metrics

	mu      sync.Mutex
	current *tls.Certificate // under mu
	seen    [2]fileState     // under mu: of the last try
	looked  time.Time        // under mu
}

// fileState tells a file that was written anew.
type fileState struct {
	changed time.Time
	size    int64
}

// LoadCertificate reads a certificate with its chain, and its key, in PEM.
func LoadCertificate(certFile, keyFile string, log zerolog.Logger, metrics *Metrics) (*Certificate, error) {
	c := &Certificate{certFile: certFile, keyFile: keyFile, every: time.Second, log: log, metrics: metrics}
	c.seen, c.looked = c.states(), time.Now()
	pair, err := c.load()
	if err != nil {
		return nil, err
	}
	c.current = pair
	return c, nil
}

func (c *Certificate) load() (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return nil, fmt.Errorf("certificate of the ingress: %w", err)
	}
	c.metrics.Certificate.Set(float64(pair.Leaf.NotAfter.Unix()))
	return &pair, nil
}

func (c *Certificate) states() (s [2]fileState) {
	for i, name := range []string{c.certFile, c.keyFile} {
		if info, err := os.Stat(name); err == nil {
			s[i] = fileState{info.ModTime(), info.Size()}
		}
	}
	return s
}

// get gives the certificate for a handshake. Files that cannot be used are said once, and
// the certificate before them stays.
func (c *Certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.looked) < c.every {
		return c.current, nil
	}
	c.looked = time.Now()
	now := c.states()
	if now == c.seen {
		return c.current, nil
	}
	c.seen = now
	pair, err := c.load()
	if err != nil {
		c.metrics.BadCert.Inc()
		c.log.Warn().Err(err).Msg("new certificate not used; the one before stays")
		return c.current, nil
	}
	c.current = pair
	c.log.Info().Time("expires", pair.Leaf.NotAfter).Msg("new certificate")
	return pair, nil
}
