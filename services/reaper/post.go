package reaper

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"syscall"
	"time"
)

// outcome is what came of one request.
type outcome struct {
	status int    // 0: no answer
	word   string // what went wrong, from a small set; "" after a 2xx
	// refused: nothing speaks for another result the next time.
	refused bool
	after   time.Duration // for how long the receiver wants no other try; 0: it did not say
}

// poster sends callbacks to addresses that clients chose. It believes neither them nor
// what answers: it connects to public addresses only, follows nothing, and reads little.
type poster struct {
	client  *http.Client
	timeout time.Duration
}

const (
	readOfAnswer = 4 << 10
	dialTimeout  = 5 * time.Second
)

func newPoster(allow []netip.Prefix, timeout time.Duration) *poster {
	dialer := &net.Dialer{
		Timeout: min(dialTimeout, timeout),
		// This sees each address that is dialled, after its name was resolved: what a name
		// resolved to before, or to somebody else, counts for nothing.
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			to, err := netip.ParseAddrPort(address)
			if err != nil || !mayReach(to.Addr(), allow) {
				return errAddress
			}
			return nil
		},
	}
	return &poster{timeout: timeout, client: &http.Client{
		Transport: &http.Transport{ // Proxy is nil: the environment's would dial in our place
			DialContext: dialer.DialContext, TLSHandshakeTimeout: dialTimeout, ResponseHeaderTimeout: timeout,
			TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}, MaxResponseHeaderBytes: 16 << 10,
			MaxIdleConns: 64, MaxIdleConnsPerHost: perHost, IdleConnTimeout: 30 * time.Second, DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

func (p *poster) close() { p.client.CloseIdleConnections() }

// send sends body once.
func (p *poster) send(ctx context.Context, method, url string, header http.Header, body []byte) outcome {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return outcome{word: "url", refused: true}
	}
	req.Header = header
	resp, err := p.client.Do(req)
	if err != nil {
		return failed(err)
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, readOfAnswer) // so that the connection can be used again
	o := outcome{status: resp.StatusCode, after: retryAfterOf(resp.Header, time.Now())}
	switch s := resp.StatusCode; {
	case s/100 == 2:
		return o
	case s/100 == 3:
		o.word, o.refused = "redirect", true
	default:
		o.word = "status " + strconv.Itoa(s)
		o.refused = s/100 == 4 && s != http.StatusRequestTimeout && s != http.StatusTooManyRequests
	}
	return o
}

// retryAfterOf reads a Retry-After: seconds, or a date. A date is as far away as the
// answer's own Date says, since the receiver's clock is not ours.
func retryAfterOf(h http.Header, now time.Time) time.Duration {
	given := h.Get("Retry-After")
	if n, err := strconv.ParseUint(given, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	at, err := http.ParseTime(given)
	if err != nil {
		return 0
	}
	if date, err := http.ParseTime(h.Get("Date")); err == nil {
		now = date
	}
	return max(0, at.Sub(now))
}

// failed says in a word why there was no answer. The error itself names addresses of
// the inside, and goes nowhere.
func failed(err error) outcome {
	var dns *net.DNSError
	var op *net.OpError
	var record tls.RecordHeaderError
	var cert *tls.CertificateVerificationError
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, errAddress):
		return outcome{word: "address not allowed", refused: true}
	case errors.As(err, &dns):
		return outcome{word: "name not found"}
	case errors.As(err, &cert), errors.As(err, &record):
		return outcome{word: "tls"}
	case errors.As(err, &timeout) && timeout.Timeout():
		return outcome{word: "timeout"}
	case errors.As(err, &op) && op.Op == "dial":
		return outcome{word: "no connection"}
	}
	return outcome{word: "broken answer"}
}

var errAddress = errors.New("an address that callbacks may not reach")

// mayReach says whether callbacks may go to an address: to one of the public internet,
// or to what the operator allows.
func mayReach(a netip.Addr, allow []netip.Prefix) bool {
	a = a.Unmap().WithZone("")
	for _, p := range allow {
		if p.Contains(a) {
			return true
		}
	}
	if !a.IsGlobalUnicast() || a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() {
		return false
	}
	for _, p := range notPublic {
		if p.Contains(a) {
			return false
		}
	}
	return true
}

// notPublic are the ranges of the IANA registries that are no public hosts, beyond those
// that netip knows; ranges that lead to an IPv4 address inside; and addresses at which
// clouds tell a machine its secrets.
var notPublic = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"), // shared; also a cloud's metadata
	netip.MustParsePrefix("168.63.129.16/32"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"),
	netip.MustParsePrefix("192.88.99.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("203.0.113.0/24"),
	netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("::/96"),
	netip.MustParsePrefix("64:ff9b::/96"), // NAT64
	netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("100::/64"),
	netip.MustParsePrefix("2001::/23"), // Teredo and others
	netip.MustParsePrefix("2001:db8::/32"),
	netip.MustParsePrefix("2002::/16"), // 6to4
	netip.MustParsePrefix("3fff::/20"),
	netip.MustParsePrefix("5f00::/16"),
	netip.MustParsePrefix("fec0::/10"),
}
